"""The operations of a graph by kind, and their arguments by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from initflow.models.graph import PART, Node

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
MAX_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d")
AVERAGE_POOLS = ("avg_pool1d", "avg_pool2d", "avg_pool3d")
ADAPTIVE_POOLS = ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
AVERAGING = (*AVERAGE_POOLS, *ADAPTIVE_POOLS, "mean", "sum")
DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout")
PRODUCTS = ("matmul", "bmm", "baddbmm", "mm")
ATTENTION = "scaled_dot_product_attention"
# What only puts entries in other places, or leaves some out.
REARRANGING = frozenset(
    (
        "reshape",
        "view",
        "flatten",
        "unflatten",
        "transpose",
        "permute",
        "t",
        "T",
        "mT",
        "adjoint",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "repeat",
        "tile",
        "cat",
        "concat",
        "concatenate",
        "stack",
        "hstack",
        "vstack",
        "dstack",
        "chunk",
        "split",
        "split_with_sizes",
        "tensor_split",
        "unbind",
        "getitem",
        "narrow",
        "select",
        "index_select",
        "flip",
        "roll",
        "pad",
        "contiguous",
        "clone",
        "view_as",
        "reshape_as",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "repeat_interleave",
        "broadcast_to",
        "unfold",
        "diagonal",
        "interpolate",
    )
)
_SPATIAL = ("input", "kernel_size", "stride", "padding")
NAMES: dict[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("bias", "input", "weight"),
    "embedding": ("input", "weight"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "batch_norm": (
        *("input", "running_mean", "running_var", "weight"),
        *("bias", "training", "momentum", "eps"),
    ),
    "instance_norm": (
        *("input", "running_mean", "running_var", "weight"),
        *("bias", "use_input_stats", "momentum", "eps"),
    ),
    "mean": ("input", "dim", "keepdim"),
    "sum": ("input", "dim", "keepdim"),
    "softmax": ("input", "dim"),
    ATTENTION: ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale"),
}
NAMES |= dict.fromkeys(
    CONVOLUTIONS, ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
)
NAMES |= dict.fromkeys(
    TRANSPOSED,
    ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
)
NAMES |= dict.fromkeys(MAX_POOLS, (*_SPATIAL, "dilation", "ceil_mode", "return_indices"))
NAMES |= dict.fromkeys(
    AVERAGE_POOLS, (*_SPATIAL, "ceil_mode", "count_include_pad", "divisor_override")
)
NAMES |= dict.fromkeys(ADAPTIVE_POOLS, ("input", "output_size"))
NAMES |= dict.fromkeys(DROPOUTS, ("input", "p", "training"))
NAMES |= dict.fromkeys(("matmul", "mm", "bmm"), ("input", "weight"))


def arguments(node: Node) -> dict[str, Any]:
    """What ``node``'s function was called with, by the names that torch gives them."""
    names = NAMES.get(node.function, ())
    return {**dict(zip(names, node.arguments, strict=False)), **node.keywords}


def each(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    """A setting that is one for all axes, or one for each."""
    found = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return found * axes if len(found) == 1 else found


def is_part(node: Node) -> bool:
    """Whether it is one of several tensors that an operation gives."""
    whole = node.arguments[0] if node.arguments else None
    return node.function == PART and isinstance(whole, Node) and whole.shape is None


def rearranges(node: Node) -> bool:
    function = node.arguments[0].function if is_part(node) else node.function
    if function == "interpolate":
        return arguments(node).get("mode", "nearest") in ("nearest", "nearest-exact")
    if function == "pad":
        return not _padding(node)
    return function in REARRANGING


def _padding(node: Node) -> object:
    """What a constant padding is filled with."""
    positional = node.arguments[3] if len(node.arguments) > 3 else None
    return node.keywords.get("value", positional)


def is_weighted(node: Node) -> bool:
    """Whether it applies a weight, a matrix or a kernel, that does not depend on the batch."""
    known = arguments(node)
    if node.function in ("matmul", "mm", "addmm"):
        weight = known.get("weight")
        return isinstance(weight, Tensor) and weight.dim() == 2 and isinstance(known["input"], Node)
    names = ("linear", "embedding", *CONVOLUTIONS, *TRANSPOSED)
    return node.function in names and isinstance(known.get("weight"), Tensor)


def drops(node: Node) -> float:
    """The probability with which a dropout in training mode drops an entry, else 0."""
    known = arguments(node)
    if node.function not in DROPOUTS or not known.get("training", True):
        return 0.0
    return float(known.get("p", 0.5))

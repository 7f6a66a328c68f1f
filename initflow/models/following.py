"""What follows a layer's output on the graph: the first elementwise function that is not linear.

It is looked for through normalizations, dropout, pooling, changes of shape, sums and gates, up to
the next layers. A function may be made of several operations (x · sigmoid(x), gelu's
approximation): all of those between the output and the one in which they meet are run as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from initflow.errors import SettingError, cause
from initflow.initializers.activations import ACTIVATIONS, Activation
from initflow.models.graph import Graph, Node
from initflow.models.weights import Matrix

SIGMOIDS = {"sigmoid", "hardsigmoid", "tanh", "softmax"}
ADDING = {"add", "sub", "cat", "concat", "stack"}
NORMALIZING = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"}
NORMALIZING |= {"local_response_norm", "normalize"}
RESHAPING = {"flatten", "view", "reshape", "transpose", "permute", "contiguous", "unflatten"}
RESHAPING |= {"squeeze", "unsqueeze", "getitem", "chunk", "split", "swapaxes", "movedim", "t"}
RESHAPING |= {"expand", "repeat", "flip", "roll", "select", "narrow", "mT", "T", "clone", "to"}
RESHAPING |= {"float", "double", "half", "bfloat16", "type", "type_as", "detach", "unbind"}
RESHAPING |= {"pixel_shuffle", "pixel_unshuffle", "view_as", "reshape_as", "pad", "unfold"}
POOLING = {"mean", "sum", "amax", "interpolate", "upsample"}
POOLING |= {f"{how}_pool{n}d" for n in (1, 2, 3) for how in ("max", "avg", "lp")}
POOLING |= {f"adaptive_{how}_pool{n}d" for n in (1, 2, 3) for how in ("max", "avg")}
POOLING |= {f"max_pool{n}d_with_indices" for n in (1, 2, 3)}
DROPPING = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "stochastic_depth"}
DROPPING |= {"feature_alpha_dropout", "feature_dropout", "identity", "drop_path"}
PASSING = ADDING | NORMALIZING | RESHAPING | POOLING | DROPPING
NAMED = {"relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu"}
NAMED |= {"mish", "sigmoid", "tanh", "softplus", "softsign", "hardtanh", "hardswish", "hardsigmoid"}
NAMED |= {"hardshrink", "softshrink", "tanhshrink", "logsigmoid", "log_sigmoid", "threshold"}
ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "rdiv", "rtruediv", "neg", "pow", "square"}
ARITHMETIC |= {"sqrt", "rsqrt", "abs", "absolute", "exp", "expm1", "log", "log1p", "reciprocal"}
ARITHMETIC |= {"sin", "cos", "sinh", "cosh", "asinh", "atan", "arctan", "erf", "erfc", "sign"}
ARITHMETIC |= {"clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "where", "rpow"}
ARITHMETIC |= {"gt", "ge", "lt", "le", "float", "double", "clone", "round", "floor", "ceil"}
ELEMENTWISE = NAMED | ARITHMETIC


@dataclass(frozen=True)
class Followed:
    """An elementwise function by its ``name``; ``problem`` says why it is no ``activation``."""

    name: str
    activation: Activation | None = None
    problem: str = ""


def weighing(graph: Graph, matrices: Sequence[Matrix]) -> dict[Node, list[Matrix]]:
    """The operations that multiply by a matrix, with those that they multiply by."""
    by_id: dict[int, list[Matrix]] = {}
    by_module: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        for original in matrix.slot.originals:
            by_id.setdefault(id(original), []).append(matrix)
        by_module.setdefault(matrix.module, []).append(matrix)
    found = {}
    for node in graph.nodes:
        known = [m for x in node.constants for m in by_id.get(id(x), ())]
        if node.function in RECURRENT:
            known = by_module.get(node.module, [])
        elif node.function == "multi_head_attention_forward":
            known = by_module.get(node.module, []) + by_module.get(
                f"{node.module}.out_proj".lstrip("."), []
            )
        elif not known and node.function in PRODUCTS and node.constants:
            known = by_module.get(node.module, [])  # what is made of parameters: parametrized
        if known:
            found[node] = list(dict.fromkeys(known))
    return found


RECURRENT = {"rnn", "rnn_tanh", "rnn_relu", "lstm", "gru", "rnn_cell", "lstm_cell", "gru_cell"}
RECURRENT |= {"rnn_tanh_cell", "rnn_relu_cell"}
PRODUCTS = {"linear", "bilinear", "embedding", "embedding_bag", "matmul", "addmm", "mm", "bmm"}
PRODUCTS |= {f"conv{n}d" for n in (1, 2, 3)} | {f"conv_transpose{n}d" for n in (1, 2, 3)}


def after(graph: Graph, node: Node, products: Mapping[Node, object]) -> Followed | None:
    """The function that the output of ``node`` meets first, None where it meets none."""
    waiting, seen = [node], {node}
    while waiting:
        x = waiting.pop(0)
        closed = _meeting(graph, x, products)
        if closed:
            return closed
        for user in graph.users[x]:
            if user in products or user in seen:
                continue
            alone = _as_function([user], x) if _is_of(user, {x}) else None
            if alone and not _is_affine(alone):
                return _followed([user], alone)
            gated = user.function == "mul" and _gates_beside(user, x)
            if alone or gated or user.function in PASSING:
                seen.add(user)
                waiting.append(user)
    return None


def _gates_beside(node: Node, x: Node) -> bool:
    """Whether what ``x`` is multiplied by only weighs it."""
    return all(is_gate(other, x) for other in node.sources if other is not x)


def is_gate(node: Node, beside: Node) -> bool:
    """Whether a factor only weighs the other: it lies in [0, 1], or has fewer entries."""
    if node.function in SIGMOIDS:
        return True
    if node.shape is None or beside.shape is None:
        return False
    return torch.Size(node.shape).numel() < torch.Size(beside.shape).numel()


def _meeting(graph: Graph, x: Node, products: Mapping[Node, object]) -> Followed | None:
    """The function of ``x`` alone in which all that is made of it meets, unless it is linear."""
    inside: list[Node] = []
    known = {x}
    waiting = list(graph.users[x])
    if len(waiting) < 2:  # a single operation is looked at by itself
        return None
    for node in _later(graph, x):
        if node in products or not _is_of(node, known):
            if any(source in known for source in node.sources):
                break
            continue
        inside.append(node)
        known.add(node)
        needed = known - {node}
        if all(user in known for one in needed for user in graph.users[one]):
            function = _as_function(inside, x)
            if function and not _is_affine(function):
                return _followed(inside, function)
            return None
    return None


def _later(graph: Graph, x: Node) -> Iterable[Node]:
    """Some operations after ``x``: no function is made of more."""
    start = graph.places[x] + 1
    return graph.nodes[start : start + 200]


def _is_of(node: Node, known: set[Node]) -> bool:
    """Whether it is an elementwise function of what is ``known``, and of numbers."""
    sources = node.sources
    return (
        node.function in ELEMENTWISE
        and node.call is not None
        and bool(sources)
        and all(source in known for source in sources)
        and (node.function == "prelu" or all(x.numel() == 1 for x in node.constants))
    )


def _as_function(nodes: Sequence[Node], x: Node) -> Callable[[Tensor], Tensor] | None:
    """What ``nodes`` make of ``x``, as a function of a tensor; None where they cannot be run."""
    nodes = list(nodes)

    def function(value: Tensor) -> Tensor:
        values: dict[Node, Any] = {x: value}
        for node in nodes:
            assert node.call is not None
            arguments = [_filled(each, values) for each in node.arguments]
            keywords = {key: _filled(each, values) for key, each in node.keywords.items()}
            keywords = {key: v for key, v in keywords.items() if key != "inplace"}
            values[node] = _run(node, arguments, keywords)
        result: Tensor = values[nodes[-1]]
        return result

    try:
        with torch.no_grad():
            function(_probe())
    except Exception:  # noqa: BLE001 - what is no function of numbers alone is none
        return None
    return function


def _run(node: Node, arguments: list[Any], keywords: Mapping[str, Any]) -> Any:
    assert node.call is not None
    if node.function == "prelu":  # a slope for each channel: their mean
        x, slope = arguments
        return torch.where(x > 0, x, slope.detach().double().mean() * x)
    first = [a.clone() if isinstance(a, Tensor) else a for a in arguments]  # it may write into it
    return node.call(*first, **keywords)


def _filled(value: Any, values: Mapping[Node, Any]) -> Any:
    if isinstance(value, Node):
        return values[value]
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(each, values) for each in value)
    return value


def _probe() -> Tensor:
    return torch.linspace(-31, 33, 321, dtype=torch.float64)


def _is_affine(function: Callable[[Tensor], Tensor]) -> bool:
    with torch.no_grad():
        y = function(_probe())
    if y.dtype == torch.bool:
        return False
    return bool((y.diff().diff().abs() <= 1e-6 * (1 + y.abs().max())).all())


def _followed(nodes: Sequence[Node], function: Callable[[Tensor], Tensor]) -> Followed:
    """A built-in one, where the values are its values."""
    x = _probe()
    with torch.no_grad():
        y = function(x)
    for name, activation in ACTIVATIONS.items():
        if y.dtype == x.dtype and torch.allclose(activation.function(x), y, rtol=0, atol=1e-9):
            return Followed(name, activation)
    name = _name(nodes)
    try:
        return Followed(name, Activation.of(function, name))
    except SettingError as error:
        return Followed(name, problem=cause(error))


def _name(nodes: Sequence[Node]) -> str:
    """``leaky_relu(0.2)``, or the operations that it is made of."""
    if len(nodes) > 1:
        named = [node.function for node in nodes if node.function in NAMED]
        return f"x·{named[0]}" if named else " ".join(dict.fromkeys(n.function for n in nodes))
    (node,) = nodes
    values = [*node.arguments, *(v for k, v in node.keywords.items() if k != "inplace")]
    # A dropout's, or whether it is in place, is a bool.
    numbers = [v for v in values if isinstance(v, (int, float, str)) and not isinstance(v, bool)]
    told = ", ".join(f"{v:g}" if isinstance(v, (int, float)) else v for v in numbers)
    return f"{node.function}({told})" if told else node.function

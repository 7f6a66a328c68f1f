"""The layers of any ``nn.Module``: which they are, what they are called, and how their units lie.

They are its modules of the types in :data:`LAYERS`, and Hugging Face's ``Conv1D``, by their first
names in ``model.named_modules()``. A recurrent module holds one for each gate of each of its
layers, ``lstm.l0.forget``, and an ``nn.MultiheadAttention`` one for each projection,
``attention.query``. What else holds weights is named as not measured.
"""

from __future__ import annotations

import re
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from initflow.errors import SettingError

# And the axis of what they give that the units lie along.
LAYERS: dict[type[nn.Module], int] = {
    nn.Linear: -1,
    nn.Bilinear: -1,
    nn.Embedding: -1,
    nn.EmbeddingBag: -1,
    nn.Conv1d: -2,
    nn.Conv2d: -3,
    nn.Conv3d: -4,
    nn.ConvTranspose1d: -2,
    nn.ConvTranspose2d: -3,
    nn.ConvTranspose3d: -4,
}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
COMPILED = "OptimizedModule"  # its type's name: importing torch._dynamo takes seconds
ORIGINAL = "_orig_mod"  # where a compiled module has what it was made of
AS_COMPILED = re.compile(rf"\.{ORIGINAL}(?=\.|$)")
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# A recurrent module's gates, in the order in which their rows are packed into its weights, each
# with its activation function; an RNN's is a setting.
_RNN = {"hidden": "tanh"}
_LSTM = {"input": "sigmoid", "forget": "sigmoid", "cell": "tanh", "output": "sigmoid"}
_GRU = {"reset": "sigmoid", "update": "sigmoid", "new": "tanh"}
GATES: dict[type[nn.Module], dict[str, str]] = {
    nn.RNN: _RNN,
    nn.RNNCell: _RNN,
    nn.LSTM: _LSTM,
    nn.LSTMCell: _LSTM,
    nn.GRU: _GRU,
    nn.GRUCell: _GRU,
}
# An attention's; the first three in the order in which their rows are packed into in_proj_weight.
PROJECTIONS = ("query", "key", "value", "out_proj")
COMPILED = "OptimizedModule"  # its type's name: importing torch._dynamo takes seconds
ORIGINAL = "_orig_mod"  # where a compiled module has what it was made of
AS_COMPILED = re.compile(rf"\.{ORIGINAL}(?=\.|$)")
# Types whose weights scale each unit by itself and mix none: they are no layers, and not missed.
NORMALIZATION = re.compile(r".*Norm([123]d)?")

T = TypeVar("T")


def check(model: object) -> None:
    """Raise what a user is to change before a model can be looked into."""
    if not isinstance(model, nn.Module):
        raise SettingError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise SettingError(
            "model must not be scripted: its functions run where nothing sees them; give the model "
            "as it was before scripting"
        )
    if any(map(is_lazy, model.parameters())):
        kind = type(model).__name__
        raise SettingError(f"model must have its weights; {kind} is lazy: call it on a batch first")


def named(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are a layer, or hold some that are no modules, by name."""
    return {name: module for name, module in _modules(model).items() if is_measured(module)}


def is_measured(module: nn.Module) -> bool:
    return bool(units_axis(module) or gates(module)) or isinstance(module, nn.MultiheadAttention)


def gates(module: nn.Module) -> dict[str, str]:
    """Their names with their activation functions; none of a module that is not recurrent."""
    its = next((names for kind, names in GATES.items() if isinstance(module, kind)), {})
    return {gate: str(getattr(module, "nonlinearity", function)) for gate, function in its.items()}


def recurrences(name: str, module: nn.Module) -> list[str]:
    """The layers of a recurrent module of ``name``, each of which has all the gates.

    They are in the order of its weights: ``lstm.l0``, ``lstm.l0_reverse``, ``lstm.l1``. A cell is
    one by itself.
    """
    if not isinstance(module, nn.RNNBase):
        return [name]
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [f"{name}.l{at}{way}" for at in range(module.num_layers) for way in directions]


def names(model: nn.Module) -> list[str]:
    """Those that what is measured of ``model`` may go by."""
    found: list[str] = []
    for name, module in named(model).items():
        if of := gates(module):
            found += [f"{one}.{gate}" for one in recurrences(name, module) for gate in of]
        elif isinstance(module, nn.MultiheadAttention):
            found += [f"{name}.{projection}" for projection in PROJECTIONS]
        else:
            found.append(name)
    return list(dict.fromkeys(found))


def not_measured(model: nn.Module) -> dict[str, str]:
    """The types of those modules that hold parameters and are no layers, by name.

    Normalizations are left out, and the parts of a parametrized weight, which is its layer's. Of
    a model with nothing to measure, the model itself is named.
    """
    modules = _modules(model)
    found = {
        name: type(module).__name__
        for name, module in modules.items()
        if _is_missed(module) and "parametrizations" not in name.split(".")
    }
    if found or named(model):
        return found
    return {next(iter(modules)): type(model).__name__}


def _is_missed(module: nn.Module) -> bool:
    kinds = (kind.__name__ for kind in type(module).__mro__)
    if is_measured(module) or any(map(NORMALIZATION.fullmatch, kinds)):
        return False
    its = next(module.parameters(recurse=False), None)
    return its is not None or nn.utils.parametrize.is_parametrized(module)


def units_axis(module: nn.Module) -> int:
    """0 for a module that is no layer."""
    if _is_conv1d_of_hugging_face(module):
        return -1
    return next((axis for kind, axis in LAYERS.items() if isinstance(module, kind)), 0)


def rows_by_unit(weight: Tensor, groups: int) -> Tensor:
    """A transposed convolution's weight, (in, out/groups, …), as (out, in/groups, …).

    Each group of inputs gives a group of the units, and no other.
    """
    by_group = weight.view(groups, -1, *weight.shape[1:])
    return by_group.transpose(1, 2).flatten(0, 1)


def rows(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight, or the gradient by it, with the units along the first axis."""
    weight = weight.detach()
    if isinstance(module, TRANSPOSED):
        return rows_by_unit(weight, module.groups)
    if isinstance(module, EMBEDDINGS) or _is_conv1d_of_hugging_face(module):
        return (weight.to_dense() if weight.is_sparse else weight).t()
    return weight


def _is_conv1d_of_hugging_face(module: nn.Module) -> bool:
    """A linear layer whose weight is (in, out), as GPT-2 has it."""
    if all(kind.__name__ != "Conv1D" for kind in type(module).__mro__) or not hasattr(module, "nf"):
        return False
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is None or (weight.dim() == 2 and weight.shape[1] == module.nf)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by their first names, which are different; the model's own is its type's."""
    (_, root), *others = uncompiled(model).named_modules()
    found: dict[str, nn.Module] = {}
    for given, module in (*others, (type(model).__name__.lower(), root)):
        if module is not uncompiled(module):
            continue
        name = AS_COMPILED.sub("", given)
        while name in found:
            name += "_"
        found[name] = module
    return {name: root, **found}  # the model comes first


def bare(model: nn.Module) -> list[nn.Module]:
    """``model``, what it wraps, if it is compiled or called on several devices, and so on."""
    chain = [model]
    while (inner := _wrapped(chain[-1])) is not chain[-1]:
        chain.append(inner)
    return chain


def _wrapped(module: nn.Module) -> nn.Module:
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner: nn.Module = module.module
        return inner
    return uncompiled(module)


def uncompiled(module: T) -> T:
    """What ``torch.compile`` made ``module`` of; any other as it is."""
    if type(module).__name__ == COMPILED:
        original: T = getattr(module, ORIGINAL)
        return original
    return module

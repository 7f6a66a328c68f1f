"""The layers of any ``nn.Module``: which they are, what they are called, and how their units lie.

They are its modules of type ``nn.Linear``, ``nn.Conv1d`` to ``nn.Conv3d`` and
``nn.ConvTranspose1d`` to ``nn.ConvTranspose3d``, by their first names in
``model.named_modules()``. What else holds weights is named as not measured,
``nn.MultiheadAttention`` for one, which applies its projections without calling a module.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from initflow.errors import SettingError

# And the axis of what they give that the units lie along.
LAYERS: dict[type[nn.Module], int] = {
    nn.Linear: -1,
    nn.Conv1d: -2,
    nn.Conv2d: -3,
    nn.Conv3d: -4,
    nn.ConvTranspose1d: -2,
    nn.ConvTranspose2d: -3,
    nn.ConvTranspose3d: -4,
}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Types whose weights scale each unit by itself and mix none: they are no layers, and not missed.
NORMALIZATION = re.compile(r".*Norm([123]d)?")


def check(model: object) -> None:
    """Raise what a user is to change before a model can be looked into."""
    if not isinstance(model, nn.Module):
        raise SettingError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if any(map(_is_compiled, model.modules())):
        raise SettingError(
            "model must not be compiled: fused kernels have no layers to look into; give the model "
            "as it was before compiling"
        )
    if any(map(is_lazy, model.parameters())):
        kind = type(model).__name__
        raise SettingError(f"model must have its weights; {kind} is lazy: call it on a batch first")


def named(model: nn.Module) -> dict[str, nn.Module]:
    """The layers by name."""
    return {name: module for name, module in _modules(model).items() if units_axis(module)}


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
    if units_axis(module) or any(map(NORMALIZATION.fullmatch, kinds)):
        return False
    its = next(module.parameters(recurse=False), None)
    return its is not None or nn.utils.parametrize.is_parametrized(module)


def units_axis(module: nn.Module) -> int:
    """0 for a module that is no layer."""
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
    return rows_by_unit(weight, module.groups) if isinstance(module, TRANSPOSED) else weight


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by their first names, which are different; the model's own is its type's."""
    (_, root), *others = model.named_modules()
    found: dict[str, nn.Module] = {}
    for given, module in (*others, (type(model).__name__.lower(), root)):
        name = given
        while name in found:
            name += "_"
        found[name] = module
    return {name: root, **found}  # the model comes first


def _is_compiled(module: nn.Module) -> bool:
    # By name, because importing torch._dynamo takes seconds.
    return (
        isinstance(module, torch.jit.ScriptModule)
        or type(module).__name__ == "OptimizedModule"
        or vars(module).get("_compiled_call_impl") is not None
    )

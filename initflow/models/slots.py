"""A module's tensor as it is trained: a parameter, or what a parametrization makes of some.

Weight and spectral norm, in both forms that torch has had, orthogonal and a user's own: a weight
is read as the module computes with it, and written through what makes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

POWER_ITERATIONS = 15  # what torch's own spectral norm starts with


@dataclass(frozen=True, eq=False)
class Slot:
    """A module's tensor, a parameter or what is made of some: a parametrized weight.

    ``originals`` are the parameters that are trained.
    """

    name: str
    module: nn.Module
    attribute: str

    @property
    def originals(self) -> list[nn.Parameter]:
        return _originals(self.module, self.attribute)

    @property
    def is_plain(self) -> bool:
        return isinstance(self.module._parameters.get(self.attribute), nn.Parameter)  # noqa: SLF001

    @torch.no_grad()
    def read(self) -> Tensor:
        """What the module computes with, detached."""
        hook = _old_hook(self.module, self.attribute)
        if hook and hasattr(hook, "n_power_iterations"):
            return hook.compute_weight(self.module, do_power_iteration=False).detach()  # type: ignore[no-any-return]
        if hook:
            return hook.compute_weight(self.module).detach()  # type: ignore[no-any-return]
        with _still(self.module, self.attribute):
            value: Tensor = getattr(self.module, self.attribute)
        return value.detach()

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        hook = _old_hook(self.module, self.attribute)
        if hook:
            _write_old(self.module, self.attribute, hook, value)
        elif self.is_plain:
            self.originals[0].copy_(value)
        else:
            value = value.to(self.originals[0])
            setattr(self.module, self.attribute, value)
            for each in _parametrizations(self.module, self.attribute):
                if hasattr(each, "_power_method"):  # spectral norm's estimate is of the old weight
                    matrix = each._reshape_weight_to_matrix(value)  # noqa: SLF001
                    each._power_method(matrix, POWER_ITERATIONS)  # noqa: SLF001


def of(name: str, module: nn.Module, attribute: str) -> Slot | None:
    if not _originals(module, attribute):
        return None
    return Slot(f"{name}.{attribute}", module, attribute)


def _originals(module: nn.Module, attribute: str) -> list[nn.Parameter]:
    own = module._parameters  # noqa: SLF001
    if isinstance(own.get(attribute), nn.Parameter):
        return [own[attribute]]  # type: ignore[list-item]
    if parametrize.is_parametrized(module, attribute):
        return list(_parametrizations(module, attribute).parameters(recurse=False))
    if not _old_hook(module, attribute):
        return []
    old = [own.get(f"{attribute}_{part}") for part in ("v", "g", "orig")]
    return [p for p in old if p is not None]


def _parametrizations(module: nn.Module, attribute: str) -> Any:
    """What makes a weight, one after the other."""
    there = parametrize.is_parametrized(module, attribute)
    return module.parametrizations[attribute] if there else []  # type: ignore[index]


@contextlib.contextmanager
def _still(module: nn.Module, attribute: str) -> Iterator[None]:
    """Read without what a spectral norm learns from being read in training mode."""
    its = [each for each in _parametrizations(module, attribute) if each.training]
    for each in its:
        each.train(mode=False)
    try:
        yield
    finally:
        for each in its:
            each.train()


def _old_hook(module: nn.Module, attribute: str) -> Any:
    """What torch.nn.utils.weight_norm and spectral_norm leave on a module."""
    return next(
        (
            hook
            for hook in module._forward_pre_hooks.values()  # noqa: SLF001
            if hasattr(hook, "compute_weight") and getattr(hook, "name", None) == attribute
        ),
        None,
    )


def _write_old(module: nn.Module, attribute: str, hook: Any, value: Tensor) -> None:
    own = module._parameters  # noqa: SLF001
    original = own.get(f"{attribute}_orig")
    if original is not None:
        original.copy_(value)
        steps, hook.n_power_iterations = hook.n_power_iterations, POWER_ITERATIONS
        made = hook.compute_weight(module, do_power_iteration=True)
        hook.n_power_iterations = steps
    else:
        direction, length = own[f"{attribute}_v"], own[f"{attribute}_g"]
        assert direction is not None
        assert length is not None
        direction.copy_(value)
        length.copy_(torch.norm_except_dim(direction, 2, hook.dim))
        made = hook.compute_weight(module)
    setattr(module, attribute, made)

"""Multi-head attention looked into: its projections, which PyTorch applies inside of one function.

A mode for functions sees that function as one call. A copy of it that asks no mode makes the same
calls inside, one by one, with the same bits, and those are seen.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._device import DeviceContext

from initflow.models import batches
from initflow.models.layers import PROJECTIONS

FUNCTION = nn.functional.multi_head_attention_forward


def _opened(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """A copy of ``function`` that asks no mode whether to call it; None of one that cannot be."""
    if not isinstance(function, types.FunctionType):
        return None
    if "has_torch_function" not in function.__code__.co_names:
        return None
    asks_none = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(
        function.__code__,
        asks_none,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


OPENED = _opened(FUNCTION)
SIGNATURE = inspect.signature(FUNCTION)


@dataclass(frozen=True)
class Projection:
    """Of ``name``, whose weight are the rows from ``start`` to ``stop`` of ``parameter``."""

    name: str
    parameter: Tensor
    start: int
    stop: int

    def rows(self, packed: Tensor) -> Tensor:
        """Its own of the parameter, or of the gradient by it."""
        return packed.detach()[self.start : self.stop]


@dataclass(eq=False)
class Projections:
    """Those of one call that are still to come, each with ``units``."""

    units: int
    left: list[Projection] = field(default_factory=list)

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Projections:
        """``args`` and ``kwargs`` are those of :data:`FUNCTION`."""
        given = SIGNATURE.bind(*args, **kwargs)
        given.apply_defaults()
        its, n = given.arguments, given.arguments["embed_dim_to_check"]
        if its["use_separate_proj_weight"]:
            weights = [its[f"{letter}_proj_weight"] for letter in "qkv"]
            starts = [0, 0, 0]
        else:
            weights, starts = [its["in_proj_weight"]] * 3, [0, n, 2 * n]
        weights.append(its["out_proj_weight"])
        starts.append(0)
        places = zip(PROJECTIONS, weights, starts, strict=True)
        return cls(n, [Projection(name, of, at, at + n) for name, of, at in places])

    def next(self, weight: Tensor) -> list[Projection]:
        """The projections that are packed into the ``weight`` which is applied now."""
        n = len(weight) // self.units
        taken, self.left = self.left[:n], self.left[n:]
        return taken


def can_be_opened(func: Callable[..., Any], args: tuple[Any, ...], modes: list[Any]) -> bool:
    """Whether a call of ``func`` is one of attention, and nobody else's rules apply to it."""
    return (
        func is FUNCTION
        and OPENED is not None
        and all(type(x) in (Tensor, nn.Parameter) for x in batches.tensors(args))
        and all(isinstance(mode, DeviceContext) for mode in modes)
    )

"""What is kept of a layer while it runs: the moments of its calls, and its weight as it was.

Of a call these are of what it gave, of what it got back, and of its activation.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor

from initflow.diagnostics.signals import Branch, Cosine, Firing, Moments, MomentsByTime

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

T = TypeVar("T", Moments, MomentsByTime, Firing, Branch, Cosine)


@dataclass(eq=False)
class Call:
    """One call of a layer, whose units lie along axis ``unit``."""

    layer: str
    unit: int
    preactivation: Moments
    gradient: Moments | None = None
    activation: Moments | None = None
    firing: Firing | None = None
    branch: Branch | None = None
    cosine: Cosine | None = None

    def activated(
        self, function: Callable[..., Tensor], x: Tensor, *args: object, **kwargs: object
    ) -> None:
        activations, slopes = _slopes(function, x, *args, **kwargs)
        self.fired(activations, slopes, _steepest(function, *args, **kwargs))

    def fired(self, activations: Tensor, slopes: Tensor, steepest: float) -> None:
        """Its activation function gave ``activations``, where it had ``slopes``."""
        self.activation = Moments.of(activations, self.unit)
        self.firing = Firing.of(activations, slopes, steepest, self.unit)


@dataclass(frozen=True)
class Part:
    """A tensor that the layer multiplies by, and ``rows``, which gives its units' own of it."""

    tensor: Tensor
    rows: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class KeptWeight:
    """``rows``, (units, …), are a copy of its ``parts``, side by side."""

    rows: Tensor
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, *parts: Part) -> KeptWeight:
        return cls(_side_by_side([part.rows(part.tensor) for part in parts]).clone(), parts)

    @property
    def is_trained(self) -> bool:
        """Whether its parts are parameters that are."""
        return all(part.tensor.is_leaf and part.tensor.requires_grad for part in self.parts)

    def gradient(self, by_tensor: Mapping[int, Tensor]) -> Tensor | None:
        """The gradient, from those by each tensor's identity."""
        if any(id(part.tensor) not in by_tensor for part in self.parts):
            return None
        return _side_by_side([part.rows(by_tensor[id(part.tensor)]) for part in self.parts])

    def now(self) -> Tensor:
        """As it is by now."""
        return _side_by_side([part.rows(part.tensor) for part in self.parts])


def _side_by_side(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def added_up(parts: Iterable[T | None]) -> T | None:
    """Of those that are there."""
    there = [part for part in parts if part is not None]
    return functools.reduce(operator.add, there) if there else None


def is_plain(x: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor whose numbers can be taken as of any."""
    return (
        isinstance(x, Tensor)
        and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
        and x.dtype in FLOATS
        and x.layout is torch.strided
        and not (x.is_meta or x.is_nested)
        and x.numel() > 0
    )


@contextlib.contextmanager
def own_graph() -> Iterator[None]:
    """Record gradients apart from the training's: no checkpoint of it sees what is kept."""
    own = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda saved: saved)
    with torch.enable_grad(), own:
        yield


def _slopes(
    function: Callable[..., Tensor], x: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor]:
    """φ(x) and φ′(x), elementwise; x is left alone also by a function that works in place."""
    with own_graph():
        at = x.detach().requires_grad_()
        activations = function(at.clone(), *args, **kwargs)
        (slopes,) = torch.autograd.grad(activations, at, x.new_ones(()).expand_as(x))
    return activations.detach(), slopes


@functools.lru_cache
def _steepest(function: Callable[..., Tensor], *args: object, **kwargs: object) -> float:
    """The largest |φ′(x)| there is."""
    x = torch.linspace(-20.0, 20.0, 40_001, dtype=torch.float64)
    return _slopes(function, x, *args, **kwargs)[1].abs().max().item()

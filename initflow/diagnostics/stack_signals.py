"""The quantities of :mod:`initflow.diagnostics.signals` of many networks of one shape at once.

What is launched for it depends on the layers alone, not on how many networks there are. Of a stack
of one network each quantity has the bits that it has there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from initflow.core import machine
from initflow.diagnostics.signals import PART, Signals, Size, distinct_fraction, named_finite

NONFINITE = "nonfinite"


@dataclass(frozen=True)
class StackLayer:
    """A layer of each of some networks, of which all is measured.

    ``weight`` and ``weight_gradient`` are (members, units, inputs); ``preactivation``, ``gradient``
    and ``activation`` (members, n, units) over n images. ``saturated``: (members,), how many of the
    activations lie where the function is nearly flat. The output layer has none of these two.
    """

    weight: Tensor
    weight_gradient: Tensor
    preactivation: Tensor
    gradient: Tensor
    activation: Tensor | None = None
    saturated: Tensor | None = None

    def quantities(self) -> dict[str, Tensor]:
        """Each (members,) in double precision, with the counts of what is not finite."""
        moments = {"weight": _Moments.of(self.weight)}
        moments["preactivation"] = received = _Moments.of(self.preactivation)
        if self.activation is not None:
            moments["activation"] = _Moments.of(self.activation)
        moments["gradient"] = _Moments.of(self.gradient)
        moments["weight_gradient"] = _Moments.of(self.weight_gradient)
        found = {
            "signal_variance": received.variance.mean(1),
            "mean_cosine": mean_cosine(self.preactivation),
            "distinct_fraction": distinct_fractions(self.weight),
            "distinct_gradient_fraction": distinct_fractions(self.weight_gradient),
        }
        for tensor, of in moments.items():
            found[f"{tensor}_variance"] = of.variance.mean(1) + of.mean.var(1, correction=0)
            found[f"{tensor}_second_moment"] = (of.variance + of.mean.square()).mean(1)
            found[f"{NONFINITE}/{tensor}"] = of.nonfinite
        if self.activation is not None and self.saturated is not None:
            silent = self.activation.abs().amax(1) == 0
            count = self.activation[0].numel()
            known = moments["activation"].nonfinite == 0
            found["dead_fraction"] = silent.double().mean(1).where(known, torch.nan)
            share = self.saturated.double() / count
            found["saturated_fraction"] = share.where(known, torch.nan)
        return found


@dataclass(frozen=True)
class _Moments:
    """Mean and variance of each unit's numbers, (members, units), and what is not finite."""

    mean: Tensor
    variance: Tensor
    nonfinite: Tensor  # (members,)

    @classmethod
    def of(cls, x: Tensor) -> _Moments:
        """Of ``x``, (members, n, units)."""
        count = x.shape[1]
        mean = x.sum(1, keepdim=True, dtype=torch.float64) / count
        apart = x - mean.to(x.dtype)
        low, high = (of.view(-1, 1, 1) for of in torch.aminmax(apart.flatten(1), dim=1))
        size = torch.maximum(-low, high)
        size = size.where(size > 0, 1.0)
        squares = (apart / size).square_().sum(1, dtype=torch.float64)
        variance = squares * size.flatten(1).double().square() / count
        return cls(mean.squeeze(1), variance, _nonfinite(x, variance))


def _nonfinite(x: Tensor, variance: Tensor) -> Tensor:
    """How many entries of each network's are NaN or infinite; ``variance`` is their units'."""
    # On the CPU to ask whether there are any is cheaper than to count.
    if not machine.is_launch_bound(x.device) and variance.isfinite().all():
        return variance.new_zeros(len(x))
    return x.isfinite().logical_not_().sum((1, 2)).double()


def mean_cosine(x: Tensor) -> Tensor:
    """That of :class:`initflow.diagnostics.signals.Cosine`, of each of (members, n, units).

    NaN where there is no pair of inputs that are not 0.
    """
    at_once = max(1, PART // x.shape[2])
    n = x.new_zeros(len(x), dtype=torch.float64)
    total = x.new_zeros(len(x), x.shape[2], dtype=torch.float64)
    for part in torch.split(x, at_once, dim=1):
        rows = part.double()
        length = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
        n = n + length.count_nonzero((1, 2))
        total = total + (rows / length.where(length != 0, 1.0)).sum(1)
    mean = (total.square().sum(1) - n) / (n * (n - 1))
    return mean.where(n > 1, torch.nan).clamp(max=1.0)


def distinct_fractions(rows: Tensor) -> Tensor:
    """:func:`initflow.diagnostics.signals.distinct_fraction` of each of (members, units, inputs).

    Sorted by a number that is the same for the same rows, these lie side by side.
    """
    if not machine.is_launch_bound(rows.device):
        shares = [distinct_fraction(own) for own in rows]
        return torch.tensor(shares, dtype=torch.float64)
    rows = rows.detach() + 0.0  # minus zero is zero
    _, units, inputs = rows.shape
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (inputs,), generator=generator).to(rows.device)
    # Whole numbers add up to the same in any order, also where they wrap around.
    numbers = (rows.view(torch.int32).to(torch.int64) * factors).sum(2)
    order = numbers.argsort(1).unsqueeze(2).expand(-1, -1, inputs)
    rows = rows.gather(1, order)
    new = (rows[:, 1:] != rows[:, :-1]).any(2).sum(1) + 1
    return new.double() / units


def signals_of(values: Mapping[tuple[str, str], float], sizes: Mapping[str, Size]) -> Signals:
    """Those of a network with these ``values``, by the layer and the name of the quantity."""
    layers: dict[str, dict[str, float]] = {layer: {} for layer in sizes}
    nonfinite = {}
    for (layer, quantity), value in values.items():
        kind, _, tensor = quantity.partition("/")
        if kind != NONFINITE:
            layers[layer][quantity] = value
        elif value:
            nonfinite[f"{tensor}/{layer}"] = int(value)
    return Signals({name: named_finite(of) for name, of in layers.items()}, nonfinite, sizes)

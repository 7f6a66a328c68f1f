"""The quantities measured of a layer: one definition each, for any layer of any network.

A layer is a linear map (a matrix or a convolution) of its inputs, whose outputs are the
pre-activations, and the activation function that follows it, if one does. What a recurrent layer
hands on from time to time is measured by time step besides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

# A slope below this share of the activation function's steepest counts as saturated.
SATURATED_SLOPE = 0.05

QUANTITIES = {
    "weight_variance": "variance of the weights' entries",
    "preactivation_variance": "variance of the pre-activations, over all images and units",
    "preactivation_second_moment": "mean square of the pre-activations, the theory's q",
    "signal_variance": (
        "variance of a unit's pre-activation from image to image, in the mean over the units: "
        "what tells images apart"
    ),
    "mean_cosine": (
        "cosine between the pre-activations of two images, in the mean over all pairs: "
        "1 where all images look alike"
    ),
    "activation_variance": "variance of the activations, over all images and units",
    "activation_second_moment": "mean square of the activations",
    "gradient_variance": "variance of the loss's gradient by the pre-activations",
    "gradient_second_moment": "mean square of the loss's gradient by the pre-activations",
    "weight_gradient_variance": "variance of the loss's gradient by the weights",
    "dead_fraction": "share of the units whose activation is 0 on every image",
    "saturated_fraction": (
        "share of the activations at which the activation function's slope is, in size, "
        "below 5 % of its steepest"
    ),
    "distinct_fraction": (
        "number of different units, by their incoming weights, as a share of all units: "
        "copies count once"
    ),
    "distinct_gradient_fraction": (
        "number of different gradients that the units' incoming weights get, as a share of "
        "all units"
    ),
    "branch_ratio": (
        "mean square of what a residual branch adds, over that of the trunk that it is added to; "
        "of the last layer in the branch"
    ),
    "update_ratio": (
        "size of a step's update of the weights over that of the weights before it, each as the "
        "root of the mean square"
    ),
}
# Of recurrent layers, at each time step.
BY_TIME = {
    "hidden_signal_variance": (
        "variance of a unit's hidden state from sequence to sequence, in the mean over the units"
    ),
    "hidden_second_moment": "mean square of the hidden state",
    "hidden_gradient_second_moment": "mean square of the loss's gradient by the hidden state",
}
PART = 2**20  # entries that are looked at in double precision at once
TIMES = 8  # as many time steps at most have metrics
# The quantities of each recurrent layer, a value for each time step, or None.
ByTime = Mapping[str, Mapping[str, Sequence[float | None]]]


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each unit's numbers; the moments of two sets of images add up by ``+``.

    ``mean`` and ``variance``: (units,) in double precision, over ``count`` numbers a unit, of
    which ``nonfinite`` in all are NaN or infinite.
    """

    count: int
    mean: Tensor
    variance: Tensor
    nonfinite: int = 0

    @classmethod
    def of(cls, x: Tensor, unit: int = -1) -> Moments:
        """Of all entries of ``x``; ``unit`` is the units' axis."""
        # Sums in double, but no copy in double: filling so much memory takes most of the time.
        x, axes = _by_unit(x.detach(), unit)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        count = x.numel() // x.shape[unit]
        mean = x.sum(axes, keepdim=True, dtype=torch.float64) / count
        variance = sum_of_squares(x - mean.to(x.dtype), axes) / count
        nonfinite = 0 if variance.isfinite().all() else int((~x.isfinite()).sum())
        return cls(count, mean.flatten(), variance, nonfinite)

    @classmethod
    def of_parts(cls, x: Tensor, n: int, unit: int = -1) -> list[Moments]:
        """Those of each of ``n`` equal parts of the units, which follow upon one another."""
        whole = cls.of(x, unit)
        if whole.nonfinite:
            return [cls.of(part, unit) for part in x.chunk(n, unit)]
        parts = zip(whole.mean.chunk(n), whole.variance.chunk(n), strict=True)
        return [cls(whole.count, mean, variance) for mean, variance in parts]

    @property
    def pooled_variance(self) -> float:
        """Of all units' numbers together."""
        return (self.variance.mean() + self.mean.var(correction=0)).item()

    @property
    def own_variance(self) -> float:
        """A unit's variance, in the mean over the units."""
        return self.variance.mean().item()

    @property
    def second_moment(self) -> float:
        return (self.variance + self.mean.square()).mean().item()

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        share, apart = other.count / count, other.mean - self.mean
        between = share * (1 - share) * apart.square()
        return Moments(
            count,
            self.mean + share * apart,
            (1 - share) * self.variance + share * other.variance + between,
            self.nonfinite + other.nonfinite,
        )


@dataclass(frozen=True)
class MomentsByTime:
    """Mean and variance of each unit's numbers at each time step; ``+`` adds two sets up.

    ``mean`` and ``variance``: (times, units) in double precision, over ``count``, (times, 1),
    sequences, which may be none.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, rows: Tensor, times: Tensor, n: int) -> MomentsByTime:
        """Of ``rows``, (numbers, units), each of which is of one of ``n`` ``times``."""
        x = rows.detach().double()
        none = x.new_zeros(n, x.shape[1])
        count = torch.bincount(times, minlength=n).double().unsqueeze(1)
        mean = none.index_add(0, times, x) / count.clamp(min=1)
        variance = none.index_add(0, times, (x - mean[times]).square()) / count.clamp(min=1)
        return cls(count, mean, variance)

    @property
    def own_variance(self) -> list[float]:
        """A unit's variance, in the mean over the units, at each time step."""
        return self._where_any(self.variance)

    @property
    def second_moment(self) -> list[float]:
        return self._where_any(self.variance + self.mean.square())

    def _where_any(self, values: Tensor) -> list[float]:
        there = values.mean(1).where(self.count[:, 0] > 0, torch.nan)
        return [float(value) for value in there.tolist()]

    def shifted(self, n: int) -> MomentsByTime:
        """The same, ``n`` time steps later."""
        earlier = (0, 0, n, 0)
        return MomentsByTime(
            *(functional.pad(x, earlier) for x in (self.count, self.mean, self.variance))
        )

    def __add__(self, other: MomentsByTime) -> MomentsByTime:
        n = max(len(self.count), len(other.count))
        (count, mean, variance), (its, its_mean, its_variance) = self._padded(n), other._padded(n)
        both = count + its
        share, apart = its / both.clamp(min=1), its_mean - mean
        between = share * (1 - share) * apart.square()
        return MomentsByTime(
            both,
            mean + share * apart,
            (1 - share) * variance + share * its_variance + between,
        )

    def _padded(self, n: int) -> list[Tensor]:
        more = (0, 0, 0, n - len(self.count))
        return [functional.pad(x, more) for x in (self.count, self.mean, self.variance)]


@dataclass(frozen=True)
class Cosine:
    """The ``mean`` cosine of ``pairs`` of inputs; that of two sets is of the pairs within each."""

    pairs: int
    mean: float

    @classmethod
    def of(cls, x: Tensor) -> Cosine:
        """Of all pairs of two of ``x``, (inputs, …), that are not 0.

        The squared length of the sum of n unit vectors is n and twice the sum of their cosines.
        """
        n, total = 0, torch.zeros(x[0].numel() if len(x) else 0, dtype=torch.float64)
        at_once = max(1, PART // max(1, x[:1].numel()))
        for part in torch.split(x.detach().flatten(1), at_once):
            rows = part.double()
            if part.dtype == torch.float64:  # which cannot square all that it holds
                largest = rows.abs().amax(1, keepdim=True)
                rows = rows / largest.where(largest != 0, 1.0)
            length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            n += int(length.count_nonzero())
            total = total + (rows / length.where(length != 0, 1.0)).sum(0).cpu()
        if n < 2:
            return cls(0, 0.0)
        mean = (total.square().sum().item() - n) / (n * (n - 1))
        return cls(n * (n - 1) // 2, min(mean, 1.0))  # NaN, which stands first, stays NaN

    def __add__(self, other: Cosine) -> Cosine:
        pairs = self.pairs + other.pairs
        share = other.pairs / max(pairs, 1)
        return Cosine(pairs, (1 - share) * self.mean + share * other.mean)


@dataclass(frozen=True)
class Branch:
    """Sums of squares of what a branch adds and of its trunk; those of two sets add up by ``+``."""

    added: Tensor
    trunk: Tensor

    @property
    def ratio(self) -> float:
        return (self.added / self.trunk).item()

    def __add__(self, other: Branch) -> Branch:
        return Branch(self.added + other.added, self.trunk + other.trunk)


@dataclass(frozen=True)
class Firing:
    """What the units of a layer do with what they receive; two sets of images add up by ``+``.

    ``silent``: (units,) bool, True where the activation was always 0. ``saturated`` of
    ``count`` activations lie where the function is nearly flat.
    """

    silent: Tensor
    saturated: int
    count: int

    @classmethod
    def of(cls, activations: Tensor, slopes: Tensor, steepest: float, unit: int = -1) -> Firing:
        """Of ``activations`` and the function's ``slopes`` there; ``unit`` is the units' axis.

        ``steepest`` is the largest size that the function's slope has anywhere.
        """
        activations, axes = _by_unit(activations, unit)
        silent = activations.abs().amax(axes) == 0
        saturated = int((slopes.abs() < SATURATED_SLOPE * steepest).count_nonzero())
        return cls(silent, saturated, activations.numel())

    @property
    def dead_fraction(self) -> float:
        return self.silent.double().mean().item()

    @property
    def saturated_fraction(self) -> float:
        return self.saturated / self.count

    def __add__(self, other: Firing) -> Firing:
        return Firing(
            self.silent & other.silent,
            self.saturated + other.saturated,
            self.count + other.count,
        )


def _by_unit(x: Tensor, unit: int) -> tuple[Tensor, list[int]]:
    """``x`` as several images, ``unit`` counting from the end, and all axes but the units'."""
    x = x if x.dim() > 1 else x.unsqueeze(0)
    return x, [axis for axis in range(x.dim()) if axis != unit % x.dim()]


def sum_of_squares(x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """Over ``axes``, or over all, in double precision; also of what single cannot square.

    Several times as fast as :func:`torch.linalg.vector_norm` in double precision.
    """
    low, high = torch.aminmax(x)
    size = torch.maximum(-low, high)
    size = size.where(size > 0, 1.0)
    axes = range(x.dim()) if axes is None else axes
    return (x / size).square_().sum(tuple(axes), dtype=torch.float64) * size.double().square()


def distinct_fraction(rows: Tensor) -> float:
    """The share of different ones among ``rows``, (units, …): 1/units where all are copies."""
    return len(torch.unique(rows.detach().flatten(1), dim=0)) / len(rows)


@dataclass(frozen=True)
class Layer:
    """All that is measured of one layer at one step; what was not there to measure is None.

    ``weight``, ``weight_gradient`` and ``updated_weight``, after the step, are (units, …); the
    output layer has no activation.
    """

    weight: Tensor
    preactivation: Moments
    gradient: Moments | None = None
    weight_gradient: Tensor | None = None
    activation: Moments | None = None
    firing: Firing | None = None
    branch: Branch | None = None
    updated_weight: Tensor | None = None
    cosine: Cosine | None = None


@dataclass(frozen=True)
class Hidden:
    """What is measured of a recurrent layer's hidden state at each time step."""

    state: MomentsByTime
    gradient: MomentsByTime | None = None


@dataclass(frozen=True)
class Size:
    """How large a layer is: its ``units``, and the ``numbers`` that it gave in all."""

    units: int
    numbers: int


@dataclass(frozen=True)
class Signals:
    """The quantities of each layer, in forward order, where they are finite numbers.

    ``sizes`` are those of the layers, by name. ``nonfinite`` counts the entries that are NaN or
    infinite, by ``tensor/layer`` (``preactivation/fc3``). ``not_measured`` are the modules that
    hold weights and are no layers of those measured, by name with their type, or with
    why. ``by_time`` has the quantities of :data:`BY_TIME` of each recurrent layer (``lstm.l0``), a
    value for each time step, None where it is not a finite number.
    """

    layers: Mapping[str, Mapping[str, float]]
    nonfinite: Mapping[str, int]
    sizes: Mapping[str, Size] = field(default_factory=dict)
    not_measured: Mapping[str, str] = field(default_factory=dict)
    by_time: ByTime = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Every value by its metric key, ``quantity/layer``."""
        return {
            f"{quantity}/{layer}": value
            for layer, values in self.named().items()
            for quantity, value in values.items()
        }

    def named(self) -> dict[str, dict[str, float]]:
        """The values by layer and quantity, also of some time steps, evenly chosen.

        These go by how much of the sequence is over in percent, which holds for sequences of any
        length: ``lstm.l0.time_000`` is the first step, ``lstm.l0.time_100`` the last.
        """
        return {layer: dict(values) for layer, values in self.layers.items()} | some_times(
            self.by_time
        )

    def by_layer(self, quantity: str) -> list[float | None]:
        """One quantity through the layers that have it measured; None where it is missing."""
        return [values.get(quantity) for values in self.layers.values()]


def is_of_a_layer(metric: str) -> bool:
    """Whether the metric is of a quantity of a layer, measured or predicted."""
    quantity, _, layer = metric.partition("/")
    return bool(layer) and quantity.removeprefix("predicted_") in QUANTITIES


def of_metrics(
    history: Mapping[str, Sequence[tuple[int, float]]],
) -> list[tuple[int, Signals]]:
    """What :meth:`Signals.metrics` made metrics of, step by step, from their (step, value) pairs.

    Other metrics are left out. The order of the layers is in none of them: they stand by name, with
    ``fc2`` before ``fc10``.
    """
    steps: dict[int, dict[str, dict[str, float]]] = {}
    for key in sorted(history, key=_by_number):
        quantity, _, layer = key.partition("/")
        if quantity in QUANTITIES and layer:
            for step, value in history[key]:
                if math.isfinite(value):
                    steps.setdefault(step, {}).setdefault(layer, {})[quantity] = value
    return [(step, Signals(layers, {})) for step, layers in sorted(steps.items())]


def _by_number(key: str) -> list[str | int]:
    """To sort a metric's key by: its layer, in whose name numbers count as such."""
    parts = re.split(r"([0-9]+)", key.partition("/")[2])
    return [int(part) if at % 2 else part for at, part in enumerate(parts)]


def some_times(by_time: ByTime) -> dict[str, dict[str, float]]:
    """The values at some time steps, evenly chosen, where they are numbers."""
    found: dict[str, dict[str, float]] = {}
    for layer, series in by_time.items():
        n = max(map(len, series.values()), default=0)
        chosen = min(n, TIMES)
        for at in range(chosen):
            done = at / max(chosen - 1, 1)
            time = round(done * (n - 1))
            values = {quantity: of[time] for quantity, of in series.items()}
            there = {q: value for q, value in values.items() if value is not None}
            found[f"{layer}.time_{round(100 * done):03}"] = there
    return found


def signals(layers: Mapping[str, Layer], hidden: Mapping[str, Hidden] | None = None) -> Signals:
    """The quantities of :data:`QUANTITIES` of ``layers``, by name in forward order.

    And those of :data:`BY_TIME` of what is ``hidden``.
    """
    found: dict[str, dict[str, float]] = {}
    nonfinite: dict[str, int] = {}
    for name, layer in layers.items():
        moments = {
            "weight": Moments.of(layer.weight),
            "preactivation": layer.preactivation,
            "activation": layer.activation,
            "gradient": layer.gradient,
        }
        values = {
            "signal_variance": layer.preactivation.own_variance,
            "distinct_fraction": distinct_fraction(layer.weight),
        }
        if layer.weight_gradient is not None:
            moments["weight_gradient"] = Moments.of(layer.weight_gradient)
            values["distinct_gradient_fraction"] = distinct_fraction(layer.weight_gradient)
        if layer.branch is not None and layer.branch.trunk > 0:
            values["branch_ratio"] = layer.branch.ratio
        if layer.updated_weight is not None:
            values["update_ratio"] = update_ratio(layer.weight, layer.updated_weight)
        if layer.cosine is not None and layer.cosine.pairs:
            values["mean_cosine"] = layer.cosine.mean
        if layer.firing is not None and not (layer.activation and layer.activation.nonfinite):
            values["dead_fraction"] = layer.firing.dead_fraction
            values["saturated_fraction"] = layer.firing.saturated_fraction
        for tensor, of in moments.items():
            if of is None:
                continue
            values[f"{tensor}_variance"] = of.pooled_variance
            values[f"{tensor}_second_moment"] = of.second_moment
            if of.nonfinite:
                nonfinite[f"{tensor}/{name}"] = of.nonfinite
        found[name] = named_finite(values)
    sizes = {
        name: Size(units := len(layer.preactivation.mean), units * layer.preactivation.count)
        for name, layer in layers.items()
    }
    by_time = {name: _by_time(of) for name, of in (hidden or {}).items()}
    return Signals(found, nonfinite, sizes, by_time=by_time)


def named_finite(values: Mapping[str, float]) -> dict[str, float]:
    """Those of the :data:`QUANTITIES`, in their order, that are finite numbers."""
    return {
        quantity: values[quantity]
        for quantity in QUANTITIES
        if quantity in values and math.isfinite(values[quantity])
    }


def update_ratio(before: Tensor, after: Tensor) -> float:
    """NaN of weights that were all 0."""
    exact = torch.promote_types(before.dtype, torch.float32)
    old = before.to(exact)
    apart, size = sum_of_squares(after.to(exact) - old).item(), sum_of_squares(old).item()
    return math.sqrt(apart / size) if size > 0 else math.nan


def _by_time(hidden: Hidden) -> dict[str, list[float | None]]:
    values = {
        "hidden_signal_variance": hidden.state.own_variance,
        "hidden_second_moment": hidden.state.second_moment,
    }
    if hidden.gradient is not None:
        values["hidden_gradient_second_moment"] = hidden.gradient.second_moment
    return {
        quantity: [value if math.isfinite(value) else None for value in series]
        for quantity, series in values.items()
    }

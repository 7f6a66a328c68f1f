"""The quantities measured of a layer: one definition each, for any layer of any network.

A layer is a linear map (a matrix or a convolution) of its inputs, whose outputs are the
pre-activations, and the activation function that follows it, if one does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
}


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
        apart = x - mean.to(x.dtype)
        variance = torch.linalg.vector_norm(apart, dim=axes, dtype=torch.float64).square() / count
        nonfinite = 0 if variance.isfinite().all() else int((~x.isfinite()).sum())
        return cls(count, mean.flatten(), variance, nonfinite)

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


def distinct_fraction(rows: Tensor) -> float:
    """The share of different ones among ``rows``, (units, …): 1/units where all are copies."""
    return len(torch.unique(rows.detach().flatten(1), dim=0)) / len(rows)


@dataclass(frozen=True)
class Layer:
    """All that is measured of one layer at one step; what was not there to measure is None.

    ``weight`` and ``weight_gradient`` are (units, …); the output layer has no activation.
    """

    weight: Tensor
    preactivation: Moments
    gradient: Moments | None = None
    weight_gradient: Tensor | None = None
    activation: Moments | None = None
    firing: Firing | None = None


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
    hold weights and are no layers of those measured, by name with their type.
    """

    layers: Mapping[str, Mapping[str, float]]
    nonfinite: Mapping[str, int]
    sizes: Mapping[str, Size] = field(default_factory=dict)
    not_measured: Mapping[str, str] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Every value by its metric key, ``quantity/layer``."""
        return {
            f"{quantity}/{layer}": value
            for layer, values in self.layers.items()
            for quantity, value in values.items()
        }

    def by_layer(self, quantity: str) -> list[float | None]:
        """One quantity through the layers that have it measured; None where it is missing."""
        return [values.get(quantity) for values in self.layers.values()]


def signals(layers: Mapping[str, Layer]) -> Signals:
    """The quantities of :data:`QUANTITIES` of ``layers``, by name in forward order."""
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
        found[name] = {
            quantity: values[quantity]
            for quantity in QUANTITIES
            if quantity in values and math.isfinite(values[quantity])
        }
    sizes = {
        name: Size(units := len(layer.preactivation.mean), units * layer.preactivation.count)
        for name, layer in layers.items()
    }
    return Signals(found, nonfinite, sizes)

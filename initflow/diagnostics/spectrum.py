"""The singular values of a network's Jacobians, beside what theory says of such wide networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from initflow.core import machine
from initflow.diagnostics import jacobian
from initflow.diagnostics.jacobian import HIDDEN, INPUT_OUTPUT, Singular
from initflow.diagnostics.reading import layers_of
from initflow.initializers.activations import Activation
from initflow.initializers.scheme import Scheme
from initflow.theory.infinite_width import variance_map
from initflow.theory.isometry import Factor, Slopes, Spectrum, Weights, spectrum
from initflow.theory.prediction import LayerStatistics
from initflow.training.model import Parameters

QUANTITIES = {
    "condition_number": "largest over smallest singular value, the median of the images'",
    "largest_singular_value": "largest singular value, of all images",
    "mean_square_singular_value": "mean square of the singular values, over all images",
}
TANGENT = "ntk_largest_eigenvalue"
DENSE = 0.01  # share of weights that may be 0 in a matrix of independent ones
SAME = 1e-3  # share by which the lengths of orthogonal rows may differ
ALIKE = 0.1  # share by which (WWᵀ)² may differ from that of independent weights
PREDICTED_LAYERS = 3
QUANTILES = (0.025, 0.25, 0.5, 0.75, 0.975)
ISOMETRY = 2.0  # factor from 1 within which 95 % of the singular values lie


@dataclass(frozen=True)
class Part:
    """The singular values of one Jacobian, measured and predicted, or the reason why not."""

    measured: Singular
    predicted: Spectrum | None
    reason: str = ""


@dataclass(frozen=True)
class SpectrumReading:
    """By the Jacobian's name, those of :mod:`initflow.diagnostics.jacobian`.

    ``tangent`` is the largest eigenvalue of the neural tangent kernel over its number of images.
    """

    images: int
    parts: dict[str, Part]
    tangent: float | None
    tangent_images: int

    @property
    def main(self) -> str:
        """The Jacobian between hidden layers or, where there is none, from input to output."""
        return HIDDEN if HIDDEN in self.parts else INPUT_OUTPUT

    def metrics(self) -> dict[str, float]:
        """``quantity/jacobian``, where it is a finite number, and what is predicted of it."""
        found: dict[str, float] = {}
        for name, part in self.parts.items():
            its = part.measured
            values = (its.condition_number, its.largest, its.mean_square)
            found |= {f"{key}/{name}": v for key, v in zip(QUANTITIES, values, strict=True)}
            if part.predicted:
                found[f"predicted_mean_square_singular_value/{name}"] = part.predicted.mean_square
        if self.tangent is not None:
            found[TANGENT] = self.tangent
        return {key: value for key, value in found.items() if math.isfinite(value)}

    def sentence(self) -> str:
        """What the main Jacobian does to lengths."""
        if self.main not in self.parts:
            return "The Jacobian is not finite."
        its = self.parts[self.main].measured
        of = "between hidden layers" if self.main == HIDDEN else "from input to output"
        low, high = its.quantile(QUANTILES[0]), its.quantile(QUANTILES[-1])
        condition = its.condition_number
        number = f"condition number {condition:.3g}" if math.isfinite(condition) else ""
        if its.zero:
            number = f"{its.zero:.0%} of all are 0 in double precision"
        is_isometry = low * ISOMETRY >= 1 and high <= ISOMETRY
        ending = ": dynamical isometry" if is_isometry else ""
        return (
            f"95 % of the Jacobian's singular values {of} lie from {low:.3g} to {high:.3g}, "
            f"{number}{ending}."
        )

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values; what is not a finite number is text."""
        return {
            "images": self.images,
            "quantities": QUANTITIES
            | {TANGENT: "largest eigenvalue of the neural tangent kernel, over its images"},
            "jacobians": {name: _as_json(part) for name, part in self.parts.items()},
            TANGENT: self.tangent,
            "ntk_images": self.tangent_images,
        }

    def as_csv(self) -> str:
        """A row for each singular value: its Jacobian, image, place from the largest, log10."""
        rows = ["jacobian,image,index,log10_singular_value"]
        for name, part in self.parts.items():
            logs = part.measured.logarithms / math.log(10)
            rows += [
                f"{name},{image},{index},{value:.6g}"
                for image, values in enumerate(logs.tolist())
                for index, value in enumerate(values)
            ]
        return "\n".join(rows) + "\n"


def read(
    parameters: Parameters, scheme: Scheme, activation: Activation, bias_init: str, images: Tensor
) -> SpectrumReading:
    """Of the network of ``parameters``, a stack of one, drawn by ``scheme``, on ``images``."""
    measured = jacobian.measure(parameters, activation, images)
    layers = layers_of(scheme, parameters, activation, bias_init)
    matrices = [weight[0].cpu().double() for weight in parameters.weights]
    found = [_weights(*both) for both in zip(matrices, layers, strict=True)]
    with machine.threads(1):
        slopes = _slopes(layers, activation, images.cpu())
        predicted = {
            name: _predicted(name, found, slopes, list(measured.singular))
            for name in measured.singular
        }
    parts = {name: Part(singular, *predicted[name]) for name, singular in measured.singular.items()}
    return SpectrumReading(measured.images, parts, measured.tangent, measured.tangent_images)


def _slopes(
    layers: Sequence[LayerStatistics], activation: Activation, images: Tensor
) -> list[Slopes]:
    """Those of the hidden layers, their pre-activations having the variances of mean field."""
    moment, found = images.double().square().mean(), []
    for at, layer in enumerate(layers[:-1]):
        sigma_w2 = layer.fan_in * layer.weight_variance
        if at == 0:
            q = sigma_w2 * moment + layer.bias_variance
        else:
            q = variance_map(activation, q, sigma_w2, layer.bias_variance)
        found.append(Slopes(layer.fan_out, activation, min(max(q.item(), 1e-70), 1e70)))
    return found


def _predicted(
    name: str,
    weights: Sequence[Weights | str],
    slopes: Sequence[Slopes],
    names: Sequence[str],
) -> tuple[Spectrum | None, str]:
    """That of the Jacobian of ``name``, or why there is none."""
    each: list[Factor | str] = [weights[0]]
    for one, matrix in zip(slopes, weights[1:], strict=True):
        each += [one, matrix]
    if name == HIDDEN:
        chosen = each[1:-2]
    elif name == INPUT_OUTPUT:
        chosen = each
    else:
        single = [one for one in names if one not in (HIDDEN, INPUT_OUTPUT)]
        at = single.index(name)
        if at not in drawn_layers(len(single)):
            return None, "of the layers, only those that are drawn have one"
        chosen = each[2 * at : 2 * at + 2]
    factors = []
    for factor in chosen:
        if isinstance(factor, str):
            return None, factor
        factors.append(factor)
    found = spectrum(factors)
    return (found, "") if found else (None, "its equations could not be solved here")


def drawn_layers(n: int) -> list[int]:
    """Which of ``n`` layers have a prediction, and are drawn: three of the hidden ones."""
    hidden = max(n - 1, 1)
    return sorted({0, hidden // 2, hidden - 1})


def _weights(matrix: Tensor, layer: LayerStatistics) -> Weights | str:
    """What theory takes a ``matrix`` for, or why it has nothing to say of it.

    A scheme's name says nothing of that: it is seen of the matrix itself.
    """
    if layer.weight_variance <= 0:
        return "theory is of weights that are drawn, and these have no variance"
    if (matrix == 0).double().mean() > DENSE:
        return "theory is of independent or orthogonal weights, and many of these are 0"
    small = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    gram = small @ small.T
    rows, columns = small.shape
    lengths = gram.diagonal()
    unequal = rows * gram.square().sum() / lengths.sum().square()  # 1 if orthogonal
    if unequal < 1 + SAME**2 * rows and rows > 1:
        variance = (lengths.mean() / columns).item()
        return Weights(layer.fan_in, layer.fan_out, variance, orthogonal=True)
    expected = (rows + columns + 1) / columns
    if abs(unequal.item() - expected) > ALIKE * expected + 3 / rows:
        return "theory is of independent or orthogonal weights, which these are not"
    return Weights(layer.fan_in, layer.fan_out, layer.weight_variance)


def _as_json(part: Part) -> dict[str, Any]:
    its = part.measured
    values = (its.condition_number, its.largest, its.mean_square)
    measured = dict(zip(QUANTITIES, values, strict=True))
    measured |= {"zero": its.zero} | {f"quantile_{q:g}": its.quantile(q) for q in QUANTILES}
    found: dict[str, Any] = {"measured": _plain(measured)}
    if part.predicted:
        theory = part.predicted
        found["predicted"] = _plain(
            {"zero": theory.zero, "mean_square_singular_value": theory.mean_square}
            | {"square_variance": theory.square_variance}
            | {f"quantile_{q:g}": theory.quantile(q) for q in QUANTILES}
        )
    else:
        found["not_predicted"] = part.reason
    return found


def _plain(values: dict[str, float]) -> dict[str, float | str]:
    return {name: v if math.isfinite(v) else str(v) for name, v in values.items()}

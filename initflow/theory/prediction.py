"""What theory predicts for the network at hand, with the band that its finite width leaves.

The expected values are those of :mod:`initflow.theory.infinite_width`, with the layers' real fans
and variances, from the images' real second moments. The band says where 95 % of networks lie that
differ in nothing but their random weights: a layer's second moment is a mean over its n units, so
chance multiplies it by a factor of relative variance of order 1/n, which the next layers pass on.
These factors, taken as log-normal, are played through for some thousands of networks at once, each
of them no more than one number a layer. For one image, ReLU and He, they have the exact law's
moments, E[M²]/E[M]² = ∏(1 + 5/n) (Hanin and Rolnick 2018, "How to Start Training: The Effect of
Initialization and Architecture"); many images share the weights, and how much of the chance is left
in their mean goes by how aligned they are.

``tests/test_prediction.py`` holds the bands against 400 simulated networks for every activation
function. They are too narrow for gelu and silu in ten layers and more, where the scale feeds on
itself: of the first layers' gradients some 80 to 90 % lie within.

Weights are taken to be independent, of mean 0. Where they are not (``constant``, ``identity``
and, for the band, ``orthogonal``), what is measured may lie elsewhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from initflow.initializers.activations import Activation
from initflow.initializers.scheme import Scheme, places
from initflow.theory.integrals import (
    expectation,
    log_slope,
    pair_expectation,
    product_moment,
    second_moment,
    slope_moment,
    slope_product_moment,
)
from initflow.training.model import Parameters, bias_bound

IMAGE_GROUPS = 32
NETWORKS = 8_192
BAND = (0.025, 0.975)
LEAST_EXCESS = 0.1  # of a few units, one direction is too much of all to be told apart
CEILING = 1e300  # what grows beyond is as good as infinite
FLOOR = 1e-60  # of variances; what chance makes of it is a number too
PREDICTED = ("preactivation_second_moment", "activation_second_moment", "gradient_second_moment")


@dataclass(frozen=True)
class LayerStatistics:
    """A fully connected layer as the theory sees it."""

    fan_in: int
    fan_out: int
    weight_variance: float
    bias_variance: float


def layers_of(
    scheme: Scheme, parameters: Parameters, activation: Activation, bias_init: str
) -> list[LayerStatistics]:
    """The layers of ``parameters`` (a stack of one), drawn by ``scheme``.

    Their variances are those that the scheme states or, where it states none, the sample's;
    of biases that it does not set, those of ``bias_init``.
    """
    found = []
    layers_at = places(parameters.widths, activation)
    for at, weights, biases in zip(layers_at, parameters.weights, parameters.biases, strict=True):
        variance, bias_variance = scheme.variance(at), scheme.bias_variance(at)
        if variance is None:
            variance = weights[0].double().var(correction=0).item()
        if not scheme.fills_biases:
            bias_variance = bias_bound(bias_init, at.fan_in) ** 2 / 3
        elif bias_variance is None:
            bias_variance = biases[0].double().square().mean().item()
        found.append(LayerStatistics(at.fan_in, at.fan_out, variance, bias_variance))
    return found


@dataclass(frozen=True)
class Ends:
    """What the prediction starts from, at either end of the network.

    ``images`` is their number, ``image_moments``: (k,), the mean squares of their pixels, in k
    groups of like ones. ``image_alignment``: the root mean square of the cosine between two.
    ``gradient_moment`` and ``gradient_alignment``: the same of the loss's gradient by the
    logits, from which the prediction goes backward.
    """

    images: int
    image_moments: Tensor
    image_alignment: float
    gradient_moment: float
    gradient_alignment: float

    @classmethod
    def of(cls, images: Tensor, output_gradient: Tensor) -> Ends:
        """Of ``images`` (n, pixels) and the loss's gradient by their logits (n, classes)."""
        moments = images.double().square().mean(1).sort().values
        groups = moments.tensor_split(min(IMAGE_GROUPS, len(moments)))
        return cls(
            len(images),
            torch.stack([group.mean() for group in groups]),
            _alignment(images),
            output_gradient.double().square().mean().item(),
            _alignment(output_gradient),
        )


def _alignment(rows: Tensor) -> float:
    """√(mean (x·y)²) / mean(x·x) over all pairs of two of ``rows`` (n, k); 1 for a single one."""
    rows = rows.double()
    n, power = len(rows), rows.square().sum(1)
    gram = rows.T @ rows if n > rows.shape[1] else rows @ rows.T
    pairs = gram.square().sum() - power.square().sum()
    if n < 2 or not power.sum():
        return 1.0
    return min(1.0, math.sqrt(max(pairs.item(), 0.0) / (n * (n - 1))) / power.mean().item())


@dataclass(frozen=True)
class Interval:
    """An ``expected`` value, and where 95 % of networks lie: from ``low`` to ``high``."""

    expected: float
    low: float
    high: float

    @classmethod
    def of(cls, expected: float, luck: Tensor) -> Interval:
        """``expected`` times e^``luck``, (networks,)."""
        low, high = torch.quantile(luck, luck.new_tensor(BAND)).exp().tolist()
        if not math.isfinite(expected):
            low = high = 1.0
        return cls(expected, expected * low, expected * high)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


Prediction = dict[str, list[Interval]]


def predict(layers: Sequence[LayerStatistics], activation: Activation, ends: Ends) -> Prediction:
    """The second moments of :data:`PREDICTED`, layer by layer; the last has no activation.

    The gradient's is carried backward from what it is at the logits.
    """
    draws = _normal_draws(2 * len(layers))
    forward = _forward(layers, activation, ends, draws[: len(layers)])
    hidden = forward[:-1]
    return {
        "preactivation_second_moment": [at.preactivation for at in forward],
        "activation_second_moment": [at.activation for at in hidden],
        "gradient_second_moment": _backward(layers, ends, hidden, draws[len(layers) :]),
    }


@dataclass(frozen=True)
class _Through:
    """A layer as predicted, and what going backward through it takes.

    ``slopes`` is E[φ′²] for each group of images (k,). In each of the networks that are
    played through, (networks,): ``luck`` is the logarithm of what chance multiplies E[φ′²] by,
    and ``radial`` what :func:`_radial` gives. ``unevenness`` is E[φ′(u₁)² φ′(u₂)²]/E[φ′²]² for
    two images u₁ and u₂, ``own_unevenness`` for one with itself, and ``alignment`` is
    E[φ′(u₁) φ′(u₂)]/E[φ′²].
    """

    preactivation: Interval
    activation: Interval
    slopes: Tensor
    luck: Tensor
    radial: Tensor
    unevenness: float
    own_unevenness: float
    alignment: float


def _forward(
    layers: Sequence[LayerStatistics], activation: Activation, ends: Ends, draws: Tensor
) -> list[_Through]:
    """Through all layers from the images to the logits; ``draws``: (layers, networks)."""

    def square(x: Tensor) -> Tensor:
        return activation.function(x).square()

    def slope_square(x: Tensor) -> Tensor:
        return activation.derivative(x).square()

    moments, alignment = ends.image_moments, ends.image_alignment
    luck = torch.zeros_like(draws[0])  # of the layer's inputs, common to all images
    own = 0.0  # variance of what an image's own is besides, as logarithms
    one = torch.ones((), dtype=torch.float64)
    found = []
    for layer, draw in zip(layers, draws, strict=True):
        q = layer.fan_in * layer.weight_variance * moments + layer.bias_variance
        q = q.clamp(max=CEILING)
        mean = q.mean().clamp(FLOOR, 1 / FLOOR)
        from_inputs = 1 - layer.bias_variance / mean.item()
        alignment = 1 - from_inputs + from_inputs * alignment
        c = mean.new_tensor(alignment)
        if from_inputs < 1:
            share = luck.new_tensor(from_inputs)
            luck = torch.logaddexp(share.log() + luck, (-share).log1p())
        possible, at_luck = _grid(mean, luck)
        moment, slope_moment_ = second_moment(activation, mean), slope_moment(activation, mean)
        unevenness = (pair_expectation(square, mean, c) / moment.square()).item()
        own_unevenness = (pair_expectation(square, mean, one) / moment.square()).item()
        own *= from_inputs**2
        own_h = own + _excess(2, 2 * alignment**2, layer)
        own *= log_slope(lambda q: second_moment(activation, q), mean).item() ** 2
        own += _excess(own_unevenness - 1, unevenness - 1, layer)

        moments = second_moment(activation, q)
        in_activation = at_luck((second_moment(activation, possible) / moment).log())
        in_activation = in_activation + _factor((unevenness - 1) / layer.fan_out, draw)
        found.append(
            _Through(
                Interval.of(
                    q.mean().item(),
                    luck
                    + _factor(2 * alignment**2 / layer.fan_out, draw)
                    + _mean_luck(own_h, ends.images),
                ),
                Interval.of(moments.mean().item(), in_activation + _mean_luck(own, ends.images)),
                slope_moment(activation, q),
                at_luck((slope_moment(activation, possible) / slope_moment_).log()),
                torch.stack([at_luck(part) for part in _radial(activation, possible)]),
                (pair_expectation(slope_square, mean, c) / slope_moment_.square()).item(),
                (pair_expectation(slope_square, mean, one) / slope_moment_.square()).item(),
                (slope_product_moment(activation, mean, c) / slope_moment_).item(),
            )
        )
        luck = in_activation
        product = (product_moment(activation, mean, c) / moment).item() ** 2
        alignment = _finite_alignment(product, unevenness, layer.fan_out)
    return found


def _backward(
    layers: Sequence[LayerStatistics], ends: Ends, hidden: Sequence[_Through], draws: Tensor
) -> list[Interval]:
    """From the logits to the first layer; ``draws``: (layers, networks)."""
    gradient, alignment = (
        torch.full_like(ends.image_moments, ends.gradient_moment),
        ends.gradient_alignment,
    )
    luck, own = torch.zeros_like(draws[0]), 0.0
    # The gradient's energy along the activations themselves, in units of that along another
    # direction: one part in n, but where a layer's scale feeds on itself it outgrows the rest.
    radial = _factor(2 * alignment**2, draws[-1]).exp()
    found = [Interval(ends.gradient_moment, ends.gradient_moment, ends.gradient_moment)]
    backward = zip(layers[:-1], layers[1:], hidden, draws[:-1], strict=True)
    for layer, after, through, draw in reversed(list(backward)):
        gradient = gradient * through.slopes * after.fan_out * after.weight_variance
        unevenness = through.unevenness * (1 + 2 * alignment**2)
        kept, received, weighted = through.radial
        excess = 1 + (radial - 1) * weighted / layer.fan_out
        excess = excess.clamp(min=LEAST_EXCESS)
        luck = luck + through.luck + excess.log()
        luck = luck + _factor((unevenness - 1) / layer.fan_out, draw)
        own += _excess(3 * through.own_unevenness - 1, unevenness - 1, layer)
        found.append(Interval.of(gradient.mean().item(), luck + _mean_luck(own, ends.images)))
        radial = (radial * kept + received) / excess
        product = (through.alignment * alignment) ** 2
        alignment = _finite_alignment(product, unevenness, layer.fan_out)
    return found[::-1]


def _radial(activation: Activation, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How a layer treats the gradient g along its own activations a, for each of ``q``.

    In units of E[φ′²]: the part of the energy along a that arrives along the activations of the
    layer before, what arrives there from other directions, and the weight of a's direction
    among what φ′ lets through. 1, 0 and 1 for a linear layer.
    """
    f, d = activation.function, activation.derivative
    q = q.clamp(FLOOR, 1 / FLOOR)
    slopes, moments = slope_moment(activation, q), second_moment(activation, q)
    kept = expectation(lambda x: x * d(x) * f(x), q).square() / (moments * q * slopes)
    whole = expectation(lambda x: (x * d(x)).square(), q) / (q * slopes)
    weight = expectation(lambda x: (f(x) * d(x)).square(), q) / (moments * slopes)
    return kept, whole - kept, weight


def _finite_alignment(product: float, unevenness: float, units: int) -> float:
    """Root mean square cosine of two images, whose squared mean product is ``product``.

    Also of unrelated ones, products summed over n units have a mean square of order 1/n.
    """
    return min(1.0, math.sqrt(product + max(unevenness - product, 0.0) / units))


def _excess(own: float, common: float, layer: LayerStatistics) -> float:
    """What an image's own relative variance, of n units, is beyond what all images share."""
    n = layer.fan_out
    return max(0.0, math.log1p(max(own, 0.0) / n) - math.log1p(max(common, 0.0) / n))


def _mean_luck(variance: float, images: int) -> Tensor:
    """The logarithm of the mean over ``images`` of log-normal factors of mean 1, (networks,).

    Where their ``variance`` is large the mean is not what is typical: one image outweighs all.
    """
    of_mean = math.expm1(min(variance, 700.0)) / images
    if of_mean < 1e-2:
        return _factor(of_mean, _own_draws(NETWORKS, 1)[:, 0])
    draws = _own_draws(256, min(images, 1_000))
    factors = math.sqrt(variance) * draws - variance / 2
    return (factors.logsumexp(1) - math.log(factors.shape[1])).repeat(NETWORKS // len(draws))


@functools.lru_cache(maxsize=2)
def _own_draws(networks: int, images: int) -> Tensor:
    """(networks, images) from N(0, 1), always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(networks, images, dtype=torch.float64, generator=generator)


def _factor(relative_variance: float, draw: Tensor) -> Tensor:
    """The logarithm of a log-normal factor of mean 1, at each ``draw`` from N(0, 1)."""
    variance = math.log1p(max(relative_variance, 0.0))
    return math.sqrt(variance) * draw - variance / 2


def _grid(q: Tensor, luck: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Variances that cover q · e^``luck``, and how values there become one for each network."""
    at = torch.linspace(luck.min().item(), luck.max().item() + 1e-9, 40, dtype=torch.float64)
    return q * at.exp(), lambda values: torch.from_numpy(np.interp(luck, at, values))


@functools.lru_cache(maxsize=2)
def _normal_draws(n: int) -> Tensor:
    """(n, networks) from N(0, 1), evenly spread, and always the same."""
    sobol = torch.quasirandom.SobolEngine(n, scramble=True, seed=0)  # type: ignore[no-untyped-call]
    uniform: Tensor = sobol.draw(NETWORKS, dtype=torch.float64)
    draws: Tensor = torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12)).T.contiguous()
    return draws

"""What theory predicts of one network, with the band that its finite width leaves.

The expected values are those of :mod:`initflow.theory.infinite_width`, with the layers' real fans
and variances, from the images' real second moments. The band says where 95 % of networks lie that
differ in nothing but their random weights: it follows the factors of
:mod:`initflow.theory.finite_width` through the layers, for some thousands of networks at once. For
one image, ReLU and He, they have the exact law's moments, E[M²]/E[M]² = ∏(1 + 5/n) (Hanin and
Rolnick 2018, "How to Start Training: The Effect of Initialization and Architecture"); many images
share the weights, and how much of the chance is left in their mean goes by how aligned they are.

``tests/theory/test_prediction.py`` compares the bands with 400 simulated networks for every
activation function. They are too narrow for gelu and silu in ten layers and more, where the scale
feeds on itself: of the first layers' gradients some 80 to 90 % lie within.

Of signals half of the networks lie below the median, within a few per cent; of gradients from 29
to 64 %, as their bands are wider than they need be: in He's ReLU network of 50 layers of 100 the
median of the gradient's change is 0.42, and 0.57 over 400 networks.

Weights are taken to be independent, of mean 0. Where they are not (``constant``, ``identity``
and, for the band, ``orthogonal``), what is measured may lie elsewhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from initflow.initializers.activations import Activation
from initflow.theory import finite_width
from initflow.theory.finite_width import FLOOR, log_factor, log_mean_factor, own_variance
from initflow.theory.integrals import (
    Function,
    log_slope,
    pair_expectation,
    product_moment,
    second_moment,
    slope_moment,
    slope_product_moment,
)

IMAGE_GROUPS = 32
BAND = (0.025, 0.975)
MEDIAN = 0.5
LEAST_EXCESS = 0.1  # with few units, one direction is a large part of them all
CEILING = 1e300  # what grows beyond is as good as infinite
WAYS = 4  # kept of the last ones: in ten layers some 3 MB each
PREDICTED = ("preactivation_second_moment", "activation_second_moment", "gradient_second_moment")


@dataclass(frozen=True)
class LayerStatistics:
    """A fully connected layer as the theory sees it."""

    fan_in: int
    fan_out: int
    weight_variance: float
    bias_variance: float


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
        return cls.of_images(images).with_gradient(*Products.of(output_gradient).end())

    @classmethod
    def of_images(cls, images: Tensor) -> Ends:
        """Of ``images`` (n, pixels), without a gradient so far."""
        moments = images.double().square().mean(1).sort().values
        groups = moments.tensor_split(min(IMAGE_GROUPS, len(moments)))
        _, aligned = Products.of(images).end()
        return cls(len(images), torch.stack([group.mean() for group in groups]), aligned, 0.0, 1.0)

    def with_gradient(self, moment: float, alignment: float) -> Ends:
        """The same images, and another gradient."""
        return replace(self, gradient_moment=moment, gradient_alignment=alignment)


@dataclass(frozen=True)
class Products:
    """Of the ``n`` rows of (…, n, k): their mean square, mean x·x, and the sum of (x·y)².

    Each is (…); the sum is over all pairs of two different rows.
    """

    NAMES: ClassVar = ("moment", "power", "pairs")

    n: int
    moment: Tensor
    power: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Products:
        rows = rows.double()
        n, k = rows.shape[-2:]
        power = rows.square().sum(-1)
        gram = rows.mT @ rows if n > k else rows @ rows.mT
        pairs = gram.square().sum((-2, -1)) - power.square().sum(-1)
        return cls(n, rows.square().mean((-2, -1)), power.mean(-1), pairs)

    def end(self) -> tuple[float, float]:
        """The mean square, and the alignment, of rows (n, k)."""
        moment, power, pairs = (of.item() for of in (self.moment, self.power, self.pairs))
        return moment, alignment(self.n, power, pairs)


def alignment(n: int, power: float, pairs: float) -> float:
    """√(mean (x·y)²) / mean(x·x) over all pairs of two of ``n`` rows; 1 for a single one.

    From what :class:`Products` has of them.
    """
    if n < 2 or not power:
        return 1.0
    return min(1.0, math.sqrt(max(pairs, 0.0) / (n * (n - 1))) / power)


@dataclass(frozen=True)
class Interval:
    """Where networks lie that differ in nothing but their weights: 95 % from ``low`` to ``high``.

    Half of them lie below the ``median``; ``expected`` is their mean, which the few largest carry.
    """

    expected: float
    low: float
    high: float
    median: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class _Chances:
    """An ``expected`` value, and what chance multiplies it by: e^``log_factors``, (networks,).

    Each of ``images`` has a factor of its own besides, with a logarithm of variance ``own``. One
    place in all ``log_factors`` is one network.
    """

    expected: float
    log_factors: Tensor
    own: float
    images: int

    def interval(self) -> Interval:
        log_factors = self.log_factors + log_mean_factor(self.own, self.images)
        at = log_factors.new_tensor((*BAND, MEDIAN))
        low, high, median = torch.quantile(log_factors, at).exp().tolist()
        if not math.isfinite(self.expected):
            low = high = median = 1.0
        return Interval(
            self.expected, self.expected * low, self.expected * high, self.expected * median
        )

    def over(self, before: _Chances) -> _Chances:
        """The factor from an earlier value to this one, network by network."""
        factor = self.expected / before.expected if before.expected else math.nan
        log_factors = self.log_factors - before.log_factors
        return _Chances(factor, log_factors, max(0.0, self.own - before.own), self.images)


Prediction = dict[str, list[Interval]]
# Of the quantities of recurrent layers by time, by the name of the layer.
PredictedByTime = Mapping[str, Mapping[str, Sequence[Interval]]]


@dataclass(frozen=True)
class Predicted:
    """What is predicted of a network: ``by_layer``, and ``changes`` from layer to layer.

    These are by quantity: that of the pre-activations from the first to the last hidden layer,
    that of the gradient back from there. They are those of single networks: a ratio of two
    medians is not their median.
    """

    by_layer: Prediction
    changes: Mapping[str, Interval]


def predict(layers: Sequence[LayerStatistics], activation: Activation, ends: Ends) -> Prediction:
    """The second moments of :data:`PREDICTED`, layer by layer; the last has no activation.

    The gradient's is carried backward from what it is at the logits.
    """
    return predicted(layers, activation, ends).by_layer


def predicted(layers: Sequence[LayerStatistics], activation: Activation, ends: Ends) -> Predicted:
    """As :func:`predict`, with what changes from the first to the last hidden layer."""
    way = _way(
        tuple(layers),
        activation,
        ends.images,
        tuple(ends.image_moments.tolist()),
        ends.image_alignment,
    )
    gradients = _backward(way, ends)
    changes = {}
    if way.change is not None:
        back = gradients[0].over(gradients[-2]).interval()
        changes = {PREDICTED[0]: way.change, PREDICTED[2]: back}
    intervals = (list(way.preactivations), list(way.activations), [g.interval() for g in gradients])
    return Predicted(dict(zip(PREDICTED, intervals, strict=True)), changes)


@dataclass(frozen=True)
class _Way:
    """The way of the images, and what a gradient finds on its way back.

    Networks that differ in their draws alone have it in common. ``change`` is that of the
    pre-activations, from the first to the last hidden layer; None without one. ``slopes`` are
    those of the hidden layers.
    """

    preactivations: tuple[Interval, ...]
    activations: tuple[Interval, ...]
    change: Interval | None
    slopes: tuple[_Slopes, ...]
    draws: Tensor  # of the gradient, (layers, networks) from N(0, 1)


@functools.lru_cache(maxsize=WAYS)
def _way(
    layers: tuple[LayerStatistics, ...],
    activation: Activation,
    images: int,
    image_moments: tuple[float, ...],
    image_alignment: float,
) -> _Way:
    """Through ``layers``, of ``images`` as :class:`Ends` has them."""
    draws = finite_width.network_draws(2 * len(layers))
    moments = torch.tensor(image_moments, dtype=torch.float64)
    ends = Ends(images, moments, image_alignment, 0.0, 1.0)
    forward = _forward(layers, activation, ends, draws[: len(layers)])
    hidden = forward[:-1]
    signals = [at.preactivation for at in forward]
    return _Way(
        tuple(at.interval() for at in signals),
        tuple(at.activation.interval() for at in hidden),
        signals[len(hidden) - 1].over(signals[0]).interval() if hidden else None,
        tuple(
            _slopes(layer, after, activation, at)
            for layer, after, at in zip(layers[:-1], layers[1:], hidden, strict=True)
        ),
        draws[len(layers) :],
    )


@dataclass(frozen=True)
class _Layer:
    """A layer's second moments, and what the backward pass needs of its pre-activations.

    ``q``: (k,), their second moments for each group of images; ``mean``: (), of all images;
    ``alignment``: the correlation of two images; ``log_factors``: (networks,), the logarithms of
    what chance in the layers before multiplies ``q`` by.
    """

    preactivation: _Chances
    activation: _Chances
    q: Tensor
    mean: Tensor
    alignment: float
    log_factors: Tensor


def _forward(
    layers: Sequence[LayerStatistics], activation: Activation, ends: Ends, draws: Tensor
) -> list[_Layer]:
    """From the images to the logits; ``draws``: (layers, networks) from N(0, 1)."""
    moments, alignment = ends.image_moments, ends.image_alignment
    log_factors = torch.zeros_like(draws[0])  # on the layer's inputs, common to all images
    own = 0.0  # variance of the logarithm of the factor that each image has besides
    found = []
    for layer, draw in zip(layers, draws, strict=True):
        q = layer.fan_in * layer.weight_variance * moments + layer.bias_variance
        q = q.clamp(max=CEILING)
        mean = q.mean().clamp(FLOOR, 1 / FLOOR)
        from_inputs = 1 - layer.bias_variance / mean.item()
        alignment = 1 - from_inputs + from_inputs * alignment
        if from_inputs < 1:
            share = log_factors.new_tensor(from_inputs)
            log_factors = torch.logaddexp(share.log() + log_factors, (-share).log1p())
        moment = second_moment(activation, mean)
        unevenness = _unevenness(activation, activation.function, moment, mean, alignment)
        own *= from_inputs**2
        own_q = own + own_variance(2, 2 * alignment**2, layer.fan_out)
        own *= log_slope(lambda q: second_moment(activation, q), mean).item() ** 2
        of_one = _unevenness(activation, activation.function, moment, mean, 1.0)
        own += own_variance(of_one - 1, unevenness - 1, layer.fan_out)

        moments = second_moment(activation, q)
        possible, by_network = finite_width.grid(mean, log_factors)
        on_activations = by_network((second_moment(activation, possible) / moment).log())
        on_activations = on_activations + log_factor((unevenness - 1) / layer.fan_out, draw)
        on_q = log_factors + log_factor(2 * alignment**2 / layer.fan_out, draw)
        of_q = _Chances(q.mean().item(), on_q, own_q, ends.images)
        of_activations = _Chances(moments.mean().item(), on_activations, own, ends.images)
        found.append(_Layer(of_q, of_activations, q, mean, alignment, log_factors))
        log_factors = on_activations
        product = (product_moment(activation, mean, mean.new_tensor(alignment)) / moment).item()
        alignment = finite_width.alignment(product**2, unevenness, layer.fan_out)
    return found


@dataclass(frozen=True)
class _Slopes:
    """What a hidden layer does to any gradient: it multiplies by its slopes.

    ``factor``: (k,), of the gradient's second moment for each group of images, by the slopes, and
    ``of_weights`` and ``fan_out`` by the weights after them. ``unevenness`` is that of two images,
    ``of_one`` that of one; ``product`` is the correlation of the slopes of two. By network are
    the logarithm of what chance before multiplies the slopes by, and what
    :func:`initflow.theory.finite_width.along_activations` says.
    """

    units: int
    factor: Tensor
    of_weights: float
    fan_out: int
    unevenness: float
    of_one: float
    product: float
    log_slopes: Tensor
    kept: Tensor
    received: Tensor
    weight: Tensor


def _slopes(
    layer: LayerStatistics, after: LayerStatistics, activation: Activation, at: _Layer
) -> _Slopes:
    """Those of the activations between ``layer``, which is ``at``, and the one ``after`` it."""
    slopes = slope_moment(activation, at.mean)
    unevenness, of_one = (
        _unevenness(activation, activation.derivative, slopes, at.mean, c)
        for c in (at.alignment, 1.0)
    )
    possible, by_network = finite_width.grid(at.mean, at.log_factors)
    kept, received, weight = map(by_network, finite_width.along_activations(activation, possible))
    c = at.mean.new_tensor(at.alignment)
    return _Slopes(
        layer.fan_out,
        slope_moment(activation, at.q),
        after.weight_variance,
        after.fan_out,
        unevenness,
        of_one,
        (slope_product_moment(activation, at.mean, c) / slopes).item(),
        by_network((slope_moment(activation, possible) / slopes).log()),
        kept,
        received,
        weight,
    )


def _backward(way: _Way, ends: Ends) -> list[_Chances]:
    """The gradient from the logits to the first layer, in forward order."""
    gradient = torch.full_like(ends.image_moments, ends.gradient_moment)
    aligned = ends.gradient_alignment
    log_factors, own = torch.zeros_like(way.draws[0]), 0.0
    # The gradient's squared length along the activations themselves, in units of that along another
    # direction: 1 in n of the whole, but more where a layer's scale feeds on itself.
    along = log_factor(2 * aligned**2, way.draws[-1]).exp()
    found = [_Chances(ends.gradient_moment, log_factors, own, ends.images)]
    for at, draw in reversed(list(zip(way.slopes, way.draws[:-1], strict=True))):
        gradient = gradient * at.factor * at.fan_out * at.of_weights
        unevenness = at.unevenness * (1 + 2 * aligned**2)
        excess = (1 + (along - 1) * at.weight / at.units).clamp(min=LEAST_EXCESS)
        log_factors = log_factors + at.log_slopes
        log_factors = log_factors + excess.log()
        log_factors = log_factors + log_factor((unevenness - 1) / at.units, draw)
        own += own_variance(3 * at.of_one - 1, unevenness - 1, at.units)
        found.append(_Chances(gradient.mean().item(), log_factors, own, ends.images))
        along = (along * at.kept + at.received) / excess
        product = at.product * aligned
        aligned = finite_width.alignment(product**2, unevenness, at.units)
    return found[::-1]


def _unevenness(
    activation: Activation, function: Function, moment: Tensor, q: Tensor, c: float
) -> float:
    """E[f(u₁)² f(u₂)²]/E[f²]² at variance ``q`` and correlation ``c``; ``moment`` is E[f²].

    f is the ``activation``'s function or its derivative.
    """
    product = pair_expectation(lambda x: function(x).square(), q, q.new_tensor(c), activation)
    return (product / moment.square()).item()

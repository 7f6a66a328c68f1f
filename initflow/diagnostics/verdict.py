"""The verdict on how signal and gradient travel through a network, by documented rules.

Forward, the first that holds:

- ``symmetric``: all units of a hidden layer have the same incoming weights.
- ``dead``: nine in ten of a hidden layer's units or more give 0 for every image.
- ``saturated``: half of a hidden layer's activations or more lie where the activation function
  is nearly flat, if it is flat on both sides (sigmoid, tanh).
- ``exploding`` or ``vanishing``: from the pixels to the logits the variance from image to image
  (``signal_variance``) changes by a factor of more than 10,000, that is 100 in size, or is not
  a finite number.
- ``ordered``: the signal keeps its size, but images all look alike at the last hidden layer: what
  of it tells two of them apart, 1 − c with c their mean cosine (``mean_cosine``), is less than
  1 % of what it is in the pixels. Mean-field theory calls networks so whose c goes to 1, in which
  it fades as e^(−layers/ξ_c), or as 44/layers² under He's scheme with ReLU. As 1 − c goes with the
  square of the distance of two images of equal length, that has shrunk to a tenth: what comes
  after needs weights ten times as large to tell them apart as well as from their pixels. The
  logits do not count: biases, which are learned at once, take away what all of them share.
- ``stable``: none of these, or a network without hidden layers that does not explode.

Backward, the first that holds:

- ``symmetric``: it is so forward, and all units of a hidden layer get the same gradient for their
  incoming weights.
- ``exploding``: from the logits to the first layer the gradient's squared length (its second
  moment times the number of units) grows by a factor of more than 10,000, or is not a finite
  number.
- ``vanishing``: it shrinks by more than that; ``dead`` or ``saturated`` where that is the
  forward verdict, and so the cause.
- ``stable``: none of these.

The factor is that of the whole way, as the learning rate is one for all layers: it must be small
enough for the layer with the largest gradient, and at 100 in size the other end learns at 1 % of
its pace. A factor of each layer, χ₁ in mean-field theory, is not judged by itself: where it is not
1 every network becomes unstable at some depth. Which depth that is :func:`margin` says of those
that are stable but more than half way there: a factor of more than 100, that is 10 in size.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from initflow.core.configurations import RECOMMENDED
from initflow.diagnostics.signals import Cosine, Signals
from initflow.initializers.activations import Activation

FACTOR = 10_000.0
NEAR = 100.0  # half way there, by its logarithm
ALIKE = 0.01
ODD = ("tanh", "linear")  # functions that keep images apart but for what random biases add to all
DEAD = 0.9
SATURATED = 0.5
_MEANING = {
    "symmetric": (
        "The units of a layer start with equal weights: with equal biases too they stay copies of "
        "each other for ever, and random biases tell them apart only slowly."
    ),
    "dead": "Nearly all units of a layer give 0 for every image, and so they learn nothing.",
    "saturated": (
        "Most activations lie where {activation} is flat, at its largest or smallest value: the "
        "weights are too large."
    ),
    "ordered": (
        "To the last hidden layer all images look alike: what tells them apart has faded to less "
        "than 1 % of its share in the pixels."
    ),
    "exploding": "Signal or gradient grow on their way: the weights are too large.",
    "vanishing": (
        "Signal or gradient shrink on their way: the weights are too small for {activation} in "
        "so many layers."
    ),
}


@dataclass(frozen=True)
class Verdict:
    """One of :data:`initflow.core.configurations.VERDICTS` for the signal, one for the gradient."""

    forward: str
    backward: str

    def __str__(self) -> str:
        return f"{self.forward} forward, {self.backward} backward"


@dataclass(frozen=True)
class Inputs:
    """What a network is given: the variance of an input from image to image, and their mean cosine.

    The variance is in the mean over the inputs. Either is None where there are no such numbers.
    """

    variance: float | None = None
    mean_cosine: float | None = None

    @classmethod
    def of(cls, x: Tensor) -> Inputs:
        """Of ``x``, (images, …), or of a single one."""
        cosine = Cosine.of(x) if x.dim() > 1 else None
        return cls(
            x.double().var(0 if len(x) > 1 else None, correction=0).mean().item(),
            cosine.mean if cosine and cosine.pairs else None,
        )


def judge(signals: Signals, inputs: Inputs, saturating: Collection[str]) -> Verdict:
    """The verdict on a network with these ``signals``.

    What is not known of ``inputs`` is that of the first layer. ``saturating`` are the layers whose
    activation function is flat on both sides.
    """
    forward = _forward(signals, inputs, saturating)
    return Verdict(forward, _backward(signals, forward))


def _forward(signals: Signals, inputs: Inputs, saturating: Collection[str]) -> str:
    if _all_copies(signals, "distinct_fraction"):
        return "symmetric"
    if any(share >= DEAD for share in _shares(signals, "dead_fraction").values()):
        return "dead"
    shares = _shares(signals, "saturated_fraction")
    if any(shares.get(layer, 0.0) >= SATURATED for layer in saturating):
        return "saturated"
    change = _change(*_signal(signals, inputs))
    if change == "vanishing" and len(signals.layers) == 1:
        return "stable"
    return "ordered" if change == "stable" and _look_alike(signals, inputs) else change


def _backward(signals: Signals, forward: str) -> str:
    if forward == "symmetric" and _all_copies(signals, "distinct_gradient_fraction"):
        return "symmetric"
    change = _change(*_gradient(signals))
    return forward if change == "vanishing" and forward in ("dead", "saturated") else change


def _signal(signals: Signals, inputs: Inputs) -> tuple[float | None, float | None]:
    """What tells images apart, at either end of the way."""
    variances = signals.by_layer("signal_variance")
    return variances[0] if inputs.variance is None else inputs.variance, variances[-1]


def _gradient(signals: Signals) -> tuple[float | None, float | None]:
    """Its squared length at the logits and at the first layer."""
    gradients = zip(signals.by_layer("gradient_second_moment"), signals.sizes.values(), strict=True)
    lengths = [moment and moment * size.numbers for moment, size in gradients]
    return lengths[-1], lengths[0]


def _look_alike(signals: Signals, inputs: Inputs) -> bool:
    """At the last hidden layer; what is added to a trunk does not say what the trunk carries."""
    hidden = [
        values["mean_cosine"]
        for values in [*signals.layers.values()][:-1]
        if "mean_cosine" in values and "branch_ratio" not in values
    ]
    if not hidden:
        return False
    before = hidden[0] if inputs.mean_cosine is None else inputs.mean_cosine
    return 1 - hidden[-1] < ALIKE * (1 - before)


def _all_copies(signals: Signals, quantity: str) -> bool:
    """Whether they are in a hidden layer; one that is added to a trunk may start as copies."""
    for name in [*signals.layers][:-1]:
        values, units = signals.layers[name], signals.sizes[name].units
        is_added = "branch_ratio" in values
        if units > 1 and not is_added and values.get(quantity, 1.0) * units < 1.5:
            return True
    return False


def _shares(signals: Signals, quantity: str) -> dict[str, float]:
    layers = signals.layers.items()
    return {name: values[quantity] for name, values in layers if quantity in values}


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None or after > FACTOR * before:
        return "exploding"
    return "vanishing" if after * FACTOR < before else "stable"


def margin(verdict: Verdict, signals: Signals, inputs: Inputs) -> str:
    """How far what is stable is from not being so, where that is not far; else empty.

    The ``signals`` are those of layers that follow upon each other, as in a feed-forward network.
    """
    said = []
    layers = len(signals.layers) - 1
    for found, what, (before, after) in (
        (verdict.forward, "the variance of its signal", _signal(signals, inputs)),
        (verdict.backward, "its gradient's squared length", _gradient(signals)),
    ):
        if found != "stable" or not (before and after and layers):
            continue
        grown = math.log(after / before)
        if abs(grown) > math.log(NEAR):
            verb, end = ("grows", "exploding") if grown > 0 else ("shrinks", "vanishing")
            times, of_one = math.exp(abs(grown)), math.exp(abs(grown) / layers)
            limit = math.ceil(layers * math.log(FACTOR) / abs(grown))
            said.append(
                f"over {layers} layers {what} {verb} {times:,.0f}-fold, {of_one:.3g}-fold a layer, "
                f"which is {end} from {FACTOR:,.0f}-fold on: at that rate at {limit} layers."
            )
    return " ".join(f"Stable, but not at any depth: {one}" for one in said)


def advice(verdict: Verdict, activation: Activation, scheme: str) -> str:
    """What a beginner should try instead, in a sentence or two; empty where all is stable.

    ``scheme`` is the name of the one that gave the weights.
    """
    found = verdict.forward if verdict.forward != "stable" else verdict.backward
    if found == "stable":
        return ""
    better = RECOMMENDED.get(activation.name, "he")
    remedy = f"Try init={better}."
    if activation.name == "sigmoid" and found != "symmetric":
        remedy = "Try init=xavier in a shallow network; in a deep one, activation=tanh or relu."
        if scheme == better:
            remedy = "Its slope is at most 1/4: try activation=tanh or relu, or fewer layers."
    elif found == "ordered" and activation.name in ODD:
        remedy = "Try bias_init=zeros, or fewer layers."
    elif scheme == better:
        remedy = "Try fewer layers, or another activation."
    return f"{_MEANING[found].format(activation=activation.name)} {remedy}"


def advice_for_model(verdict: Verdict, scheme: str) -> str:
    """What to try in a model of one's own; empty where all is stable."""
    found = verdict.forward if verdict.forward != "stable" else verdict.backward
    if found == "stable":
        return ""
    remedy = "Try init=auto."
    if scheme == "auto":
        remedy = "Try initflow.initialize(model, 'auto', residual='scaled'), or normalizations."
    meaning = _MEANING[found].format(activation="the activation function")
    return f"{meaning} {remedy}"

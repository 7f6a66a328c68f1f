"""The verdict on how signal and gradient travel through a network, by documented rules.

Forward, the first that holds:

- ``symmetric``: all units of a hidden layer have the same incoming weights.
- ``dead``: nine in ten of a hidden layer's units or more give 0 for every image.
- ``saturated``: half of a hidden layer's activations or more lie where the activation function
  is nearly flat, if it is flat on both sides (sigmoid, tanh).
- ``exploding`` or ``vanishing``: from the pixels to the logits the variance from image to image
  (``signal_variance``) changes by a factor of more than 10,000, that is 100 in size, or is not
  a finite number.
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
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from initflow.core.configurations import RECOMMENDED
from initflow.diagnostics.signals import Signals
from initflow.initializers.activations import Activation

FACTOR = 10_000.0
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


def judge(signals: Signals, before: float | None, saturating: Collection[str]) -> Verdict:
    """The verdict on a network with these ``signals``.

    ``before`` is the variance of an input from image to image, in the mean over the inputs; None
    where there are no such numbers, for which the first layer's stand then. ``saturating`` are the
    layers whose activation function is flat on both sides.
    """
    forward = _forward(signals, before, saturating)
    return Verdict(forward, _backward(signals, forward))


def _forward(signals: Signals, before: float | None, saturating: Collection[str]) -> str:
    if _all_copies(signals, "distinct_fraction"):
        return "symmetric"
    if any(share >= DEAD for share in _shares(signals, "dead_fraction").values()):
        return "dead"
    shares = _shares(signals, "saturated_fraction")
    if any(shares.get(layer, 0.0) >= SATURATED for layer in saturating):
        return "saturated"
    variances = signals.by_layer("signal_variance")
    change = _change(variances[0] if before is None else before, variances[-1])
    return "stable" if change == "vanishing" and len(variances) == 1 else change


def _backward(signals: Signals, forward: str) -> str:
    if forward == "symmetric" and _all_copies(signals, "distinct_gradient_fraction"):
        return "symmetric"
    gradients = zip(signals.by_layer("gradient_second_moment"), signals.sizes.values(), strict=True)
    lengths = [moment and moment * size.numbers for moment, size in gradients]
    change = _change(lengths[-1], lengths[0])
    return forward if change == "vanishing" and forward in ("dead", "saturated") else change


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

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

from collections.abc import Sequence
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


def judge(
    signals: Signals, activation: Activation, widths: Sequence[int], pixel_variance: float
) -> Verdict:
    """The verdict on a network of ``widths`` (pixels, hidden, …, classes).

    ``pixel_variance`` is the variance of a pixel from image to image, in the mean over them.
    """
    forward = _forward(signals, activation, widths, pixel_variance)
    return Verdict(forward, _backward(signals, widths, forward))


def _forward(
    signals: Signals, activation: Activation, widths: Sequence[int], pixel_variance: float
) -> str:
    if _all_copies(signals, "distinct_fraction", widths):
        return "symmetric"
    if _reaches(DEAD, signals, "dead_fraction"):
        return "dead"
    if activation.saturates and _reaches(SATURATED, signals, "saturated_fraction"):
        return "saturated"
    change = _change(pixel_variance, signals.by_layer("signal_variance")[-1])
    return "stable" if change == "vanishing" and len(widths) == 2 else change


def _backward(signals: Signals, widths: Sequence[int], forward: str) -> str:
    if forward == "symmetric" and _all_copies(signals, "distinct_gradient_fraction", widths):
        return "symmetric"
    gradients = signals.by_layer("gradient_second_moment")
    lengths = [m and m * units for m, units in zip(gradients, widths[1:], strict=True)]
    change = _change(lengths[-1], lengths[0])
    return forward if change == "vanishing" and forward in ("dead", "saturated") else change


def _all_copies(signals: Signals, quantity: str, widths: Sequence[int]) -> bool:
    hidden = zip(signals.by_layer(quantity), widths[1:-1], strict=False)
    return any(units > 1 and share is not None and share * units < 1.5 for share, units in hidden)


def _reaches(limit: float, signals: Signals, quantity: str) -> bool:
    return any(share is not None and share >= limit for share in signals.by_layer(quantity))


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

"""What is measured of networks as they stand; measuring changes nothing and draws nothing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from initflow.core import machine
from initflow.diagnostics.signals import Cosine, Firing, Layer, Moments, Signals, signals
from initflow.initializers.activations import Activation
from initflow.training.model import Parameters, layer_names
from initflow.training.propagation import Pass
from initflow.training.splits import Split

CHUNK = 1_000  # images evaluated at once: their activations stay in the cache
BUFFERS = 3  # numbers for each unit and image, at most, that a forward pass keeps
SHARE = 0.5  # of what is free of a GPU's memory, for these


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, in nats, and accuracy, as a fraction, over a split."""

    loss: float
    accuracy: float


def evaluate(
    parameters: Parameters, activations: Sequence[Activation], split: Split
) -> list[Evaluation]:
    """The loss and accuracy over ``split`` of each network, with its activation function.

    Nothing but the result is read from their device.
    """
    device = parameters.flat.device
    loss, correct = torch.zeros(2, parameters.members, dtype=torch.float64, device=device)
    at_size = functools.cache(functools.partial(Pass, parameters, activations))
    chunks = (torch.split(of_all, _chunk(parameters)) for of_all in (split.images, split.labels))
    for images, labels in zip(*chunks, strict=True):
        forward = at_size(len(labels))
        predicted = forward.forward(images.unsqueeze(0)).argmax(dim=2)
        loss += len(labels) * forward.losses(labels.unsqueeze(0)).to(torch.float64)
        correct += (predicted == labels).sum(dim=1)
    return [
        Evaluation(total / len(split), hits / len(split))
        for total, hits in torch.stack([loss, correct], dim=1).tolist()
    ]


def _chunk(parameters: Parameters) -> int:
    """Images at once: of a stack on a GPU as many as a share of its memory holds."""
    device = parameters.flat.device
    if not machine.is_launch_bound(device):
        return CHUNK
    numbers = BUFFERS * parameters.members * sum(parameters.widths[1:])
    return min(CHUNK, max(1, int(SHARE * machine.working_memory(str(device)) / (4 * numbers))))


def probe(split: Split, images: int) -> Split:
    """``images`` of ``split``, or all where there are fewer, evenly spaced through it.

    The same ones whatever the seed, and of all classes also where a split is sorted.
    """
    n = min(images, len(split))
    return split.take(torch.arange(n) * len(split) // n)


@dataclass(frozen=True)
class Observation:
    """One network on some images.

    ``preactivations``: for each layer (n, units), the last being the logits;
    ``output_gradient``: (n, classes), of the mean loss by the logits. Both are on the CPU.
    """

    signals: Signals
    preactivations: list[Tensor]
    output_gradient: Tensor


def observe(parameters: Parameters, activation: Activation, split: Split) -> list[Observation]:
    """What passes through each network on ``split``, layers being ``fc1``, ``fc2`` and so on.

    Gradients are those of the mean cross-entropy over the split.
    """
    both = Pass(parameters, [activation] * parameters.members, len(split))
    gradient = parameters.zeros_like()
    images, labels = split.images.unsqueeze(0), split.labels.unsqueeze(0)
    both.forward(images)
    both.backward(labels, gradient)

    def layer(at: int, member: int) -> Layer:
        preactivations = both.preactivations[at][member]
        measured = Layer(
            weight=parameters.weights[at][member],
            preactivation=Moments.of(preactivations),
            gradient=Moments.of(both.gradients[at][member]),
            weight_gradient=gradient.weights[at][member],
            cosine=Cosine.of(preactivations),
        )
        if at == len(both.outputs):  # the last layer has no activation
            return measured
        activations, slopes = both.outputs[at][member], activation.derivative(preactivations)
        firing = Firing.of(activations, slopes, activation.steepest)
        return replace(measured, activation=Moments.of(activations), firing=firing)

    names = layer_names(parameters.depth)
    return [
        Observation(
            signals({name: layer(at, member) for at, name in enumerate(names)}),
            [preactivations[member].cpu() for preactivations in both.preactivations],
            both.gradients[-1][member].cpu(),
        )
        for member in range(parameters.members)
    ]

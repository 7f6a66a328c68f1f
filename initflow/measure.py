"""What is measured of networks as they stand; measuring changes nothing and draws nothing."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from initflow.activations import Activation
from initflow.data import Split
from initflow.model import Parameters
from initflow.propagation import Pass

CHUNK = 1_000  # images evaluated at once: their activations stay in the cache


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, in nats, and accuracy, as a fraction, over a split."""

    loss: float
    accuracy: float


def evaluate(parameters: Parameters, activation: Activation, split: Split) -> list[Evaluation]:
    """Each network's loss and accuracy over ``split``."""
    loss = torch.zeros(parameters.members, dtype=torch.float64)
    correct = torch.zeros(parameters.members, dtype=torch.int64)
    chunks = zip(torch.split(split.images, CHUNK), torch.split(split.labels, CHUNK), strict=True)
    at_size = functools.cache(functools.partial(Pass, parameters, activation))
    for images, labels in chunks:
        forward = at_size(len(labels))
        predicted = forward.forward(images).argmax(dim=2)
        loss += len(labels) * forward.losses(labels).cpu().to(torch.float64)
        correct += (predicted == labels).sum(dim=1).cpu()
    return [
        Evaluation(total / len(split), hits / len(split))
        for total, hits in zip(loss.tolist(), correct.tolist(), strict=True)
    ]

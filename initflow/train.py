"""The training loop: initial parameters and a batch order in, trained parameters out."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from initflow.activations import Activation
from initflow.data import Split
from initflow.model import Parameters
from initflow.propagation import Pass
from initflow.seeds import generator


@dataclass(frozen=True)
class Checkpoint:
    """Where the training stands after ``step`` updates.

    ``losses``: for each iteration since the last checkpoint, each network's loss over its
    batch. ``lr`` is the rate of the last update (at step 0, of the first). ``diverged``
    where a loss at this step was not finite: the training ends there, its parameters as they
    were when that was found.
    """

    step: int
    lr: float
    losses: tuple[tuple[float, ...], ...]
    diverged: bool = False


def batch_order(images: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch takes the training images, (images,) int64.

    It depends on nothing else, so that schemes with the same seed see the same batches.
    """
    return torch.randperm(images, generator=generator(seed, f"batches/{epoch}"))


def learning_rates(lr: float, gamma: float, epochs: int) -> list[float]:
    """Each epoch's rate, multiplied up one by one as ``StepLR`` does."""
    rates = [lr]
    while len(rates) < epochs:
        rates.append(rates[-1] * gamma)
    return rates


def iterations(images: int, batch_size: int, epochs: int) -> int:
    """Updates in a whole training; an epoch's last batch may be smaller."""
    return math.ceil(images / batch_size) * epochs


def train(
    parameters: Parameters,
    activation: Activation,
    data: Split,
    *,
    order: Callable[[int], Tensor],
    rates: Sequence[float],
    batch_size: int,
    momentum: float,
    nesterov: bool,
    eval_every: int,
) -> Iterator[Checkpoint]:
    """Train ``parameters`` in place, by SGD on cross-entropy, one epoch for each of ``rates``.

    ``order(epoch)`` gives the epoch's image indices, (n,). Stops for a :class:`Checkpoint`
    at step 0, after every ``eval_every`` updates and at the end; nothing runs in between
    unless the next one is asked for, and the parameters are to be left alone meanwhile.

    Given the same parameters and order, losses and parameters are on the CPU, bit for bit,
    those of ``torch.nn.Linear`` layers trained by ``torch.optim.SGD`` and ``StepLR`` with
    the same number of threads.
    """
    device = parameters.flat.device
    gradient, velocity = parameters.zeros_like(), parameters.zeros_like()
    images, labels = _batch_buffers(data, min(batch_size, len(data)))
    at_size = functools.cache(functools.partial(Pass, parameters, activation))
    losses: list[tuple[float, ...]] = []
    step, lr = 0, rates[0]

    def checkpoint(*, diverged: bool = False) -> Checkpoint:
        taken = tuple(losses)
        losses.clear()
        return Checkpoint(step, lr, taken, diverged)

    for epoch, rate in enumerate(rates):
        for batch in torch.split(order(epoch).to(device), batch_size):
            if step % eval_every == 0:
                yield checkpoint()
            x = torch.index_select(data.images, 0, batch, out=images[: len(batch)])
            y = torch.index_select(data.labels, 0, batch, out=labels[: len(batch)])
            both = at_size(len(batch))
            both.forward(x)
            loss = tuple(both.losses(y).tolist())
            if not all(map(math.isfinite, loss)):
                yield checkpoint(diverged=True)
                return
            losses.append(loss)
            both.backward(x, y, gradient)
            lr = rate
            _sgd(
                parameters.flat,
                gradient.flat,
                velocity.flat,
                lr=lr,
                momentum=momentum,
                nesterov=nesterov,
            )
            step += 1
    yield checkpoint()


def _batch_buffers(data: Split, batch: int) -> tuple[Tensor, Tensor]:
    return data.images.new_empty(batch, data.images.shape[1]), data.labels.new_empty(batch)


def _sgd(
    parameters: Tensor,
    gradient: Tensor,
    velocity: Tensor,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
) -> None:
    """One step of ``torch.optim.SGD`` in place, in its order of operations; spends ``gradient``."""
    if momentum:
        velocity.mul_(momentum).add_(gradient)
        if nesterov:
            gradient.add_(velocity, alpha=momentum)
        else:
            gradient = velocity
    parameters.add_(gradient, alpha=-lr)

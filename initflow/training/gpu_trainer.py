"""The training of a stack on a device for which launching operations is what takes long.

What one update launches depends on the depth of the networks and on the kinds of their activation
functions, not on how many networks or seeds there are; it is recorded once for a batch's size and
replayed. Learning rates, which networks still train, and the losses lie on the device, and nothing
is read from it between two checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from initflow.core import machine
from initflow.training.model import Parameters
from initflow.training.optimizers import StackedOptimizer
from initflow.training.propagation import Pass
from initflow.training.splits import Split
from initflow.training.trainer import Checkpoint, Recipe, batch_order


class GpuTrainer:
    """Trains a stack as :class:`initflow.training.trainer.Trainer` does, as near as rounding.

    Neighbours with the same activation function share its launches. That a network has diverged
    is known at the next checkpoint, and said of the step where it did: with the parameters that it
    had there, as a network whose loss is not finite is updated no more.
    """

    def __init__(self, parameters: Parameters, recipes: Sequence[Recipe], data: Split) -> None:
        self.parameters = parameters
        self.running = list(range(parameters.members))
        self._recipes = recipes
        self._data = data
        self._device = parameters.flat.device
        self._seeds = list(dict.fromkeys(recipe.seed for recipe in recipes))
        sources = [self._seeds.index(recipe.seed) for recipe in recipes]
        self._source_of_each = torch.tensor(sources).to(self._device)
        self._gradient = parameters.zeros_like()
        self._optimizer = StackedOptimizer(
            parameters,
            self._gradient,
            [[optimizer for optimizer, _ in recipe.steps(0)] for recipe in recipes],
            [recipe.clip for recipe in recipes],
        )
        self._stopped = torch.zeros(parameters.members, 1, dtype=torch.bool, device=self._device)
        self._number = torch.zeros((), dtype=torch.float64, device=self._device)  # of the update
        self._step = self._seen = 0  # updates launched, and those until the last checkpoint
        self._of_epoch = 0  # updates
        self._by_size: dict[int, _Batches] = {}

    def stop(self, member: int) -> None:
        """Train ``member`` no further."""
        self.running.remove(member)
        self._stopped[member].fill_(True)  # noqa: FBT003 - a tensor's number

    def exact(self, _batch_size: int) -> list[bool]:
        """Whether each network has the bits that it has alone: such a device promises none."""
        return [False] * len(self._recipes)

    def first_losses(self, batch_size: int) -> list[float]:
        """That of each network over its first batch, as the networks are."""
        orders = [batch_order(len(self._data), seed, 0)[:batch_size] for seed in self._seeds]
        batches = self._batches(len(orders[0]))
        batches.indices.copy_(torch.stack(orders).to(self._device))
        found: list[float] = batches.losses().tolist()
        return found

    def train(
        self, *, batch_size: int, eval_every: int, updates: int | None = None
    ) -> Iterator[Checkpoint]:
        """Train to the end, stopping for a :class:`Checkpoint` where a :class:`Trainer` does.

        But for those of diverged networks, which come with the next of the others.
        """
        self._of_epoch = math.ceil(len(self._data) / batch_size)
        all_of_them = self._of_epoch * len(self._recipes[0].rates)
        last = all_of_them if updates is None else min(updates, all_of_them)
        losses = torch.zeros(min(eval_every, last), self.parameters.members, device=self._device)
        by_size: dict[int, _Update] = {}
        while self._step < last:
            order = self._begin_epoch(self._step // self._of_epoch)
            for batch in torch.split(order, batch_size, dim=1)[: last - self._step]:
                if self._step % eval_every == 0:
                    yield from self._checkpoints(losses)
                    if not self.running:
                        return
                size = batch.shape[1]
                if size not in by_size:
                    by_size[size] = self._record(size, losses)
                by_size[size].make(batch)
                self._step += 1
        yield from self._checkpoints(losses)

    def _begin_epoch(self, epoch: int) -> Tensor:
        """The order of each seed's images, (seeds, images), with the rates of this epoch set."""
        self._optimizer.set_rates(
            [[rate for _, rate in recipe.steps(epoch)] for recipe in self._recipes]
        )
        orders = [batch_order(len(self._data), seed, epoch) for seed in self._seeds]
        return torch.stack(orders).to(self._device)

    def _record(self, batch: int, losses: Tensor) -> _Update:
        """An update on batches of this size, whose losses go into the next row of ``losses``."""
        batches = self._batches(batch)

        def update() -> None:
            found = batches.losses()
            self._stopped.logical_or_(found.isfinite().logical_not_().unsqueeze(1))
            row = self._number.remainder(len(losses)).to(torch.int64).unsqueeze(0)
            losses.index_copy_(0, row, found.unsqueeze(0))
            batches.both.backward(batches.labels, self._gradient)
            self._number.add_(1)
            self._optimizer.step(self._stopped, self._number)

        return _Update(batches.indices, machine.recorded(update, self._device))

    def _batches(self, size: int) -> _Batches:
        """Those of this size, whose buffers are made once."""
        if size not in self._by_size:
            members, pixels = self.parameters.members, self._data.images.shape[1]
            self._by_size[size] = _Batches(
                self._data,
                self._source_of_each,
                torch.zeros(len(self._seeds), size, dtype=torch.int64, device=self._device),
                self._data.images.new_empty(members, size, pixels),
                self._data.labels.new_empty(members, size),
                Pass(
                    self.parameters,
                    [recipe.activation for recipe in self._recipes],
                    size,
                    sources=range(members),
                ),
            )
        return self._by_size[size]

    def _checkpoints(self, losses: Tensor) -> Iterator[Checkpoint]:
        """Those of networks that diverged since the last, in the order of their steps; the rest's.

        ``losses``: (updates, members), of those since then in the first rows.
        """
        begin, self._seen = self._seen, self._step
        own = losses[: self._step - begin].T.tolist()  # of each network; all that is read
        lost = {
            member: at
            for member in self.running
            if (at := _first_not_finite(own[member])) is not None
        }
        for at in sorted(set(lost.values())):
            members = [member for member, there in lost.items() if there == at]
            for member in members:
                self.stop(member)
            taken = {member: own[member][:at] for member in members}
            yield self._checkpoint(begin + at, taken, diverged=True)
        if self.running:
            yield self._checkpoint(self._step, {member: own[member] for member in self.running})

    def _checkpoint(
        self, step: int, losses: dict[int, list[float]], *, diverged: bool = False
    ) -> Checkpoint:
        epoch = max(step - 1, 0) // self._of_epoch  # of the last update
        rates = {member: self._recipes[member].rates[epoch] for member in losses}
        return Checkpoint(step, rates, losses, diverged)


def _first_not_finite(losses: Sequence[float]) -> int | None:
    return next((at for at, loss in enumerate(losses) if not math.isfinite(loss)), None)


@dataclass(frozen=True)
class _Batches:
    """A batch for each network: the images of its seed's row of ``indices``, (seeds, batch)."""

    data: Split
    source_of_each: Tensor
    indices: Tensor
    images: Tensor  # (members, batch, pixels)
    labels: Tensor  # (members, batch)
    both: Pass

    def losses(self) -> Tensor:
        """Those of a forward pass over the images, gathered first: (members,)."""
        chosen = self.indices.index_select(0, self.source_of_each).flatten()
        images = self.images.view(-1, self.images.shape[2])
        torch.index_select(self.data.images, 0, chosen, out=images)
        torch.index_select(self.data.labels, 0, chosen, out=self.labels.view(-1))
        self.both.forward(self.images)
        return self.both.losses(self.labels)


@dataclass(frozen=True)
class _Update:
    """What is launched for one update, on the images of ``indices``, (seeds, batch)."""

    indices: Tensor
    launch: Callable[[], None]

    def make(self, batch: Tensor) -> None:
        """The update on the images of ``batch``, (seeds, batch)."""
        self.indices.copy_(batch)
        self.launch()

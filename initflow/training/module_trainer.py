"""The training of one network that is any ``nn.Module``, by autograd.

Its numbers are, bit for bit on the CPU, those of a plain loop over a ``DataLoader`` with
``torch.optim`` and its schedules, given the same weights and the same order of the images.

Several networks are not trained at once as one by ``torch.func``: with it convolutions have other
bits, and recurrent kernels have no rule for it. Worker processes train them side by side.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from initflow.core import machine
from initflow.core.seeds import stream_seed
from initflow.models import batches
from initflow.training import optimizers
from initflow.training.modules import ModuleNetwork
from initflow.training.splits import Split
from initflow.training.trainer import Checkpoint, Recipe, batch_order


class ModuleTrainer:
    """Trains a copy of ``start`` on the device of ``data``, as :class:`Trainer` does a stack.

    What the module draws while it trains, as dropout does, follows from the recipe's seed.
    """

    def __init__(self, start: ModuleNetwork, recipe: Recipe, data: Split) -> None:
        self.network = start.copy()
        device = data.images.device
        self.network.module.to(device).train()
        self.running = [0]
        self._recipe = recipe
        self._images, self._labels = self.network.images(data), data.labels
        self._parameters = [p for p in self.network.module.parameters() if p.requires_grad]
        self._state = [recipe.optimizer.state_like(p) for p in self._parameters]
        self._counts = [0] * len(self._parameters)  # updates of each
        self._losses: list[float] = []
        self._step = self._epoch = 0  # updates made, and the epoch of the last one
        self._random = torch.Generator(device).manual_seed(stream_seed(recipe.seed, "training"))

    def stop(self, member: int) -> None:
        """Train ``member``, which is 0, no further."""
        self.running.remove(member)

    def exact(self, _batch_size: int) -> list[bool]:
        """Whether it has here the bits that it has alone: on CUDA they may differ each time."""
        return [not machine.is_launch_bound(self._images.device)]

    def train(
        self, *, batch_size: int, eval_every: int, updates: int | None = None
    ) -> Iterator[Checkpoint]:
        """Train to the end, stopping for a :class:`Checkpoint` where :class:`Trainer` does."""
        for epoch in range(len(self._recipe.rates)):
            if self._step == updates:
                break
            order = batch_order(len(self._labels), self._recipe.seed, epoch)
            left = None if updates is None else updates - self._step
            for batch in torch.split(order.to(self._images.device), batch_size)[:left]:
                if self._step % eval_every == 0:
                    yield self._checkpoint(self._epoch)
                if not self.running:
                    return
                if not self._update(batch, self._recipe.rates[epoch]):
                    self.running.clear()
                    yield self._checkpoint(self._epoch, diverged=True)
                    return
                self._step, self._epoch = self._step + 1, epoch
        yield self._checkpoint(self._epoch)

    def _checkpoint(self, epoch: int, *, diverged: bool = False) -> Checkpoint:
        taken, self._losses = self._losses, []
        rates = {0: self._recipe.rates[epoch]}
        return Checkpoint(self._step, rates, {0: taken}, diverged)

    def _update(self, batch: Tensor, rate: float) -> bool:
        """Whether the loss over ``batch`` is finite, and the parameters are updated."""
        with self._drawing():
            loss = self._loss(batch)
            value = loss.item()
            is_finite = math.isfinite(value)
            if is_finite:
                self._losses.append(value)
                self._descend(loss, rate)
        return is_finite

    def _loss(self, batch: Tensor) -> Tensor:
        images = self._images.index_select(0, batch)
        with batches.refused(f"model '{self.network.builder.model}' failed on {len(batch)} images"):
            logits = self.network.module(images)
        return functional.cross_entropy(logits, self._labels.index_select(0, batch))

    def _descend(self, loss: Tensor, rate: float) -> None:
        found = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        there = [at for at, gradient in enumerate(found) if gradient is not None]
        gradients = [gradient for gradient in found if gradient is not None]
        with torch.no_grad():
            if self._recipe.clip is not None:
                optimizers.clip_(gradients, self._recipe.clip)
            for at, gradient in zip(there, gradients, strict=True):
                self._counts[at] += 1
                self._recipe.optimizer.step(
                    self._parameters[at], gradient, self._state[at], rate, self._counts[at]
                )

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """Let the module draw from a stream of its own."""
        device = self._images.device
        with torch.random.fork_rng([device.index] if device.type == "cuda" else []):
            of = torch if device.type == "cpu" else torch.cuda
            of.set_rng_state(self._random.get_state())
            yield
            self._random.set_state(of.get_rng_state())

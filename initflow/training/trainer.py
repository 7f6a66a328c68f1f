"""The training loop: initial parameters and recipes in, trained parameters out.

One network is a stack of one; many train together as one stack, whatever their seeds,
rates and activation functions, and each as it would alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from initflow.core.configurations import TrainConfig
from initflow.core.seeds import generator
from initflow.initializers.activations import ACTIVATIONS, Activation
from initflow.training.model import Parameters, aligned
from initflow.training.optimizers import Optimizer, clip_, learning_rates
from initflow.training.parametrization import rate_factors
from initflow.training.propagation import Pass, blocks, run
from initflow.training.splits import Split


@dataclass(frozen=True)
class Recipe:
    """How one network trains: by ``optimizer`` on cross-entropy, at ``rates[e]`` in epoch e.

    Its batches follow from ``seed``: networks with the same one see the same. Its gradients are
    scaled to a norm of at most ``clip``, or left as they are. ``groups``, where there are any, have
    for each tensor what of ``optimizer`` and ``rates`` is its own, as parameter groups do.
    """

    activation: Activation
    seed: int
    rates: Sequence[float]
    optimizer: Optimizer = field(default_factory=Optimizer)
    clip: float | None = None
    groups: Sequence[tuple[Optimizer, Sequence[float]]] = ()

    @classmethod
    def of(cls, config: TrainConfig, widths: Sequence[int] = ()) -> Recipe:
        """That of the network of ``config``, of a feed-forward one with its ``widths``."""
        optimizer, factors = Optimizer.of(config), rate_factors(config, widths)
        groups = [
            (
                replace(optimizer, weight_decay=optimizer.weight_decay / factor),
                learning_rates(config, factor),
            )
            for factor in factors
        ]
        return cls(
            ACTIVATIONS[config.activation],
            config.seed,
            learning_rates(config),
            optimizer,
            config.clip,
            groups if set(factors) - {1.0} else (),
        )

    def steps(self, epoch: int) -> tuple[tuple[Optimizer, float], ...]:
        """The optimizer and the rate in ``epoch``: of each tensor or, where all are alike, one."""
        groups = self.groups or [(self.optimizer, self.rates)]
        return tuple((optimizer, rates[epoch]) for optimizer, rates in groups)


@dataclass(frozen=True)
class Checkpoint:
    """Where the training of some networks stands after ``step`` updates.

    ``rates`` has each of them, by its place in the stack, with the rate of its last update (at
    step 0, of the first); ``losses`` its loss over each batch since the last checkpoint.
    ``diverged`` where their losses at this step were not finite: their training ended there,
    with the parameters as they were when that was found.
    """

    step: int
    rates: Mapping[int, float]
    losses: Mapping[int, Sequence[float]]
    diverged: bool = False


def batch_order(images: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch takes the training images, (images,) int64.

    It depends on nothing else, so that schemes with the same seed see the same batches.
    """
    return torch.randperm(images, generator=generator(seed, f"batches/{epoch}"))


def iterations(config: TrainConfig, images: int) -> int:
    """Updates in a whole training on so many ``images``; an epoch's last batch may be smaller."""
    of_epochs = math.ceil(images / config.batch_size) * config.epochs
    return min(of_epochs, config.updates or of_epochs)


class Trainer:
    """Networks of one shape that train together, in place, on the same images.

    ``recipes``, one for each of ``parameters``, have the same number of epochs. Networks that
    are neighbours in the stack and share a seed share their batches too. One that diverges, or
    that :meth:`stop` ends, stays as it is, and the others go on.

    Given the same parameters, each network's losses and parameters are on the CPU, bit for bit,
    those that it has alone, and those of ``torch.nn.Linear`` layers trained by
    ``torch.optim`` with its schedulers and ``clip_grad_norm_``, with the same number of threads.
    """

    def __init__(self, parameters: Parameters, recipes: Sequence[Recipe], data: Split) -> None:
        self.parameters = parameters
        self.running = list(range(parameters.members))
        self._recipes = recipes
        self._data = data
        self._seeds = list(dict.fromkeys(recipe.seed for recipe in recipes))
        self._gradient = parameters.zeros_like()
        states = max(recipe.optimizer.states for recipe in recipes)
        self._state = [parameters.zeros_like() for _ in range(states)]
        self._losses: dict[int, list[float]] = {member: [] for member in self.running}
        self._step = self._epoch = 0  # updates made, and the epoch of the last one

    def stop(self, member: int) -> None:
        """Train ``member`` no further."""
        self.running.remove(member)

    def train(
        self, *, batch_size: int, eval_every: int, updates: int | None = None
    ) -> Iterator[Checkpoint]:
        """Train to the end, one epoch for each of a recipe's rates, or after so many ``updates``.

        Stops for a :class:`Checkpoint` at step 0, after every ``eval_every`` updates, at the
        end, and where a network diverges; nothing runs in between unless the next one is
        requested, and the parameters are to be left alone meanwhile.
        """
        of_epoch = math.ceil(len(self._data) / batch_size)
        for epoch in range(len(self._recipes[0].rates)):
            left = of_epoch if updates is None else min(of_epoch, updates - self._step)
            if not (left and self.running):
                break
            yield from self._train_epoch(epoch, batch_size, eval_every, left)
        if self.running:
            yield self._checkpoint(self.running)

    def _train_epoch(
        self, epoch: int, batch_size: int, eval_every: int, updates: int
    ) -> Iterator[Checkpoint]:
        """So many ``updates`` of an epoch."""
        orders = [batch_order(len(self._data), seed, epoch) for seed in self._seeds]
        order = torch.stack(orders).to(self.parameters.flat.device)
        steps: dict[int, _Step] = {}  # by the batch's size
        for batch in torch.split(order, batch_size, dim=1)[:updates]:
            if self._step % eval_every == 0:
                yield self._checkpoint(self.running)
            while self.running:
                size, running = batch.shape[1], tuple(self.running)
                if size not in steps or steps[size].members != running:
                    steps.pop(size, None)  # its buffers, before there are others
                    steps[size] = self._make_step(epoch, size, running)
                step = steps[size]
                losses = step.losses(batch)
                lost = [m for m, loss in losses.items() if not math.isfinite(loss)]
                if not lost:
                    break
                for member in lost:
                    self.stop(member)
                yield self._checkpoint(lost, diverged=True)
            if not self.running:
                return
            for member, loss in losses.items():
                self._losses[member].append(loss)
            step.backward()
            self._step, self._epoch = self._step + 1, epoch
            step.descend(self._step)

    def exact(self, batch_size: int) -> list[bool]:
        """Whether each network's first loss and gradient have here the bits that it has alone.

        On batches of all sizes that the training will have.
        """
        found = [True] * len(self._recipes)
        if len(found) == 1:
            return found
        images = len(self._data)
        for size in {min(batch_size, images), images % batch_size} - {0}:
            losses = self._first_losses(size)
            for member, recipe in enumerate(self._recipes):
                one = Trainer(self.parameters.member(member), [recipe], self._data)
                found[member] &= _same(losses[member], one._first_losses(size)[0])
                ours, alone = self._gradient.member(member), one._gradient
                found[member] &= _same(ours.flat, alone.flat)
        return found

    def _first_losses(self, batch: int) -> Tensor:
        """Of a first batch of this size, (members,); leaves their gradients in place."""
        orders = [batch_order(len(self._data), seed, 0)[:batch] for seed in self._seeds]
        step = self._make_step(0, batch, tuple(self.running))
        step.indices.copy_(torch.stack(orders))
        losses = step.forward()
        step.backward()
        return losses

    def _checkpoint(self, members: Sequence[int], *, diverged: bool = False) -> Checkpoint:
        taken = {member: self._losses[member] for member in members}
        self._losses |= {member: [] for member in members}
        rates = {member: self._recipes[member].rates[self._epoch] for member in members}
        return Checkpoint(self._step, rates, taken, diverged)

    def _make_step(self, epoch: int, batch: int, members: tuple[int, ...]) -> _Step:
        """An update of ``members`` in ``epoch``, each on a batch of that size."""
        parameters, gradient = self.parameters, self._gradient
        data, seeds, device = self._data, self._seeds, self.parameters.flat.device
        both = Pass(
            parameters,
            [recipe.activation for recipe in self._recipes],
            batch,
            sources=[seeds.index(recipe.seed) for recipe in self._recipes],
            members=members,
        )
        indices = torch.empty(len(seeds), batch, dtype=torch.int64, device=device)
        images = aligned(len(seeds), (batch, data.images.shape[1]), device)
        labels = data.labels.new_empty(len(seeds), batch)
        clips = [
            functools.partial(clip_, list(gradient.state(member).values()), clip)
            for member in members
            if (clip := self._recipes[member].clip) is not None
        ]
        updates = self._updates(epoch, members)
        gathers = [
            functools.partial(torch.index_select, of_all, 0, chosen, out=of_batch)
            for of_all, batches in ((data.images, images), (data.labels, labels))
            for chosen, of_batch in _flat(indices, batches)
        ]

        def forward() -> Tensor:
            run(gathers)
            both.forward(images)
            return both.losses(labels)

        def descend(number: int) -> None:
            run(clips)
            for update in updates:
                update(number)

        backward = functools.partial(both.backward, labels, gradient)
        return _Step(members, indices, forward, backward, descend)

    def _updates(self, epoch: int, members: Sequence[int]) -> list[Callable[[int], None]]:
        """The steps of the optimizers of ``members``, which take the number of the update."""
        found: list[Callable[[int], None]] = []
        settings = [recipe.steps(epoch) for recipe in self._recipes]
        for at in blocks(settings, members):
            tensors: Callable[[Parameters, slice], list[Tensor]]
            steps, optimizer = settings[at.start], self._recipes[at.start].optimizer
            tensors = Parameters.parts if len(steps) > 1 else Parameters.rows
            if not optimizer.rounds_alike():
                tensors = _each
            stacks = [self.parameters, self._gradient, *self._state[: optimizer.states]]
            rows = zip(*(tensors(stack, at) for stack in stacks), strict=True)
            for (own, rate), (parameters, gradient, *state) in zip(itertools.cycle(steps), rows):
                found.append(functools.partial(own.step, parameters, gradient, state, rate))
        return found


def _each(stack: Parameters, at: slice) -> list[Tensor]:
    """All numbers of the members ``at``, network by network in the tensors of each."""
    return [one for member in range(at.start, at.stop) for one in stack.state(member).values()]


def _flat(indices: Tensor, batches: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """What is to be gathered, and where to: at once where the batches lie without gaps."""
    if batches.is_contiguous():
        return [(indices.flatten(), batches.flatten(0, 1))]
    return zip(indices, batches, strict=True)


def _same(x: Tensor, y: Tensor) -> bool:
    """To the bit; what is no number has no bits to keep."""
    return bool(((x.view(torch.int32) == y.view(torch.int32)) | (x.isnan() & y.isnan())).all())


@dataclass(frozen=True)
class _Step:
    """What is done to tensors for one update, on buffers of its own.

    ``indices``: (seeds, batch), the images to go over; ``descend`` takes the update's number, the
    first being 1.
    """

    members: tuple[int, ...]
    indices: Tensor
    forward: Callable[[], Tensor]  # to the losses, (members,)
    backward: Callable[[], None]
    descend: Callable[[int], None]

    def losses(self, indices: Tensor) -> dict[int, float]:
        """Of each network over its images, before the update."""
        self.indices.copy_(indices)
        return dict(zip(self.members, self.forward().tolist(), strict=True))

"""How the work of a command is shared out: by how many workers, each with how many threads.

What ``auto`` becomes follows from the settings, the shape of the data and the cores of the machine,
by a model of the time: never from a clock or from what else is running, since the number of threads
changes the last bits of a network. ``docs/performance.md`` has what the constants were measured by.
"""

from __future__ import annotations

import contextlib
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch

from initflow.core import capacity, machine, workers
from initflow.core.configurations import MLP, Many, TrainConfig
from initflow.core.workers import WorkerPool
from initflow.reporting.formats import counted
from initflow.training import datasets, trainer
from initflow.training.splits import Splits

START_S = 4.0  # until a worker has imported PyTorch and MLflow, and has loaded its images
RUN_S = 0.1  # of a network beside its updates: it is drawn, evaluated and written
SPEED = 5e10  # multiply-adds in a second, by one thread
CALLS_S = 25e-6  # of a layer in an update beside its products, for each network
MODULE_S = 1e-3  # of an update of a network that is any module, at the least; threads help little
WAIT_S = 75e-6  # that threads wait for each other in a layer of an update
ALONE = 1.1  # how much longer workers of one thread may take, who wait for nobody
WORKER_BYTES = 1 << 30  # that a worker holds beside its images
LIMIT = 1_000  # workers, of which there cannot be more
Some = TypeVar("Some")


@dataclass(frozen=True)
class Part:
    """Work that one worker does, one thing after the other: a stack, or the trials of a study.

    So many ``networks``, of which ``together`` train at once, each with ``updates`` of ``layers``
    and ``products`` (multiply-adds), which are not known where it ``is_module``. Where it
    ``is_whole`` it is never cut.
    """

    networks: int
    together: int
    updates: int
    layers: int
    products: int
    is_module: bool = False
    is_whole: bool = True

    @classmethod
    def of(
        cls, config: TrainConfig, splits: Splits, networks: int, together: int | None = None
    ) -> Part:
        """That of networks that are all as large as that of ``config``, on ``splits``.

        Without ``together`` it is a stack that may be cut into smaller ones.
        """
        updates = trainer.iterations(config, len(splits.train))
        if config.model != MLP:
            return cls(networks, 1, updates, 0, 0, is_module=True)
        widths = datasets.widths(splits.pixels, config.hidden, splits.classes)
        weights = [fan_in * fan_out for fan_in, fan_out in pairwise(widths)]
        # Forward, and the gradients of weights and inputs; the images need none.
        products = min(config.batch_size, len(splits.train)) * (3 * sum(weights) - weights[0])
        at_once = min(together or networks, networks)
        return cls(
            networks, at_once, updates, len(weights), products, is_whole=together is not None
        )

    def seconds(self, threads: int) -> float:
        """What it takes by the model."""
        if self.is_module:
            return self.networks * (RUN_S + self.updates * MODULE_S)
        each = (self.products / SPEED + self.layers * CALLS_S) / threads
        waiting = self.layers * WAIT_S if threads > 1 else 0.0
        stacks = math.ceil(self.networks / self.together)
        return self.networks * (RUN_S + self.updates * each) + stacks * self.updates * waiting

    def cut(self, pieces: int) -> list[Part]:
        """It in as many pieces, where it may be cut."""
        if self.is_whole:
            return [self]
        sizes = [end - begin for begin, end in _bounds(self.networks, pieces)]
        return [replace(self, networks=size, together=size) for size in sizes]


def choose(
    parts: Sequence[Part],
    *,
    cores: int,
    most: int,
    size: int | None = None,
    threads: int | None = None,
) -> tuple[int, int]:
    """How many workers, of how many threads each, need the least time for ``parts``.

    ``size`` and ``threads`` are what is asked for, None where it is to be chosen. There are never
    more workers than ``most`` and than parts, nor more threads in all than ``cores``; a worker has
    its share of these, or one. Of arrangements that take as long it is that of fewer workers, and
    of more threads. One worker is this process. Workers of one thread may take a little longer
    than others: what else the machine does holds up threads that wait for each other.
    """
    sizes = [size] if size else range(1, max(1, min(most, len(parts), cores // (threads or 1))) + 1)
    found = []
    for workers_ in sizes:
        for each in [threads] if threads else {max(1, cores // workers_), 1}:
            seconds = _seconds(parts, workers_, each)
            allowed = ALONE if workers_ > 1 and each == 1 else 1.0
            found.append((seconds / allowed, workers_, -each))
    _, workers_, each = min(found)
    return workers_, -each


def _seconds(parts: Sequence[Part], size: int, threads: int) -> float:
    """Of all ``parts``, each of which goes to the first of the workers that is free."""
    cut = evened(parts, size, Part.cut)
    each = {part: part.seconds(threads) for part in set(cut)}
    ends = [0.0 if size == 1 else START_S] * size
    for part in cut:
        heapq.heapreplace(ends, ends[0] + each[part])
    return max(ends)


def evened(
    parts: Sequence[Some], size: int, cut: Callable[[Some, int], Sequence[Some]]
) -> list[Some]:
    """``parts`` for so many workers, of which the last ones are cut so that none is idle then."""
    begin = len(parts) - len(parts) % size
    last = [piece for part in parts[begin:] for piece in cut(part, size // (len(parts) - begin))]
    return [*parts[:begin], *last]


def evened_stacks(stacks: Sequence[list[TrainConfig]], size: int) -> list[list[TrainConfig]]:
    """The same of stacks, whose networks have the same numbers in a smaller one."""
    return evened(
        stacks, size, lambda one, n: [one[begin:end] for begin, end in _bounds(len(one), n)]
    )


def _bounds(networks: int, pieces: int) -> Iterator[tuple[int, int]]:
    """Where each of as many pieces begins and ends, none of which is empty."""
    pieces = min(pieces, networks)
    return pairwise(networks * at // pieces for at in range(pieces + 1))


def threads(config: TrainConfig, splits: Splits, device: str) -> int:
    """The CPU threads of a single training."""
    if config.threads or device != "cpu" or config.model != MLP:
        return config.threads or cores()
    return choose([Part.of(config, splits, 1, 1)], cores=cores(), most=1)[1]


def cores() -> int:
    """As many as PyTorch takes threads, but no more than this process may use at once."""
    return max(1, min(torch.get_num_threads(), capacity.cpus()))


@contextlib.contextmanager
def pool(settings: Many, parts: Sequence[Part], most: int, device: str) -> Iterator[WorkerPool]:
    """Workers as the ``settings`` ask for, or as is best for ``parts``.

    ``auto`` starts processes for a command alone, whose process can be started again: a script may
    lack the line that keeps a worker from doing all of it once more, and a notebook has no file.
    With CUDA it is this process. Of a Ray cluster it is as many as it has CPUs for, at most one for
    each part. There are no more of them than ``most``, unless the settings say so.
    """
    size, each = settings.workers, settings.threads
    if settings.backend == "local":
        if device == "cpu":
            there = most if workers.are_startable() else 1
            size, each = choose(parts, cores=cores(), most=there, size=size, threads=each)
        size = size or 1
        each = each or max(1, cores() // size)
    with workers.worker_pool(settings.backend, size, each) as found:
        yield found if size else replace(found, size=min(found.size, len(parts)))


def room(splits: Splits) -> int:
    """How many workers there is memory for: half of it, where each has its own images."""
    images = sum(split.images.nbytes for split in (splits.train, splits.test))
    return int(min(capacity.memory() / 2 / (WORKER_BYTES + images), LIMIT))


def resolved(device: str, found: WorkerPool) -> dict[str, str]:
    """As the params of a run say it: on what the work was done, and by whom."""
    of_network = machine.Resolved(device, found.threads).as_text()
    return {**of_network, "resolved.workers": str(found.size)}


def told(settings: Many, found: WorkerPool) -> str:
    """Who did the work, as a sentence."""
    by = counted(found.threads, "thread")
    if found.is_here:
        who = f"this process, with {by}"
    else:
        who = f"{counted(found.size, 'worker')} of {by} each"
    chosen = [name for name in ("workers", "threads") if getattr(settings, name) is None]
    by_rule = f" ({' and '.join(chosen)}: auto)" if chosen else ""
    return f"The work was that of {who}{by_rule}."

"""Trials on their way: settings trained together, given up early, tracked, and told the study."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from initflow.core.configurations import TrainConfig
from initflow.core.machine import Resolved
from initflow.core.progress import Progress, part_of, silent
from initflow.diagnostics.record import Record, start, train_together
from initflow.errors import GivenUpError, InitflowError, cause
from initflow.experiments import network_run
from initflow.experiments.populations import stacking
from initflow.experiments.tuning.running import RunningTrials
from initflow.experiments.tuning.searches import PendingTrial, Search
from initflow.tracking import connection, runs
from initflow.training import cache, datasets
from initflow.training.splits import Splits

TRIAL = "initflow.trial"  # the tag of a trial's run, with its number


@dataclass(frozen=True)
class Batch:
    """Trials to be trained together, with all that a worker must know: ``configs`` are theirs.

    Their runs are to be below ``run``, of the tracking server or store ``tracking``, and to have
    ``tags``.
    """

    search: Search
    pending: Sequence[PendingTrial]
    configs: Sequence[TrainConfig]
    run: runs.Run
    tracking: str
    tags: Mapping[str, object]
    device: str
    stack: int | None


@dataclass(frozen=True)
class Spent:
    """Seconds that some work took, by kind."""

    training: float = 0.0
    studying: float = 0.0
    logging: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.training + other.training,
            self.studying + other.studying,
            self.logging + other.logging,
        )


def try_batch(batch: Batch, progress: Progress = silent) -> Spent:
    """Train the trials of ``batch``, each in a run of its own, and tell the study of them.

    Each is tracked first and told last: what was told is whole, what was not is tried again.
    """
    connection.set_uri(batch.tracking)
    first = batch.configs[0]
    splits = cache.splits(first).untested().to(torch.device(batch.device))
    widths = datasets.widths(splits.pixels, first.hidden, splits.classes)
    size = batch.stack or stacking.room(widths, first.batch_size, batch.device, first.optimizer)
    worker = _Worker(batch, splits, RunningTrials(batch.search, batch.pending))
    pairs = list(zip(batch.pending, batch.configs, strict=True))
    for begin in range(0, len(pairs), size):
        some = pairs[begin : begin + size]
        worker.carry_out(some, part_of(progress, begin, len(some), len(pairs)))
    return worker.spent


class _Worker:
    """Carries out stacks of trials, and adds up the time."""

    def __init__(self, batch: Batch, splits: Splits, running: RunningTrials) -> None:
        self.spent = Spent()
        self._batch = batch
        self._splits = splits
        self._running = running
        self._resolved = Resolved(batch.device, torch.get_num_threads())

    def carry_out(
        self, trials: Sequence[tuple[PendingTrial, TrainConfig]], progress: Progress
    ) -> None:
        started = time.perf_counter()
        numbers: dict[int, int] = {}  # of each record, by its place in memory
        records = []
        for pending, config in trials:
            scheme = cache.scheme(config.init, config.plugins_dir)
            try:
                records.append(start(config, scheme, self._splits))
                numbers[id(records[-1])] = pending.number
            except InitflowError as error:
                self._write_failed(pending, config, error)

        def on_measured(record: Record, step: int, values: Mapping[str, float]) -> None:
            if step and "accuracy/validation" in values:
                accuracy = values["accuracy/validation"]
                self._running.report(numbers[id(record)], step, accuracy)
            stacking.forget(record)

        def should_stop(record: Record, step: int, _: Mapping[str, float]) -> bool:
            return step > 0 and self._running.should_prune(numbers[id(record)])

        before = self._running.seconds
        if records:
            train_together(
                records,
                self._splits,
                on_measured=on_measured,
                should_stop=should_stop,
                progress=progress,
            )
        studying = self._running.seconds - before
        self.spent += Spent(time.perf_counter() - started - studying, studying)
        for record in records:
            self._write(numbers[id(record)], record)

    def _write(self, number: int, record: Record) -> None:
        started = time.perf_counter()
        config = record.config
        of_trial = network_run.log_network(
            self._batch.run,
            record,
            self._splits,
            name=_name(number, config),
            resolved=self._resolved,
            tags={**self._batch.tags, TRIAL: number},
        )
        logged, before = time.perf_counter(), self._running.seconds
        try:
            self._tell(number, record)
        except GivenUpError:  # its setting has another run
            self._batch.run.mark_orphaned(runs.Found(of_trial.run_id, "FINISHED", {}))
            raise
        self.spent += Spent(0.0, self._running.seconds - before, logged - started)

    def _tell(self, number: int, record: Record) -> None:
        if record.outcome == "finished":
            accuracies = record.history["accuracy/validation"]
            self._running.finished(number, max(value for step, value in accuracies if step))
        elif record.outcome == "diverged":
            self._running.diverged(number)
        else:
            self._running.pruned(number)

    def _write_failed(
        self, pending: PendingTrial, config: TrainConfig, error: InitflowError
    ) -> None:
        network_run.log_failed(
            self._batch.run,
            config,
            error,
            name=_name(pending.number, config),
            resolved=self._resolved,
            tags={
                "initflow.scheme": cache.scheme(config.init, config.plugins_dir).spec,
                **self._batch.tags,
                TRIAL: pending.number,
            },
        )
        self._running.failed(pending.number, cause(error))


def _name(number: int, config: TrainConfig) -> str:
    decay = f", gamma {config.gamma:.3g}" if config.schedule == "step" else ""
    return f"trial {number}: lr {config.lr:.3g}{decay}"

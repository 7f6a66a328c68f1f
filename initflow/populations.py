"""Many networks trained as stacks, each tracked as a run of its own below one parent's."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise

import torch

import initflow
from initflow import data, machine, mlflow_page, track
from initflow.comparison import Cell, Outcome
from initflow.config import CompareConfig, ReproduceConfig, TrainConfig
from initflow.errors import InitflowError, PluginError, cause
from initflow.experiment import (
    description,
    log_figures,
    log_setting,
    log_trained,
    resolved_params,
    result_tags,
    start_tags,
    summary,
)
from initflow.experiment import (
    name as name_of,
)
from initflow.record import Progress, Record, start, train_together
from initflow.scheme import Scheme
from initflow.signals import Signals

# Metrics of a network's run by layer instead of step: its charts are the picture by depth.
BY_LAYER = ("preactivation_variance", "gradient_variance")
STACK_SHARE = 0.5  # of the last cache, or of CUDA's memory: the images need some too


@dataclass(frozen=True)
class Member:
    """One network after its training: what is kept of it beside its run."""

    cell: Cell
    run_id: str
    outcome: Outcome
    signals: Signals | None  # untrained
    metrics: frozenset[str]
    is_exact: bool


@dataclass
class Population:
    """What came of the networks below ``run``, one or more in each of ``cells``.

    ``failed`` says why, by the name of a network's run. ``training_s`` and ``logging_s``: seconds.
    """

    run: track.Run
    device: str
    cells: Sequence[Cell]
    members: list[Member] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    training_s: float = 0.0
    logging_s: float = 0.0

    def by_cell(self) -> dict[Cell, list[Member]]:
        """The networks of each scheme and activation, in the order of their seeds."""
        cells: dict[Cell, list[Member]] = {}
        for member in self.members:
            cells.setdefault(member.cell, []).append(member)
        return cells

    def outcomes(self) -> dict[Cell, list[Outcome]]:
        return {cell: [m.outcome for m in members] for cell, members in self.by_cell().items()}

    def signals(self) -> dict[Cell, list[Signals]]:
        """Those of the untrained networks, where they were measured."""
        cells = {
            cell: [member.signals for member in members if member.signals]
            for cell, members in self.by_cell().items()
        }
        return {cell: signals for cell, signals in cells.items() if signals}


def room(widths: Sequence[int], batch_size: int, device: str) -> int:
    """How many networks of ``widths`` train at once, so that none waits for memory.

    On the CPU as many as have their parameters, gradients, momenta and activations in half of
    its last cache: more gain nothing from each other, and lose it. On CUDA as many as half of
    the free memory holds.
    """
    parameters = sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(widths))
    numbers = 3 * parameters + 4 * batch_size * sum(widths[1:])
    share = STACK_SHARE * machine.working_memory(device)
    return max(1, int(share / (4 * numbers)))


def stacks(
    configs: Sequence[TrainConfig], pixels: int, device: str, asked: int | None
) -> Iterator[list[TrainConfig]]:
    """``configs`` in their order, parted into what trains together.

    Networks with validation images of their own, drawn by their seed, train with those of the
    same seed only. Those of one seed stay together where there is room for all of them.
    """

    def alike(config: TrainConfig) -> TrainConfig:
        seed = config.seed if config.validation else 0
        config = replace(config, init="he", activation="relu", seed=seed)
        return replace(config, lr=0.1, gamma=1.0, momentum=0.0, nesterov=True)

    for _, group in groupby(configs, alike):
        of_shape = list(group)
        widths = (pixels, *of_shape[0].hidden, data.CLASSES)
        size = asked or room(widths, of_shape[0].batch_size, device)
        of_a_seed = len([c for c in of_shape if c.seed == of_shape[0].seed])
        if not asked and size > of_a_seed:
            size -= size % of_a_seed
        yield from (of_shape[i : i + size] for i in range(0, len(of_shape), size))


def seeds_of(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"


@contextlib.contextmanager
def grown(
    settings: CompareConfig | ReproduceConfig,
    configs: Sequence[TrainConfig],
    schemes: Mapping[str, Scheme],
    *,
    name: str,
    summary: str,
    experiment: str | None = None,
    progress: Progress = lambda *_: None,
) -> Iterator[Population]:
    """The network of each of ``configs``, trained, each in a run below one that is open.

    ``schemes`` has that of each ``init``; ``configs`` begin with one of each kind, all under the
    first seed. A wrong setting, missing data or a scheme that cannot fill the first networks is
    an error of :mod:`initflow.errors` before a run is made.
    """
    device = machine.device(settings.device)
    kinds = [(schemes[config.init].spec, config.activation) for config in configs]
    cells = [Cell(*kind) for kind in dict.fromkeys(kinds)]
    progress("loading the data, downloaded at its first use", 0, 1)
    splits = data.load(configs[0])
    with machine.threads(settings.threads) as threads:
        for config in configs[: len(cells)]:
            start(config, schemes[config.init], splits)
        resolved = resolved_params(device, threads)
        with track.start(
            name=name,
            description=summary,
            params=settings.as_text() | resolved,
            tags={"initflow.version": initflow.__version__},
            experiment=experiment,
        ) as run:
            run.log_json("config", settings.as_text() | resolved)
            run.log_data(splits)
            population = Population(run, device, cells)
            train_all(
                population,
                configs,
                schemes,
                splits,
                resolved=resolved,
                stack=settings.stack,
                run_figures=settings.run_figures,
                progress=progress,
            )
            progress("comparing, drawing and logging", len(configs), len(configs))
            yield population


def train_all(
    population: Population,
    configs: Sequence[TrainConfig],
    schemes: Mapping[str, Scheme],
    splits: data.Splits,
    *,
    resolved: Mapping[str, str],
    stack: int | None,
    run_figures: bool,
    progress: Progress = lambda *_: None,
) -> None:
    """Train the network of each of ``configs``, and write its run below ``population``'s.

    ``splits`` is the data of the first; ``resolved`` is what ``auto`` became. A network that
    fails leaves the others whole; without any left the failure is raised. An interruption leaves
    those whose training it cut off as runs that were KILLED, with what was measured.
    """
    groups = mlflow_page.group_names(population.cells)
    tags = dict(zip(population.cells, mlflow_page.run_tags(groups), strict=True))
    drawn_by = configs[0].seed
    for together in stacks(configs, splits.pixels, population.device, stack):
        if together[0].validation and together[0].seed != drawn_by:
            splits, drawn_by = data.load(together[0]), together[0].seed
        writer = _Writer(population, splits, dict(resolved), tags, run_figures)
        records = writer.start(together, schemes)
        if records:
            writer.train(records, _overall(progress, len(population.members), len(configs)))
            writer.write_all(records)
    if not population.members:
        raise PluginError(f"no network was left: {'; '.join(population.failed.values())}")


def _overall(progress: Progress, before: int, networks: int) -> Progress:
    """What a stack tells, as a part of all ``networks``, of which so many were done before."""

    def told(what: str, done: int, of: int) -> None:
        progress(f"{what}, {before} of {networks} networks done", done, of)

    return told


@dataclass(frozen=True)
class _Writer:
    """Starts, trains and writes the networks of a stack into ``population`` and their runs."""

    population: Population
    splits: data.Splits
    resolved: dict[str, str]
    tags: Mapping[Cell, Mapping[str, object]]
    run_figures: bool

    def start(self, configs: Sequence[TrainConfig], schemes: Mapping[str, Scheme]) -> list[Record]:
        """The untrained networks; of one that cannot be there is a run that says why."""
        records = []
        for config in configs:
            scheme = schemes[config.init]
            try:
                records.append(start(config, scheme, self.splits))
            except InitflowError as error:
                failed = f"{scheme.spec} {config.activation} seed {config.seed}"
                self.population.failed[failed] = cause(error)
                self._write_failed(failed, config, error)
        return records

    def train(self, records: Sequence[Record], progress: Progress) -> None:
        started = time.perf_counter()
        device = torch.device(self.resolved["resolved.device"])
        try:
            keep = (lambda *_: None) if self.run_figures else _forget
            train_together(records, self.splits.to(device), measured=keep, progress=progress)
        except BaseException as error:
            for record in records:
                self._write_cut_off(record, error)
            raise
        self.population.training_s += time.perf_counter() - started

    def write_all(self, records: Sequence[Record]) -> None:
        started = time.perf_counter()
        for at, record in enumerate(records):
            try:
                self.population.members.append(self.write(record))
            except InitflowError as error:
                self.population.failed[name_of(record)] = cause(error)
            except BaseException as error:
                for rest in records[at + 1 :]:
                    self._write_cut_off(rest, error)
                raise
        self.population.logging_s += time.perf_counter() - started

    def write(self, record: Record) -> Member:
        """All that a run of ``train`` carries."""
        cell = Cell(record.scheme.spec, record.config.activation)
        exact = {"initflow.bit_identical_to_alone": str(record.is_exact).lower()}
        tags = start_tags(record) | result_tags(record) | exact | dict(self.tags[cell])
        history = record.history | _by_layer(record)
        with self.population.run.nested(
            name=name_of(record),
            description=description(record, self.splits),
            params=record.config.as_text() | self.resolved,
            tags=tags,
        ) as run:
            model_id = None
            try:
                log_setting(run, record.config, self.splits, self.resolved)
                model_id = log_trained(run, record, self.splits)
            finally:  # also of what fails here, or is interrupted; the metrics are the model's too
                run.log_history(history, model_id)
            if self.run_figures:
                log_figures(run, record)
        curve = record.history.get("accuracy/test", [])
        return Member(
            cell,
            run.id,
            Outcome(record.config.seed, curve, record.diverged_at, len(self.splits.test)),
            record.signals[0][1] if record.signals else None,
            frozenset(history),
            record.is_exact,
        )

    def _write_cut_off(self, record: Record, error: BaseException) -> None:
        """What was measured until ``error`` ended the training."""
        cell = Cell(record.scheme.spec, record.config.activation)
        with (
            contextlib.suppress(type(error), InitflowError),
            self.population.run.nested(
                name=name_of(record),
                description=summary(record, self.splits),
                params=record.config.as_text() | self.resolved,
                tags=start_tags(record) | dict(self.tags[cell]),
            ) as run,
        ):
            run.log_history(record.history)
            log_setting(run, record.config, self.splits, self.resolved)
            raise error

    def _write_failed(self, name: str, config: TrainConfig, error: InitflowError) -> None:
        """A network that never came to be."""
        with (
            contextlib.suppress(InitflowError),
            self.population.run.nested(
                name=name,
                description=f"Not trained: {cause(error)}",
                params=config.as_text() | self.resolved,
                tags={"initflow.outcome": "failed"},
            ),
        ):
            raise error


def _forget(record: Record, *_: object) -> None:
    """What only the figures need, of many networks gigabytes."""
    record.received = ()
    if record.reading:
        record.reading = replace(record.reading, preactivations=())


def _by_layer(record: Record) -> dict[str, list[tuple[int, float]]]:
    """The untrained network's signals, with the layer's number as step."""
    if not record.signals:
        return {}
    _, signals = record.signals[0]
    return {
        f"by_layer/{quantity}": [
            (layer, value)
            for layer, value in enumerate(signals.by_layer(quantity), start=1)
            if value is not None
        ]
        for quantity in BY_LAYER
    }

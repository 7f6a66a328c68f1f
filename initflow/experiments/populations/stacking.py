"""Many networks trained as stacks, each tracked as a run of its own below one parent's."""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise

import torch

from initflow.core import machine, workers
from initflow.core.configurations import MLP, Many, TrainConfig
from initflow.core.progress import Progress, part_of, silent
from initflow.diagnostics.record import Record, start, train_together
from initflow.diagnostics.signals import Signals
from initflow.errors import InitflowError, OutageError, PluginError, WorkError, cause
from initflow.experiments import command_run, network_run
from initflow.experiments.populations import arrangement, best_networks, resuming
from initflow.experiments.populations.members import Member, Trained, kept_signals, told_metrics
from initflow.reporting.seed_statistics import Cell, Outcome
from initflow.tracking import connection, mlflow_page, outages, runs, unsent
from initflow.training import cache, datasets, optimizers

# Metrics by layer instead of step, whose charts are the picture by depth: see by_layer.
BY_LAYER = ("preactivation_variance", "relative_gradient_variance")
STACK = "initflow.stack"  # the tag of the runs of a stack, with its id
# Settings in which the networks of a stack may differ, beside the seed.
OWN = (
    "init",
    "activation",
    "lr",
    "gamma",
    "momentum",
    "nesterov",
    "betas",
    "eps",
    "weight_decay",
    "clip",
    "parametrization",
    "base_width",
)
LOSSES = 3  # of its worker, after which a stack is given up
STACK_SHARE = 0.5  # of the last cache, or of CUDA's memory: the images need some too


@dataclass(kw_only=True)
class Population(Trained):
    """What came of the networks below ``run``, one or more in each of ``cells``.

    ``remark`` is a sentence on the data, where there is something odd to say of it; so many of the
    networks were ``taken_over`` from interrupted commands, the others trained ``by`` workers.
    """

    run: runs.Run
    device: str
    cells: Sequence[Cell]
    remark: str = ""
    taken_over: int = 0
    by: str = ""

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


def room(widths: Sequence[int], batch_size: int, device: str, optimizer: str = "sgd") -> int:
    """How many networks of ``widths`` train at once, so that none waits for memory.

    On the CPU as many as have their parameters, gradients, momenta and activations in half of
    its last cache: more gain nothing from each other, and lose it. On CUDA as many as half of
    the free memory holds. The momenta are what the ``optimizer`` keeps of each parameter.
    """
    parameters = sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(widths))
    numbers = (2 + optimizers.STATES[optimizer]) * parameters + 4 * batch_size * sum(widths[1:])
    if device != "cpu":  # where each has a copy of its batch
        numbers += batch_size * widths[0]
    share = STACK_SHARE * machine.working_memory(device)
    return max(1, int(share / (4 * numbers)))


def stacks(
    configs: Sequence[TrainConfig], pixels: int, classes: int, device: str, requested: int | None
) -> Iterator[list[TrainConfig]]:
    """``configs`` in their order, parted into what trains together.

    Their images are of so many ``pixels`` and ``classes``.
    Networks with validation images of their own, drawn by their seed, train with those of the
    same seed only. Those of one seed stay together where there is room for all of them. Other
    models than feed-forward ones gain nothing from each other, and stand alone.
    """
    usual = TrainConfig()

    def alike(config: TrainConfig) -> TrainConfig:
        seed = config.seed if config.validation else 0
        return replace(config, **{name: getattr(usual, name) for name in OWN}, seed=seed)

    for _, group in groupby(configs, alike):
        of_shape = list(group)
        if of_shape[0].model != MLP:
            yield from ([one] for one in of_shape)
            continue
        widths = datasets.widths(pixels, of_shape[0].hidden, classes)
        size = requested or room(widths, of_shape[0].batch_size, device, of_shape[0].optimizer)
        of_a_seed = len([c for c in of_shape if c.seed == of_shape[0].seed])
        if not requested and size > of_a_seed:
            size -= size % of_a_seed
        yield from (of_shape[i : i + size] for i in range(0, len(of_shape), size))


@dataclass(frozen=True)
class Stack:
    """Networks to be trained together, each to be a run below ``run``: all a worker must know.

    ``tracking`` is the server or store of that run. ``tags`` are those of all runs of a cell;
    ``label`` begins their names, and by ``id`` they are found if a worker dies. ``has_models``:
    those below the run are of several models, which their cells name; ``varied`` are other settings
    in which they differ, which their names tell. Without ``tested`` the test images stay closed.
    The weights of the best of each cell come back where the stack ``keeps_best``.
    """

    run: runs.Run
    tracking: str
    configs: Sequence[TrainConfig]
    device: str
    tags: Mapping[Cell, Mapping[str, object]]
    run_figures: bool = False
    label: str = ""
    has_models: bool = False
    varied: Sequence[str] = ()
    tested: bool = True
    keeps_best: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def cell(self, config: TrainConfig) -> Cell:
        """Where a network belongs."""
        return cell_of(config, has_models=self.has_models)

    def name(self, config: TrainConfig) -> str:
        """Of a network's run."""
        cell = self.cell(config)
        text = config.as_text()
        kind = " ".join([cell.activation, *(f"{name} {text[name]}" for name in self.varied)])
        return self.label + network_run.name(cell.init, config, kind)


@contextlib.contextmanager
def trained_population(
    settings: Many,
    configs: Sequence[TrainConfig],
    *,
    name: str,
    summary: str,
    experiment: str | None = None,
    progress: Progress = silent,
    run_figures: bool = False,
    tested: bool = True,
    resumable: str | None = None,
    keeps_best: bool = False,
) -> Iterator[Population]:
    """The network of each of ``configs``, trained, each in a run below one that is open.

    ``configs`` begin with one of each shape, all under the first seed. Where they are of a command
    that is ``resumable``, which is named, those that an interrupted one of the same settings has
    trained are taken over. Without ``tested`` the test images stay closed. Of the best new network
    of each cell the weights are kept where that is asked for by ``keeps_best``. A wrong setting,
    missing data or a scheme that cannot fill the first networks is an error of
    :mod:`initflow.errors` before a run is made.
    """
    device = machine.device(settings.device)
    machine.check_tf32(device, tf32=settings.tf32)
    connection.check_backend(settings.backend)
    if settings.backend != "local":  # elsewhere nobody would know of what waits there
        outages.check_reachable()
    by_config = dict(zip(configs, cells_of(configs), strict=True))
    cells = list(dict.fromkeys(by_config.values()))
    progress("loading the data, downloaded at its first use", 0, 1)
    splits = cache.splits(configs[0]) if tested else cache.splits(configs[0]).untested()
    work = [
        arrangement.Part.of(together[0], splits, len(together), settings.stack)
        for together in stacks(configs, splits.pixels, splits.classes, device, settings.stack)
    ]
    with arrangement.pool(settings, work, arrangement.room(splits), device) as pool:
        cache.check_data_elsewhere(configs[0].dataset, pool)
        for config in {cell: config for config, cell in reversed(by_config.items())}.values():
            scheme = cache.scheme(config.init, config.plugins_dir)
            cache.check_elsewhere([scheme], pool, config.model)
            first = start(config, scheme, splits)
        resolved = arrangement.resolved(device, pool)
        digest = resuming.tag(resumable, settings, configs, splits, device) if resumable else {}
        with command_run.opened(
            settings,
            splits,
            resolved,
            name=name,
            summary=summary,
            experiment=experiment,
            tags=digest,
        ) as run:
            remark = network_run.remark(first.initial, splits)
            by = arrangement.told(settings, pool)
            population = Population(run=run, device=device, cells=cells, remark=remark, by=by)
            groups = mlflow_page.group_names(cells)
            tags = dict(zip(cells, mlflow_page.run_tags(groups), strict=True))
            if digest:
                tested_on = len(splits.test)
                population.add(resuming.taken_over(run, digest, by_config, tested_on))
            found = {member.config for member in population.members}
            population.taken_over = len(found)
            left = [config for config in configs if config not in found]
            of_left = list(stacks(left, splits.pixels, splits.classes, device, settings.stack))
            if not settings.stack and device == "cpu":
                of_left = arrangement.evened_stacks(of_left, pool.size)
            parts = [
                Stack(
                    run,
                    connection.uri(),
                    together,
                    device,
                    tags,
                    run_figures,
                    has_models=_has_models(configs),
                    varied=_varied(configs),
                    tested=tested,
                    keeps_best=keeps_best,
                )
                for together in of_left
            ]
            if parts:
                train_all(population, parts, pool, progress)
            order = {config: at for at, config in enumerate(configs)}
            population.members.sort(key=lambda member: order[member.config])
            progress("comparing, drawing and logging", len(configs), len(configs))
            yield population


def _varied(configs: Sequence[TrainConfig]) -> list[str]:
    """The settings in which they differ, where their cells and seeds do not tell them apart."""
    seen = [(*cell, config.seed) for cell, config in zip(cells_of(configs), configs, strict=True)]
    if len(set(seen)) == len(seen):
        return []
    of_cells = {"init", "activation", "model", "seed"}
    texts = [config.as_text() for config in configs]
    return [
        name
        for name in texts[0]
        if name not in of_cells and any(text[name] != texts[0][name] for text in texts)
    ]


def cells_of(configs: Sequence[TrainConfig]) -> list[Cell]:
    """Where each belongs; those of several models are told apart by them too."""
    has_models = _has_models(configs)
    return [cell_of(config, has_models=has_models) for config in configs]


def _has_models(configs: Sequence[TrainConfig]) -> bool:
    return len({config.model for config in configs}) > 1


def cell_of(config: TrainConfig, *, has_models: bool = False) -> Cell:
    """The scheme with what tells its networks apart, which names the model too if asked to."""
    kind = config.kind
    if has_models and config.has("activation"):
        kind = f"{config.model} {kind}"
    return Cell(cache.scheme(config.init, config.plugins_dir).spec, kind)


def train_all(
    population: Trained,
    parts: Sequence[Stack],
    pool: workers.WorkerPool,
    progress: Progress = silent,
    on_result: Callable[[Stack, Trained], None] = lambda *_: None,
) -> None:
    """Train the networks of all ``parts`` into ``population``, in their order.

    ``on_result`` gets each part as soon as it is trained and written. A network that fails
    leaves the others whole; without any left the failure is raised. A stack whose worker died is
    trained again. An interruption leaves those whose training it cut off in this process as runs
    that were KILLED, with what was measured; what other processes were training is lost.
    """
    networks = sum(len(part.configs) for part in parts)
    left, lost, ended = deque(parts), Counter[int](), 0
    trained: dict[int, Trained] = {}
    place = {part.id: at for at, part in enumerate(parts)}

    def told(what: str, done: int, of: int) -> None:
        progress(f"{what}, {ended} of {networks} networks done", done, of)

    # In this process it tells by itself how far it is.
    train = (
        (lambda part: train_stack(part, part_of(told, ended, len(part.configs), networks)))
        if pool.is_here
        else train_stack
    )
    try:
        for part, result in unsent.results(pool, train, lambda: left.popleft() if left else None):
            at = place[part.id]
            if isinstance(result, workers.WorkerLostError):
                lost[at] += 1
                _train_again(part, lost[at], result)
                left.append(part)
                continue
            trained[at] = result
            ended += len(result.members)
            best_networks.take(population.best, result.best)
            on_result(part, result)
            if not pool.is_here:
                told("training", ended, networks)
    except BaseException:
        if not pool.is_here:
            pool.stop()
            with contextlib.suppress(InitflowError):  # there is another one to tell
                _close(parts)
        raise
    for at in sorted(trained):
        population.add(trained[at])
    if not population.members:
        raise PluginError(f"no network was left: {'; '.join(population.failed.values())}")


def _close(parts: Sequence[Stack]) -> None:
    """End the runs that workers have left open."""
    for run in {part.run.id: part.run for part in parts}.values():
        for found in run.below():
            if found.status == "RUNNING":
                run.mark_orphaned(found)


def _train_again(part: Stack, losses: int, loss: Exception) -> None:
    """Close the runs that a worker wrote before it died: their networks will have others."""
    if losses == LOSSES:
        raise WorkError(f"{LOSSES} workers died at the same networks: {loss}")
    with contextlib.suppress(OutageError):  # they stay open, and are told by nothing else
        for run in part.run.found({STACK: part.id}):
            part.run.mark_orphaned(run)


def train_stack(stack: Stack, progress: Progress = silent) -> Trained:
    """Train and write the networks of ``stack``, in this process."""
    connection.set_uri(stack.tracking)
    writer = _Writer(stack)
    try:
        records = writer.start()
        if records:
            writer.train(records, progress)
            writer.write_all(records)
    except Exception as error:
        if machine.is_out_of_memory(error):
            n = len(stack.configs)
            remedy = f"give 'stack' a number below {n}" if n > 1 else "it takes a smaller one"
            what = f"{n} networks at once do" if n > 1 else "a network of this size does"
            raise WorkError(f"{what} not fit into memory: {remedy}") from error
        raise
    return writer.trained


class _Writer:
    """Starts, trains and writes the networks of a stack into their runs."""

    def __init__(self, stack: Stack) -> None:
        self.trained = Trained()
        self._stack = stack
        splits = cache.splits(stack.configs[0])
        self._splits = splits if stack.tested else splits.untested()
        self._resolved = machine.Resolved(stack.device, torch.get_num_threads())

    def start(self) -> list[Record]:
        """The untrained networks; of one that cannot be there is a run that says why."""
        records = []
        for config in self._stack.configs:
            scheme = cache.scheme(config.init, config.plugins_dir)
            try:
                records.append(start(config, scheme, self._splits))
            except InitflowError as error:
                name = self._stack.name(config)
                self.trained.failed[name] = cause(error)
                network_run.log_failed(
                    self._stack.run,
                    config,
                    error,
                    name=name,
                    resolved=self._resolved,
                    tags=self._tags(self._stack.cell(config)),
                )
        return records

    def train(self, records: Sequence[Record], progress: Progress) -> None:
        started = time.perf_counter()
        device = torch.device(self._stack.device)
        try:
            keep = (lambda *_: None) if self._stack.run_figures else forget
            train_together(records, self._splits.to(device), on_measured=keep, progress=progress)
        except BaseException as error:
            for record in records:
                self._write_cut_off(record, error)
            raise
        self.trained.training_s += time.perf_counter() - started

    def write_all(self, records: list[Record]) -> None:
        """Write each, and forget it then: it holds all that was measured."""
        started = time.perf_counter()
        records.reverse()
        while records:
            record = records.pop()
            try:
                self.trained.members.append(self.write(record))
            except InitflowError as error:
                name = self._stack.name(record.config)
                self.trained.failed[name] = cause(error)
            except BaseException as error:
                for rest in reversed(records):
                    self._write_cut_off(rest, error)
                raise
        self.trained.logging_s += time.perf_counter() - started

    def write(self, record: Record) -> Member:
        """All that a run of ``train`` carries."""
        cell = self._stack.cell(record.config)
        history = _by_layer_history(record)
        logged = network_run.log_network(
            self._stack.run,
            record,
            self._splits,
            name=self._stack.name(record.config),
            resolved=self._resolved,
            tags=self._tags(cell),
            history=history,
            run_figures=self._stack.run_figures,
        )
        self.trained.failures |= logged.failures
        if self._stack.keeps_best:
            best_networks.keep(self.trained.best, cell, record)
        self.trained.metrics |= record.history.keys() | history.keys()
        curve = record.history.get("accuracy/test", [])
        return Member(
            record.config,
            cell,
            logged.run_id,
            logged.model_id,
            Outcome(record.config.seed, curve, record.diverged_at, len(self._splits.test)),
            kept_signals(record.signals[0][1]) if record.signals else None,
            told_metrics({key: points[-1][1] for key, points in record.history.items()}),
            record.is_exact,
        )

    def _tags(self, cell: Cell) -> dict[str, object]:
        return {STACK: self._stack.id, **self._stack.tags[cell]}

    def _write_cut_off(self, record: Record, error: BaseException) -> None:
        network_run.log_cut_off(
            self._stack.run,
            record,
            self._splits,
            error,
            name=self._stack.name(record.config),
            resolved=self._resolved,
            tags=self._tags(self._stack.cell(record.config)),
        )


def forget(record: Record, *_: object) -> None:
    """What only the figures need, of many networks gigabytes."""
    record.received = ()
    if record.reading:
        record.reading = replace(record.reading, preactivations=())


def by_layer(signals: Signals) -> dict[str, list[float | None]]:
    """The values of :data:`BY_LAYER`, layer by layer; None where there is none that is finite.

    The gradient's are relative to the last layer's: by itself its variance goes with 1/n² of the
    images, some 1e-9, for which the axis of MLflow's page writes 0.
    """
    forward, gradients = (
        signals.by_layer(f"{of}_variance") for of in ("preactivation", "gradient")
    )
    last = gradients[-1] or math.nan
    relative = [None if value is None else value / last for value in gradients]
    finite = [value if value is not None and math.isfinite(value) else None for value in relative]
    return dict(zip(BY_LAYER, (forward, finite), strict=True))


def _by_layer_history(record: Record) -> dict[str, list[tuple[int, float]]]:
    """Those of the untrained network, with the layer's number as step."""
    if not record.signals:
        return {}
    _, signals = record.signals[0]
    return {
        f"by_layer/{quantity}": [
            (layer, value) for layer, value in enumerate(values, start=1) if value is not None
        ]
        for quantity, values in by_layer(signals).items()
    }

"""A study of learning rate and gamma for each scheme, under equal budgets; the best is tested."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence

from initflow.core import workers
from initflow.core.configurations import TuneConfig
from initflow.core.progress import Progress, part_of
from initflow.diagnostics.record import start
from initflow.errors import InitflowError, SettingError, WorkError
from initflow.experiments import command_run
from initflow.experiments.failures import noted
from initflow.experiments.populations import arrangement, stacking
from initflow.experiments.populations.members import Trained
from initflow.experiments.public import public
from initflow.experiments.tuning import batches, evaluation, running, samplers, storages, studies
from initflow.experiments.tuning import plan as plans
from initflow.experiments.tuning.batches import Batch, Spent
from initflow.experiments.tuning.evaluation import Tests
from initflow.experiments.tuning.plan import Plan
from initflow.experiments.tuning.registration import registered
from initflow.experiments.tuning.report import Tuning
from initflow.experiments.tuning.scheme_study import SchemeStudy
from initflow.experiments.tuning.searches import PendingTrial
from initflow.experiments.tuning.studies import Study
from initflow.initializers.scheme import Scheme
from initflow.reporting import trials
from initflow.reporting.seed_statistics import Cell
from initflow.tracking import connection, outages, runs, unsent
from initflow.training import cache, datasets

LOSSES = 3  # of every worker, one after the other, after which nothing more is tried
EXPERIMENTS = "initflow.experiments"  # under which a study remembers where its runs are


@public(TuneConfig)
@cache.cleared_after()
def tune(config: TuneConfig, *, experiment: str | None = None, progress: Progress) -> Tuning:
    """Search the best setting of every scheme by the same number of trials, and test it once.

    What is searched is the learning rate and gamma, its factor after each epoch, by an Optuna study
    for each scheme. Settings are chosen by the accuracy on images held out from training; the best
    is tested on the test images, under fresh seeds. A study that is there already goes on.

    Returns a :class:`Tuning`. Raises, before a run is made, what :func:`initflow.compare` does,
    :class:`StudyError` where the studies' storage cannot be reached, or another process is running
    them, and :class:`TrackingError` where MLflow does not answer.
    """
    samplers.check_sampler(config.sampler)
    schemes = cache.distinct(config.inits, config.plugins_dir)
    connection.check_backend(config.backend)
    outages.check_reachable()
    progress("loading the data, downloaded at its first use", 0, 1)
    plan = plans.of(config)
    _check_storage(plan)
    with (
        arrangement.pool(config, *_work(plan), plan.device) as pool,
        storages.locked(plan.storage, plan.study),
    ):
        cache.check_elsewhere(schemes.values(), pool, config.model)
        cache.check_data_elsewhere(config.dataset, pool)
        of_cells, on = _opened(plan, schemes), datasets.title(config.dataset)
        progress("looking for what an earlier process left", 0, 1)
        for study in of_cells.values():
            study.recover()
        with (
            command_run.opened(
                config,
                cache.splits(plan.trial(config.inits[0])),
                _resolved(plan, pool),
                name=f"tune {config.kind} {on} {len(schemes)} schemes",
                summary=plan.summary,
                experiment=experiment,
                tags=plan.tags("study", *of_cells.values()),
            ) as run,
            contextlib.ExitStack() as open_runs,
        ):
            _close_orphans(run, of_cells)
            studied = [
                SchemeStudy(
                    init, cell, study, open_runs.enter_context(_run(plan, run, cell, study))
                )
                for init, (cell, study) in zip(schemes, of_cells.items(), strict=True)
            ]
            try:
                started = time.perf_counter()
                spent = _try_all(plan, studied, pool, progress)
                seconds = time.perf_counter() - started
                for scheme in studied:  # a worker may have lived on for a moment after it was lost
                    scheme.interrupt([])
                tests, trained = evaluation.evaluate(plan, studied, pool, progress)
            except BaseException:
                pool.stop()
                for scheme in studied:
                    with contextlib.suppress(InitflowError):  # there is another one to tell
                        scheme.interrupt(list(scheme.running))
                raise
            progress("drawing and logging", 1, 1)
            by = arrangement.told(config, pool)
            return _logged(plan, run, studied, tests, trained, seconds=seconds, spent=spent, by=by)


def _logged(
    plan: Plan,
    run: runs.Run,
    studied: Sequence[SchemeStudy],
    tests: Sequence[Tests],
    trained: Trained,
    *,
    seconds: float,
    spent: Spent,
    by: str,
) -> Tuning:
    """What came of the studies, in the run above them and in theirs: numbers first."""
    of_trials = {scheme.cell: scheme.study.trials(plan.config.trials) for scheme in studied}
    of_tests = dict(zip(of_trials, tests, strict=True))
    tuned = {cell: one.tuned for cell, one in of_tests.items()}
    untuned = {cell: one.untuned for cell, one in of_tests.items()}
    result = Tuning(
        plan=plan,
        run=run,
        rows=[
            trials.tuned(cell, found, tuned[cell], untuned[cell])
            for cell, found in of_trials.items()
        ],
        trials=of_trials,
        sentences=trials.tuning_sentences(tuned, untuned, plan.untuned),
        seconds=seconds,
        spent=spent,
        by=by,
        failed=trained.failed,
        failures=trained.failures,
    )
    result.log_table()
    with noted(result.failures, "the versions in the registry"):
        result.versions, result.unregistered = registered(plan, studied, of_tests, of_trials)
    result.log_description()
    for scheme, row in zip(studied, result.rows, strict=True):
        with noted(result.failures, f"the run of {scheme.cell}"):
            scheme.log_course(row, of_trials[scheme.cell])
        with noted(result.failures, f"Optuna's figures of {scheme.cell}"):
            scheme.log_figures()
    result.log_report()
    return result


def _check_storage(plan: Plan) -> None:
    """Raise :class:`SettingError` where the studies cannot be kept there."""
    storage = storages.shown(plan.storage)
    if storages.is_same_database(plan.storage, connection.uri()):
        raise SettingError(
            f"storage must be another database than MLflow's, not '{storage}': each of them needs "
            "one of its own"
        )
    if plan.config.backend == "ray" and not storages.is_shared(plan.storage):
        raise SettingError(
            "backend=ray needs storage in a database that all machines reach, such as "
            f"postgresql://user@host/name, not '{storage}'"
        )


def _opened(plan: Plan, schemes: Mapping[str, Scheme]) -> dict[Cell, Study]:
    """The study of each scheme, none of which is made unless all can be."""
    config = plan.config
    settings: dict[Cell, Mapping[str, str]] = {}
    for init, scheme in schemes.items():
        start(plan.trial(init), scheme, cache.splits(plan.trial(init)))
        cell = Cell(scheme.spec, config.kind)
        settings[cell] = {**plan.described, "scheme": f"{scheme.spec} ({scheme.provider})"}
        studies.check(plan.search(cell), settings[cell])
    first = plan.untuned_setting
    return {cell: Study(plan.search(cell), of_cell, first) for cell, of_cell in settings.items()}


def _work(plan: Plan) -> tuple[list[arrangement.Part], int]:
    """Of each scheme the trials, with the networks to be tested; and for how many is room."""
    config, trial = plan.config, plan.trial(plan.config.inits[0])
    splits = cache.splits(trial)
    widths = datasets.widths(plan.pixels, trial.hidden, plan.classes)
    room = stacking.room(widths, trial.batch_size, plan.device, trial.optimizer)
    networks, together = config.trials + 2 * config.seeds, min(config.batch, config.stack or room)
    part = arrangement.Part.of(trial, splits, networks, together)
    return [part] * len(config.inits), arrangement.room(splits)


def _resolved(plan: Plan, pool: workers.WorkerPool) -> dict[str, str]:
    """What ``auto`` became."""
    return {
        **arrangement.resolved(plan.device, pool),
        "resolved.validation": str(plan.validation),
        "resolved.study": plan.study,
        "resolved.storage": storages.shown(plan.storage),
    }


def _close_orphans(run: runs.Run, of_cells: Mapping[Cell, Study]) -> None:
    """Close the runs that earlier processes of the studies left open when they died.

    Also those that are whole but that the study was not told of: these networks have others.
    """
    for study in of_cells.values():
        lost = set(map(str, study.interrupted()))
        tested = evaluation.tested_runs(study)
        experiments = {*(study.user_attr(EXPERIMENTS) or ()), runs.with_ids(run.experiment_id)}
        for found in run.found({plans.STUDY_ID: f"%{study.id}%"}, experiments):
            is_test = found.tags["initflow.tuning"] in ("tuned", "untuned")
            unknown = found.tags.get(batches.TRIAL) in lost or (
                is_test and not found.names & tested
            )
            if found.status == "RUNNING" or (unknown and not runs.is_orphan(found)):
                run.mark_orphaned(found)
        study.set_user_attr(EXPERIMENTS, sorted(experiments))


def _run(
    plan: Plan, run: runs.Run, cell: Cell, study: Study
) -> contextlib.AbstractContextManager[runs.Run]:
    """The run of a scheme: where the study goes on, the one that it had, now below ``run``."""
    tags = plan.tags("scheme", study)
    earlier = run.found(tags)
    return run.nested(
        name=f"tune {cell}",
        description=f"The trials of {cell}, and the tests of its best setting.",
        params={"init": cell.init, "activation": cell.activation},
        tags=tags | {"initflow.scheme": cell.init},
        resumed=earlier[0].id if earlier else None,
    )


def _try_all(
    plan: Plan, studied: Sequence[SchemeStudy], pool: workers.WorkerPool, progress: Progress
) -> Spent:
    """All trials of all studies; the one with the fewest trials begun and running is next.

    Where each worker can have a study of its own, each goes on one batch after the other, and its
    trials are those that one worker alone would try, whoever is faster.
    """
    config = plan.config
    total = config.trials * len(studied)
    ended = sum(len(scheme.study.trials(config.trials)) for scheme in studied)
    losses, spent = 0, Spent()
    of_run = {scheme.run.id: scheme for scheme in studied}

    def next_batch() -> Batch | None:
        nonlocal spent
        asking = time.perf_counter()
        begun = {scheme.run.id: scheme.study.begun() for scheme in studied}
        unfinished = [
            scheme
            for scheme in studied
            if begun[scheme.run.id] < config.trials
            and (pool.size > len(studied) or not scheme.running)
        ]
        if not unfinished:
            return None
        scheme = min(unfinished, key=lambda one: (len(one.running), begun[one.run.id]))
        # Batches end at the same places however often the study was interrupted in between.
        to_end = config.batch - begun[scheme.run.id] % config.batch
        pending = scheme.study.ask(min(to_end, config.trials - begun[scheme.run.id]))
        scheme.running |= {trial.number: trial for trial in pending}
        spent += Spent(studying=time.perf_counter() - asking)
        return Batch(
            search=scheme.study.search,
            pending=pending,
            configs=[plan.trial(scheme.init, trial) for trial in pending],
            run=scheme.run,
            tracking=connection.uri(),
            tags=plan.tags("trial", scheme.study),
            device=plan.device,
            stack=config.stack,
        )

    def in_all(what: str, done: int, of: int) -> None:
        progress(f"{what}, {ended} of {total} trials done", done, of)

    def all_running() -> list[PendingTrial]:
        return [trial for scheme in studied for trial in list(scheme.running.values())]

    # In this process it tells by itself how far it is.
    work = (
        (lambda one: batches.try_batch(one, part_of(in_all, ended, len(one.pending), total)))
        if pool.is_here
        else batches.try_batch
    )
    with running.heartbeats(plan.storage, all_running):
        for batch, result in unsent.results(pool, work, next_batch):
            scheme, numbers = of_run[batch.run.id], [trial.number for trial in batch.pending]
            if isinstance(result, workers.WorkerLostError):
                losses += 1
                if losses == LOSSES * pool.size:  # a node takes all of its own with it
                    raise WorkError(f"{losses} workers died one after the other: {result}")
                scheme.interrupt(numbers)
                continue
            losses, spent, ended = 0, spent + result, ended + len(numbers)
            for number in numbers:
                del scheme.running[number]
            if not pool.is_here:
                in_all("training", ended, total)
    return spent

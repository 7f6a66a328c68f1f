"""A study of learning rate and gamma for each scheme, under equal budgets; the best is tested."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import initflow
from initflow.core import workers
from initflow.core.configurations import TuneConfig
from initflow.core.progress import Progress
from initflow.errors import InitflowError, SettingError, WorkError
from initflow.experiments import command_run
from initflow.experiments.failures import noted
from initflow.experiments.record import start
from initflow.experiments.tuning import batches, evaluation, running, samplers, storages, studies
from initflow.experiments.tuning import plan as plans
from initflow.experiments.tuning.batches import Batch, Spent
from initflow.experiments.tuning.plan import Arm, Plan
from initflow.experiments.tuning.registration import registered
from initflow.experiments.tuning.reports import (
    Tuning,
    below,
    describe,
    log_arm,
    log_figures,
    log_pictures,
    log_report,
    log_table,
)
from initflow.experiments.tuning.searches import PendingTrial
from initflow.experiments.tuning.studies import Study
from initflow.initializers.scheme import Scheme
from initflow.reporting import trials
from initflow.reporting.seed_statistics import Cell
from initflow.tracking import connection, outages, runs, unsent
from initflow.training import cache

LOSSES = 3  # of every worker, one after the other, after which nothing more is tried
EXPERIMENTS = "initflow.experiments"  # under which it remembers where its runs are


@cache.cleared_after()
def tune(
    config: TuneConfig,
    *,
    experiment: str | None = None,
    progress: Progress = lambda *_: None,
) -> Tuning:
    """Search the best setting of every scheme by the same number of trials, and test it once.

    A study that is there already goes on. A wrong setting, missing data, a storage or a server
    that cannot be reached is an error of :mod:`initflow.errors` before a run is made.
    """
    samplers.check_sampler(config.sampler)
    schemes = cache.distinct(config.inits, config.plugins_dir)
    connection.check_backend(config.backend)
    outages.check_reachable()
    progress("loading the data, downloaded at its first use", 0, 1)
    plan = plans.made(config)
    _check_storage(plan)
    with (
        workers.worker_pool(config.backend, config.workers, config.threads) as pool,
        storages.locked(plan.storage, plan.study),
    ):
        cache.check_elsewhere(schemes.values(), pool)
        of_cells = _opened(plan, schemes)
        progress("looking for what an earlier process left", 0, 1)
        for study in of_cells.values():
            study.recover()
        resolved = _resolved(plan, pool)
        version = {"initflow.version": initflow.__version__}
        with (
            runs.start(
                name=f"tune {config.activation} {config.dataset} {len(schemes)} schemes",
                description=" ".join(filter(None, (plan.summary, plan.remark))),
                params=config.as_text() | resolved,
                tags=plan.tags("study", *of_cells.values()) | version,
                experiment=experiment,
            ) as run,
            contextlib.ExitStack() as stack,
        ):
            # Not kept in a name: the tests have another split, and memory for one is enough.
            command_run.log_setting(
                run, config, cache.splits(plan.trial(config.inits[0])), resolved
            )
            command_run.log_uncommitted(run)
            _close_orphans(run, of_cells)
            arms = [
                Arm(init, cell, study, stack.enter_context(_arm_run(plan, run, cell, study)))
                for init, (cell, study) in zip(schemes, of_cells.items(), strict=True)
            ]
            try:
                started = time.perf_counter()
                spent = _try_all(plan, arms, pool, progress)
                seconds = time.perf_counter() - started
                for arm in arms:  # a worker may have lived on for a moment after it was lost
                    _give_up(arm, [])
                tests, trained = evaluation.tested(plan, arms, pool, progress)
            except BaseException:
                pool.stop()
                for arm in arms:
                    with contextlib.suppress(InitflowError):  # there is another one to tell
                        _give_up(arm, list(arm.at_hand))
                raise
            progress("drawing and logging", 1, 1)
            of_trials = {arm.cell: arm.study.trials(config.trials) for arm in arms}
            of_tests = dict(zip(of_trials, tests, strict=True))
            result = Tuning(
                plan,
                run,
                [
                    trials.tuned(cell, of_trials[cell], one.tuned, one.untuned)
                    for cell, one in of_tests.items()
                ],
                of_trials,
                trials.tuning_sentences(
                    {cell: one.tuned for cell, one in of_tests.items()},
                    {cell: one.untuned for cell, one in of_tests.items()},
                    plan.untuned,
                ),
                seconds,
                spent,
                trained.failed,
                {},
                "",
                trained.failures,
            )
            log_table(result)
            with noted(result.failures, "the versions in the registry"):
                versions, unregistered = registered(plan, arms, of_tests, of_trials)
                result = replace(result, versions=versions, unregistered=unregistered)
            describe(result)
            for arm, row in zip(arms, result.rows, strict=True):
                with noted(result.failures, f"the run of {arm.cell}"):
                    log_arm(arm, row, of_trials[arm.cell])
                log_figures(arm, result.failures)
            pictures = log_pictures(result)
            with noted(result.failures, "report.html"):
                log_report(result, pictures)
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
        cell = Cell(scheme.spec, config.activation)
        settings[cell] = {**plan.described, "scheme": f"{scheme.spec} ({scheme.provider})"}
        studies.check(plan.search(cell), settings[cell])
    first = config.lr, config.gamma
    return {cell: Study(plan.search(cell), of_cell, first) for cell, of_cell in settings.items()}


def _resolved(plan: Plan, pool: workers.WorkerPool) -> dict[str, str]:
    """What ``auto`` became."""
    return {
        **command_run.resolved_params(plan.device, pool.threads),
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


@contextlib.contextmanager
def _arm_run(plan: Plan, run: runs.Run, cell: Cell, study: Study) -> Iterator[runs.Run]:
    """The run of a scheme: where the study goes on, the one that it had, now below ``run``."""
    tags = plan.tags("scheme", study)
    earlier = run.found(tags)
    with run.nested(
        name=f"tune {cell}",
        description=f"The trials of {cell}, and the tests of its best setting.",
        params={"init": cell.init, "activation": cell.activation},
        tags=tags | {"initflow.scheme": cell.init},
        resumed=earlier[0].id if earlier else None,
    ) as nested:
        yield nested


def _try_all(
    plan: Plan, arms: Sequence[Arm], pool: workers.WorkerPool, progress: Progress
) -> Spent:
    """All trials of all studies; the one that is least far is next, with the fewest at hand.

    Where each worker can have a study of its own, each goes on one batch after the other, and its
    trials are those that one worker alone would try, whoever is faster.
    """
    config = plan.config
    total = config.trials * len(arms)
    through = sum(len(arm.study.trials(config.trials)) for arm in arms)
    losses, spent = 0, Spent()
    of_run = {arm.run.id: arm for arm in arms}

    def next_batch() -> Batch | None:
        nonlocal spent
        asking = time.perf_counter()
        begun = {arm.run.id: arm.study.begun() for arm in arms}
        open_arms = [
            arm
            for arm in arms
            if begun[arm.run.id] < config.trials and (pool.size > len(arms) or not arm.at_hand)
        ]
        if not open_arms:
            return None
        arm = min(open_arms, key=lambda arm: (len(arm.at_hand), begun[arm.run.id]))
        # Batches end at the same places however often the study was interrupted in between.
        to_end = config.batch - begun[arm.run.id] % config.batch
        asked = arm.study.ask(min(to_end, config.trials - begun[arm.run.id]))
        arm.at_hand |= {one.number: one for one in asked}
        spent += Spent(studying=time.perf_counter() - asking)
        return Batch(
            search=arm.study.search,
            asked=asked,
            configs=[plan.trial(arm.init, one) for one in asked],
            run=arm.run,
            tracking=connection.uri(),
            tags=plan.tags("trial", arm.study),
            device=plan.device,
            stack=config.stack,
        )

    def told(what: str, done: int, of: int) -> None:
        progress(f"{what}, {through} of {total} trials done", done, of)

    def at_hand() -> list[PendingTrial]:
        return [asked for arm in arms for asked in list(arm.at_hand.values())]

    work = (
        functools.partial(batches.try_batch, progress=told) if pool.is_here else batches.try_batch
    )
    with running.heartbeats(plan.storage, at_hand):
        for batch, result in unsent.results(pool, work, next_batch):
            arm, numbers = of_run[batch.run.id], [one.number for one in batch.asked]
            if isinstance(result, workers.WorkerLostError):
                losses += 1
                if losses == LOSSES * pool.size:  # a node takes all of its own with it
                    raise WorkError(f"{losses} workers died one after the other: {result}")
                _give_up(arm, numbers)
                continue
            losses, spent, through = 0, spent + result, through + len(numbers)
            for number in numbers:
                del arm.at_hand[number]
            if not pool.is_here:  # else it tells by itself
                told("training", through, total)
    return spent


def _give_up(arm: Arm, numbers: Sequence[int]) -> None:
    """Leave the trials that nobody works on any more to be tried again, and close their runs."""
    arm.study.interrupt(numbers)
    for number in numbers:
        del arm.at_hand[number]
    lost = set(map(str, arm.study.interrupted()))
    for found in below(arm) if lost else ():
        if found.tags.get(batches.TRIAL) in lost and not runs.is_orphan(found):
            arm.run.mark_orphaned(found)

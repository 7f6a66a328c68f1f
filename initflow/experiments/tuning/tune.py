"""A study of learning rate and gamma for each scheme, under equal budgets; the best is tested."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import initflow
from initflow.core import environment, workers
from initflow.core.config import TuneConfig
from initflow.errors import InitflowError, OutageError, SettingError, WorkError
from initflow.experiments import experiment as experiments
from initflow.experiments import failures
from initflow.experiments.failures import Failures, noted
from initflow.experiments.populations import seeds_of
from initflow.experiments.record import Progress, start
from initflow.experiments.tuning import finals, studies, tuning
from initflow.experiments.tuning import plan as plans
from initflow.experiments.tuning.plan import Arm, Plan
from initflow.experiments.tuning.studies import Asked, Study
from initflow.experiments.tuning.tuning import Batch, Spent
from initflow.initializers.scheme import Scheme
from initflow.reporting import trials, tuning_figures, webpage
from initflow.reporting.comparison import NONE, Cell, interval, percent
from initflow.reporting.trials import OUTCOMES, Trial, Tuned
from initflow.tracking import delivery, mlflow_page, track, unsent
from initflow.training import supplies

LOSSES = 3  # of every worker, one after the other, after which nothing more is tried
REGISTERED = "initflow.registered"  # under which a study remembers the versions of its models
EXPERIMENTS = "initflow.experiments"  # under which it remembers where its runs are
BEST = "best"  # the alias of the version that did best on the validation images


@dataclass(frozen=True)
class Tuning:
    """What came of the studies: a row for each scheme, in words too; ``trials`` are all of them.

    ``seconds`` is how long the trials of this time took, and ``spent`` what that was spent on by
    all workers together; ``failed`` says of networks to be tested why they were not, ``failures``
    of figures and the like why they could not be made. ``versions`` are the registered models, and
    ``unregistered`` says why there are none.
    """

    plan: Plan
    run: track.Run
    rows: Sequence[Tuned]
    trials: Mapping[Cell, Sequence[Trial]]
    sentences: Sequence[str]
    seconds: float
    spent: Spent
    failed: Mapping[str, str]
    versions: Mapping[Cell, str]
    unregistered: str
    failures: Failures


@supplies.lasting()
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
    studies.check_sampler(config.sampler)
    schemes = supplies.different(config.inits, config.plugins_dir)
    track.check_backend(config.backend)
    track.check_reachable()
    progress("loading the data, downloaded at its first use", 0, 1)
    plan = plans.made(config)
    _check_storage(plan)
    with (
        workers.hired(config.backend, config.workers, config.threads) as crew,
        studies.alone(plan.storage, plan.study),
    ):
        supplies.check_elsewhere(schemes.values(), crew)
        of_cells = _opened(plan, schemes)
        progress("looking for what an earlier process left", 0, 1)
        for study in of_cells.values():
            study.settle()
        resolved = _resolved(plan, crew)
        version = {"initflow.version": initflow.__version__}
        with (
            track.start(
                name=f"tune {config.activation} {config.dataset} {len(schemes)} schemes",
                description=" ".join(filter(None, (plan.summary, plan.remark))),
                params=config.as_text() | resolved,
                tags=plan.tags("study", *of_cells.values()) | version,
                experiment=experiment,
            ) as run,
            contextlib.ExitStack() as runs,
        ):
            # Not kept in a name: the finals have another split, and memory for one is enough.
            experiments.log_setting(
                run, config, supplies.splits(plan.trial(config.inits[0])), resolved
            )
            experiments.log_uncommitted(run)
            _close_orphans(run, of_cells)
            arms = [
                Arm(init, cell, study, runs.enter_context(_arm_run(plan, run, cell, study)))
                for init, (cell, study) in zip(schemes, of_cells.items(), strict=True)
            ]
            try:
                started = time.perf_counter()
                spent = _try_all(plan, arms, crew, progress)
                seconds = time.perf_counter() - started
                for arm in arms:  # a worker may have lived on for a moment after it was lost
                    _give_up(arm, [])
                tests, trained = finals.tested(plan, arms, crew, progress)
            except BaseException:
                crew.stop()
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
                trials.sentences(
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
            _log_table(result)
            with noted(result.failures, "the versions in the registry"):
                versions, unregistered = _registered(plan, arms, of_tests, of_trials)
                result = replace(result, versions=versions, unregistered=unregistered)
            _describe(result)
            for arm, row in zip(arms, result.rows, strict=True):
                with noted(result.failures, f"the run of {arm.cell}"):
                    _log_arm(arm, row, of_trials[arm.cell])
                _log_figures(arm, result.failures)
            pictures = _log_pictures(result)
            with noted(result.failures, "report.html"):
                _log_report(result, pictures)
            return result


def _check_storage(plan: Plan) -> None:
    """Raise :class:`SettingError` where the studies cannot be kept there."""
    storage = studies.shown(plan.storage)
    if studies.is_same_database(plan.storage, delivery.uri()):
        raise SettingError(
            f"storage must be another database than MLflow's, not '{storage}': each of them needs "
            "one of its own"
        )
    if plan.config.backend == "ray" and not studies.is_shared(plan.storage):
        raise SettingError(
            "backend=ray needs storage in a database that all machines reach, such as "
            f"postgresql://user@host/name, not '{storage}'"
        )


def _opened(plan: Plan, schemes: Mapping[str, Scheme]) -> dict[Cell, Study]:
    """The study of each scheme, none of which is made unless all can be."""
    config = plan.config
    settings: dict[Cell, Mapping[str, str]] = {}
    for init, scheme in schemes.items():
        start(plan.trial(init), scheme, supplies.splits(plan.trial(init)))
        cell = Cell(scheme.spec, config.activation)
        settings[cell] = {**plan.described, "scheme": f"{scheme.spec} ({scheme.provider})"}
        studies.check(plan.search(cell), settings[cell])
    first = config.lr, config.gamma
    return {cell: Study(plan.search(cell), of_cell, first) for cell, of_cell in settings.items()}


def _resolved(plan: Plan, crew: workers.Crew) -> dict[str, str]:
    """What ``auto`` became."""
    return {
        **experiments.resolved_params(plan.device, crew.threads),
        "resolved.validation": str(plan.validation),
        "resolved.study": plan.study,
        "resolved.storage": studies.shown(plan.storage),
    }


def _close_orphans(run: track.Run, of_cells: Mapping[Cell, Study]) -> None:
    """Close the runs that earlier processes of the studies left open when they died.

    Also those that are whole but that the study was not told of: these networks have others.
    """
    for study in of_cells.values():
        lost = set(map(str, study.were_cut_off()))
        tested = finals.runs(study)
        experiments = {*(study.remembered(EXPERIMENTS) or ()), track.with_ids(run.experiment_id)}
        for found in run.found({plans.STUDY_ID: f"%{study.id}%"}, experiments):
            is_test = found.tags["initflow.tuning"] in ("tuned", "untuned")
            unknown = found.tags.get(tuning.TRIAL) in lost or (is_test and not found.names & tested)
            if found.status == "RUNNING" or (unknown and not track.is_orphan(found)):
                run.disown(found)
        study.remember(EXPERIMENTS, sorted(experiments))


@contextlib.contextmanager
def _arm_run(plan: Plan, run: track.Run, cell: Cell, study: Study) -> Iterator[track.Run]:
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


def _try_all(plan: Plan, arms: Sequence[Arm], crew: workers.Crew, progress: Progress) -> Spent:
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
            if begun[arm.run.id] < config.trials and (crew.size > len(arms) or not arm.at_hand)
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
            tracking=delivery.uri(),
            tags=plan.tags("trial", arm.study),
            device=plan.device,
            stack=config.stack,
        )

    def told(what: str, done: int, of: int) -> None:
        progress(f"{what}, {through} of {total} trials done", done, of)

    def at_hand() -> list[Asked]:
        return [asked for arm in arms for asked in list(arm.at_hand.values())]

    work = functools.partial(tuning.try_batch, progress=told) if crew.is_here else tuning.try_batch
    with studies.heartbeats(plan.storage, at_hand):
        for batch, result in unsent.results(crew, work, next_batch):
            arm, numbers = of_run[batch.run.id], [one.number for one in batch.asked]
            if isinstance(result, workers.WorkerLostError):
                losses += 1
                if losses == LOSSES * crew.size:  # a node takes all of its own with it
                    raise WorkError(f"{losses} workers died one after the other: {result}")
                _give_up(arm, numbers)
                continue
            losses, spent, through = 0, spent + result, through + len(numbers)
            for number in numbers:
                del arm.at_hand[number]
            if not crew.is_here:  # else it tells by itself
                told("training", through, total)
    return spent


def _give_up(arm: Arm, numbers: Sequence[int]) -> None:
    """Leave the trials that nobody works on any more to be tried again, and close their runs."""
    arm.study.cut_off(numbers)
    for number in numbers:
        del arm.at_hand[number]
    lost = set(map(str, arm.study.were_cut_off()))
    for found in _below(arm) if lost else ():
        if found.tags.get(tuning.TRIAL) in lost and not track.is_orphan(found):
            arm.run.disown(found)


def _below(arm: Arm) -> list[track.Found]:
    """The runs below its own; none where MLflow does not answer: the next start sees to them."""
    try:
        return arm.run.found({track.PARENT: arm.run.id})
    except OutageError:
        return []


def _registered(
    plan: Plan,
    arms: Sequence[Arm],
    tests: Mapping[Cell, finals.Tests],
    of_trials: Mapping[Cell, Sequence[Trial]],
) -> tuple[dict[Cell, str], str]:
    """The version of each scheme's model in the registry, made where it is not there.

    None, and why, where MLflow does not answer.
    """
    try:
        return _versions(plan, arms, tests, of_trials), ""
    except OutageError as error:
        return {}, str(error)


def _versions(
    plan: Plan,
    arms: Sequence[Arm],
    tests: Mapping[Cell, finals.Tests],
    of_trials: Mapping[Cell, Sequence[Trial]],
) -> dict[Cell, str]:
    name = plan.config.register
    versions: dict[Cell, str] = {}
    accuracies: dict[Cell, float] = {}
    for arm in arms if name else ():
        best, model = trials.best(of_trials[arm.cell]), tests[arm.cell].model
        if not name or not best or not model:
            continue
        run_id, model_id = track.there(*model)
        known = arm.study.remembered(REGISTERED) or {}
        key = f"{name} {model_id}"
        if key not in known or not track.has_version(name, known[key]):
            made = track.register(
                name,
                model_id,
                run_id,
                {**plan.tags("tuned", arm.study), **arm.cell._asdict()},
                f"{arm.cell} at lr {best.lr:g} and gamma {best.gamma:g}, the best of its trials.",
            )
            known = {**known, key: made}
            arm.study.remember(REGISTERED, known)
        versions[arm.cell] = known[key]
        accuracies[arm.cell] = best.accuracy or 0.0
    if name and versions:
        track.set_alias(name, BEST, versions[max(accuracies, key=accuracies.__getitem__)])
    return versions


def _log_arm(arm: Arm, row: Tuned, found: Sequence[Trial]) -> None:
    """The course of a study, and its end."""
    accuracies = [(trial.number, trial.accuracy) for trial in found if trial.outcome == "finished"]
    arm.run.log_history(
        {
            "trials/accuracy": [(n, accuracy) for n, accuracy in accuracies if accuracy],
            "trials/best": _best_so_far(found),
        }
    )
    if row.best and row.best.accuracy is not None:
        ends = {"best/lr": row.best.lr, "best/gamma": row.best.gamma}
        ends |= {"best/accuracy/validation": row.best.accuracy}
        if row.tested.mean is not None:
            ends["best/accuracy/test"] = row.tested.mean
        arm.run.log_metrics(len(found), ends)
    below, links_to = _below(arm), []
    for text, part in (("its trials side by side", "trial"), ("its tests", "tuned")):
        ids = [r.id for r in below if r.tags["initflow.tuning"] == part and not track.is_orphan(r)]
        if 1 < len(ids) <= mlflow_page.LINKED:
            address = mlflow_page.comparison_address(arm.run.experiment_id, ids)
            links_to.append(f"[{text}]({address})")
    best = f"lr {row.best.lr:.4g} and gamma {row.best.gamma:.4g}" if row.best else "none finished"
    counts = ", ".join(f"{n} {outcome}" for outcome, n in row.counts.items() if n)
    arm.run.describe(
        f"The trials of {arm.cell}: {counts}. The best setting: {best}.", " · ".join(links_to)
    )


def _log_figures(arm: Arm, failed: Failures) -> None:
    """Optuna's of its study."""
    with noted(failed, f"Optuna's figures of {arm.cell}"):
        for name, png in arm.study.figures().items():
            arm.run.log_bytes(f"{name}.png", png)


def _best_so_far(found: Sequence[Trial]) -> list[tuple[int, float]]:
    """(trials that are through, the best accuracy of a finished one) from the first of them on."""
    best, course = 0.0, []
    for n, trial in enumerate(found, start=1):
        if trial.outcome == "finished":
            best = max(best, trial.accuracy or 0.0)
        if best:
            course.append((n, best))
    return course


def links(result: Tuning) -> dict[str, str]:
    """Where MLflow's page shows what, complete."""
    run, server = result.run, track.server()
    page = mlflow_page.run_address(run.experiment_id, run.id)
    charts = mlflow_page.run_address(run.experiment_id, run.id, charts=True)
    found = {"The run of this tuning": page, "Its charts": charts}
    return {
        what: track.with_ids(mlflow_page.absolute(server, address))
        for what, address in found.items()
    }


def warnings(result: Tuning) -> list[str]:
    """What is not as one would expect."""
    lines = [result.plan.remark] if result.plan.remark else []
    lines += [f"{name} failed: {reason}" for name, reason in result.failed.items()]
    if result.unregistered:
        lines.append(f"no model was registered ({result.unregistered}); the same command does it")
    for row in result.rows:
        if row.counts["failed"]:
            lines.append(f"{row.cell}: {row.counts['failed']} trials failed; their runs say why")
        if row.best is None:
            lines.append(f"{row.cell}: no trial finished, so there is nothing to test")
        elif _at_edge(result.plan.config, row.best.lr):
            lines.append(
                f"{row.cell}: its best lr, {trials.rate(row.best.lr)}, is at the edge of what was "
                "tried; a wider range may have a better one"
            )
    return lines


def _at_edge(config: TuneConfig, lr: float) -> bool:
    """Whether a learning rate is in the first or last twentieth of the range, logarithmically."""
    if config.lr_low == config.lr_high:
        return False
    margin = (config.lr_high / config.lr_low) ** 0.05
    return not config.lr_low * margin <= lr <= config.lr_high / margin


def closing_lines(result: Tuning) -> list[str]:
    """What went wrong, what it took, and where things are."""
    plan, spent = result.plan, result.spent
    lines = warnings(result)
    if spent.training:
        lines.append(
            f"The trials took {result.seconds:.3g} s; of the workers' time {spent.training:.3g} s "
            f"went into training, {spent.studying:.2g} s into Optuna and {spent.logging:.2g} s "
            "into MLflow."
        )
    registered = ", ".join(f"{cell} is version {v}" for cell, v in result.versions.items())
    if registered:
        lines.append(f"In the registry as {plan.config.register}: {registered}.")
    lines.append(
        f"Study {plan.study} is kept in {studies.shown(plan.storage)}: the same command goes on "
        "there, with more trials if you like."
    )
    return [*lines, *(f"{what}: {address}" for what, address in links(result).items())]


def _log_table(result: Tuning) -> None:
    """All numbers."""
    run, rows, failed = result.run, result.rows, result.failures
    with noted(failed, "tuning.csv"):
        run.log_text("tuning.csv", trials.as_csv(rows))
    with noted(failed, "tuning.json"):
        run.log_json("tuning", trials.as_json(rows, result.trials, result.sentences))
    with noted(failed, "the course of the trials"):
        names = track.key_names(str(row.cell) for row in rows)
        run.log_history(
            {
                f"best_by_trial/{names[str(cell)]}": _best_so_far(found)
                for cell, found in result.trials.items()
            }
        )


def _describe(result: Tuning) -> None:
    """In words, with what is not as one would expect."""
    with noted(result.failures, "the description"):
        links = " · ".join(f"[{text}]({address})" for text, address in _relative(result).items())
        paragraphs = [*result.sentences, result.plan.summary, *warnings(result)]
        result.run.describe("\n\n".join(paragraphs), links)


def _title(plan: Plan) -> str:
    return f"{plan.title}, tuned"


def _log_pictures(result: Tuning) -> dict[str, bytes]:
    pairs = {row.cell: (row.untuned, row.tested) for row in result.rows}
    title, draw = _title(result.plan), functools.partial
    drawn = {
        "rates_and_accuracies": draw(tuning_figures.rates_and_accuracies, result.trials, title),
        "tuned_and_untuned": draw(tuning_figures.tuned_and_untuned, pairs, title),
    }
    return failures.log_figures(result.run, drawn, result.failures)


def _log_report(result: Tuning, pictures: Mapping[str, bytes]) -> None:
    plan, run = result.plan, result.run
    config = plan.config
    sections = [
        webpage.Section(
            "Tuned and untuned",
            [
                *webpage.pictured(
                    pictures.get("tuned_and_untuned"),
                    "For each scheme the mean test accuracy with its 95 % interval, at the setting "
                    "that none was chosen for and at its own best.",
                ),
                _accuracy_table(result),
            ],
        ),
        webpage.Section(
            "Learning rates",
            [
                *webpage.pictured(
                    pictures.get("rates_and_accuracies"),
                    "The best validation accuracy of every trial over its learning rate, and for "
                    "each scheme the range of rates that came within one point of its best.",
                ),
                _trials_table(result),
            ],
        ),
        *webpage.colophon(
            configuration=config.as_text() | {"resolved.study": plan.study},
            environment=environment.shown(plan.device),
            command=config.command("tune", ("inits",), run.launcher),
            links=list(links(result).items()),
        ),
    ]
    page = webpage.page(
        title=_title(plan),
        lead=result.sentences,
        sections=sections,
        warnings=[*warnings(result), *failures.lines(result.failures)],
    )
    run.log_text("report.html", page)


def _relative(result: Tuning) -> dict[str, str]:
    """Links of the description."""
    run = result.run
    return {"charts of this run": mlflow_page.run_address(run.experiment_id, run.id, charts=True)}


def _accuracy_table(result: Tuning) -> webpage.Table:
    names = ("lr", "gamma", "validation", "test", "95 % interval", "untuned", "95 % interval")
    rows = [
        [
            row.cell.init,
            trials.rate(row.lr),
            trials.rate(row.gamma),
            percent(row.accuracy),
            percent(row.tested.mean),
            interval(row.tested.low, row.tested.high),
            percent(row.untuned.mean),
            interval(row.untuned.low, row.untuned.high),
        ]
        for row in result.rows
    ]
    config = result.plan.config
    return webpage.Table(
        "Each scheme at its best setting, accuracies in percent",
        [webpage.Column("scheme"), *(webpage.Column(name, number=True) for name in names)],
        rows,
        f"Chosen by {result.plan.validation:,} validation images, then trained on all images under "
        f"{seeds_of(config.seeds)} that no trial had, and tested once; untuned: "
        f"{result.plan.untuned}. {NONE} where there is nothing to tell.",
    )


def _trials_table(result: Tuning) -> webpage.Table:
    names = ("within a point, lr", *OUTCOMES)
    rows = [
        [
            row.cell.init,
            trials.tolerated(row.tolerance),
            *(str(row.counts[outcome]) for outcome in OUTCOMES),
        ]
        for row in result.rows
    ]
    return webpage.Table(
        "What became of the trials",
        [webpage.Column("scheme"), *(webpage.Column(name, number=True) for name in names)],
        rows,
        "Within a point: from the lowest to the highest learning rate of the finished trials that "
        "came within one point of the best; the true range may be wider.",
    )

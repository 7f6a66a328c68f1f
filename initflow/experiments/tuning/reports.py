"""What a tuning leaves to be read: tables, figures, descriptions and the report page."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from initflow.core import environment
from initflow.core.configurations import TuneConfig
from initflow.errors import OutageError
from initflow.experiments import failures
from initflow.experiments.failures import Failures, noted
from initflow.experiments.populations import seeds_of
from initflow.experiments.tuning import storages
from initflow.experiments.tuning.batches import Spent
from initflow.experiments.tuning.plan import Arm, Plan
from initflow.reporting import trials, tuning_figures, webpage
from initflow.reporting.formats import NONE, interval, percent
from initflow.reporting.seed_statistics import Cell
from initflow.reporting.trials import OUTCOMES, Trial, Tuned
from initflow.tracking import mlflow_page, runs, ui


@dataclass(frozen=True)
class Tuning:
    """What came of the studies: a row for each scheme, in words too; ``trials`` are all of them.

    ``seconds`` is how long the trials of this time took, and ``spent`` what that was spent on by
    all workers together; ``failed`` says of networks to be tested why they were not, ``failures``
    of figures and the like why they could not be made. ``versions`` are the registered models, and
    ``unregistered`` says why there are none.
    """

    plan: Plan
    run: runs.Run
    rows: Sequence[Tuned]
    trials: Mapping[Cell, Sequence[Trial]]
    sentences: Sequence[str]
    seconds: float
    spent: Spent
    failed: Mapping[str, str]
    versions: Mapping[Cell, str]
    unregistered: str
    failures: Failures


def below(arm: Arm) -> list[runs.Found]:
    """The runs below its own; none where MLflow does not answer: the next start sees to them."""
    try:
        return arm.run.found({runs.PARENT: arm.run.id})
    except OutageError:
        return []


def log_arm(arm: Arm, row: Tuned, found: Sequence[Trial]) -> None:
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
    there, links_to = below(arm), []
    for text, part in (("its trials side by side", "trial"), ("its tests", "tuned")):
        ids = [r.id for r in there if r.tags["initflow.tuning"] == part and not runs.is_orphan(r)]
        if 1 < len(ids) <= mlflow_page.LINKED:
            address = mlflow_page.comparison_address(arm.run.experiment_id, ids)
            links_to.append(f"[{text}]({address})")
    best = f"lr {row.best.lr:.4g} and gamma {row.best.gamma:.4g}" if row.best else "none finished"
    counts = ", ".join(f"{n} {outcome}" for outcome, n in row.counts.items() if n)
    arm.run.describe(
        f"The trials of {arm.cell}: {counts}. The best setting: {best}.", " · ".join(links_to)
    )


def log_figures(arm: Arm, failed: Failures) -> None:
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
    run, server = result.run, ui.server()
    page = mlflow_page.run_address(run.experiment_id, run.id)
    charts = mlflow_page.run_address(run.experiment_id, run.id, charts=True)
    found = {"The run of this tuning": page, "Its charts": charts}
    return {
        what: runs.with_ids(mlflow_page.absolute(server, address))
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
        f"Study {plan.study} is kept in {storages.shown(plan.storage)}: the same command goes on "
        "there, with more trials if you like."
    )
    return [*lines, *(f"{what}: {address}" for what, address in links(result).items())]


def log_table(result: Tuning) -> None:
    """All numbers."""
    run, rows, failed = result.run, result.rows, result.failures
    with noted(failed, "tuning.csv"):
        run.log_text("tuning.csv", trials.as_csv(rows))
    with noted(failed, "tuning.json"):
        run.log_json("tuning", trials.as_json(rows, result.trials, result.sentences))
    with noted(failed, "the course of the trials"):
        names = runs.key_names(str(row.cell) for row in rows)
        run.log_history(
            {
                f"best_by_trial/{names[str(cell)]}": _best_so_far(found)
                for cell, found in result.trials.items()
            }
        )


def describe(result: Tuning) -> None:
    """In words, with what is not as one would expect."""
    with noted(result.failures, "the description"):
        links = " · ".join(f"[{text}]({address})" for text, address in _relative(result).items())
        paragraphs = [*result.sentences, result.plan.summary, *warnings(result)]
        result.run.describe("\n\n".join(paragraphs), links)


def _title(plan: Plan) -> str:
    return f"{plan.title}, tuned"


def log_pictures(result: Tuning) -> dict[str, bytes]:
    pairs = {row.cell: (row.untuned, row.tested) for row in result.rows}
    title, draw = _title(result.plan), functools.partial
    drawn = {
        "rates_and_accuracies": draw(tuning_figures.rates_and_accuracies, result.trials, title),
        "tuned_and_untuned": draw(tuning_figures.tuned_and_untuned, pairs, title),
    }
    return failures.log_figures(result.run, drawn, result.failures)


def log_report(result: Tuning, pictures: Mapping[str, bytes]) -> None:
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

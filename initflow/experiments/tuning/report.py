"""What came of a tuning: its warnings, links, figures, tables and report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from initflow.core.configurations import TuneConfig
from initflow.experiments.failures import Failures, noted
from initflow.experiments.results import ReportedResult
from initflow.experiments.tuning import storages
from initflow.experiments.tuning.batches import Spent
from initflow.experiments.tuning.plan import Plan
from initflow.reporting import trials, tuning_figures, webpage
from initflow.reporting.formats import NONE, counted, interval, percent, rounded
from initflow.reporting.results import Drawings
from initflow.reporting.seed_statistics import Cell
from initflow.reporting.trials import OUTCOMES, Trial, Tuned
from initflow.tracking import mlflow_page, runs


@dataclass(kw_only=True, repr=False)
class Tuning(ReportedResult):
    """What came of :func:`initflow.tune`.

    - ``rows``: of each scheme its best trial, and the test accuracy (a fraction, over fresh seeds,
      with its 95 % interval) of networks with that setting, ``tested``, and with the one that none
      was chosen for, ``untuned``.
    - ``trials``: all that were tried, by scheme: ``lr``, ``gamma``, ``outcome``, and the best
      ``accuracy`` on validation images, a fraction.
    - ``seconds``: what the trials of this call took, and ``spent`` the seconds of all workers
      together, on training, Optuna and MLflow.
    - ``failed`` says of networks to be tested why they were not, ``failures`` of figures and the
      like why they could not be made.
    - ``versions``: the registered models; ``unregistered`` says why there are none.
    """

    command: ClassVar = "tune"
    always: ClassVar = ("inits",)
    plan: Plan
    run: runs.Run
    rows: Sequence[Tuned]
    trials: Mapping[Cell, Sequence[Trial]]
    sentences: Sequence[str]
    seconds: float
    spent: Spent
    by: str
    failed: dict[str, str]
    failures: Failures
    versions: Mapping[Cell, str] = field(default_factory=dict)
    unregistered: str = ""

    @property
    def config(self) -> TuneConfig:  # type: ignore[override]
        return self.plan.config

    @property
    def device(self) -> str:  # type: ignore[override]
        return self.plan.device

    @property
    def remark(self) -> str:  # type: ignore[override]
        return self.plan.remark

    @property
    def title(self) -> str:
        return f"{self.plan.title}, tuned"

    @property
    def conclusions(self) -> Sequence[str]:
        return self.sentences

    def configuration(self) -> dict[str, str]:
        return self.config.as_text() | {"resolved.study": self.plan.study}

    def numbers(self) -> Iterable[Mapping[str, object]]:
        """A row for each trial, with its best accuracy on the validation images."""
        for cell, found in self.trials.items():
            yield from ({"init": cell.init, **vars(trial)} for trial in found)

    def addresses(self) -> dict[str, str]:
        where, run = self.run.experiment_id, self.run.id
        return {
            "The run of this tuning": mlflow_page.run_address(where, run),
            "Its charts": mlflow_page.run_address(where, run, charts=True),
        }

    def warnings(self) -> list[str]:
        lines = super().warnings()
        if self.unregistered:
            lines.append(f"no model was registered ({self.unregistered}); the same command does it")
        for row in self.rows:
            if row.counts["failed"]:
                lines.append(
                    f"{row.cell}: {row.counts['failed']} trials failed; their runs say why"
                )
            if row.best is None:
                lines.append(f"{row.cell}: no trial finished, so there is nothing to test")
            elif _at_edge(self.config, row.best.lr):
                lines.append(
                    f"{row.cell}: its best lr, {rounded(row.best.lr)}, is at the edge of what "
                    "was tried; a wider range may have a better one"
                )
        return lines

    def took(self) -> list[str]:
        plan, spent, lines = self.plan, self.spent, []
        if spent.training:
            lines.append(
                f"The trials took {self.seconds:.3g} s; of the workers' time "
                f"{spent.training:.3g} s went into training, {spent.studying:.2g} s into Optuna "
                f"and {spent.logging:.2g} s into MLflow."
            )
            lines.append(self.by)
        registered = ", ".join(f"{cell} is version {v}" for cell, v in self.versions.items())
        if registered:
            lines.append(f"In the registry as {self.config.register}: {registered}.")
        lines.append(
            f"Study {plan.study} is kept in {storages.shown(plan.storage)}: the same command goes "
            "on there, with more trials if you like."
        )
        return lines

    def drawings(self) -> Drawings:
        pairs = {row.cell: (row.untuned, row.tested) for row in self.rows}
        draw, title = partial, self.title
        return {
            "rates_and_accuracies": draw(tuning_figures.rates_and_accuracies, self.trials, title),
            "tuned_and_untuned": draw(tuning_figures.tuned_and_untuned, pairs, title),
        }

    def sections(self, pictures: Mapping[str, bytes]) -> list[webpage.Section]:
        accuracies = webpage.pictured(
            pictures.get("tuned_and_untuned"),
            "For each scheme the mean test accuracy with its 95 % interval, at the setting that "
            "none was chosen for and at its own best.",
        )
        rates = webpage.pictured(
            pictures.get("rates_and_accuracies"),
            "The best validation accuracy of every trial over its learning rate, and for each "
            "scheme the range of rates that came within one point of its best.",
        )
        return [
            webpage.Section("Tuned and untuned", [*accuracies, _accuracy_table(self)]),
            webpage.Section("Learning rates", [*rates, _trials_table(self)]),
        ]

    def log_table(self) -> None:
        """All numbers."""
        with noted(self.failures, "tuning.csv"):
            self.run.log_text("tuning.csv", trials.as_csv(self.rows))
        with noted(self.failures, "tuning.json"):
            self.run.log_json("tuning", trials.as_json(self.rows, self.trials, self.sentences))
        with noted(self.failures, "the course of the trials"):
            names = runs.key_names(str(row.cell) for row in self.rows)
            courses = {
                f"best_by_trial/{names[str(cell)]}": trials.best_so_far(of_scheme)
                for cell, of_scheme in self.trials.items()
            }
            self.run.log_history(courses)

    def log_description(self) -> None:
        """In words, with what is not as one would expect."""
        with noted(self.failures, "the description"):
            link = f"[charts of this run]({self.addresses()['Its charts']})"
            paragraphs = [*self.sentences, self.plan.summary, *self.warnings()]
            self.run.describe("\n\n".join(paragraphs), link)


def _at_edge(config: TuneConfig, lr: float) -> bool:
    """Whether a learning rate is in the first or last twentieth of the range, logarithmically."""
    if config.lr_low == config.lr_high:
        return False
    margin = (config.lr_high / config.lr_low) ** 0.05
    return not config.lr_low * margin <= lr <= config.lr_high / margin


def _accuracy_table(result: Tuning) -> webpage.Table:
    searched = ("lr", "gamma") if trials.is_gamma_searched(result.rows) else ("lr",)
    names = (*searched, "validation", "test", "95 % interval", "untuned", "95 % interval")
    rows = [
        [
            row.cell.init,
            *(rounded(getattr(row, name)) for name in searched),
            percent(row.accuracy),
            percent(row.tested.mean),
            interval(row.tested.low, row.tested.high),
            percent(row.untuned.mean),
            interval(row.untuned.low, row.untuned.high),
        ]
        for row in result.rows
    ]
    return webpage.Table(
        "Each scheme at its best setting, accuracies in percent",
        webpage.columns("scheme", numbers=names),
        rows,
        f"Chosen by {result.plan.validation:,} validation images, then trained on all images under "
        f"{counted(result.config.seeds, 'seed')} that no trial had, and tested once; untuned: "
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
        webpage.columns("scheme", numbers=names),
        rows,
        "Within a point: from the lowest to the highest learning rate of the finished trials that "
        "came within one point of the best; the true range may be wider.",
    )

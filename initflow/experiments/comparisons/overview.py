"""What the run above those of many networks carries: means, a saved view, where to look."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from initflow.core.configurations import TrainConfig
from initflow.experiments.failures import noted
from initflow.experiments.populations.stacking import BY_LAYER, Population, by_layer
from initflow.experiments.results import ReportedResult
from initflow.reporting.formats import counted
from initflow.reporting.seed_statistics import common_curves
from initflow.tracking import mlflow_page, runs

if TYPE_CHECKING:  # which takes a second, and is not always asked for
    import pandas as pd

_BY_LAYER = tuple(f"by_layer/{quantity}" for quantity in BY_LAYER)
SECTIONS = (
    mlflow_page.ChartSection(
        "accuracy", (mlflow_page.ACCURACY, "loss/test"), logarithmic={"loss/test"}
    ),
    mlflow_page.ChartSection("by_layer", _BY_LAYER, logarithmic=_BY_LAYER),
)  # of the saved view
# The parent's metrics by layer: the mean over the seeds of what is measured.
MEAN_BY_LAYER = {"signal_by_layer": BY_LAYER[0], "relative_gradient_by_layer": BY_LAYER[1]}


def _seconds(time: float) -> str:
    return f"{time:.0f} s" if time >= 100 else f"{time:.2g} s"


@dataclass(kw_only=True, repr=False)
class PopulationResult(ReportedResult, Population):
    """What came of the networks of a population; ``sentences`` is that in words."""

    sentences: Sequence[str]

    @property
    def conclusions(self) -> Sequence[str]:
        return self.sentences

    @property
    def ids(self) -> list[str]:
        """Those of the networks' runs."""
        return [member.run_id for member in self.members]

    def runs_to_pandas(self) -> pd.DataFrame:
        """A row for each network: its ``run_id``, scheme, activation, seed and last metrics.

        Also the settings in which they differ, and ``diverged_at``, a step, of those that did.
        """
        import pandas as pd  # noqa: PLC0415 - takes half a second

        configs = [member.config for member in self.members]
        varied = [
            name
            for name in (one.name for one in fields(TrainConfig))
            if name not in ("init", "activation", "seed")
            and len({repr(getattr(config, name)) for config in configs}) > 1
        ]
        return pd.DataFrame(
            {
                "run_id": member.run_id,
                **member.cell._asdict(),
                "seed": member.config.seed,
                **{name: getattr(member.config, name) for name in varied},
                **dict(sorted(member.last.items())),
                "diverged_at": member.outcome.diverged_at,
            }
            for member in self.members
        )

    def addresses(self) -> dict[str, str]:
        where, run = self.run.experiment_id, self.run.id
        found = {
            "Mean curves with bands": mlflow_page.runs_address(where, run),
            "Charts of this comparison": mlflow_page.run_address(where, run, charts=True),
        }
        if 1 < len(self.ids) <= mlflow_page.LINKED:
            found["Run by run"] = mlflow_page.comparison_address(where, self.ids)
        return found

    def warnings(self) -> list[str]:
        lines = super().warnings()
        if not all(member.is_exact for member in self.members):
            lines.append(
                "Here networks that train together are not bit-identical to each one alone: the "
                "kernels of this device or machine round differently in a stack."
            )
        return lines

    def took(self) -> list[str]:
        n, lines = len(self.members) - self.taken_over, []
        if n:
            each = f"{self.training_s / n:.2g} s each"
            logging = f"logging them took {_seconds(self.logging_s)}"
            trained = f"Trained {n} networks in {_seconds(self.training_s)}"
            lines.append(f"{trained}, {each}; {logging}. {self.by}")
        if self.taken_over:
            lines.append(f"{counted(self.taken_over, 'network')} came from an interrupted command.")
        return lines

    def closing_lines(self) -> list[str]:
        description = "The description of its run links these, and all networks one by one."
        return [*super().closing_lines(), description]

    def log_overview(self, name: str, paragraphs: Sequence[str]) -> None:
        """The means, the description, and the view of MLflow's page called ``name``."""
        with noted(self.failures, "the mean curves"):
            self._log_means()
        with noted(self.failures, "the description"):
            # The links first: MLflow's page folds what is further down.
            links = mlflow_page.links(self.run.experiment_id, self.run.id, self.ids)
            limits = mlflow_page.limits(mlflow_page.group_names(self.cells), len(self.members))
            told = [*self.sentences, *paragraphs, limits, *self.warnings()]
            text = "\n\n".join(filter(None, told))
            self.run.describe(text, links)
        with noted(self.failures, "the view of MLflow's page"):
            self._log_view(name)

    def _log_means(self) -> None:
        """The parent's own metrics: over iterations, and by layer instead of step.

        MLflow's page draws a chart of each, and would show nothing of a parent without any.
        """
        outcomes, signals = self.outcomes(), self.signals()
        names = runs.key_names(map(str, outcomes))
        history: dict[str, list[tuple[int, float]]] = {}
        for cell, of_seeds in outcomes.items():
            steps, curves = common_curves(of_seeds)
            means = map(statistics.fmean, zip(*curves, strict=True))
            history[f"accuracy_by_iteration/{names[str(cell)]}"] = list(
                zip(steps, means, strict=True)
            )
        for section, quantity in MEAN_BY_LAYER.items():
            for cell, measured in signals.items():
                layers = zip(*(by_layer(one)[quantity] for one in measured), strict=True)
                history[f"{section}/{names[str(cell)]}"] = [
                    (layer, statistics.fmean(value for value in values if value is not None))
                    for layer, values in enumerate(layers, start=1)
                    if None not in values
                ]
        self.run.log_history(history)

    def _log_view(self, name: str) -> None:
        """The saved view of MLflow's page in which the networks' runs are compared."""
        groups = mlflow_page.group_names(self.cells)
        key, value = mlflow_page.saved_view(
            parent_id=self.run.id,
            name=name,
            group_tag=mlflow_page.group_tag(groups),
            groups=groups,
            sections=SECTIONS,
            metrics=self.metrics,
            runs=len(self.members),
            now_ms=runs.now_ms(),
        )
        self.run.set_experiment_tag(key, value)

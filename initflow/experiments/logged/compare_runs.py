"""Anybody's runs compared over a parameter: intervals, sentences and figures, as of `compare`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from initflow.core.progress import quiet_libraries
from initflow.errors import SettingError, naming_extras
from initflow.experiments.logged import remarks
from initflow.experiments.logged.groups import Groups, grouped
from initflow.experiments.logged.selection import Selection, chosen
from initflow.reporting import comparison_figures, seed_statistics
from initflow.reporting.formats import counted
from initflow.reporting.results import Drawings, Result
from initflow.reporting.seed_statistics import Cell, Difference, Measure, Outcomes, Row
from initflow.reporting.sentences import comparison_sentences
from initflow.tracking import connection

if TYPE_CHECKING:  # which takes a second, and is not always asked for
    import pandas as pd

LOW = ("loss", "error", "perplexity", "mae", "mse", "rmse", "nll")  # of these less is better


@dataclass(kw_only=True, repr=False)
class RunComparison(Result):
    """What came of runs in groups: ``rows`` and ``differences`` of a metric's last values.

    Values are as they were logged. Groups are those of the parameter ``by``, in a row as ``init``,
    and ``within`` those of another as ``activation``. ``measure`` says how they were compared.
    """

    by: str
    within: str | None
    groups: Groups
    measure: Measure
    rows: Sequence[Row]
    differences: Sequence[Difference]
    sentences: Sequence[str]
    remarks: Sequence[str]

    @property
    def title(self) -> str:
        n, within = len(self.groups.members), f" within {self.within}" if self.within else ""
        return f"{self.measure.name} of {counted(n, 'run')} by {self.by}{within}"

    @property
    def conclusions(self) -> Sequence[str]:
        return self.sentences

    def problems(self) -> list[str]:
        """Runs that are left out, other parameters that differ, groups without any spread."""
        return list(self.remarks)

    def outcomes(self) -> Outcomes:
        """What each run came to, by group."""
        return self.groups.outcomes()

    def numbers(self) -> Iterable[Mapping[str, object]]:
        """A row for each ``group``; ``low`` to ``high`` is the 95 % interval of the ``mean``."""
        for row in self.rows:
            yield {
                **self._group(row.cell),
                **{name: getattr(row, name) for name in ("n", "mean", "std", "low", "high")},
                "diverged": row.diverged,
            }

    def _group(self, cell: Cell) -> dict[str, str]:
        within = {"within": cell.activation} if self.within else {}
        return {"group": cell.init, **within}

    def runs_to_pandas(self) -> pd.DataFrame:
        """A row for each run: its ``run_id``, ``group`` and ``seed``, and its last ``value``.

        ``diverged_at``, a step, is of those that did.
        """
        import pandas as pd  # noqa: PLC0415 - takes half a second

        return pd.DataFrame(
            {
                "run_id": member.run.id,
                **self._group(member.cell),
                "seed": member.seed,
                "value": member.outcome.accuracy,
                "diverged_at": member.outcome.diverged_at,
            }
            for member in self.groups.members
        )

    def drawings(self) -> Drawings:
        outcomes, title, measure = self.outcomes(), self.title, self.measure
        return {
            "values": partial(
                comparison_figures.comparison_accuracies, outcomes, self.rows, title, measure
            ),
            "curves": partial(comparison_figures.comparison_curves, outcomes, title, measure),
        }


def compare_runs(
    selection: Selection | None = None,
    *,
    by: str,
    metric: str = "accuracy/test",
    within: str | None = None,
    experiment: str | None = None,
    filter: str = "",  # noqa: A002 - as in a search of MLflow's
    seed: str = "seed",
    lower_is_better: bool | None = None,
    tracking_uri: str | None = None,
) -> RunComparison:
    """Compare runs in MLflow, whoever logged them, over a parameter: nothing is trained.

    ``selection``: ids of runs, results, or runs of MLflow's; one alone stands for the runs below
    it. Or ``experiment``, a name, with ``filter`` in the words of ``mlflow.search_runs``.
    Runs are grouped ``by`` a parameter or a tag, and, if it is given, ``within`` another.

    What is compared is the last value of ``metric``, of runs that finished. A run diverged whose
    last value is no finite number. Groups with the same seeds, by the parameter or tag ``seed``,
    are compared seed by seed (paired t), others as independent runs (Welch). Less is better if
    ``lower_is_better``; by default, None, of what is called a loss or an error. ``tracking_uri``
    is where the runs are, by default where MLflow has them.

    A run, parameter or metric that there is none of is a :class:`SettingError`, before anything
    else.
    """
    for what, name in (("by", by), ("metric", metric), ("seed", seed)):
        if not (isinstance(name, str) and name):
            raise SettingError(f"{what} must be a name, not {name!r}")
    if within == by:
        raise SettingError(f"within must be another parameter than by, not '{within}'")
    with naming_extras("initflow.compare_runs"), quiet_libraries(), connection.at(tracking_uri):
        found = chosen(selection, experiment, filter)
        groups = grouped(found, metric, by, within, seed)
        outcomes = groups.outcomes()
        measure = _measure(metric, groups, lower_is_better)
        differences = seed_statistics.differences(outcomes, measure)
        return RunComparison(
            by=by,
            within=within,
            groups=groups,
            measure=measure,
            rows=seed_statistics.rows(outcomes),
            differences=differences,
            sentences=comparison_sentences(outcomes, measure=measure),
            remarks=remarks.sentences(groups, differences, (by, within, seed)),
        )


def _measure(metric: str, groups: Groups, lower_is_better: bool | None) -> Measure:
    """A share is what is called an accuracy, where all values are from 0 to 1."""
    name = metric.lower()
    if lower_is_better is None:
        lower_is_better = any(word in name for word in LOW)
    values = [value for one in groups.members for _, value in one.outcome.curve]
    is_share = "acc" in name and all(0 <= value <= 1 for value in values)
    return Measure(metric, is_share, lower_is_better, groups.is_paired, "step")

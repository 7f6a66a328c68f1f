"""One run of MLflow's, read back: what it was given, what was measured, and how that went."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

from initflow.core.configurations import MLP
from initflow.core.progress import quiet_libraries
from initflow.diagnostics import reading
from initflow.diagnostics.signals import is_of_a_layer, of_metrics
from initflow.errors import OutageError, TrackingError, first_line, naming_extras, unknown
from initflow.experiments.logged.selection import existing, id_of
from initflow.reporting import figures
from initflow.reporting.formats import counted
from initflow.reporting.results import Drawings, Result, by_step, comes_later
from initflow.tracking import connection, runs
from initflow.tracking.runs import Found

if TYPE_CHECKING:  # which takes a second, and is not always asked for
    import pandas as pd

    from initflow.reporting.drawing import Figure

SIGNALS = "signals.json"
LARGEST = 1 << 26  # bytes of it


@dataclass(kw_only=True, repr=False)
class LoggedRun(Result):
    """A run as it is in MLflow.

    ``params`` and ``tags`` are text, ``metrics`` the last value of each, all by name. ``points``
    are the (step, value) pairs of each metric. ``signals`` has a row for each step, layer and
    quantity that initflow measured, by itself or by ``watch``, and what theory predicts of a
    network of its own; nothing of other runs.
    """

    run_id: str
    status: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    points: Mapping[str, Sequence[tuple[int, float]]]
    table: reading.Table
    unread: Sequence[str] = ()

    @property
    def title(self) -> str:
        return f"{self.tags.get('mlflow.runName', 'run')}, {self.run_id}"

    @property
    def conclusions(self) -> Sequence[str]:
        """How it ended, and how much is there."""
        metrics, params = counted(len(self.metrics), "metric"), len(self.params)
        return [f"It is {self.status}, with {metrics} and {counted(params, 'parameter')}."]

    def problems(self) -> list[str]:
        return list(self.unread)

    @cached_property
    def history(self) -> dict[str, pd.DataFrame]:
        """Of each metric a table with a row for each value: its ``step`` and the ``value``."""
        import pandas as pd  # noqa: PLC0415 - takes half a second

        return {
            key: pd.DataFrame(points, columns=["step", "value"])
            for key, points in self.points.items()
        }

    def numbers(self) -> Iterable[Mapping[str, object]]:
        """A row for each step at which something was logged, with its metrics by key."""
        return by_step(self.points)

    @property
    def signals(self) -> Sequence[Mapping[str, object]]:
        return self.table.rows()

    def signals_to_pandas(self) -> pd.DataFrame:
        """The ``signals``; ``low`` to ``high`` is the band of ``measured`` before training."""
        import pandas as pd  # noqa: PLC0415 - takes half a second

        return pd.DataFrame(self.signals)

    def drawings(self) -> Drawings:
        """Its metrics, accuracies and losses first, and its signals as a training draws them.

        A metric with a single value is no curve, and one of a layer is among the signals.
        """
        several = [name for name, points in self.points.items() if len(points) > 1]
        names = [name for name in several or self.points if not is_of_a_layer(name)]
        drawn: dict[str, Callable[[], Figure]] = {}
        if names:
            drawn["metrics"] = partial(self.figure_of, *sorted(names, key=comes_later))
        history = self.table.history
        if self.table.predicted:
            drawn |= figures.beside_theory(
                self.params.get("init", "measured"),
                history[0][1],
                self.table.predicted,
                self.table.by_time,
                self.title,
                is_mlp=self.params.get("model", MLP) == MLP,
            )
        if len(history) > 1 or (history and not self.table.predicted):
            drawn["signals"] = partial(figures.signals_over_training, history, self.title)
        return drawn

    def figure_of(self, *metrics: str) -> Figure:
        """These metrics over their steps; a :class:`SettingError` of one that is not there."""
        for name in metrics:
            if name not in self.points:
                raise unknown("metric", name, self.points)
        return figures.metrics_over_steps({name: self.points[name] for name in metrics}, self.title)


def read(run_id: str | object, *, tracking_uri: str | None = None) -> LoggedRun:
    """Read any run of MLflow back: parameters, tags, metrics and their histories, signals.

    ``run_id`` is an id, a result, or a run of MLflow's; ``tracking_uri`` is where it is, by default
    where MLflow has its runs. A run that there is none of is a :class:`SettingError`.
    """
    with naming_extras("initflow.read"), quiet_libraries(), connection.at(tracking_uri):
        found = existing(id_of(run_id))
        points = runs.read_history(found.id, sorted(found.metrics))
        table, unread = _table(found)
        if not table:
            table = reading.Table(of_metrics(points))
        return LoggedRun(
            run_id=found.id,
            status=found.status,
            params=found.params,
            tags=found.tags,
            metrics=found.metrics,
            points=points,
            table=table,
            unread=unread,
        )


def _table(found: Found) -> tuple[reading.Table | None, list[str]]:
    """That of the signals, None where it has none; and why it cannot be read."""
    try:
        content = runs.read_file(found, SIGNALS, LARGEST)
        return (reading.table(content) if content else None), []
    except OutageError:
        raise
    except (TrackingError, ValueError) as error:
        return None, [f"{SIGNALS} could not be read: {first_line(error)}"]

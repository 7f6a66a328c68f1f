"""The run of a command, opened with what every command's run carries: settings, data, source."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import initflow
from initflow.core import repository
from initflow.core.settings import Settings
from initflow.experiments.replay.provenance import UNCOMMITTED
from initflow.tracking import runs
from initflow.training.splits import Splits


@contextlib.contextmanager
def opened(
    config: Settings,
    splits: Splits | None,
    resolved: Mapping[str, str],
    *,
    name: str,
    summary: str,
    experiment: str | None,
    tags: Mapping[str, object] | None = None,
) -> Iterator[runs.Run]:
    """A run in ``experiment``, closed at the end as :func:`initflow.tracking.runs.start` does.

    ``summary`` is a sentence on the settings, and ``tags`` are its further ones. ``splits`` is None
    where no data set is used.
    """
    with runs.start(
        name=name,
        description=splits.described(summary) if splits else summary,
        params={**config.as_text(), **resolved},
        tags={
            "initflow.version": initflow.__version__,
            **(splits.tags if splits else {}),
            **(tags or {}),
        },
        experiment=experiment,
    ) as run:
        log_settings(run, config, splits, resolved)
        diff = repository.current().diff
        if diff:
            run.log_text(UNCOMMITTED, diff)
        del splits  # a tuning's tests have others, and memory for one set is enough
        yield run


def log_settings(
    run: runs.Run, config: Settings, splits: Splits | None, resolved: Mapping[str, str]
) -> None:
    """The settings of a run, and the data."""
    # Params may hold MLflow's own spelling of what it was given; this is ours.
    run.log_json("config", {**config.as_text(), **resolved})
    if splits:
        run.log_data(splits)

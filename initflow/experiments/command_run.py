"""The run of a command: opened with its settings and data, closed with its report."""

from __future__ import annotations

from collections.abc import Mapping

from initflow.core import repository
from initflow.core.settings import Settings
from initflow.experiments.replay import provenance
from initflow.tracking import runs
from initflow.training.splits import Splits


def resolved_params(device: str, threads: int) -> dict[str, str]:
    """What ``auto`` became."""
    return {"resolved.device": device, "resolved.threads": str(threads)}


def log_setting(
    run: runs.Run, settings: Settings, splits: Splits, resolved: Mapping[str, str]
) -> None:
    """The settings of a run, and the data."""
    # Params may hold MLflow's own spelling of what it was given; this is ours.
    run.log_json("config", {**settings.as_text(), **resolved})
    run.log_data(splits)


def log_uncommitted(run: runs.Run) -> None:
    """What is not committed of the code around a command; nothing where all is."""
    diff = repository.current().diff
    if diff:
        run.log_text(provenance.UNCOMMITTED, diff)

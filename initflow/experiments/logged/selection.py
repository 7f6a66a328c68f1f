"""Which runs of MLflow's a user means: by ids, results, a run above them, or a search."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from initflow.errors import SettingError
from initflow.tracking import connection, runs
from initflow.tracking.runs import Found

Selection: TypeAlias = "str | object | Iterable[object]"


def chosen(selection: Selection | None, experiment: str | None, condition: str) -> list[Found]:
    """The runs of a ``selection``, or those of an ``experiment`` that meet a ``condition``.

    One run alone stands for those below it. A :class:`SettingError` where there are none.
    """
    if (selection is None) == (experiment is None):
        raise SettingError("selection or experiment must be given, one of both")
    if experiment is not None:
        return _of_experiment(experiment, condition)
    if condition:
        raise SettingError("filter must be given with an experiment, not with a selection")
    ids = _ids(selection)
    if isinstance(ids, str):
        above = existing(ids)
        below = runs.children(above)
        if not below:
            raise SettingError(f"selection must be a run with runs below it, not '{above.id}'")
        return below
    if not isinstance(ids, Iterable):
        raise SettingError(f"selection must be runs or their ids, not {selection!r}")
    several = dict.fromkeys(map(id_of, ids))
    if not several:
        raise SettingError("selection must have a run, but is empty")
    return list(map(existing, several))


def id_of(one: object) -> str:
    """That of an id, a result of this package, or a run of MLflow's."""
    its = _ids(one)
    if not isinstance(its, str):
        raise SettingError(f"a run must be an id, a result or a run of MLflow's, not {one!r}")
    return its


def _ids(selection: object) -> object:
    """What its ``run_id`` is, a column in a table of MLflow's; or else itself."""
    own = getattr(selection, "run_id", selection)
    return getattr(getattr(selection, "info", None), "run_id", own)


def existing(run_id: str) -> Found:
    """The run with this id; a :class:`SettingError` where there is none."""
    found = runs.read_run(run_id) if runs.ID.fullmatch(run_id) else None
    if found is None:
        raise SettingError(
            f"a run must be one in MLflow at {connection.shown()}, which has no '{run_id}'"
        )
    return found


def _of_experiment(name: str, condition: str) -> list[Found]:
    experiment = runs.experiment_id(name)
    if experiment is None:
        raise SettingError(
            f"experiment must be one in MLflow at {connection.shown()}, which has no '{name}'"
        )
    found = list(runs.searched([experiment], condition, order=runs.STARTED))
    if not found:
        which = f" that meets {condition}" if condition else ""
        raise SettingError(f"experiment must have runs, but '{name}' has none{which}")
    return found

"""Runs grouped by a parameter: what each came to, as the statistics of a comparison take it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from initflow.errors import SettingError, unknown
from initflow.experiments import network_run
from initflow.reporting.seed_statistics import Cell, Outcome, by_activation
from initflow.tracking import runs
from initflow.tracking.runs import Found

FINISHED = "FINISHED"
LARGEST = 1.7e308  # from here on MLflow's databases mean infinity
OWN = "initflow."  # before the names of this package's tags


@dataclass(frozen=True)
class Member:
    """A ``run`` that counts, with what it came to; ``seed`` is None where none is known."""

    run: Found
    cell: Cell
    seed: str | None
    outcome: Outcome


@dataclass(frozen=True)
class Groups:
    """The runs that count, and by reason the ids of those that do not.

    ``is_paired``: all groups have the same seeds, each once.
    """

    members: Sequence[Member]
    left_out: dict[str, list[str]]
    is_paired: bool

    def outcomes(self) -> dict[Cell, list[Outcome]]:
        """Of each group; those of numbers in their order, others as their runs were started."""
        found: dict[Cell, list[Outcome]] = {}
        for member in sorted(self.members, key=lambda member: _order(member.cell)):
            found.setdefault(member.cell, []).append(member.outcome)
        return found


def grouped(chosen: Sequence[Found], metric: str, by: str, within: str | None, seed: str) -> Groups:
    """The runs by what ``by`` is in each, and ``within``, if it is given, by that.

    A name is that of a parameter, a tag, or a tag of this package without what is before its dot.
    A :class:`SettingError` where no run has it, or the ``metric``.
    """
    for what, name in (("by", by), ("within", within)):
        if name is not None and all(value_of(run, name) is None for run in chosen):
            raise unknown(what, name, _names(chosen))
    left_out: dict[str, list[str]] = {}
    known = list[tuple[Found, Cell]]()
    for run in chosen:
        cell, why = _cell(run, by, within)
        if cell:
            known.append((run, cell))
        else:
            left_out.setdefault(why, []).append(run.id)
    seeds = {run.id: value_of(run, seed) for run, _ in known}
    counted = list[tuple[Found, Cell]]()
    for run, cell in known:
        why = _why_not(run, metric)
        if why:
            left_out.setdefault(why, []).append(run.id)
        else:
            counted.append((run, cell))
    if not counted:
        raise _nothing(chosen, metric, left_out)
    is_paired = _is_paired(known, counted, seeds)
    curves = runs.read_histories([run.id for run, _ in counted], metric)
    numbers = {text: at for at, text in enumerate(dict.fromkeys(seeds.values()))}
    members = []
    for at, (run, cell) in enumerate(counted):
        number = numbers[seeds[run.id]] if is_paired else at
        outcome = _outcome(run, metric, curves.get(run.id, []), number)
        members.append(Member(run, cell, seeds[run.id], outcome))
    return Groups(members, left_out, is_paired)


def value_of(run: Found, name: str) -> str | None:
    """What the run has under the ``name``."""
    for values, key in ((run.params, name), (run.tags, name), (run.tags, f"{OWN}{name}")):
        if key in values:
            return values[key]
    return None


def _names(chosen: Iterable[Found]) -> list[str]:
    """The parameters and tags that a run may be grouped by."""
    found = dict[str, None]()
    for run in chosen:
        found |= dict.fromkeys(sorted(run.params))
    for run in chosen:
        found |= dict.fromkeys(key for key in sorted(run.tags) if not key.startswith("mlflow."))
    return list(found)


def _cell(run: Found, by: str, within: str | None) -> tuple[Cell | None, str]:
    """Its group; or why it has none."""
    labels = []
    for name in (by, within):
        value = "" if name is None else value_of(run, name)
        if value is None:
            return None, f"no '{name}'"
        labels.append(label(name or "", value))
    return Cell(*labels), ""


def label(name: str, value: str) -> str:
    """``he``, but ``lr=0.1`` of a number, which tells nothing by itself; ``0.10`` is the same."""
    number = _number(value)
    if number is None:
        return value or f"{name}=''" if name else value
    return f"{name}={int(number) if number == int(number) and number < 1e15 else number}"


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _order(cell: Cell) -> tuple[float, ...]:
    """Of numbers themselves; all else is alike, and stays in its order."""
    return tuple(_number(part.rpartition("=")[2]) or 0.0 for part in reversed(cell))


def _why_not(run: Found, metric: str) -> str:
    """Why it does not count; nothing where it does."""
    if run.lifecycle != "active":
        return "deleted"
    if run.status != FINISHED:
        return run.status.lower()
    return "" if metric in run.metrics or network_run.DIVERGED_AT in run.tags else f"no '{metric}'"


def _nothing(chosen: Sequence[Found], metric: str, left_out: dict[str, list[str]]) -> SettingError:
    """The error where no run counts."""
    metrics = sorted({key for run in chosen for key in run.metrics})
    if metric not in metrics:
        return unknown("metric", metric, metrics)
    why = ", ".join(f"{reason}: {len(ids)}" for reason, ids in left_out.items())
    return SettingError(f"runs must have finished with '{metric}', of which none has ({why})")


def _is_paired(
    known: Sequence[tuple[Found, Cell]],
    counted: Sequence[tuple[Found, Cell]],
    seeds: dict[str, str | None],
) -> bool:
    """Whether groups that are compared have the same seeds, of which each finished once at most.

    Runs that did not finish count here: a seed that failed is still one of the plan.
    """
    if None in seeds.values():
        return False
    once = Counter((cell, seeds[run.id]) for run, cell in counted)
    if max(once.values()) > 1:
        return False
    planned: dict[Cell, set[str | None]] = {}
    for run, cell in known:
        planned.setdefault(cell, set()).add(seeds[run.id])
    return all(
        planned[cell] == planned[cells[0]]
        for cells in by_activation(planned).values()
        for cell in cells
    )


def _outcome(run: Found, metric: str, curve: Sequence[tuple[int, float]], seed: int) -> Outcome:
    """It ends with the run's last value, also where its history could not be read."""
    told = run.tags.get(network_run.DIVERGED_AT)
    finite = [(step, value) for step, value in curve if is_finite(value)]
    outcome = Outcome(seed, finite)
    if told is not None:
        return replace(outcome, diverged_at=_step(told))
    end = run.metrics[metric]
    if not is_finite(end):
        return replace(outcome, diverged_at=curve[-1][0] if curve else 0)
    if not finite or finite[-1][1] != end:
        finite.append((finite[-1][0] + 1 if finite else 0, end))
    return outcome


def is_finite(value: float) -> bool:
    return math.isfinite(value) and abs(value) < LARGEST


def _step(told: str) -> int:
    return int(told) if told.isdecimal() else 0

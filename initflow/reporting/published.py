"""Published tables: read from a file, and held against what several seeds give.

A table is a TOML file: ``title``, ``source`` (text), ``notes`` (a list of texts), ``settings``
(of every training, by name) and ``rows``, each with ``name``, ``init``, ``activation`` (but of a
model that has its own), ``model`` where not all have the one of the settings, and ``published``,
the test accuracies in percent by iteration, which may be left out.
"""

from __future__ import annotations

import math
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from initflow.core import paths
from initflow.core.configurations import (
    ACTIVATION,
    MLP,
    ReproduceConfig,
    TrainConfig,
    training,
)
from initflow.errors import SettingError, first_line, unknown
from initflow.reporting.formats import EXACT, NONE
from initflow.reporting.seed_statistics import Outcome, t_quantile

FOLDER = "tables"


@dataclass(frozen=True)
class PublishedRow:
    """``published``: (iteration, test accuracy as a fraction) pairs, none where none are."""

    name: str
    init: str
    activation: str
    published: Sequence[tuple[int, float]]
    model: str = MLP


@dataclass(frozen=True)
class PublishedTable:
    """``settings`` are those of every training, as text or values by name."""

    name: str
    title: str
    source: str
    notes: Sequence[str]
    settings: Mapping[str, Any]
    rows: Sequence[PublishedRow]

    def network(self, row: PublishedRow, seed: int, config: ReproduceConfig) -> TrainConfig:
        """The settings of the training that the row is of, under ``seed``."""
        own = {"init": row.init, "activation": row.activation, "model": row.model}
        return training(config, **{"seed": seed, **self.settings, **own})


@dataclass(frozen=True)
class Check:
    """A published accuracy beside ours over ``n`` seeds, all as fractions, at an iteration.

    ``mean`` has the 95 % t-interval from ``low`` to ``high``. One more seed would, in 95 % of
    cases, lie from ``seed_low`` to ``seed_high``, mean ± t·s·√(1 + 1/n): a published number,
    which is of one seed, is ``explained`` where it lies there. With one seed all but the mean
    are None.
    """

    iteration: int
    published: float
    n: int
    mean: float
    low: float | None
    high: float | None
    seed_low: float | None
    seed_high: float | None

    @property
    def explained(self) -> bool | None:
        if self.seed_low is None or self.seed_high is None:
            return None
        return self.seed_low <= self.published <= self.seed_high


def names() -> list[str]:
    """The tables that come with the package."""
    there = files("initflow.reporting").joinpath(FOLDER).iterdir()
    return sorted(file.name.removesuffix(".toml") for file in there if file.name.endswith(".toml"))


def load(table: str) -> PublishedTable:
    """The table of this name or, where it ends with .toml, in this file; or a `SettingError`."""
    if table in names():
        text = files("initflow.reporting").joinpath(FOLDER, f"{table}.toml").read_text("utf-8")
    elif table.endswith(".toml"):
        try:
            text = paths.own_or_of_project(table).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise SettingError(f"table '{table}' cannot be read: {first_line(error)}") from error
    else:
        raise unknown("table", table, [*names(), "a path that ends with .toml"])
    try:
        return _parse(Path(table).stem, tomllib.loads(text))
    except SettingError as error:
        raise SettingError(f"table '{table}': {error}") from error
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise SettingError(f"table '{table}' is not as a table must be: {reason}") from error


def _parse(name: str, found: Mapping[str, Any]) -> PublishedTable:
    settings = dict(found["settings"])
    requested = {setting.name for setting in fields(ReproduceConfig)} | {"init", "activation"}
    allowed = {setting.name for setting in fields(TrainConfig)} - requested
    for setting in settings:
        if setting not in allowed:
            raise ValueError(f"'{setting}' is no setting of all its trainings")
    rows = [_row(row, str(settings.get("model", MLP))) for row in found["rows"]]
    cells = {(row.model, row.init, row.activation) for row in rows}
    called = [row.name for row in rows]
    if not rows or len(cells) < len(rows):
        raise ValueError("it needs rows, no two of the same model, init and activation")
    for row_name in called:
        if called.count(row_name) > 1:
            raise ValueError(f"its rows need names that differ, not '{row_name}' twice")
    for row in rows:
        own = {"init": row.init, "activation": row.activation, "model": row.model}
        TrainConfig(**settings | own)
    notes = found["notes"]
    if not isinstance(notes, list):
        raise ValueError(f"notes must be a list of texts, not {notes!r}")  # noqa: TRY004 - a user's
    return PublishedTable(
        name, str(found["title"]), str(found["source"]), list(map(str, notes)), settings, rows
    )


def _row(found: Mapping[str, Any], model: str) -> PublishedRow:
    """One of ``model``, if it names no other."""
    model = str(found.get("model", model))
    has_activation = TrainConfig(model=model).has("activation")
    return PublishedRow(
        str(found["name"]),
        str(found["init"]),
        str(found["activation"] if has_activation else found.get("activation", ACTIVATION)),
        _curve(found.get("published", {})),
        model,
    )


def _curve(published: object) -> list[tuple[int, float]]:
    if not isinstance(published, dict):
        raise ValueError(  # noqa: TRY004 - a user's
            f"published must be accuracies by iteration, not {published!r}"
        )
    for iteration in published:
        if not (iteration.isascii() and iteration.isdigit()):
            raise ValueError(f"published must be by iteration, a whole number, not '{iteration}'")
    return sorted((int(at), _fraction(percent)) for at, percent in published.items())


def _fraction(percent: Any) -> float:
    a_number = isinstance(percent, (int, float)) and not isinstance(percent, bool)
    if not (a_number and 0 <= percent <= 100):
        raise ValueError(f"a published accuracy must be from 0 to 100 percent, not {percent!r}")
    return float(round(percent / 100, EXACT))  # as if a count were divided by that of the images


def checks(row: PublishedRow, outcomes: Sequence[Outcome]) -> list[Check]:
    """Each published number that ours were measured at too, over the seeds that finished."""
    curves = [dict(outcome.curve) for outcome in outcomes if outcome.diverged_at is None]
    found = []
    for iteration, published in row.published:
        ours = [curve[iteration] for curve in curves if iteration in curve]
        if ours:
            found.append(_check(iteration, published, ours))
    return found


def _check(iteration: int, published: float, ours: Sequence[float]) -> Check:
    n, mean = len(ours), statistics.mean(ours)
    if n == 1:
        return Check(iteration, published, n, mean, None, None, None, None)
    reach = t_quantile(n) * statistics.stdev(ours)
    of_mean, of_one = reach / math.sqrt(n), reach * math.sqrt(1 + 1 / n)
    return Check(
        iteration,
        published,
        n,
        mean,
        mean - of_mean,
        mean + of_mean,
        mean - of_one,
        mean + of_one,
    )


def sentence(table: PublishedTable, found: Mapping[str, Sequence[Check]], seeds: int) -> str:
    """How many of the published numbers are what some seed would give."""
    every = [check for of_row in found.values() for check in of_row]
    if not every:
        return f"{table.title} publishes no accuracy to hold ours against."
    known = [check for check in every if check.explained is not None]
    if not known:
        return "One seed explains nothing: no interval is claimed. Use more seeds."
    last = [of_row[-1] for of_row in found.values() if of_row and of_row[-1] in known]
    inside, inside_last = (sum(bool(check.explained) for check in of) for of in (known, last))
    return (
        f"Of {len(last)} published final accuracies, {inside_last} lie within what the seed "
        f"explains, 95 % of single runs by the spread of ours over {seeds} seeds; of all "
        f"{len(known)} along the curves, {inside}."
    )


def explained(check: Check | None) -> str:
    """Whether the published number is what some seed would give, in a word."""
    if check is None:
        return NONE
    return {True: "yes", False: "no", None: "one seed cannot say"}[check.explained]

"""What every result can show: in a terminal, in a notebook, as figures, to pandas."""

from __future__ import annotations

import html
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING

import numpy as np

from initflow.errors import cause, naming_extras, unknown
from initflow.reporting.formats import NONE, counted, short

if TYPE_CHECKING:  # which take a second, and are not always asked for
    import pandas as pd

    from initflow.reporting.drawing import Figure

FIRST = ("accuracy", "loss", "lr")  # of the metrics that a table shows
MOST_ROWS, MOST_COLUMNS = 20, 12  # of a table in a notebook

Drawings = Mapping[str, Callable[[], "Figure"]]  # how each figure is drawn, by its name


class Result(ABC):
    """What all results have; in a notebook one shows its sentences, its table and its figures."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What it is of, in a line."""

    @property
    @abstractmethod
    def conclusions(self) -> Sequence[str]:
        """Sentences on what came of it."""

    @abstractmethod
    def numbers(self) -> Iterable[Mapping[str, object]]:
        """The rows of :meth:`to_pandas`, each by the names of its columns."""

    def to_pandas(self) -> pd.DataFrame:
        """The numbers as a table; accuracies are fractions, from 0 to 1."""
        import pandas as pd  # noqa: PLC0415 - takes half a second

        return pd.DataFrame(self.numbers())

    def as_json(self) -> dict[str, object]:
        """Its title, conclusions, problems and numbers, as values that JSON has; inf is text."""
        return {
            "title": self.title,
            "conclusions": list(self.conclusions),
            "problems": self.problems(),
            "numbers": plain(list(self.numbers())),
        }

    def problems(self) -> list[str]:
        """What is not as one would expect, or could not be made: a sentence for each."""
        return []

    def drawings(self) -> Drawings:
        """How each of its figures is drawn, by its name."""
        return {}

    def figures(self) -> dict[str, Figure]:
        """Its figures, drawn anew, by the names that they have in MLflow."""
        with naming_extras("a figure"):
            return {name: draw() for name, draw in self.drawings().items()}

    def figure(self, name: str) -> Figure:
        """The figure called ``name``, drawn anew; a :class:`SettingError` where there is none."""
        drawings = self.drawings()
        if name not in drawings:
            raise unknown("name", name, drawings)
        return drawings[name]()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.title}>"

    def _repr_html_(self) -> str:
        """The sentences, the numbers and the figures, of which the first is unfolded."""
        pictures, failed = self._pictures()
        shown = dict.fromkeys([*self.conclusions, *self.problems(), *failed])
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in shown)
        first = next(iter(pictures), "")
        drawn = "".join(
            _folding(name, png, is_open=name == first) for name, png in pictures.items()
        )
        return f"<h4>{html.escape(self.title)}</h4>{lines}{as_html(self.to_pandas())}{drawn}"

    def _pictures(self) -> tuple[dict[str, bytes], list[str]]:
        """The PNG files of its figures by name, and why others could not be drawn."""
        drawings, made, failed = self.drawings(), dict[str, bytes](), []
        if drawings:
            from initflow.reporting.drawing import png  # noqa: PLC0415 - takes a second
        for name, draw in drawings.items():
            try:
                made[name] = png(draw())
            except Exception as error:  # noqa: BLE001 - the numbers are shown whatever it is
                failed.append(f"{name}.png could not be made: {cause(error)}")
        return made, failed


def comes_later(key: str) -> bool:
    """Whether a metric stands behind accuracies and losses."""
    return not key.startswith(FIRST)


def by_step(history: Mapping[str, Sequence[tuple[int, float]]]) -> list[dict[str, object]]:
    """A row for each step of a ``history`` of (step, value) pairs by metric, with its metrics.

    Accuracies and losses come first. Of several values at one step the last one counts.
    """
    rows: dict[int, dict[str, object]] = {}
    for key in sorted(history, key=comes_later):
        for step, value in history[key]:
            rows.setdefault(step, {"step": step})[key] = value
    return [rows[step] for step in sorted(rows)]


def as_html(table: pd.DataFrame) -> str:
    """A ``table`` as a notebook shows it: numbers to four digits, of large ones the ends.

    Metrics of layers are left out of many columns, as figures show them better.
    """
    from initflow.diagnostics.signals import is_of_a_layer  # noqa: PLC0415 - loads torch

    note, few = "", [column for column in table.columns if not is_of_a_layer(column)]
    if len(table.columns) > MOST_COLUMNS and 1 < len(few) < len(table.columns):
        left_out = counted(len(table.columns) - len(few), "metric")
        note = f"<div>{left_out} of layers: in the table of <code>to_pandas()</code>.</div>"
        table = table[few]
    written = table.astype(object).where(table.notna(), NONE)
    shown = written.to_html(
        max_rows=MOST_ROWS, max_cols=MOST_COLUMNS, border=0, index=False, float_format=short
    )
    return f"{shown}{note}"


def _folding(name: str, png: bytes, *, is_open: bool) -> str:
    """A figure below its name, which folds it away."""
    from initflow.reporting import webpage  # noqa: PLC0415 - jinja2, for who looks at it

    picture = webpage.Picture(png, name)
    width, _ = picture.size
    return (
        f"<details{' open' if is_open else ''}><summary>{html.escape(name)}</summary>"
        f'<img src="{picture.source}" alt="{html.escape(name)}" width="{width}" '
        'style="max-width: 100%"></details>'
    )


def plain(value: object) -> object:
    """``value`` as JSON has it, through mappings and sequences; inf and nan are text."""
    if isinstance(value, Mapping):
        return {str(key): plain(its) for key, its in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(its) for its in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (np.bool_, Integral)):
        return value.item() if isinstance(value, np.generic) else int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else str(float(value))
    return str(value)

"""What every result can show: in a terminal, in a notebook, as figures, to pandas."""

from __future__ import annotations

import html
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING

import numpy as np

from initflow.reporting.formats import NONE

if TYPE_CHECKING:  # which take a second, and are not always asked for
    import pandas as pd

    from initflow.reporting.drawing import Figure

Drawings = Mapping[str, Callable[[], "Figure"]]  # how each figure is drawn, by its name


class Result(ABC):
    """``title`` says what it is of, and ``conclusions`` are sentences on what came of it."""

    @property
    @abstractmethod
    def title(self) -> str: ...

    @property
    @abstractmethod
    def conclusions(self) -> Sequence[str]: ...

    @abstractmethod
    def numbers(self) -> Iterable[Mapping[str, object]]:
        """The rows of :meth:`to_pandas`, each by the names of its columns."""

    def to_pandas(self) -> pd.DataFrame:
        """The numbers as a table; accuracies are fractions."""
        import pandas as pd  # noqa: PLC0415 - takes half a second

        return pd.DataFrame(self.numbers())

    def as_json(self) -> dict[str, object]:
        """Its title, conclusions and numbers, as values that JSON has: see :func:`plain`."""
        return {
            "title": self.title,
            "conclusions": list(self.conclusions),
            "numbers": plain(list(self.numbers())),
        }

    def problems(self) -> list[str]:
        """What is not as one would expect, or could not be made."""
        return []

    def drawings(self) -> Drawings:
        return {}

    def figures(self) -> dict[str, Figure]:
        """Its figures, drawn anew, by the names that they have in MLflow."""
        return {name: draw() for name, draw in self.drawings().items()}

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.title}>"

    def _repr_html_(self) -> str:
        shown = dict.fromkeys([*self.conclusions, *self.problems()])
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in shown)
        numbers = self.to_pandas()
        written = numbers.astype(object).where(numbers.notna(), NONE)
        table = written.to_html(max_rows=60, max_cols=20, border=0, index=False)
        return f"<h4>{html.escape(self.title)}</h4>{lines}{table}"


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

"""Any model initialized: what was done to each of its weights, as a table and sentences."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from initflow.models import initialization
from initflow.models.choosing import Wanted
from initflow.models.initialization import Options, Report
from initflow.models.places import Given
from initflow.reporting.formats import NONE, counted, rounded
from initflow.reporting.results import Result

COLUMNS = ("name", "kind", "in", "out", "follows", "scheme", "stated", "drawn", "scale")
NAMES = 3  # that a sentence has
WIDTH = 100  # of the table where no terminal says it
LEAST = 10  # characters of a name that stay


@dataclass(frozen=True, repr=False)
class Initialization(Result, Report):
    """What came of :func:`initflow.initialize`.

    - ``filled``: the matrices, each with its ``name``, ``kind``, ``fan_in``, ``fan_out``, the
      ``activation`` that follows (None where that is not known), its ``scheme``, the variance of
      its entries as ``stated`` by that (or None) and as drawn (``variance``), and the factor
      ``scale`` of a residual branch.
    - ``left``: why other tensors were left alone, by name.
    - ``values``: what single parameters were set to, by name.
    - ``biases``: what became of them, in words; ``additions``: how many branches are added.
    """

    model: str = ""

    @property
    def title(self) -> str:
        schemes = list(dict.fromkeys(one.scheme for one in self.filled))
        return f"{self.model}, {counted(len(self.filled), 'matrix')}, {', '.join(schemes)}".replace(
            "matrixs", "matrices"
        )

    @property
    def conclusions(self) -> Sequence[str]:
        """What was scaled and set, what the biases are, and what was left alone, by reason."""
        lines = []
        if self.additions:
            lines.append(self._residual())
        lines.append(f"Biases: {self.biases}.")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
            lines.append(f"Left alone ({reason}): {', '.join(names[:NAMES])}{more}.")
        return lines

    def problems(self) -> list[str]:
        """Where what the model has is not what the scheme states."""
        lines = list(self.remarks)
        through = [one.name for one in self.filled if one.through]
        if through:
            lines.append(f"Filled through a parametrization: {', '.join(through)}.")
        return lines

    def numbers(self) -> Iterable[Mapping[str, object]]:
        """A row for each matrix, then one for each tensor that was left alone, with the reason."""
        for one in self.filled:
            yield {**asdict(one), "tied": ", ".join(one.tied), "left": ""}
        for name, reason in self.left.items():
            yield {"name": name, "left": reason}

    def __str__(self) -> str:
        """The table, for a terminal of 80 columns or more, between the title and the sentences."""
        width = shutil.get_terminal_size((WIDTH, 24)).columns
        lines = dict.fromkeys([*self.conclusions, *self.problems()])
        return "\n".join([self.title, "", *self._table(width), "", *lines])

    def _residual(self) -> str:
        factors = Counter(f"{one.scale:.3g}" for one in self.filled if one.scale != 1)
        told = [f"{counted(n, 'matrix')} × {factor}" for factor, n in factors.items()]
        told += [
            f"{counted(n, 'parameter')} = {value}"
            for value, n in Counter(f"{value:.3g}" for value in self.values.values()).items()
        ]
        text = ", ".join(told).replace("matrixs", "matrices")
        return f"Branches that are added: {self.additions}; {text}."

    def _table(self, width: int) -> list[str]:
        rows: list[tuple[str, ...]] = [COLUMNS]
        rows += [
            (
                one.name,
                one.kind,
                str(one.fan_in),
                str(one.fan_out),
                one.activation or NONE,
                one.scheme,
                rounded(one.stated),
                rounded(one.variance),
                "" if one.scale == 1 else f"{one.scale:.3g}",
            )
            for one in self.filled
        ]
        if not any(row[-1] for row in rows[1:]):
            rows = [row[:-1] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for column in (1, 5, 0, 4):  # those of text may be cut; what a kind says, a name often does
            over = sum(widths) + 2 * (len(widths) - 1) - width
            widths[column] = max(min(LEAST, widths[column]), widths[column] - max(0, over))
        return [_line(row, widths) for row in rows]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = []
    for column, (text, width) in enumerate(zip(row, widths, strict=True)):
        if column == 0 and len(text) > width:  # the end of a name tells more
            text = f"…{text[len(text) - width + 1 :]}"  # noqa: PLW2901
        elif len(text) > width:
            text = f"{text[: width - 1]}…"  # noqa: PLW2901
        right = column in (2, 3, 6, 7, 8)
        cells.append(text.rjust(width) if right else text.ljust(width))
    return "  ".join(cells).rstrip()


def initialize(
    model: nn.Module,
    scheme: Given,
    *,
    batch: object = None,
    seed: int = 0,
    only: Wanted | Sequence[Wanted] | None = None,
    skip: Wanted | Sequence[Wanted] | None = None,
    residual: str | None = None,
    bias: str = "keep",
    forget_bias: float | None = None,
) -> Initialization:
    """Fill the weights of any ``model`` in place, under a scheme, and report what was done.

    ``model`` is a ``torch.nn.Module``. ``scheme`` is what ``init`` is elsewhere (``"he"``,
    ``"normal:std=0.02"``, a plugin's name, ``"file.py:function"``), a :class:`Scheme`, a function
    as of :func:`initflow.initializer`, or ``"auto"``: for each matrix the one made for the
    activation function that its output meets. That is he for rectifiers, xavier for tanh and
    sigmoid, lecun for selu and where none follows, and N(0, gain²/fan_in) with the exact
    :func:`initflow.theory.gain` for any other.

    Every matrix is filled by itself: the gates of recurrent layers, input and recurrent, the
    query, key and value of an attention. It is drawn from a stream of ``seed`` and its name, so
    that the same seed gives the same weights, whatever else is drawn, filled or skipped. Frozen
    parameters, normalizations and what is of no known kind stay. All is drawn and checked before
    anything is written: an error leaves the model as it was.

    - ``batch``, as :func:`initflow.inspect` takes it (a loss is not needed), shows how the model
      computes. It is needed by schemes that see the model on it, such as lsuv, and where
      torch.fx cannot trace the model and something goes by its graph.
    - ``seed``: a whole number of at least 0 (default 0). torch's own random state is neither used
      nor changed.
    - ``only`` and ``skip``: names, patterns (``"encoder.*"``) or types of modules, one or several
      (default None: all, and none).
    - ``residual``: how branches start that are added to a trunk (default None: as any other
      matrix). ``"scaled"`` by 1/√N, N being their number, as in GPT-2 (Radford et al. 2019);
      ``"zero"`` (or ``"rezero"``) at 0; ``"fixup"`` as Fixup does (Zhang et al. 2019). It is the
      last matrix of a branch that is scaled or, where a normalization ends it, that one's weight.
    - ``bias``: ``"keep"`` (default), or ``"zeros"`` for all that the scheme does not set itself.
    - ``forget_bias``: of every LSTM's forget gates, such as 1.0 (Jozefowicz et al. 2015; default
      None: as ``bias`` says).

    Returns an :class:`Initialization`. Raises :class:`SettingError` for what is wrong in these or
    cannot be filled, and :class:`PluginError` for a scheme that fails or breaks its contract.
    """
    options = Options(batch, seed, only, skip, residual, bias, forget_bias)
    report = initialization.initialize(model, scheme, options)
    return Initialization(**vars(report), model=type(model).__name__)

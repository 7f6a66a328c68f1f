"""What several seeds say of schemes: a row for each, and their differences.

Every interval is a two-sided 95 % Student t-interval, of a mean over seeds or of the mean
difference between two schemes seed by seed, each by itself. It takes the accuracies, or their
differences, for normally distributed. A difference is significant where its p-value, corrected
for all pairs of the comparison by Holm's step-down method (Scand. J. Statist. 6, 1979, 65-70),
is at most 5 %: where no schemes differ, one comparison in twenty or fewer finds a difference.
Runs that share no seeds are independent: their differences are Welch's (Biometrika 34, 1947,
28-35).

A seed whose training diverged has no final accuracy; it is counted, and never left unsaid. Means
and differences are of those that finished.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

from initflow.reporting import formats
from initflow.reporting.formats import EXACT

ALPHA = 0.05
CONFIDENCE = 0.95
LEVELS = (0.90, 0.95)  # accuracies whose first iteration a row tells
COLUMNS = (
    "init",
    "activation",
    "n",
    "accuracy_mean",
    "accuracy_std",
    "accuracy_low",
    "accuracy_high",
    "iterations_to_90",
    "iterations_to_95",
    "diverged",
)  # of a row, in the files made of it


class Cell(NamedTuple):
    """A scheme, by its spec, with an activation function."""

    init: str
    activation: str

    def __str__(self) -> str:
        return f"{self.init} {self.activation}"


@dataclass(frozen=True)
class Measure:
    """What networks are compared by: a metric by its ``name``, and how.

    A share is a fraction, told in percent. Where ``is_paired``, networks of two schemes are set
    against each other seed by seed, else all of one against all of the other. ``over`` is what its
    steps count.
    """

    name: str = "test accuracy"
    is_share: bool = True
    lower_is_better: bool = False
    is_paired: bool = True
    over: str = "iteration"

    @property
    def sign(self) -> int:
        """What a value times is larger the better it is."""
        return -1 if self.lower_is_better else 1

    @property
    def unit(self) -> str:
        """What several of are compared."""
        return "seed" if self.is_paired else "run"


ACCURACY = Measure()


@dataclass(frozen=True)
class Outcome:
    """What the training of one network under ``seed`` came to.

    ``curve``: (iteration, test accuracy as a fraction) pairs, from iteration 0 on; of another
    :class:`Measure` its values, of which ``accuracy`` is the last.
    ``diverged_at``: the iteration whose loss was not finite, None for a finished training.
    ``images``: how many it was tested on, where that is known.
    """

    seed: int
    curve: Sequence[tuple[int, float]]
    diverged_at: int | None = None
    images: int | None = None

    @property
    def accuracy(self) -> float | None:
        """At the end; None where the training diverged."""
        return None if self.diverged_at is not None or not self.curve else self.curve[-1][1]


Outcomes = Mapping[Cell, Sequence[Outcome]]  # of each cell, one for each seed


@dataclass(frozen=True)
class Row:
    """One scheme with one activation function over ``n`` seeds that finished.

    ``mean``, ``std`` (of a sample, n - 1) and the 95 % t-interval from ``low`` to ``high`` are of
    the final test accuracy, as fractions; None without a seed that finished, and of all but the
    mean with only one. ``to_90`` and ``to_95``: iterations, in the median over all seeds (the
    lower one of an even number), after which 90 % and 95 % were first seen; None where more than
    half of them never got there. ``diverged`` counts the seeds that did.
    """

    cell: Cell
    n: int
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    to_90: int | None
    to_95: int | None
    diverged: int


@dataclass(frozen=True)
class Difference:
    """Of two schemes with one activation function, on the ``n`` seeds that both finished.

    ``effect`` is how much the mean test accuracy of ``better`` is above that of ``worse``, a
    fraction, with its 95 % interval from ``low`` to ``high`` (paired t); ``p`` is the two-sided
    p-value and ``p_holm`` the same corrected by Holm's method for all pairs of the comparison.
    Of a measure of which less is better it is how far it is below. Where runs are not paired, ``n``
    are those of both, and the t-test is Welch's.
    """

    activation: str
    better: str
    worse: str
    n: int
    effect: float
    low: float
    high: float
    p: float
    p_holm: float

    @property
    def significant(self) -> bool:
        return self.p_holm <= ALPHA

    @property
    def largest(self) -> float:
        """The largest difference in size that the interval allows, a fraction."""
        return max(abs(self.low), abs(self.high))


def rows(outcomes: Outcomes) -> list[Row]:
    """One for each cell, in the order of ``outcomes``."""
    return [_row(cell, of_cell) for cell, of_cell in outcomes.items()]


def _row(cell: Cell, outcomes: Sequence[Outcome]) -> Row:
    accuracies = list(finished(outcomes).values())
    mean = statistics.mean(accuracies) if accuracies else None
    std = half = None
    if len(accuracies) > 1:
        std = statistics.stdev(accuracies)
        half = _half_width(len(accuracies), std)
    to_90, to_95 = (_median_iteration(level, outcomes) for level in LEVELS)
    return Row(
        cell=cell,
        n=len(accuracies),
        mean=mean,
        std=std,
        low=None if mean is None or half is None else mean - half,
        high=None if mean is None or half is None else mean + half,
        to_90=to_90,
        to_95=to_95,
        diverged=sum(outcome.diverged_at is not None for outcome in outcomes),
    )


def finished(outcomes: Sequence[Outcome]) -> dict[int, float]:
    """Final accuracy by seed, of those that have one."""
    found = ((outcome.seed, outcome.accuracy) for outcome in outcomes)
    return {seed: accuracy for seed, accuracy in found if accuracy is not None}


def _median_iteration(level: float, outcomes: Sequence[Outcome]) -> int | None:
    """After which ``level`` is first seen; a seed that never gets there takes for ever."""
    firsts = [
        next((iteration for iteration, accuracy in outcome.curve if accuracy >= level), math.inf)
        for outcome in outcomes
    ]
    median = statistics.median_low(firsts) if firsts else math.inf
    return None if math.isinf(median) else int(median)


def t_quantile(n: int) -> float:
    """How many standard errors half of the 95 % t-interval from ``n`` values is wide."""
    return _t_quantile(n - 1)


def _t_quantile(freedom: float) -> float:
    from scipy.special import stdtrit  # noqa: PLC0415 - scipy takes a second to import

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def _half_width(n: int, std: float) -> float:
    """Of the t-interval of a mean over ``n`` values of standard deviation ``std``."""
    return t_quantile(n) * std / math.sqrt(n)


def differences(outcomes: Outcomes, measure: Measure = ACCURACY) -> list[Difference]:
    """All pairs of schemes with the same activation that share two seeds or more.

    Where runs are not paired, those that have two runs or more each. In the order of ``outcomes``,
    activation by activation; so are two that do equally well.
    """
    found: list[Difference] = []
    for activation, cells in by_activation(outcomes).items():
        ends = {cell: finished(outcomes[cell]) for cell in cells}
        for one, other in combinations(cells, 2):
            if measure.is_paired:
                images = min((of.images for of in outcomes[one] if of.images), default=None)
                estimate = _paired(ends[one], ends[other], images)
            else:
                estimate = _unpaired(list(ends[one].values()), list(ends[other].values()))
            if estimate:
                found.append(_difference(activation, one.init, other.init, estimate, measure))
    corrected = _holm([difference.p for difference in found])
    return [
        replace(difference, p_holm=p_holm)
        for difference, p_holm in zip(found, corrected, strict=True)
    ]


def by_activation(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Of each activation function the cells, in their order."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.activation, []).append(cell)
    return found


def common_curves(outcomes: Sequence[Outcome]) -> tuple[list[int], list[list[float]]]:
    """The iterations at which all seeds that finished were measured; there, each one's accuracy."""
    curves = [dict(outcome.curve) for outcome in outcomes if outcome.diverged_at is None]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return steps, [[curve[step] for step in steps] for curve in curves]


class _Estimate(NamedTuple):
    """Of the mean of one scheme above that of another: ``n`` values, by t of so much ``freedom``.

    ``error`` is its standard error.
    """

    n: int
    above: float
    error: float
    freedom: float


def _paired(
    one: Mapping[int, float], other: Mapping[int, float], images: int | None
) -> _Estimate | None:
    """How far ``one`` is above the ``other``, seed by seed; None of fewer than two seeds.

    Where all seeds agree to the image, their spread is at least what counting images rounds off:
    few seeds agree by chance.
    """
    above = [round(one[seed] - other[seed], EXACT) for seed in one.keys() & other.keys()]
    n = len(above)
    if n < 2:
        return None
    mean, std = statistics.mean(above), statistics.stdev(above)
    if not std and mean and images:
        std = 1 / (images * math.sqrt(6))  # two counts, each uniform within one image
    return _Estimate(n, mean, std / math.sqrt(n), n - 1)


def _unpaired(one: Sequence[float], other: Sequence[float]) -> _Estimate | None:
    """Welch's, whose variances need not be equal; None where either has fewer than two values."""
    if min(len(one), len(other)) < 2:
        return None
    parts = [statistics.variance(values) / len(values) for values in (one, other)]
    squares = sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (one, other), strict=True)
    )
    n = len(one) + len(other)
    freedom = sum(parts) ** 2 / squares if squares else n - 2
    above = statistics.mean(one) - statistics.mean(other)
    return _Estimate(n, above, math.sqrt(sum(parts)), freedom)


def _difference(
    activation: str, one: str, other: str, estimate: _Estimate, measure: Measure
) -> Difference:
    """By a t-test on the estimate."""
    n, above, error, freedom = estimate
    better, worse = (one, other) if measure.sign * above >= 0 else (other, one)
    effect = abs(above)
    half = _t_quantile(freedom) * error
    p = _p_value(effect, error, freedom)
    return Difference(activation, better, worse, n, effect, effect - half, effect + half, p, p)


def _p_value(effect: float, error: float, freedom: float) -> float:
    """Two-sided, of a mean as far from 0 as ``effect`` where 0 is the truth."""
    from scipy.special import stdtr  # noqa: PLC0415 - scipy takes a second to import

    if not error:  # no seed says anything else
        return 0.0 if effect else 1.0
    return 2 * float(stdtr(freedom, -effect / error))


def _holm(p_values: Sequence[float]) -> list[float]:
    """Each p-value times how many are not smaller, no smaller than those before it, at most 1."""
    corrected, floor = list(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = floor
    return corrected


def as_json(
    rows: Sequence[Row], differences: Sequence[Difference], sentences: Sequence[str]
) -> dict[str, Any]:
    """``rows`` and ``differences``, each a list of objects, and ``sentences``; None is null."""
    return {
        "rows": [values(row) for row in rows],
        "differences": [asdict(pair) | {"significant": pair.significant} for pair in differences],
        "sentences": list(sentences),
    }


def as_csv(rows: Sequence[Row]) -> str:
    """A line for each row below one of :data:`COLUMNS`; what is not known is empty."""
    return formats.as_csv(list(map(values, rows)), COLUMNS)


def values(row: Row) -> dict[str, str | float | None]:
    """By the names of :data:`COLUMNS`."""
    accuracy = (row.mean, row.std, row.low, row.high)
    values = (*row.cell, row.n, *accuracy, row.to_90, row.to_95, row.diverged)
    return dict(zip(COLUMNS, values, strict=True))

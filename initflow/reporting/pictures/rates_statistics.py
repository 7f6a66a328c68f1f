"""What a range of learning rates says of a scheme: which are stable, which is best, and why.

A rate is stable in a training whose losses are all finite and never rise: no mean of successive
ones (``loss/peak``) is more than :data:`RISE` times the loss before the first update. The largest
stable rate of a network is the largest one of its range such that it and all lower ones are
stable; the best is that of the highest validation accuracy among those that did not diverge. Rates
are averaged over seeds as logarithms, with 95 % Student t-intervals. A seed with no stable rate, or
with none that is not, lies beyond the range: it is counted, and in no mean.

Theory is that of a quadratic with the largest eigenvalue of the loss's Hessian at the start: see
:mod:`initflow.theory.stability`. It holds for a scheme where it is within a factor of
:data:`FACTOR` of what is measured, and over depths or widths where the intervals of both slopes
overlap.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import takewhile
from typing import Any, NamedTuple

from initflow.reporting import formats
from initflow.reporting.seed_statistics import t_quantile

RISE = 1.1  # of the loss at the start
POINT = 0.01  # of accuracy, within which of the best other rates are as good
FACTOR = 3.0  # between a predicted rate and a measured one where theory holds
LARGEST = 700.0  # of a logarithm whose number is finite
FLAT = 0.2  # the largest size of a slope of what does not go with the width
COLUMNS = (
    "init",
    "parametrization",
    "size",
    "lr",
    "seed",
    "accuracy",
    "loss",
    "peak",
    "outcome",
    "stable",
    "run_id",
)
ROW_COLUMNS = (
    "init",
    "parametrization",
    "size",
    "n",
    "stable",
    "stable_low",
    "stable_high",
    "beyond",
    "predicted",
    "best",
    "best_low",
    "best_high",
    "accuracy",
    "within_low",
    "within_high",
)


class Kind(NamedTuple):
    """A scheme, by its spec, in a parametrization."""

    init: str
    parametrization: str

    def __str__(self) -> str:
        return self.init if self.parametrization == "standard" else " ".join(self)


class Group(NamedTuple):
    """Networks that differ in seed and rate alone; ``size`` is their depth or width, if any."""

    kind: Kind
    size: int | None


@dataclass(frozen=True)
class Tried:
    """One network trained at rate ``lr``; ``loss`` and ``accuracy`` on validation images.

    None where the training diverged. ``start`` is the validation loss before the first update.
    """

    group: Group
    lr: float
    seed: int
    accuracy: float | None
    loss: float | None
    peak: float | None
    start: float
    outcome: str
    run_id: str

    @property
    def stable(self) -> bool:
        return (
            self.outcome == "finished" and self.peak is not None and self.peak <= RISE * self.start
        )


@dataclass(frozen=True)
class Start:
    """An untrained network: its validation loss, its curvature, and the rate predicted from it.

    None where theory predicts none, as for Adam.
    """

    group: Group
    seed: int
    loss: float
    curvature: float
    predicted: float | None


@dataclass(frozen=True)
class Spread:
    """The mean of ``n`` seeds with its 95 % interval, which a single one has not."""

    n: int
    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None without any."""
        found = list(values)
        if not found:
            return None
        mean = statistics.fmean(found)
        if len(found) == 1:
            return cls(1, mean, None, None)
        half = t_quantile(len(found)) * statistics.stdev(found) / math.sqrt(len(found))
        return cls(len(found), mean, mean - half, mean + half)

    @classmethod
    def of_rates(cls, values: Iterable[float]) -> Spread | None:
        """The geometric mean of rates, with the interval that its logarithm has."""
        logs = cls.of(map(math.log, values))
        if logs is None:
            return None
        low, high = (None if end is None else _exp(end) for end in (logs.low, logs.high))
        return cls(logs.n, _exp(logs.mean), low, high)

    def overlaps(self, other: Spread) -> bool | None:
        """Whether the two intervals meet; None where one has none, as of a single seed."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return None
        return max(self.low, other.low) <= min(self.high, other.high)


def _exp(logarithm: float) -> float:
    """Without the last digits, which rounding makes odd; infinite beyond all numbers."""
    return float(f"{math.exp(logarithm):.10g}") if logarithm < LARGEST else math.inf


@dataclass(frozen=True)
class Row:
    """What the rates of one group say.

    ``stable``: the largest stable rate over the seeds that have one within the range;
    ``unstable`` seeds have none, and ``unbounded`` ones have no rate that is not stable.
    ``predicted``: theory's, over the seeds. ``best``: the best rate, and ``accuracy`` its own, over
    the seeds. ``within``: the lowest and highest rate around the best of the mean over the seeds
    that are all within a point of it.
    """

    group: Group
    stable: Spread | None
    unstable: int
    unbounded: int
    predicted: Spread | None
    best: Spread | None
    accuracy: Spread | None
    within: tuple[float, float] | None

    @property
    def ratio(self) -> float | None:
        """The measured rate over the predicted one."""
        if self.stable is None or self.predicted is None:
            return None
        return self.stable.mean / self.predicted.mean

    @property
    def holds(self) -> bool | None:
        """Whether theory does, where both are known."""
        ratio = self.ratio
        return None if ratio is None else 1 / FACTOR <= ratio <= FACTOR


@dataclass(frozen=True)
class Slope:
    """How the largest stable rate goes with the size: rate ∝ size^slope, over the seeds.

    Both slopes are of the same networks: ``beyond`` are those without a largest stable rate within
    the range.
    """

    kind: Kind
    measured: Spread | None
    predicted: Spread | None
    beyond: int = 0

    @property
    def holds(self) -> bool | None:
        if self.measured is None or self.predicted is None:
            return None
        return self.measured.overlaps(self.predicted)


def by_seed(tried: Iterable[Tried]) -> dict[int, list[Tried]]:
    """Those of each seed, by rising rate."""
    found: dict[int, list[Tried]] = {}
    for one in sorted(tried, key=lambda one: (one.seed, one.lr)):
        found.setdefault(one.seed, []).append(one)
    return found


def largest_stable(tried: Sequence[Tried]) -> float | None:
    """Of one seed, by rising rate: 0 where the lowest is not stable; None where all are."""
    stable = list(takewhile(lambda one: one.stable, tried))
    if len(stable) == len(tried):
        return None
    return stable[-1].lr if stable else 0.0


def best(tried: Sequence[Tried]) -> Tried | None:
    """Of one seed, that of the highest accuracy, and of several the one of the lowest rate."""
    finished = [one for one in tried if one.accuracy is not None]
    return max(finished, key=lambda one: (one.accuracy, -one.lr), default=None)


def rows(tried: Sequence[Tried], starts: Sequence[Start]) -> list[Row]:
    """One for each group, in the order of ``tried``."""
    groups: dict[Group, list[Tried]] = {}
    for one in tried:
        groups.setdefault(one.group, []).append(one)
    return [
        _row(group, of, [start for start in starts if start.group == group])
        for group, of in groups.items()
    ]


def _row(group: Group, tried: Sequence[Tried], starts: Sequence[Start]) -> Row:
    seeds = list(by_seed(tried).values())
    limits = [largest_stable(of) for of in seeds]
    tops = [top for of in seeds if (top := best(of))]
    return Row(
        group,
        stable=Spread.of_rates(limit for limit in limits if limit),
        unstable=limits.count(0.0),
        unbounded=limits.count(None),
        predicted=Spread.of_rates(
            one.predicted for one in starts if one.predicted and math.isfinite(one.predicted)
        ),
        best=Spread.of_rates(top.lr for top in tops),
        accuracy=Spread.of(top.accuracy for top in tops if top.accuracy is not None),
        within=_within(tried),
    )


def curve(
    tried: Iterable[Tried], value: Callable[[Tried], float | None]
) -> dict[float, list[float]]:
    """The values over the seeds by rate, of those rates at which every seed has one."""
    found: dict[float, list[float | None]] = {}
    for one in sorted(tried, key=lambda one: one.lr):
        found.setdefault(one.lr, []).append(value(one))
    return {
        lr: [value for value in values if value is not None]
        for lr, values in found.items()
        if None not in values
    }


def _within(tried: Sequence[Tried]) -> tuple[float, float] | None:
    """The rates around the best mean accuracy that are all within a point of it."""
    means = {lr: statistics.fmean(of) for lr, of in curve(tried, lambda one: one.accuracy).items()}
    if not means:
        return None
    rates = sorted({one.lr for one in tried})
    top = max(means, key=lambda lr: (means[lr], -lr))

    def is_near(lr: float) -> bool:
        return means.get(lr, -math.inf) >= means[top] - POINT

    at = rates.index(top)
    below = list(takewhile(is_near, reversed(rates[: at + 1])))
    above = list(takewhile(is_near, rates[at:]))
    return below[-1], above[-1]


def slopes(tried: Sequence[Tried], starts: Sequence[Start]) -> list[Slope]:
    """One for each scheme and parametrization whose networks are of several sizes."""
    kinds = dict.fromkeys(one.group.kind for one in tried)
    found = []
    for kind in kinds:
        limits: dict[int, dict[int, float]] = {}
        beyond = 0
        for group in dict.fromkeys(one.group for one in tried if one.group.kind == kind):
            of_group = [one for one in tried if one.group == group]
            for seed, of in by_seed(of_group).items():
                if group.size and (limit := largest_stable(of)):
                    limits.setdefault(seed, {})[group.size] = limit
                else:
                    beyond += 1
        theirs: dict[int, dict[int, float]] = {}
        for start in starts:
            size = start.group.size
            is_measured = size in limits.get(start.seed, {})
            if start.group.kind == kind and size and start.predicted and is_measured:
                theirs.setdefault(start.seed, {})[size] = start.predicted
        found.append(Slope(kind, _over_seeds(limits), _over_seeds(theirs), beyond))
    return found


def _over_seeds(points: Mapping[int, Mapping[int, float]]) -> Spread | None:
    """Of each seed's slope; ``points`` has the rates by size of each."""
    return Spread.of(slope for of in points.values() if (slope := log_slope(of)) is not None)


def log_slope(points: Mapping[int, float]) -> float | None:
    """That of the line through log(value) over log(size) by least squares; None without two."""
    usable = {size: y for size, y in points.items() if y > 0 and math.isfinite(y)}
    if len(usable) < 2:
        return None
    x, y = map(math.log, usable), map(math.log, usable.values())
    return statistics.linear_regression(list(x), list(y)).slope


@dataclass(frozen=True)
class Coordinate:
    """What passes through one layer after ``step`` updates, over images and units.

    ``size`` is the root mean square of its pre-activations, ``change`` that of how far they are
    from those of the untrained network.
    """

    kind: Kind
    width: int
    seed: int
    step: int
    layer: str
    size: float
    change: float


@dataclass(frozen=True)
class CoordinateSlope:
    """How a layer's ``change`` goes with the width after the last of the updates."""

    kind: Kind
    layer: str
    slope: Spread

    @property
    def verdict(self) -> str:
        if self.slope.mean > FLAT:
            return "growing"
        return "vanishing" if self.slope.mean < -FLAT else "flat"


def coordinate_slopes(coordinates: Sequence[Coordinate]) -> list[CoordinateSlope]:
    """One for each layer of each kind, of the last step; what is not finite is left out."""
    last = max((one.step for one in coordinates), default=0)
    changes: dict[tuple[Kind, str], dict[int, dict[int, float]]] = {}
    for one in coordinates:
        if one.step == last:
            of_seed = changes.setdefault((one.kind, one.layer), {}).setdefault(one.seed, {})
            of_seed[one.width] = one.change
    return [
        CoordinateSlope(kind, layer, slope)
        for (kind, layer), of in changes.items()
        if (slope := _over_seeds(of))
    ]


def as_csv(tried: Sequence[Tried]) -> str:
    """A line for each network below :data:`COLUMNS`."""
    return formats.as_csv(list(map(values, tried)), COLUMNS)


def coordinates_as_csv(found: Sequence[Coordinate]) -> str:
    """A line for each layer of each network after each update."""
    names = [field.name for field in fields(Coordinate) if field.name != "kind"]
    lines = [
        {**one.kind._asdict(), **{name: getattr(one, name) for name in names}} for one in found
    ]
    return formats.as_csv(lines, (*Kind._fields, *names))


def values(one: Tried) -> dict[str, str | float | None]:
    """By the names of :data:`COLUMNS`."""
    (init, parametrization), size = one.group
    measured = (one.lr, one.seed, one.accuracy, one.loss, one.peak, one.outcome, one.stable)
    return dict(zip(COLUMNS, (init, parametrization, size, *measured, one.run_id), strict=True))


def row_values(row: Row) -> dict[str, str | float | None]:
    """By the names of :data:`ROW_COLUMNS`."""
    (init, parametrization), size = row.group

    def ends(spread: Spread | None) -> tuple[float | None, float | None, float | None]:
        return (spread.mean, spread.low, spread.high) if spread else (None, None, None)

    seeds = (row.stable.n if row.stable else 0, *ends(row.stable), row.unstable + row.unbounded)
    found = (
        *(init, parametrization, size),
        *seeds,
        row.predicted.mean if row.predicted else None,
        *ends(row.best),
        row.accuracy.mean if row.accuracy else None,
        *(row.within or (None, None)),
    )
    return dict(zip(ROW_COLUMNS, found, strict=True))


def as_json(
    rows: Sequence[Row],
    slopes: Sequence[Slope],
    coordinates: Sequence[CoordinateSlope],
    starts: Sequence[Start],
    sentences: Sequence[str],
) -> dict[str, Any]:
    """All of it as plain values; what is not known is null."""

    def spread(one: Spread | None) -> dict[str, Any] | None:
        return {name: _plain(its) for name, its in asdict(one).items()} if one else None

    return {
        "rows": [
            {name: _plain(its) for name, its in row_values(row).items()}
            | {"unstable": row.unstable, "unbounded": row.unbounded, "holds": row.holds}
            for row in rows
        ],
        "starts": [
            {
                **one.group.kind._asdict(),
                "size": one.group.size,
                "seed": one.seed,
                "loss": _plain(one.loss),
                "largest_eigenvalue": _plain(one.curvature),
                "predicted": one.predicted,
            }
            for one in starts
        ],
        "slopes": [
            {
                **slope.kind._asdict(),
                "measured": spread(slope.measured),
                "predicted": spread(slope.predicted),
                "holds": slope.holds,
            }
            for slope in slopes
        ],
        "coordinates": [
            {
                **one.kind._asdict(),
                "layer": one.layer,
                "slope": spread(one.slope),
                "verdict": one.verdict,
            }
            for one in coordinates
        ],
        "sentences": list(sentences),
    }


def _plain(value: str | float | None) -> str | float | None:
    """As JSON has it: what is not finite as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

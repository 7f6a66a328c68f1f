"""Up to which depth networks train, beside what theory expects: from trained networks to c · ξ.

Theory gives a number of layers ξ for each σ_w², and expects networks of up to c · ξ layers to
train, with one c for all σ_w². All depths are compared by their logarithms.

A network trains where its accuracy on training images is at least half way between guessing and
the best mean of all; one that diverged does not, whatever it had learned before.

The edge at one σ_w² parts the depths that train from the deeper ones so that the fewest lie on
the wrong side, and lies where the line between the accuracies left and right of it, over the
logarithm of the depth, passes that threshold. Where all depths train the edge is beyond the
deepest, and is taken for that; where none does, for the shallowest.

c is where the area between the line c · ξ and the edges, both kept within the depths of the
networks, is smallest: the sum over σ_w² of |log(c · ξ) - log(edge)|. Its interval is a two-sided
95 % Student t-interval over seeds, each of which has edges, and a c, of its own.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from initflow.reporting import formats
from initflow.reporting.formats import NONE
from initflow.reporting.seed_statistics import t_quantile

OUTCOMES = ("finished", "unstable", "diverged")
FAR = 1.5  # times the loss of guessing, above which the end of a training is called unstable
TOLD = 0.1  # above guessing, from which on the best network is said to have learned anything
NEAR = 1.5  # factor on the depth, up to which theory holds
LEFT = 0.75  # of the distance that a single depth for all σ_w² leaves, at most, in its logarithm
COLUMNS = (
    "sigma_w2",
    "depth",
    "lr",
    "seed",
    "accuracy",
    "loss",
    "outcome",
    "run_id",
)  # of a network, in the files made of it


@dataclass(frozen=True)
class TrainedNetwork:
    """One network of the plane, and what came of it.

    ``accuracy`` is that on training images at its end, a fraction, and ``loss`` the mean of its
    last batches; None where it diverged. ``outcome`` is one of :data:`OUTCOMES`.
    """

    sigma_w2: float
    depth: int
    lr: float
    seed: int
    accuracy: float | None
    loss: float | None
    outcome: str
    run_id: str


@dataclass(frozen=True)
class Edge:
    """The depth up to which networks of one σ_w² train.

    ``inside``: whether it lies within the depths that there are; else it is beyond the first or
    the last one, and ``depth`` is that one.
    """

    depth: float
    inside: bool


@dataclass(frozen=True)
class Fit:
    """The line c · ξ beside the edges of one learning rate.

    ``c`` is the mean of ``by_seed``, with its 95 % interval from ``low`` to ``high``; None where
    no edge lies within the depths at a finite ξ, and the interval with one seed only.
    ``factor`` is by how much the line is off, in depth, in the (geometric) mean over σ_w², and
    ``level`` how much the best single depth for all σ_w² would be. ``agreeing`` is the share of
    the places in the plane of which the line says rightly whether networks there train.
    """

    c: float | None
    low: float | None
    high: float | None
    by_seed: Mapping[int, float]
    factor: float | None
    level: float
    agreeing: float | None

    @property
    def holds(self) -> bool:
        """Whether the line is near the edges, and clearly nearer than a single depth is."""
        return self.factor is not None and self.factor <= min(NEAR, self.level**LEFT)


@dataclass(frozen=True)
class Plane:
    """All networks of one learning rate, by σ_w² (columns) and depth (rows), both ascending.

    ``accuracies`` are means over the seeds, a network that diverged as one that guesses; None
    without any network. ``diverged`` and ``unstable`` count those. ``scales`` has the ξ of each
    σ_w², ``edges`` the edge of the mean accuracies.
    """

    lr: float
    sigma_w2s: Sequence[float]
    depths: Sequence[int]
    threshold: float | None
    accuracies: Sequence[Sequence[float | None]]
    diverged: Sequence[Sequence[int]]
    unstable: Sequence[Sequence[int]]
    scales: Sequence[float]
    edges: Sequence[Edge | None]
    fit: Fit | None

    @property
    def deepest(self) -> float | None:
        """The σ_w² whose edge is deepest, the mean of several; None where all edges are alike."""
        there = [edge.depth for edge in self.edges if edge]
        if not there or min(there) == max(there):
            return None
        return statistics.fmean(
            sigma_w2
            for sigma_w2, edge in zip(self.sigma_w2s, self.edges, strict=True)
            if edge and edge.depth == max(there)
        )

    def count(self, outcome: str) -> int:
        """How many networks were ``unstable``, or ``diverged``."""
        return sum(map(sum, getattr(self, outcome)))


def outcome(loss: float | None, classes: int, *, diverged: bool) -> str:
    """How a training ended, by the mean loss of its last batches.

    It is unstable where that is more than :data:`FAR` times that of guessing, log(classes): it
    is farther from the labels than a network that knows nothing of them.
    """
    if diverged:
        return "diverged"
    return "unstable" if loss is None or loss > FAR * math.log(classes) else "finished"


def planes(
    networks: Sequence[TrainedNetwork], scales: Mapping[float, float], classes: int
) -> list[Plane]:
    """One for each learning rate, in their order; ``scales`` has the ξ of each σ_w²."""
    guessing = 1 / classes
    rates = dict.fromkeys(one.lr for one in networks)
    tables = {lr: _by_place([one for one in networks if one.lr == lr], guessing) for lr in rates}
    best = max(accuracy for table in tables.values() for accuracy in _means(table).values())
    threshold = (guessing + best) / 2 if best >= guessing + TOLD else None
    found = []
    for lr, table in tables.items():
        depths = sorted({depth for _, depth in table})
        means = _means(table)
        counts = {
            outcome: Counter(
                (n.sigma_w2, n.depth) for n in networks if (n.lr, n.outcome) == (lr, outcome)
            )
            for outcome in OUTCOMES
        }
        found.append(
            Plane(
                lr=lr,
                sigma_w2s=list(scales),
                depths=depths,
                threshold=threshold,
                accuracies=[[means.get((s, depth)) for s in scales] for depth in depths],
                diverged=[[counts["diverged"][s, depth] for s in scales] for depth in depths],
                unstable=[[counts["unstable"][s, depth] for s in scales] for depth in depths],
                scales=list(scales.values()),
                edges=_edges(means, list(scales), threshold),
                fit=_fit(table, scales, threshold),
            )
        )
    return found


_Means = Mapping[tuple[float, int], float]  # accuracy by σ_w² and depth
_Table = Mapping[tuple[float, int], Mapping[int, float]]  # of each seed there


def _by_place(networks: Sequence[TrainedNetwork], guessing: float) -> _Table:
    table: dict[tuple[float, int], dict[int, float]] = {}
    for one in networks:
        accuracy = guessing if one.accuracy is None else one.accuracy
        table.setdefault((one.sigma_w2, one.depth), {})[one.seed] = accuracy
    return table


def _means(table: _Table) -> _Means:
    return {place: statistics.fmean(seeds.values()) for place, seeds in table.items()}


def _edges(
    accuracies: _Means, sigma_w2s: Sequence[float], threshold: float | None
) -> list[Edge | None]:
    """That of each σ_w²; None without a threshold, or without networks there."""
    columns: dict[float, dict[int, float]] = {}
    for (sigma_w2, depth), accuracy in accuracies.items():
        columns.setdefault(sigma_w2, {})[depth] = accuracy
    return [
        None if threshold is None or s not in columns else edge(columns[s], threshold)
        for s in sigma_w2s
    ]


def edge(accuracies: Mapping[int, float], threshold: float) -> Edge:
    """Of the networks of one σ_w², whose ``accuracies`` are given by depth."""
    depths = sorted(accuracies)
    trains = [accuracies[depth] >= threshold for depth in depths]
    wrong = [trains[:at].count(False) + trains[at:].count(True) for at in range(len(depths) + 1)]
    trained = wrong.index(min(wrong))  # so many depths; the shallower of two equal edges
    if trained == 0:
        return Edge(depths[0], inside=False)
    if trained == len(depths):
        return Edge(depths[-1], inside=False)
    before, after = depths[trained - 1], depths[trained]
    above, below = accuracies[before], accuracies[after]
    part = (above - threshold) / (above - below)
    return Edge(before * (after / before) ** part, inside=True)


def _fit(table: _Table, scales: Mapping[float, float], threshold: float | None) -> Fit | None:
    if threshold is None:
        return None
    means, xis = _means(table), list(scales.values())
    edges = _edges(means, list(scales), threshold)
    depths = [depth for _, depth in table]
    within = min(depths), max(depths)
    by_seed = {}
    for seed in sorted({seed for seeds in table.values() for seed in seeds}):
        own = {place: seeds[seed] for place, seeds in table.items() if seed in seeds}
        c = fitted(xis, _edges(own, list(scales), threshold), within)
        if c is not None:
            by_seed[seed] = c
    there = [math.log(edge.depth) for edge in edges if edge]
    middle = statistics.median(there)
    level = math.exp(statistics.fmean(abs(depth - middle) for depth in there))
    if not by_seed:
        return Fit(None, None, None, by_seed, None, level, None)
    c, half = statistics.fmean(by_seed.values()), None
    if len(by_seed) > 1:
        half = (
            t_quantile(len(by_seed)) * statistics.stdev(by_seed.values()) / math.sqrt(len(by_seed))
        )
    xs, ys = _logarithms(xis, edges)
    right = [
        (accuracy >= threshold) == (depth <= c * scales[sigma_w2])
        for (sigma_w2, depth), accuracy in means.items()
    ]
    return Fit(
        c=c,
        low=None if half is None else c - half,
        high=None if half is None else c + half,
        by_seed=by_seed,
        factor=math.exp(_area(math.log(c), xs, ys, within) / len(there)),
        level=level,
        agreeing=statistics.fmean(right),
    )


def fitted(
    scales: Sequence[float], edges: Sequence[Edge | None], within: tuple[float, float]
) -> float | None:
    """The c for which the area between c · ``scales`` and ``edges`` is smallest.

    As a function of log c the area is made of straight pieces, so it is smallest at one of the
    places where two of them meet; of several such places it is their middle or, where the area is
    larger there, the one nearest to it. None where no edge is inside at a finite scale: nothing but
    a bound would be known.
    """
    both = zip(scales, edges, strict=True)
    if not any(edge and edge.inside and 0 < scale < math.inf for scale, edge in both):
        return None
    xs, ys = _logarithms(scales, edges)
    low, high = map(math.log, within)
    finite = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x)]
    meet = sorted(end - x for x, y in finite for end in (low, y, high))
    areas = [_area(at, xs, ys, within) for at in meet]
    smallest = min(areas) + 1e-12
    least = [at for at, area in zip(meet, areas, strict=True) if area <= smallest]
    middle = (least[0] + least[-1]) / 2
    if _area(middle, xs, ys, within) > smallest:
        middle = min(least, key=lambda at: abs(at - middle))
    return math.exp(middle)


def _logarithms(
    scales: Sequence[float], edges: Sequence[Edge | None]
) -> tuple[list[float], list[float]]:
    """Of the scales and the edges, where there is one."""
    both = [(scale, edge.depth) for scale, edge in zip(scales, edges, strict=True) if edge]
    xs = [math.log(scale) if scale else -math.inf for scale, _ in both]
    return xs, [math.log(depth) for _, depth in both]


def _area(
    log_c: float, xs: Sequence[float], ys: Sequence[float], within: tuple[float, float]
) -> float:
    """Between the line and the edges, both within the depths, in natural logarithms."""
    low, high = map(math.log, within)
    return sum(abs(min(max(log_c + x, low), high) - y) for x, y in zip(xs, ys, strict=True))


@dataclass(frozen=True)
class EdgeRow:
    """One σ_w² of a plane: ξ, theory's edge and the measured one as text, and what was lost."""

    sigma_w2: float
    told: tuple[str, str, str]
    diverged: int
    unstable: int


def edge_rows(plane: Plane) -> list[EdgeRow]:
    """One for each σ_w²; an edge beyond the depths that there are is said to be so."""
    c = plane.fit.c if plane.fit else None
    found = []
    for at, (sigma_w2, scale, edge) in enumerate(
        zip(plane.sigma_w2s, plane.scales, plane.edges, strict=True)
    ):
        line = NONE if c is None else _layers(c * scale)
        measured = NONE
        if edge:
            beyond = "" if edge.inside else "> " if edge.depth == plane.depths[-1] else "< "
            measured = f"{beyond}{_layers(edge.depth)}"
        lost = (sum(row[at] for row in counts) for counts in (plane.diverged, plane.unstable))
        found.append(EdgeRow(sigma_w2, (_layers(scale), line, measured), *lost))
    return found


def _layers(depth: float) -> str:
    return "∞" if math.isinf(depth) else f"{depth:.3g}" if depth < 100 else f"{depth:.0f}"


def values(network: TrainedNetwork) -> dict[str, str | float | None]:
    """By the names of :data:`COLUMNS`."""
    return asdict(network)


def as_csv(networks: Sequence[TrainedNetwork]) -> str:
    """A line for each network below one of :data:`COLUMNS`; what is not known is empty."""
    return formats.as_csv(list(map(values, networks)), COLUMNS)


def as_json(plane: Plane) -> dict[str, Any]:
    """All of it but what is infinite, which is null: JSON has no word for it."""
    fit = plane.fit
    return {
        "lr": plane.lr,
        "sigma_w2": list(plane.sigma_w2s),
        "depth": list(plane.depths),
        "threshold": plane.threshold,
        "accuracy": plane.accuracies,
        "diverged": plane.diverged,
        "unstable": plane.unstable,
        "xi": [_finite(scale) for scale in plane.scales],
        "edge": [edge.depth if edge else None for edge in plane.edges],
        "edge_is_inside": [edge.inside if edge else None for edge in plane.edges],
        "fit": asdict(fit) | {"holds": fit.holds} if fit else None,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

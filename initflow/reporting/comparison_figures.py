"""The figures of many networks: schemes over several seeds, beside each other and published ones.

Plain values in, a matplotlib figure out, nothing shown or saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from initflow.diagnostics.signals import Signals
from initflow.reporting import drawing, thinning
from initflow.reporting.drawing import Look, Values
from initflow.reporting.seed_statistics import (
    ACCURACY,
    Cell,
    Measure,
    Outcome,
    Outcomes,
    Row,
    by_activation,
    common_curves,
    finished,
    rows,
)

if TYPE_CHECKING:
    from initflow.reporting.drawing import Axes, Figure

VARIANCES = {
    "preactivation_variance": "signal: variance\nof the pre-activations",
    "gradient_variance": "gradient: variance\nby the pre-activations",
}
BANDS_KEY = "line: mean over the {}s; shaded: from the lowest to the highest"
SEEDS_KEY = BANDS_KEY.format("seed")
LOST = 10  # seeds of a scheme that diverged which are drawn


def comparison_curves(outcomes: Outcomes, title: str, measure: Measure = ACCURACY) -> Figure:
    """A measure over iterations: a panel for each activation function, a line each scheme.

    A line is the mean over the seeds that finished, at the iterations where all of them were
    measured, and its band goes from the lowest to the highest. Each seed that diverged is a thin
    line that ends in a cross. Of many schemes some are drawn, and the others' means in grey.
    """
    table = rows(outcomes)
    looks = _looks(outcomes, table)
    figure, panels = _panels(list(by_activation(outcomes)), title, sharey=True, measure=measure)
    for cell, of in outcomes.items():
        if cell.init in looks:
            _over_seeds(panels[cell.activation], of, looks[cell.init])
        else:
            steps, curves = common_curves(of)
            _in_grey(panels[cell.activation], steps, np.array(curves))
    part = drawing.range_of([a for of in outcomes.values() for a in _curves(of)])
    for axes in panels.values():
        drawing.value_axis(axes, "y", part, measure)
    labels = [f"{init}{_fewer(init, outcomes)}" for init in looks]
    shown = [of for cell, of in outcomes.items() if cell.init in looks]
    key = _with_others(_curves_key(shown, measure.unit), table)
    drawing.legend(figure, list(looks.values()), labels, key)
    return figure


def comparison_accuracies(
    outcomes: Outcomes, table: Sequence[Row], title: str, measure: Measure = ACCURACY
) -> Figure:
    """What a measure came to: each seed a dot, above them the mean and its 95 % interval.

    Schemes are rows, in one block for each activation function. Where some are so far below the
    others that those could not be told apart, the axis is broken between them.
    """
    looks = drawing.looks(outcomes, thinning.drawn(table))
    ends = [a for of in outcomes.values() for a in _accuracies(of)]
    parts = drawing.accuracy_parts(ends, table, measure)
    key = f"{measure.name}; dots: {measure.unit}s, above them their mean with its 95 % interval"
    cells = [row.cell for row in table]
    figure, lines = drawing.accuracy_lines(cells, parts, title, key, measure=measure)
    for row in table:
        at, across = lines[row.cell]
        for axes, (low, high) in zip(across, parts, strict=True):
            dots = [a for a in _accuracies(outcomes[row.cell]) if low <= a <= high]
            _accuracy_row(axes, at, dots, row, looks[row.cell.init])
        drawing.beside(across[-1], at, drawing.told(row, measure))
    return figure


def signals_by_layer(
    measured: Mapping[Cell, Sequence[Signals]], title: str, table: Sequence[Row] = ()
) -> Figure:
    """Variances through the untrained layers: a row for each activation, a line each scheme.

    ``measured`` holds the signals of each seed; what is 0 or no number is left out of the means
    and bands. Of many schemes those are drawn that are in the learning curves, by the ``table`` of
    their accuracies, and the others' means in grey.
    """
    looks, activations = _looks(measured, table), list(by_activation(measured))
    figure = drawing.wide_figure(0.9 + 2.2 * len(activations), title)
    grid = figure.subplots(len(activations), 2, squeeze=False)
    layers: dict[str, list[str]] = {name: [] for name in activations}
    seen = set()
    for (init, activation), seeds in measured.items():
        if not seeds:
            continue
        layers[activation] = list(seeds[0].layers)
        for axes, quantity in zip(grid[activations.index(activation)], VARIANCES, strict=True):
            values = np.array([drawing.positive(signals.by_layer(quantity)) for signals in seeds])
            if init not in looks:
                _in_grey(axes, range(values.shape[1]), values)
                continue
            _mean_and_band(axes, range(values.shape[1]), values, looks[init])
            seen |= {init} if np.isfinite(values).any() else set()
    for across, activation in zip(grid, activations, strict=True):
        across[0].set_ylabel(activation, fontsize=drawing.MIDDLE)
        for axes in across:
            drawing.layer_axes(axes, layers[activation])
            axes.tick_params(labelsize=drawing.SMALL)
            axes.minorticks_off()  # they take long to lay out
    for axes, name in zip(grid[0], VARIANCES.values(), strict=True):
        axes.set_title(name, fontsize=drawing.MIDDLE)
    labels = [init if init in seen else f"{init} (0 or no number)" for init in looks]
    key = _with_others(f"layer; {SEEDS_KEY}", table)
    drawing.legend(figure, list(looks.values()), labels, key)
    return figure


def published_curves(
    rows: Mapping[str, tuple[Sequence[tuple[int, float]], Sequence[Outcome]]], title: str
) -> Figure:
    """Published accuracies as marks over ours, in a panel for each of ``rows``.

    Each is of published (iteration, accuracy) pairs, maybe none, and of our outcomes.
    """
    ours: Look = {"color": drawing.CYCLE[0]}
    theirs: Look = {
        "color": "black",
        "marker": "o",
        "linestyle": "none",
        "markerfacecolor": "white",
    }
    figure, panels = _panels(list(rows), title, sharey=False)
    for axes, (published, outcomes) in zip(panels.values(), rows.values(), strict=True):
        _over_seeds(axes, outcomes, ours)
        if published:
            axes.plot(*zip(*published, strict=True), markersize=5, zorder=3, **theirs)
        part = drawing.range_of([*_curves(outcomes), *(a for _, a in published)])
        drawing.accuracy_axis(axes, "y", part)
    drawn = {"published": theirs, "ours": ours}
    if not any(published for published, _ in rows.values()):
        del drawn["published"]
    key = _curves_key(outcomes for _, outcomes in rows.values())
    drawing.legend(figure, list(drawn.values()), list(drawn), key)
    return figure


def _panels(
    names: Sequence[str], title: str, *, sharey: bool, measure: Measure = ACCURACY
) -> tuple[Figure, dict[str, Axes]]:
    """A panel of a measure over iterations for each name, at most three in a row."""
    rows = -(-len(names) // 3)
    columns = -(-len(names) // rows)
    figure = drawing.wide_figure(0.9 + 2.5 * rows, title)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    panels = dict(zip(names, grid.flat, strict=False))
    for name, axes in panels.items():
        axes.set_title(drawing.wrapped(name, 80 / columns), fontsize=drawing.MIDDLE)
        drawing.few_ticks(axes, 3, whole=True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(drawing.wrapped(measure.name, 26), fontsize=drawing.MIDDLE)
    for axes in grid[-1]:
        axes.set_xlabel(measure.over, fontsize=drawing.MIDDLE)
    return figure, panels


def _over_seeds(axes: Axes, outcomes: Sequence[Outcome], look: Look) -> None:
    """Mean and band of the seeds that finished, and each that diverged until there."""
    steps, curves = common_curves(outcomes)
    if curves:
        _mean_and_band(axes, steps, np.array(curves), look)
    thin = {**look, "linewidth": 0.8, "marker": "x", "markevery": [-1]}
    lost = [outcome for outcome in outcomes if outcome.diverged_at is not None and outcome.curve]
    for at in drawing.evenly(len(lost), LOST):
        points = [*lost[at].curve, (lost[at].diverged_at, lost[at].curve[-1][1])]
        axes.plot(*zip(*points, strict=True), **thin)


def _looks(cells: Iterable[Cell], table: Sequence[Row]) -> dict[str, Look]:
    """Of the schemes that are drawn: all, or those that the ``table`` of many lets be chosen."""
    chosen = thinning.drawn(table)
    looks = drawing.looks(cells, chosen)
    return {init: look for init, look in looks.items() if init in chosen} if table else looks


def _with_others(key: str, table: Sequence[Row]) -> str:
    said = thinning.sentence(table)
    return f"{key}; light grey: means of the others. Shown are {said}" if said else key


def _in_grey(axes: Axes, at: Sequence[int], values: Values) -> None:
    if values.size:
        axes.plot(at, _mean(values), color="0.8", linewidth=0.9, zorder=1)


def _mean(values: Values) -> Values:
    known = np.isfinite(values)
    n = known.sum(0)
    return np.where(n > 0, np.where(known, values / np.maximum(n, 1), 0).sum(0), np.nan)


def _mean_and_band(axes: Axes, at: Sequence[int], values: Values, look: Look) -> None:
    """``values``: (seeds, len(at)), NaN where there is none."""
    known, mean = np.isfinite(values), _mean(values)
    low, high = (
        np.where(known.any(0), of, np.nan)
        for of in (
            np.where(known, values, np.inf).min(0),
            np.where(known, values, -np.inf).max(0),
        )
    )
    axes.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0)
    every = max(1, len(at) // 6)
    # Lines that coincide show both marks.
    first = drawing.MARKS.find(look.get("marker", "")) % every
    axes.plot(at, mean, linewidth=1.6, markersize=5, markevery=(first, every), **look)


def _curves_key(drawn: Iterable[Sequence[Outcome]], unit: str = "seed") -> str:
    counts = (sum(one.diverged_at is not None for one in outcomes) for outcomes in drawn)
    lost = max(counts, default=0)
    key = BANDS_KEY.format(unit)
    if not lost:
        return key
    some = f", of which up to {LOST} of a scheme are drawn" if lost > LOST else ""
    return f"{key}; ×: a {unit} diverged{some}"


def _fewer(init: str, outcomes: Outcomes) -> str:
    """Of a scheme whose seeds did not all finish, how many did; by activation, of several."""
    several = len(by_activation(outcomes)) > 1
    told = []
    for cell, of in outcomes.items():
        n = len(_accuracies(of))
        if cell.init == init and n < len(of):
            told.append(f"{cell.activation} n = {n}" if several else f"n = {n}")
    return f" ({', '.join(told)})" if told else ""


def _accuracies(outcomes: Sequence[Outcome]) -> list[float]:
    return list(finished(outcomes).values())


def _curves(outcomes: Sequence[Outcome]) -> list[float]:
    return [accuracy for outcome in outcomes for _, accuracy in outcome.curve]


def _accuracy_row(axes: Axes, at: float, dots: Sequence[float], row: Row, look: Look) -> None:
    below = at + np.linspace(0.12, 0.34, len(dots))  # in the order of the seeds
    axes.plot(dots, below, "o", color=look["color"], markersize=4, alpha=0.7, markeredgewidth=0)
    above = at - 0.15
    if row.low is not None and row.high is not None:
        axes.hlines(above, row.low, row.high, color="black", linewidth=1.6)
    if row.mean is not None:
        axes.plot([row.mean], [above], **{**look, "linestyle": "none", "markersize": 8})

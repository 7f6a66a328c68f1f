"""The figures of a range of learning rates: what each rate came to, and what a scheme bears.

Plain values in, a matplotlib figure out, nothing shown or saved.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from initflow.reporting import drawing
from initflow.reporting.drawing import Look
from initflow.reporting.pictures.rates_statistics import (
    Coordinate,
    CoordinateSlope,
    Kind,
    Row,
    Slope,
    Spread,
    Tried,
    curve,
)

if TYPE_CHECKING:
    from initflow.reporting.drawing import Axes, Figure

SIZES = 3  # of networks, at most, that have panels of their own
LAYERS = 4  # of the coordinate check
ASIDE = 1.03  # the factor between the places of two schemes at one size
HIGHEST = 4.0  # losses above so many times that of the start are cut off
RATES_KEY = (
    "learning rate; line: mean over the seeds, shaded: from the lowest to the highest; below, bar: "
    "within a point of the best, filled: largest stable rate with its 95 % interval, hollow: "
    "predicted from the curvature at the start"
)
STABLE_KEY = (
    "filled, solid: the largest stable rate over the seeds with its 95 % interval; hollow, dashed: "
    "predicted from the curvature at the start; after the name the slopes, measured and predicted"
)
COORDINATES_KEY = (
    "width; root mean square of how far the pre-activations are from those of the untrained "
    "network, mean over the seeds, after the first updates, the last one darkest"
)


def rates(tried: Sequence[Tried], rows: Sequence[Row], over: str, title: str) -> Figure:
    """Validation accuracy and loss against the rate, and below them what each scheme bears.

    A column for each size of the networks, of many for the first, a middle one and the last.
    """
    kinds = list(dict.fromkeys(row.group.kind for row in rows))
    looks = kind_looks(kinds)
    sizes = list(dict.fromkeys(row.group.size for row in rows))
    shown = [sizes[at] for at in drawing.evenly(len(sizes), SIZES)]
    below = 0.35 + 0.22 * len(kinds)
    heights = [2.3, 1.8, below]
    figure = drawing.wide_figure(1.1 + sum(heights), title)
    grid = figure.subplots(
        3, len(shown), squeeze=False, sharex=True, sharey="row", height_ratios=heights
    )
    ends = [one.lr for one in tried]
    for (top, middle, bottom), size in zip(grid.T, shown, strict=True):
        if size is not None:
            top.set_title(f"{over} {size}", fontsize=drawing.MIDDLE)
        for kind in kinds:
            of = [one for one in tried if one.group == (kind, size)]
            _curve(top, of, lambda one: one.accuracy, looks[kind])
            _curve(middle, of, lambda one: one.loss, looks[kind])
        of_size = [row for row in rows if row.group.size == size]
        for at, kind in enumerate(kinds):
            row = next((row for row in of_size if row.group.kind == kind), None)
            if row:
                _bears(bottom, at, row, looks[kind], (min(ends), max(ends)))
        for axes in (top, middle, bottom):
            axes.tick_params(labelsize=drawing.SMALL)
            drawing.tidy(axes)
    _axes_of_rates(grid, tried, kinds)
    figure.supxlabel(drawing.wrapped(RATES_KEY, 12 * drawing.WIDTH), fontsize=drawing.SMALL)
    return figure


def kind_looks(kinds: Sequence[Kind]) -> dict[Kind, Look]:
    """A colour for each scheme, of several parametrizations each with dashes of its own."""
    inits = list(dict.fromkeys(kind.init for kind in kinds))
    own = list(dict.fromkeys(kind.parametrization for kind in kinds))
    found: dict[Kind, Look] = {}
    for kind in kinds:
        at = inits.index(kind.init)
        if len(inits) == 1:
            found[kind] = drawing.look(own.index(kind.parametrization))
            continue
        dashes = drawing.DASHES[own.index(kind.parametrization) % len(drawing.DASHES)]
        found[kind] = {**drawing.look(at), "linestyle": dashes}
    return found


def _curve(
    axes: Axes, tried: Sequence[Tried], value: Callable[[Tried], float | None], look: Look
) -> None:
    """The mean over the seeds at each rate within its band, where no seed diverged."""
    points = curve(tried, value)
    lrs = sorted({one.lr for one in tried})
    means, low, high = (
        [pick(points[lr]) if lr in points else np.nan for lr in lrs]
        for pick in (statistics.fmean, min, max)
    )
    axes.plot(lrs, means, linewidth=1.6, markersize=3.5, **look)
    axes.fill_between(lrs, low, high, color=look["color"], alpha=0.18, linewidth=0)


def _axes_of_rates(
    grid: npt.NDArray[np.object_], tried: Sequence[Tried], kinds: Sequence[Kind]
) -> None:
    """What the axes show, and what stands beside them."""
    accuracies = [one.accuracy for one in tried if one.accuracy is not None]
    part = drawing.range_of(accuracies)
    top, middle, bottom = (across[0] for across in grid)
    for axes in grid[0]:
        drawing.accuracy_axis(axes, "y", part)
    losses = [one.loss for one in tried if one.loss]
    starts = [one.start for one in tried if np.isfinite(one.start)]
    if losses:
        most = HIGHEST * max(statistics.median(starts), min(losses))
        middle.set_ylim(0.8 * min(losses), most)
        drawing.log_scale(middle)
    top.set_ylabel("validation accuracy", fontsize=drawing.MIDDLE)
    middle.set_ylabel("validation loss", fontsize=drawing.MIDDLE)
    names = [drawing.wrapped(str(kind), 22) for kind in kinds]
    bottom.set_yticks(range(len(kinds)), names)
    bottom.set_ylim(len(kinds) - 0.5, -0.5)
    lrs = [one.lr for one in tried]
    for axes in grid[2]:
        axes.set_xlim(min(lrs) / 1.3, max(lrs) * 1.3)
        drawing.log_scale(axes, name="x")
        if len(grid[2]) > 1:  # there is room for a few
            powers = range(math.ceil(math.log10(min(lrs))), math.floor(math.log10(max(lrs))) + 1)
            shown = [10.0 ** powers[at] for at in drawing.evenly(len(powers), 3)]
            axes.set_xticks(shown, [f"{lr:g}" for lr in shown])


def _bears(axes: Axes, at: int, row: Row, look: Look, ends: tuple[float, float]) -> None:
    """The line of a scheme: where it does well, what is stable, and what was predicted."""
    color = look["color"]
    if row.within:
        axes.hlines(at, *row.within, color=color, linewidth=7, alpha=0.3)
    if row.stable:
        if row.stable.low is not None and row.stable.high is not None:
            axes.hlines(at, row.stable.low, row.stable.high, color="black", linewidth=1.2)
        axes.plot([row.stable.mean], [at], **_mark(look, color))
    if row.predicted:
        place = float(np.clip(row.predicted.mean, ends[0] / 1.25, ends[1] * 1.25))
        axes.plot([place], [at], **_mark(look, "white"))
        if place != row.predicted.mean:  # beyond the range
            away = "◂" if place > row.predicted.mean else "▸"
            axes.annotate(
                f"{away} {row.predicted.mean:.0e}" if away == "▸" else f"{row.predicted.mean:.0e}",
                (place, at),
                textcoords="offset points",
                xytext=(7 if away == "◂" else -7, 0),
                ha="left" if away == "◂" else "right",
                va="center",
                fontsize=drawing.SMALL - 2,
            )


def _mark(look: Look, inside: str) -> Look:
    return {
        "marker": look["marker"],
        "linestyle": "none",
        "markersize": 6.5,
        "color": look["color"],
        "markerfacecolor": inside,
        "markeredgewidth": 1.3,
        "clip_on": False,
        "zorder": 4,
    }


def stable_rates(rows: Sequence[Row], slopes: Sequence[Slope], over: str, title: str) -> Figure:
    """The largest stable rate against depth or width, with theory's, on logarithmic axes."""
    looks = kind_looks([slope.kind for slope in slopes])
    figure = drawing.wide_figure(4.6, title)
    axes = figure.subplots()
    for at, slope in enumerate(slopes):
        look, aside = looks[slope.kind], ASIDE ** (at - (len(slopes) - 1) / 2)
        of = [row for row in rows if row.group.kind == slope.kind]
        measured = {row.group.size: row.stable for row in of if row.stable}
        predicted = {row.group.size: row.predicted for row in of if row.predicted}
        _by_size(axes, measured, aside, {**look, "linestyle": "-"})
        hollow = {**look, "linestyle": "--", "markerfacecolor": "white"}
        _by_size(axes, predicted, aside, hollow, faint=True)
    sizes = sorted({row.group.size for row in rows if row.group.size})
    axes.set_xlabel(over, fontsize=drawing.MIDDLE)
    axes.set_ylabel("learning rate", fontsize=drawing.MIDDLE)
    drawing.log_scale(axes)
    axes.set_xscale("log")
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.minorticks_off()
    axes.tick_params(labelsize=drawing.SMALL)
    drawing.tidy(axes)
    labels = [_with_slopes(slope) for slope in slopes]
    drawing.legend(figure, [looks[slope.kind] for slope in slopes], labels, STABLE_KEY)
    return figure


def _by_size(
    axes: Axes,
    points: Mapping[int | None, Spread],
    aside: float,
    look: Look,
    *,
    faint: bool = False,
) -> None:
    """A line over sizes, each ``aside`` by a factor, so that intervals stand beside each other."""
    spreads = [points[size] for size in points if size]
    sizes = [size * aside for size in points if size]
    means = [one.mean for one in spreads]
    ends = [
        (one.mean if one.low is None else one.low, one.mean if one.high is None else one.high)
        for one in spreads
    ]
    axes.plot(sizes, means, markersize=6, linewidth=1.3, alpha=0.75 if faint else 1.0, **look)
    if sizes and not faint:
        axes.vlines(sizes, *zip(*ends, strict=True), color=look["color"], linewidth=1.2)


def _with_slopes(slope: Slope) -> str:
    """``he: −0.91 ± 0.1, predicted −0.8 ± 0.2``."""

    def told(spread: Spread | None) -> str:
        if spread is None:
            return "unknown"
        text = f"{spread.mean:.2f}".replace("-", "−")
        if spread.low is None or spread.high is None:
            return text
        return f"{text} ± {(spread.high - spread.low) / 2:.2f}"

    predicted = f", predicted {told(slope.predicted)}" if slope.predicted else ""
    return f"{slope.kind}: {told(slope.measured)}{predicted}"


def coordinates(
    found: Sequence[Coordinate], slopes: Sequence[CoordinateSlope], title: str
) -> Figure:
    """What the first updates change, against the width: a row for each kind, a panel each layer."""
    kinds = list(dict.fromkeys(one.kind for one in found))
    layers = list(dict.fromkeys(one.layer for one in found))
    shown = [layers[at] for at in drawing.evenly(len(layers), LAYERS)]
    figure = drawing.wide_figure(1.0 + 2.1 * len(kinds), title)
    grid = figure.subplots(len(kinds), len(shown), squeeze=False, sharex=True, sharey=True)
    steps = sorted({one.step for one in found if one.step})
    said = {(one.kind, one.layer): one for one in slopes}
    for at, (across, kind) in enumerate(zip(grid, kinds, strict=True)):
        for axes, layer in zip(across, shown, strict=True):
            for step in steps:
                of = [o for o in found if (o.kind, o.layer, o.step) == (kind, layer, step)]
                _over_widths(axes, of, steps.index(step) / max(1, len(steps) - 1), at)
            slope = said.get((kind, layer))
            if slope:
                text = f"{layer}: {slope.verdict}, {slope.slope.mean:.2f}"
                axes.set_title(text.replace("-", "−"), fontsize=drawing.SMALL)
        across[0].set_ylabel(
            drawing.wrapped(f"{kind.init} {kind.parametrization}", 24), fontsize=drawing.MIDDLE
        )
    widths = sorted({one.width for one in found})
    drawing.log_scale(grid[0][0])
    for axes in grid.flat:
        axes.set_xscale("log")
        axes.set_xticks(*_few(widths))
        axes.minorticks_off()
        axes.tick_params(labelsize=drawing.SMALL - 1)
        drawing.tidy(axes)
    figure.supxlabel(drawing.wrapped(COORDINATES_KEY, 12 * drawing.WIDTH), fontsize=drawing.SMALL)
    return figure


def _few(widths: Sequence[int]) -> tuple[list[int], list[str]]:
    shown = [widths[at] for at in drawing.evenly(len(widths), 3)]
    return shown, list(map(str, shown))


def _over_widths(axes: Axes, found: Sequence[Coordinate], share: float, color: int) -> None:
    """The mean over the seeds at each width; later updates are darker."""
    by_width: dict[int, list[float]] = {}
    for one in sorted(found, key=lambda one: one.width):
        if one.change > 0:
            by_width.setdefault(one.width, []).append(one.change)
    means = [statistics.fmean(values) for values in by_width.values()]
    look = {**drawing.look(color), "alpha": 0.3 + 0.7 * share}
    axes.plot(list(by_width), means, linewidth=1.4, markersize=4, **look)

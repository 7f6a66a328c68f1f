"""The figures of a tuning: what the trials of each scheme came to, and what it changed.

Plain values in, a matplotlib figure out, nothing shown or saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from initflow.reporting import drawing
from initflow.reporting.drawing import Look
from initflow.reporting.seed_statistics import Cell, Row, by_activation
from initflow.reporting.trials import WITHIN, Trial, best, tolerance

if TYPE_CHECKING:
    from initflow.reporting.drawing import Axes, Figure

PANEL = 3.2  # inches, of the trials with one activation function
LEAST_FACTOR = 5.0  # from end to end of the rates' axis: two of 1, 2, 5, 10 lie in it
MANY = 150  # trials, which are drawn smaller
TRIALS_KEY = (
    "learning rate; filled: finished trials, hollow: pruned, ringed: a scheme's best; below, "
    f"bar: finished within {100 * WITHIN:g} point of it, ×: diverged"
)
PAIRS_KEY = (
    "test accuracy; hollow: untuned, filled: tuned; the mean over the seeds with its 95 % interval"
)
FAINT = "#595959"  # of what is compared with, dark enough to be read


def rates_and_accuracies(trials: Mapping[Cell, Sequence[Trial]], title: str) -> Figure:
    """Learning rates against the best validation accuracy, a mark for each trial.

    Below them each scheme has a line: a bar over the rates that came within one point of its
    best, which is ringed, a cross at each rate that diverged, and the best in numbers. There is
    one such panel for each activation function. A trial without an accuracy that did not diverge
    has no mark; failed ones are counted in the line.
    """
    looks = drawing.looks(trials)
    names = {cell: drawing.wrapped(cell.init, 22) for cell in trials}
    high = {cell: 0.1 + 0.17 * (1 + name.count("\n")) for cell, name in names.items()}  # inches
    blocks = by_activation(trials)
    heights = [
        height for block in blocks.values() for height in (PANEL, sum(high[cell] for cell in block))
    ]
    titled = len(blocks) > 1
    figure = drawing.wide_figure(1.0 + sum(heights) + 0.3 * titled * len(blocks), title)
    grid = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    part = drawing.range_of([accuracy for of in trials.values() for _, accuracy in _points(of)])
    for axes, below, (activation, block) in zip(grid[::2], grid[1::2], blocks.items(), strict=True):
        axes.set_title(activation if titled else "", fontsize=drawing.MIDDLE, loc="left")
        axes.set_ylabel("best validation accuracy", fontsize=drawing.MIDDLE)
        places = drawing.middles(high[cell] for cell in block)
        for at, cell in zip(places, block, strict=True):
            _marks(axes, trials[cell], looks[cell.init])
            _line(below, at, trials[cell], looks[cell.init])
        drawing.accuracy_axis(axes, "y", part)
        below.set_yticks(places, [names[cell] for cell in block])
        below.set_ylim(sum(high[cell] for cell in block), 0)  # downwards, as in a table
        below.tick_params(labelsize=drawing.SMALL)
        drawing.tidy(below)
    _rate_axis(grid[0], [trial.lr for of in trials.values() for trial in of])
    figure.supxlabel(drawing.wrapped(TRIALS_KEY, 12 * drawing.WIDTH), fontsize=drawing.SMALL)
    return figure


def _points(
    trials: Sequence[Trial], outcomes: Sequence[str] = ("finished", "pruned")
) -> list[tuple[float, float]]:
    """The rate and the accuracy of those that have one: of a diverged trial it says nothing."""
    return [
        (trial.lr, trial.accuracy)
        for trial in trials
        if trial.outcome in outcomes and trial.accuracy is not None
    ]


def _marks(axes: Axes, trials: Sequence[Trial], look: Look) -> None:
    """Each trial at its rate and accuracy, the best over all others."""
    size = 4.5 if len(trials) < MANY else 3.5
    for outcome, options in (
        ("pruned", {"alpha": 0.4, "markerfacecolor": "none", "zorder": 2}),
        ("finished", {"alpha": 0.65, "markeredgewidth": 0, "zorder": 3}),
    ):
        points = np.array(_points(trials, [outcome])).reshape(-1, 2)
        axes.plot(*points.T, **{**look, "linestyle": "none", "markersize": size, **options})
    top = best(trials)
    if top is not None and top.accuracy is not None:
        axes.plot([top.lr], [top.accuracy], **_ringed(look), zorder=4)


def _line(axes: Axes, at: float, trials: Sequence[Trial], look: Look) -> None:
    """The line of a scheme: where it does well, where it diverges, and its best in numbers."""
    lost = [trial.lr for trial in trials if trial.outcome == "diverged"]
    axes.plot(lost, [at] * len(lost), "x", color=look["color"], markersize=4.5, alpha=0.7)
    top, rates = best(trials), tolerance(trials)
    if top is not None and rates is not None:
        axes.hlines(at, *rates, color=look["color"], linewidth=4, alpha=0.45)
        axes.plot([top.lr], [at], **_ringed(look))
    drawing.beside(axes, at, _in_words(trials))


def _ringed(look: Look) -> Look:
    return {
        **look,
        "linestyle": "none",
        "markersize": 7.5,
        "markeredgecolor": "black",
        "markeredgewidth": 1.1,
    }


def _in_words(trials: Sequence[Trial]) -> str:
    top = best(trials)
    if top is None or top.accuracy is None:
        told = "none finished" if trials else "no trial"
    else:
        told = f"{top.accuracy:.2%} at {top.lr:.2g}"
    failed = sum(trial.outcome == "failed" for trial in trials)
    return f"{told}, {failed} failed" if failed else told


def _rate_axis(axes: Axes, rates: Sequence[float]) -> None:
    """Logarithmic, with room around the rates, also if all are equal or there is none."""
    places = np.log10(rates or [0.1])
    low, high = places.min(), places.max()
    margin = max(0.04 * (high - low), (np.log10(LEAST_FACTOR) - (high - low)) / 2)
    axes.set_xlim(10 ** (low - margin), 10 ** (high + margin))
    drawing.log_scale(axes, name="x")


def tuned_and_untuned(pairs: Mapping[Cell, tuple[Row, Row]], title: str) -> Figure:
    """Final test accuracies of each scheme, (untuned, tuned), joined by an arrow.

    Each is the mean with its 95 % interval, the tuned one filled and below. Where some are so far
    below the others that those could not be told apart, the axis is broken between them.
    """
    looks = drawing.looks(pairs)
    parts = drawing.accuracy_parts([], [row for pair in pairs.values() for row in pair])
    figure, lines = drawing.accuracy_lines(pairs, parts, title, PAIRS_KEY, least=2)
    for cell, (untuned, tuned) in pairs.items():
        at, across = lines[cell]
        color = looks[cell.init]["color"]
        look = {**looks[cell.init], "linestyle": "none", "markersize": 8, "clip_on": False}
        ends = []
        for row, height, inside, dark in (
            (untuned, at - 0.2, "white", FAINT),
            (tuned, at + 0.2, color, "black"),
        ):
            for axes, (low, high) in zip(across, parts, strict=True):
                if row.low is not None and row.high is not None:
                    axes.hlines(height, row.low, row.high, color=dark, linewidth=1.6, zorder=1)
                if row.mean is not None and low <= row.mean <= high:
                    axes.plot([row.mean], [height], **{**look, "markerfacecolor": inside})
                    ends.append((axes, (row.mean, height)))
            drawing.beside(across[-1], height, drawing.told(row) or "no seed", dark)
        if len(ends) == 2:
            _arrow(*ends, color=color)
    return figure


End = tuple["Axes", tuple[float, float]]  # of an arrow: a point of these axes


def _arrow(start: End, end: End, *, color: str) -> None:
    """Between the marks at two points, over the break of the axis if it lies between them."""
    (tail_axes, tail), (head_axes, head) = start, end
    # What is drawn last covers what lies below it, an arrow too.
    last = max(tail_axes, head_axes, key=lambda axes: axes.get_position().x0)
    arrow = last.annotate(
        "",
        xy=head,
        xycoords=head_axes.transData,
        xytext=tail,
        textcoords=tail_axes.transData,
        annotation_clip=False,
        arrowprops={"arrowstyle": "->", "color": color, "shrinkA": 5, "shrinkB": 6},
    )
    arrow.set_in_layout(False)  # it may start in other axes, which are not to make room for it

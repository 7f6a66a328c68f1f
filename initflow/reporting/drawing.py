"""The look that all figures share: colours and marks, axes, legends, PNG files.

Figures are made and saved here alone; what is drawn in them is decided in the modules of figures.
matplotlib is imported when something is drawn, as no training waits for it.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from initflow.reporting.formats import short
from initflow.reporting.seed_statistics import ACCURACY, Cell, Measure, Row, by_activation

if TYPE_CHECKING:
    # By their names again, as types for those that draw with this module.
    from matplotlib.axes import Axes as Axes  # noqa: PLC0414
    from matplotlib.figure import Figure as Figure  # noqa: PLC0414

Values = npt.NDArray[np.float64]
Look = Mapping[str, Any]  # of a line

# Okabe and Ito's palette, told apart by colour-blind readers too; for schemes, which are told
# apart by their marks as well.
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7f7f7f", "#000000")
MARKS = "osD^vP*X"
DASHES = ("-", "--", ":", "-.")  # each for one round of the colours
LEAST, MOST = 1e-250, 1e250  # that an axis with margins can show
DPI = 150
# The figures of several seeds are read as thumbnails, 400 pixels wide: always of one width, so
# that their letters do not shrink with what there is to show.
WIDTH = 7.2  # inches
SMALL, MIDDLE = 9.5, 11  # points
LEAST_ERROR = 1e-4  # one of MNIST's test images: what is nearer to 100 % is drawn there
LANDMARKS = (0.1, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995)
LEAST_SPAN = 0.02  # powers of ten of the error that an axis shows, even if all are equal
WIDE_GAP = 0.5  # in the same: the errors below it are three times those above


def empty_figure(
    width: float, height: float, *, layout: Literal["constrained"] | None = None
) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout=layout)


def figure(width: float, height: float, title: str) -> Figure:
    figure = empty_figure(width, height, layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure


def wide_figure(height: float, title: str) -> Figure:
    """As wide as all that are read as thumbnails, its title in as many lines as it takes."""
    return figure(WIDTH, height, wrapped(title, 10 * WIDTH))


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def log_scale(axes: Axes, unit: str = "", factor: float = 1.0, *, name: str = "y") -> None:
    """A logarithmic axis that is labelled with plain numbers: 0.1, not 10⁻¹."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axes, f"set_{name}scale")("log")
    low, high = getattr(axes, f"get_{name}lim")()
    digits = (1.0,) if math.log10(high) - math.log10(low) > 3 else (1.0, 2.0, 5.0)
    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda at, _: f"{factor * at:g}{unit}"))
    axis.set_minor_formatter(NullFormatter())


def shows_more_than_0(axes: Axes) -> bool:
    """Whether a line has anything that a logarithmic axis can show."""
    return any((np.asarray(line.get_ydata(), float) > 0).any() for line in axes.lines)


def few_ticks(axes: Axes, most: int, *, whole: bool = False) -> None:
    """At most about ``most`` steps on the x axis, or, if ``whole``, only at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(most, integer=whole))


def evenly(n: int, most: int) -> list[int]:
    """At most ``most`` of the indices below ``n``, evenly chosen, the first and last among them."""
    at = range(n) if n <= most else np.linspace(0, n - 1, most).round()
    return [int(i) for i in at]


def ticks(labels: Sequence[object], most: int) -> tuple[list[int], list[str]]:
    """Where, counted from 0, at most ``most`` of the ``labels`` stand, and those labels."""
    at = evenly(len(labels), most)
    return at, [str(labels[i]) for i in at]


def positive(values: Values | Sequence[float | None]) -> Values:
    """NaN in place of what no logarithmic axis can show."""
    array = np.array(values, dtype=float)
    return np.where((array > LEAST) & (array < MOST), array, np.nan)


def layer_axes(axes: Axes, layers: Sequence[str]) -> None:
    """Layers from left to right; what is drawn must be there already."""
    if shows_more_than_0(axes):
        log_scale(axes)
    axes.set_xticks(*ticks(layers, 6))
    axes.margins(x=0.08)
    tidy(axes)


def shaded(
    axes: Axes,
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    values: Values,
    *,
    colours: str,
    limits: tuple[float, float],
    label: str,
) -> None:
    """``values`` (y, x) as logarithmic colours of a map, from the lower limit to the upper one.

    What is beyond them has the colour at the end; what is NaN has none. A bar above the axes,
    with a ``label``, tells them.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shown = np.where(np.isnan(values), np.nan, np.clip(values, *limits))
    low, high = limits
    across, up = np.asarray(x), np.asarray(y)
    mesh = axes.pcolormesh(
        across,
        up,
        np.ma.masked_invalid(shown),
        cmap=colours,
        norm=LogNorm(low, high),
        shading="nearest",
        rasterized=True,
    )
    axes.set_xlim(across.min(), across.max())
    axes.set_ylim(up.min(), up.max())
    bar = axes.figure.colorbar(mesh, ax=axes, location="top", aspect=30)
    bar.set_label(label, fontsize=SMALL)
    bar.ax.xaxis.set_major_locator(LogLocator(numticks=6))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}"))
    bar.ax.xaxis.set_minor_formatter(NullFormatter())
    bar.ax.tick_params(labelsize=SMALL)


def contours(
    axes: Axes, x: npt.ArrayLike, y: npt.ArrayLike, values: Values, *, levels: Sequence[float]
) -> None:
    """White lines at those of the ``levels`` that are met, each with its number."""
    shown = np.where(np.isfinite(values), values, np.nan)
    met = [at for at in levels if np.nanmin(shown) < at < np.nanmax(shown)]
    if met:
        lines = axes.contour(
            np.asarray(x), np.asarray(y), shown, levels=met, colors="white", linewidths=0.9
        )
        axes.clabel(lines, fmt="%g", fontsize=SMALL)


def png(figure: Figure) -> bytes:
    """The content of a PNG file, in the figure's own pixels."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figure.dpi)
    return file.getvalue()


def png_by_pyplot(draw: Callable[[], Axes | npt.NDArray[np.object_]]) -> bytes:
    """The content of a PNG file of the whole figure that holds the axes that ``draw`` makes.

    One axes or an array of them, made by pyplot, which would keep their figure for ever; and
    whatever style ``draw`` sets for all figures is gone with it.
    """
    from matplotlib import pyplot as plt

    file = io.BytesIO()
    with plt.rc_context():
        figure = np.ravel(np.asarray(draw(), dtype=object))[0].get_figure()
        try:
            # Who made it knows nothing of the size of its labels: none is to be cut off.
            figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight")
        finally:
            plt.close(figure)
    return file.getvalue()


def looks(cells: Iterable[Cell], first: Iterable[str] = ()) -> dict[str, Look]:
    """How each scheme is drawn, whatever the activation function.

    Those that are ``first`` have the first colours.
    """
    schemes = list(dict.fromkeys(cell.init for cell in cells))
    order = dict.fromkeys([*first, *schemes])
    found = {init: look(at) for at, init in enumerate(order)}
    return {init: found[init] for init in schemes}


def look(at: int) -> Look:
    """Colour, dashes and mark; when the colours come round again, the others change."""
    color, again = CYCLE[at % len(CYCLE)], at // len(CYCLE)
    return {
        "color": color,
        "linestyle": DASHES[again % len(DASHES)],
        "marker": MARKS[(at + again) % len(MARKS)],
        "markerfacecolor": "white" if again % 2 else color,
    }


def legend(figure: Figure, looks: Sequence[Look], labels: Sequence[str], key: str) -> None:
    """A line for each look, below all panels, which keep their height."""
    from matplotlib.lines import Line2D

    texts = [wrapped(label, 64) for label in labels]
    columns, height = _fitting(texts)
    figure.set_figheight(figure.get_figheight() + 0.3 + 0.2 * height)
    figure.legend(
        [Line2D([], [], **look) for look in looks],
        texts,
        title=wrapped(key, 12 * WIDTH),
        title_fontsize=SMALL,
        fontsize=MIDDLE,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=2.6,  # long enough for its dashes
        columnspacing=1.4,
    )


def _fitting(texts: Sequence[str]) -> tuple[int, int]:
    """The most columns of a legend that fit beside each other, and how many lines high it is."""
    for columns in (4, 3, 2, 1):
        parts = [list(part) for part in np.array_split(texts, columns)]
        widest = [
            max((len(line) for text in part for line in text.split("\n")), default=0)
            for part in parts
        ]
        if sum(widest) + 7 * columns <= 10 * WIDTH:
            break
    return min(columns, max(len(texts), 1)), max("\n".join(part).count("\n") + 1 for part in parts)


class _Wrapper(textwrap.TextWrapper):
    """Breaks after what parts a scheme's spec too: plugin/scheme.py:function:gain=1,mode=fan_in."""

    wordsep_re = re.compile(r"(\s+|(?<=[/:,]))")


def wrapped(text: str, columns: float) -> str:
    """In lines, and with every $ as itself instead of the start of a formula."""
    return "\n".join(_Wrapper(int(columns)).wrap(text)).replace("$", r"\$")


def range_of(accuracies: Sequence[float]) -> tuple[float, float]:
    """From the lowest to the highest, and from guessing to 99 % without any."""
    return min(accuracies, default=0.1), max(accuracies, default=0.99)


def accuracy_axis(
    axes: Axes, name: str, part: tuple[float, float], *, narrow: bool = False
) -> None:
    """Accuracies, stretched towards 100 %: equal distances are equal factors of the error.

    So one axis shows both what is no better than guessing and what differs at 98 %. A ``narrow``
    one has room for two labels.
    """
    from matplotlib.ticker import MaxNLocator

    start, end = _stretched(part)
    margin = max(0.05 * (end - start), (LEAST_SPAN - (end - start)) / 2)
    low, high = _unstretched([start - margin, end + margin])
    shown = [mark for mark in LANDMARKS if low <= mark <= high]
    if len(shown) < 3:
        locator = MaxNLocator(2 if narrow else 5, steps=[1, 2, 2.5, 5, 10])
        shown = [at for at in locator.tick_values(low, high) if low <= at <= high]
    if narrow:
        shown = [shown[at] for at in evenly(len(shown), 2)]
    getattr(axes, f"set_{name}scale")("function", functions=(_stretched, _unstretched))
    getattr(axes, f"set_{name}lim")(low, high)
    getattr(axes, f"set_{name}ticks")(shown, [f"{100 * at:.5g}%" for at in shown])
    axes.tick_params(labelsize=SMALL)
    tidy(axes)


def value_axis(
    axes: Axes,
    name: str,
    part: tuple[float, float],
    measure: Measure,
    *,
    narrow: bool = False,
) -> None:
    """One of shares that are the better the higher they are, or of other numbers.

    The latter is logarithmic where they are positive and go over a power of ten.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if measure.is_share and not measure.lower_is_better:
        accuracy_axis(axes, name, part, narrow=narrow)
        return
    low, high = part
    if low > 0 and high > 10 * low:
        getattr(axes, f"set_{name}lim")(low / 1.2, high * 1.2)
        percent = ("%", 100.0) if measure.is_share else ("", 1.0)
        log_scale(axes, *percent, name=name)
    else:
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
        getattr(axes, f"set_{name}lim")(low - margin, high + margin)
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(MaxNLocator(2 if narrow else 5))
        if measure.is_share:
            axis.set_major_formatter(FuncFormatter(lambda at, _: f"{100 * at:.5g}%"))
    axes.tick_params(labelsize=SMALL)
    tidy(axes)


def _stretched(accuracies: npt.ArrayLike) -> Values:
    error = np.maximum(1 - np.asarray(accuracies, dtype=float), LEAST_ERROR)
    return np.asarray(-np.log10(error))


def _unstretched(places: npt.ArrayLike) -> Values:
    return np.asarray(1 - 10 ** -np.asarray(places, dtype=float))


def accuracy_lines(
    cells: Iterable[Cell],
    parts: Sequence[tuple[float, float]],
    title: str,
    key: str,
    *,
    least: int = 1,
    measure: Measure = ACCURACY,
) -> tuple[Figure, dict[Cell, tuple[float, Sequence[Axes]]]]:
    """A line for each scheme over accuracies, in one block for each activation function.

    Also returned is where each cell stands: the middle of its line, on axes where the lowest line
    of the block has height 1, and these axes, one for each of ``parts``. A line is as high as its
    name, and as ``least`` lines of text.
    """
    blocks = by_activation(cells)
    names = {cell: wrapped(cell.init, 26) for block in blocks.values() for cell in block}
    high = {
        cell: 0.18 + 0.19 * max(1 + name.count("\n"), least) for cell, name in names.items()
    }  # inches
    heights = [sum(high[cell] for cell in block) for block in blocks.values()]
    figure = wide_figure(1.1 + sum(heights) + 0.35 * len(blocks), title)
    grid = figure.subplots(
        len(blocks),
        len(parts),
        squeeze=False,
        sharex="col",
        sharey="row",
        height_ratios=heights,
        width_ratios=[1, 4][-len(parts) :],
    )
    lines: dict[Cell, tuple[float, Sequence[Axes]]] = {}
    for across, (activation, block), height in zip(grid, blocks.items(), heights, strict=True):
        unit = min(high[cell] for cell in block)
        places = [at / unit - 0.5 for at in middles([high[cell] for cell in block])]
        for axes, part in zip(across, parts, strict=True):
            value_axis(axes, "x", part, measure, narrow=axes is not across[-1])
        across[0].set_title(activation, fontsize=MIDDLE, loc="left")
        across[0].set_yticks(places, [names[cell] for cell in block], fontsize=MIDDLE)
        across[0].set_ylim(height / unit - 0.5, -0.5)  # downwards, as in a table
        if len(parts) > 1:
            _break(*across)
        lines |= {cell: (at, across) for at, cell in zip(places, block, strict=True)}
    figure.supxlabel(key, fontsize=SMALL)
    return figure, lines


def middles(heights: Iterable[float]) -> list[float]:
    """Of things of these heights below each other, from 0 on."""
    heights = list(heights)
    return [end - height / 2 for end, height in zip(accumulate(heights), heights, strict=True)]


def accuracy_parts(
    accuracies: Sequence[float], rows: Sequence[Row], measure: Measure = ACCURACY
) -> list[tuple[float, float]]:
    """What an axis of ``accuracies`` and ``rows`` shows from where to where.

    Two parts, the axis being broken between them, where some are so far below the others that
    those could not be told apart.
    """
    means = [row.mean for row in rows if row.mean is not None]
    values = np.unique([*accuracies, *means])
    if len(values) == 0:
        return [range_of([])]
    if measure.lower_is_better or not measure.is_share:
        return [_near(values, rows)]
    places = _stretched(values)
    gaps = np.diff(places)
    # Broken before the last value alone, the axis would have nothing to tell apart there.
    at = int(gaps[:-1].argmax()) + 1 if len(gaps) > 1 else 0
    broken = at and gaps[at - 1] > max(WIDE_GAP, (places[-1] - places[0]) / 2)
    groups = np.split(values, [at]) if broken else [values]
    return [_with_intervals(group, rows) for group in groups]


def _with_intervals(group: Values, rows: Sequence[Row]) -> tuple[float, float]:
    """From the lowest to the highest, and the intervals' ends that lie near.

    The interval of two or three seeds can be so wide that nothing else could be told apart.
    """
    low, high = _stretched([group.min(), group.max()])
    reach = max(high - low, LEAST_SPAN)
    ends = np.array([end for row in rows for end in (row.low, row.high) if end is not None])
    places = _stretched(ends)
    near = ends[(places >= low - reach) & (places <= high + reach)]
    shown = np.concatenate([group, near])
    return float(shown.min()), float(shown.max())


def _near(values: Values, rows: Sequence[Row]) -> tuple[float, float]:
    """The same on a plain axis: ends of intervals beyond all values by their range are cut off."""
    low, high = float(values.min()), float(values.max())
    reach = high - low or abs(high) or 1.0
    ends = [end for row in rows for end in (row.low, row.high) if end is not None]
    near = [end for end in ends if low - reach <= end <= high + reach]
    return min([low, *near]), max([high, *near])


def _break(left: Axes, right: Axes) -> None:
    right.spines["left"].set_visible(False)
    right.tick_params(left=False)
    for axes, end in ((left, 1), (right, 0)):
        axes.text(end, 0, "/", transform=axes.transAxes, ha="center", va="center")


def told(row: Row, measure: Measure = ACCURACY) -> str:
    """The mean as a number, and how many seeds diverged."""
    mean = "" if row.mean is None else f"{row.mean:.2%}" if measure.is_share else short(row.mean)
    parts = [mean] if mean else []
    parts += [f"{row.diverged} diverged"] if row.diverged else []
    return ", ".join(parts)


def beside(axes: Axes, at: float, text: str, color: str = "black") -> None:
    """``text`` on the right of the axes, at a height."""
    across = axes.get_yaxis_transform()
    axes.text(1.02, at, text, color=color, transform=across, va="center", fontsize=SMALL)

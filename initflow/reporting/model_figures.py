"""Figures of any model: what was measured of its layers, which stand below each other.

A model has many layers, with long names: each is a line that can be read, as in a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from initflow.diagnostics.signals import Signals
from initflow.reporting import drawing
from initflow.reporting.drawing import Look
from initflow.theory.prediction import Interval, PredictedByTime, Prediction

if TYPE_CHECKING:
    from initflow.reporting.drawing import Axes, Figure

LINE = 0.165  # inches that a layer is high
LEAST = 1.2  # inches of all layers, also of few
AROUND = 1.9  # inches of the title, the axes' numbers and the legends
HIGHEST = 24.0  # inches of all layers; more of them stand closer, and not all are named
LONGEST = 42  # letters of a name; the end of it is what tells layers apart
ODD = "#D55E00"
BLUE, GREEN, RED, PINK = "#0072B2", "#009E73", "#D55E00", "#CC79A7"  # of the palette in ``drawing``
PANELS: Mapping[str, Mapping[str, tuple[str, Look]]] = {
    "signal, forward ↓": {
        "preactivation_second_moment": (
            "mean square of the pre-activations",
            {"color": BLUE, "marker": "o"},
        ),
        "signal_variance": (
            "their variance from input to input",
            {"color": BLUE, "marker": "o", "markerfacecolor": "white", "linestyle": ":"},
        ),
        "activation_second_moment": (
            "mean square of the activations",
            {"color": GREEN, "marker": "s"},
        ),
    },
    "gradient, backward ↑": {
        "gradient_second_moment": (
            "mean square by the pre-activations",
            {"color": RED, "marker": "o"},
        ),
        "weight_gradient_variance": (
            "variance by the weights",
            {"color": RED, "marker": "s", "markerfacecolor": "white", "linestyle": ":"},
        ),
    },
    "shares": {
        "dead_fraction": ("dead units", {"color": "black", "marker": "X", "linestyle": ""}),
        "saturated_fraction": (
            "saturated activations",
            {"color": PINK, "marker": "o", "markerfacecolor": "none", "linestyle": ""},
        ),
    },
}


def signals_by_layer(measured: Signals, title: str) -> Figure:
    """Signal, gradient, and dead and saturated shares: a panel each, a line of it each layer.

    The names of layers with values that are NaN or infinite are coloured. What is 0, or was not
    measured, has no mark.
    """
    layers = list(measured.layers)
    high = _height(len(layers))
    figure = drawing.figure(11.5, AROUND + high, drawing.wrapped(title, 110))
    grid = figure.subplots(1, len(PANELS), sharey=True, width_ratios=[5, 5, 3])
    for axes, (name, quantities) in zip(grid, PANELS.items(), strict=True):
        axes.set_title(name, fontsize=10)
        for quantity, (label, look) in quantities.items():
            values = np.array(measured.by_layer(quantity), dtype=float)
            if name != "shares":
                values = drawing.positive(values)
            _draw(axes, values, label, look)
        if name == "shares":
            axes.set_xlim(-0.06, 1.06)
            axes.set_xticks([0, 0.5, 1], ["0", "50%", "100%"])
        else:
            _logarithmic(axes)
        axes.tick_params(axis="x", labelsize=7.5)
        axes.tick_params(axis="y", length=0)
        drawing.tidy(axes)
        if axes.lines:
            below = (0.5, -0.3 / high)  # the axis's numbers
            axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=below)
        else:
            axes.set_xticks([])
            axes.set_xlabel("nothing measured that can be drawn", fontsize=8)
    _name_layers(grid[0], measured, high)
    return figure


KEY = "marks: measured; lines: predicted, where there is a rule"
MOMENTS = {
    "preactivation_second_moment": "signal, forward ↓\nmean square of the pre-activations",
    "gradient_second_moment": "gradient, backward ↑\nmean square by the pre-activations",
}


def schemes_by_layer(schemes: Mapping[str, tuple[Prediction, Signals]], title: str) -> Figure:
    """Signal and gradient in one model under several schemes, beside what is predicted.

    ``schemes`` holds what was predicted and measured by the scheme's name. What is 0, or was not
    measured, has no mark.
    """
    _, first = next(iter(schemes.values()))
    high = _height(len(first.layers) * max(1.0, len(schemes) / 3))
    figure = drawing.figure(11.5, AROUND + high, drawing.wrapped(title, 110))
    grid = figure.subplots(1, len(MOMENTS), sharey=True)
    for axes, (quantity, name) in zip(grid, MOMENTS.items(), strict=True):
        axes.set_title(name, fontsize=10)
        for nth, (scheme, (predicted, measured)) in enumerate(schemes.items()):
            at = np.arange(len(first.layers)) + _spread(len(schemes)) * (
                nth + 0.5 - len(schemes) / 2
            )
            color = drawing.CYCLE[nth % len(drawing.CYCLE)]
            mark = drawing.MARKS[nth % len(drawing.MARKS)]
            low, expected, high_end = (
                drawing.positive([getattr(interval, part) for interval in predicted[quantity]])
                for part in ("low", "expected", "high")
            )
            axes.hlines(at, low, high_end, color=color, alpha=0.3, linewidth=2.5)
            axes.plot(expected, at, color=color, linewidth=0.9)
            values = drawing.positive(measured.by_layer(quantity))
            axes.plot(values, at, mark, color=color, markersize=3.6, label=scheme)
        _logarithmic(axes)
        axes.tick_params(axis="x", labelsize=7.5)
        axes.tick_params(axis="y", length=0)
        drawing.tidy(axes)
    _name_layers(grid[0], first, high)
    handles, labels = grid[0].get_legend_handles_labels()
    intervals = (i for predicted, _ in schemes.values() for of in predicted.values() for i in of)
    key = _key(intervals, "bars")
    figure.legend(
        handles, labels, title=key, loc="outside lower center", ncols=8, frameon=False, fontsize=8
    )
    return figure


def _key(intervals: Iterable[Interval], shown: str) -> str:
    """What marks and lines are, and what is ``shown`` of the draws, if there are any."""
    has_draws = any(math.isfinite(interval.low) for interval in intervals)
    return f"{KEY}; {shown}: 95 % of further draws" if has_draws else KEY


OVER_TIME = {
    "hidden_second_moment": "signal, forward →\nmean square of the hidden state",
    "hidden_gradient_second_moment": "gradient, ← backward\nmean square by the hidden state",
}
MOST_MARKS = 60  # along a line
PANEL = 2.6  # inches that a layer is high
MOST_LAYERS = 8  # of which there is room


def through_time(schemes: Mapping[str, tuple[PredictedByTime, Signals]], title: str) -> Figure:
    """The hidden state and its gradient over the time steps, a row of two for each layer.

    ``schemes`` holds what was predicted of them by time, and what was measured, by the scheme's
    name. What is 0, or was not measured, has no mark. Of more than 8 layers some are drawn, the
    first and the last among them.
    """
    _, first = next(iter(schemes.values()))
    layers = list(first.by_time)
    layers = [layers[at] for at in drawing.evenly(len(layers), MOST_LAYERS)]
    figure = drawing.figure(11.5, AROUND + PANEL * len(layers), drawing.wrapped(title, 110))
    grid = figure.subplots(len(layers), len(OVER_TIME), sharex="row", squeeze=False)
    for axes, name in zip(grid[0], OVER_TIME.values(), strict=True):
        axes.set_title(name, fontsize=10)
    for layer, row in zip(layers, grid, strict=True):
        row[0].set_ylabel(_shortened(layer), fontsize=9)
        for axes, quantity in zip(row, OVER_TIME, strict=True):
            for nth, (scheme, (predicted, measured)) in enumerate(schemes.items()):
                values = measured.by_time.get(layer, {}).get(quantity, ())
                intervals = predicted.get(layer, {}).get(quantity, ())
                _draw_over_time(axes, values, intervals, nth, scheme)
            _logarithmic(axes, "y")
            axes.tick_params(labelsize=7.5)
            drawing.few_ticks(axes, 8, whole=True)
            drawing.tidy(axes)
    for axes in grid[-1]:
        axes.set_xlabel("time step", fontsize=8.5)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    every = (
        interval
        for predicted, _ in schemes.values()
        for quantities in predicted.values()
        for of in quantities.values()
        for interval in of
    )
    key = _key(every, "shaded")
    figure.legend(
        handles, labels, title=key, loc="outside lower center", ncols=8, frameon=False, fontsize=8
    )
    return figure


def _draw_over_time(
    axes: Axes,
    values: Sequence[float | None],
    intervals: Sequence[Interval],
    nth: int,
    scheme: str,
) -> None:
    """One of several schemes: the marks of what was measured, a line, and a band."""
    color = drawing.CYCLE[nth % len(drawing.CYCLE)]
    mark = drawing.MARKS[nth % len(drawing.MARKS)]
    low, expected, high = (
        drawing.positive([getattr(interval, part) for interval in intervals])
        for part in ("low", "expected", "high")
    )
    times = np.arange(1, len(intervals) + 1)
    axes.fill_between(times, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(times, expected, color=color, linewidth=1.1)
    every = max(1, len(values) // MOST_MARKS)
    look: Look = {"color": color, "markersize": 3.4, "markevery": every, "label": scheme}
    axes.plot(np.arange(1, len(values) + 1), drawing.positive(values), mark, **look)


def _spread(n: int) -> float:
    """How far apart ``n`` schemes stand on a layer's line."""
    return min(0.22, 0.7 / n)


def _height(lines: float) -> float:
    """Inches of so many layers, or lines."""
    return min(max(LINE * lines, LEAST), HIGHEST)


def _draw(axes: Axes, values: drawing.Values, label: str, look: Look) -> None:
    """A mark for each layer that has a value, joined from one to the next that has one."""
    at = np.arange(len(values))
    known = np.isfinite(values)
    if known.any():
        axes.plot(
            values[known],
            at[known],
            label=label,
            linewidth=0.9,
            markersize=4.2,
            markeredgewidth=0.8,
            **look,
        )


def _logarithmic(axes: Axes, name: str = "x") -> None:
    """Also where all values are nearly the same, with numbers that have room."""
    if not axes.lines:
        return
    axes.set(**{f"{name}scale": "log"})
    low, high = axes.get_xlim() if name == "x" else axes.get_ylim()
    if high / low < 20:
        middle = (low * high) ** 0.5
        axes.set(**{f"{name}lim": (middle / 20**0.5, middle * 20**0.5)})
    drawing.log_scale(axes, name=name)


def _name_layers(axes: Axes, measured: Signals, high: float) -> None:
    layers = list(measured.layers)
    at = drawing.evenly(len(layers), max(2, int(high / (0.75 * LINE))))
    axes.set_yticks(at, [_shortened(layers[i]) for i in at], fontsize=7.5)
    axes.set_ylim(len(layers) - 0.5, -0.5)  # downwards, as the signal goes
    odd = {key.split("/", 1)[1] for key in measured.nonfinite}
    for i, label in zip(at, axes.get_yticklabels(), strict=True):
        if layers[i] in odd:
            label.set_color(ODD)
    if odd:
        axes.set_ylabel("coloured: NaN or infinite values", color=ODD, fontsize=8)


def _shortened(name: str) -> str:
    short = name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"
    return short.replace("$", r"\$")

"""The figures of one network: plain values in, a matplotlib figure out, nothing shown or saved.

Untrained schemes side by side are among them: each is drawn as one network is, its prediction
with what was measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from initflow.diagnostics.signals import QUANTITIES, Signals
from initflow.initializers.activations import Activation
from initflow.reporting import drawing, model_figures
from initflow.reporting.drawing import Values
from initflow.reporting.seed_statistics import Cell
from initflow.theory.prediction import Interval, PredictedByTime, Prediction

if TYPE_CHECKING:
    from initflow.reporting.drawing import Axes, Figure

MOST_METRICS = 12  # that a figure has a panel for
History = Mapping[str, Sequence[tuple[int, float]]]

# Of the palette in ``drawing``: one colour a meaning.
COLORS = {
    "train": "#7f7f7f",
    "validation": "#E69F00",
    "test": "#0072B2",
    "before": "#0072B2",
    "after": "#D55E00",
}
STYLES: dict[str, dict[str, Any]] = {
    "before": {"fill": True, "alpha": 0.35},
    "after": {"linewidth": 1.5},
}
WEIGHT = re.compile(r"(^|\.)weight[^.]*$")  # also a recurrent layer's ``weight_ih_l0``
MAX_HISTOGRAMS = 8
MAX_RECEIVED = 24
FEW_LAYERS = 8
SHORT = 10  # letters of a name beside which there is room
LETTER = 0.065  # inches that one of a layer's name takes
KEY = "layer; marks: measured; predicted: half of all such networks below the lines, 95 % shaded"


def learning_curves(history: History, losses: Sequence[float], title: str) -> Figure:
    """Accuracy and loss over iterations; ``history`` maps metric keys to (step, value) pairs.

    ``losses`` are those of every training batch, drawn thin behind.
    """
    figure = drawing.figure(9, 3.8, title)
    accuracy, loss = figure.subplots(1, 2)
    loss.plot(losses, color=COLORS["train"], alpha=0.35, linewidth=0.6, label="each training batch")
    for key, points in sorted(history.items()):
        quantity, _, split = key.partition("/")
        if quantity not in ("accuracy", "loss") or split not in COLORS or not points:
            continue
        axes = accuracy if quantity == "accuracy" else loss
        steps, values = zip(*points, strict=True)
        last = f"{values[-1]:.2%}" if quantity == "accuracy" else f"{values[-1]:.3g}"
        axes.plot(
            steps, values, "o-", color=COLORS[split], label=f"{split}, finally {last}", markersize=4
        )
    accuracy.set(xlabel="iteration", ylabel="accuracy", ylim=(0, 1.02))
    accuracy.yaxis.set_major_formatter("{x:.0%}")
    loss.set(xlabel="iteration", ylabel="cross-entropy (nats)")
    if drawing.shows_more_than_0(loss):
        drawing.log_scale(loss)
    for axes in (accuracy, loss):
        drawing.tidy(axes)
        if axes.lines:
            axes.legend(frameon=False)
    return figure


def weight_histograms(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], title: str
) -> Figure:
    """Each matrix of weights before and after training; of a deep network, evenly chosen ones."""
    names = [name for name in before if WEIGHT.search(name) and before[name].dim() > 1]
    chosen = [names[i] for i in drawing.evenly(len(names), MAX_HISTOGRAMS)]
    if len(chosen) < len(names):
        title += f" ({len(chosen)} of {len(names)} layers)"
    columns = min(len(chosen), 4)
    rows = -(-len(chosen) // columns)
    figure = drawing.figure(max(9, 3 * columns), 0.9 + 3 * rows, title)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes, name in zip(grid, chosen, strict=False):
        drawn = {"before": _finite(before[name]), "after": _finite(after[name])}
        bins = _bins(np.concatenate(list(drawn.values())))
        for when, values in drawn.items():
            counts, _ = np.histogram(values, bins)
            share = counts / max(len(values), 1)
            label = f"{when} training"
            axes.stairs(share, bins, color=COLORS[when], label=label, **STYLES[when])
        spreads = [f"{values.std():.3g}" if len(values) else "?" for values in drawn.values()]
        layer = name.removesuffix(".weight")
        between = ": " if len(layer) < SHORT else "\n"
        axes.set_title(f"{layer}{between}std {' → '.join(spreads)}", fontsize=11)
        axes.set_xlabel("weight")
        drawing.few_ticks(axes, 5)
        drawing.tidy(axes)
    largest = max(before[name].numel() for name in chosen)
    grid[0].set_ylim(0.8 / largest, 1.2)  # from a single weight to all of them
    drawing.log_scale(grid[0], "%", 100)
    for axes in grid[len(chosen) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel("share of the weights")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _bins(values: Values) -> Values:
    """Edges of 61 bins over ``values``, also where all are equal, or none is there."""
    low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 2 or 0.5
        low, high = low - margin, high + margin
    return np.linspace(low, high, 62)


def _finite(weights: Tensor) -> Values:
    finite: Values = weights[weights.isfinite()].double().numpy()
    return finite


def signals_over_training(history: Sequence[tuple[int, Signals]], title: str) -> Figure:
    """A heat map of layer × step for each quantity that was measured, with its range.

    Moments are coloured by their logarithm, from the least to the largest; fractions and cosines
    from 0 to 100 %. An empty cell is a moment of 0, or not a number.
    """
    at_layers = [item for _, signals in history for item in signals.layers.items()]
    layers = list(dict.fromkeys(layer for layer, _ in at_layers))
    measured = {quantity for _, values in at_layers for quantity in values}
    quantities = [quantity for quantity in QUANTITIES if quantity in measured]
    columns = 4
    rows = -(-len(quantities) // columns)
    height = 1.0 + 2.0 * rows
    figure = drawing.empty_figure(12, height)  # laid out by hand: many axes are slow to fit
    figure.suptitle(title, fontsize=12, y=1 - 0.2 / height)
    letters = max(map(len, layers))
    figure.subplots_adjust(
        left=max(0.06, 0.02 + LETTER * letters / 12),
        right=0.98,
        bottom=0.55 / height,
        top=1 - 0.75 / height,
        hspace=0.55,
    )
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    steps = [step for step, _ in history]
    for at, (axes, quantity) in enumerate(zip(grid, quantities, strict=False)):
        by_layer = [
            [signals.layers.get(layer, {}).get(quantity) for _, signals in history]
            for layer in layers
        ]
        values = np.array(by_layer, dtype=float)
        if quantity.endswith(("fraction", "cosine")):
            low, high, shown = 0.0, 1.0, "0 to 100 %"
        else:
            values = np.log10(drawing.positive(values))
            low, high = _range(values)
            shown = f"{10**low:.2g} to {10**high:.2g}"
        axes.imshow(values, aspect="auto", interpolation="nearest", vmin=low, vmax=high)
        axes.set_title(f"{quantity.replace('_', ' ')}\n{shown}", fontsize=9)
        axes.set_xticks(*drawing.ticks(steps, 4), fontsize=8)
        axes.set_yticks(*drawing.ticks(layers, 6) if at % columns == 0 else ([], []), fontsize=8)
    for axes in grid[len(quantities) :]:
        axes.set_visible(False)
    figure.supxlabel(
        "iteration; from dark, the lowest, to bright, the highest (moments by their logarithm); "
        "white: none",
        fontsize=9,
        y=0.01,
    )
    return figure


def _range(values: Values) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    return (known.min(), known.max()) if len(known) else (0.0, 0.0)


def beside_theory(
    scheme: str,
    measured: Signals,
    predicted: Prediction,
    by_time: PredictedByTime,
    title: str,
    *,
    is_mlp: bool,
) -> dict[str, Callable[[], Figure]]:
    """How a network that was measured is drawn beside what is predicted of it, by figure's name.

    ``scheme`` names its marks where it is no feed-forward network of ours. ``by_time`` is what is
    predicted of its recurrent layers, if it has some.
    """
    drawn: dict[str, Callable[[], Figure]] = {
        "predicted_and_measured": partial(predicted_and_measured, predicted, measured, title)
        if is_mlp
        else partial(model_figures.schemes_by_layer, {scheme: (predicted, measured)}, title)
    }
    if measured.by_time:
        drawn["through_time"] = partial(
            model_figures.through_time, {scheme: (by_time, measured)}, title
        )
    return drawn


def predicted_and_measured(predicted: Prediction, measured: Signals, title: str) -> Figure:
    """Second moments through the layers: signal on the left, gradient on the right."""
    figure = drawing.figure(10, 4.2, title)
    forward, backward = figure.subplots(1, 2)
    for axes, quantity, color in (
        (forward, "preactivation_second_moment", "#0072B2"),
        (forward, "activation_second_moment", "#009E73"),
        (backward, "gradient_second_moment", "#D55E00"),
    ):
        label = quantity.replace("_second_moment", "s").replace("_", " ")
        values = measured.by_layer(quantity)
        _moments(axes, predicted[quantity], values, label=label, color=color, mark="o")
    for axes, name in ((forward, "signal, forward →"), (backward, "gradient, ← backward")):
        axes.set_title(name, fontsize=11)
        drawing.layer_axes(axes, list(measured.layers))
    forward.set_ylabel("mean square")
    for axes in (forward, backward):
        axes.legend(frameon=False, fontsize=8)
    figure.supxlabel(KEY, fontsize=9)
    return figure


def schemes_by_layer(cells: Mapping[Cell, tuple[Prediction, Signals]], title: str) -> Figure:
    """Signal and gradient through the layers: a column for each activation, a line each scheme.

    ``cells`` holds what was predicted and measured by (scheme, activation).
    """
    schemes = list(dict.fromkeys(scheme for scheme, _ in cells))
    activations = list(dict.fromkeys(activation for _, activation in cells))
    figure = drawing.figure(max(6.5, 1.2 + 3.3 * len(activations)), 6.6, title)
    grid = figure.subplots(2, len(activations), squeeze=False, sharex=True)
    rows = (
        ("preactivation_second_moment", "signal: mean square\nof the pre-activations"),
        ("gradient_second_moment", "gradient: mean square\nby the pre-activations"),
    )
    for (quantity, label), across in zip(rows, grid, strict=True):
        for axes, activation in zip(across, activations, strict=True):
            for at, scheme in enumerate(schemes):
                predicted, measured = cells[Cell(scheme, activation)]
                color, mark = (
                    drawing.CYCLE[at % len(drawing.CYCLE)],
                    drawing.MARKS[at % len(drawing.MARKS)],
                )
                values = measured.by_layer(quantity)
                _moments(axes, predicted[quantity], values, label=scheme, color=color, mark=mark)
            drawing.layer_axes(axes, list(measured.layers))
        across[0].set_ylabel(label)
    for axes, activation in zip(grid[0], activations, strict=True):
        axes.set_title(activation, fontsize=11)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, title=KEY, loc="outside lower center", ncols=8, frameon=False)
    return figure


def _moments(
    axes: Axes,
    predicted: Sequence[Interval],
    measured: Sequence[float | None],
    *,
    label: str,
    color: str,
    mark: str,
) -> None:
    """Measured marks over the predicted line and band; what is 0 or no number has no mark.

    The line is the median: the mean lies near the band's upper edge where a few networks carry it.
    """
    at = np.arange(len(predicted))
    low, median, high = (
        drawing.positive([getattr(interval, part) for interval in predicted])
        for part in ("low", "median", "high")
    )
    if len(predicted) > FEW_LAYERS:
        axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
    else:
        axes.vlines(at, low, high, color=color, alpha=0.2, linewidth=9)
    axes.plot(at, median, color=color, linewidth=1)
    marks = drawing.positive(measured[: len(predicted)])
    every = max(1, len(predicted) // 25)
    axes.plot(at, marks, mark, color=color, markersize=4, label=label, markevery=every)


def received(
    activation: Activation,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    title: str,
) -> Figure:
    """For each hidden layer the activation function over what the layer really receives.

    ``before`` and ``after`` training: each hidden layer's pre-activations, (n, units). Where
    the histogram lies under a flat piece of the function, its derivative being near 0, no
    gradient passes; where all of it lies under 0, ReLU is dead. Of very deep networks evenly
    chosen layers are drawn.
    """
    chosen = drawing.evenly(len(before), MAX_RECEIVED)
    if len(chosen) < len(before):
        title += f" ({len(chosen)} of {len(before)} layers)"
    columns = min(len(chosen), 4)
    rows = -(-len(chosen) // columns)
    figure = drawing.figure(max(7, 3.2 * columns), 1 + 2.4 * rows, title)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, layer in zip(grid, chosen, strict=False):
        drawn = {"before": _finite(before[layer]), "after": _finite(after[layer])}
        low, high = _common_range(np.concatenate(list(drawn.values())))
        bins = np.linspace(low, high, 61)
        counts = axes.twinx()
        for when, values in drawn.items():
            share = np.histogram(values, bins)[0] / max(len(values), 1)
            label = f"received {when} training"
            counts.stairs(share, bins, color=COLORS[when], label=label, **STYLES[when])
        counts.set_yticks([])
        counts.spines[["top", "right", "left"]].set_visible(False)
        x = torch.linspace(low, high, 241, dtype=torch.float64)
        axes.plot(x, activation.function(x), color="black", linewidth=1.2, label=activation.name)
        slope = activation.derivative(x)
        axes.plot(x, slope, color="black", linewidth=1, linestyle=":", label="its derivative")
        axes.set_title(f"fc{layer + 1}", fontsize=10)
        drawing.few_ticks(axes, 5)
        axes.set_zorder(1)  # the curves over the histograms
        axes.patch.set_visible(False)
        drawing.tidy(axes)
    for axes in grid[len(chosen) :]:
        axes.set_visible(False)
    curves, curve_labels = grid[0].get_legend_handles_labels()
    bars, bar_labels = counts.get_legend_handles_labels()
    figure.legend(
        curves + bars,
        curve_labels + bar_labels,
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    return figure


def _common_range(values: Values) -> tuple[float, float]:
    """Where nearly all values lie, and 0 and both sides of it."""
    low, high = np.quantile(values, (0.001, 0.999)) if len(values) else (0.0, 0.0)
    reach = max(abs(low), abs(high), 1e-3)
    return min(low, -0.4 * reach), max(high, 0.4 * reach)


def metrics_over_steps(history: Mapping[str, Sequence[tuple[int, float]]], title: str) -> Figure:
    """Each metric over its steps, of (step, value) pairs, in a panel; of many the first ones.

    What is no finite number is left out.
    """
    names = list(history)[:MOST_METRICS]
    columns = min(len(names), 3) or 1
    rows = -(-len(names) // columns) or 1
    figure = drawing.wide_figure(0.9 + 2.0 * rows, title)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        points = np.array([point for point in history[name] if abs(point[1]) < np.inf])
        axes.set_title(drawing.wrapped(name, 27), fontsize=drawing.SMALL)
        if len(points):
            axes.plot(*points.T, marker="." if len(points) < 10 else "", linewidth=1.2)
        drawing.few_ticks(axes, 3, whole=True)
        axes.tick_params(labelsize=drawing.SMALL)
        drawing.tidy(axes)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("step", fontsize=drawing.SMALL)
    return figure

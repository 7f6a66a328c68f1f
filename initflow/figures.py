"""The figures of a run: plain values in, a matplotlib figure out, nothing shown or saved."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)
from torch import Tensor

from initflow.activations import Activation
from initflow.comparison import Cell, Outcome, Outcomes, Row
from initflow.prediction import Interval, Prediction
from initflow.signals import QUANTITIES, Signals

__all__ = [
    "Figure",
    "comparison_accuracies",
    "comparison_curves",
    "learning_curves",
    "log_scale",
    "png",
    "predicted_and_measured",
    "published_curves",
    "received",
    "schemes_by_layer",
    "signals_by_layer",
    "signals_over_training",
    "tidy",
    "weight_histograms",
]

Values = npt.NDArray[np.float64]
Look = Mapping[str, Any]  # of a line
History = Mapping[str, Sequence[tuple[int, float]]]

# Okabe and Ito's palette, told apart by colour-blind readers too; one colour a meaning.
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
# For schemes, told apart by their marks too.
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7f7f7f", "#000000")
MARKS = "osD^vP*X"
DASHES = ("-", "--", ":", "-.")  # each for one round of the colours
MAX_HISTOGRAMS = 8
MAX_RECEIVED = 24
FEW_LAYERS = 8
LEAST, MOST = 1e-250, 1e250  # that an axis with margins can show
KEY = "layer; marks: measured, lines: predicted, shaded: 95 % of networks of these widths"
DPI = 150
# The figures of several seeds are read as thumbnails, 400 pixels wide: always of one width, so
# that their letters do not shrink with what there is to show.
WIDTH = 7.2  # inches
SMALL, MIDDLE = 9.5, 11  # points
VARIANCES = {
    "preactivation_variance": "signal: variance\nof the pre-activations",
    "gradient_variance": "gradient: variance\nby the pre-activations",
}
SEEDS_KEY = "line: mean over the seeds; shaded: from the lowest to the highest"
LEAST_ERROR = 1e-4  # one of MNIST's test images: what is nearer to 100 % is drawn there
LANDMARKS = (0.1, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995)
LEAST_SPAN = 0.02  # powers of ten of the error that an axis shows, even if all are equal
WIDE_GAP = 0.5  # in the same: the errors below it are three times those above


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def log_scale(axes: Axes, unit: str = "", factor: float = 1.0) -> None:
    """A logarithmic y axis that is labelled with plain numbers: 0.1, not 10⁻¹."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    digits = (1.0,) if math.log10(high) - math.log10(low) > 3 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=digits))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{factor * y:g}{unit}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _shows_more_than_0(axes: Axes) -> bool:
    return any((np.asarray(line.get_ydata(), float) > 0).any() for line in axes.lines)


def learning_curves(history: History, losses: Sequence[float], title: str) -> Figure:
    """Accuracy and loss over iterations; ``history`` maps metric keys to (step, value) pairs.

    ``losses`` are those of every training batch, drawn thin behind.
    """
    figure = _figure(9, 3.8, title)
    accuracy, loss = figure.subplots(1, 2)
    loss.plot(losses, color=COLORS["train"], alpha=0.35, linewidth=0.6, label="each training batch")
    for key, points in sorted(history.items()):
        quantity, _, split = key.partition("/")
        if quantity not in ("accuracy", "loss") or not points:
            continue
        axes = accuracy if quantity == "accuracy" else loss
        steps, values = zip(*points, strict=True)
        last = f"{values[-1]:.2%}" if quantity == "accuracy" else f"{values[-1]:.3g}"
        axes.plot(
            steps, values, "o-", color=COLORS[split], label=f"{split}, finally {last}", markersize=4
        )
    accuracy.set(xlabel="iteration", ylabel="accuracy", ylim=(0, 1.02))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    loss.set(xlabel="iteration", ylabel="cross-entropy (nats)")
    if _shows_more_than_0(loss):
        log_scale(loss)
    for axes in (accuracy, loss):
        tidy(axes)
        if axes.lines:
            axes.legend(frameon=False)
    return figure


def weight_histograms(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], title: str
) -> Figure:
    """Each layer's weights before and after training; of a deep network, evenly chosen layers."""
    names = [name for name in before if name.endswith(".weight")]
    chosen = [names[i] for i in _evenly(len(names), MAX_HISTOGRAMS)]
    if len(chosen) < len(names):
        title += f" ({len(chosen)} of {len(names)} layers)"
    columns = min(len(chosen), 4)
    rows = -(-len(chosen) // columns)
    figure = _figure(max(9, 3 * columns), 0.9 + 3 * rows, title)
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
        axes.set_title(f"{layer}: std {' → '.join(spreads)}", fontsize=11)
        axes.set_xlabel("weight")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        tidy(axes)
    largest = max(before[name].numel() for name in chosen)
    grid[0].set_ylim(0.8 / largest, 1.2)  # from a single weight to all of them
    log_scale(grid[0], "%", 100)
    for axes in grid[len(chosen) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel("share of the weights")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _bins(values: Values, n: int = 61) -> Values:
    """Edges of ``n`` bins over ``values``, also where all are equal, or none is there."""
    low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 2 or 0.5
        low, high = low - margin, high + margin
    return np.linspace(low, high, n + 1)


def _finite(weights: Tensor) -> Values:
    finite: Values = weights[weights.isfinite()].double().numpy()
    return finite


def _evenly(n: int, most: int) -> list[int]:
    """At most ``most`` of the indices below ``n``, evenly chosen, the first and last among them."""
    at = range(n) if n <= most else np.linspace(0, n - 1, most).round()
    return [int(i) for i in at]


def signals_over_training(history: Sequence[tuple[int, Signals]], title: str) -> Figure:
    """A heat map of layer × step for each quantity that was measured, with its range.

    Moments are coloured by their logarithm, from the least to the largest; fractions from 0 to
    100 %. An empty cell is a moment of 0, or not a number.
    """
    _, first = history[0]
    quantities = [
        quantity
        for quantity in QUANTITIES
        if any(value is not None for value in first.by_layer(quantity))
    ]
    columns = 4
    rows = -(-len(quantities) // columns)
    height = 1.0 + 2.0 * rows
    figure = Figure(figsize=(12, height), dpi=DPI)  # laid out by hand: many axes are slow to fit
    figure.suptitle(title, fontsize=12, y=1 - 0.2 / height)
    figure.subplots_adjust(
        left=0.06, right=0.98, bottom=0.55 / height, top=1 - 0.75 / height, hspace=0.55
    )
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    steps, layers = [step for step, _ in history], list(first.layers)
    for at, (axes, quantity) in enumerate(zip(grid, quantities, strict=False)):
        values = np.array([signals.by_layer(quantity) for _, signals in history], dtype=float).T
        if quantity.endswith("fraction"):
            low, high, shown = 0.0, 1.0, "0 to 100 %"
        else:
            values = np.log10(_positive(values))
            low, high = _range(values)
            shown = f"{10**low:.2g} to {10**high:.2g}"
        axes.imshow(values, aspect="auto", interpolation="nearest", vmin=low, vmax=high)
        axes.set_title(f"{quantity.replace('_', ' ')}\n{shown}", fontsize=9)
        axes.set_xticks(*_ticks(steps, 4), fontsize=8)
        axes.set_yticks(*_ticks(layers, 6) if at % columns == 0 else ([], []), fontsize=8)
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


def _ticks(labels: Sequence[object], most: int) -> tuple[list[int], list[str]]:
    at = _evenly(len(labels), most)
    return at, [str(labels[i]) for i in at]


def predicted_and_measured(predicted: Prediction, measured: Signals, title: str) -> Figure:
    """Second moments through the layers: signal on the left, gradient on the right."""
    figure = _figure(10, 4.2, title)
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
        _layer_axes(axes, list(measured.layers))
    forward.set_ylabel("mean square")
    for axes in (forward, backward):
        axes.legend(frameon=False, fontsize=8)
    figure.supxlabel(KEY, fontsize=9)
    return figure


def schemes_by_layer(
    cells: Mapping[tuple[str, str], tuple[Prediction, Signals]], title: str
) -> Figure:
    """Signal and gradient through the layers: a column for each activation, a line each scheme.

    ``cells`` holds what was predicted and measured by (scheme, activation).
    """
    schemes = list(dict.fromkeys(scheme for scheme, _ in cells))
    activations = list(dict.fromkeys(activation for _, activation in cells))
    figure = _figure(max(6.5, 1.2 + 3.3 * len(activations)), 6.6, title)
    grid = figure.subplots(2, len(activations), squeeze=False, sharex=True)
    rows = (
        ("preactivation_second_moment", "signal: mean square\nof the pre-activations"),
        ("gradient_second_moment", "gradient: mean square\nby the pre-activations"),
    )
    for (quantity, label), across in zip(rows, grid, strict=True):
        for axes, activation in zip(across, activations, strict=True):
            for at, scheme in enumerate(schemes):
                predicted, measured = cells[scheme, activation]
                color, mark = CYCLE[at % len(CYCLE)], MARKS[at % len(MARKS)]
                values = measured.by_layer(quantity)
                _moments(axes, predicted[quantity], values, label=scheme, color=color, mark=mark)
            _layer_axes(axes, list(measured.layers))
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
    """Measured marks over the predicted line and band; what is 0 or no number has no mark."""
    at = np.arange(len(predicted))
    low, expected, high = (
        _positive([getattr(interval, part) for interval in predicted])
        for part in ("low", "expected", "high")
    )
    if len(predicted) > FEW_LAYERS:
        axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
    else:
        axes.vlines(at, low, high, color=color, alpha=0.2, linewidth=9)
    axes.plot(at, expected, color=color, linewidth=1)
    marks = _positive(measured[: len(predicted)])
    every = max(1, len(predicted) // 25)
    axes.plot(at, marks, mark, color=color, markersize=4, label=label, markevery=every)


def _positive(values: Values | Sequence[float | None]) -> Values:
    array = np.array(values, dtype=float)
    return np.where((array > LEAST) & (array < MOST), array, np.nan)


def _layer_axes(axes: Axes, layers: Sequence[str]) -> None:
    if _shows_more_than_0(axes):
        log_scale(axes)
    axes.set_xticks(*_ticks(layers, 6))
    axes.margins(x=0.08)
    tidy(axes)


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
    chosen = _evenly(len(before), MAX_RECEIVED)
    if len(chosen) < len(before):
        title += f" ({len(chosen)} of {len(before)} layers)"
    columns = min(len(chosen), 4)
    rows = -(-len(chosen) // columns)
    figure = _figure(max(7, 3.2 * columns), 1 + 2.4 * rows, title)
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
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_zorder(1)  # the curves over the histograms
        axes.patch.set_visible(False)
        tidy(axes)
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


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figure.dpi)
    return file.getvalue()


def comparison_curves(outcomes: Outcomes, title: str) -> Figure:
    """Test accuracy over iterations: a panel for each activation function, a line each scheme.

    A line is the mean over the seeds that finished, at the iterations where all of them were
    measured, and its band goes from the lowest to the highest. Each seed that diverged is a thin
    line that ends in a cross.
    """
    looks = _looks(outcomes)
    figure, panels = _panels(_activations(outcomes), title, sharey=True)
    for cell, of in outcomes.items():
        _over_seeds(panels[cell.activation], of, looks[cell.init])
    for axes in panels.values():
        _accuracy_axis(axes, "y", _range_of([a for of in outcomes.values() for a in _curves(of)]))
    labels = [f"{init}{_fewer(init, outcomes)}" for init in looks]
    _legend(figure, list(looks.values()), labels, _curves_key(outcomes.values()))
    return figure


def comparison_accuracies(outcomes: Outcomes, rows: Sequence[Row], title: str) -> Figure:
    """Final test accuracies: each seed a dot, above them the mean and its 95 % interval.

    Schemes are rows, in one block for each activation function. Where some are so far below the
    others that those could not be told apart, the axis is broken between them.
    """
    looks = _looks(outcomes)
    names = {init: _wrapped(init, 26) for init in looks}
    blocks = {
        activation: [row for row in rows if row.cell.activation == activation]
        for activation in _activations(outcomes)
    }
    heights = [
        sum(0.18 + 0.19 * (1 + names[row.cell.init].count("\n")) for row in block)
        for block in blocks.values()
    ]
    figure = _figure(WIDTH, 1.1 + sum(heights) + 0.35 * len(blocks), _wrapped(title, 10 * WIDTH))
    parts = _parts([a for of in outcomes.values() for a in _accuracies(of)], rows)
    grid = figure.subplots(
        len(blocks),
        len(parts),
        squeeze=False,
        sharex="col",
        sharey="row",
        height_ratios=heights,
        width_ratios=[1, 4][-len(parts) :],
    )
    for across, (activation, block) in zip(grid, blocks.items(), strict=True):
        for axes, part in zip(across, parts, strict=True):
            for at, row in enumerate(block):
                dots = [a for a in _accuracies(outcomes[row.cell]) if part[0] <= a <= part[1]]
                _accuracy_row(axes, at, dots, row, looks[row.cell.init])
            _accuracy_axis(axes, "x", part, ticks=5 if axes is across[-1] else 2)
        across[0].set_title(activation, fontsize=MIDDLE, loc="left")
        shown = [names[row.cell.init] for row in block]
        across[0].set_yticks(range(len(block)), shown, fontsize=MIDDLE)
        across[0].set_ylim(len(block) - 0.5, -0.5)  # downwards, as in a table
        if len(parts) > 1:
            _break(*across)
        for at, row in enumerate(block):
            _beside(across[-1], at, row)
    key = "test accuracy; dots: seeds, above them their mean with its 95 % interval"
    figure.supxlabel(key, fontsize=SMALL)
    return figure


def signals_by_layer(measured: Mapping[Cell, Sequence[Signals]], title: str) -> Figure:
    """Variances through the untrained layers: a row for each activation, a line each scheme.

    ``measured`` holds the signals of each seed; what is 0 or no number is left out of the means
    and bands.
    """
    looks, activations = _looks(measured), _activations(measured)
    figure = _figure(WIDTH, 0.9 + 2.2 * len(activations), _wrapped(title, 10 * WIDTH))
    grid = figure.subplots(len(activations), 2, squeeze=False)
    layers: dict[str, list[str]] = {name: [] for name in activations}
    seen = set()
    for (init, activation), seeds in measured.items():
        if not seeds:
            continue
        layers[activation] = list(seeds[0].layers)
        for axes, quantity in zip(grid[activations.index(activation)], VARIANCES, strict=True):
            values = np.array([_positive(signals.by_layer(quantity)) for signals in seeds])
            _mean_and_band(axes, range(values.shape[1]), values, looks[init])
            seen |= {init} if np.isfinite(values).any() else set()
    for across, activation in zip(grid, activations, strict=True):
        across[0].set_ylabel(activation, fontsize=MIDDLE)
        for axes in across:
            _layer_axes(axes, layers[activation])
            axes.tick_params(labelsize=SMALL)
            axes.minorticks_off()  # they take long to lay out
    for axes, name in zip(grid[0], VARIANCES.values(), strict=True):
        axes.set_title(name, fontsize=MIDDLE)
    labels = [init if init in seen else f"{init} (0 or no number)" for init in looks]
    _legend(figure, list(looks.values()), labels, f"layer; {SEEDS_KEY}")
    return figure


def published_curves(
    rows: Mapping[str, tuple[Sequence[tuple[int, float]], Sequence[Outcome]]], title: str
) -> Figure:
    """Published accuracies as marks over ours, in a panel for each of ``rows``.

    Each is of published (iteration, accuracy) pairs, maybe none, and of our outcomes.
    """
    ours: Look = {"color": CYCLE[0]}
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
        _accuracy_axis(axes, "y", _range_of([*_curves(outcomes), *(a for _, a in published)]))
    drawn = {"published": theirs, "ours": ours}
    if not any(published for published, _ in rows.values()):
        del drawn["published"]
    key = _curves_key(outcomes for _, outcomes in rows.values())
    _legend(figure, list(drawn.values()), list(drawn), key)
    return figure


def _activations(cells: Iterable[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.activation for cell in cells))


def _looks(cells: Iterable[Cell]) -> dict[str, Look]:
    """How each scheme is drawn, whatever the activation function."""
    return {init: _look(at) for at, init in enumerate(dict.fromkeys(cell.init for cell in cells))}


def _look(at: int) -> Look:
    """Colour, dashes and mark; when the colours come round again, the others change."""
    color, again = CYCLE[at % len(CYCLE)], at // len(CYCLE)
    return {
        "color": color,
        "linestyle": DASHES[again % len(DASHES)],
        "marker": MARKS[(at + again) % len(MARKS)],
        "markerfacecolor": "white" if again % 2 else color,
    }


def _panels(names: Sequence[str], title: str, *, sharey: bool) -> tuple[Figure, dict[str, Axes]]:
    """A panel of accuracies over iterations for each name, at most three in a row."""
    rows = -(-len(names) // 3)
    columns = -(-len(names) // rows)
    figure = _figure(WIDTH, 0.9 + 2.5 * rows, _wrapped(title, 10 * WIDTH))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    panels = dict(zip(names, grid.flat, strict=False))
    for name, axes in panels.items():
        axes.set_title(_wrapped(name, 80 / columns), fontsize=MIDDLE)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy", fontsize=MIDDLE)
    for axes in grid[-1]:
        axes.set_xlabel("iteration", fontsize=MIDDLE)
    return figure, panels


def _legend(figure: Figure, looks: Sequence[Look], labels: Sequence[str], key: str) -> None:
    """Below all panels, which keep their height."""
    texts = [_wrapped(label, 64) for label in labels]
    columns, height = _fitting(texts)
    figure.set_figheight(figure.get_figheight() + 0.3 + 0.2 * height)
    figure.legend(
        [Line2D([], [], **look) for look in looks],
        texts,
        title=_wrapped(key, 12 * WIDTH),
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


def _wrapped(text: str, columns: float) -> str:
    """In lines, and with every $ as itself instead of the start of a formula."""
    return "\n".join(_Wrapper(int(columns)).wrap(text)).replace("$", r"\$")


def _over_seeds(axes: Axes, outcomes: Sequence[Outcome], look: Look) -> None:
    """Mean and band of the seeds that finished, and each that diverged until there."""
    finished = [dict(outcome.curve) for outcome in outcomes if outcome.diverged_at is None]
    if finished:
        steps = sorted(set(finished[0]).intersection(*finished))
        values = np.array([[curve[step] for step in steps] for curve in finished])
        _mean_and_band(axes, steps, values, look)
    thin = {**look, "linewidth": 0.8, "marker": "x", "markevery": [-1]}
    for outcome in outcomes:
        if outcome.diverged_at is not None and outcome.curve:
            points = [*outcome.curve, (outcome.diverged_at, outcome.curve[-1][1])]
            axes.plot(*zip(*points, strict=True), **thin)


def _mean_and_band(axes: Axes, at: Sequence[int], values: Values, look: Look) -> None:
    """``values``: (seeds, len(at)), NaN where there is none."""
    known = np.isfinite(values)
    n = known.sum(0)
    mean, low, high = (
        np.where(n > 0, of, np.nan)
        for of in (
            np.where(known, values / np.maximum(n, 1), 0).sum(0),
            np.where(known, values, np.inf).min(0),
            np.where(known, values, -np.inf).max(0),
        )
    )
    axes.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0)
    every = max(1, len(at) // 6)
    first = MARKS.find(look.get("marker", "")) % every  # lines that coincide show both marks
    axes.plot(at, mean, linewidth=1.6, markersize=5, markevery=(first, every), **look)


def _curves_key(drawn: Iterable[Sequence[Outcome]]) -> str:
    lost = any(outcome.diverged_at is not None for outcomes in drawn for outcome in outcomes)
    return f"{SEEDS_KEY}; ×: a seed diverged" if lost else SEEDS_KEY


def _fewer(init: str, outcomes: Outcomes) -> str:
    """Of a scheme whose seeds did not all finish, how many did; by activation, of several."""
    several = len(_activations(outcomes)) > 1
    told = []
    for cell, of in outcomes.items():
        n = len(_accuracies(of))
        if cell.init == init and n < len(of):
            told.append(f"{cell.activation} n = {n}" if several else f"n = {n}")
    return f" ({', '.join(told)})" if told else ""


def _accuracies(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.accuracy for outcome in outcomes if outcome.accuracy is not None]


def _curves(outcomes: Sequence[Outcome]) -> list[float]:
    return [accuracy for outcome in outcomes for _, accuracy in outcome.curve]


def _range_of(accuracies: Sequence[float]) -> tuple[float, float]:
    return min(accuracies, default=0.1), max(accuracies, default=0.99)


def _accuracy_axis(axes: Axes, name: str, part: tuple[float, float], ticks: int = 5) -> None:
    """Accuracies, stretched towards 100 %: equal distances are equal factors of the error.

    So one axis shows both what is no better than guessing and what differs at 98 %.
    """
    start, end = _stretched(part)
    margin = max(0.05 * (end - start), (LEAST_SPAN - (end - start)) / 2)
    low, high = _unstretched([start - margin, end + margin])
    shown = [mark for mark in LANDMARKS if low <= mark <= high]
    if len(shown) < 3:
        locator = MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10])
        shown = [at for at in locator.tick_values(low, high) if low <= at <= high]
    getattr(axes, f"set_{name}scale")("function", functions=(_stretched, _unstretched))
    getattr(axes, f"set_{name}lim")(low, high)
    getattr(axes, f"set_{name}ticks")(shown, [f"{100 * at:.5g}%" for at in shown])
    axes.tick_params(labelsize=SMALL)
    tidy(axes)


def _stretched(accuracies: npt.ArrayLike) -> Values:
    error = np.maximum(1 - np.asarray(accuracies, dtype=float), LEAST_ERROR)
    return np.asarray(-np.log10(error))


def _unstretched(places: npt.ArrayLike) -> Values:
    return np.asarray(1 - 10 ** -np.asarray(places, dtype=float))


def _parts(accuracies: Sequence[float], rows: Sequence[Row]) -> list[tuple[float, float]]:
    """What the axis shows from where to where; two parts if it is broken."""
    means = [row.mean for row in rows if row.mean is not None]
    values = np.unique([*accuracies, *means])
    if len(values) == 0:
        return [_range_of([])]
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


def _accuracy_row(axes: Axes, at: int, dots: Sequence[float], row: Row, look: Look) -> None:
    below = at + np.linspace(0.12, 0.34, len(dots))  # in the order of the seeds
    axes.plot(dots, below, "o", color=look["color"], markersize=4, alpha=0.7, markeredgewidth=0)
    above = at - 0.15
    if row.low is not None and row.high is not None:
        axes.hlines(above, row.low, row.high, color="black", linewidth=1.6)
    if row.mean is not None:
        axes.plot([row.mean], [above], **{**look, "linestyle": "none", "markersize": 8})


def _beside(axes: Axes, at: int, row: Row) -> None:
    """The mean as a number, and how many seeds diverged."""
    told = [] if row.mean is None else [f"{row.mean:.2%}"]
    told += [f"{row.diverged} diverged"] if row.diverged else []
    across = axes.get_yaxis_transform()
    axes.text(1.02, at, ", ".join(told), transform=across, va="center", fontsize=SMALL)


def _break(left: Axes, right: Axes) -> None:
    right.spines["left"].set_visible(False)
    right.tick_params(left=False)
    for axes, end in ((left, 1), (right, 0)):
        axes.text(end, 0, "/", transform=axes.transAxes, ha="center", va="center")

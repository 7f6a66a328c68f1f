"""The figures of a run: plain values in, a matplotlib figure out, nothing shown or saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)
from torch import Tensor

__all__ = ["Figure", "learning_curves", "weight_histograms"]

Values = npt.NDArray[np.float64]
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
MAX_HISTOGRAMS = 8
DPI = 150


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _log_scale(axes: Axes, unit: str = "", factor: float = 1.0) -> None:
    """A logarithmic y axis that is labelled with plain numbers: 0.1, not 10⁻¹."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    digits = (1.0,) if high / low > 1_000 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=digits))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{factor * y:g}{unit}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


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
    if any(value > 0 for line in loss.lines for value in line.get_ydata()):
        _log_scale(loss)
    for axes in (accuracy, loss):
        _tidy(axes)
        if axes.lines:
            axes.legend(frameon=False)
    return figure


def weight_histograms(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], title: str
) -> Figure:
    """Each layer's weights before and after training; of a deep network, evenly chosen layers."""
    names = [name for name in before if name.endswith(".weight")]
    chosen = names
    if len(names) > MAX_HISTOGRAMS:
        at = np.linspace(0, len(names) - 1, MAX_HISTOGRAMS).round().astype(int)
        chosen = [names[i] for i in at]
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
        _tidy(axes)
    largest = max(before[name].numel() for name in chosen)
    grid[0].set_ylim(0.8 / largest, 1.2)  # from a single weight to all of them
    _log_scale(grid[0], "%", 100)
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

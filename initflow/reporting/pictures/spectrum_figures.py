"""Figures of the singular values of Jacobians: histograms of those measured, lines of theory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from initflow.diagnostics.jacobian import HIDDEN, INPUT_OUTPUT
from initflow.diagnostics.spectrum import Part, SpectrumReading, drawn_layers
from initflow.reporting import drawing
from initflow.reporting.seed_statistics import Cell

if TYPE_CHECKING:
    from initflow.reporting.drawing import Axes, Figure

BINS = 48
DECADES = 7.0  # below the largest singular value, that are drawn at most
MEASURED, THEORY, ISOMETRY = "#56B4E9", "#D55E00", "#000000"  # of the palette in ``drawing``
NAMES = {HIDDEN: "between hidden layers", INPUT_OUTPUT: "input to output"}
KEY = "singular values of the Jacobian\nbars: measured; line: theory of wide networks; dotted: 1"
PANEL = 2.5  # inches that a scheme's panel is wide


def spectrum(reading: SpectrumReading, title: str) -> Figure:
    """One network's: the Jacobian between hidden layers, and smaller, the whole and some layers."""
    layers = [name for name in reading.parts if name not in NAMES]
    small = [name for name in (INPUT_OUTPUT,) if name in reading.parts and name != reading.main]
    small += [layers[at] for at in drawn_layers(len(layers))] if layers else []
    figure = drawing.figure(10, 4.4, drawing.wrapped(title, 100))
    columns = max(1, math.ceil(len(small) / 2))
    grid = figure.add_gridspec(2, 2 + columns)
    if reading.main in reading.parts:
        large = figure.add_subplot(grid[:, :2])
        _draw(large, reading.parts[reading.main], _range([reading.parts[reading.main]]))
        large.set_title(NAMES[reading.main], fontsize=10)
        large.set_ylabel("share of them, per decade", fontsize=9)
    for at, name in enumerate(small):
        axes = figure.add_subplot(grid[at % 2, 2 + at // 2])
        _draw(axes, reading.parts[name], _range([reading.parts[name]]))
        axes.set_title(NAMES.get(name, name), fontsize=9)
        axes.tick_params(labelsize=7.5)
    figure.supxlabel(KEY, fontsize=9)
    return figure


def spectra(readings: Mapping[Cell, SpectrumReading], title: str) -> Figure:
    """Of several networks the Jacobian between hidden layers: schemes beside each other.

    A row for each activation function, whose panels show the same part of the axis where all of
    the schemes have a place on it.
    """
    inits = list(dict.fromkeys(cell.init for cell in readings))
    kinds = list(dict.fromkeys(cell.activation for cell in readings))
    figure = drawing.figure(
        max(5.5, 1 + PANEL * len(inits)), 1.3 + 1.75 * len(kinds), drawing.wrapped(title, 75)
    )
    grid = figure.subplots(len(kinds), len(inits), squeeze=False)
    for across, kind in zip(grid, kinds, strict=True):
        parts = {
            init: reading.parts.get(reading.main)
            for (init, of), reading in readings.items()
            if of == kind
        }
        there = [part for part in parts.values() if part]
        common = _range(there)
        # Where one scheme's lie below all that is drawn, each has its own part of the axis.
        apart = any(_range([part])[1] < common[0] + (common[1] - common[0]) / 4 for part in there)
        across[0].set_ylabel(kind, fontsize=drawing.MIDDLE)
        for axes, init in zip(across, inits, strict=True):
            part = parts.get(init)
            if part is None:
                axes.set_axis_off()
                axes.text(0.5, 0.5, "not finite", ha="center", transform=axes.transAxes)
            else:
                _draw(axes, part, _range([part]) if apart else common)
            axes.tick_params(labelsize=8)
    for axes, init in zip(grid[0], inits, strict=True):
        axes.set_title(drawing.wrapped(init, 26), fontsize=drawing.MIDDLE)
    figure.supxlabel(KEY, fontsize=9)
    return figure


def _range(parts: Iterable[Part]) -> tuple[float, float]:
    """From where to where, in powers of ten, the singular values are drawn."""
    logs = torch.cat([part.measured.logarithms.flatten() for part in parts]) / math.log(10)
    logs = logs[logs.isfinite()]
    if not len(logs):
        return -1.0, 1.0
    low, high = float(logs.quantile(0.01)), float(logs.max())
    low = max(low, high - DECADES)
    margin = max(0.06 * (high - low), 0.05)
    return low - margin, high + margin


def _draw(axes: Axes, part: Part, limits: tuple[float, float]) -> None:
    edges = np.linspace(*limits, BINS + 1)
    width = edges[1] - edges[0]
    logs = (part.measured.logarithms.flatten() / math.log(10)).numpy()
    counts, _ = np.histogram(logs[np.isfinite(logs)], edges)
    shares = counts / (len(logs) * width)
    axes.stairs(shares, edges, fill=True, color=MEASURED, alpha=0.75)
    top = shares.max()
    if part.predicted:
        below = part.predicted.share_below(torch.from_numpy(edges * math.log(10))).numpy()
        expected = np.diff(below) / width
        axes.stairs(expected, edges, color=THEORY, linewidth=1.3, baseline=None)
        top = max(top, expected.max())
    axes.axvline(0, color=ISOMETRY, linewidth=0.8, linestyle=":")
    axes.set_xlim(*limits)
    axes.set_ylim(0, 1.25 * top if top > 0 else 1)
    _label(axes, limits)
    notes = _notes(part, limits)
    if notes:
        axes.text(
            0.02,
            0.97,
            "\n".join(notes),
            transform=axes.transAxes,
            va="top",
            fontsize=7,
            color="0.25",
        )
    axes.locator_params(axis="y", nbins=4)
    drawing.tidy(axes)


def _notes(part: Part, limits: tuple[float, float]) -> Sequence[str]:
    """What lies on the left of the axis, and why there is no theory."""
    logs = part.measured.logarithms.flatten() / math.log(10)
    zero = part.measured.zero
    under = ((logs < limits[0]) & logs.isfinite()).double().mean().item()
    notes = []
    if zero:
        notes.append(f"0 in double precision: {zero:.0%}")
    if part.predicted and part.predicted.zero >= 0.005:
        notes.append(f"0 in theory: {part.predicted.zero:.0%}")
    if under >= 0.005:
        notes.append(f"further left: {under:.0%}")
    if part.reason:
        notes.append(drawing.wrapped(f"no theory: {part.reason}", 34))
    return notes


def _label(axes: Axes, limits: tuple[float, float]) -> None:
    """Powers of ten or, where few of them are shown, plain numbers between them."""
    low, high = limits
    if high - low > 2.5:
        every = math.ceil((high - low) / 5)
        powers = [p for p in range(math.ceil(low), math.floor(high) + 1) if p % every == 0]
        axes.set_xticks(powers, [f"$10^{{{p}}}$" if abs(p) > 2 else f"{10.0**p:g}" for p in powers])
        return
    digits = [1.0, 2.0, 5.0] if high - low < 1.2 else [1.0, 3.0]
    if high - low < 0.7:
        digits = [1, 1.2, 1.5, *range(2, 10)]
    if high - low < 0.3:
        digits = [d / 20 for d in range(20, 200)]
    tens = range(math.floor(low), math.ceil(high) + 1)
    shown = [d * 10.0**p for p in tens for d in digits if low <= math.log10(d) + p <= high]
    shown = [shown[at] for at in drawing.evenly(len(shown), 4)]
    axes.set_xticks([math.log10(value) for value in shown], [f"{value:.3g}" for value in shown])

"""The figure of the trainable depth: training accuracy over σ_w² and depth, and theory's line.

Plain values in, a matplotlib figure out, nothing shown or saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from initflow.reporting import drawing
from initflow.reporting.drawing import Look, Values
from initflow.reporting.pictures.trainability_sentences import multiple
from initflow.reporting.pictures.trainability_statistics import Plane

if TYPE_CHECKING:
    from initflow.reporting.drawing import Axes, Figure

ACROSS = 3  # panels beside each other, at most
PANEL = 3.6  # inches high; of a single one, which is wider, more
MOST_DEPTHS = 9  # that the axis names
BEYOND = 1e6  # layers: an infinite scale is drawn there
LINE: Look = {"color": "#56B4E9", "linewidth": 2.2, "linestyle": "--"}
DOT: Look = {"color": "black", "marker": "o", "markerfacecolor": "white", "linestyle": "none"}
HOLLOW: Look = {**DOT, "color": "#808080", "markerfacecolor": "none", "markeredgewidth": 1.6}
LOST: dict[str, Look] = {
    "diverged": {"color": "#009E73", "marker": "x", "markeredgewidth": 1.6, "linestyle": "none"},
    "unstable": {"color": "#CC79A7", "marker": "^", "markersize": 4, "linestyle": "none"},
}
WORDS = {"diverged": "some diverged", "unstable": "some unstable"}
KEY = "colour: accuracy on training images after the last update, mean over the seeds"


def trainable_depth(
    planes: Sequence[Plane], curve: Sequence[tuple[float, float]], title: str
) -> Figure:
    """A panel for each learning rate: accuracy as colour, the measured edge as dots, c · ξ as line.

    ``curve`` has (σ_w², ξ) pairs. The band is the line's 95 % interval over seeds. A dot of an edge
    that lies beyond the shallowest or deepest networks is hollow. Places where a network
    diverged, or ended unstable, are marked.
    """
    across = min(ACROSS, len(planes))
    rows = math.ceil(len(planes) / across)
    figure = drawing.wide_figure(0.9 + rows * (PANEL if across > 1 else PANEL + 0.6), title)
    grid = figure.subplots(rows, across, squeeze=False, sharex=True, sharey=True)
    panels = list(grid.flat)
    for axes in panels[len(planes) :]:
        axes.set_visible(False)
    best = max((a for plane in planes for row in plane.accuracies for a in row if a), default=1.0)
    for axes, plane in zip(panels, planes, strict=False):
        mesh = axes.pcolormesh(
            _borders(plane.sigma_w2s),
            np.exp(_borders(np.log(plane.depths))),
            np.array(plane.accuracies, dtype=float),
            vmin=0,
            vmax=best,
            cmap="inferno",
        )
        _theory(axes, plane, curve)
        _edges(axes, plane)
        _lost(axes, plane)
        _scales(axes, plane)
        told = [f"lr {plane.lr:g}"] if len(planes) > 1 else []
        told += [multiple(plane.fit)] if plane.fit else ["nothing was learned"]
        axes.set_title(", ".join(told), fontsize=drawing.MIDDLE, loc="left")
    for axes in grid[:, 0]:
        axes.set_ylabel("depth (hidden layers)", fontsize=drawing.MIDDLE)
    for axes in grid[-1]:
        axes.set_xlabel("σ_w² = fan_in · Var(W)", fontsize=drawing.MIDDLE)
    bar = figure.colorbar(mesh, ax=panels, pad=0.02)
    bar.set_label("training accuracy", fontsize=drawing.MIDDLE)
    bar.ax.tick_params(labelsize=drawing.SMALL)
    bar.ax.yaxis.set_major_formatter(lambda at, _: f"{100 * at:.3g}%")
    _legend(figure, planes)
    return figure


def _borders(places: Sequence[float] | Values) -> Values:
    """Those of the cells around ``places``, half way between them."""
    at = np.asarray(places, dtype=float)
    middles = (at[1:] + at[:-1]) / 2
    return np.concatenate([[2 * at[0] - middles[0]], middles, [2 * at[-1] - middles[-1]]])


def _theory(axes: Axes, plane: Plane, curve: Sequence[tuple[float, float]]) -> None:
    if plane.fit is None or plane.fit.c is None:
        return
    sigma_w2s, scales = (np.array(values) for values in zip(*curve, strict=True))
    scales = np.clip(scales, 1 / BEYOND, BEYOND)
    axes.plot(sigma_w2s, plane.fit.c * scales, **LINE)
    if plane.fit.low is not None and plane.fit.high is not None:
        low = max(plane.fit.low, plane.fit.c / BEYOND)  # of few seeds it may be below 0
        band = low * scales, plane.fit.high * scales
        axes.fill_between(sigma_w2s, *band, color=LINE["color"], alpha=0.25, linewidth=0)


def _edges(axes: Axes, plane: Plane) -> None:
    there = [(s, edge) for s, edge in zip(plane.sigma_w2s, plane.edges, strict=True) if edge]
    for inside in (True, False):
        dots = [(sigma_w2, edge.depth) for sigma_w2, edge in there if edge.inside is inside]
        if dots:
            axes.plot(*zip(*dots, strict=True), **(DOT if inside else HOLLOW), clip_on=False)


def _lost(axes: Axes, plane: Plane) -> None:
    for what, look in LOST.items():
        counts = getattr(plane, what)
        places = [
            (sigma_w2, depth)
            for depth, row in zip(plane.depths, counts, strict=True)
            for sigma_w2, count in zip(plane.sigma_w2s, row, strict=True)
            if count
        ]
        if places:
            axes.plot(*zip(*places, strict=True), **look)


def _scales(axes: Axes, plane: Plane) -> None:
    axes.set_yscale("log")
    low, *_, high = np.exp(_borders(np.log(plane.depths)))
    axes.set_ylim(low, high)
    axes.set_xlim(*_borders(plane.sigma_w2s)[[0, -1]])
    shown = [plane.depths[at] for at in drawing.evenly(len(plane.depths), MOST_DEPTHS)]
    axes.set_yticks(shown, [str(depth) for depth in shown])
    axes.set_yticks([], minor=True)
    axes.tick_params(labelsize=drawing.SMALL)


def _legend(figure: Figure, planes: Sequence[Plane]) -> None:
    looks: list[Look] = []
    labels: list[str] = []
    if any(plane.fit and plane.fit.c is not None for plane in planes):
        looks.append(LINE)
        several = any(plane.fit and plane.fit.low is not None for plane in planes)
        labels.append("theory, c · ξ" + (" (95 %)" if several else ""))
    edges = [edge for plane in planes for edge in plane.edges if edge]
    for look, label, inside in (
        (DOT, "measured edge", True),
        (HOLLOW, "edge beyond", False),
    ):
        if any(edge.inside is inside for edge in edges):
            looks.append(look)
            labels.append(label)
    for what, look in LOST.items():
        if any(plane.count(what) for plane in planes):
            looks.append(look)
            labels.append(WORDS[what])
    drawing.legend(figure, looks, labels, KEY)

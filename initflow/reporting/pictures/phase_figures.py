"""The figure of the plane of σ_w² and σ_b²: what variance, gradient and correlation come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from initflow.reporting import drawing
from initflow.reporting.drawing import Look, Values
from initflow.reporting.formats import rounded
from initflow.reporting.pictures.planes import Mark, Plane, is_inside
from initflow.theory.criticality import NEAR

if TYPE_CHECKING:
    from initflow.reporting.drawing import Axes, Figure

LEAST_VARIANCE, LEAST_DEPTH, MOST_DEPTH = 1e-3, 0.3, 100.0
CONTOURS = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0, 3.0, 4.0)
LINE: Look = {"color": "black", "linewidth": 2.2}
UNBOUNDED = "#d9d9d9"
NAMED = 0.04  # of the plane: a smaller part has no room for its name


def plane(of: Plane, marks: Sequence[Mark], title: str) -> Figure:
    """Two panels: the variance q* with contours of χ₁, and the depth ξ_c that differences last.

    On both the critical line, and each scheme where it lies, at the edge if that is outside.
    """
    figure = drawing.wide_figure(3.5, title)
    left, right = figure.subplots(1, 2, sharey=True)
    q, xi_c, chi_1 = (x.numpy().T for x in (of.fields.q_star, of.fields.xi_c, of.fields.chi_1))
    held = np.isfinite(q)
    q, xi_c, chi_1 = (np.where(held, x, np.nan) for x in (q, xi_c, chi_1))
    most = max(10 * LEAST_VARIANCE, np.nanmax(q, initial=0.0))
    shades = (
        (left, q, "viridis", (LEAST_VARIANCE, most), r"variance $q^*$ of the pre-activations"),
        (right, xi_c, "magma", (LEAST_DEPTH, MOST_DEPTH), r"layers $\xi_c$ a difference lasts"),
    )
    places, looks = (of.sigma_w2, of.sigma_b2), _looks(marks)
    for axes, values, colours, limits, label in shades:
        drawing.shaded(axes, *places, values, colours=colours, limits=limits, label=label)
        axes.set_facecolor(UNBOUNDED)
        axes.plot(*of.line, color="white", linewidth=4)
        axes.plot(*of.line, **LINE)
        for group, look in looks:
            _mark(axes, of, group[0], look)
        axes.set_xlabel(r"$\sigma_w^2$ = fan-in · Var($W$)", fontsize=drawing.MIDDLE)
        axes.tick_params(labelsize=drawing.SMALL)
    drawing.contours(left, *places, chi_1, levels=CONTOURS)
    phases = {"ordered": chi_1 < 1 - NEAR, "chaotic": chi_1 > 1 + NEAR, "unbounded": ~held}
    for name, part in phases.items():
        _name(right, of, name, part)
    left.set_ylabel(r"$\sigma_b^2$ = Var($b$)", fontsize=drawing.MIDDLE)
    drawn = [LINE, *(look for _, look in looks)]
    labels = ["critical, χ₁ = 1", *(_label(of, group) for group, _ in looks)]
    grey = "" if held.all() else "; grey: unbounded variance"
    key = f"white lines: χ₁, the gradient's factor per layer{grey}"
    drawing.legend(figure, drawn, labels, key)
    return figure


def _name(axes: Axes, of: Plane, name: str, part: Values) -> None:
    """The ``name`` of the phase that fills a ``part`` of the plane, in its middle."""
    if part.mean() < NAMED:
        return
    up, across = (at.mean() for at in part.nonzero())
    place = of.sigma_w2[round(across)].item(), of.sigma_b2[round(up)].item()
    colour = "black" if name == "unbounded" else "white"
    axes.text(*place, name, color=colour, fontsize=drawing.MIDDLE, ha="center", va="center")


def _looks(marks: Sequence[Mark]) -> list[tuple[list[Mark], Look]]:
    """Those that lie at one place together, with one look."""
    groups: dict[tuple[float, float], list[Mark]] = {}
    for mark in marks:
        groups.setdefault((mark.sigma_w2, mark.sigma_b2), []).append(mark)
    edge: Look = {"linestyle": "none", "markeredgecolor": "white", "markersize": 9}
    return [
        (group, {**drawing.look(at), **edge, "markerfacecolor": drawing.CYCLE[at % 8]})
        for at, group in enumerate(groups.values(), start=1)
    ]


def _mark(axes: Axes, of: Plane, mark: Mark, look: Look) -> None:
    (low_w, high_w), (low_b, high_b) = of.range
    at = np.clip(mark.sigma_w2, low_w, high_w), np.clip(mark.sigma_b2, low_b, high_b)
    axes.plot(*([x] for x in at), clip_on=False, zorder=4, **look)


def _label(of: Plane, group: Sequence[Mark]) -> str:
    names, mark = ", ".join(mark.init for mark in group), group[0]
    if is_inside(of, mark):
        return names
    w, b = rounded(mark.sigma_w2), rounded(mark.sigma_b2)
    return f"{names} (outside, at {w}, {b})"

"""The figure of the trainable depth: what is drawn, and that any plane can be drawn."""

import math

import numpy as np
import pytest

from initflow.reporting.pictures import trainability_figures as figures
from initflow.reporting.pictures.trainability_statistics import TrainedNetwork, planes
from tests.drawn import legend, saved

DEPTHS, SCALES = (5, 10, 20), {1.0: 2.0, 2.0: math.inf, 3.0: 1.0}
CURVE = [(1.0, 2.0), (2.0, math.inf), (3.0, 1.0)]


def networks(accuracy, *, seeds=2, lrs=(0.01,), outcome="finished"):
    return [
        TrainedNetwork(s, depth, lr, seed, accuracy(s, depth), 0.5, outcome, "run")
        for lr in lrs
        for seed in range(seeds)
        for s in SCALES
        for depth in DEPTHS
    ]


def of_theory(sigma_w2, depth):
    return 0.9 if depth <= 5 * SCALES[sigma_w2] else 0.1


def drawn(found, title="title"):
    figure = figures.trainable_depth(found, CURVE, title)
    assert saved(figure).startswith(b"\x89PNG")
    return figure


def marks(axes, marker):
    """Where the marks of a kind stand."""
    lines = [line for line in axes.lines if line.get_marker() == marker]
    return sorted(tuple(map(float, at)) for line in lines for at in line.get_xydata())


def test_colour_edge_and_line_are_those_of_the_plane():
    """Accuracies as the mesh's values, edges as dots, c · ξ as line, its interval as band."""
    (plane,) = planes(networks(of_theory), SCALES, 10)
    figure = drawn([plane])
    axes = figure.axes[0]
    mesh, band = axes.collections
    assert np.array_equal(mesh.get_array(), plane.accuracies)
    assert marks(axes, "o") == [
        (s, edge.depth) for s, edge in zip(plane.sigma_w2s, plane.edges, strict=True)
    ]
    (line,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert line.get_xydata()[0] == pytest.approx((1.0, plane.fit.c * 2.0))
    assert line.get_xydata()[1][1] > 1e5  # infinite: out of sight
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(plane.fit.low)
    assert axes.get_title(loc="left").startswith("c = ")
    assert legend(figure) == [
        "theory, c · ξ (95 %)",
        "measured edge",
        "edge beyond",
    ]


@pytest.mark.parametrize(("outcome", "marker"), [("diverged", "x"), ("unstable", "^")])
def test_what_went_wrong_is_marked_at_its_place(outcome, marker):
    """And named in the legend."""
    wrong = networks(of_theory)
    wrong[4] = TrainedNetwork(2.0, 10, 0.01, 0, None, None, outcome, "run")
    figure = drawn(planes(wrong, SCALES, 10))
    assert marks(figure.axes[0], marker) == [(2.0, 10.0)]
    assert figures.WORDS[outcome] in legend(figure)


@pytest.mark.parametrize("lrs", [(0.1,), (0.1, 0.01), (0.1, 0.02, 0.01, 0.001)])
@pytest.mark.parametrize("accuracy", [of_theory, lambda *_: 0.1, lambda *_: 0.9])
def test_any_number_of_rates_and_any_outcome_can_be_drawn(lrs, accuracy):
    """A panel for each rate, with its c or why there is none; one bar of colours for all."""
    found = planes(networks(accuracy, seeds=1, lrs=lrs), SCALES, 10)
    figure = drawn(found, "a $title$")
    panels = [axes for axes in figure.axes if axes.get_visible() and axes.get_title(loc="left")]
    assert len(panels) == len(lrs)
    assert len([axes for axes in figure.axes if axes.get_ylabel() == "training accuracy"]) == 1


def test_places_without_networks_are_left_white():
    """Where all of them failed to be trained."""
    some = [one for one in networks(of_theory) if (one.sigma_w2, one.depth) != (1.0, 20)]
    (plane,) = planes(some, SCALES, 10)
    figure = drawn([plane])
    assert figure.axes[0].collections[0].get_array().mask.sum() == 1

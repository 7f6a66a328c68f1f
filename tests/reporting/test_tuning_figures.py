"""Figures of a tuning: what is drawn of its trials, and that any tuning can be drawn."""

from itertools import pairwise

import numpy as np
import pytest

from initflow.reporting import drawing, tuning_figures
from initflow.reporting.seed_statistics import Cell, Row
from initflow.reporting.trials import Trial
from tests.drawn import saved, shown

HE, XAVIER = Cell("he", "relu"), Cell("xavier", "relu")


def trial(lr, accuracy, outcome="finished"):
    return Trial(0, lr, 0.95, outcome, accuracy)


TRIALS = {
    HE: [
        trial(0.01, 0.9),
        trial(0.1, 0.975),
        trial(0.3, 0.98),
        trial(0.6, 0.971),
        trial(0.02, 0.5, "pruned"),
        trial(0.001, None, "pruned"),
        trial(3.0, 0.3, "diverged"),
        trial(5.0, None, "diverged"),
        trial(0.5, None, "failed"),
    ],
    XAVIER: [trial(0.2, 0.97), trial(0.4, 0.96)],
}


def points(line):
    return list(zip(*line.get_data(), strict=True))


def drawn(axes, color):
    """The lines of marks of one colour that hold any, by how they are drawn."""
    lines = [line for line in axes.lines if line.get_color() == color and len(line.get_xdata())]
    found = {}
    for line in lines:
        hollow = line.get_markerfacecolor() == "none"
        ringed = line.get_markeredgecolor() == "black"
        crosses = line.get_marker() == "x"
        kind = "×" if crosses else "hollow" if hollow else "ringed" if ringed else "filled"
        found[kind] = points(line)
    return found


def names(axes):
    return [shown(label) for label in axes.get_yticklabels()]


def told(axes):
    return [text.get_text() for text in axes.texts if text.get_text()]


def bars(axes):
    """From where to where each goes."""
    return [
        tuple(float(at) for at in segment[:, 0])
        for collection in axes.collections
        for segment in collection.get_segments()
    ]


def test_each_trial_is_a_mark_at_its_rate_and_accuracy():
    """Filled if it finished, hollow if it was pruned; the best of each scheme is ringed."""
    panel, _ = tuning_figures.rates_and_accuracies(TRIALS, "title").axes
    he, xavier = drawing.CYCLE[:2]
    assert drawn(panel, he) == {
        "filled": [(0.01, 0.9), (0.1, 0.975), (0.3, 0.98), (0.6, 0.971)],
        "hollow": [(0.02, 0.5)],
        "ringed": [(0.3, 0.98)],
    }
    assert drawn(panel, xavier) == {
        "filled": [(0.2, 0.97), (0.4, 0.96)],
        "ringed": [(0.2, 0.97)],
    }
    assert panel.get_xscale() == "log"
    assert panel.get_ylabel() == "best validation accuracy"


def test_each_scheme_has_a_line_with_its_tolerance_and_the_rates_that_diverged():
    """Below the panel, at the same rates; the best in numbers, and how many failed."""
    figure = tuning_figures.rates_and_accuracies(TRIALS, "title")
    panel, below = figure.axes
    assert names(below) == ["he", "xavier"]
    assert told(below) == ["98.00% at 0.3, 1 failed", "97.00% at 0.2"]
    assert bars(below) == [(0.1, 0.6), (0.2, 0.4)]
    crosses = drawn(below, drawing.CYCLE[0])["×"]
    assert [lr for lr, _ in crosses] == [3.0, 5.0]
    assert {height for _, height in crosses} == {below.get_yticks()[0]}
    assert "×" not in drawn(below, drawing.CYCLE[1])
    assert below.get_xlim() == panel.get_xlim()
    low, high = panel.get_xlim()
    assert low < 0.001
    assert high > 5.0
    assert "learning rate" in figure.get_supxlabel()
    assert "within 1 point" in figure.get_supxlabel()
    assert saved(figure)


def test_each_activation_has_a_panel_of_its_own():
    """On the same axes, a scheme in the same look."""
    trials = {**TRIALS, Cell("xavier", "tanh"): [trial(0.02, 0.5), trial(0.3, 0.9)]}
    figure = tuning_figures.rates_and_accuracies(trials, "title")
    relu, below, tanh, below_tanh = figure.axes
    assert [axes.get_title(loc="left") for axes in (relu, tanh)] == ["relu", "tanh"]
    assert (names(below), names(below_tanh)) == (["he", "xavier"], ["xavier"])
    assert drawn(tanh, drawing.CYCLE[1])["ringed"] == [(0.3, 0.9)]
    assert (relu.get_xlim(), relu.get_ylim()) == (tanh.get_xlim(), tanh.get_ylim())
    assert saved(figure)


@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ([], "no trial"),
        ([trial(0.1, 0.97)], "97.00% at 0.1"),
        ([trial(0.1, 0.97)] * 5, "97.00% at 0.1"),
        ([trial(0.1, 1.0), trial(0.11, 0.0)], "100.00% at 0.1"),
        ([trial(0.1, None, "diverged"), trial(3.0, 0.2, "diverged")], "none finished"),
        ([trial(0.1, None, "failed")], "none finished, 1 failed"),
        ([trial(0.1, 0.3, "pruned"), trial(0.2, None, "pruned")], "none finished"),
    ],
)
def test_whatever_the_trials_came_to_is_drawn(trials, words):
    """Without a warning, inside the axes, with two rates to read the others by."""
    figure = tuning_figures.rates_and_accuracies({HE: trials, XAVIER: []}, "title")
    panel, below = figure.axes
    assert told(below) == [words, "no trial"]
    assert saved(figure)
    for axis, (low, high) in (("x", panel.get_xlim()), ("y", panel.get_ylim())):
        assert low < high
        ticks = getattr(panel, f"get_{axis}ticks")()
        assert sum(low <= at <= high for at in ticks) > 1
        for line in panel.lines:
            values = np.minimum(getattr(line, f"get_{axis}data")(), 0.9999)
            assert ((low < values) & (values < high)).all()


def row(cell, mean=None, half=None, diverged=0):
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return Row(cell, 0 if mean is None else 5, mean, half, low, high, None, None, diverged)


def marks(axes):
    """Each mean, and whether its mark is filled."""
    return [
        (line.get_xdata()[0], line.get_markerfacecolor() == line.get_color()) for line in axes.lines
    ]


def arrows(axes):
    """From which accuracy to which each goes."""
    found = [text for text in axes.texts if not text.get_text()]
    return [(arrow.xyann[0], arrow.xy[0]) for arrow in found]


def test_an_arrow_goes_from_the_untuned_to_the_tuned_mean():
    """Hollow and filled, each with its interval and its number, the tuned one below."""
    pairs = {
        HE: (row(HE, 0.97, 0.001), row(HE, 0.98, 0.002)),
        XAVIER: (row(XAVIER, 0.975), row(XAVIER, 0.974, 0.001)),
    }
    figure = tuning_figures.tuned_and_untuned(pairs, "title")
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "relu"
    assert names(axes) == ["he", "xavier"]
    assert marks(axes) == [(0.97, False), (0.98, True), (0.975, False), (0.974, True)]
    np.testing.assert_allclose(bars(axes), [(0.969, 0.971), (0.978, 0.982), (0.973, 0.975)])
    assert arrows(axes) == [(0.97, 0.98), (0.975, 0.974)]
    assert told(axes) == ["97.00%", "98.00%", "97.50%", "97.40%"]
    untuned, tuned, *_ = (line.get_ydata()[0] for line in axes.lines)
    assert untuned < axes.get_yticks()[0] < tuned
    assert axes.yaxis_inverted()
    assert "hollow: untuned, filled: tuned" in figure.get_supxlabel()
    assert saved(figure)


def test_an_arrow_goes_over_the_break_of_the_axis():
    """From one of its parts to the other; each mark is in one of them."""
    pairs = {
        HE: (row(HE, 0.1135, 0.0), row(HE, 0.97, 0.001)),
        XAVIER: (row(XAVIER, 0.96, 0.001), row(XAVIER, 0.98, 0.001)),
    }
    figure = tuning_figures.tuned_and_untuned(pairs, "title")
    low, high = figure.axes
    assert marks(low) == [(0.1135, False)]
    assert marks(high) == [(0.97, True), (0.96, False), (0.98, True)]
    assert arrows(low) == []
    assert arrows(high) == [(0.1135, 0.97), (0.96, 0.98)]
    figure.draw_without_rendering()
    arrow = next(text for text in high.texts if not text.get_text()).arrow_patch
    tail, head = arrow.get_path().vertices[[0, 2]]
    left, right = low.get_window_extent(), high.get_window_extent()
    assert left.x0 <= tail[0] < left.x1
    assert right.x0 < head[0] < right.x1
    assert saved(figure)


@pytest.mark.parametrize(
    ("untuned", "tuned", "words"),
    [
        (row(HE, diverged=5), row(HE, 0.97), ["5 diverged", "97.00%"]),
        (row(HE, 0.97, 0.01), row(HE, diverged=5), ["97.00%", "5 diverged"]),
        (row(HE, 0.97, 0.01, diverged=1), row(HE), ["97.00%, 1 diverged", "no seed"]),
        (row(HE), row(HE), ["no seed", "no seed"]),
        (row(HE, 1.0), row(HE, 1.0, 0.0), ["100.00%", "100.00%"]),
        (row(HE, 0.0), row(HE, 1.0), ["0.00%", "100.00%"]),
    ],
)
def test_whatever_the_seeds_came_to_is_drawn(untuned, tuned, words):
    """Where there is no mean there is no arrow, and the line says why."""
    figure = tuning_figures.tuned_and_untuned({HE: (untuned, tuned)}, "title")
    (axes,) = figure.axes
    assert told(axes) == words
    assert len(arrows(axes)) == (untuned.mean is not None and tuned.mean is not None)
    assert saved(figure)


NAMES = [
    "a$b$",
    "_hidden",
    "plugins/file.py:function:first=0.123456789,second=another,third=one_with_underscores",
    "x" * 200,
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:12])
def test_names_are_shown_as_they_are(name):
    """Not as formulas, not hidden, below each other, and with room for what is drawn."""
    cells = [
        *(Cell(f"s{at}", "relu") for at in range(5)),
        Cell(name, "relu"),
        Cell(f"{name}2", "relu"),
    ]
    trials = dict.fromkeys(cells, TRIALS[HE])
    rates = tuning_figures.rates_and_accuracies(trials, name)
    pairs = {cell: (row(cell, 0.97), row(cell, 0.98)) for cell in cells}
    tuned = tuning_figures.tuned_and_untuned(pairs, name)
    for figure, axes in ((rates, rates.axes[1]), (tuned, tuned.axes[0])):
        assert names(axes)[-2:] == [name, f"{name}2"]
        assert shown(figure._suptitle) == name
        assert saved(figure)
        assert axes.get_position().width > 0.2
        boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
        assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))


@pytest.mark.parametrize(("schemes", "activations"), [(1, 1), (1, 4), (16, 1)])
def test_however_much_there_is_a_figure_is_as_wide_as_any(schemes, activations):
    """The panels keep their height, and so do the lines."""
    cells = [Cell(f"s{s}", f"a{a}") for a in range(activations) for s in range(schemes)]
    figure = tuning_figures.rates_and_accuracies(dict.fromkeys(cells, TRIALS[HE]), "title")
    figure.draw_without_rendering()
    assert figure.get_figwidth() == drawing.WIDTH
    for panel, below in zip(figure.axes[::2], figure.axes[1::2], strict=True):
        assert panel.get_window_extent().height > 2.5 * figure.dpi
        assert below.get_window_extent().height > 0.2 * schemes * figure.dpi
    pairs = {cell: (row(cell, 0.97), row(cell, 0.98)) for cell in cells}
    figure = tuning_figures.tuned_and_untuned(pairs, "title")
    figure.draw_without_rendering()
    assert figure.get_figwidth() == drawing.WIDTH
    assert all(axes.get_window_extent().height > 0.5 * schemes * figure.dpi for axes in figure.axes)

"""Figures of many networks: what is drawn, and that any comparison can be drawn."""

import math

import numpy as np
import pytest

from initflow.diagnostics.signals import Signals
from initflow.reporting import comparison_figures, drawing
from initflow.reporting.seed_statistics import Cell, Measure, Outcome, Row
from tests.drawn import legend, saved, shown


def outcome(seed, *accuracies, diverged_at=None):
    """Measured every 100 iterations."""
    curve = [(100 * at, accuracy) for at, accuracy in enumerate(accuracies)]
    return Outcome(seed, curve, diverged_at)


def row(cell, of):
    """As of these outcomes, with an interval that is as wide as they are apart."""
    known = [each.accuracy for each in of if each.accuracy is not None]
    mean = sum(known) / len(known) if known else None
    ends = (min(known), max(known)) if len(known) > 1 else (None, None)
    return Row(cell, len(known), mean, None, *ends, None, None, len(of) - len(known))


def accuracies(outcomes):
    rows = [row(cell, of) for cell, of in outcomes.items()]
    return comparison_figures.comparison_accuracies(outcomes, rows, "title")


def of_variances(values, layers):
    each = {"preactivation_variance": values, "gradient_variance": values}
    return Signals({f"fc{n + 1}": {k: v[n] for k, v in each.items()} for n in range(layers)}, {})


FINISHED = [outcome(0, 0.1, 0.9, 0.96), outcome(1, 0.12, 0.94, 0.98)]


OUTCOMES = {
    Cell("he", "relu"): FINISHED,
    Cell("zero", "relu"): [outcome(0, 0.1, 0.1, 0.1135), outcome(1, 0.1, 0.1, 0.1135)],
    Cell("he", "tanh"): [outcome(0, 0.1, 0.8, 0.95), outcome(1, 0.1, 0.7, diverged_at=130)],
    Cell("zero", "tanh"): [outcome(seed, 0.1, diverged_at=1) for seed in (0, 1)],
}


def test_comparison_curves_are_means_in_a_band_from_the_lowest_to_the_highest_seed():
    """A panel for each activation, the same look for a scheme in each."""
    figure = comparison_figures.comparison_curves(OUTCOMES, "title")
    relu, tanh = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["relu", "tanh"]
    he, zero = relu.lines
    np.testing.assert_allclose(he.get_data(), [[0, 100, 200], [0.11, 0.92, 0.97]])
    np.testing.assert_allclose(zero.get_ydata(), [0.1, 0.1, 0.1135])
    corners = {tuple(corner) for corner in relu.collections[0].get_paths()[0].vertices}
    assert corners == {(0, 0.1), (0, 0.12), (100, 0.9), (100, 0.94), (200, 0.96), (200, 0.98)}
    assert tanh.lines[0].get_color() == he.get_color() != zero.get_color()
    assert relu.get_ylabel() == "test accuracy"
    assert saved(figure)


def test_seeds_that_diverged_are_drawn_until_there_and_left_out_of_the_mean():
    """And the legend says how many are left."""
    figure = comparison_figures.comparison_curves(OUTCOMES, "title")
    _, tanh = figure.axes
    mean, lost, *zero = tanh.lines
    np.testing.assert_allclose(mean.get_ydata(), [0.1, 0.8, 0.95])
    np.testing.assert_allclose(lost.get_data(), [[0, 100, 130], [0.1, 0.7, 0.7]])
    assert (lost.get_marker(), lost.get_markevery()) == ("x", [-1])
    assert [list(line.get_xdata()) for line in zero] == [[0, 1], [0, 1]]
    assert legend(figure) == ["he (tanh n = 1)", "zero (tanh n = 0)"]
    assert figure.legends[0].get_title().get_text().endswith("×: a seed diverged")


def test_a_mean_is_only_where_all_its_seeds_were_measured():
    """As when some were measured more often."""
    often = Outcome(0, [(0, 0.1), (50, 0.5), (100, 0.9)])
    (axes,) = comparison_figures.comparison_curves(
        {Cell("he", "relu"): [often, FINISHED[1]]}, "t"
    ).axes
    np.testing.assert_allclose(axes.lines[0].get_data(), [[0, 100], [0.11, 0.92]])


def test_accuracies_are_stretched_towards_the_top():
    """From 90 % to 99 % is as far as from 0 to 90 %, and everything drawn is inside."""
    (axes, _) = comparison_figures.comparison_curves(OUTCOMES, "title").axes
    at = axes.transData.transform([(0, accuracy) for accuracy in (0.0, 0.9, 0.99)])[:, 1]
    assert at[2] - at[1] == pytest.approx(at[1] - at[0])
    low, high = axes.get_ylim()
    assert low < 0.1
    assert high > 0.98
    ticks = [label.get_text() for label in axes.get_yticklabels()]
    assert ticks == ["10%", "50%", "80%", "90%", "95%", "98%"]


@pytest.mark.parametrize("accuracy", [0.0, 0.1135, 0.98, 0.9999, 1.0])
def test_any_accuracy_has_its_place(accuracy):
    """Without a warning, also where all are one; what makes no error stands at the very top."""
    outcomes = {Cell("he", "relu"): [outcome(seed, accuracy, accuracy) for seed in range(3)]}
    for figure, name in (
        (comparison_figures.comparison_curves(outcomes, "t"), "y"),
        (accuracies(outcomes), "x"),
    ):
        (axes,) = figure.axes
        low, high = getattr(axes, f"get_{name}lim")()
        assert low < min(accuracy, 0.9999) < high
        assert len(getattr(axes, f"get_{name}ticks")()) > 1
        assert saved(figure)


def dots(axes):
    return [sorted(line.get_xdata()) for line in axes.lines if line.get_markersize() == 4]


def test_comparison_accuracies_show_every_seed_and_the_mean_with_its_interval():
    """Schemes downwards, a block for each activation, each with its mean as a number beside."""
    outcomes = {cell: of for cell, of in OUTCOMES.items() if cell.init == "he"}
    figure = accuracies(outcomes)
    relu, tanh = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["relu", "tanh"]
    assert dots(relu) == [[0.96, 0.98]]
    assert dots(tanh) == [[0.95]]
    (mean,) = (line for line in relu.lines if line.get_markersize() == 8)
    assert list(mean.get_xdata()) == [pytest.approx(0.97)]
    ((start, end),) = relu.collections[0].get_segments()
    assert (start[0], end[0]) == (0.96, 0.98)
    assert not tanh.collections
    assert [label.get_text() for label in relu.get_yticklabels()] == ["he"]
    assert [text.get_text() for text in relu.texts + tanh.texts] == [
        "97.00%",
        "95.00%, 1 diverged",
    ]
    assert saved(figure)


def test_the_axis_is_broken_where_some_are_so_far_below_that_others_were_not_told_apart():
    """Each seed is a dot in one of the two parts, and only there."""
    figure = accuracies(OUTCOMES)
    low, high, low_tanh, high_tanh = figure.axes
    assert dots(low) == [[], [0.1135, 0.1135]]
    assert dots(high) == [[0.96, 0.98], []]
    assert dots(low_tanh) == [[], []]
    assert dots(high_tanh) == [[0.95], []]
    assert low.get_xlim()[1] < high.get_xlim()[0]
    assert [text.get_text() for text in high_tanh.texts] == [
        "/",
        "95.00%, 1 diverged",
        "2 diverged",
    ]
    assert saved(figure)


@pytest.mark.parametrize("values", [(0.98,), (0.5, 0.98), (0.93, 0.95, 0.96, 0.98)])
def test_an_axis_that_shows_all_well_is_not_broken(values):
    """Few values, or gaps that are small beside what is shown."""
    assert len(accuracies({Cell("he", "relu"): [outcome(0, a) for a in values]}).axes) == 1


def test_a_wide_interval_does_not_press_the_seeds_together():
    """That of two seeds can be longer than from 0 to 100 %."""
    cell = Cell("he", "relu")
    wide = Row(cell, 2, 0.98, 0.01, 0.7, 1.3, None, None, 0)
    of = [outcome(0, 0.979), outcome(1, 0.981)]
    figure = comparison_figures.comparison_accuracies({cell: of}, [wide], "title")
    low, high = figure.axes[0].get_xlim()
    assert 0.97 < low < 0.979
    assert 0.981 < high < 0.99
    assert saved(figure)


def test_signals_by_layer_are_means_in_a_band_on_a_logarithmic_axis():
    """A row for each activation: signal on the left, gradient on the right."""
    seeds = [of_variances([1.0, 10.0, 100.0], 3), of_variances([3.0, 10.0, 300.0], 3)]
    measured = {Cell("he", name): seeds for name in ("relu", "tanh")}
    figure = comparison_figures.signals_by_layer(measured, "title")
    relu, gradient, tanh, _ = figure.axes
    assert (relu.get_ylabel(), tanh.get_ylabel()) == ("relu", "tanh")
    assert relu.get_title().startswith("signal")
    assert gradient.get_title().startswith("gradient")
    for axes in figure.axes:
        (line,) = axes.lines
        np.testing.assert_allclose(line.get_data(), [[0, 1, 2], [2.0, 10.0, 200.0]])
        corners = {tuple(corner) for corner in axes.collections[0].get_paths()[0].vertices}
        assert {(0, 1), (0, 3), (2, 100), (2, 300)} < corners
        assert axes.get_yscale() == "log"
        assert [label.get_text() for label in axes.get_xticklabels()] == ["fc1", "fc2", "fc3"]
    assert legend(figure) == ["he"]
    assert saved(figure)


@pytest.mark.parametrize(
    ("value", "layers"),
    [(None, 2), (0.0, 2), (1e-300, 2), (1e300, 2), (math.inf, 2), (math.nan, 2), (0.0, 100)],
)
def test_signals_that_are_no_positive_number_are_left_out_of_mean_and_band(value, layers):
    """A scheme without any other is named all the same."""
    some = [value] + [2.0] * (layers - 1)
    measured = {
        Cell("he", "relu"): [of_variances(some, layers), of_variances([4.0] * layers, layers)],
        Cell("zero", "relu"): [of_variances([value] * layers, layers)],
        Cell("none", "relu"): [],
    }
    figure = comparison_figures.signals_by_layer(measured, "title")
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [4.0] + [3.0] * (layers - 1))
    assert legend(figure) == ["he", "zero (0 or no number)", "none (0 or no number)"]
    assert saved(figure)


def test_published_curves_are_marks_over_ours():
    """A panel for each; what has no published curve shows ours alone."""
    published = [(0, 0.1), (150, 0.95)]
    figure = comparison_figures.published_curves(
        {"a": (published, FINISHED), "b": ([], FINISHED), "c": (published, [])}, "title"
    )
    a, b, c = figure.axes
    ours, marks = a.lines
    np.testing.assert_allclose(ours.get_ydata(), [0.11, 0.92, 0.97])
    assert list(zip(*marks.get_data(), strict=True)) == published
    assert (marks.get_marker(), marks.get_linestyle()) == ("o", "None")
    assert [len(axes.lines) for axes in (b, c)] == [1, 1]
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c"]
    assert legend(figure) == ["published", "ours"]
    assert saved(figure)
    alone = comparison_figures.published_curves({"b": ([], FINISHED)}, "title")
    assert legend(alone) == ["ours"]


NAMES = [
    "a$b$",
    pytest.param("_hidden", marks=pytest.mark.needs("matplotlib>=3.10")),
    "normal:std=0.05",
    "plugins/file.py:function:first=0.123456789,second=another,third=one_with_underscores",
    "x" * 200,
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:12])
def test_names_are_shown_as_they_are(name):
    """Not as formulas, not hidden, and in lines that leave room for what is drawn."""
    outcomes = {Cell(name, "relu"): FINISHED}
    signals = {Cell(name, "relu"): [of_variances([1.0, 2.0], 2)]}
    curves = comparison_figures.comparison_curves(outcomes, name)
    by_layer = comparison_figures.signals_by_layer(signals, name)
    seeds = accuracies(outcomes)
    assert legend(curves) == legend(by_layer) == [name]
    assert shown(curves._suptitle) == name
    assert [shown(label) for label in seeds.axes[0].get_yticklabels()] == [name]
    published = comparison_figures.published_curves({name: ([], FINISHED)}, name)
    assert shown(published.axes[0].title) == name
    for figure in (curves, by_layer, seeds, published):
        assert saved(figure)
        assert all(axes.get_position().width > 0.2 for axes in figure.axes)


@pytest.mark.parametrize(("schemes", "activations"), [(1, 1), (1, 4), (16, 1)])
def test_however_much_there_is_a_figure_is_as_wide_as_any(schemes, activations):
    """So that all are read well as thumbnails; the panels keep their height."""
    cells = [Cell(f"s{s}", f"a{a}") for a in range(activations) for s in range(schemes)]
    outcomes = {cell: [outcome(0, 0.1, 0.9)] for cell in cells}
    signals = {cell: [of_variances([1.0] * 3, 3)] for cell in cells}
    for figure, least in (
        (comparison_figures.comparison_curves(outcomes, "title"), 1.5),
        (accuracies(outcomes), 0.3 * schemes),
        (comparison_figures.signals_by_layer(signals, "title"), 1.5),
    ):
        figure.draw_without_rendering()
        assert figure.get_figwidth() == drawing.WIDTH
        assert all(axes.get_window_extent().height > least * figure.dpi for axes in figure.axes)


def test_a_comparison_of_which_all_diverged_is_drawn():
    """At iteration 0, before anything was measured, or later."""
    for lost in (outcome(0, diverged_at=0), outcome(0, 0.1, 0.2, diverged_at=150)):
        outcomes = {Cell("he", "relu"): [lost]}
        figure = accuracies(outcomes)
        assert [text.get_text() for text in figure.axes[0].texts] == ["1 diverged"]
        assert saved(figure)
        assert saved(comparison_figures.comparison_curves(outcomes, "title"))


MANY = {
    Cell(f"scheme {at:02}", activation): [
        outcome(seed, 0.1, (0.5 + at / 50) if activation == "relu" else 0.99 - at / 50)
        for seed in range(2)
    ]
    for activation in ("relu", "tanh")
    for at in range(20)
}


@pytest.mark.parametrize("activations", [("relu",), ("relu", "tanh")])
def test_of_many_schemes_the_best_and_evenly_chosen_others_are_drawn(activations):
    """In colours of their own, the means of all others thin in a grey that is none of these."""
    outcomes = {cell: of for cell, of in MANY.items() if cell.activation in activations}
    figure = comparison_figures.comparison_curves(outcomes, "title")
    named = legend(figure)
    assert len(named) == 8
    assert {"scheme 19", "scheme 00"} <= set(named)  # the best with relu, and with tanh or the last
    said = shown(figure.legends[0].get_title())
    assert "; light grey: means" in said
    assert "Shown are 8 of 20 schemes" in said
    for axes in figure.axes:
        grey = [line for line in axes.lines if line.get_color() == "0.8"]
        coloured = [line for line in axes.lines if line not in grey]
        assert (len(grey), len(coloured)) == (12, 8)
        assert {line.get_color() for line in coloured} == set(drawing.CYCLE)
        assert max(line.get_linewidth() for line in grey) < coloured[0].get_linewidth()
        assert len(axes.collections) == 8
        ends = {line.get_ydata()[-1] for line in axes.lines}
        assert ends == {
            of[0].accuracy for cell, of in MANY.items() if cell.activation == axes.get_title()
        }
    assert saved(figure)


def test_a_scheme_has_the_same_look_in_all_figures_of_many():
    """In the accuracies, which show all of them, and in the signals by layer."""
    outcomes = {cell: of for cell, of in MANY.items() if cell.activation == "relu"}
    table = [row(cell, of) for cell, of in outcomes.items()]
    curves = comparison_figures.comparison_curves(outcomes, "title")
    measured = {cell: [of_variances([1.0, 2.0], 2)] for cell in outcomes}
    signals = comparison_figures.signals_by_layer(measured, "title", table)
    assert legend(curves) == legend(signals)
    looks = [
        {
            name: (line.get_color(), line.get_marker(), line.get_linestyle())
            for name, line in zip(legend(each), each.legends[0].get_lines(), strict=True)
        }
        for each in (curves, signals)
    ]
    assert looks[0] == looks[1]
    all_of_them = accuracies(outcomes)
    (axes,) = all_of_them.axes
    marks = [line for line in axes.lines if line.get_markersize() == 8]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert len(names) == len(marks) == 20
    drawn = {
        name: (mark.get_color(), mark.get_marker()) for name, mark in zip(names, marks, strict=True)
    }
    assert all(drawn[name] == look[:2] for name, look in looks[0].items())
    assert all(len(axes.lines) == 20 for axes in signals.axes)
    assert saved(signals)


def test_of_many_seeds_that_diverged_some_are_drawn():
    """And the key says so."""
    lost = [outcome(seed, 0.1, 0.2, diverged_at=150) for seed in range(40)]
    figure = comparison_figures.comparison_curves({Cell("he", "relu"): lost + FINISHED}, "title")
    (axes,) = figure.axes
    assert len([line for line in axes.lines if line.get_marker() == "x"]) == 10
    assert "of which up to 10 of a scheme are drawn" in shown(figure.legends[0].get_title())


@pytest.mark.parametrize(
    ("losses", "scale"), [((2.0, 1.5, 1.2), "linear"), ((2.0, 0.2, 0.02), "log")]
)
def test_other_measures_have_plain_axes(losses, scale):
    """A loss is logarithmic over more than a power of ten; nothing is stretched towards 100 %."""
    measure = Measure("loss/valid", is_share=False, lower_is_better=True, over="step")
    outcomes = {Cell("he", ""): [outcome(0, *losses), outcome(1, *losses[:-1], losses[-1] / 2)]}
    curves = comparison_figures.comparison_curves(outcomes, "title", measure).axes[0]
    assert (curves.get_yscale(), curves.get_ylabel()) == (scale, "loss/valid")
    assert curves.get_xlabel() == "step"
    low, high = curves.get_ylim()
    assert low < losses[-1] / 2 < losses[0] < high
    rows = [row(cell, of) for cell, of in outcomes.items()]
    ends = comparison_figures.comparison_accuracies(outcomes, rows, "title", measure).axes[0]
    assert ends.get_xscale() == "linear"
    low, high = ends.get_xlim()
    assert low < losses[-1] / 2 < losses[-1] < high

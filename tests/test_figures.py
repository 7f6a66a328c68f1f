"""Figures: what is drawn, and that any run can be drawn."""

import io
import math

import numpy as np
import pytest
import torch

from initflow import figures
from initflow.activations import ACTIVATIONS
from initflow.comparison import Cell, Outcome, Row
from initflow.prediction import Interval
from initflow.signals import Signals

HISTORY = {
    "accuracy/test": [(0, 0.1), (500, 0.95)],
    "accuracy/validation": [(0, 0.12), (500, 0.94)],
    "loss/train": [(0, 2.3), (500, 0.2)],
    "loss/test": [(0, 2.3), (500, 0.25)],
    "lr": [(0, 0.1), (500, 0.096)],
}


def saved(figure):
    """Drawing it works, and gives a PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def lines(axes):
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def test_learning_curves_show_each_split_with_its_last_value():
    """Accuracy and loss, in plain numbers, axes named with their units."""
    figure = figures.learning_curves(HISTORY, [2.3, 1.5, 0.2], "he")
    accuracy, loss = figure.axes
    assert lines(accuracy) == {
        "test, finally 95.00%": HISTORY["accuracy/test"],
        "validation, finally 94.00%": HISTORY["accuracy/validation"],
    }
    assert lines(loss) == {
        "each training batch": [(0, 2.3), (1, 1.5), (2, 0.2)],
        "train, finally 0.2": HISTORY["loss/train"],
        "test, finally 0.25": HISTORY["loss/test"],
    }
    assert (accuracy.get_xlabel(), accuracy.get_ylabel()) == ("iteration", "accuracy")
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("iteration", "cross-entropy (nats)")
    assert saved(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("history", [{}, {"lr": [(0, 0.1)]}, {"loss/train": [(0, 0.0)]}], ids=str)
def test_a_run_that_measured_nothing_is_drawn_all_the_same(history):
    """A network that diverges at step 0 has no accuracy; a loss may be 0."""
    assert saved(figures.learning_curves(history, [], "normal"))


@pytest.mark.parametrize(("depth", "drawn"), [(1, 1), (2, 2), (5, 5), (21, 8)])
def test_weight_histograms_are_one_a_layer_or_evenly_chosen(depth, drawn):
    """The first and the last layer are always among them."""
    state = {f"fc{n}.weight": torch.randn(10, 10) for n in range(1, depth + 1)}
    figure = figures.weight_histograms(state, state, "he")
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert len(titles) == drawn
    assert titles[0].startswith("fc1: ")
    assert titles[-1].startswith(f"fc{depth}: ")
    assert (f"8 of {depth} layers" in figure.get_suptitle()) == (depth > 8)
    assert saved(figure)


def test_histograms_state_the_standard_deviation_before_and_after():
    """As numbers above each, and once for all which is which."""
    before = {"fc1.weight": torch.tensor([[-1.0, 1.0]])}
    after = {"fc1.weight": torch.tensor([[-2.0, 2.0]])}
    figure = figures.weight_histograms(before, after, "he")
    assert figure.axes[0].get_title() == "fc1: std 1 → 2"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["before training", "after training"]


def test_histograms_count_every_weight_once():
    """The shares of each side add up to one."""
    before = {"fc1.weight": torch.randn(30, 40)}
    after = {"fc1.weight": 2 * torch.randn(30, 40) + 1}
    (axes,) = figures.weight_histograms(before, after, "he").axes
    assert [patch.get_data().values.sum() for patch in axes.patches] == pytest.approx([1, 1])


@pytest.mark.parametrize("value", [0.0, 1e20, math.nan, math.inf])
def test_weights_that_are_all_equal_or_not_finite_are_drawn(value):
    """Zero initialization, and what divergence leaves."""
    zeros = {"fc1.weight": torch.zeros(5, 5)}
    filled = {"fc1.weight": torch.full((5, 5), value)}
    for before, after in ((zeros, filled), (filled, filled)):
        assert saved(figures.weight_histograms(before, after, "zero"))


def measured(value, layers=3):
    """Signals whose layers have two quantities, the last one but one."""
    values = {"preactivation_second_moment": value, "gradient_second_moment": value}
    found = {f"fc{n}": {**values, "dead_fraction": 0.25} for n in range(1, layers)}
    return Signals({**found, f"fc{layers}": values}, {})


PREDICTED = {
    "preactivation_second_moment": [Interval(1.0, 0.5, 2.0)] * 3,
    "activation_second_moment": [Interval(0.5, 0.25, 1.0)] * 2,
    "gradient_second_moment": [Interval(1.0, 0.5, 2.0)] * 2 + [Interval(1.0, 1.0, 1.0)],
}


def test_signals_over_training_are_a_panel_for_each_measured_quantity():
    """Layer × step; moments by their logarithm with their range, fractions from 0 to 100 %."""
    history = [(0, measured(0.01)), (500, measured(1.0)), (700, measured(10.0))]
    figure = figures.signals_over_training(history, "he")
    panels = {a.get_title().partition("\n")[0]: a for a in figure.axes if a.get_visible()}
    assert list(panels) == [
        "preactivation second moment",
        "gradient second moment",
        "dead fraction",
    ]
    moments = panels["preactivation second moment"].images[0].get_array()
    np.testing.assert_allclose(moments, [[-2, 0, 1]] * 3)
    assert panels["preactivation second moment"].get_title().endswith("\n0.01 to 10")
    (dead,) = panels["dead fraction"].images
    assert dead.get_clim() == (0, 1)
    np.testing.assert_array_equal(dead.get_array().filled(-1)[:2], 0.25)
    assert np.isnan(dead.get_array().data[2]).all()
    assert [t.get_text() for t in panels["dead fraction"].get_xticklabels()] == ["0", "500", "700"]
    assert saved(figure)


def test_predicted_and_measured_stand_side_by_side():
    """Marks for what was measured, lines for what was predicted, bands around them."""
    figure = figures.predicted_and_measured(PREDICTED, measured(0.7), "he")
    forward, backward = figure.axes
    marks = {line.get_label(): list(line.get_ydata()) for line in forward.lines}
    assert marks["preactivations"] == [0.7] * 3
    assert [list(line.get_ydata()) for line in backward.lines] == [[1.0] * 3, [0.7] * 3]
    (band,) = backward.collections
    spans = [tuple(segment[:, 1]) for segment in band.get_segments()]
    assert spans == [(0.5, 2.0), (0.5, 2.0), (1.0, 1.0)]
    assert backward.get_yscale() == "log"
    assert saved(figure)


def test_schemes_by_layer_have_a_column_for_each_activation():
    """And a line for each scheme, told apart by colour and mark, named once."""
    cells = {
        (scheme, activation): (PREDICTED, measured(value))
        for scheme, value in (("lecun", 0.3), ("he", 0.9))
        for activation in ("tanh", "relu")
    }
    figure = figures.schemes_by_layer(cells, "untrained")
    assert [axes.get_title() for axes in figure.axes] == ["tanh", "relu", "", ""]
    for axes in figure.axes:
        drawn = {line.get_label(): line for line in axes.lines if line.get_marker() != "None"}
        assert list(drawn["he"].get_ydata()) == [0.9] * 3
        assert drawn["he"].get_color() != drawn["lecun"].get_color()
        assert drawn["he"].get_marker() != drawn["lecun"].get_marker()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["lecun", "he"]
    assert saved(figure)


@pytest.mark.parametrize("value", [0.0, 0.5, 1e-300, 1e300, math.inf, math.nan, None])
def test_signals_that_no_axis_can_show_are_left_out(value):
    """What vanished, exploded or was not measured leaves a gap, and no warning."""
    bad = math.inf if value is None else value
    predicted = {name: [Interval(bad, bad, bad)] * len(of) for name, of in PREDICTED.items()}
    signals = measured(value)
    for layers in (2, 12):
        many = {name: [of[0]] * layers for name, of in predicted.items()}
        assert saved(figures.predicted_and_measured(many, measured(value, layers), "x"))
    assert saved(figures.predicted_and_measured(predicted, signals, "x"))
    assert saved(figures.schemes_by_layer({("a", "relu"): (predicted, signals)}, "x"))
    assert saved(figures.signals_over_training([(0, signals)], "x"))


@pytest.mark.parametrize(("depth", "drawn"), [(1, 1), (5, 5), (40, 24)])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_an_activation_is_drawn_over_what_each_layer_receives(depth, drawn, activation):
    """The function, its derivative, and both histograms, whose shares add up to one."""
    phi = ACTIVATIONS[activation]
    before = [torch.linspace(-3, 3, 500).reshape(100, 5)] * depth
    figure = figures.received(phi, before, before, "he")
    panels = [axes for axes in figure.axes if axes.lines]
    assert len(panels) == drawn
    assert ("24 of 40 layers" in figure.get_suptitle()) == (depth == 40)
    for axes in panels:
        function, derivative = axes.lines
        x = torch.tensor(function.get_xdata())
        np.testing.assert_allclose(function.get_ydata(), phi.function(x))
        np.testing.assert_allclose(derivative.get_ydata(), phi.derivative(x))
    histograms = [axes for axes in figure.axes if axes.patches]
    for axes in histograms:
        shares = [patch.get_data().values.sum() for patch in axes.patches]
        assert shares == pytest.approx([1, 1], abs=0.01)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        activation,
        "its derivative",
        "received before training",
        "received after training",
    ]
    if depth == 5:
        assert saved(figure)


@pytest.mark.parametrize("value", [0.0, 1e30, math.nan])
def test_layers_that_receive_one_value_or_none_are_drawn(value):
    """Zero initialization, explosion, and what divergence leaves."""
    received = [torch.full((10, 3), value)]
    figure = figures.received(ACTIVATIONS["sigmoid"], received, received, "zero")
    assert saved(figure)


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
    return figures.comparison_accuracies(outcomes, rows, "title")


def shown(text):
    """What is read in the end: matplotlib takes what is between two $ for a formula."""
    plain, is_formula = text._preprocess_math(text.get_text())
    assert not is_formula
    return plain.replace("\n", "")


def legend(figure):
    return [shown(text) for text in figure.legends[0].get_texts()]


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
    figure = figures.comparison_curves(OUTCOMES, "title")
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
    figure = figures.comparison_curves(OUTCOMES, "title")
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
    (axes,) = figures.comparison_curves({Cell("he", "relu"): [often, FINISHED[1]]}, "t").axes
    np.testing.assert_allclose(axes.lines[0].get_data(), [[0, 100], [0.11, 0.92]])


def test_accuracies_are_stretched_towards_the_top():
    """From 90 % to 99 % is as far as from 0 to 90 %, and everything drawn is inside."""
    (axes, _) = figures.comparison_curves(OUTCOMES, "title").axes
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
        (figures.comparison_curves(outcomes, "t"), "y"),
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
    figure = figures.comparison_accuracies({cell: of}, [wide], "title")
    low, high = figure.axes[0].get_xlim()
    assert 0.97 < low < 0.979
    assert 0.981 < high < 0.99
    assert saved(figure)


def test_32_schemes_can_be_told_apart():
    """By colour, dashes and mark."""
    looks = [figures._look(at) for at in range(32)]
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 32
    assert len({(look["color"], look["marker"]) for look in looks}) == 32


def test_signals_by_layer_are_means_in_a_band_on_a_logarithmic_axis():
    """A row for each activation: signal on the left, gradient on the right."""
    seeds = [of_variances([1.0, 10.0, 100.0], 3), of_variances([3.0, 10.0, 300.0], 3)]
    measured = {Cell("he", name): seeds for name in ("relu", "tanh")}
    figure = figures.signals_by_layer(measured, "title")
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
    figure = figures.signals_by_layer(measured, "title")
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [4.0] + [3.0] * (layers - 1))
    assert legend(figure) == ["he", "zero (0 or no number)", "none (0 or no number)"]
    assert saved(figure)


def test_published_curves_are_marks_over_ours():
    """A panel for each; what has no published curve shows ours alone."""
    published = [(0, 0.1), (150, 0.95)]
    figure = figures.published_curves(
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
    alone = figures.published_curves({"b": ([], FINISHED)}, "title")
    assert legend(alone) == ["ours"]


NAMES = [
    "a$b$",
    "_hidden",
    "normal:std=0.05",
    "plugins/file.py:function:first=0.123456789,second=another,third=one_with_underscores",
    "x" * 200,
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:12])
def test_names_are_shown_as_they_are(name):
    """Not as formulas, not hidden, and in lines that leave room for what is drawn."""
    outcomes = {Cell(name, "relu"): FINISHED}
    signals = {Cell(name, "relu"): [of_variances([1.0, 2.0], 2)]}
    curves = figures.comparison_curves(outcomes, name)
    by_layer = figures.signals_by_layer(signals, name)
    seeds = accuracies(outcomes)
    assert legend(curves) == legend(by_layer) == [name]
    assert shown(curves._suptitle) == name
    assert [shown(label) for label in seeds.axes[0].get_yticklabels()] == [name]
    published = figures.published_curves({name: ([], FINISHED)}, name)
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
        (figures.comparison_curves(outcomes, "title"), 1.5),
        (accuracies(outcomes), 0.3 * schemes),
        (figures.signals_by_layer(signals, "title"), 1.5),
    ):
        figure.draw_without_rendering()
        assert figure.get_figwidth() == figures.WIDTH
        assert all(axes.get_window_extent().height > least * figure.dpi for axes in figure.axes)


def test_a_comparison_of_which_all_diverged_is_drawn():
    """At iteration 0, before anything was measured, or later."""
    for lost in (outcome(0, diverged_at=0), outcome(0, 0.1, 0.2, diverged_at=150)):
        outcomes = {Cell("he", "relu"): [lost]}
        figure = accuracies(outcomes)
        assert [text.get_text() for text in figure.axes[0].texts] == ["1 diverged"]
        assert saved(figure)
        assert saved(figures.comparison_curves(outcomes, "title"))


def test_png_is_the_files_content():
    """In the figure's own pixels."""
    content = figures.png(figures.comparison_curves({Cell("he", "relu"): FINISHED}, "title"))
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20]) == figures.WIDTH * figures.DPI

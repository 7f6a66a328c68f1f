"""Figures of one network: what is drawn, and that any run can be drawn."""

import math

import numpy as np
import pytest
import torch

from initflow.diagnostics.signals import Signals
from initflow.initializers.activations import ACTIVATIONS
from initflow.reporting import figures
from initflow.theory.prediction import Interval
from tests.drawn import saved

HISTORY = {
    "accuracy/test": [(0, 0.1), (500, 0.95)],
    "accuracy/validation": [(0, 0.12), (500, 0.94)],
    "loss/train": [(0, 2.3), (500, 0.2)],
    "loss/peak": [(0, 2.3), (500, 2.4)],  # no curve
    "loss/test": [(0, 2.3), (500, 0.25)],
    "lr": [(0, 0.1), (500, 0.096)],
}


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
    shares = {"mean_cosine": 0.5, "dead_fraction": 0.25}
    found = {f"fc{n}": {**values, **shares} for n in range(1, layers)}
    return Signals({**found, f"fc{layers}": values}, {})


PREDICTED = {
    "preactivation_second_moment": [Interval(1.0, 0.5, 2.0, 0.9)] * 3,
    "activation_second_moment": [Interval(0.5, 0.25, 1.0, 0.45)] * 2,
    "gradient_second_moment": [Interval(1.0, 0.5, 2.0, 0.9)] * 2 + [Interval(1.0, 1.0, 1.0, 1.0)],
}


def test_signals_over_training_are_a_panel_for_each_measured_quantity():
    """Layer × step; moments by their logarithm with their range, fractions from 0 to 100 %."""
    history = [(0, measured(0.01)), (500, measured(1.0)), (700, measured(10.0))]
    figure = figures.signals_over_training(history, "he")
    panels = {a.get_title().partition("\n")[0]: a for a in figure.axes if a.get_visible()}
    assert list(panels) == [
        "preactivation second moment",
        "mean cosine",
        "gradient second moment",
        "dead fraction",
    ]
    moments = panels["preactivation second moment"].images[0].get_array()
    np.testing.assert_allclose(moments, [[-2, 0, 1]] * 3)
    assert panels["preactivation second moment"].get_title().endswith("\n0.01 to 10")
    assert panels["mean cosine"].images[0].get_clim() == (0, 1)
    (dead,) = panels["dead fraction"].images
    assert dead.get_clim() == (0, 1)
    np.testing.assert_array_equal(dead.get_array().filled(-1)[:2], 0.25)
    assert np.isnan(dead.get_array().data[2]).all()
    assert [t.get_text() for t in panels["dead fraction"].get_xticklabels()] == ["0", "500", "700"]
    assert saved(figure)


def test_predicted_and_measured_stand_side_by_side():
    """Marks for what was measured, lines for the predicted medians, bands around them."""
    figure = figures.predicted_and_measured(PREDICTED, measured(0.7), "he")
    forward, backward = figure.axes
    marks = {line.get_label(): list(line.get_ydata()) for line in forward.lines}
    assert marks["preactivations"] == [0.7] * 3
    assert [list(line.get_ydata()) for line in backward.lines] == [[0.9, 0.9, 1.0], [0.7] * 3]
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
    predicted = {name: [Interval(bad, bad, bad, bad)] * len(of) for name, of in PREDICTED.items()}
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
        x = torch.as_tensor(function.get_xdata())
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

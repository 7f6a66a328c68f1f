"""The figure of any model: each layer a line, whatever their number, names and values."""

import itertools
import math

import pytest

from initflow.diagnostics.signals import Signals
from initflow.reporting import model_figures
from initflow.theory.prediction import Interval
from tests.drawn import saved, shown


def measured(layers, name="encoder.layers.{}.linear", **values):
    values = {"preactivation_second_moment": 0.5, "gradient_second_moment": 1e-3, **values}
    found = {name.format(n): {**values, "dead_fraction": n / layers} for n in range(layers)}
    return Signals(found, {})


@pytest.mark.parametrize("layers", [1, 2, 5, 54, 101])
def test_every_layer_is_a_line_with_its_name(layers):
    """From the first at the top to the last, none over another."""
    figure = model_figures.signals_by_layer(measured(layers), "a model")
    signal, gradient, shares = figure.axes
    assert [a.get_title() for a in figure.axes] == [
        "signal, forward ↓",
        "gradient, backward ↑",
        "shares",
    ]
    names = [shown(label) for label in signal.get_yticklabels()]
    assert names == [f"encoder.layers.{n}.linear" for n in range(layers)]
    assert signal.get_ylim() == (layers - 0.5, -0.5)
    assert list(signal.lines[0].get_xdata()) == [0.5] * layers
    assert list(gradient.lines[0].get_xdata()) == [1e-3] * layers
    assert list(shares.lines[0].get_xdata()) == [n / layers for n in range(layers)]
    assert saved(figure).startswith(b"\x89PNG")
    boxes = [label.get_window_extent() for label in signal.get_yticklabels()]
    assert all(a.y0 >= b.y1 - 1 for a, b in itertools.pairwise(boxes))
    legends = [axes.get_legend().get_window_extent() for axes in figure.axes]
    assert all(box.y0 >= 0 for box in legends)
    assert all(box.y1 < boxes[-1].y0 for box in legends)


def test_of_very_many_layers_some_are_named():
    """The first and the last among them, on a figure that can still be opened."""
    figure = model_figures.signals_by_layer(measured(1_000), "a model")
    names = [shown(label) for label in figure.axes[0].get_yticklabels()]
    assert 100 < len(names) < 250
    assert (names[0], names[-1]) == ("encoder.layers.0.linear", "encoder.layers.999.linear")
    assert figure.get_figheight() < 30


def test_long_names_end_as_they_end():
    """What tells layers apart is kept, and a dollar sign is none of a formula."""
    name = "module." * 20 + "$block${}.weight"
    labels = model_figures.signals_by_layer(measured(2, name), "a $model$").axes[0]
    names = [shown(label) for label in labels.get_yticklabels()]
    assert names[1].startswith("…")
    assert names[1].endswith("module.$block$1.weight")
    assert {len(one) for one in names} == {model_figures.LONGEST}


@pytest.mark.parametrize("value", [0.0, math.nan, 1e300, 1e-300, None])
def test_what_a_logarithm_cannot_show_has_no_mark(value):
    """And a layer that has one is joined to the next that has."""
    found = measured(3)
    found.layers["encoder.layers.1.linear"]["gradient_second_moment"] = value
    figure = model_figures.signals_by_layer(found, "a model")
    (line,) = figure.axes[1].lines
    assert list(line.get_ydata()) == [0, 2]
    assert saved(figure)


def test_layers_that_are_not_finite_are_coloured():
    """By name, and an empty panel says that it is empty."""
    found = {"fc/1": {"dead_fraction": 0.5}, "fc2": {"dead_fraction": 0.0}}
    odd = Signals(found, {"preactivation/fc/1": 12})
    figure = model_figures.signals_by_layer(odd, "a model")
    colours = [label.get_color() for label in figure.axes[0].get_yticklabels()]
    assert colours == [model_figures.ODD, "black"]
    assert figure.axes[0].get_ylabel() == "coloured: NaN or infinite values"
    assert figure.axes[1].get_xlabel() == "nothing measured that can be drawn"
    assert saved(figure)


def over_time(times, layers=("lstm.l0",)):
    """What was measured and predicted: twice as much each time step, the prediction 10 % higher."""
    values = [2.0**n for n in range(times)]
    series = {"hidden_second_moment": values, "hidden_gradient_second_moment": [*values[:-1], None]}
    intervals = [Interval(1.1 * value, value / 2, 2 * value, value) for value in values]
    predicted = {"hidden_second_moment": intervals}
    signals = Signals({}, {}, by_time=dict.fromkeys(layers, series))
    return dict.fromkeys(layers, predicted), signals


def test_what_a_recurrent_layer_does_through_time():
    """Marks of what was measured, a line of what was predicted, a colour for each scheme."""
    schemes = {"he": over_time(5), "xavier": over_time(5)}
    figure = model_figures.through_time(schemes, "a model")
    signal, gradient = figure.axes
    assert [axes.get_title().partition(",")[0] for axes in figure.axes] == ["signal", "gradient"]
    line, marks, *others = signal.lines
    assert list(line.get_xdata()) == list(marks.get_xdata()) == [1, 2, 3, 4, 5]
    assert list(line.get_ydata()) == pytest.approx([1.1, 2.2, 4.4, 8.8, 17.6])
    assert list(marks.get_ydata()) == [1, 2, 4, 8, 16]
    assert line.get_color() == marks.get_color() != others[0].get_color()
    assert len(signal.collections) == 2
    assert not len(gradient.lines[0].get_xdata())
    assert math.isnan(gradient.lines[1].get_ydata()[-1])
    assert saved(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize(("times", "layers"), [(1, 1), (784, 2), (3, 12)])
def test_a_row_for_each_recurrent_layer_of_a_few(times, layers):
    """The first and the last among them."""
    names = [f"lstm.l{n}" for n in range(layers)]
    figure = model_figures.through_time({"he": over_time(times, names)}, "a $model$")
    labels = [axes.get_ylabel() for axes in figure.axes[::2]]
    assert (labels[0], labels[-1]) == (names[0], names[-1])
    assert len(labels) == min(layers, 8)
    assert saved(figure).startswith(b"\x89PNG")

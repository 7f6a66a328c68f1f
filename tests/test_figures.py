"""Figures: what is drawn, and that any run can be drawn."""

import io
import math

import pytest
import torch

from initflow import figures

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

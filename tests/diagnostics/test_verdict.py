"""Verdicts: each rule, on the networks that it is meant for, and what is advised."""

import pytest

from initflow.core.configurations import VERDICTS, TrainConfig
from initflow.diagnostics import measure
from initflow.diagnostics.signals import Signals, Size
from initflow.diagnostics.verdict import Inputs, Verdict, advice, judge
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.built_in import BUILT_IN
from initflow.initializers.plugins import find
from initflow.training import datasets, model


def verdict(init, activation, hidden, bias_init="pytorch"):
    splits = datasets.load(TrainConfig(dataset="digits"))
    probe = measure.probe(splits.train, 300)
    widths = (splits.pixels, *hidden, 10)
    parameters = model.initialize(
        widths, find(init), ACTIVATIONS["relu"], bias_init=bias_init, seed=0
    )
    (seen,) = measure.observe(parameters, ACTIVATIONS[activation], probe)
    saturating = seen.signals.layers if ACTIVATIONS[activation].saturates else ()
    return judge(seen.signals, Inputs.of(probe.images), saturating)


DEEP, ONE = [100] * 20, [100]


@pytest.mark.parametrize(
    ("init", "activation", "hidden", "forward", "backward"),
    [
        ("he", "relu", ONE, "stable", "stable"),
        ("xavier", "tanh", ONE, "stable", "stable"),
        ("pytorch", "relu", ONE, "stable", "stable"),
        ("he", "relu", DEEP, "stable", "stable"),
        ("he", "leaky_relu", DEEP, "stable", "stable"),
        ("xavier", "tanh", DEEP, "stable", "stable"),
        ("lecun", "relu", DEEP, "vanishing", "vanishing"),
        ("xavier", "relu", DEEP, "vanishing", "vanishing"),
        ("pytorch", "relu", DEEP, "vanishing", "vanishing"),
        ("xavier", "sigmoid", DEEP, "vanishing", "vanishing"),
        ("random", "tanh", DEEP, "vanishing", "vanishing"),
        ("normal", "relu", DEEP, "exploding", "exploding"),
        ("normal", "linear", [100] * 50, "exploding", "exploding"),
        ("normal", "tanh", ONE, "saturated", "stable"),
        ("normal", "tanh", DEEP, "saturated", "exploding"),
        ("zero", "relu", ONE, "symmetric", "symmetric"),
        ("zero", "sigmoid", DEEP, "symmetric", "symmetric"),
        ("he", "relu", [], "stable", "stable"),
        ("zero", "relu", [], "stable", "stable"),
        ("pytorch", "relu", [20_000], "stable", "stable"),
        ("random", "sigmoid", [30] * 60, "vanishing", "vanishing"),  # float32 gradients of 0
    ],
)
def test_each_rule(init, activation, hidden, forward, backward):
    """On real networks and images."""
    assert verdict(init, activation, hidden, "zeros") == Verdict(forward, backward)


def test_all_weights_equal_is_symmetric():
    """Backward nothing comes but the logits' rounding: equal for all units, or next to 0."""
    found = verdict("constant", "tanh", [5, 5], "zeros")
    assert found.forward == "symmetric"
    assert found.backward in ("symmetric", "vanishing")


@pytest.mark.parametrize(
    ("quantity", "activation", "found"),
    [("dead_fraction", "relu", "dead"), ("saturated_fraction", "tanh", "saturated")],
)
def test_the_cause_of_a_vanishing_gradient_is_told(quantity, activation, found):
    """Units that are dead or saturated let none pass, whatever the weights' size."""
    after = {"signal_variance": 1.0, "gradient_second_moment": 1.0}
    first = {"signal_variance": 1.0, "gradient_second_moment": 1e-9, quantity: 0.95}
    sizes = {"fc1": Size(4, 4), "fc2": Size(3, 3)}
    signals = Signals({"fc1": first, "fc2": after}, {}, sizes)
    saturating = ["fc1"] if ACTIVATIONS[activation].saturates else []
    assert judge(signals, Inputs(1.0), saturating) == Verdict(found, found)


def test_a_single_unit_is_not_a_copy():
    """Nor are layers of one unit symmetric."""
    assert verdict("he", "relu", [1, 1]).forward != "symmetric"


def test_relu_is_not_saturated():
    """Half of its activations have slope 0, and that is as it should be."""
    assert verdict("he", "relu", ONE).forward == "stable"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("found", VERDICTS)
@pytest.mark.parametrize("backward", ["stable", "vanishing", "exploding"])
def test_every_verdict_but_stable_has_its_advice(activation, found, backward):
    """It says what is wrong and names something else to try, never what was tried."""
    phi = ACTIVATIONS[activation]
    for scheme in BUILT_IN:
        said = advice(Verdict(found, backward), phi, scheme)
        if found == backward == "stable":
            assert said == ""
        else:
            assert "ry " in said
            assert f"init={scheme}." not in said
            assert "{" not in said

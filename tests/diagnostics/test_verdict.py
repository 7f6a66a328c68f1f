"""Verdicts: each rule, on the networks that it is meant for, and what is advised."""

import pytest

from initflow.core.configurations import VERDICTS, TrainConfig
from initflow.diagnostics import measure
from initflow.diagnostics.signals import Signals, Size
from initflow.diagnostics.verdict import Inputs, Verdict, advice, judge, margin
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.built_in import BUILT_IN
from initflow.initializers.plugins import find
from initflow.training import datasets, model


def seen(init, activation, hidden, bias_init="pytorch"):
    """The signals of a network on digits, what these are, and which layers saturate."""
    splits = datasets.load(TrainConfig(dataset="digits"))
    probe = measure.probe(splits.train, 300)
    widths = (splits.pixels, *hidden, 10)
    parameters = model.initialize(
        widths, find(init), ACTIVATIONS["relu"], bias_init=bias_init, seed=0
    )
    (found,) = measure.observe(parameters, [ACTIVATIONS[activation]], probe)
    saturating = found.signals.layers if ACTIVATIONS[activation].saturates else ()
    return found.signals, Inputs.of(probe.images), saturating


def verdict(*network):
    return judge(*seen(*network))


DEEP, ONE = [100] * 20, [100]
GROWS = (
    "its gradient's squared length {} 533-fold, 1.13-fold a layer, which is {} from 10,000-fold "
    "on: at that rate at 74 layers."
)


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
        ("he", "relu", [100] * 50, "stable", "stable"),
        ("he", "relu", [100] * 100, "ordered", "stable"),
        ("he", "leaky_relu", [100] * 100, "ordered", "stable"),
        ("xavier", "sigmoid", [100] * 2, "stable", "stable"),
        ("xavier", "sigmoid", [100] * 3, "ordered", "stable"),
        ("xavier", "tanh", [100] * 100, "stable", "stable"),
        ("he", "tanh", [100] * 50, "stable", "stable"),
        ("he", "tanh", [100] * 100, "stable", "exploding"),
    ],
)
def test_each_rule(init, activation, hidden, forward, backward):
    """On real networks and images."""
    assert verdict(init, activation, hidden, "zeros") == Verdict(forward, backward)


def test_what_looks_alike_is_told_by_number():
    """Under He's scheme with ReLU the cosine is 0.9988 after 100 layers, 0.69 in the pixels."""
    signals, inputs, _ = seen("he", "relu", [100] * 100, "zeros")
    assert inputs.mean_cosine == pytest.approx(0.691, abs=2e-3)
    assert signals.layers["fc100"]["mean_cosine"] == pytest.approx(0.9988, abs=2e-4)
    assert signals.layers["fc20"]["mean_cosine"] == pytest.approx(0.92, abs=0.04)


def test_random_biases_make_images_alike():
    """They are the same for all images: tanh keeps these apart only without."""
    assert verdict("xavier", "tanh", [100] * 100, "pytorch").forward == "ordered"
    said = advice(Verdict("ordered", "stable"), ACTIVATIONS["tanh"], "xavier")
    assert "bias_init=zeros" in said


def layers(*cosines, **of_last_hidden):
    """The signals of layers that keep the signal's size and have these mean cosines."""
    found = {
        f"fc{at}": {"signal_variance": 1.0, "gradient_second_moment": 1.0, "mean_cosine": cosine}
        for at, cosine in enumerate(cosines)
    }
    found[f"fc{len(cosines) - 2}"] |= of_last_hidden
    return Signals(found, {}, dict.fromkeys(found, Size(4, 4)))


@pytest.mark.parametrize(
    ("cosines", "of_inputs", "of_last_hidden", "forward"),
    [
        ((0.6, 0.9941, 0.5), 0.4, {}, "ordered"),  # 1 - c is less than 0.006
        ((0.6, 0.9939, 1.0), 0.4, {}, "stable"),  # the logits do not count
        ((0.4, 0.9941, 0.5), None, {}, "ordered"),  # as the first layer has it
        ((0.9, 0.9941, 0.5), None, {}, "stable"),
        ((1.0, 1.0, 1.0), 1.0, {}, "stable"),  # the images are all the same
        ((0.6, 0.5, 1.0, 0.5), 0.4, {"branch_ratio": 1.0}, "stable"),  # the trunk carries more
        ((0.6, 0.9999, 0.5, 0.5), 0.4, {"branch_ratio": 1.0}, "ordered"),
    ],
)
def test_images_are_alike_at_the_last_hidden_layer(cosines, of_inputs, of_last_hidden, forward):
    """By their share in the inputs, on the trunk."""
    signals = layers(*cosines, **of_last_hidden)
    assert judge(signals, Inputs(1.0, of_inputs), ()).forward == forward


@pytest.mark.parametrize(
    ("gradient", "told"),
    [
        (533.0, GROWS.format("grows", "exploding")),
        (1 / 533, GROWS.format("shrinks", "vanishing")),
        (99.0, ""),
        (0.0, ""),
        (20_000.0, ""),
    ],
)
def test_what_is_stable_at_this_depth_alone_is_told(gradient, told):
    """From half way to the rule's factor on, by the logarithm; not where it is unstable."""
    signals = layers(*[0.5] * 51)
    signals.layers["fc0"]["gradient_second_moment"] = gradient
    found = judge(signals, Inputs(1.0, 0.5), ())
    said = margin(found, signals, Inputs(1.0, 0.5))
    assert said.endswith(told)
    assert bool(said) == bool(told)


def test_hes_tanh_of_50_layers_is_stable_but_not_at_any_depth():
    """Its gradient grows by χ₁ = 1.1 a layer: some hundredfold here, and without end."""
    signals, inputs, saturating = seen("he", "tanh", [100] * 50, "zeros")
    found = judge(signals, inputs, saturating)
    assert (found.backward, "a layer, which is exploding" in margin(found, signals, inputs)) == (
        "stable",
        True,
    )


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

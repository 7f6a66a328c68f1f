"""Predictions for one network: exact cases, and bands held against simulation."""

import functools
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from initflow.core.configurations import TrainConfig
from initflow.diagnostics import measure
from initflow.diagnostics.reading import layers_of
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.initializers.scheme import Place, Scheme, fans
from initflow.theory.prediction import (
    PREDICTED,
    Ends,
    Interval,
    LayerStatistics,
    predict,
    predicted,
)
from initflow.training import datasets, model
from initflow.training.propagation import Pass

NETWORKS = 400
ENDS = {"preactivation_second_moment": (-2, 0), "gradient_second_moment": (0, -2)}


def one_image(q=1.0, gradient=1.0):
    """The ends of a network with one image, whose pixels have mean square ``q``."""
    return Ends(1, torch.tensor([q], dtype=torch.float64), 1.0, gradient, 1.0)


def square_layers(width, depth, sigma_w2, bias_variance=0.0):
    return [LayerStatistics(width, width, sigma_w2 / width, bias_variance)] * depth


@functools.cache
def simulate(init, activation, *, depth, width, normalize="unit", bias_init="zeros", images=200):
    """Second moments of many random networks, by quantity (layers, networks), and predicted."""
    splits = datasets.load(TrainConfig(dataset="digits", normalize=normalize))
    probe, phi, scheme = measure.probe(splits.train, images), ACTIVATIONS[activation], find(init)
    widths = (splits.pixels, *([width] * depth), 10)
    stack = model.Parameters(widths, NETWORKS)
    for member in range(NETWORKS):
        stream = torch.Generator().manual_seed(member)
        for weights, biases in zip(stack.weights, stack.biases, strict=True):
            weight, bias = weights[member], biases[member]
            at = Place(*fans(weight.shape), phi)
            scheme.fill_layer(weight, bias, at, stream)
            bound = model.bias_bound(bias_init, at.fan_in)
            bias.uniform_(-bound, bound, generator=stream)
    both = Pass(stack, [phi] * stack.members, len(probe))
    images, labels = probe.images.unsqueeze(0), probe.labels.unsqueeze(0)
    both.forward(images)
    both.losses(labels)
    both.backward(labels, stack.zeros_like())
    tensors = (both.preactivations, both.outputs, both.gradients)
    measured = {
        quantity: torch.stack([of.square().mean((1, 2)) for of in layers]).double()
        for quantity, layers in zip(PREDICTED, tensors, strict=True)
    }
    # The prediction goes backward from each network's own gradient at the logits.
    measured["gradient_second_moment"] /= measured["gradient_second_moment"][-1].clone()
    ends = Ends.of(probe.images, both.gradients[-1][0])
    unit = replace(ends, gradient_moment=1.0)
    layers = layers_of(scheme, stack, phi, bias_init)
    return measured, predicted(layers, phi, unit)


def coverage(measured, predicted):
    """The share of networks in each layer's band."""
    return (
        torch.tensor(
            [
                [interval.holds(value) for value in values]
                for interval, values in zip(predicted, measured.tolist(), strict=True)
            ]
        )
        .double()
        .mean(1)
    )


@pytest.mark.parametrize(
    ("init", "activation", "settings"),
    [
        ("he", "relu", {"depth": 10, "width": 50}),
        ("he", "relu", {"depth": 20, "width": 60}),
        ("he", "relu", {"depth": 1, "width": 100}),
        ("he", "relu", {"depth": 10, "width": 50, "images": 1}),
        ("lecun", "relu", {"depth": 10, "width": 30, "bias_init": "pytorch"}),
        ("he_uniform", "leaky_relu", {"depth": 10, "width": 50}),
        ("xavier", "tanh", {"depth": 10, "width": 50}),
        ("he", "tanh", {"depth": 10, "width": 50, "normalize": "standard"}),
        ("normal:std=0.3", "tanh", {"depth": 10, "width": 50}),
        ("he", "relu", {"depth": 50, "width": 20}),  # more layers than units
        ("normal", "tanh", {"depth": 30, "width": 30}),  # chaotic: χ₁ is 3
        ("uniform", "tanh", {"depth": 20, "width": 50}),
        ("normal", "sigmoid", {"depth": 20, "width": 50}),
        ("xavier", "sigmoid", {"depth": 10, "width": 50}),
        ("lecun", "selu", {"depth": 10, "width": 50}),
        ("he", "elu", {"depth": 10, "width": 50}),
        ("lecun", "linear", {"depth": 10, "width": 50}),
        ("lecun", "softplus", {"depth": 5, "width": 100}),
        ("he", "gelu", {"depth": 5, "width": 100}),
        ("he", "silu", {"depth": 5, "width": 100}),
    ],
    ids=str,
)
def test_the_bands_hold_95_percent_of_networks(init, activation, settings):
    """From 90 to 99 % of 400 networks, whatever the activation; not much less in any layer."""
    measured, found = simulate(init, activation, **settings)
    for quantity in PREDICTED:
        intervals, values = found.by_layer[quantity], measured[quantity]
        if quantity == "gradient_second_moment":  # at the logits it is what it starts from
            intervals, values = intervals[:-1], values[:-1]
        held = coverage(values, intervals)
        assert 0.90 <= held.mean() <= 0.99, quantity
        assert held.min() >= 0.82, quantity
        # Narrow enough to mean something: as wide as the networks are spread, not wider.
        spread = values.quantile(0.975, 1).log() - values.quantile(0.025, 1).log()
        widths = torch.tensor([math.log(at.high / at.low) for at in intervals])
        assert (widths / spread).max() < 1.6, quantity


def shares_below(values, intervals):
    """The shares of networks whose ``values`` (layers, networks) lie below the medians."""
    medians = torch.tensor([[at.median] for at in intervals], dtype=torch.float64)
    return (values < medians).double().mean(1)


@pytest.mark.parametrize(
    ("init", "activation", "settings", "below_mean"),
    [
        ("he", "relu", {"depth": 30, "width": 60}, 0.78),  # as 50 layers of 100 have
        ("he", "relu", {"depth": 20, "width": 60}, 0.72),
        ("lecun", "relu", {"depth": 10, "width": 30, "bias_init": "pytorch"}, 0.54),
        ("xavier", "tanh", {"depth": 10, "width": 50}, 0.58),
    ],
    ids=str,
)
def test_half_of_all_networks_lie_below_the_median(init, activation, settings, below_mean):
    """Of signals; of gradients from 25 to 65 %. The mean a few networks carry: most lie below."""
    measured, found = simulate(init, activation, **settings)
    for quantity, (after, before) in ENDS.items():
        low, high = (0.42, 0.58) if quantity != "gradient_second_moment" else (0.25, 0.65)
        layers = slice(None, -1)  # at the logits the gradient is what it starts from
        shares = shares_below(measured[quantity][layers], found.by_layer[quantity][layers])
        assert low < shares.mean() < high, quantity
        change, factors = (
            found.changes[quantity],
            measured[quantity][after] / measured[quantity][before],
        )
        assert low < shares_below(factors.unsqueeze(0), [change]) < high, quantity
        held = coverage(factors.unsqueeze(0), [change])
        assert 0.9 <= held <= 0.995, quantity
    change, signals = (
        found.changes["preactivation_second_moment"],
        measured["preactivation_second_moment"],
    )
    share = (signals[-2] / signals[0] < change.expected).double().mean().item()
    assert share == pytest.approx(below_mean, abs=0.05)


def test_the_median_of_a_change_is_not_the_change_of_the_medians():
    """A network whose first layer came out small has a small last one, too: exactly, of ReLU."""
    found = predicted(square_layers(100, 11, 2.0), ACTIVATIONS["relu"], one_image())
    change = found.changes["preactivation_second_moment"]
    log_variance = 9 * math.log1p(5 / 100)  # of the nine layers between
    assert change.expected == pytest.approx(1.0)
    assert math.log(change.median) == pytest.approx(-log_variance / 2, abs=0.02)
    spread = 1.959964 * math.sqrt(log_variance)
    assert math.log(change.high) == pytest.approx(spread - log_variance / 2, abs=0.06)
    one = predicted(square_layers(100, 2, 2.0), ACTIVATIONS["relu"], one_image())
    assert set(one.changes.values()) == {Interval(1.0, 1.0, 1.0, 1.0)}
    assert not predicted(square_layers(100, 1, 2.0), ACTIVATIONS["relu"], one_image()).changes


def test_a_wide_network_meets_the_expected_values():
    """Within a few per cent, layer by layer, forward and backward."""
    splits = datasets.load(TrainConfig(dataset="digits"))
    probe = measure.probe(splits.train, 100)
    for init, activation in (("he", "relu"), ("xavier", "tanh"), ("lecun", "sigmoid")):
        widths = (splits.pixels, *([2_000] * 4), 2_000)
        phi, scheme = ACTIVATIONS[activation], find(init)
        parameters = model.initialize(widths, scheme, phi, bias_init="pytorch", seed=1)
        (seen,) = measure.observe(parameters, [phi], probe)
        layers = layers_of(scheme, parameters, phi, "pytorch")
        ends = Ends.of_images(probe.images).with_gradient(
            seen.gradient_moment, seen.gradient_alignment
        )
        predicted = predict(layers, phi, ends)
        for quantity, intervals in predicted.items():
            for interval, value in zip(intervals, seen.signals.by_layer(quantity), strict=False):
                assert value == pytest.approx(interval.expected, rel=0.08), (activation, quantity)


@pytest.mark.parametrize(("depth", "ratio"), [(10, 1.629), (50, 11.47)])
def test_relus_band_is_the_exact_second_moment_law(depth, ratio):
    """E[M] = M₀ and E[M²]/M₀² = ∏(1 + 5/n) fix the log-normal: median and both edges."""
    predicted = predict(square_layers(100, depth + 1, 2.0), ACTIVATIONS["relu"], one_image(q=3.0))
    interval = predicted["activation_second_moment"][depth - 1]
    assert interval.expected == pytest.approx(3.0)
    log_variance = math.log(ratio)
    assert log_variance == pytest.approx(depth * math.log1p(5 / 100), rel=1e-3)
    for edge, z in ((interval.low, -1.959964), (interval.median, 0.0), (interval.high, 1.959964)):
        exact = math.log(3.0) - log_variance / 2 + z * math.sqrt(log_variance)
        assert math.log(edge) == pytest.approx(exact, abs=0.05)


def test_factors_per_layer_of_relu():
    """He 1, LeCun 1/2 and PyTorch's default 1/6, forward and backward."""
    for sigma_w2, factor in ((2.0, 1.0), (1.0, 0.5), (1 / 3, 1 / 6)):
        predicted = predict(square_layers(100, 6, sigma_w2), ACTIVATIONS["relu"], one_image())
        for quantity, step in (
            ("preactivation_second_moment", 1),
            ("gradient_second_moment", -1),
        ):
            expected = [at.expected for at in predicted[quantity]][::step]
            assert [b / a for a, b in pairwise(expected)] == pytest.approx([factor] * 5)


def test_bands_narrow_with_the_width_and_open_with_the_depth():
    """As 1/√n, and layer by layer."""

    def width_of(interval):
        return math.log(interval.high / interval.low)

    narrow, wide = (
        predict(square_layers(n, 8, 2.0), ACTIVATIONS["relu"], one_image()) for n in (100, 1_600)
    )
    for quantity, step in (("preactivation_second_moment", 1), ("gradient_second_moment", -1)):
        widths = [width_of(at) for at in narrow[quantity]][::step]
        assert all(a < b for a, b in pairwise(widths))
        assert width_of(narrow[quantity][4]) / width_of(wide[quantity][4]) == pytest.approx(4, 0.05)


def test_images_of_all_norms_are_predicted_together():
    """The mean over images of a curved function is not the function of their mean."""
    phi = ACTIVATIONS["tanh"]
    several = Ends(2, torch.tensor([0.01, 8.0], dtype=torch.float64), 1.0, 1.0, 1.0)
    apart = [
        predict(square_layers(100, 2, 1.0), phi, one_image(q))["activation_second_moment"][0]
        for q in (0.01, 8.0)
    ]
    together = predict(square_layers(100, 2, 1.0), phi, several)["activation_second_moment"][0]
    assert together.expected == pytest.approx(sum(at.expected for at in apart) / 2)


def test_a_scheme_that_states_no_variance_is_predicted_from_its_weights():
    """And one that does from what it states."""
    parameters, relu = model.Parameters((4, 3)), ACTIVATIONS["relu"]
    weight, bias = parameters.weights[0], parameters.biases[0]
    weight[:, 1:] = 2.0
    bias[:, 0] = 3.0
    stated = find("he")
    silent = replace(stated, stated_variance=None)
    assert layers_of(stated, parameters, relu, "zeros") == [LayerStatistics(4, 3, 0.5, 0.0)]
    (sampled,) = layers_of(silent, parameters, relu, "pytorch")
    assert sampled.weight_variance == pytest.approx(weight.var(correction=0).item())
    assert sampled.bias_variance == pytest.approx(1 / 12)

    def both(weight, bias):
        """Sets them all to 5."""

    setting = Scheme.of(both, "both", "a test")
    (sampled,) = layers_of(setting, parameters, relu, "pytorch")
    assert sampled.bias_variance == pytest.approx(3.0)  # mean square of (3, 0, 0)
    saying = replace(setting, stated_bias_variance=lambda fan_in, layer: fan_in + layer)
    assert layers_of(saying, parameters, relu, "pytorch")[0].bias_variance == 4


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sigma_w2", [0.0, 1e-8, 1e8])
def test_extreme_weights_are_predicted_without_nan(activation, sigma_w2):
    """Zero weights, vanishing and exploding ones: low ≤ high, and no NaN."""
    predicted = predict(square_layers(10, 4, sigma_w2), ACTIVATIONS[activation], one_image())
    for intervals in predicted.values():
        for at in intervals:
            assert 0 <= at.low <= at.high
            assert at.expected >= 0


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize(("width", "depth"), [(1, 40), (10, 100), (30, 250)])
def test_the_deepest_and_narrowest_are_predicted_without_nan(activation, width, depth):
    """Where chance outgrows all else, the band is wide, not broken, and holds what is expected."""
    layers = square_layers(width, depth, 2.0)
    predicted = predict(layers, ACTIVATIONS[activation], one_image())
    for intervals in predicted.values():
        assert all(0 <= at.low <= at.high for at in intervals)


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_what_explodes_beyond_all_numbers_is_infinite(activation):
    """Not NaN."""
    exploding = predict(square_layers(100, 160, 200.0), ACTIVATIONS[activation], one_image())
    for intervals in exploding.values():
        assert not any(map(math.isnan, [*(at.low for at in intervals), intervals[-1].high]))


def test_zero_weights_predict_zero():
    """And nothing is left to chance."""
    predicted = predict(square_layers(10, 3, 0.0), ACTIVATIONS["tanh"], one_image())
    assert predicted["preactivation_second_moment"] == [Interval(0.0, 0.0, 0.0, 0.0)] * 3
    assert predicted["gradient_second_moment"][0] == Interval(0.0, 0.0, 0.0, 0.0)


def test_the_prediction_is_always_the_same():
    """It draws nothing at random, and leaves the random stream alone."""
    stream = torch.get_rng_state()
    first, again = (
        predict(square_layers(10, 4, 1.5, 0.1), ACTIVATIONS["gelu"], one_image()) for _ in range(2)
    )
    assert first == again
    assert torch.equal(stream, torch.get_rng_state())

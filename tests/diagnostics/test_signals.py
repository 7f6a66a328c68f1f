"""Layer signals: every quantity against a slow twin in plain Python."""

import itertools
import math
import operator
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bench import reference
from initflow.diagnostics import measure, signals
from initflow.diagnostics.signals import (
    BY_TIME,
    QUANTITIES,
    Cosine,
    Firing,
    Moments,
    distinct_fraction,
)
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.training import model
from tests.conftest import ROOT
from tests.training.test_train import images

WIDTHS = (12, 9, 7, 10)


def network(init="he", activation="relu", bias_init="pytorch", seed=0, widths=WIDTHS):
    parameters = model.initialize(
        widths, find(init), ACTIVATIONS["relu"], bias_init=bias_init, seed=seed
    )
    return parameters, ACTIVATIONS[activation]


def slow_twin(parameters, activation, data):
    """All quantities by nn.Linear, autograd and lists of Python's own floats."""
    module = reference.network(parameters.state(), activation.name)
    kept = []
    x = data.images
    for layer in module:
        x = layer(x)
        x.retain_grad() if x.requires_grad else None
        kept.append((layer, x))
    nn.functional.cross_entropy(x, data.labels).backward()
    linear = [(at, *pair) for at, pair in enumerate(kept) if isinstance(pair[0], nn.Linear)]
    found = {}
    for number, (at, layer, h) in enumerate(linear, start=1):
        values = {}

        def moments(name, tensor, values=values):
            numbers = tensor.detach().double().flatten().tolist()
            values[f"{name}_variance"] = statistics.pvariance(numbers)
            values[f"{name}_second_moment"] = statistics.fmean(v * v for v in numbers)

        moments("weight", layer.weight)
        moments("preactivation", h)
        moments("gradient", h.grad)
        moments("weight_gradient", layer.weight.grad)
        values["signal_variance"] = statistics.fmean(
            statistics.pvariance(unit) for unit in h.detach().double().T.tolist()
        )
        values["mean_cosine"] = statistics.fmean(
            sum(map(operator.mul, one, other)) / (math.hypot(*one) * math.hypot(*other))
            for one, other in itertools.combinations(filter(any, h.detach().double().tolist()), 2)
        )
        for name, rows in (("", layer.weight), ("_gradient", layer.weight.grad)):
            different = {tuple(row) for row in rows.tolist()}
            values[f"distinct{name}_fraction"] = len(different) / len(rows)
        if number < len(linear):
            y = kept[at + 1][1]
            moments("activation", y)
            silent = [all(v == 0 for v in unit) for unit in y.T.tolist()]
            values["dead_fraction"] = sum(silent) / len(silent)
            grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64, requires_grad=True)
            (slopes,) = torch.autograd.grad(reference.MODULES[activation.name]()(grid).sum(), grid)
            at_h = h.detach().clone().requires_grad_()
            (own,) = torch.autograd.grad(reference.MODULES[activation.name]()(at_h).sum(), at_h)
            limit = 0.05 * float(slopes.abs().max())
            flat = [abs(v) < limit for v in own.flatten().tolist()]
            values["saturated_fraction"] = sum(flat) / len(flat)
        found[f"fc{number}"] = {k: v for k, v in values.items() if k in QUANTITIES}
    return found


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("init", ["he", "normal", "zero", "constant"])
def test_every_quantity_is_its_slow_twins(activation, init):
    """For each activation, under usual, large and symmetric weights, key by key."""
    parameters, phi = network(init, activation)
    data = images(40, pixels=12)
    (seen,) = measure.observe(parameters, [phi], data)
    expected = slow_twin(parameters, phi, data)
    assert seen.signals.nonfinite == {}
    assert list(seen.signals.layers) == list(expected)
    for layer, values in expected.items():
        assert list(seen.signals.layers[layer]) == [name for name in QUANTITIES if name in values]
        assert seen.signals.layers[layer] == pytest.approx(values, rel=1e-4, abs=1e-12)


def test_each_member_of_a_stack_is_measured_as_if_alone():
    """Bit for bit."""
    stack = model.Parameters(WIDTHS, members=3)
    data = images(40, pixels=12)
    alone = []
    for member in range(3):
        single, phi = network("xavier", "tanh", seed=member)
        for name, tensor in stack.state(member).items():
            tensor.copy_(single.state()[name])
        alone += measure.observe(single, [phi], data)
    for one, of_stack in zip(
        alone, measure.observe(stack, [phi] * stack.members, data), strict=True
    ):
        assert one.signals == of_stack.signals


def test_the_output_layer_has_no_activation():
    """Its keys end there; the hidden layers have them all."""
    parameters, phi = network()
    (seen,) = measure.observe(parameters, [phi], images(40, pixels=12))
    hidden, output = set(seen.signals.layers["fc1"]), set(seen.signals.layers["fc3"])
    assert hidden == set(QUANTITIES) - {"branch_ratio", "update_ratio"}
    assert hidden - output == {
        "activation_variance",
        "activation_second_moment",
        "dead_fraction",
        "saturated_fraction",
    }


def test_the_documented_keys_are_the_emitted_ones():
    """The page's table has every quantity with its definition, and no other."""
    page = (
        (ROOT / "docs" / "signals.md").read_text().partition("## Signals")[2].partition("\n## ")[0]
    )
    rows = dict(row.strip("| ").split(" | ") for row in page.splitlines() if "| `" in row)
    assert {name.strip("`"): text for name, text in rows.items()} == {**QUANTITIES, **BY_TIME}


def mean_cosine(rows):
    """Pair by pair, in Python's own floats."""
    pairs = itertools.combinations(rows.double().flatten(1).tolist(), 2)
    cosines = [
        sum(map(operator.mul, one, other)) / math.hypot(*one) / math.hypot(*other)
        for one, other in pairs
    ]
    return len(cosines), statistics.fmean(cosines)


def test_the_mean_cosine_is_that_of_all_pairs(monkeypatch):
    """Whatever the shape, in one piece or many; also of what single precision cannot square."""
    x = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    n, expected = mean_cosine(x)
    for part in (1, 30, 10_000):
        monkeypatch.setattr(signals, "PART", part)
        for scaled in (x, x.double() * 1e-200, x * 1e-30, x * 1e30):
            assert Cosine.of(scaled) == Cosine(n, pytest.approx(expected, rel=1e-6))


def test_inputs_without_a_direction_have_no_cosine():
    """Those that give 0 are left out; a single one has no pair, and what is no number none."""
    x = torch.eye(3)
    x[1] = 0
    assert Cosine.of(x) == Cosine(1, 0.0)
    assert Cosine.of(x[:2]).pairs == Cosine.of(x[:1]).pairs == 0
    assert math.isnan(Cosine.of(torch.tensor([[1.0, math.nan], [1.0, 0.0]])).mean)
    assert 1 - 1e-12 < Cosine.of(torch.ones(5, 2)).mean <= 1


def test_the_pairs_of_two_batches_count_alike():
    """Those within each; none are of one from either."""
    one, other = torch.randn(4, 3), torch.randn(6, 3)
    (n, mean), (its_n, its_mean) = mean_cosine(one), mean_cosine(other)
    both = (n * mean + its_n * its_mean) / (n + its_n)
    added = Cosine.of(one) + Cosine.of(other)
    assert added == Cosine(n + its_n, pytest.approx(both))
    assert Cosine.of(one[:1]) + Cosine.of(other[:1]) == Cosine(0, 0.0)


def test_zero_weights_leave_one_units_worth():
    """Whatever the biases are: all units are copies, and zeros are exactly 0."""
    for bias_init in ("pytorch", "zeros"):
        parameters, phi = network("zero", "tanh", bias_init)
        (seen,) = measure.observe(parameters, [phi], images(40, pixels=12))
        assert seen.signals.layers["fc1"]["distinct_fraction"] == 1 / 9
        assert seen.signals.layers["fc2"]["distinct_fraction"] == 1 / 7
        assert seen.signals.layers["fc1"]["weight_variance"] == 0.0
        assert seen.signals.layers["fc1"]["weight_gradient_variance"] == 0.0


def test_a_constants_variance_is_exactly_0():
    """No rounding error is taken for a signal."""
    for value in (0.1, 1e20, 1 / 3):
        moments = Moments.of(torch.full((1_000, 7), value))
        assert moments.pooled_variance == 0.0
        assert moments.own_variance == 0.0


def test_values_that_float32_cannot_square_are_measured():
    """Gradients of deep networks are as small as 1e-30."""
    moments = Moments.of(torch.full((10, 10), 1e-30))
    assert moments.second_moment == pytest.approx(1e-60, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_counted_and_left_out(bad):
    """Layer by layer; what is finite stays."""
    parameters, phi = network()
    parameters.weights[1][0, 2, 3] = bad
    (seen,) = measure.observe(parameters, [phi], images(40, pixels=12))
    assert seen.signals.nonfinite["weight/fc2"] == 1
    assert "weight_variance" not in seen.signals.layers["fc2"]
    assert "preactivation_variance" in seen.signals.layers["fc1"]
    assert all(math.isfinite(v) for v in seen.signals.metrics().values())
    assert seen.signals.by_layer("weight_variance")[1] is None


numbers = st.lists(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=9
)


@given(numbers, numbers)
def test_moments_of_two_sets_add_up(first, second):
    """As if they had been one."""
    whole = Moments.of(torch.tensor(first + second))
    both = Moments.of(torch.tensor(first)) + Moments.of(torch.tensor(second))
    scale = max(1.0, whole.second_moment)
    assert both.count == whole.count
    for name in ("pooled_variance", "own_variance", "second_moment"):
        assert getattr(both, name) == pytest.approx(getattr(whole, name), abs=1e-6 * scale)


def test_firing_of_two_sets_adds_up():
    """A unit is dead only if it was silent in both."""
    first = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    second = torch.tensor([[0.0, 0.0]])
    both = Firing.of(first, first, 1.0) + Firing.of(second, second, 1.0)
    assert both.dead_fraction == 0.5
    assert both.saturated_fraction == 5 / 6
    assert Firing.of(first.T, first.T, 1.0, unit=0).dead_fraction == 0.5


@given(st.lists(st.lists(st.sampled_from([0.0, -0.0, 1.5]), min_size=4, max_size=4), min_size=1))
def test_distinct_rows_are_counted_as_values(rows):
    """Minus zero is zero."""
    expected = len(set(map(tuple, rows))) / len(rows)
    assert distinct_fraction(torch.tensor(rows)) == expected


@pytest.mark.parametrize("n", [1, 10, 99, 100, 1_000])
def test_the_probe_is_spread_over_the_split(n):
    """The same whatever the seed, all of a smaller split, and no image twice."""
    data = images(100, pixels=3)
    data.images[:, 0] = torch.arange(100)
    chosen = measure.probe(data, n).images[:, 0].tolist()
    assert len(chosen) == len(set(chosen)) == min(n, 100)
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_measuring_leaves_parameters_and_random_stream_alone():
    """It only looks."""
    parameters, phi = network()
    before, stream = parameters.flat.clone(), torch.get_rng_state()
    measure.observe(parameters, [phi], images(40, pixels=12))
    assert torch.equal(before, parameters.flat)
    assert torch.equal(stream, torch.get_rng_state())

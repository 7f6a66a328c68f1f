"""Unit variance in every layer, whatever the activation function, and where nothing varies."""

import itertools

import pytest
import torch

from initflow.core.configurations import TrainConfig
from initflow.diagnostics import measure
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.initializers.scheme import Scheme
from initflow.testing import assert_initializer_contract
from initflow.training import datasets, model
from initflow_lsuv import lsuv


def network(widths, activation="relu", dtype=torch.float64, bias=0.0):
    """A network to be filled, all biases ``bias``."""
    state = {}
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(widths), start=1):
        state[f"fc{layer}.weight"] = torch.full((fan_out, fan_in), torch.nan, dtype=dtype)
        state[f"fc{layer}.bias"] = torch.full((fan_out,), bias, dtype=dtype)
    return model.network(state, ACTIVATIONS[activation])


def uniform(n, pixels, dtype=torch.float64):
    return torch.rand(n, pixels, generator=torch.Generator().manual_seed(1), dtype=dtype)


@torch.no_grad()
def fill(net, images, **arguments):
    lsuv(net, images, torch.Generator().manual_seed(0), **arguments)


@torch.no_grad()
def variances(net, x):
    """Of every layer's outputs, over all images and units."""
    found = []
    for module in net:
        x = module(x)
        if isinstance(module, torch.nn.Linear):
            found.append(x.var(correction=0).item())
    return found


def layers(net):
    return [module for module in net if isinstance(module, torch.nn.Linear)]


def test_it_keeps_the_contract():
    """Also on black images, on a single one, in tiny networks and in double precision."""
    assert_initializer_contract(lsuv)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tolerance", [0.1, 1e-6])
def test_every_layers_variance_is_1(activation, tolerance):
    """To within the tolerance, for every activation function, with biases in the way."""
    net = network((30, 40, 20, 50, 10), activation)
    for layer in layers(net):
        layer.bias.detach().uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(2))
    fill(net, images := uniform(100, 30), tolerance=tolerance, max_iterations=50)
    assert variances(net, images) == pytest.approx([1] * 4, abs=tolerance)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (1, 5), (5, 1)], ids=str)
def test_weights_are_a_multiple_of_orthonormal_ones(shape):
    """WᵀW or WWᵀ is a multiple of the identity."""
    net = network(shape)
    fill(net, uniform(50, shape[0]))
    weight = layers(net)[0].weight.detach()
    gram = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(len(gram), dtype=gram.dtype))


def test_biases_stay_as_they_are():
    """As ``bias_init`` left them."""
    net = network((5, 4, 3), bias=0.25)
    fill(net, uniform(50, 5))
    assert all((layer.bias == 0.25).all() for layer in layers(net))


def test_one_division_is_enough_without_biases_and_the_limit_is_kept_with_them():
    """Exactly 1 after one; biases of variance 1/4 take more than one."""
    net, images = network((20, 30, 10)), uniform(100, 20)
    fill(net, images, tolerance=1e-9, max_iterations=1)
    assert variances(net, images) == pytest.approx([1, 1])
    for limit, reached in ((1, False), (100, True)):
        net = network((20, 10))
        layers(net)[0].bias.detach().copy_(torch.linspace(-0.9, 0.9, 10))
        fill(net, images, tolerance=0.01, max_iterations=limit)
        assert (abs(variances(net, images)[0] - 1) < 0.01) == reached


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [0.0, 0.5])
@pytest.mark.parametrize("pixel", [0.0, 0.3])
def test_what_does_not_vary_is_not_scaled(pixel, bias, dtype):
    """Images all alike, into single units: rounding is not blown up to a variance of 1."""
    net = network((7, 1, 1, 3), dtype=dtype, bias=bias)
    fill(net, torch.full((100, 7), pixel, dtype=dtype))
    for layer in layers(net)[:2]:
        assert layer.weight.norm().item() == pytest.approx(1)
    assert all(layer.weight.isfinite().all() for layer in layers(net))


def test_dead_units_are_survived():
    """Biases so low that no ReLU ever fires: what they feed keeps its orthonormal weights."""
    net = network((20, 30, 10))
    layers(net)[0].bias.detach().fill_(-100.0)
    fill(net, uniform(50, 20))
    assert layers(net)[1].weight.norm().item() == pytest.approx(10**0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": 0.0}, "tolerance must be above 0, not 0"),
        ({"tolerance": float("nan")}, "tolerance must be above 0, not nan"),
        ({"max_iterations": 0}, "max_iterations must be at least 1, not 0"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments, message):
    """Each is named, with what would be right."""
    with pytest.raises(ValueError, match=message):
        fill(network((3, 2)), uniform(4, 3), **arguments)


def test_it_carries_silu_through_20_layers_where_hes_scheme_fades():
    """As the README has it: He's variance is that of relu, and silu's signal dies of it."""
    silu = ACTIVATIONS["silu"]
    train = datasets.load(TrainConfig(dataset="digits")).train
    probe = measure.probe(train, 300)
    signal = {}
    for scheme in (find("he"), Scheme.of(lsuv, "lsuv", "a test")):
        widths = (64, *[100] * 20, 10)
        start = model.initialize(widths, scheme, silu, bias_init="zeros", seed=0, data=train)
        (seen,) = measure.observe(start, [silu], probe)
        signal[scheme.name] = seen.signals.layers["fc20"]["signal_variance"]
    assert signal["he"] < 1e-4
    assert signal["lsuv"] > 0.1

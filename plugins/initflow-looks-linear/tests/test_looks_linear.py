"""The untrained network is a linear map, its units are not, and deep networks profit."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from initflow.core.configurations import TrainConfig
from initflow.diagnostics import measure
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.initializers.scheme import Place, Scheme, fans
from initflow.testing import assert_initializer_contract
from initflow.training import datasets, model
from initflow_looks_linear import looks_linear, odd_slope

SCHEME = Scheme.of(looks_linear, "looks-linear", "a test")
MIRRORED = ["relu", "leaky_relu", "gelu", "silu", "softplus", "linear"]
OTHERS = ["tanh", "sigmoid", "elu", "selu"]


def filled(widths, activation="relu", dtype=torch.float64, scheme=SCHEME, kernel=()):
    """The network's weights, layer by layer; ``widths`` are channels where there is a kernel."""
    generator, weights = torch.Generator().manual_seed(0), []
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        weight = torch.full((fan_out, fan_in, *kernel), math.nan, dtype=dtype)
        bias = torch.full((fan_out,), math.nan, dtype=dtype)
        at = Place(*fans(weight.shape), ACTIVATIONS[activation], layer, len(widths) - 1)
        scheme.fill_layer(weight, bias, at, generator)
        assert not bias.any()
        weights.append(weight)
    return weights


def network(widths, activation="relu", **kwargs):
    """As a function of (n, pixels)."""
    state = {}
    for layer, weight in enumerate(filled(widths, activation, **kwargs), start=1):
        state |= {f"fc{layer}.weight": weight, f"fc{layer}.bias": weight.new_zeros(len(weight))}
    return model.network(state, ACTIVATIONS[activation]).requires_grad_(requires_grad=False)


def normal(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_it_keeps_the_contract():
    """First, middle and last layers, odd and tiny ones, convolutions, stated variances."""
    assert_initializer_contract(looks_linear)


@pytest.mark.parametrize("activation", MIRRORED)
@pytest.mark.parametrize("hidden", [(30,) * 5, (31, 8, 23), (2, 3)], ids=str)
def test_the_untrained_network_is_linear(activation, hidden):
    """f(x) + f(y) = f(x + y) and f(−3x) = −3f(x), also with odd widths."""
    net = network((20, *hidden, 10), activation)
    x, y = normal(8, 20), normal(8, 20, seed=2)
    torch.testing.assert_close(net(x) + net(y), net(x + y))
    torch.testing.assert_close(net(-3 * x), -3 * net(x))
    assert net(x).abs().max() > 0.01


@pytest.mark.parametrize("activation", MIRRORED)
def test_its_units_are_not(activation):
    """Each bends what it receives; nothing was made linear by making inputs small."""
    weights = filled((20, 30, 10), activation)
    received = normal(50, 20) @ weights[0].T
    function = ACTIVATIONS[activation].function
    even = function(received) + function(-received)
    assert bool(even.abs().max() > 0.1) == (activation != "linear")


@pytest.mark.parametrize("activation", MIRRORED)
@pytest.mark.parametrize("gain", [1.0, 0.9])
def test_the_jacobians_singular_values_are_gain_to_the_depth(activation, gain):
    """All of them, after 51 layers, wherever it is taken."""
    net = network([20] + [40] * 50 + [20], activation, scheme=SCHEME.bind({"gain": str(gain)}))
    jacobian = torch.autograd.functional.jacobian(net, normal(1, 20)).squeeze()
    values = torch.linalg.svdvals(jacobian)
    assert values.numpy() == pytest.approx([gain**51] * 20, rel=1e-6)


def test_the_blocks_are_the_papers():
    """[A; −A], [B, −B; −B, B], [C, −C], each block with orthonormal rows or columns."""
    first, middle, last = filled((5, 8, 8, 3))
    a, b, c = first[:4], middle[:4, :4], last[:, :4]
    assert torch.equal(first, torch.cat([a, -a]))
    assert torch.equal(middle, torch.cat([torch.cat([b, -b], 1), torch.cat([-b, b], 1)]))
    assert torch.equal(last, torch.cat([c, -c], 1))
    for block in (a, b, c):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block), dtype=block.dtype))


def test_the_slope_is_divided_by():
    """linear's s is 2 and leaky relu's 1.01, in all layers but the first."""
    for activation, slope in (("linear", 2.0), ("leaky_relu", 1.01)):
        plain, divided = filled((4, 6, 6, 2)), filled((4, 6, 6, 2), activation)
        torch.testing.assert_close(divided[0], plain[0])
        for one, other in zip(divided[1:], plain[1:], strict=True):
            torch.testing.assert_close(one * slope, other)


def test_without_hidden_layers_it_is_orthonormal():
    """Nothing to mirror, whatever the activation function."""
    (weight,) = filled((7, 5), "tanh")
    torch.testing.assert_close(weight @ weight.T, torch.eye(5, dtype=weight.dtype))


def test_an_odd_layers_unit_without_mirror_image_can_learn():
    """It receives something, and what follows does not yet listen to it."""
    first, last = filled((6, 5, 4))
    assert torch.equal(first[3:], -first[:2])
    assert first[2].norm().item() == pytest.approx(1)
    assert not last[:, 2].any()


def test_convolutions_are_mirrored_over_channels():
    """A convolutional network is as linear."""
    conv = torch.nn.functional.conv2d
    first, middle, last = filled((2, 8, 7, 4), kernel=(3, 3))

    def f(x):
        return conv(conv(conv(x, first).relu(), middle).relu(), last)

    x, y = normal(3, 2, 12, 12), normal(3, 2, 12, 12, seed=2)
    torch.testing.assert_close(f(x) + f(y), f(x + y))
    assert f(x).abs().max() > 0.01


@pytest.mark.parametrize(
    ("shape", "layer"),
    [((61, 40), 0), ((40, 90), 0), ((60, 41), 1), ((41, 90), 1), ((9, 51), 2), ((60, 21), 2)],
    ids=str,
)
def test_the_stated_variance_holds_for_odd_widths_too(shape, layer):
    """The mean square over 300 draws; the entries' mean is 0 by the blocks' symmetry."""
    at = Place(*fans(shape), ACTIVATIONS["leaky_relu"], layer, 3)
    weight, bias, total = torch.empty(shape, dtype=torch.float64), torch.empty(shape[0]), 0.0
    for seed in range(300):
        SCHEME.fill_layer(weight, bias, at, torch.Generator().manual_seed(seed))
        total += weight.square().mean().item() / 300
    assert SCHEME.variance(at) == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("name", OTHERS)
def test_other_activations_are_refused(name):
    """With the property that they lack, by every layer of a network with hidden ones."""
    with pytest.raises(ValueError, match=rf"{name} cannot look linear: φ\(x\) − φ\(−x\) must be"):
        filled((4, 6, 2), name)


def test_the_property_decides_not_the_name():
    """Of activation functions that nobody listed."""
    relu = ACTIVATIONS["relu"]
    bent = replace(relu, name="bent", function=lambda x: 3 * x + x.abs().sqrt())
    assert odd_slope(bent) == pytest.approx(6)
    for name, function in (("even", torch.abs), ("falling", torch.neg), ("square", torch.square)):
        other = replace(relu, name=name, function=function)
        with pytest.raises(ValueError, match=f"{name} cannot look linear"):
            odd_slope(other)


def test_a_hundred_relu_layers_keep_images_apart_and_gradients_alike():
    """As the README has it: under He digits come to look the same, and gradients shatter."""
    relu = ACTIVATIONS["relu"]
    images = measure.probe(datasets.load(TrainConfig(dataset="digits")).train, 100).images
    cosine, gradients = {}, {}
    for scheme in (find("he"), SCHEME):
        widths = (64, *[100] * 100, 10)
        start = model.initialize(widths, scheme, relu, bias_init="zeros", seed=0)
        net = model.network(start.state(), relu).requires_grad_(requires_grad=False)
        cosine[scheme.name] = mean_cosine(net[:-2](images))
        x = images.clone().requires_grad_()
        (by_image,) = torch.autograd.grad(net(x)[:, 0].sum(), x)
        gradients[scheme.name] = mean_cosine(by_image)
    assert cosine["he"] > 0.99
    assert cosine["looks-linear"] < 0.8
    assert abs(gradients["he"]) < 0.2
    assert gradients["looks-linear"] > 0.999


def mean_cosine(rows):
    """Between two different ones of ``rows`` (n, k), in the mean."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    n = len(rows)
    return ((unit @ unit.T).sum().item() - n) / (n * (n - 1))

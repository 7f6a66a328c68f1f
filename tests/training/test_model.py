"""Parameters, their initialization, their export and their hash."""

import hashlib
import math

import pytest
import torch

from bench import reference
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.initializers.scheme import Place
from initflow.training import model

WIDTHS = (20, 8, 6, 4)


def initialized(spec="he", bias_init="pytorch", seed=0, widths=WIDTHS):
    return model.initialize(widths, find(spec), ACTIVATIONS["relu"], bias_init=bias_init, seed=seed)


def test_layers_are_named_in_forward_order_and_shaped_as_pytorchs():
    """fc1, fc2, …: the state loads into torch.nn.Linear layers."""
    shapes = {name: tuple(tensor.shape) for name, tensor in initialized().state().items()}
    assert shapes == {
        "fc1.weight": (8, 20),
        "fc1.bias": (8,),
        "fc2.weight": (6, 8),
        "fc2.bias": (6,),
        "fc3.weight": (4, 6),
        "fc3.bias": (4,),
    }


def test_all_parameters_are_views_of_one_tensor():
    """What is done to flat is done to every layer; what is besides is the gaps between them."""
    parameters = model.Parameters(WIDTHS, members=3)
    parameters.flat.fill_(1)
    for tensor in (*parameters.weights, *parameters.biases):
        assert torch.equal(tensor, torch.ones(tensor.shape))
        tensor.fill_(0)
    gaps = [-size % 16 for size in (20 * 8, 8, 8 * 6, 6, 6 * 4, 4)]
    assert parameters.flat.sum() == 3 * sum(gaps)


@pytest.mark.parametrize("widths", [(784, 100, 10), (64, 33, 7, 1, 10), (5, 10)], ids=str)
def test_every_tensor_of_every_member_starts_on_a_cache_line(widths):
    """As PyTorch's own do, which matrix kernels round by."""
    parameters = model.Parameters(widths, members=3)
    for tensor in (*parameters.weights, *parameters.biases):
        assert all(own.data_ptr() % 64 == 0 and own.is_contiguous() for own in tensor)


def test_copies_are_apart():
    """Training a copy leaves the initial weights as they were."""
    first = initialized()
    copy = first.copy_to("cpu")
    copy.flat.zero_()
    assert first.weights[0].abs().sum() > 0


@pytest.mark.parametrize("spec", ["zero", "normal", "xavier", "orthogonal", "he_uniform"])
def test_the_scheme_reaches_every_layer_of_the_network(spec):
    """Each layer's weights have the variance that the scheme states for its fans."""
    parameters = initialized(spec, widths=(400, 300, 200, 100))
    for weight in parameters.weights:
        fan_out, fan_in = weight.shape[1:]
        assert weight.var().item() == pytest.approx(
            find(spec).variance(Place(fan_in, fan_out)), rel=0.05
        )


def test_biases_are_pytorchs_or_zeros():
    """U(±1/√fan_in), or nothing."""
    parameters = initialized(widths=(400, 5000, 10))
    bound = 1 / 20
    assert parameters.biases[0].abs().max() <= bound
    assert parameters.biases[0].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not any(bias.any() for bias in initialized(bias_init="zeros").biases)


def test_a_seed_fixes_all_and_schemes_share_its_biases():
    """What one scheme draws moves no other stream."""
    he, again, zero = initialized(), initialized(), initialized("zero")
    assert torch.equal(he.flat, again.flat)
    assert not torch.equal(he.flat, initialized(seed=1).flat)
    assert all(torch.equal(a, b) for a, b in zip(he.biases, zero.biases, strict=True))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_exported_module_is_the_network(name):
    """The same logits as PyTorch's own layers, for any activation, to the bit."""
    state = initialized().state()
    images = torch.rand(5, 20, generator=torch.Generator().manual_seed(0))
    module = model.to_module(state, ACTIVATIONS[name])
    assert torch.equal(module(images), reference.network(state, name)(images))
    assert [key for key in module.state_dict() if key.endswith("weight")] == [
        "fc1.weight",
        "fc2.weight",
        "fc3.weight",
    ]


def test_the_exported_module_normalizes_raw_pixels():
    """It takes pixels in [0, 1], whatever its training was fed."""
    state = initialized().state()
    images = torch.rand(5, 20, generator=torch.Generator().manual_seed(0))
    module = model.to_module(state, ACTIVATIONS["tanh"], mean=0.1307, std=0.3081)
    normalized = images.clone().sub_(0.1307).div_(0.3081)
    plain = model.to_module(state, ACTIVATIONS["tanh"])
    assert torch.equal(module(images), plain(normalized))


def test_a_network_without_hidden_layers():
    """Softmax regression: one layer, no activation."""
    parameters = initialized(widths=(20, 4))
    assert list(parameters.state()) == ["fc1.weight", "fc1.bias"]
    module = model.to_module(parameters.state(), ACTIVATIONS["relu"])
    assert module(torch.zeros(1, 20)).tolist() == [parameters.biases[0][0].tolist()]


def test_the_hash_is_of_names_shapes_and_bytes():
    """Against its documented recipe, and it tells the last bit of one weight."""
    state = {"fc1.weight": torch.tensor([[1.0, 2.0]]), "fc1.bias": torch.tensor([0.5])}
    recipe = hashlib.sha256(
        b"fc1.weight(1, 2)\x00\x00\x80\x3f\x00\x00\x00\x40fc1.bias(1,)\x00\x00\x00\x3f"
    ).hexdigest()
    assert model.weights_sha256(state) == recipe
    state["fc1.bias"] = torch.nextafter(state["fc1.bias"], torch.ones(1))
    assert model.weights_sha256(state) != recipe

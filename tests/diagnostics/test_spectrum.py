"""Jacobians and the neural tangent kernel, held against autograd's; and what is said of them."""

import json
import math

import pytest
import torch

from initflow.diagnostics import jacobian, spectrum
from initflow.initializers import plugins
from initflow.initializers.activations import ACTIVATIONS
from initflow.training import model

D = torch.float64


def network(widths, init="he", activation="tanh", seed=0, bias_init="pytorch"):
    """Parameters, the scheme, the activation function."""
    scheme, function = plugins.find(init), ACTIVATIONS[activation]
    return model.initialize(widths, scheme, function, bias_init=bias_init, seed=seed), scheme


def images(n, pixels, seed=1):
    return torch.rand(n, pixels, generator=torch.Generator().manual_seed(seed))


def exported(parameters, activation):
    """The module that a user gets, in double precision."""
    return model.network(parameters.state(), ACTIVATIONS[activation]).double()


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
@pytest.mark.parametrize("widths", [(9, 7, 8, 6, 4), (5, 6, 3), (6, 4)])
def test_the_jacobians_are_autograds(widths, activation):
    """Of the exported module, by :func:`torch.autograd.functional.jacobian`, for each image."""
    parameters, _ = network(widths, activation=activation)
    batch = images(3, widths[0])
    measured = jacobian.measure(parameters, ACTIVATIONS[activation], batch)
    module = exported(parameters, activation)
    modules = list(module)
    assert measured.images == 3

    def parts(x):
        """By name, the function and where it is taken."""
        yield "input_output", module, x
        layers = [modules[at : at + 2] for at in range(0, len(modules), 2)]
        before, first = x, None
        for at, layer in enumerate(layers, start=1):
            yield f"fc{at}", torch.nn.Sequential(*layer), before
            before = torch.nn.Sequential(*layer)(before).detach()
            first = layers[0][0](x).detach() if first is None else first
        if len(layers) > 2:
            yield "hidden", torch.nn.Sequential(*modules[1:-2]), first

    for image, x in enumerate(batch.double()):
        found = {name: (function, at) for name, function, at in parts(x)}
        assert found.keys() == measured.singular.keys()
        for name, (function, at) in found.items():
            expected = torch.linalg.svdvals(torch.autograd.functional.jacobian(function, at))
            values = measured.singular[name].logarithms[image].exp()
            assert torch.allclose(values, expected, rtol=1e-9, atol=1e-10 * expected.max())


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("widths", [(6, 5, 7, 3), (4, 3)])
def test_the_tangent_kernel_is_autograds(widths, activation):
    """Its largest eigenvalue, from the Jacobian of all logits by all parameters."""
    parameters, _ = network(widths, activation=activation)
    batch = images(5, widths[0])
    measured = jacobian.measure(parameters, ACTIVATIONS[activation], batch)
    module = exported(parameters, activation)
    names = [name for name, _ in module.named_parameters()]

    def logits(*values):
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, given, batch.double()).flatten()

    by = torch.autograd.functional.jacobian(logits, tuple(module.parameters()))
    flat = torch.cat([one.flatten(1) for one in by], 1)
    expected = torch.linalg.eigvalsh(flat @ flat.T)[-1].item() / 5
    assert measured.tangent == pytest.approx(expected, rel=1e-10)
    assert measured.tangent_images == 5


def test_many_classes_and_wide_layers_take_fewer_images():
    """The kernel has 2,000 rows at most, and 1,600 singular values are enough."""
    parameters, _ = network((4, 400, 300))
    measured = jacobian.measure(parameters, ACTIVATIONS["tanh"], images(40, 4))
    assert (measured.images, measured.tangent_images) == (4, 6)
    parameters, _ = network((4, 1_500))
    measured = jacobian.measure(parameters, ACTIVATIONS["tanh"], images(40, 4))
    assert (measured.images, measured.tangent) == (2, None)


def read(widths, init, activation, **kwargs):
    parameters, scheme = network(widths, init, activation, bias_init="zeros", **kwargs)
    return spectrum.read(
        parameters, scheme, ACTIVATIONS[activation], "zeros", images(16, widths[0])
    )


@pytest.mark.parametrize(
    ("init", "activation"),
    [("orthogonal", "tanh"), ("lecun", "tanh"), ("he_uniform", "relu"), ("xavier", "gelu")],
)
def test_a_wide_network_lies_where_theory_says(init, activation):
    """The Kolmogorov-Smirnov distance of its Jacobian's singular values to the prediction."""
    reading = read((300, 250, 250, 250, 250, 10), init, activation)
    part = reading.parts["hidden"]
    values = part.measured.logarithms.flatten().sort().values
    there = values[values.isfinite()]
    least = part.predicted.zero
    assert part.measured.zero == pytest.approx(least, abs=0.05)
    shares = least + (1 - least) * (torch.arange(len(there)) + 0.5) / len(there)
    assert (part.predicted.share_below(there) - shares).abs().max() < 0.06
    assert part.measured.mean_square == pytest.approx(part.predicted.mean_square, rel=0.12)


def test_an_orthogonal_linear_network_has_dynamical_isometry():
    """Every singular value is 1, measured and predicted, and is said to be."""
    reading = read((20,) + (20,) * 12 + (20,), "orthogonal", "linear")
    part = reading.parts["hidden"]
    assert part.measured.condition_number == pytest.approx(1, abs=1e-4)
    assert part.predicted.quantile(0.5) == pytest.approx(1, abs=1e-4)
    assert "dynamical isometry" in reading.sentence()
    assert "dynamical isometry" not in read((20,) * 14, "lecun", "linear").sentence()


REFUSED = {
    "zero": "no variance",
    "constant": "no variance",
    "identity": "many of these are 0",
    "sparse": "many of these are 0",
}


@pytest.mark.parametrize("init", REFUSED)
def test_nothing_is_predicted_of_other_weights(init):
    """The reason stands in their place; what is 0 or infinite is text in JSON and no metric."""
    reading = read((60, 50, 50, 50, 10), init, "tanh")
    part = reading.parts["hidden"]
    assert part.predicted is None
    assert REFUSED[init] in part.reason
    metrics = reading.metrics()
    assert all(map(math.isfinite, metrics.values()))
    assert "predicted_mean_square_singular_value/hidden" not in metrics
    json.dumps(reading.as_json(), allow_nan=False)
    if init == "constant":
        assert "condition_number/hidden" not in metrics
        told = reading.as_json()["jacobians"]["hidden"]["measured"]["condition_number"]
        assert told == "inf"


def test_depth_leaves_no_range_of_numbers():
    """What is beyond double precision is there as a logarithm, and what is not finite is told."""
    tiny = read((10,) + (10,) * 200 + (10,), "random:std=0.001", "linear")
    logs = tiny.parts["hidden"].measured.logarithms
    assert logs[:, 0].isfinite().all()
    assert (logs[:, 0] < -745).all()
    assert "mean_square_singular_value/hidden" in tiny.metrics()
    huge = read((10,) + (10,) * 200 + (10,), "normal:std=1e6", "linear")
    assert math.isinf(huge.parts["fc1"].measured.condition_number) is False
    assert huge.tangent is None
    json.dumps(huge.as_json(), allow_nan=False)


def test_each_singular_value_has_a_row():
    """In ``spectrum.csv``, by Jacobian, image and place."""
    reading = read((12, 8, 8, 4), "he", "tanh")
    rows = [line.split(",") for line in reading.as_csv().splitlines()]
    assert rows[0] == ["jacobian", "image", "index", "log10_singular_value"]
    of_hidden = [float(row[3]) for row in rows if row[:2] == ["hidden", "0"]]
    expected = reading.parts["hidden"].measured.logarithms[0] / math.log(10)
    assert of_hidden == pytest.approx(expected.tolist(), rel=1e-4)

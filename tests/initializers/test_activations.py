"""Activations, held against PyTorch's own modules, autograd and their formulas."""

import math

import pytest
import torch
from torch import nn

from bench.reference import MODULES
from initflow.core.configurations import ACTIVATION_NAMES
from initflow.initializers.activations import ACTIVATIONS, Activation

ALL = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)


def _sigmoid(x):
    return 1 / (1 + math.exp(-x))


def _normal_cdf(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


# The derivatives as formulas of one number, written down independently.
DERIVATIVES = {
    "sigmoid": lambda x: _sigmoid(x) * (1 - _sigmoid(x)),
    "tanh": lambda x: 1 / math.cosh(x) ** 2,
    "relu": lambda x: float(x > 0),
    "leaky_relu": lambda x: 1.0 if x > 0 else 0.01,
    "gelu": lambda x: _normal_cdf(x) + x * math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi),
    "silu": lambda x: _sigmoid(x) * (1 + x * (1 - _sigmoid(x))),
    "selu": lambda x: 1.0507009873554805 * (1.0 if x > 0 else 1.6732632423543772 * math.exp(x)),
    "elu": lambda x: 1.0 if x > 0 else math.exp(x),
    "softplus": _sigmoid,
    "linear": lambda _: 1.0,
}


def test_the_table_holds_the_names_of_the_settings():
    """The contract's names, in its order."""
    assert tuple(ACTIVATIONS) == ACTIVATION_NAMES
    assert all(name == activation.name for name, activation in ACTIVATIONS.items())


@ALL
def test_function_and_forward_are_pytorchs(activation):
    """Both ways to compute it give the bits of PyTorch's module."""
    x = torch.linspace(-30, 30, 1001)
    expected = MODULES[activation.name]()(x)
    assert torch.equal(activation.function(x), expected)
    assert torch.equal(activation.forward(x, torch.empty_like(x)), expected)


@ALL
def test_backward_is_autograds(activation):
    """The written-out backward kernel has autograd's bits."""
    x = (5 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))).requires_grad_()
    grad = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    y = MODULES[activation.name]()(x)
    y.backward(grad)
    out = activation.backward(grad, x.detach(), y.detach(), torch.empty_like(grad))
    assert torch.equal(out, x.grad if x.grad is not None else grad)


@ALL
def test_derivative_is_the_formula(activation):
    """φ′ against an independent formula, in double precision, off the kinks."""
    x = torch.linspace(-6, 6, 240, dtype=torch.float64)
    expected = torch.tensor([DERIVATIVES[activation.name](v) for v in x.tolist()])
    torch.testing.assert_close(
        activation.derivative(x), expected.to(torch.float64), rtol=1e-6, atol=1e-7
    )


def test_selu_keeps_the_second_moment():
    """E[selu(z)²] = 1 for z ~ N(0, 1) (Klambauer et al. 2017): what its constants are for."""
    z = torch.linspace(-12, 12, 480_001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    moment = torch.trapezoid(ACTIVATIONS["selu"].function(z) ** 2 * density, z).item()
    assert moment == pytest.approx(1, abs=1e-6)


@ALL
def test_an_activation_of_any_function_is_pytorchs(activation):
    """Of PyTorch's module: function, forward, derivative and backward have the built-in's bits."""
    ours = Activation.of(MODULES[activation.name]())
    x = 5 * torch.randn(1_000, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(1_000, generator=torch.Generator().manual_seed(1))
    y = activation.function(x)
    assert torch.equal(ours.function(x), y)
    assert torch.equal(ours.forward(x, torch.empty_like(x)), y)
    assert torch.equal(ours.derivative(x), activation.derivative(x))
    out = activation.backward(grad, x, y, torch.empty_like(x))
    assert torch.equal(ours.backward(grad, x, y, torch.empty_like(x)), out)
    assert (ours.is_built_in, activation.is_built_in) == (False, True)
    assert ours.steepest == activation.steepest
    assert ours.saturates == activation.saturates


def test_an_activation_is_named_after_its_function():
    """Or as one is told."""
    assert Activation.of(torch.relu).name == "relu"
    assert Activation.of(nn.Hardtanh(-2, 2)).name == "Hardtanh(min_val=-2, max_val=2)"
    assert Activation.of(lambda x: x, name="mine").name == "mine"


def test_an_activation_of_a_module_is_the_module_as_it_was():
    """In any precision, what becomes of it later, and without a trace in it."""
    module = nn.PReLU(init=0.5)
    ours = Activation.of(module)
    with torch.no_grad():
        module.weight.fill_(7)
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([-2.0, 3.0], dtype=dtype)
        assert torch.equal(ours.function(x), torch.tensor([-1.0, 3.0], dtype=dtype))
        with torch.inference_mode():
            assert torch.equal(ours.derivative(x), torch.tensor([0.5, 1.0], dtype=dtype))
    assert module.weight.dtype == torch.float32
    assert module.weight.grad is None


def test_a_function_may_write_into_what_it_is_given():
    """A copy of it."""
    x = torch.tensor([-1.0, 2.0])
    assert Activation.of(torch.relu_).function(x).tolist() == [0, 2]
    assert Activation.of(torch.relu_).derivative(x).tolist() == [0, 1]
    assert x.tolist() == [-1, 2]

"""Which activation function a layer's output meets first, with a batch and without."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from initflow.models import batches, following, graph, weights


class Of(nn.Module):
    """Two linear layers with something between."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.between = nn.Linear(4, 4), nn.Linear(4, 4), between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def met(model, batch=None):
    """By each matrix's name."""
    if batch is None:
        traced = graph.of_structure(model)
    else:
        traced = graph.of_batch(model, batches.given(model, batch))
    products = following.weighing(traced, weights.of(model).matrices)
    return {
        matrix.name: following.after(traced, node, products)
        for node, matrices in products.items()
        for matrix in matrices
    }


BETWEEN = {
    "relu": [
        functional.relu,
        torch.relu_,
        nn.ReLU(),
        lambda x: x.clamp(min=0),
        lambda x: x * (x > 0),
    ],
    "tanh": [
        torch.tanh,
        nn.Tanh(),
        lambda x: functional.dropout(functional.layer_norm(x, (4,))).tanh(),
    ],
    "silu": [functional.silu, lambda x: x * torch.sigmoid(x), nn.SiLU(inplace=True)],
    "gelu": [nn.GELU(), lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))],
    "leaky_relu": [nn.LeakyReLU()],
    "leaky_relu(0.2)": [nn.LeakyReLU(0.2)],
    "hardtanh(0, 6)": [nn.ReLU6()],
    "hardswish": [nn.Hardswish()],
    "sigmoid": [nn.Sequential(nn.BatchNorm1d(4), nn.Sigmoid())],
    "x·tanh": [
        lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))
    ],
    "sin": [torch.sin],
    "relu ": [lambda x: (2 * x).view(-1, 2, 2).transpose(1, 2).flatten(1).relu()],
    None: [
        nn.Identity(),
        lambda x: 3 * x + 1,
        lambda x: functional.softmax(x, -1),
        lambda x: x * x.flip(1),
    ],
}
CASES = [(name, between) for name, all_of in BETWEEN.items() for between in all_of]


@pytest.mark.parametrize("batch", [None, torch.randn(3, 4)], ids=["traced", "recorded"])
@pytest.mark.parametrize(("name", "between"), CASES)
def test_the_first_function_that_is_not_linear_is_found(name, between, batch):
    """However it is spelled, made of others, or behind what keeps the shape of its input."""
    found = met(Of(between), batch)
    assert found["second"] is None
    first = found["first"]
    assert (first and first.name) == (name and name.strip())
    assert first is None or not first.problem


@pytest.mark.parametrize(
    ("between", "reference"),
    [
        (nn.GELU("tanh"), nn.GELU("tanh")),
        (nn.LeakyReLU(0.3), nn.LeakyReLU(0.3)),
        (lambda x: x + torch.sin(x) ** 2, lambda x: x + torch.sin(x) ** 2),
        (nn.PReLU(4, 0.1), nn.LeakyReLU(0.1)),
    ],
)
def test_an_unknown_function_is_run_from_the_graph(between, reference):
    """Its values are those of the function itself."""
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    found = met(Of(between), torch.randn(3, 4))["first"]
    torch.testing.assert_close(found.activation.function(x), reference(x))


def test_sums_and_gates_are_passed():
    """As in a residual block, and in a squeeze-and-excitation."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gate, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Identity()

        def forward(self, x):
            y = self.conv(x)
            return torch.relu(x + y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True))))

    found = met(Gated(), torch.randn(2, 3, 5, 5))
    assert (found["conv"].name, found["gate"].name) == ("relu", "sigmoid")


def test_a_noisy_function_is_named_with_its_problem():
    """It is no activation, and nothing fails until one is asked for."""

    class Noise(nn.Module):
        def forward(self, x):
            return torch.rrelu(x, 0.1, 0.9, training=True)

    found = met(Of(Noise()), torch.randn(3, 4))["first"]
    assert found is None or found.problem

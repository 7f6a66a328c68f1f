"""What a model's forward does, recorded on a batch or traced without one; the model left alone."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

import initflow as inf
from initflow.models import batches, graph
from tests.models.small import GPT, transformer


def recorded(model, batch):
    return graph.of_batch(model, batches.given(model, batch))


def functions(traced):
    return [node.function for node in traced.nodes]


class Operators(nn.Module):
    """Sums and products in several spellings."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(4))

    def forward(self, x):
        y = 2 * x + x.mul(3)
        y += self.gate * torch.tanh(y)
        return (1 + y).relu_() - x


MODELS = {
    "a chain": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
    "operators": Operators,
    "weight norm": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 4)), nn.Sigmoid()
    ),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_both_ways_see_the_same_operations(name):
    """By torch's own names."""
    model = MODELS[name]()
    of_batch, of_structure = recorded(model, torch.randn(3, 4)), graph.of_structure(model)
    assert functions(of_batch) == functions(of_structure)
    for traced in (of_batch, of_structure):
        assert [traced.places[node] for node in traced.nodes] == list(range(len(traced.nodes)))
        for node in traced.nodes:
            assert all(traced.places[source] < traced.places[node] for source in node.sources)
            assert all(node in traced.users[source] for source in node.sources)
        assert traced.outputs == [traced.nodes[-1]]


def test_operators_have_one_name():
    """However they are called, and on which side."""
    assert functions(graph.of_structure(Operators())) == [
        *("input", "mul", "mul", "add", "tanh", "mul", "add", "add", "relu", "sub"),
    ]


def run_again(traced):
    """Every operation of a recorded graph, called anew: the value of the last."""
    values = {}
    for node in traced.nodes:
        if node.function == graph.INPUT:
            values[node] = node.value
        elif node.function == graph.PART and not isinstance(values[node.sources[0]], torch.Tensor):
            whole, i = node.arguments
            values[node] = values[whole][i]
        else:
            arguments, keywords = filled((node.arguments, dict(node.keywords)), values)
            values[node] = node.call(*arguments, **keywords)
    return values[traced.outputs[0]]


def filled(value, values):
    if isinstance(value, graph.Node):
        return values[value]
    if isinstance(value, (tuple, list)):
        return type(value)(filled(each, values) for each in value)
    if isinstance(value, dict):
        return {name: filled(each, values) for name, each in value.items()}
    return value


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (GPT(layers=2), torch.arange(8).view(2, 4)),
        (transformer(1), torch.randn(2, 3, 32)),
        (torchvision.models.resnet18(num_classes=3).eval(), torch.randn(1, 3, 32, 32)),
        (nn.Sequential(nn.Flatten(), nn.Linear(8, 3), nn.Softmax(-1)), torch.randn(2, 2, 4)),
    ],
    ids=["GPT", "transformer", "ResNet", "a chain"],
)
def test_what_is_recorded_can_be_run_again(model, batch):
    """It is the whole forward: its operations alone give what the model gives."""
    traced = recorded(model, batch)
    with torch.no_grad():
        torch.testing.assert_close(run_again(traced), model(batch))


@pytest.mark.parametrize("way", ["recorded", "traced"])
def test_the_model_and_the_random_state_are_left_as_they_were(way):
    """Also statistics of normalizations, and what a spectral norm learns."""
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4), nn.Dropout()
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    traced = recorded(model, torch.randn(3, 4)) if way == "recorded" else graph.of_structure(model)
    random_after = torch.get_rng_state()
    assert functions(traced) == ["input", "linear", "batch_norm", "dropout"]
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in model.modules())
    if way == "traced":
        assert torch.equal(random, random_after)


def test_shapes_and_modules_are_known_of_a_batch():
    """Those of an attention's inside, too."""
    traced = recorded(transformer(1), torch.randn(2, 3, 32))
    (attention,) = [n for n in traced.nodes if n.function == "scaled_dot_product_attention"]
    assert attention.shape == (2, 4, 3, 8)
    assert attention.module == "0.layers.0.self_attn"
    assert traced.outputs[0].shape == (2, 3, 10)


def test_what_cannot_be_seen_is_told():
    """In one line that says what to do."""
    with pytest.raises(inf.SettingError, match=r"^model cannot be traced without a batch"):
        graph.of_structure(transformer(1))
    with pytest.raises(inf.SettingError, match=r"^model takes no batch of shape \(2, 3\)"):
        recorded(nn.Linear(4, 4), torch.randn(2, 3))

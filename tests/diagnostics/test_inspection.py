"""Looking into any module, against a forward pass written out and numpy's statistics."""

import copy
import itertools
import sys
from collections import UserDict
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all PyTorch code calls it
from torch.nn.utils import parametrizations
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.checkpoint import checkpoint

import initflow
from initflow.diagnostics import measure
from initflow.diagnostics.observing import hooks
from initflow.diagnostics.observing.functions import ACTIVATIONS as KNOWN
from initflow.diagnostics.signals import QUANTITIES, Moments
from initflow.errors import SettingError
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.models.layers import rows_by_unit
from initflow.training import model
from initflow.training.splits import Split

# A layer without a residual has all of these, before any update.
USUAL = set(QUANTITIES) - {"branch_ratio", "update_ratio"}


class Layer:
    """A layer's twin: what it gave and got at each call, its units along the last axis."""

    def __init__(self, module, unit=-1):
        self.weight, self.unit = module.weight, unit
        self.outputs, self.activations, self.slopes = [], [], []
        self.branch = None
        self.is_of_inputs = unit != 0 and not isinstance(module, Part)  # their cosine is measured

    def gave(self, z, a=None, slope=None):
        """Note ``z``, its gradient later, and the activation with its slope; ``a`` or ``z``."""
        z.retain_grad()
        self.outputs.append(z)
        if a is not None:
            self.activations.append(a.detach())
            self.slopes.append(slope.detach())
        return z if a is None else a

    def rows(self, tensors):
        """(values, units) in double precision."""
        moved = [t.detach().movedim(self.unit, -1).flatten(0, -2).numpy() for t in tensors]
        return np.concatenate(moved).astype(np.float64)

    def quantities(self, steepest=1.0):
        """All there is to know of it after a backward pass."""
        tensors = {"weight": self.weight.detach().flatten(1).numpy().astype(np.float64)}
        tensors["preactivation"] = self.rows(self.outputs)
        values = {
            "signal_variance": tensors["preactivation"].var(axis=0).mean(),
            "distinct_fraction": distinct(tensors["weight"]),
        }
        if all(z.grad is not None for z in self.outputs):
            tensors["gradient"] = self.rows([z.grad for z in self.outputs])
        if self.weight.grad is not None:
            tensors["weight_gradient"] = self.weight.grad.flatten(1).numpy().astype(np.float64)
            values["distinct_gradient_fraction"] = distinct(tensors["weight_gradient"])
        if self.activations:
            tensors["activation"] = self.rows(self.activations)
            values["dead_fraction"] = np.mean((tensors["activation"] == 0).all(axis=0))
            flat = np.abs(self.rows(self.slopes)) < 0.05 * steepest
            values["saturated_fraction"] = np.mean(flat)
        cosines = [
            cosine for z in self.outputs for cosine in cosines_of(z.detach().double().numpy())
        ]
        if self.is_of_inputs and cosines:
            values["mean_cosine"] = np.mean(cosines)
        if self.branch is not None:
            values["branch_ratio"] = self.branch
        for name, entries in tensors.items():
            values[f"{name}_variance"] = np.var(entries)
            values[f"{name}_second_moment"] = np.mean(entries**2)
        return {name: value for name, value in values.items() if name in QUANTITIES}


class Part:
    """Some rows of a weight and of the gradient by it, as a weight; of several, side by side."""

    def __init__(self, start, stop, *packed):
        self.packed, self.rows = packed, slice(start, stop)

    @property
    def weight(self):
        return self

    def detach(self):
        return torch.cat([packed.detach()[self.rows] for packed in self.packed], 1)

    @property
    def grad(self):
        if any(packed.grad is None for packed in self.packed):
            return None
        return torch.cat([packed.grad[self.rows] for packed in self.packed], 1)


def mean_square(x):
    return np.mean(x.detach().double().numpy() ** 2)


def attention_by_hand(module, query, key, value):
    """What an attention over a batch gives, by matrices of each head, and its layers."""
    n, heads = module.embed_dim, module.num_heads
    packed = module.in_proj_weight
    weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    parts = [Part(0, n, weight) for weight in weights]
    if packed is not None:
        weights, parts = packed.chunk(3), [Part(at, at + n, packed) for at in (0, n, 2 * n)]
    biases = [0] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    its = {name: Layer(part) for name, part in zip(("query", "key", "value"), parts, strict=True)}
    split = []
    for layer, x, w, b in zip(its.values(), (query, key, value), weights, biases, strict=True):
        z = layer.gave(x @ w.T + b)
        split.append(z.unflatten(-1, (heads, -1)).transpose(1, 2))
    q, k, v = split
    scores = torch.softmax(q @ k.transpose(2, 3) / (n / heads) ** 0.5, -1)
    if module.dropout and module.training:
        scores = F.dropout(scores, module.dropout)
    h = (scores @ v).transpose(1, 2).flatten(2)
    its["out_proj"] = Layer(module.out_proj)
    its["out_proj"].is_of_inputs = False
    z = h @ module.out_proj.weight.T
    z = z if module.out_proj.bias is None else z + module.out_proj.bias
    z = z.transpose(0, 1).contiguous().transpose(0, 1)  # in which order dropout draws for it
    return its["out_proj"].gave(z), its


def cosines_of(outputs):
    """Of each pair of a call's inputs."""
    rows = [row for row in outputs.reshape(len(outputs), -1) if row.any()]
    pairs = itertools.combinations(rows, 2)
    return [one @ other / np.linalg.norm(one) / np.linalg.norm(other) for one, other in pairs]


def distinct(rows):
    return len({tuple(row) for row in rows.tolist()}) / len(rows)


def relu(z):
    """Written out: max(0, z) and its slope."""
    return z * (z > 0), (z > 0).float()


def matches(found, **layers):
    """Whether what was measured is what the twins give, in their order."""
    assert list(found) == list(layers)
    for name, values in layers.items():
        assert found[name] == pytest.approx(values, rel=1e-4, abs=1e-12), name
    return True


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A function of a few modules, as a module."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._function = [forward]  # in a list: no method

    def forward(self, x):
        return self._function[0](self, x)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def squared(outputs):
    return (outputs**2).mean()


def weighted(outputs):
    """Whose gradient no normalization takes away."""
    return (outputs * normal(*outputs.shape, seed=9)).sum()


def test_mlp():
    """Every quantity of every layer; the output layer has no activation."""
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3))
    x, labels = normal(20, 6), torch.arange(20) % 3
    found = initflow.inspect(net, (x, labels), F.cross_entropy)

    first, second, last = (Layer(net[at]) for at in (0, 2, 4))
    z = x @ net[0].weight.T + net[0].bias
    a = torch.tanh(z)
    h = first.gave(z, a, 1 - a**2)
    z = h @ net[2].weight.T + net[2].bias
    a = 1 / (1 + torch.exp(-z))
    h = second.gave(z, a, a * (1 - a))
    logits = last.gave(h @ net[4].weight.T + net[4].bias)
    (logits.logsumexp(1) - logits[range(20), labels]).mean().backward()
    expected = {
        "0": first.quantities(),
        "2": second.quantities(steepest=0.25),
        "4": last.quantities(),
    }
    assert matches(found.layers, **expected)
    assert not found.nonfinite
    assert set(found.layers["0"]) == USUAL


def cnn():
    """Normalization and a functional activation, one in place, one as a method in place."""

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn(self.conv1(x))), 2)
        x = self.act(self.conv2(x)).flatten(1)
        return self.fc2(self.fc1(x).relu_())

    return Net(
        forward,
        conv1=nn.Conv2d(1, 4, 3),
        bn=nn.BatchNorm2d(4),
        conv2=nn.Conv2d(4, 3, 3, padding=1),
        act=nn.ReLU(inplace=True),
        fc1=nn.Linear(27, 8),
        fc2=nn.Linear(8, 2),
    )


def cnn_by_hand(net, x, loss):
    """The same forward pass written out, and its layers' quantities."""
    conv1, conv2 = Layer(net.conv1, unit=1), Layer(net.conv2, unit=1)
    fc1, fc2 = Layer(net.fc1), Layer(net.fc2)
    z = F.conv2d(x, net.conv1.weight, net.conv1.bias)
    deviation = z - z.mean((0, 2, 3), keepdim=True)
    scaled = deviation / (z.var((0, 2, 3), correction=0, keepdim=True) + net.bn.eps).sqrt()
    h = conv1.gave(z, *relu(scaled * net.bn.weight.view(4, 1, 1) + net.bn.bias.view(4, 1, 1)))
    h = F.max_pool2d(h, 2)
    z = F.conv2d(h, net.conv2.weight, net.conv2.bias, padding=1)
    h = conv2.gave(z, *relu(z)).flatten(1)
    z = h @ net.fc1.weight.T + net.fc1.bias
    h = fc1.gave(z, *relu(z))
    loss(fc2.gave(h @ net.fc2.weight.T + net.fc2.bias)).backward()
    layers = {"conv1": conv1, "conv2": conv2, "fc1": fc1, "fc2": fc2}
    return {name: layer.quantities() for name, layer in layers.items()}


def test_cnn():
    """Units are channels; what works in place afterwards changes nothing that was measured."""
    net, x = cnn(), normal(5, 1, 8, 8)
    found = initflow.inspect(net, x, squared)
    assert matches(found.layers, **cnn_by_hand(net, x, squared))


def test_conv1d():
    """With GELU, whose slope is steepest at √2."""
    net = nn.Sequential(nn.Conv1d(2, 5, 3), nn.GELU(), nn.Flatten(), nn.Linear(30, 1))
    x = 5 * normal(4, 2, 8)
    found = initflow.inspect(net, x, squared)
    conv, fc = Layer(net[0], unit=1), Layer(net[3])
    z = F.conv1d(x, net[0].weight, net[0].bias)
    cdf, pdf = (1 + torch.erf(z / 2**0.5)) / 2, torch.exp(-(z**2) / 2) / (2 * torch.pi) ** 0.5
    h = conv.gave(z, z * cdf, cdf + z * pdf).flatten(1)
    squared(fc.gave(h @ net[3].weight.T + net[3].bias)).backward()
    assert matches(found.layers, **{"0": conv.quantities(1.1289), "3": fc.quantities()})


def test_unbatched():
    """A single image, whose pre-activations are a view that is then changed in place."""
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True))
    x = normal(1, 6, 6)
    found = initflow.inspect(net, x, squared)
    conv = Layer(net[0], unit=0)
    z = F.conv2d(x, net[0].weight, net[0].bias)
    squared(conv.gave(z, *relu(z))).backward()
    assert matches(found.layers, **{"0": conv.quantities()})


def test_conv3d():
    """Volumes have their channels four axes from the end."""
    net = nn.Sequential(nn.Conv3d(1, 3, 2), nn.ReLU())
    net[0].bias.data[1] = -100.0
    found = initflow.inspect(net, normal(2, 1, 4, 4, 4), squared)
    assert found.layers["0"]["dead_fraction"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("groups", "channels"), [(1, 6), (2, 6), (6, 6), (3, 9)])
def test_a_transposed_convolutions_weight_by_unit(groups, channels):
    """Each unit's own weights are those that what it gives depends on, and no others."""
    net = nn.ConvTranspose1d(channels, 2 * groups, 3, groups=groups, bias=False)
    rows = rows_by_unit(net.weight.detach(), groups)
    assert len(rows) == 2 * groups
    for unit in range(2 * groups):
        own = []
        for at in range(channels):
            x = torch.zeros(1, channels, 1)
            x[0, at] = 1
            gave = net(x)[0, unit].detach()
            own += [gave] if at // (channels // groups) == unit // 2 else []
            assert gave.any() == (at // (channels // groups) == unit // 2)
        assert torch.equal(rows[unit], torch.stack(own))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_transposed_convolutions(dimensions):
    """Every quantity, with copied units in groups."""
    kind = getattr(nn, f"ConvTranspose{dimensions}d")
    apply = getattr(F, f"conv_transpose{dimensions}d")
    net = nn.Sequential(kind(4, 6, 2, groups=2), nn.ReLU())
    net[0].weight.data[:2, 1] = net[0].weight.data[:2, 0]
    x = normal(5, 4, *[3] * dimensions)
    found = initflow.inspect(net, x, squared)
    layer = Layer(net[0], unit=1)
    squared(layer.gave(*relu_of(apply(x, net[0].weight, net[0].bias, groups=2)))).backward()
    expected = layer.quantities()
    expected["distinct_fraction"] = 5 / 6
    expected["distinct_gradient_fraction"] = 1.0
    assert matches(found.layers, **{"0": expected})
    assert set(found.layers["0"]) == USUAL


def relu_of(z):
    return z, *relu(z)


def test_nested_and_shared():
    """A module that is used twice is one layer, by its first name, with all it gave."""
    shared = nn.Linear(4, 4)
    net = nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.Sequential(nn.Linear(4, 4), shared))
    x = normal(7, 4)
    found = initflow.inspect(net, x, squared)
    layer, other = Layer(shared), Layer(net[1][0])
    z = x @ shared.weight.T + shared.bias
    h = layer.gave(z, *relu(z))
    h = other.gave(h @ net[1][0].weight.T + net[1][0].bias)
    squared(layer.gave(h @ shared.weight.T + shared.bias)).backward()
    assert matches(found.layers, **{"0.0": layer.quantities(), "1.0": other.quantities()})


def test_root_layer():
    """A model that is itself a layer goes by its type."""
    found = initflow.inspect(nn.Linear(3, 2), normal(5, 3), squared)
    assert list(found.layers) == ["linear"]


def test_transformer_encoder():
    """In training, with dropout, the attention written out; both its branches join a trunk."""
    block = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.2, batch_first=True)
    net = nn.TransformerEncoder(block, num_layers=2)
    x = normal(3, 5, 8)
    torch.manual_seed(1)
    found = initflow.inspect(net, x, weighted)
    torch.manual_seed(1)
    expected = {}
    for at, block in enumerate(net.layers):
        one, two = Layer(block.linear1), Layer(block.linear2)
        attended, its = attention_by_hand(block.self_attn, x, x, x)
        branch = block.dropout1(attended)
        its["out_proj"].branch = mean_square(branch) / mean_square(x)
        x = block.norm1(x + branch)
        z = F.linear(x, block.linear1.weight, block.linear1.bias)
        h = block.dropout(one.gave(z, *relu(z)))
        branch = block.dropout2(two.gave(F.linear(h, block.linear2.weight, block.linear2.bias)))
        two.branch = mean_square(branch) / mean_square(x)
        x = block.norm2(x + branch)
        expected |= {f"layers.{at}.self_attn.{name}": layer for name, layer in its.items()}
        expected |= {f"layers.{at}.linear1": one, f"layers.{at}.linear2": two}
    weighted(x).backward()
    expected = {name: layer.quantities() for name, layer in expected.items()}
    assert matches(found.layers, **expected)


@pytest.mark.parametrize("name", ["relu", "tanh", "selu", "softplus"])
def test_our_own_networks(name):
    """The export of a network measures as the network does."""
    activation = ACTIVATIONS[name]
    parameters = model.initialize(
        (30, 20, 15, 10), find("he"), ACTIVATIONS["relu"], bias_init="pytorch", seed=0
    )
    split = Split(normal(200, 30), torch.arange(200) % 10)
    (expected,) = measure.observe(parameters, [activation], split)
    module = model.to_module(parameters.state(), activation)
    found = initflow.inspect(module, (split.images, split.labels), F.cross_entropy)
    assert matches(found.layers, **expected.signals.layers)


SPELLINGS = [
    ("relu", nn.ReLU()),
    ("relu", nn.ReLU(inplace=True)),
    ("relu", F.relu),
    ("relu", F.relu_),
    ("relu", torch.relu),
    ("relu", torch.relu_),
    ("relu", lambda z: z.relu()),
    ("relu", lambda z: z.relu_()),
    ("relu", lambda z: F.relu(z, inplace=True)),
    ("relu", lambda z: F.relu(F.dropout(z, 0.0))),
    ("relu", lambda z: F.relu(F.dropout(z, 0.0, inplace=True))),
    ("tanh", nn.Tanh()),
    ("tanh", F.tanh),
    ("tanh", lambda z: z.tanh_()),
    ("sigmoid", torch.sigmoid),
    ("leaky_relu", nn.LeakyReLU(inplace=True)),
    ("leaky_relu", F.leaky_relu),
    ("gelu", nn.GELU()),
    ("silu", nn.SiLU(inplace=True)),
    ("selu", torch.selu),
    ("elu", nn.ELU(inplace=True)),
    ("softplus", F.softplus),
]


@pytest.mark.parametrize(("name", "spelled"), SPELLINGS)
def test_activations_however_spelled(name, spelled):
    """As a module, function, method or kernel, in place or not."""
    net = Net(lambda net, x: spelled(net.fc(x)), fc=fc())
    x = normal(30, 4)
    found = initflow.inspect(net, x, squared).layers["fc"]
    z = net.fc(x).detach()
    activation = ACTIVATIONS[name]
    a, slopes = activation.function(z), activation.derivative(z)
    assert found["activation_variance"] == pytest.approx(np.var(a.double().numpy()), rel=1e-4)
    assert found["dead_fraction"] == (a == 0).all(0).double().mean()
    flat = slopes.abs() < 0.05 * activation.steepest
    assert found["saturated_fraction"] == flat.double().mean()


def fc():
    return nn.Linear(4, 6)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_every_known_activation_has_a_name_in_torch(name):
    """None of them is misspelled."""
    assert any(hasattr(home, name) for home in (torch, F, torch.Tensor))


@pytest.mark.parametrize(
    "after",
    [
        lambda z, x: F.relu(z + x),  # a residual
        lambda z, x: F.relu(z.add_(x)),
        lambda z, _: F.relu(z @ torch.ones(6, 6)),  # another's pre-activations
        lambda z, _: F.relu(F.softmax(z, dim=1)),
        lambda z, _: F.logsigmoid(z),  # not known
        lambda z, _: z,
    ],
)
def test_no_activation(after):
    """What is not known to be the layer's activation is not taken for it."""
    net = Net(lambda net, x: after(net.fc(x), normal(30, 6)), fc=fc())
    found = initflow.inspect(net, normal(30, 4), squared).layers["fc"]
    missing = {"activation_variance", "activation_second_moment"}
    assert USUAL - set(found) - {"branch_ratio"} == missing | {
        "dead_fraction",
        "saturated_fraction",
    }


def test_only_the_first_activation():
    """One that follows upon another, or stands beside it, is not a layer's own."""

    def forward(net, x):
        z = net.fc(x)
        return torch.relu(z) * torch.tanh(z) + torch.tanh(torch.relu(z))

    net, x = Net(forward, fc=fc()), normal(30, 4)
    found = initflow.inspect(net, x, squared).layers["fc"]
    a = torch.relu(net.fc(x)).detach().double().numpy()
    assert found["activation_variance"] == pytest.approx(np.var(a), rel=1e-4)


def test_frozen_layers():
    """A frozen weight has no gradient; before all that is trained, there is none at all."""
    net, x = cnn(), normal(5, 1, 8, 8)
    for name in ("conv1", "bn", "fc1"):
        getattr(net, name).requires_grad_(requires_grad=False)
    found = initflow.inspect(net, x, squared).layers
    assert USUAL - set(found["conv1"]) == {
        "gradient_variance",
        "gradient_second_moment",
        "weight_gradient_variance",
        "distinct_gradient_fraction",
    }
    assert USUAL - set(found["fc1"]) == {
        "weight_gradient_variance",
        "distinct_gradient_fraction",
    }
    assert found["conv1"]["dead_fraction"] >= 0


def test_parametrized_weights():
    """Measured is the weight that is applied, without computing it once more."""
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.ReLU())
    twin, x = copy.deepcopy(net), normal(9, 4)
    found = initflow.inspect(net, x, squared).layers["0"]
    state = net[0].parametrizations.weight[0]
    assert torch.equal(state._u, twin[0].parametrizations.weight[0]._u)
    variance = np.var(twin[0].weight.detach().double().numpy())
    assert found["weight_variance"] == pytest.approx(variance, rel=1e-4)
    assert "weight_gradient_variance" not in found


def test_checkpointed():
    """What is computed again in the backward pass is measured once."""
    body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2), nn.Tanh())
    net = Net(lambda net, x: checkpoint(net.body, x, use_reentrant=False), body=body)
    x = normal(9, 4)
    plain, found = (initflow.inspect(each, x, squared).layers for each in (body, net))
    assert list(found.values()) == list(plain.values())


def test_a_model_that_calls_itself():
    """Is measured from its outermost call to that call's end."""

    def forward(net, x):
        return net.fc(net(x[:, :4])) if x.shape[1] > 4 else net.fc(x)

    net, x = Net(forward, fc=nn.Linear(4, 4)), normal(9, 8)
    found = initflow.inspect(net, x, squared).layers["fc"]
    once = net.fc(x[:, :4])
    both = torch.cat([once, net.fc(once)]).detach().double().numpy()
    assert found["preactivation_variance"] == pytest.approx(np.var(both), rel=1e-4)


def test_odd_outputs_are_left_out():
    """An expert that gets nothing, a layer that gives no tensor."""

    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    net = Net(lambda net, x: net.a(x) + net.b(x)[0] + net.c(x[:0]).sum(), a=fc(), b=Pair(4, 6))
    net.c = fc()
    found = initflow.inspect(net, normal(5, 4), squared)
    assert list(found.layers) == ["a"]


def test_nonfinite_entries_are_counted():
    """And the values that they would give are left out."""
    net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), normal(5, 4)
    x[0, 0] = torch.inf
    found = initflow.inspect(net, x, squared)
    assert found.nonfinite["preactivation/0"] == 3
    assert "preactivation_variance" not in found.layers["0"]
    assert "weight_variance" in found.layers["0"]


def snapshot(net):
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return (
        {name: (id(tensor), tensor.clone()) for name, tensor in tensors.items()},
        {name: (id(p.grad), p.grad.clone()) for name, p in net.named_parameters()},
        [module.training for module in net.modules()],
    )


def same(one, other):
    """Equal to the bit, and of the same identity."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def hooks_on(net):
    """Every hook on a module, parameter or optimizers, and every mode for torch functions."""
    modules = [hooks for module in net.modules() for hooks in vars(module).items()]
    found = [hooks for name, hooks in modules if name.endswith("_hooks") and hooks]
    found += [p._backward_hooks for p in net.parameters() if p._backward_hooks]
    found += _global_optimizer_post_hooks.values()
    found += [*hooks._of_modules, *hooks._of_scalers, *hooks._in_place]
    return found + torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("training", [True, False])
def test_everything_is_left_as_it_was(training):
    """Parameters, gradients, statistics, random numbers, mode and hooks; with gradients off."""
    net = nn.Sequential(cnn(), nn.Dropout()).train(training)
    net[0].act.eval()
    x, y = normal(5, 1, 8, 8), normal(5, 2)
    squared(net(x)).backward()
    before, stream = snapshot(net), torch.get_rng_state()
    before = (
        *before[:1],
        {name: (at, g.clone()) for name, (at, g) in before[1].items()},
        before[2],
    )
    with torch.no_grad():
        found = initflow.inspect(net, [x, y], F.mse_loss)
        assert not torch.is_grad_enabled()
    assert "weight_gradient_variance" in found.layers["0.conv1"]
    assert same(snapshot(net), before)
    assert torch.equal(torch.get_rng_state(), stream)
    assert not hooks_on(net)


def test_asking_twice_gives_the_same():
    """Also with dropout, from one random state."""
    net, x = nn.Sequential(nn.Dropout(), nn.Linear(4, 3)), normal(9, 4)
    assert initflow.inspect(net, x, squared) == initflow.inspect(net, x, squared)


def fails(message, *args):
    with pytest.raises(SettingError) as caught:
        initflow.inspect(*args)
    assert str(caught.value) == message
    assert "\n" not in message


class Several(nn.Module):
    """A model of several arguments."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x, scale=1.0, *, shift=0.0):
        return self.fc(x) * scale + shift


def against(outputs, *targets, **named):
    return ((outputs - sum([*targets, *named.values()])) ** 2).mean()


X, Y, Z = normal(5, 4), normal(5, 3, seed=1), normal(5, 3, seed=2)


class Encoding(UserDict):
    """A mapping as Hugging Face's tokenizers give it."""


class Pair(NamedTuple):
    """A batch whose parts have names."""

    x: torch.Tensor
    y: torch.Tensor


def data_parallel(net, kind=nn.DataParallel):
    """On the CPU, also after a test has brought a device of its own."""
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules[nn.DataParallel.__module__]  # a function has its name in the package
        patch.setattr(module, "_get_available_device_type", lambda: None)
        return kind(net)


@pytest.mark.parametrize(
    ("batch", "loss"),
    [
        (X, lambda net: against(net(X))),
        ([X], lambda net: against(net(X))),
        ((X, Y), lambda net: against(net(X), Y)),
        ([X, Y, Z], lambda net: against(net(X), Y, Z)),
        (Pair(X, Y), lambda net: against(net(X), Y)),
        (((X, Y),), lambda net: against(net(X, Y))),
        (((X, Y), Z), lambda net: against(net(X, Y), Z)),
        (({"x": X, "shift": Y}, Z), lambda net: against(net(X, shift=Y), Z)),
        ({"x": X}, lambda net: against(net(X))),
        ({"y": Y, "x": X, "shift": Z}, lambda net: against(net(X, shift=Z), y=Y)),
        (Encoding(x=X, scale=Y, y=Z), lambda net: against(net(X, Y), y=Z)),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_batches_as_they_come(batch, loss, wrapped):
    """Tensors, tuples of any length, mappings; also where DataParallel passes them on."""
    net = Several()
    found = initflow.inspect(data_parallel(net) if wrapped else net, batch, against)
    loss(net).backward()
    variance = np.var(net.fc.weight.grad.double().numpy())
    values = found.layers["module.fc" if wrapped else "fc"]
    assert values["weight_gradient_variance"] == pytest.approx(variance, rel=1e-4)


def test_data_parallel_on_several_devices_calls_its_own_module():
    """On one of them, as its copies on the others have layers that nobody knows."""
    net, seen = nn.Linear(4, 2), []

    class OnDevices(nn.DataParallel):
        def forward(self, *inputs):
            seen.append(self.device_ids)
            return self.module(*inputs)

    model = data_parallel(net, OnDevices)
    model.device_ids = [0, 1]
    found = initflow.inspect(model, X, squared)
    assert list(found.layers) == ["module"]
    assert seen == [[0]]
    assert model.device_ids == [0, 1]


def test_a_model_that_gives_its_own_loss():
    """With all entries of the batch, which it takes by any name."""

    class Taking(Several):
        def forward(self, **batch):
            outputs = super().forward(batch["x"])
            return SimpleNamespace(loss=against(outputs, batch["labels"]))

    found = initflow.inspect(Taking(), {"x": X, "labels": Y}, lambda outputs: outputs.loss)
    assert "weight_gradient_variance" in found.layers["fc"]


def test_a_packed_sequence_is_one_argument():
    """Though it is a tuple."""
    packed = nn.utils.rnn.pack_sequence([normal(3, 4), normal(2, 4)])
    net = Net(lambda net, x: net.fc(net.gru(x)[0].data), gru=nn.GRU(4, 3), fc=nn.Linear(3, 2))
    found = initflow.inspect(net, (packed, normal(5, 2)), F.mse_loss)
    assert list(found.layers) == ["gru.l0.reset", "gru.l0.update", "gru.l0.new", "fc"]
    assert found.not_measured == {}


def test_buffers_that_are_shared_or_replaced_are_left_as_they_were():
    """Under DataParallel too, whose module works on copies."""
    net = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[1].running_mean = net[0].running_mean
    net[0].register_buffer("seen", None)

    def replace(module, *_):
        module.seen = torch.ones(1)
        module.register_buffer("new", torch.ones(1))

    handle = net[0].register_forward_hook(replace)
    before = {name: (id(b), b.clone()) for name, b in net.named_buffers(remove_duplicate=False)}
    initflow.inspect(data_parallel(net), X, squared)
    handle.remove()
    after = {name: (id(b), b) for name, b in net.named_buffers(remove_duplicate=False)}
    assert same(after, before)
    assert net[0].seen is None


def test_wrong_batches():
    """Are named by their shape, with PyTorch's own reason."""
    net, x = cnn(), normal(5, 1, 8, 8)
    fails(
        "model takes no batch of shape (5, 3, 8, 8): Given groups=1, weight of size [4, 1, 3, 3], "
        "expected input[5, 3, 8, 8] to have 1 channels, but got 3 channels instead",
        *(net, normal(5, 3, 8, 8), squared),
    )
    fails(
        "model takes no batch of list of 1: linear(): argument 'input' (position 1) must be "
        "Tensor, not list",
        *(fc(), ([x], x), squared),
    )
    fails(
        "loss takes no outputs of shape (5, 2) with targets of shape (4,): Expected input "
        "batch_size (5) to match target batch_size (4).",
        *(net, (x, torch.zeros(4, dtype=torch.int64)), F.cross_entropy),
    )
    fails(
        "loss takes no outputs of shape (5, 2) with targets of shape (4,), shape (2, 2): "
        "squared() takes 1 positional argument but 3 were given",
        *(net, (x, normal(4), normal(2, 2)), squared),
    )
    forms = "batch must be a tensor, a tuple or list (inputs, *targets) or a mapping of names, not"
    fails(f"{forms} tuple of 0", net, (), squared)
    fails(f"{forms} int", net, 5, squared)
    fails(f"{forms} dict of 5", net, {5: x}, squared)
    fails(
        "model takes no batch of dict of nothing: Net.forward() missing 1 required positional "
        "argument: 'x'",
        *(net, {"y": x}, squared),
    )
    assert not hooks_on(net)


def test_what_fails_in_looking_is_one_line(monkeypatch):
    """With its own reason, once the model has run; nothing is left behind."""
    net = cnn()
    monkeypatch.setattr(Moments, "of", lambda *_: 1 / 0)
    reason = "model cannot be measured: ZeroDivisionError: division by zero"
    fails(reason, net, normal(5, 1, 8, 8), squared)
    assert not hooks_on(net)


def test_wrong_losses():
    """Are named by what they gave."""
    net, x = fc(), normal(5, 4)
    number = "loss must give one number as a tensor, not"
    fails(f"{number} shape (5, 6)", net, x, lambda outputs: outputs)
    fails(f"{number} float", net, x, lambda outputs: outputs.sum().item())
    gradient = "loss must have a gradient by the model's parameters"
    fails(gradient, net, x, lambda outputs: outputs.detach().sum())
    fails(gradient, fc().requires_grad_(requires_grad=False), x.requires_grad_(), squared)
    unused = Net(lambda net, x: x * net.scale.weight, fc=fc(), scale=nn.LayerNorm(4, bias=False))
    fails(
        "loss must depend on a layer that the model calls and can be measured",
        *(unused, x.detach(), squared),
    )


def test_a_compiled_model_is_measured_as_it_was_written():
    """Whole or in part, by its own call or another's, with the names of the model itself."""
    x = normal(5, 4)
    layer = fc()
    expected = initflow.inspect(nn.Sequential(layer, nn.ReLU()), x, squared).metrics()

    def never(*_):
        pytest.fail("it was compiled")

    whole, part = (nn.Sequential(copy.deepcopy(layer), nn.ReLU()) for _ in range(2))
    part[0].compile(backend=never)
    other = nn.Sequential(torch.compile(layer, backend=never), nn.ReLU())
    for net in (torch.compile(whole, backend=never), part, other):
        assert initflow.inspect(net, x, squared).metrics() == expected
    whole.compile(backend=never)
    assert initflow.inspect(whole, x, squared).metrics() == expected


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_models_without_layers_to_look_into():
    """Scripted ones, empty ones, lazy ones: one line each."""
    x = normal(5, 4)
    scripted = (
        "model must not be scripted: its functions run where nothing sees them; give the model "
        "as it was before scripting"
    )
    for net in (torch.jit.script(fc()), nn.Sequential(torch.jit.script(fc()))):
        fails(scripted, net, x, squared)
    fails("model must have parameters; ReLU has none", nn.ReLU(), x, squared)
    no_layer = "model must hold a layer that can be measured; LayerNorm has none"
    fails(no_layer, nn.LayerNorm(4), x, squared)
    lazy = "model must have its weights; LazyLinear is lazy: call it on a batch first"
    fails(lazy, nn.LazyLinear(3), x, squared)
    fails("model must be a torch.nn.Module, not builtin_function_or_method", torch.relu, x, squared)

"""Attention by projection, embeddings, and residual branches, each against what is written out."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all PyTorch code calls it
from torch.overrides import TorchFunctionMode
from torchvision.models import resnet18

import initflow
from initflow.diagnostics.observing import attention, hooks
from initflow.diagnostics.recorder import Recorder
from tests.diagnostics.test_inspection import (
    Layer,
    Net,
    attention_by_hand,
    hooks_on,
    matches,
    mean_square,
    normal,
    weighted,
)

WIDE = {"kdim": 3, "vdim": 6}
Q, K, V = normal(2, 5, 8), normal(2, 4, 8, seed=1), normal(2, 4, 8, seed=2)
NARROW_K, WIDE_V = normal(2, 4, 3, seed=1), normal(2, 4, 6, seed=2)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({}, (Q, Q, Q)),
        ({}, (Q, K, K)),
        ({}, (Q, K, V)),
        ({"bias": False}, (Q, Q, Q)),
        (WIDE, (Q, NARROW_K, WIDE_V)),
        (WIDE | {"bias": False}, (Q, NARROW_K, WIDE_V)),
    ],
)
def test_attention(options, given, batch_first, need_weights):
    """Each projection by itself: packed into one product, into two, or with weights of its own."""

    def forward(net, _):
        x = given if batch_first else [one.transpose(0, 1) for one in given]
        x = [x[[one is other for other in given].index(True)] for one in given]
        gave = net.attention(*x, need_weights=need_weights)[0]
        return gave if batch_first else gave.transpose(0, 1)

    torch.manual_seed(0)
    net = Net(forward, attention=nn.MultiheadAttention(8, 2, batch_first=batch_first, **options))
    found = initflow.inspect(net, Q, weighted)
    output, layers = attention_by_hand(net.attention, *given)
    weighted(output).backward()
    expected = {f"attention.{name}": layer.quantities() for name, layer in layers.items()}
    assert matches(found.layers, **expected)
    assert not found.not_measured


OPTIONS = [
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"dropout": 0.3},
    {"average_attn_weights": False},
    {"key_padding_mask": torch.arange(5).ge(4).expand(2, 5)},
    {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True, "need_weights": False},
    {"attn_mask": torch.ones(5, 5).triu(1)},
    {"x": normal(5, 8)},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_attention_gives_the_same_bits(options):
    """Looked into and not: its outputs, gradients and random numbers."""
    of_call = ("average_attn_weights", "key_padding_mask", "attn_mask", "is_causal", "need_weights")
    called = {name: value for name, value in options.items() if name in of_call}
    made = {name: value for name, value in options.items() if name not in (*of_call, "x")}
    x, gave, found = options.get("x", Q), [], []

    def forward(net, x):
        output, scores = net.attention(x, x, x, **called)
        gave.append([output, *([] if scores is None else [scores])])
        return output

    torch.manual_seed(0)
    net = Net(forward, attention=nn.MultiheadAttention(8, 2, batch_first=True, **made))
    recorder = Recorder(net)
    for observers in ([], [(net, recorder.begin)]):
        torch.manual_seed(1)
        with hooks.forwards(observers), contextlib.closing(recorder):
            output = net(x)
        loss, parameters = weighted(output), [*net.parameters()]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append([*gradients, *gave[-1], torch.get_rng_state()])
    assert len(initflow.inspect(net, x, weighted).layers) == 4
    assert not recorder.saw_nothing
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not hooks_on(net)


class Counting(TorchFunctionMode):
    """A mode of the user's own, which is asked of attention as a whole."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def attending():
    return Net(
        lambda net, x: net.fc(net.attention(x, x, x)[0]),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        fc=nn.Linear(8, 2),
    )


def test_attention_that_cannot_be_opened_is_named(monkeypatch):
    """Where a mode of the user's has rules for it, and where PyTorch has made it otherwise."""
    net = attending()
    missed = {"attention": "MultiheadAttention: computes in a way of its own"}
    with Counting() as mode:
        found = initflow.inspect(net, Q, weighted)
    assert "multi_head_attention_forward" in mode.seen
    assert "scaled_dot_product_attention" not in mode.seen
    assert (list(found.layers), found.not_measured) == (["fc"], missed)
    with torch.device("cpu"):  # this one only says where new tensors are
        assert len(initflow.inspect(net, Q, weighted).layers) == 5
    monkeypatch.setattr(attention, "OPENED", None)
    found = initflow.inspect(net, Q, weighted)
    assert (list(found.layers), found.not_measured) == (["fc"], missed)
    for odd in (len, lambda x: x):
        assert attention._opened(odd) is None


def test_an_error_in_attention_comes_through():
    """As it is, and with no mode left behind."""
    net = attending()
    with pytest.raises(initflow.SettingError, match="expecting embedding dimension of 8"):
        initflow.inspect(net, normal(2, 5, 7), weighted)
    assert not hooks_on(net)


class Turned:
    """A weight that has the units along its second axis."""

    def __init__(self, weight):
        self.own, self.weight = weight, self

    def detach(self):
        return self.own.detach().t()

    @property
    def grad(self):
        grad = self.own.grad
        return None if grad is None else (grad.to_dense() if grad.is_sparse else grad).t()


class Conv1D(nn.Module):
    """As Hugging Face's: a linear layer whose weight is (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(
            *x.shape[:-1], self.nf
        )


TOKENS = torch.tensor([[1, 2, 0, 1], [5, 1, 1, 3]])
OTHERS = [
    (nn.Embedding(7, 3), (TOKENS,), lambda e: e.weight[TOKENS]),
    (nn.Embedding(7, 3, sparse=True), (TOKENS,), lambda e: e.weight[TOKENS]),
    (nn.EmbeddingBag(7, 3), (TOKENS,), lambda e: e.weight[TOKENS].mean(1)),
    (nn.EmbeddingBag(7, 3, sparse=True, mode="sum"), (TOKENS,), lambda e: e.weight[TOKENS].sum(1)),
    (Conv1D(5, 8), (Q,), lambda c: Q @ c.weight + c.bias),
    (
        nn.Bilinear(8, 8, 5),
        (K, V),
        lambda b: torch.einsum("nti,oij,ntj->nto", K, b.weight, V) + b.bias,
    ),
]


@pytest.mark.parametrize(("module", "given", "by_hand"), OTHERS)
def test_other_layers(module, given, by_hand):
    """Every quantity; gradients that are sparse count with their zeros."""
    net = Net(lambda net, _: torch.tanh(net.layer(*given)), layer=copy.deepcopy(module))
    found = initflow.inspect(net, Q, weighted)
    layer = Layer(net.layer if isinstance(module, nn.Bilinear) else Turned(net.layer.weight))
    z = by_hand(net.layer)
    a = torch.tanh(z)
    weighted(layer.gave(z, a, 1 - a**2)).backward()
    assert matches(found.layers, layer=layer.quantities())
    assert not found.not_measured


def test_an_embedding_that_is_the_output_layer_too():
    """Of a tied weight each sees all of its gradient."""
    net = Net(lambda net, _: net.head(net.embed(TOKENS)), embed=nn.Embedding(7, 3))
    net.head = nn.Linear(3, 7, bias=False)
    net.head.weight = net.embed.weight
    found = initflow.inspect(net, Q, weighted).layers
    weighted(net(Q)).backward()
    variance = np.var(net.embed.weight.grad.double().numpy())
    for name in ("embed", "head"):
        assert found[name]["weight_gradient_variance"] == pytest.approx(variance, rel=1e-5)


def fc(n=8, m=8):
    return nn.Linear(n, m)


def ratio(branch, trunk):
    return mean_square(branch) / mean_square(trunk)


def rezero(net, x):
    return x + net.scale * net.b(torch.relu(net.a(x)))


def downsampled(net, x):
    """As ResNet's: the trunk is made to fit after the branch is computed."""
    h = net.norm(net.b(torch.relu(net.a(x))))
    h += net.norm2(net.c(x))
    return torch.relu(h)


def parallel(net, x):
    """As GPT-J's: two branches are added first."""
    return net.b(torch.relu(net.a(x))) + net.d(torch.relu(net.c(x))) + x


BRANCHES = [
    (lambda net, x: x + net.a(x), lambda net, x: {"a": ratio(net.a(x), x)}),
    (lambda net, x: torch.relu(net.a(x)) + x, lambda net, x: {"a": ratio(F.relu(net.a(x)), x)}),
    (lambda net, x: net.a(x).add_(x), lambda net, x: {"a": ratio(net.a(x), x)}),
    (
        lambda net, x: torch.add(x, net.a(x), alpha=3),
        lambda net, x: {"a": 9 * ratio(net.a(x), x)},
    ),
    (
        lambda net, x: torch.add(net.a(x), x, alpha=3),
        lambda net, x: {"a": ratio(net.a(x), x) / 9},
    ),
    (
        lambda net, x: net.norm(net.b(net.norm(x)).chunk(1)[0]) + x,
        lambda net, x: {"b": ratio(net.norm(net.b(net.norm(x))), x)},
    ),
    (rezero, lambda net, x: {"b": ratio(rezero(net, x) - x, x)}),
    (
        downsampled,
        lambda net, x: {"b": ratio(net.norm(net.b(F.relu(net.a(x)))), net.norm2(net.c(x)))},
    ),
    (parallel, lambda net, x: {"d": ratio(parallel(net, x) - x, x)}),
    (
        lambda net, x: net.a(x + net.a(x)) + x,
        lambda net, x: {"a": (ratio(net.a(x), x) + ratio(net.a(x + net.a(x)), x)) / 2},
    ),
    (
        lambda net, x: x + net.rnn(x)[0],
        lambda net, x: {"rnn.l0.new": ratio(net.rnn(x)[0], x)},
    ),
]


def branched(forward):
    torch.manual_seed(0)
    net = Net(forward, a=fc(), b=fc(), c=fc(), d=fc(), rnn=nn.GRU(8, 8))
    net.norm, net.norm2, net.scale = (
        nn.LayerNorm(8),
        nn.LayerNorm(8),
        nn.Parameter(torch.ones(()) / 3),
    )
    return net


@pytest.mark.parametrize(("forward", "expected"), BRANCHES)
def test_branches(forward, expected):
    """By the last layer of what is added, in any spelling; all calls have one ratio together."""
    net = branched(forward)
    with torch.no_grad():
        expected = expected(net, Q)
    found = initflow.inspect(net, Q, weighted).layers
    ratios = {n: values["branch_ratio"] for n, values in found.items() if "branch_ratio" in values}
    assert ratios == pytest.approx(expected, rel=1e-4)


def recurrence(net, x):
    h = torch.zeros(2, 8)
    for at in range(3):
        h = torch.tanh(net.a(x[:, at]) + net.b(h))
    return h


NO_BRANCHES = [
    lambda net, x: net.a(x) + net.b(x),  # beside one another
    lambda net, x: net.a(x) + torch.randn(2, 5, 8),
    lambda net, x: net.a(x) + torch.randn_like(x),
    lambda net, x: net.a(x) + net.b(torch.ones(2, 5, 8)),
    lambda net, x: net.a(x + torch.relu(x)),
    lambda net, x: net.a(x) + net.a(x),
    lambda net, x: (net.a(x) + 1) + x[:, :1],
    lambda net, x: net.a(x) + net.b(x) * torch.randn(2, 5, 8),
    lambda net, x: net.d(net.c(x)) * net.a(x) + net.b(x),  # neither is what a layer gave
    lambda net, x: (net.a(x).square().mean() + net.b(net.a(x)).mean()).expand(2),
    recurrence,
]


@pytest.mark.parametrize("forward", NO_BRANCHES)
def test_no_branches(forward):
    """What is added to no trunk that it was computed from, or is one of many steps."""
    found = initflow.inspect(branched(forward), Q, weighted).layers
    assert found
    assert not any("branch_ratio" in values for values in found.values())


def test_a_resnets_branches():
    """Each of its eight blocks has one, by its second convolution."""
    torch.manual_seed(0)
    net, x, expected = resnet18(num_classes=10).eval(), normal(2, 3, 64, 64), {}

    def keep(name, block):
        def compared(_, given, gave):
            trunk = given[0] if block.downsample is None else block.downsample(given[0])
            h = block.relu(block.bn1(block.conv1(given[0])))
            expected[f"{name}.conv2"] = ratio(block.bn2(block.conv2(h)), trunk)

        return block.register_forward_hook(compared)

    blocks = {f"layer{n}.{at}": getattr(net, f"layer{n}")[at] for n in range(1, 5) for at in (0, 1)}
    handles = [keep(name, block) for name, block in blocks.items()]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    found = initflow.inspect(net, x, weighted)
    ratios = {n: v["branch_ratio"] for n, v in found.layers.items() if "branch_ratio" in v}
    assert len(ratios) == 8
    assert ratios == pytest.approx(expected, rel=1e-4)
    assert not found.not_measured

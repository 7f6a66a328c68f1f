"""Expected second moments, forward and backward, against brute-force draws of wide networks."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as f

from initflow.models import batches, graph
from initflow.models.moments.expectations import IMAGES, first, of_model, theory

DRAWS = 60
WIDE = 96


class Of(nn.Module):
    """A function of its input and of layers by name."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.function(self, x)


def fan_in(module, weight):
    if isinstance(module, nn.Embedding):
        return 2
    transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d))
    return weight[:, 0].numel() if transposed else weight[0].numel()


def draw(model, seed):
    """Weights from N(0, 2/fan_in), biases 0.1 apart from 0 at random, by plain torch."""
    stream = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                std = math.sqrt(2 / fan_in(module, parameter))
                nn.init.normal_(parameter, 0, std, stream)
            elif "bias" in name and not isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
                nn.init.normal_(parameter, 0, 0.1, stream)


def variances(model):
    of = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                of[parameter.shape] = 2 / fan_in(module, parameter)

    def moments(node, weight, bias):
        variance = of.get(weight.shape, of.get(weight.T.shape if weight.dim() == 2 else None))
        return variance, 0.0 if bias is None else 0.01

    return moments


def simulated(model, x, gradient):
    """Mean squares of what the model gives and of the gradient by its input, and their errors."""
    forward, backward = [], []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        draw(model, seed)
        given = x.clone().requires_grad_(x.is_floating_point())
        out = model(given)
        forward.append(out.detach().square().mean())
        if x.is_floating_point():
            (found,) = torch.autograd.grad((out * gradient).sum(), given)
            backward.append(found.square().mean())
    return [
        (torch.stack(way).mean(), torch.stack(way).std() / DRAWS**0.5)
        for way in (forward, backward)
        if way
    ]


def expected(model, x, gradient):
    recorded = graph.of_batch(model, batches.given(model, x))
    (out,) = recorded.outputs
    its = theory(recorded, {out: gradient}, variances(model))
    ways = [its.of_node(out).forward]
    if x.is_floating_point():
        ways.append(its.of_node(recorded.nodes[0]).backward)
    return ways


def images(*size):
    """Smooth ones, so that neighbours hang together, and not of mean 0."""
    noise = torch.rand(*size, generator=torch.Generator().manual_seed(0))
    return f.avg_pool2d(noise, 3, 1, 1) * 2 if len(size) == 4 else noise


def tokens(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(0))


def conv(*arguments, **settings):
    return nn.Conv2d(*arguments, **settings)


def written_attention(m, x):
    q, k, v = m.three(x).view(2, 6, 3, 4, 24).permute(2, 0, 3, 1, 4)
    logits = (q @ k.transpose(-2, -1)) / 24**0.5
    logits = logits.masked_fill(torch.ones(6, 6).triu(1) == 1, -torch.inf)
    return m.out((logits.softmax(-1) @ v).transpose(1, 2).reshape(2, 6, WIDE))


def swish(x):
    return x * torch.sigmoid(1.5 * x)


def scaled(x):
    return x * x.pow(2).mean(-1, keepdim=True).rsqrt()


def three():
    return {"three": nn.Linear(16, 3 * WIDE), "out": nn.Linear(WIDE, WIDE)}


def function_attention(m, x):
    q, k, v = m.three(x).chunk(3, -1)
    split = [each.unflatten(-1, (4, 24)).transpose(1, 2) for each in (q, k, v)]
    return m.out(f.scaled_dot_product_attention(*split, is_causal=True).transpose(1, 2).flatten(2))


def two(a=16, b=WIDE, c=WIDE):
    return {"a": nn.Linear(a, b), "b": nn.Linear(b, c)}


def convs(*, channels=2, **settings):
    return {"a": conv(channels, WIDE, 3, padding=1), "b": conv(WIDE, WIDE, 3, **settings)}


ROWS, IMAGE, TOKENS = tokens(4, 16), images(3, 2, 8, 8), tokens(2, 6, 16)
# The model, its input, and how far off, beyond chance, forward and backward may be.
RULES = {
    "gelu": (Of(lambda m, x: m.b(f.gelu(m.a(x))), **two()), ROWS, 0.02, 0.04),
    "any function": (Of(lambda m, x: m.b(f.relu(m.a(x)) ** 3), **two()), ROWS, 0.1, 0.1),
    "of itself": (Of(lambda m, x: m.b(swish(m.a(x))), **two()), ROWS, 0.02, 0.04),
    "in place": (Of(lambda m, x: m.b(f.relu_(m.a(x))), **two()), ROWS, 0.02, 0.02),
    "a matrix": (
        Of(lambda m, x: torch.tanh(x @ m.a.weight.T) @ m.b.weight, **two()),
        ROWS,
        0.02,
        0.03,
    ),
    "prelu": (Of(lambda m, x: m.b(m.p(m.a(x))), p=nn.PReLU(WIDE), **two()), ROWS, 0.02, 0.02),
    "dropout": (Of(lambda m, x: m.b(f.dropout(f.relu(m.a(x)), 0.3)), **two()), ROWS, 0.03, 0.03),
    "residual": (
        Of(
            lambda m, x: m.c(f.relu(m.a(x) + m.b(f.relu(m.a(x) * 1)))),
            **two(),
            c=nn.Linear(WIDE, WIDE),
        ),
        *(ROWS, 0.04, 0.06),
    ),
    "concatenated": (
        Of(
            lambda m, x: m.b(torch.cat([f.relu(m.a(x)), x], -1)),
            **two() | {"b": nn.Linear(WIDE + 16, WIDE)},
        ),
        *(ROWS, 0.02, 0.03),
    ),
    "gated": (
        Of(
            lambda m, x: m.b(math.prod(m.a(x).chunk(2, -1))),
            **two() | {"b": nn.Linear(WIDE // 2, WIDE)},
        ),
        *(ROWS, 0.03, 0.05),
    ),
    "convolution": (
        Of(lambda m, x: m.b(f.relu(m.a(x))), **convs(stride=2, padding=2, dilation=2)),
        *(IMAGE, 0.02, 0.03),
    ),
    "groups": (Of(lambda m, x: m.b(torch.tanh(m.a(x))), **convs(groups=4)), IMAGE, 0.02, 0.03),
    "depthwise": (
        Of(lambda m, x: m.b(torch.tanh(m.a(x))), **convs(groups=WIDE)),
        IMAGE,
        0.03,
        0.05,
    ),
    "transposed": (
        Of(
            lambda m, x: m.b(f.relu(m.a(x))),
            a=nn.ConvTranspose2d(2, WIDE, 3, 2, 1, 1),
            b=nn.ConvTranspose2d(WIDE, 8, 4, 2, groups=2),
        ),
        *(IMAGE, 0.02, 0.04),
    ),
    "max pooling": (
        Of(lambda m, x: m.b(f.max_pool2d(f.relu(m.a(x)), 2)), **convs()),
        IMAGE,
        0.04,
        0.06,
    ),
    "max pooling first": (
        Of(lambda m, x: m.b(f.gelu(f.max_pool2d(m.a(x), 3, 2, 1))), **convs()),
        *(IMAGE, 0.04, 0.12),
    ),
    "average pooling": (
        Of(lambda m, x: m.b(f.avg_pool2d(f.relu(m.a(x)), 2)), **convs()),
        IMAGE,
        0.02,
        0.03,
    ),
    "overlapping averages": (
        Of(lambda m, x: m.b(f.avg_pool2d(f.tanh(m.a(x)), 2, 1)), **convs()),
        *(IMAGE, 0.02, 0.12),
    ),
    "twice pooled": (
        Of(
            lambda m, x: f.adaptive_avg_pool2d(f.relu(m.b(f.max_pool2d(f.relu(m.a(x)), 2))), 1),
            **convs(padding=1),
        ),
        *(IMAGE, 0.05, 0.08),
    ),
    "mean": (Of(lambda m, x: m.b(f.relu(m.a(x)).mean(1)), **two()), TOKENS, 0.02, 0.03),
    "flattened": (
        Of(lambda m, x: m.b(f.relu(m.a(x)).flatten(1)), a=conv(2, 16, 3), b=nn.Linear(576, WIDE)),
        *(IMAGE, 0.02, 0.03),
    ),
    "enlarged": (
        Of(lambda m, x: m.b(f.interpolate(f.relu(m.a(x)), scale_factor=2)), **convs()),
        *(IMAGE, 0.02, 0.3),  # backward, an entry's copies are taken to be uncorrelated
    ),
    "padded": (
        Of(lambda m, x: m.b(f.pad(f.relu(m.a(x)), (2, 1, 0, 1), "circular")), **convs()),
        *(IMAGE, 0.02, 0.1),
    ),
    "layer norm": (
        Of(lambda m, x: m.b(f.relu(m.n(m.a(x)))), n=nn.LayerNorm(WIDE), **two()),
        ROWS,
        0.02,
        0.05,
    ),
    "rms norm": (
        Of(lambda m, x: m.b(f.relu(m.n(m.a(x)))), n=nn.RMSNorm(WIDE), **two()),
        ROWS,
        0.02,
        0.05,
    ),
    "written norm": (
        Of(lambda m, x: m.b(scaled(m.a(x))), **two()),
        *(ROWS, 0.03, 1),
    ),
    "group norm": (
        Of(lambda m, x: m.b(f.relu(m.n(m.a(x)))), n=nn.GroupNorm(4, WIDE), **convs()),
        *(IMAGE, 0.02, 0.06),
    ),
    "batch norm": (
        Of(lambda m, x: m.b(f.relu(m.n(m.a(x)))), n=nn.BatchNorm2d(WIDE), **convs()),
        *(IMAGE, 0.12),  # of three images alike, a channel's variance is not a number
    ),
    "batch norm, evaluated": (
        Of(lambda m, x: m.b(f.relu(m.n(m.a(x)))), n=nn.BatchNorm2d(WIDE).eval(), **convs()),
        *(IMAGE, 0.02, 0.03),
    ),
    "over tokens": (
        Of(
            lambda m, x: m.b(f.gelu(m.a(x.transpose(1, 2)))),
            a=nn.Linear(6, WIDE),
            b=nn.Linear(WIDE, 6),
        ),
        *(TOKENS, 0.03, 0.05),
    ),
    "attention": (Of(function_attention, **three()), TOKENS, 0.05, 0.1),
    "written attention": (Of(written_attention, **three()), TOKENS, 0.05, 0.1),
    "torch's attention": (
        Of(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(WIDE, 4, batch_first=True)),
        *(tokens(2, 6, WIDE), 0.05, 0.1),
    ),
    "embedding": (
        Of(
            lambda m, x: m.b(torch.tanh(m.e(x) + m.p(torch.arange(6)))),
            e=nn.Embedding(20, WIDE),
            p=nn.Embedding(6, WIDE),
            b=nn.Linear(WIDE, WIDE),
        ),
        *(torch.arange(12).view(2, 6) % 5, 0.03, 0),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_meets_the_mean_over_many_draws(name):
    """Forward and backward, within the stated error and three standard errors of the mean."""
    model, x, *tolerances = RULES[name]
    torch.manual_seed(1)
    draw(model, 0)
    gradient = torch.randn_like(model(x))
    means = simulated(model, x, gradient)
    ways = expected(model, x, gradient)
    for way, (mean, error), tolerance in zip(ways, means, tolerances, strict=False):
        assert not way.reason
        assert abs(way.value - mean) < tolerance * mean + 3 * error, way.value / mean
    if name == "batch norm":
        assert ways[1].reason == "no rule for the gradient through the batch's own batch_norm in n"


def test_a_weight_is_random_and_the_batch_is_not():
    """A Linear's own second moment is exact: Var(w) · Σ x² + Var(b), entry by entry."""
    x, layer = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 4.0]]), nn.Linear(3, 5)
    its = of_model(layer, x, lambda *_: (0.5, 0.25))
    (node,) = its.graph.outputs
    assert its.forward.moment(node).flatten().tolist() == pytest.approx([7.25, 8.25])


class Recurrent(nn.Module):
    """An LSTM of both directions between layers that have rules."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.lstm = nn.LSTM(8, 16, batch_first=True, bidirectional=True)
        self.head, self.norm, self.last = nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, x):
        return self.last(self.norm(self.head(self.lstm(self.before(x))[0])))


def test_what_has_no_rule_is_named_and_ends_the_prediction_until_a_normalization():
    """Behind an LSTM nothing is said, in its words, and behind LayerNorm it goes on."""
    model = Recurrent()
    its = of_model(model, tokens(2, 5, 8), lambda *_: (1 / 32, 0.0)).of_layers()
    assert its["before"].forward.value is not None
    assert its["head"].forward.value is None
    assert its["head"].forward.reason == "no rule for both directions of lstm in lstm"
    assert its["last"].forward.value == pytest.approx(1.0)
    assert its["last"].backward.reason == "no gradient by the outputs was given"


def test_an_operation_that_no_rule_knows_is_said_with_its_place():
    """A sum that runs along the entries is no function of single ones."""
    model = Of(lambda m, x: m.b(m.a(x).cumsum(-1)), **two())
    its = of_model(model, ROWS).of_layers()
    assert its["b"].forward.reason == "no rule for cumsum"


def test_of_a_large_batch_the_first_images_are_gone_by():
    """Whatever form it has; targets go with their images."""
    assert len(first(torch.zeros(50, 3))) == IMAGES
    inputs, labels = first((torch.zeros(50, 3), torch.zeros(50)))
    assert len(inputs) == len(labels) == IMAGES
    assert len(first({"x": torch.zeros(50)})["x"]) == IMAGES
    assert len(first((torch.zeros(50), torch.zeros(20)))[0]) == 50


@pytest.mark.parametrize("name", ["ResNet", "transformer encoder", "small GPT", "LeNet"])
def test_layers_of_whole_architectures_meet_the_mean_over_seeds(name):
    """Half of the layers within 6 % forward and 10 % backward of the mean over 20 draws.

    Through a batch's own normalization nothing is predicted backward.
    """
    from bench.architectures import ARCHITECTURES

    (one,) = (each for each in ARCHITECTURES if each.name == name)
    model = one.build()
    x = one.batch() if one.name in ("transformer encoder", "small GPT") else images(4, 1, 28, 28)
    x = x[:4]
    draw(model, 0)
    gradient = torch.randn_like(model(x)).detach()
    sums = {}
    for seed in range(20):
        draw(model, seed)
        for key, value in measured(model, x, gradient).items():
            sums[key] = sums.get(key, 0) + value / 20
    recorded = graph.of_batch(model, batches.given(model, x))
    its = theory(recorded, {recorded.outputs[0]: gradient}, variances(model)).of_layers()
    forward = [abs(its[name].forward.value / mean[0] - 1) for name, mean in sums.items()]
    known = {name: its[name].backward.value for name in sums if not its[name].backward.reason}
    backward = [abs(value / sums[name][1] - 1) for name, value in known.items()]
    assert sorted(forward)[len(forward) // 2] < 0.06
    assert sorted(backward)[len(backward) // 2] < 0.1
    assert len(known) == (1 if name == "ResNet" else len(sums))


def measured(model, x, gradient):
    """Mean squares of the outputs of Linear and convolutions, and of the gradient by them."""
    kept, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.endswith("out_proj"):
            hooks.append(
                module.register_forward_hook(lambda _m, _x, y, name=name: kept.update({name: y}))
            )
    out = model(x)
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad((out * gradient).sum(), list(kept.values()))
    pairs = zip(kept.items(), gradients, strict=True)
    return {
        name: torch.stack([y.detach().square().mean(), g.square().mean()]) for (name, y), g in pairs
    }

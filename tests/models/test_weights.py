"""Which matrices a model holds: kinds, fans by what is really summed, what is left alone."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import initflow as inf
from initflow.models import choosing, weights
from tests.models.small import GPT, Conv1D, Reader

LSTM_GATES = ("input", "forget", "cell", "output")
KINDS = {
    "Linear": (nn.Linear(5, 7), [("Linear", 5, 7)]),
    "Conv1d": (nn.Conv1d(4, 6, 3), [("Conv1d", 12, 18)]),
    "grouped": (nn.Conv2d(8, 12, 3, groups=4), [("Conv2d", 18, 27)]),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), [("Conv2d", 9, 9)]),
    "strided": (nn.Conv2d(8, 12, 4, stride=2), [("Conv2d", 128, 48)]),
    "Conv3d": (nn.Conv3d(2, 3, 2), [("Conv3d", 16, 24)]),
    "transposed": (nn.ConvTranspose2d(8, 12, 4, stride=2), [("ConvTranspose2d", 32, 192)]),
    "transposed, 1": (nn.ConvTranspose1d(6, 4, 5, groups=2), [("ConvTranspose1d", 15, 10)]),
    "Embedding": (nn.Embedding(9, 4), [("Embedding", 1, 4)]),
    "EmbeddingBag": (nn.EmbeddingBag(9, 4), [("EmbeddingBag", 1, 4)]),
    "Bilinear": (nn.Bilinear(3, 4, 5), [("Bilinear", 12, 5)]),
    "Hugging Face's": (Conv1D(7, 5), [("Conv1D", 5, 7)]),
    "RNN": (nn.RNN(3, 5), [("RNN hidden, input", 3, 5), ("RNN hidden, recurrent", 5, 5)]),
    "LSTM": (
        nn.LSTM(3, 5, proj_size=2),
        [
            *((f"LSTM {gate}, input", 3, 5) for gate in LSTM_GATES),
            *((f"LSTM {gate}, recurrent", 2, 5) for gate in LSTM_GATES),
            ("LSTM projection", 5, 2),
        ],
    ),
    "GRUCell": (
        nn.GRUCell(3, 5),
        [
            (f"GRUCell {gate}, {side}", fan, 5)
            for (side, fan), gate in itertools.product(
                (("input", 3), ("recurrent", 5)), ("reset", "update", "new")
            )
        ],
    ),
    "attention": (
        nn.MultiheadAttention(8, 2),
        [*((f"MultiheadAttention {p}", 8, 8) for p in ("query", "key", "value")), ("Linear", 8, 8)],
    ),
    "attention, apart": (
        nn.MultiheadAttention(8, 2, kdim=3, vdim=5),
        [
            ("MultiheadAttention query", 8, 8),
            ("MultiheadAttention key", 3, 8),
            ("MultiheadAttention value", 5, 8),
            ("Linear", 8, 8),
        ],
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_its_matrices_and_fans(name):
    """Each linear map by itself, also where several are packed into one parameter."""
    module, expected = KINDS[name]
    found = weights.of(module).matrices
    assert [(m.kind, m.fan_in, m.fan_out) for m in found] == expected


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Conv2d(8, 12, 3, groups=4, bias=False), (9, 9)),
        (nn.Conv2d(8, 12, 4, stride=2, bias=False), (18, 18)),
        (nn.ConvTranspose2d(8, 12, 4, stride=2, bias=False), (9, 9)),
        (nn.ConvTranspose1d(6, 4, 6, groups=2, stride=3, bias=False), (9,)),
        (nn.ConvTranspose2d(4, 4, 2, stride=2, bias=False), (9, 9)),
    ],
    ids=str,
)
def test_fans_are_what_is_summed_and_fed(module, size):
    """Counted: with weights of one, on inputs of one, and the gradient of the sum by an input."""
    nn.init.ones_(module.weight)
    x = torch.ones(1, module.in_channels, *size, requires_grad=True)
    y = module(x)
    y.sum().backward()
    (matrix,) = weights.of(module).matrices
    inner = (slice(None), slice(None), *[slice(3, -3)] * len(size))
    stride = module.stride[0]
    # Over whole strides, so that no remainder of it counts more than the others.
    outputs = y.detach()[inner]
    whole = outputs.shape[2] // stride * stride
    for axis in range(len(size)):
        outputs = outputs.narrow(2 + axis, 0, whole)
    assert outputs.mean().item() == pytest.approx(matrix.fan_in)
    if not isinstance(module, nn.Conv2d) or stride == 1:
        assert x.grad[inner].mean().item() == pytest.approx(matrix.fan_out)
    else:
        fed = x.grad.narrow(2, 4, 2 * stride).narrow(3, 4, 2 * stride)
        assert fed.mean().item() == pytest.approx(matrix.fan_out)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_put_is_what_is_read(name):
    """Rows go where they belong, and change nothing beside them."""
    module = copy.deepcopy(KINDS[name][0])
    for matrix in weights.of(module).matrices:
        before = {n: p.detach().clone() for n, p in module.named_parameters()}
        rows = torch.randn(matrix.rows().shape)
        stored = matrix.slot.read().clone()
        matrix.put(rows, stored)
        matrix.slot.write(stored)
        assert torch.equal(matrix.rows(), rows)
        after = dict(module.named_parameters())
        differ = sum(int((after[n] != before[n]).sum()) for n in before)
        assert differ == rows.numel()


def test_units_of_a_transposed_convolution_come_first():
    """A unit's row is what it sums over, group by group."""
    module = nn.ConvTranspose1d(6, 4, 5, groups=2, bias=False)
    (matrix,) = weights.of(module).matrices
    rows = matrix.rows()
    assert rows.shape == (4, 3, 5)
    x = torch.zeros(1, 6, 1)
    x[0, 4] = 1.0  # the second input of the second group
    seen = module(x)[0].detach()
    assert torch.equal(seen[:2], torch.zeros(2, 5))
    torch.testing.assert_close(seen[2:], rows[2:, 1])


def test_an_embedding_keeps_its_padding():
    """Whatever is put there."""
    module = nn.Embedding(6, 3, padding_idx=2)
    (matrix,) = weights.of(module).matrices
    stored = matrix.slot.read().clone()
    matrix.put(torch.ones(3, 6), stored)
    assert stored[2].tolist() == [0, 0, 0]
    assert (stored.sum(), matrix.variance() > 0) == (15, True)


def test_tied_tensors_are_one_matrix():
    """By the first name, with the fans of the place that sums over more."""
    found = weights.of(GPT(words=50, size=8))
    tied = found.matrices[0]
    assert (tied.name, tied.tied, tied.kind) == ("words", ("head",), "Embedding, Linear")
    assert (tied.fan_in, tied.fan_out, tuple(tied.rows().shape)) == (8, 50, (50, 8))
    assert "head" not in [matrix.name for matrix in found.matrices]
    assert found.left["head.weight"] == "tied to words.weight"


def test_what_is_left_alone_has_a_reason():
    """Frozen, normalizations, a layer's own, numbers that are no floats."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 3))
            self.norm, self.slope, self.linear = nn.BatchNorm1d(3), nn.PReLU(), nn.Linear(3, 3)
            self.frozen = nn.Linear(3, 3).requires_grad_(requires_grad=False)
            self.waves = nn.Linear(3, 3, dtype=torch.complex64, bias=False)

    assert weights.of(Own()).left == {
        "token": "no matrix of a known kind, but Own's own",
        "norm.weight": "normalization",
        "norm.bias": "normalization",
        "slope.weight": "no matrix of a known kind, but PReLU's own",
        "frozen.weight": "frozen",
        "waves.weight": "of complex64",
    }
    assert [matrix.name for matrix in weights.of(Own()).matrices] == ["linear"]


PARAMETRIZED = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 5)),
    "weight norm, by input": lambda: parametrizations.weight_norm(nn.Linear(6, 5), dim=1),
    "weight norm, a convolution": lambda: parametrizations.weight_norm(nn.Conv2d(4, 5, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(5, 5)),
    "weight norm, recurrent": lambda: parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),
    "weight norm, old": lambda: old(nn.utils.weight_norm, nn.Linear(6, 5)),
}


def old(norm, module):
    """By the hook that torch deprecates."""
    with pytest.warns(FutureWarning, match="deprecated"):
        return norm(module)


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_a_parametrized_weight_becomes_what_is_written(name):
    """What the module computes with, through what makes it."""
    module = PARAMETRIZED[name]()
    matrix = next(m for m in weights.of(module).matrices if not m.slot.is_plain)
    stored = matrix.slot.read()
    value = torch.randn(stored.shape, generator=torch.Generator().manual_seed(0))
    if name == "orthogonal":
        value = torch.linalg.qr(value)[0]
    matrix.slot.write(value)
    torch.testing.assert_close(matrix.slot.read(), value)
    if isinstance(module, nn.Linear):
        torch.testing.assert_close(module(torch.eye(value.shape[1])) - module.bias, value.T)


@pytest.mark.parametrize("kind", ["new", "old"])
def test_spectral_norm_is_written_and_read_without_a_trace(kind):
    """The weight is what is written over its largest singular value; reading moves no estimate."""
    if kind == "new":
        module = parametrizations.spectral_norm(nn.Linear(6, 5))
    else:
        module = nn.utils.spectral_norm(nn.Linear(6, 5))
    (matrix,) = weights.of(module).matrices
    value = torch.diag(torch.tensor([4.0, 1, 1, 1, 0.5, 0]))[:5]
    matrix.slot.write(value)
    torch.testing.assert_close(matrix.slot.read(), value / 4, atol=1e-4, rtol=0)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    matrix.rows()
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("a text", "^model must be a torch.nn.Module, not str$"),
        (nn.LazyLinear(3), "^model must have its weights; LazyLinear is lazy: call it on a batch"),
        (nn.Linear(2, 2, device="meta"), "'weight' is on the meta device: call model.to_empty"),
    ],
)
def test_a_model_without_weights_is_told(model, said):
    """With what to do, in one line."""
    with pytest.raises(inf.SettingError, match=said):
        weights.of(model)


READER = Reader(nn.LSTM(4, 5, batch_first=True))
ALL = [matrix.name for matrix in weights.of(READER).matrices]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"only": "head"}, ["head"]),
        ({"only": "head.weight"}, ["head"]),
        ({"only": ["head", nn.Embedding]}, ["words", "head"]),
        ({"only": nn.LSTM}, ALL[1:-1]),
        ({"only": "recurrent.l0.forget.*"}, [n for n in ALL if ".forget." in n]),
        ({"only": "recurrent", "skip": "*.recurrent"}, [n for n in ALL if n.endswith(".input")]),
        ({"skip": "recurrent"}, ["words", "head"]),
        ({"skip": (nn.LSTM, "words")}, ["head"]),
    ],
)
def test_weights_are_chosen_by_names_patterns_and_types(given, expected):
    """Of what is in a module, too."""
    found = choosing.chosen(READER, weights.of(READER), **{"only": None, "skip": None} | given)
    assert [matrix.name for matrix in found.matrices] == expected
    assert {name for name, reason in found.left.items() if reason == "not chosen"} == {*ALL} - {
        *expected
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"only": "haed"}, r"only must name what Reader has; 'haed' .* \(did you mean 'head'\?\)"),
        ({"skip": nn.Conv2d}, "skip must name what Reader has; 'Conv2d' is nothing in it"),
        ({"skip": 5}, "skip must be names, patterns or types of modules, not int"),
        ({"only": int}, "only must be names, patterns or types of modules, not type"),
        ({"skip": "*"}, "model must hold a weight to fill; Reader has none that only and skip"),
    ],
)
def test_what_names_nothing_is_told(given, said):
    """In one line that has it."""
    with pytest.raises(inf.SettingError, match=said):
        choosing.chosen(READER, weights.of(READER), **{"only": None, "skip": None} | given)

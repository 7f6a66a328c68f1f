"""Branches that are added, by data flow alone, and how they start."""

import math

import pytest
import torch
import torchvision
from torch import nn

import initflow as inf
from initflow.models import batches, following, graph, residual, weights
from tests.models.small import GPT, transformer


def seen(model, batch=None):
    """The model's graph and what it multiplies by."""
    if batch is None:
        traced = graph.of_structure(model)
    else:
        traced = graph.of_batch(model, batches.given(model, batch))
    return traced, following.weighing(traced, weights.of(model).matrices)


def branches(model, batch=None):
    return residual.find(model, *seen(model, batch))


def test_a_resnets_branches_end_in_a_normalization():
    """Eight, also where the trunk is a projection; with and without a batch."""
    model = torchvision.models.resnet18(num_classes=3)
    for batch in (None, torch.randn(2, 3, 32, 32)):
        found = branches(model, batch)
        assert [b.last[0].name for b in found] == [
            f"layer{stage}.{block}.conv2" for stage in (1, 2, 3, 4) for block in (0, 1)
        ]
        assert [b.others[0].name for b in found] == [
            f"layer{stage}.{block}.conv1" for stage in (1, 2, 3, 4) for block in (0, 1)
        ]
        assert {b.layers for b in found} == {2}
        assert found[0].norms == ["layer1.0.bn2.weight"]


def test_a_transformers_branches_are_attention_and_network():
    """Two a layer, of torch's own layers as of those written out."""
    found = branches(transformer(2), torch.randn(2, 5, 32))
    assert [m.name for b in found for m in b.last] == [
        f"0.layers.{layer}.{last}" for layer in (0, 1) for last in ("self_attn.out_proj", "linear2")
    ]
    assert [m.name.rpartition(".")[2] for m in found[0].others] == ["query", "key", "value"]
    found = branches(GPT(layers=2), torch.zeros(2, 5, dtype=torch.int64))
    assert [m.name for b in found for m in b.last] == [
        f"blocks.{block}.{last}" for block in (0, 1) for last in ("output", "narrow")
    ]


class Sums(nn.Module):
    """Sums of all kinds, which ``which`` chooses."""

    def __init__(self, which):
        super().__init__()
        self.which = which
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in "abc")
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return getattr(self, self.which)(x)

    def parallel(self, x):
        return self.a(x) + self.b(x)

    def deeper(self, x):
        return self.a(x) + self.c(torch.relu(self.b(x)))

    def of_activations(self, x):
        y = self.a(x)
        return torch.relu(y) + torch.tanh(y)

    def gated(self, x):
        return x + self.gate * self.b(torch.relu(self.a(x)))

    def both(self, x):
        return x + (self.a(x) + self.b(x))

    def nested(self, x):
        y = self.a(x)
        return x + (y + self.b(torch.relu(y)))

    def in_place(self, x):
        y = self.a(x)
        y += x
        return self.b(y)


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("parallel", []),
        ("deeper", [(["c"], ["b"], 2)]),
        ("of_activations", []),
        ("gated", [(["b"], ["a"], 2)]),
        ("both", [(["a", "b"], [], 1)]),
        ("nested", [(["b"], [], 1), (["a", "b"], [], 2)]),
        ("in_place", [(["a"], [], 1)]),
    ],
)
def test_an_addition_is_residual_where_one_side_has_fewer_matrices(which, expected):
    """And the branch is the other."""
    found = branches(Sums(which), torch.randn(2, 4))
    ours = [(sorted(m.name for m in b.last), [m.name for m in b.others], b.layers) for b in found]
    assert ours == expected


def test_a_gate_starts_at_0_in_place_of_its_matrix():
    """As ReZero's does; scaling leaves it alone."""
    model = Sums("gated")
    report = inf.initialize(model, "he", residual="rezero")
    assert (model.gate.item(), model.b.weight.std() > 0) == (0, True)
    assert dict(report.values) == {"gate": 0}
    nn.init.ones_(model.gate)
    inf.initialize(model, "he", residual="scaled")
    assert model.gate.item() == 1


def scale(model, plain, name):
    """By what a matrix is multiplied, beside the same model without."""
    mine, other = (dict(m.named_parameters())[name] for m in (model, plain))
    return (mine / other).mean().item()


def test_branches_are_scaled_as_gpt2s():
    """The last matrix of each by 1/√(2·layers), all others as they would be."""
    model, plain = GPT(layers=3), GPT(layers=3)
    words = torch.zeros(1, 4, dtype=torch.int64)
    report = inf.initialize(model, "normal:std=0.02", residual="scaled", batch=words)
    inf.initialize(plain, "normal:std=0.02", batch=words)
    assert report.additions == 6
    for name in ("output", "narrow"):
        found = scale(model, plain, f"blocks.1.{name}.weight")
        assert found == pytest.approx(1 / math.sqrt(6), rel=1e-5)
    for name in ("projections", "wide"):
        assert scale(model, plain, f"blocks.1.{name}.weight") == 1
    assert {row.name: row.scale for row in report.filled}["blocks.2.narrow"] == pytest.approx(
        6**-0.5
    )


def test_fixup_is_what_its_paper_says():
    """Last matrices and head 0, the others times L^(−1/(2m−2)); no embedding is lost with it."""
    model, plain = GPT(layers=2, tied=False), GPT(layers=2, tied=False)
    words = torch.zeros(1, 4, dtype=torch.int64)
    inf.initialize(model, "he", residual="fixup", batch=words)
    inf.initialize(plain, "he", batch=words)
    for name in ("blocks.0.output", "blocks.1.narrow", "head"):
        assert not model.get_parameter(f"{name}.weight").any()
    for name in ("blocks.0.projections", "blocks.1.wide"):
        assert scale(model, plain, f"{name}.weight") == pytest.approx(4 ** (-1 / 2), rel=1e-5)
    tied = GPT(layers=2)
    inf.initialize(tied, "he", residual="fixup", batch=words)
    assert tied.words.weight.all()


def test_the_normalization_that_would_undo_it_carries_the_scale():
    """In a ResNet; its convolutions are drawn as they would be, and a skipped branch is left."""
    model = torchvision.models.resnet18(num_classes=3)
    report = inf.initialize(model, "he", residual="scaled", skip="layer1.0")
    assert model.layer1[0].bn2.weight.unique().tolist() == [1]
    assert model.layer1[1].bn2.weight.unique().tolist() == pytest.approx([8**-0.5])
    assert model.layer1[1].bn1.weight.unique().tolist() == [1]
    assert len(report.values) == 7
    assert "layer1.1.bn2.weight" not in report.left


@pytest.mark.parametrize("which", ["parallel", "of_activations"])
def test_a_model_without_branches_is_told(which):
    """And left as it was."""
    model = Sums(which)
    before = model.a.weight.detach().clone()
    with pytest.raises(inf.SettingError, match=r"^residual='scaled' needs branches that are added"):
        inf.initialize(model, "he", residual="scaled")
    assert torch.equal(model.a.weight, before)


# The loss before training.


def excess(model, inputs, classes):
    """The loss before training over ln(classes), less 1, for targets by chance."""
    with torch.no_grad():
        logits = model(inputs).reshape(-1, classes)
    targets = torch.arange(len(logits)) % classes
    return nn.functional.cross_entropy(logits, targets).item() / math.log(classes) - 1


WORDS = torch.randint(0, 100, (16, 16), generator=torch.Generator().manual_seed(0))
SEQUENCES = torch.randn(16, 10, 32, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["scaled", "zero", "fixup"])
@pytest.mark.parametrize(
    ("build", "inputs", "classes"),
    [
        (GPT, WORDS, 100),
        (lambda: GPT(tied=False), WORDS, 100),
        (transformer, SEQUENCES, 10),
    ],
    ids=["GPT, tied", "GPT", "transformer"],
)
def test_the_loss_starts_at_the_logarithm_of_the_classes(build, inputs, classes, kind):
    """Of transformers, with GPT-2's weights: a head of std 0.02 sees normalized values."""
    model = build()
    inf.initialize(model, "normal:std=0.02", batch=inputs, residual=kind, bias="zeros")
    assert abs(excess(model, inputs, classes)) < 0.02


@pytest.mark.parametrize("kind", ["scaled", "zero", "fixup"])
def test_so_does_a_resnets_with_a_small_head(kind):
    """Under auto; what is left without it is the head's own variance, but for fixup's, of 0."""
    model = torchvision.models.resnet18(num_classes=10)
    inf.initialize(model, "auto", residual=kind, bias="zeros")
    assert abs(excess(model, IMAGES, 10)) < 0.1
    if kind == "fixup":
        assert excess(model, IMAGES, 10) == pytest.approx(0, abs=1e-6)
    inf.initialize(model, "normal:std=0.01", only="fc")
    assert abs(excess(model, IMAGES, 10)) < 0.03


def test_a_head_that_is_not_small_moves_the_loss():
    """Logits of variance 1 cost about a half, whatever the branches do."""
    model = GPT(tied=False)
    inf.initialize(model, "lecun", batch=WORDS, residual="scaled", bias="zeros")
    assert excess(model, WORDS, 100) * math.log(100) == pytest.approx(0.5, abs=0.15)

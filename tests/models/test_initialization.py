"""Any model's weights under any scheme: variances, bits, contract, and nothing left half done."""

import copy
import math
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import initflow as inf
from initflow.initializers.plugins import find
from tests.conftest import ROOT
from tests.models.small import GPT, Conv1D, Reader, transformer

PLUGINS = ROOT / "plugins"
SCHEMES = ["he", "xavier", "lecun_uniform", "pytorch", "truncated_normal:std=0.02", "template"]
LARGE = {
    "Linear": nn.Linear(300, 400),
    "grouped": nn.Conv2d(32, 64, 5, groups=4),
    "transposed": nn.ConvTranspose2d(32, 64, 4, stride=2),
    "Embedding": nn.Embedding(1000, 50, padding_idx=3),
    "Bilinear": nn.Bilinear(20, 30, 40),
    "LSTM": nn.LSTM(100, 120, proj_size=70),
    "GRU": nn.GRU(100, 120),
    "attention": nn.MultiheadAttention(128, 4, kdim=70, vdim=90),
    "Hugging Face's": Conv1D(300, 200),
}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in before)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", LARGE)
def test_every_kind_has_the_variance_that_is_stated(kind, scheme):
    """Each matrix, by its own fans, to within five standard errors."""
    model = copy.deepcopy(LARGE[kind])
    report = inf.initialize(model, find(scheme, PLUGINS))
    for row in report.filled:
        if scheme == "he":
            assert row.stated == pytest.approx(2 / row.fan_in)
        assert row.variance == pytest.approx(row.stated, rel=5 * math.sqrt(2 / 4_000)), row.name
    if kind == "Embedding":
        assert not model.weight[3].any()
        assert model.weight[4].all()


def test_auto_takes_what_was_made_for_the_activation():
    """And the exact gain for all others, also one of its own; 1/fan_in where none follows."""
    model = nn.Sequential(
        *(nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 50), nn.Tanh()),
        *(nn.Linear(50, 50), nn.GELU(), nn.Linear(50, 50), nn.LeakyReLU(0.3)),
        *(nn.Linear(50, 50), nn.SELU(), nn.Linear(50, 50), nn.Softplus(), nn.Linear(50, 50)),
    )
    report = inf.initialize(model, "auto")
    told = [(row.activation, row.scheme, row.stated) for row in report.filled]
    gain = inf.theory.gain
    assert told == [
        ("relu", "he", pytest.approx(2 / 50)),
        ("tanh", "xavier", pytest.approx(2 / 100)),
        ("gelu", "gain", pytest.approx(gain("gelu") ** 2 / 50)),
        ("leaky_relu(0.3)", "gain", pytest.approx(2 / (1 + 0.09) / 50)),
        ("selu", "lecun", pytest.approx(1 / 50)),
        ("softplus", "gain", pytest.approx(gain("softplus") ** 2 / 50)),
        ("linear", "lecun", pytest.approx(1 / 50)),
    ]


@pytest.mark.parametrize("scheme", ["he", "auto", "orthogonal", "critical"])
def test_the_seed_alone_decides(scheme):
    """Whatever the process drew before, and whatever it draws afterwards is as it would be."""
    found = []
    for other in (0, 1):
        model = transformer(2)
        torch.manual_seed(other)
        before = torch.get_rng_state()
        given = scheme if scheme == "auto" else find(scheme, PLUGINS)
        inf.initialize(model, given, batch=torch.ones(2, 3, 32), seed=7, bias="zeros")
        assert torch.equal(torch.get_rng_state(), before)
        found.append(state(model))
    assert same(model, found[0])
    inf.initialize(model, given, batch=torch.ones(2, 3, 32), seed=8, bias="zeros")
    assert not same(model, found[0])


def test_skipping_one_changes_no_other():
    """Each matrix is drawn from a stream of its own; what is skipped stays."""
    model, partly = (Reader(nn.LSTM(4, 5, batch_first=True)) for _ in range(2))
    before = state(partly)
    inf.initialize(model, "he")
    inf.initialize(partly, "he", skip=["words", "recurrent.l0.forget.*"])
    assert torch.equal(partly.words.weight, before["words.weight"])
    assert torch.equal(partly.head.weight, model.head.weight)
    weight, whole = partly.recurrent.weight_ih_l0, model.recurrent.weight_ih_l0
    assert torch.equal(weight[5:10], before["recurrent.weight_ih_l0"][5:10])
    assert torch.equal(weight[10:], whole[10:])
    assert torch.equal(weight[:5], whole[:5])


def test_a_wrapped_model_gets_the_weights_of_the_plain_one(monkeypatch):
    """DataParallel's names say nothing of them; it is one without devices."""
    module = sys.modules["torch.nn.parallel.data_parallel"]  # by name it is the function
    monkeypatch.setattr(module, "_get_available_device_type", lambda: None)
    plain, wrapped = nn.Sequential(nn.Linear(4, 3)), nn.DataParallel(nn.Sequential(nn.Linear(4, 3)))
    inf.initialize(plain, "he")
    inf.initialize(wrapped, "he", batch=torch.ones(2, 4))
    assert torch.equal(plain[0].weight, wrapped.module[0].weight)


def test_half_precision_is_the_rounded_single_one():
    """Also where a scheme computes what there is no half for."""
    whole, half = nn.Linear(20, 30), nn.Linear(20, 30).to(torch.bfloat16)
    for model in (whole, half):
        inf.initialize(model, "orthogonal")
    assert torch.equal(half.weight, whole.weight.to(torch.bfloat16))


def test_forget_gates_start_open():
    """The sum of both biases is what is asked for, in every layer and direction; others stay."""
    model = nn.LSTM(3, 4, 2, bidirectional=True)
    before = state(model)
    inf.initialize(model, "auto", forget_bias=1.0)
    for end in ("l0", "l0_reverse", "l1", "l1_reverse"):
        total = getattr(model, f"bias_ih_{end}") + getattr(model, f"bias_hh_{end}")
        assert total[4:8].tolist() == [1] * 4
        other = before[f"bias_ih_{end}"]
        assert torch.equal(getattr(model, f"bias_ih_{end}")[:4], other[:4])
    inf.initialize(model, "auto", forget_bias=2.0, bias="zeros")
    assert model.bias_ih_l0.tolist() == [0] * 4 + [2] * 4 + [0] * 8


def test_biases_stay_unless_they_are_set():
    """By the scheme, or by ``bias``; an attention's by projection."""
    model = nn.MultiheadAttention(8, 2)
    nn.init.ones_(model.in_proj_bias)
    inf.initialize(model, "he")
    assert model.in_proj_bias.tolist() == [1] * 24
    inf.initialize(model, "he", bias="zeros", skip="*.key")
    assert model.in_proj_bias.tolist() == [0] * 8 + [1] * 8 + [0] * 8
    model = nn.Sequential(nn.Linear(4, 500), nn.Tanh())
    report = inf.initialize(model, find("critical", PLUGINS), bias="zeros")
    assert model[0].bias.var() > 0.001
    assert "Biases: set by the scheme." in report.conclusions


def marked(fill):
    return inf.initializer(fill)


@marked
def stubborn(weight, generator):
    """It fills the first only."""
    if len(weight) > 5:
        weight.normal_(generator=generator)


@marked
def globally(weight):
    """It draws from torch's own random state."""
    weight.normal_()


@marked
def biased(weight, bias):
    """It sets biases."""
    weight.fill_(1.0)
    bias.fill_(1.0)


@marked
def refusing(weight, fan_in):
    """It takes no small layers."""
    if fan_in < 6:
        raise ValueError("too small a layer")
    weight.zero_()


@marked
def meddling(network, images):
    """It changes what it is not to fill."""
    for parameter in network.parameters():
        parameter.fill_(0.5)


@marked
def numbered(weight, layer):
    """It goes by the layers' numbers."""
    weight.fill_(layer)


MODEL = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5, bias=False))
MODEL.append(nn.Linear(5, 4))
BAD = [
    (stubborn, {}, "PluginError", "scheme 'stubborn' of a function at 3 breaks the rule 'finite'"),
    (globally, {}, "PluginError", "at 0 breaks the rule 'global state'"),
    (biased, {}, "SettingError", "'biased' sets biases, and '3' .Linear. has none"),
    (refusing, {}, "SettingError", "'refusing': too small a layer .at '4', Linear.$"),
    (meddling, {"batch": torch.ones(2, 7)}, "PluginError", "changes '1.weight', which it is not"),
    (meddling, {}, "SettingError", "'meddling' sees the model on a batch: give one"),
    ("hee", {}, "SettingError", "^scheme must be one of .*not 'hee'"),
    ("he:mood=fan_in", {}, "SettingError", "^argument of scheme 'he' must be one of"),
    (5, {}, "SettingError", "^scheme must be a scheme's name, .*not int$"),
    (lambda x: x, {}, "SettingError", "^an initializer asks for 'weight'"),
    ("he", {"batch": torch.ones(2, 6)}, "SettingError", r"^model takes no batch of shape \(2, 6\)"),
    ("he", {"batch": torch.ones(2, 7, device="meta")}, "SettingError", "^model takes no batch"),
    ("he", {"batch": 5}, "SettingError", "^batch must be a tensor, "),
    ("he", {"seed": -1}, "SettingError", "^seed must be a whole number"),
    ("he", {"seed": "x"}, "SettingError", "^seed must be a whole number"),
    ("he", {"residual": "scale"}, "SettingError", "^residual must be one of scaled, zero"),
    ("he", {"bias": "one"}, "SettingError", "^bias must be one of keep, zeros, not 'one'"),
    ("he", {"forget_bias": 1.0}, "SettingError", "^forget_bias needs an LSTM"),
    ("he", {"forget_bias": math.nan}, "SettingError", "^forget_bias must be a finite number"),
    ("he", {"only": "9"}, "SettingError", "^only must name what Sequential has"),
]


@pytest.mark.parametrize(("scheme", "given", "kind", "said"), BAD)
def test_what_fails_leaves_the_model_as_it_was(scheme, given, kind, said):
    """In one line, of the right kind."""
    model = copy.deepcopy(MODEL)
    before = state(model)
    with pytest.raises(getattr(inf, kind), match=said) as caught:
        inf.initialize(model, scheme, **given)
    assert "\n" not in str(caught.value)
    assert same(model, before)


def test_layers_are_numbered_where_they_are_a_chain():
    """In the order of the calls; a model that branches has no numbers."""
    model = copy.deepcopy(MODEL)
    inf.initialize(model, numbered)
    assert [model[at].weight.unique().item() for at in (0, 3, 4)] == [0, 1, 2]
    with pytest.raises(inf.SettingError, match="which only a chain of layers has: 'words' leads"):
        inf.initialize(GPT(), numbered, batch=torch.zeros(1, 3, dtype=torch.int64))


def test_what_cannot_be_traced_needs_a_batch():
    """Where something goes by the graph, and not otherwise."""
    model = transformer(1)
    for given in ({"scheme": "auto"}, {"scheme": "he", "residual": "scaled"}):
        with pytest.raises(inf.SettingError, match="model cannot be traced without a batch, give"):
            inf.initialize(model, **given)
    report = inf.initialize(model, "he")
    assert {row.activation for row in report.filled if row.kind == "Linear"} == {None}
    assert "cannot be traced" in " ".join(report.problems())


def test_a_parametrization_that_refuses_leaves_all_as_it_was():
    """Also what was written before it; zeros have no direction."""
    model = nn.Sequential(nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)))
    before = state(model)
    with pytest.raises(inf.SettingError, match=r"'1.weight' cannot be filled through its param"):
        inf.initialize(model, "zero")
    assert same(model, before)
    with pytest.raises(inf.SettingError, match=r"cannot fill '1' .* is parametrized: skip it"):
        inf.initialize(model, find("lsuv", PLUGINS), batch=torch.ones(2, 4))
    report = inf.initialize(model, "he")
    assert [row.through for row in report.filled] == ["", "a parametrization"]


# The shipped plugins.


def variances(model, batch, kinds):
    """Of what every layer of these kinds gives, in evaluation mode."""
    found = {}

    def note(name):
        def hook(_module, _args, output):
            found.setdefault(name, output.var(correction=0).item())

        return hook

    hooks = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    with torch.no_grad():
        model.eval()(batch)
    for hook in hooks:
        hook.remove()
    return found


def test_lsuv_gives_any_model_unit_variance_layer_by_layer():
    """Convolutions, also transposed ones, with biases and without; on two runs the same."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2)),
        *(nn.ConvTranspose2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(486, 5), nn.Dropout()),
    )
    images = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    lsuv = find("lsuv:tolerance=0.001", PLUGINS)
    inf.initialize(model, lsuv, batch=images)
    found = variances(model, images, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    assert found == {name: pytest.approx(1, abs=0.001) for name in ("0", "4", "7")}
    before = state(model)
    inf.initialize(model, lsuv, batch=(images, torch.zeros(20)))
    assert same(model, before)


def test_lsuv_fills_a_transformer_but_for_its_attention():
    """What it cannot fill is told in one line; an embedding is a layer to it."""
    model, batch = transformer(1), torch.randn(8, 4, 32)
    lsuv = find("lsuv", PLUGINS)
    with pytest.raises(inf.SettingError, match=r"cannot fill '0.layers.0.self_attn' .*: skip it$"):
        inf.initialize(model, lsuv, batch=batch)
    inf.initialize(model, lsuv, batch=batch, skip=nn.MultiheadAttention)
    words = torch.arange(12).view(3, 4)
    reader = GPT(layers=1)
    inf.initialize(reader, lsuv, batch=words)
    assert variances(reader, words, nn.Embedding)["places"] == pytest.approx(1, abs=0.1)


REFUSED = [
    ("critical", nn.LSTM(4, 5), "sigmoid has no critical point .*LSTM input, input"),
    ("looks-linear", Reader(nn.LSTM(4, 5)), "sigmoid cannot look linear"),
    ("looks-linear", GPT(), "goes by the layers' numbers"),
    ("lsuv", nn.LSTM(4, 5), r"cannot fill '' \(LSTM\)"),
]


@pytest.mark.parametrize(("name", "model", "said"), REFUSED)
def test_a_plugin_says_where_its_idea_does_not_hold(name, model, said):
    """In one line."""
    words = isinstance(model, (GPT, Reader))
    batch = torch.zeros(2, 3, dtype=torch.int64) if words else torch.ones(2, 3, 4)
    with pytest.raises(inf.SettingError, match=said):
        inf.initialize(model, find(name, PLUGINS), batch=batch)


@pytest.mark.parametrize("name", ["critical", "orthogonal", "template", "looks-linear"])
def test_the_other_plugins_fill_a_convolutional_chain(name):
    """Each layer, by its own activation function."""
    model = nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(4 * 4 * 4, 3)),
    )
    report = inf.initialize(model, find(name, PLUGINS), batch=torch.randn(2, 2, 8, 8))
    assert [row.activation for row in report.filled] == ["relu", "relu", "linear"]
    if name == "orthogonal":
        weight = model[5].weight.detach()
        torch.testing.assert_close(weight @ weight.T, torch.eye(3))

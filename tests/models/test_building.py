"""Models that a user's function builds, and the loss that they get without one."""

import textwrap

import pytest
import torch
from torch import nn
from torch.nn import functional

from initflow.core.configurations import DiagnoseConfig
from initflow.errors import SettingError
from initflow.models import building
from initflow.models.building import usual_loss

EXAMPLE = ((1, 8, 8), 3)


def builder(model, **settings):
    return building.builder(DiagnoseConfig(model=model, **settings), "tanh", (5,))


def build(model, seed):
    return builder(model).build(seed, *EXAMPLE)


def place(folder, text, name="build"):
    imports = "import torch\nfrom torch import nn\n"
    (folder / "mine.py").write_text(imports + textwrap.dedent(text))
    return f"{folder}/mine.py:{name}"


def test_a_module_alone_or_with_a_batch_and_a_loss(tmp_path):
    """The function is called from the seed, and torch's random state is left alone."""
    text = """
        def build():
            return nn.Linear(2, 3)

        def whole():
            return nn.Linear(2, 3), (torch.randn(4, 2), torch.ones(4)), loss

        def loss(outputs, targets):
            return outputs.sum()
    """
    state = torch.get_rng_state()
    alone = build(place(tmp_path, text), 1)
    whole = build(place(tmp_path, text, "whole"), 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (alone.batch, alone.loss) == (None, usual_loss)
    assert torch.equal(alone.model.weight, whole.model.weight)
    assert whole.batch[0].shape == (4, 2)
    assert whole.loss.__name__ == "loss"
    assert builder(place(tmp_path, text)).provider.startswith(f"{tmp_path}/mine.py sha256:")
    assert not torch.equal(alone.model.weight, build(place(tmp_path, text), 2).model.weight)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "has no attribute 'build'"),
        ("build = 3", "must name a function, not int"),
        ("def build(): raise ValueError('no')", "failed: ValueError: no"),
        ("def build(): return 3", "must give a module, (module, batch) or (module, batch, loss)"),
        ("def build(): return nn.Linear(1, 1), 1, 2", "or (module, batch, loss), not tuple of 3"),
        ("def build(): return (1, 2, 3, 4)", "not tuple of 4"),
        ("def build(n): return nn.Linear(1, 1)", "or from nothing, not from (n)"),
        ("def build(a, b, c): return nn.Linear(1, 1)", "or from nothing, not from (a, b, c)"),
        ("def build(): return nn.LazyLinear(3)", "is lazy: call it on a batch first"),
        ("raise RuntimeError('at import')", "RuntimeError: at import"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_builds_no_model_is_one_line(tmp_path, text, said):
    """It names the place, and what would be right."""
    with pytest.raises(SettingError) as caught:
        build(place(tmp_path, text), 0)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_function_is_given_what_it_asks_for(tmp_path):
    """The shape of an image and the number of classes, or nothing; and it is told what it draws."""
    text = """
        import random

        def build(shape, classes, width=4):
            layer = nn.Linear(shape[1] * shape[2], classes + width)
            layer.bias.data.fill_(random.random())
            return layer

        def fixed():
            return torch.nn.utils.skip_init(nn.Linear, 2, 2)
    """
    found = build(place(tmp_path, text), 3)
    assert found.model.weight.shape == (7, 64)
    assert found.drawn == ["the state of Python's random", "torch's random state"]
    assert torch.equal(found.model.bias, build(place(tmp_path, text), 3).model.bias)
    assert build(place(tmp_path, text, "fixed"), 3).drawn == []


def test_a_model_of_a_plugin(tmp_path):
    """By the name of its entry point, from a folder or installed; a typo is told the names."""
    home = tmp_path / "plugins" / "two"
    home.mkdir(parents=True)
    (home / "twolayers.py").write_text(
        "from torch import nn\n"
        "def build(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    (home / "pyproject.toml").write_text(
        '[project]\nname = "two"\nversion = "1.2"\n'
        '[project.entry-points."initflow.models"]\ntwo = "twolayers:build"\n'
        'cnn = "twolayers:build"\nodd = "twolayers:no"\nvalue = "twolayers:__name__"\n'
    )
    options = {"plugins_dir": tmp_path / "plugins"}
    found = builder("two", **options)
    assert found.provider == "two 1.2"
    assert found.build(0, *EXAMPLE).model[1].out_features == 3
    assert builder("cnn", **options).is_built_in
    for name, said in {
        "twoo": "model must be one of mlp, cnn, rnn, lstm, gru",
        "odd": "model 'odd' of two 1.2",
        "value": "must name a function, not str",
    }.items():
        with pytest.raises(SettingError, match=said):
            builder(name, **options)


def test_a_file_that_is_not_there_is_named():
    """And a module that is not."""
    with pytest.raises(SettingError, match=r"model 'no\.py:build': .*there is no file 'no\.py'"):
        build("no.py:build", 0)
    with pytest.raises(SettingError, match="No module named"):
        build("no_such_module:build", 0)


LOGITS, SEQUENCE = torch.randn(4, 3), torch.randn(4, 5, 3)
LABELS, TOKENS = torch.tensor([0, 1, 2, 0]), torch.arange(20).view(4, 5) % 3


@pytest.mark.parametrize(
    ("outputs", "targets", "expected"),
    [
        (LOGITS, (LABELS,), functional.cross_entropy(LOGITS, LABELS)),
        ((LOGITS, "more"), (LABELS.int(),), functional.cross_entropy(LOGITS, LABELS)),
        ({"logits": LOGITS}, (LABELS,), functional.cross_entropy(LOGITS, LABELS)),
        (SEQUENCE, (TOKENS,), functional.cross_entropy(SEQUENCE.view(20, 3), TOKENS.view(20))),
        (SEQUENCE.mT, (TOKENS,), functional.cross_entropy(SEQUENCE.view(20, 3), TOKENS.view(20))),
        (LOGITS, (torch.zeros(4, 3),), LOGITS.square().mean()),
        (LOGITS, (), LOGITS.square().mean() / 2),
        ({"loss": LOGITS.sum(), "logits": LOGITS}, (LABELS,), LOGITS.sum()),
    ],
)
def test_the_usual_loss(outputs, targets, expected):
    """By the shapes of outputs and targets."""
    assert usual_loss(outputs, *targets).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("outputs", [LOGITS, 1, [1, 2]])
def test_outputs_without_a_usual_loss(outputs):
    """It says that a loss is to be given."""
    with pytest.raises(ValueError, match="have no usual loss"):
        usual_loss(outputs, torch.zeros(7))


def test_a_model_of_a_package(monkeypatch):
    """By its module's name."""
    monkeypatch.setattr("torch.nn.build_it", lambda: nn.Linear(1, 1), raising=False)
    assert isinstance(build("torch.nn:build_it", 0).model, nn.Linear)

"""Models that a user's function builds, and the loss that they get without one."""

import textwrap

import pytest
import torch
from torch import nn
from torch.nn import functional

from initflow.errors import SettingError
from initflow.models.building import build, usual_loss


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
    assert alone.provider.startswith(f"{tmp_path}/mine.py sha256:")
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
        ("def build(n): return nn.Linear(1, 1)", "missing 1 required positional argument: 'n'"),
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

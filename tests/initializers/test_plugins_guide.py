"""docs/plugins.md is true: its commands, its code, its metadata and its tables."""

import inspect
import re
import shlex
import sys
import textwrap

import pytest
import torch

import initflow
from initflow.cli import process
from initflow.core.importing import LIMIT_S
from initflow.initializers import scheme, signature
from initflow.initializers.contract import RULES
from initflow.initializers.finder import found
from initflow.initializers.plugins import find
from initflow.testing import MORE_RULES, assert_initializer_contract
from tests.conftest import ROOT

GUIDE = (ROOT / "docs" / "plugins.md").read_text()
BLOCKS = {
    kind: [
        textwrap.dedent(block) for block in re.findall(rf"```{kind}\n(.*?)```", GUIDE, re.DOTALL)
    ]
    for kind in ("console", "python", "toml")
}


@pytest.fixture
def clean(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def namespace(code):
    names = {"torch": torch, "initflow": initflow}
    exec(code, names)  # noqa: S102 - it is the guide's own
    return names


def test_the_first_commands_lead_from_nothing_to_a_trained_network(clean, store, capsys):
    """As they stand, in an empty folder."""
    commands = re.findall(r"^\$ initflow (.*)$", BLOCKS["console"][0], re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        assert process.main(shlex.split(command)) == 0, command
    out = capsys.readouterr().out
    assert "Written: plugins/initflow-mine" in out
    assert "'mine' keeps its contract." in out
    assert re.search(r" mine +relu +stable ", out)


def test_functions_are_named_by_their_place(clean, store, monkeypatch):
    """The second commands, with the guide's own function."""
    monkeypatch.syspath_prepend(str(clean))
    for place in ("path/to/file.py", "package/module.py"):
        (clean / place).parent.mkdir(parents=True)
        (clean / place).write_text(BLOCKS["python"][0])
    commands = re.findall(r"^\$ initflow (.*)$", BLOCKS["console"][1], re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert process.main([*shlex.split(command), "--epochs", "1", "--log-model", "false"]) == 0


def test_the_functions_keep_the_contract():
    """Of a layer and of the network."""
    assert_initializer_contract(namespace(BLOCKS["python"][0])["mine"])
    assert_initializer_contract(namespace(BLOCKS["python"][1])["unit_variance"])


def test_the_notebook_example(clean, store, monkeypatch):
    """The function in one cell, the training in another."""
    names = {"__name__": "__main__"}
    exec(BLOCKS["python"][0], names)  # noqa: S102 - it is the guide's own
    monkeypatch.setattr(sys.modules["__main__"], "mine", names["mine"], raising=False)
    result = namespace(BLOCKS["python"][2])["result"]
    assert (result.scheme.spec, result.scheme.provider) == ("mine:gain=1.5", "__main__")


def test_it_is_the_same_to_all_commands(clean, store, capsys):
    """The third commands; the one by mlflow run, from its own entry point's."""
    home = clean / "plugins" / "initflow-mine"
    (home / "src").mkdir(parents=True)
    (home / "pyproject.toml").write_text(BLOCKS["toml"][0])
    (home / "src" / "initflow_mine.py").write_text(BLOCKS["python"][0])
    *commands, launched = re.findall(r"^\$ (.*)$", BLOCKS["console"][2], re.MULTILINE)
    parameters = dict(re.findall(r"-P (\w+)=(\S+)", launched))
    options = [text for key, value in parameters.items() for text in (f"--{key}", value)]
    for command in [*commands, shlex.join(["initflow", "diagnose", *options])]:
        assert process.main(shlex.split(command)[1:]) == 0, command
    assert "mine:gain=1.5" in capsys.readouterr().out


def test_the_folder_written_by_hand(clean, monkeypatch):
    """Its metadata, its function, its test."""
    home = clean / "plugins" / "initflow-mine"
    (home / "src").mkdir(parents=True)
    (home / "pyproject.toml").write_text(BLOCKS["toml"][0])
    (home / "src" / "initflow_mine.py").write_text(BLOCKS["python"][0])
    assert find("mine:gain=1.5").provider == "initflow-mine 0.1.0"
    assert found()["mine"].folder.name == "initflow-mine"
    namespace(BLOCKS["python"][3])["test_the_contract"]()


@pytest.mark.parametrize(
    "names", [signature.OF_A_LAYER, signature.OF_THE_NETWORK], ids=["layer", "net"]
)
def test_everything_that_can_be_asked_for_is_in_the_tables(names):
    """By name, and nothing that cannot."""
    rows = re.findall(r"^\| (`.*?) \| ", GUIDE, re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(names) <= told


def test_the_rules_are_the_contracts():
    """Names and meanings, in order; the time limit too."""
    rows = dict(re.findall(r"^\| `([\w ]+)` \| (.*) \|$", GUIDE, re.MULTILINE))
    rules = {name: text for name, text in rows.items() if name in RULES | MORE_RULES}
    assert rules == RULES | MORE_RULES
    assert f"within {LIMIT_S:.0f} s" in GUIDE
    assert "initflow.initializer" in inspect.getsource(scheme)

"""What Tab completes in a shell."""

import os
import shutil
import subprocess
import sys

import pytest

from initflow.cli import completion, process
from initflow.cli.commands import cli
from initflow.core.configurations import ACTIVATION_NAMES, DATASET_NAMES, SCHEME_NAMES
from tests.conftest import ROOT
from tests.initializers.test_finder import project


@pytest.fixture
def completed(tmp_path, monkeypatch, capsys):
    """The values, and kinds of paths, that a shell is told for the last word of a line."""
    monkeypatch.chdir(tmp_path)
    project(tmp_path / "plugins", "mine", {"mine": "mine:fill"})
    project(tmp_path / "other", "yours", {"yours": "yours:fill"})

    def told(line):
        words = line.split(" ")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        assert completion.answer(cli, "bash_complete") == 0
        return capsys.readouterr().out.replace("plain,", "").split()

    return told


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("initflow tra", ["train", "trainability"]),
        ("initflow plugins c", ["check"]),
        ("initflow train --nest", ["--nesterov"]),
        ("initflow train --activation ", ACTIVATION_NAMES),
        ("initflow train --dataset ", DATASET_NAMES),
        ("initflow train --dataset own", ["file,own"]),
        ("initflow train --nesterov ", ["true", "false"]),
        ("initflow train --init xav", ["xavier", "xavier_uniform"]),
        ("initflow train --init mi", ["mine"]),
        ("initflow train --plugins-dir other --init y", ["yours"]),
        ("initflow train --plugins-dir none/here --init zer", ["zero"]),
        ("initflow train --model l", ["lstm"]),
        ("initflow train --lr ", []),
        ("initflow train --data-dir d", ["dir,d"]),
        ("initflow tune --storage s", ["file,s"]),
        ("initflow compare --inits he,xav", ["he,xavier", "he,xavier_uniform"]),
        ("initflow compare --inits he,he", ["he,he_uniform"]),
        ("initflow compare --activations relu,t", ["relu,tanh"]),
        ("initflow diagnose --fail-on n", ["none"]),
        ("initflow reproduce --table ", ["assignment", "normalized-cnn", "tutorial"]),
        ("initflow schemes ort", ["orthogonal"]),
        ("initflow plugins check ", [*SCHEME_NAMES, "mine"]),
        ("initflow completion ", ["bash", "zsh", "fish"]),
    ],
)
def test_a_word_is_completed_by_what_is_valid_there(completed, line, values):
    """Without what a list has already; where nothing is known, by paths or not at all."""
    assert [one for one in completed(line) if one not in SHIPPED] == list(values)


SHIPPED = ("critical", "looks-linear", "lsuv", "template")  # which may be installed


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_each_shell_gets_its_code(capsys, shell):
    """Which asks this command."""
    assert process.main(["completion", shell]) == 0
    out, err = capsys.readouterr()
    assert f"{completion.VARIABLE}={shell}_complete" in out
    assert err == ""


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_bash_completes_by_it(tmp_path):
    """In a real one, by a real command."""
    command = tmp_path / "initflow"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m initflow "$@"\n')
    command.chmod(0o755)
    code = (
        'eval "$(initflow completion bash)"; COMP_WORDS=(initflow train --activation ta);'
        'COMP_CWORD=3; _initflow_completion initflow; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "tanh\n"

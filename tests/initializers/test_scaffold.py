"""A new plugin: what is written, that it works as it is, and what cannot be written."""

import os
import re
import subprocess
import sys
import tomllib

import pytest

from initflow.errors import SettingError
from initflow.initializers import plugins, scaffold
from initflow.initializers.scheme import Place
from initflow.testing import assert_initializer_contract
from tests.conftest import ROOT

WRITTEN = [
    "README.md",
    "pyproject.toml",
    "src/initflow_my_init.py",
    "tests/test_my_init.py",
]


def contents(folder):
    """Every file by its place in ``folder``, but for what Python, pytest and pip leave there."""
    return {
        place: (folder / place).read_bytes()
        for place in sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
        if (folder / place).is_file()
        and not re.search(r"_cache|__pycache__|build/|egg-info", place)
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A new plugin with a name that is no identifier, in a folder that was not there."""
    return scaffold.new("my-init", tmp_path_factory.mktemp("new") / "plugins")


def test_a_whole_distribution_is_written(made):
    """In a folder of its name, with nothing left beside it, nothing left to fill in."""
    assert made.name == "initflow-my-init"
    assert list(made.parent.iterdir()) == [made]
    assert list(contents(made)) == WRITTEN
    assert not any(b"$" in content for content in contents(made).values())


def test_its_metadata_names_the_scheme_and_what_it_needs(made):
    """As the finder and pip read it."""
    project = tomllib.loads((made / "pyproject.toml").read_text())["project"]
    assert (project["name"], project["version"]) == ("initflow-my-init", "0.1.0")
    assert project["dependencies"] == ["initflow", "torch"]
    points = {"my-init": "initflow_my_init:my_init"}
    assert project["entry-points"] == {"initflow.initializers": points}


def test_it_is_found_and_keeps_the_contract(made):
    """In place, by its name, with its argument and the variance that it states."""
    scheme = plugins.find("my-init:gain=2", made.parent)
    assert scheme.provider == "initflow-my-init 0.1.0"
    assert scheme.values == {"gain": 2.0}
    assert scheme.variance(Place(fan_in=50, fan_out=3)) == pytest.approx(0.16)
    assert_initializer_contract("my-init", made.parent)


@pytest.mark.end_to_end
def test_its_own_tests_pass(made):
    """Where they lie, with nothing installed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=made,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def test_the_shipped_template_is_what_is_written(tmp_path):
    """File by file; to change it, change initflow/template and write it anew."""
    written = scaffold.new("template", tmp_path)
    assert contents(written) == contents(ROOT / "plugins" / "initflow-template")


@pytest.mark.parametrize("name", ["a", "x2", "under_score", "dotted.name", "Big-Name"])
def test_names_that_can_be_used(name, tmp_path):
    """Each becomes a plugin that is found and loads under that very name."""
    scaffold.new(name, tmp_path)
    assert plugins.find(name, tmp_path).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((bad, "must be letters and digits") for bad in ("", "2nd", "-a", "a-", "a b", "a/b")),
        *((bad, "must be letters and digits") for bad in ("..", "größe", "a:b", "a_", "a\n")),
        ("he", "'he' is the name of a built-in scheme"),
        *((bad, "Python or its module uses it") for bad in ("class", "float", "torch", "Tensor")),
    ],
)
def test_names_that_cannot(name, message, tmp_path):
    """One line says why, and nothing is written."""
    with pytest.raises(SettingError, match=message):
        scaffold.new(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(tmp_path):
    """Neither a plugin nor anything else that has its name."""
    target = tmp_path / "initflow-mine"
    target.mkdir()
    with pytest.raises(SettingError, match=r"initflow-mine' exists already"):
        scaffold.new("mine", tmp_path)
    assert list(tmp_path.rglob("*")) == [target]


@pytest.mark.parametrize("name", ["mine", "x" * 300])
def test_what_cannot_be_written_is_left_out_whole(name, tmp_path):
    """A file in the folder's place, or a name too long: one line, and nothing stays."""
    folder = tmp_path / "plugins"
    if name == "mine":
        folder.write_text("")
    with pytest.raises(SettingError, match="cannot be written: "):
        scaffold.new(name, folder)
    assert folder.is_file() or not list(folder.iterdir())


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    """A template that is not there, after files were written."""
    monkeypatch.setitem(scaffold.FILES, "missing", "missing")
    with pytest.raises(SettingError, match="cannot be written: No such file"):
        scaffold.new("mine", tmp_path)
    assert not list(tmp_path.iterdir())

"""Every plugin in plugins/: found, loaded, documented, in keeping with the contract."""

import re
import tomllib
from importlib.metadata import EntryPoint

import pytest

from initflow import testing
from initflow.initializers import plugins
from initflow.initializers.scheme import Scheme, write
from initflow.testing import assert_initializer_contract
from tests.conftest import ROOT

PLUGINS = ROOT / "plugins"
FOLDERS = sorted(path.name for path in PLUGINS.iterdir() if path.is_dir())
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
every_folder = pytest.mark.parametrize("name", FOLDERS)


def project(name):
    return tomllib.loads((PLUGINS / name / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def loaded():
    """Each plugin's schemes, or what is wrong, by its folder's name."""
    found = {}
    for plugin, scheme in plugins.load_all(PLUGINS):
        if plugin.folder:
            found.setdefault(plugin.folder.name, []).append(scheme)
    return found


def test_every_folder_is_a_plugin_that_loads(loaded):
    """None is broken, none is missed, each offers one scheme named as its folder is."""
    assert sorted(loaded) == FOLDERS
    for name, (scheme,) in loaded.items():
        assert isinstance(scheme, Scheme), scheme
        assert f"initflow-{scheme.name}" == name


@every_folder
def test_it_keeps_the_contract(name, monkeypatch):
    """The whole conformance table, found by its name; its own tests sample more seeds."""
    monkeypatch.setattr(testing, "SEEDS", 20)
    assert_initializer_contract(name.removeprefix("initflow-"), PLUGINS)


@every_folder
def test_the_provider_is_distribution_and_version(name, loaded):
    """As the tags of a run have it."""
    (scheme,) = loaded[name]
    assert scheme.provider == f"{project(name)['name']} {project(name)['version']}"
    assert project(name)["name"] == name


@every_folder
def test_it_is_a_distribution_with_tests(name):
    """One module in src, which the entry point names, tests, and all that pip needs to know."""
    assert {"initflow", "torch"} <= set(project(name)["dependencies"])
    ((scheme, place),) = project(name)["entry-points"]["initflow.initializers"].items()
    module = EntryPoint(scheme, place, "").module
    assert sorted((PLUGINS / name / "src").glob("*.py")) == [
        PLUGINS / name / "src" / f"{module}.py"
    ]
    assert list((PLUGINS / name / "tests").glob("test_*.py"))
    assert project(name)["readme"] == "README.md"
    assert f"plugins/{name}/src" in PYPROJECT["tool"]["pytest"]["ini_options"]["pythonpath"]


@every_folder
def test_the_readme_lists_every_argument_with_its_default(name, loaded):
    """The table's rows are the scheme's parameters, in order; installing and using are shown."""
    (scheme,) = loaded[name]
    readme = (PLUGINS / name / "README.md").read_text()
    table = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| .+ \|$", readme, re.MULTILINE)
    assert table == [(key, write(p.default)) for key, p in scheme.parameters.items()]
    assert f"pip install ./plugins/{name}" in readme
    assert f"initflow plugins check {scheme.name}" in readme
    assert "## Source" in readme


@every_folder
def test_the_docstring_stands_on_its_own(name, loaded):
    """It is what `initflow schemes NAME` shows: the distribution drawn, and the paper."""
    (scheme,) = loaded[name]
    assert re.search(r"\b(19|20)\d\d, \"", scheme.description)
    assert all(argument in scheme.description for argument in scheme.parameters)


def test_the_index_names_every_plugin():
    """plugins/README.md, with a link to each folder."""
    linked = re.findall(r"\]\((initflow-[\w-]+)/?\)", (PLUGINS / "README.md").read_text())
    assert sorted(linked) == FOLDERS

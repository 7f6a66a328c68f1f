"""`initflow project`: what it writes, from where it takes initflow, what it refuses."""

import json

import pytest
import yaml
from mlflow.projects import utils
from mlflow.utils.environment import _PythonEnv

import initflow
from initflow.core import paths
from initflow.errors import SettingError
from initflow.experiments import project
from initflow.initializers import finder
from tests.conftest import ROOT

HERE = f"initflow @ {ROOT.as_uri()}"


def test_it_has_the_entry_points_the_pins_and_a_plugin(tmp_path):
    """The package's own to the byte; MLflow reads it, and the plugin is found."""
    folder = tmp_path / "deep" / "own"
    assert project.new(folder) == HERE
    for name in ("MLproject", "requirements.lock"):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
    assert utils.load_project(str(folder)).name == "initflow"
    here, ours = (yaml.safe_load((at / "conda.yaml").read_text()) for at in (folder, ROOT))
    ours["dependencies"][-1]["pip"].append(HERE)
    assert here == ours
    read = _PythonEnv.from_conda_yaml(str(folder / "conda.yaml"))
    assert read.dependencies == ["-r requirements.lock", HERE]
    (plugin,) = (one for one in finder.found(folder / "plugins").values() if not one.shipped)
    assert (plugin.name, plugin.provider) == (project.PLUGIN, "initflow-template 0.1.0")
    assert {path.name for path in folder.iterdir()} == {
        *("MLproject", "conda.yaml", "requirements.lock", "plugins")
    }


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (None, f"initflow=={initflow.__version__}"),
        ({"url": "file:///here/x.whl", "archive_info": {}}, "initflow @ file:///here/x.whl"),
        ({"url": "file:///here", "dir_info": {"editable": True}}, "initflow @ file:///here"),
        (
            {"url": "https://git/x", "vcs_info": {"vcs": "git", "commit_id": "1f"}},
            "initflow @ git+https://git/x@1f",
        ),
        (
            {"url": "https://at/x.zip", "archive_info": {}, "subdirectory": "in"},
            "initflow @ https://at/x.zip#subdirectory=in",
        ),
    ],
    ids=["index", "wheel", "folder", "git", "subdirectory"],
)
def test_initflow_is_taken_from_where_it_was_installed(record, wanted):
    """As pip's record says (PEP 610), which there is none of for what came from an index."""
    assert project.requirement(record and json.dumps(record)) == wanted


def test_nothing_is_overwritten(tmp_path):
    """A folder that holds something, or a file; an empty folder is taken, where one stands."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    for taken in ("full", "full/notes"):
        message = f"must be empty or not there, not '{tmp_path / taken}'"
        with pytest.raises(SettingError, match=message):
            project.new(tmp_path / taken)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes"]
    (tmp_path / "empty").mkdir()
    inode = (tmp_path / "empty").stat().st_ino
    project.new(tmp_path / "empty")
    assert (tmp_path / "empty").stat().st_ino == inode


@pytest.mark.parametrize("there", [True, False])
def test_what_cannot_be_finished_leaves_nothing(tmp_path, monkeypatch, there):
    """Neither half a project nor a folder that was not there."""
    folder = tmp_path / "own"
    if there:
        folder.mkdir()
    shipped = paths.shipped
    monkeypatch.setattr(
        paths, "shipped", lambda name: shipped("gone" if name == "conda.yaml" else name)
    )
    with pytest.raises(SettingError, match=r"own' cannot be written: No such file or directory$"):
        project.new(folder)
    assert list(tmp_path.rglob("*")) == ([folder] if there else [])

"""What is the user's own, in the working folder and in a clone that MLflow made."""

import sys
from pathlib import Path
from urllib.parse import quote

import mlflow
import pytest
from platformdirs.macos import MacOS
from platformdirs.unix import Unix

from initflow.core import paths
from initflow.core.configurations import TrainConfig, TuneConfig
from initflow.errors import SettingError
from initflow.initializers import finder
from initflow.initializers.plugins import find
from initflow.tracking import connection, outbox, runs
from tests.conftest import new_store
from tests.initializers.test_finder import project


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """The working folder, as `mlflow run https://…` makes it, and the user's beside it."""
    made = tmp_path / "tmpab_c012d"
    (made / ".git").mkdir(parents=True)
    (tmp_path / "user").mkdir()
    monkeypatch.setattr(paths.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/user/mlflow.db")
    monkeypatch.chdir(made)
    return made


def test_elsewhere_paths_are_as_they_are(tmp_path, monkeypatch):
    """A checkout in the folder for temporary files is none of MLflow's clones."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/user/mlflow.db")
    monkeypatch.setattr(paths.tempfile, "gettempdir", lambda: str(tmp_path))
    for name in ("checkout", "tmp.AbC0123456"):  # as the command mktemp names one
        (tmp_path / name / ".git").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / name)
        assert not paths.in_clone()
        assert paths.own("a/b") == Path("a/b")
        assert paths.own_or_of_project("a.toml") == Path("a.toml")
    (tmp_path / "tmpab_c012d").mkdir()
    monkeypatch.chdir(tmp_path / "tmpab_c012d")
    assert not paths.in_clone()
    monkeypatch.setenv("HOME", "/home/me")
    assert paths.own("~/b") == Path("/home/me/b")


@pytest.mark.parametrize("below", [".", "sub/folder"])
def test_in_a_clone_relative_paths_are_the_users(clone, below, monkeypatch):
    """Beside the store, also of a project in a folder of the repository."""
    (clone / below).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(clone / below)
    user = clone.parent / "user"
    assert paths.in_clone()
    assert paths.home() == user
    config = TrainConfig(data_dir="data", plugins_dir="mine")
    assert (config.data_dir, config.plugins_dir) == (user / "data", user / "mine")
    assert TrainConfig(data_dir="/data").data_dir == Path("/data")
    assert TuneConfig(storage="a.journal").storage == str(user / "a.journal")
    assert TuneConfig(storage="sqlite:///a.db").storage == "sqlite:///a.db"


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:////a%20b/mlflow.db", "/a b/mlflow.db"),
        ("sqlite:////a b/mlflow.db", "/a b/mlflow.db"),
        ("sqlite:////a/mlflow.db?timeout=9", "/a/mlflow.db"),
        ("sqlite:///mlflow.db", "mlflow.db"),
        ("http://host/a", None),
        ("postgresql://me@host/mlflow", None),
    ],
)
def test_the_file_of_a_store(clone, monkeypatch, uri, file):
    """As SQLAlchemy opens it: MLflow quotes the spaces of the folder that it was started in."""
    assert paths.store_file(uri) == (file and Path(file))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    if file:
        assert paths.home() == Path(file).parent
        monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: uri)
        assert connection.folder() == Path(file).parent


@pytest.mark.needs("mlflow>=3.7")  # older ones make no such address
def test_in_a_folder_with_a_space_the_store_is_found(tmp_path, monkeypatch):
    """By the address that MLflow makes of it, and nothing of ours is elsewhere."""
    place = tmp_path / "my data"
    place.mkdir()
    new_store(place)
    uri = f"sqlite:///{quote(str(place))}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: uri)
    assert runs.read_run("0" * 32) is None
    assert connection.is_there(uri)
    with connection.store_lock(uri):
        assert (place / "mlflow.db.lock").exists()
    # MLflow itself makes an empty folder by the quoted name.
    assert {path.parent.name for path in tmp_path.glob("*/*")} == {"my data"}


def test_with_a_server_the_users_data_folder_is_the_place(clone, monkeypatch):
    """For studies, too, which a clone would take with it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("XDG_DATA_HOME", str(clone.parent / "kept"))
    assert paths.home() == clone.parent / "kept" / "initflow"
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "http://127.0.0.1:1")
    assert connection.folder() == paths.home()
    monkeypatch.setenv("INITFLOW_OUTBOX", "outbox")
    assert outbox.folder() == paths.home() / "outbox"


@pytest.mark.parametrize("set_to", [None, "/own place", "relative"])
@pytest.mark.parametrize(("system", "kind"), [("linux", Unix), ("darwin", MacOS)])
def test_the_users_folders_are_those_of_platformdirs(monkeypatch, tmp_path, system, kind, set_to):
    """By the variable, if it names a folder, or the usual one of the system."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", system)
    theirs = kind("initflow")
    for name, (variable, *_) in paths.KINDS.items():
        monkeypatch.delenv(variable, raising=False)
        if set_to:
            monkeypatch.setenv(variable, set_to)
        assert str(paths.of_user(name)) == getattr(theirs, f"user_{name}_dir")


def test_plugins_are_the_projects_and_the_users(clone, nothing_shipped):
    """Both are found; a folder that was asked for is the user's."""
    project(clone / "plugins", "a", {"shipped": "module:fill"})
    project(clone.parent / "user" / "plugins", "b", {"own": "module:fill"})
    assert list(finder.found()) == ["own", "shipped"]
    assert list(finder.found(TrainConfig(plugins_dir="plugins").plugins_dir)) == ["own"]
    with pytest.raises(SettingError, match=r"/user/neither'$"):
        finder.found(TrainConfig(plugins_dir="neither").plugins_dir)


def test_a_file_is_the_users_or_the_projects(clone):
    """A scheme by its place, and so a table."""
    text = "def fill(weight):\n    weight.zero_()\n"
    (clone / "shipped.py").write_text(text)
    (clone.parent / "user" / "own.py").write_text(text)
    assert find("own.py:fill").spec == "own.py:fill"
    assert find("shipped.py:fill").spec == "shipped.py:fill"
    assert paths.own_or_of_project("own.py") == clone.parent / "user" / "own.py"
    with pytest.raises(SettingError, match=r"there is no file 'neither\.py'"):
        find("neither.py:fill")


def test_a_store_that_is_a_folder_is_told_at_once(tmp_path):
    """MLflow would ask it for minutes; nothing is left beside it."""
    folder = tmp_path / "runs"
    folder.mkdir()
    with pytest.raises(SettingError, match=r"such as sqlite:////.*/runs/mlflow\.db, not 'sqlite:"):
        connection.client(f"sqlite:///{folder}")
    assert list(tmp_path.iterdir()) == [folder]

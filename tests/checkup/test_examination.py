"""What doctor finds: each thing whole, broken, and not there; nothing is made, sent or shown."""

import os
import shutil
import threading
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from initflow.checkup import (
    data,
    examination,
    folders,
    machine,
    outboxes,
    plugins,
    store,
    versions,
)
from initflow.checkup.finding import Finding
from initflow.core import environment
from initflow.experiments.replay.promise import NOT_PROMISED, PROMISED
from initflow.tracking import connection, outbox
from initflow.tracking.outbox import Entry, Outbox
from tests.conftest import small_mnist, write_raw
from tests.initializers.test_finder import project


def test_the_pinned_packages_are_all_that_is_needed(installed):
    """A build for a GPU is the pinned version, too."""
    installed["torch"] += "+cu132"
    found = versions.look()
    assert found.problems == []
    assert found.facts["pinned"] == len(installed)
    assert found.facts["promise"]["bits"] == PROMISED
    assert found.facts["others_than_pinned"] == {}
    assert found.facts["packages"]["torch"].endswith("+cu132")
    assert found.facts["missing_of_extras"]["transformers"] == ["accelerate", "transformers"]
    assert found.facts["missing_of_extras"]["tune"] == []


@pytest.mark.parametrize(
    ("name", "version", "problem"),
    [
        ("scipy", None, "scipy is missing: pip install 'scipy>="),
        ("torch", "2.0.1", "torch is 2.0.1, and must be >=2.6: pip install 'torch>=2.6'"),
        ("mlflow", "odd", "mlflow is odd, and must be >=3.1: pip install 'mlflow>=3.1'"),
        ("numpy", "99.0", None),  # which is new enough
        ("alembic", None, None),  # which another package needs
    ],
)
def test_packages_that_are_others_are_named(installed, name, version, problem):
    """Of those that are needed, what is missing or too old is broken."""
    pinned = installed.pop(name)
    if version:
        installed[name] = version
    found = versions.look()
    assert found.facts["others_than_pinned"] == {name: {"installed": version, "pinned": pinned}}
    promised = name not in ("torch", "numpy")
    assert found.facts["promise"]["bits"] == (PROMISED if promised else NOT_PROMISED)
    assert len(found.problems) == bool(problem)
    assert all(line.startswith(problem) for line in found.problems)


def test_the_machine_has_devices_and_threads(monkeypatch):
    """A processor alone, and two GPUs."""
    found = machine.look().facts
    assert (found["device"], found["cuda"]) == ("cpu", [])
    assert found["threads"] == torch.get_num_threads()
    card = SimpleNamespace(name="a GPU", total_memory=80 * machine.GIB)
    current = environment.current("cpu")
    monkeypatch.setattr(machine.environment, "current", lambda _: current)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    found = machine.look().facts
    assert (found["device"], found["cuda"]) == ("cuda:0", [{"name": "a GPU", "gib": 80.0}] * 2)


def test_a_store_answers(store):
    """One that has tables, and no run."""
    found = import_module("initflow.checkup.store").look()
    assert found == Finding({"address": store, "is_served": False, "answers": True}, [])


@pytest.mark.parametrize("uri", ["sqlite:///{}/new/mlflow.db", "file://{}/mlruns", "{}/mlruns"])
def test_a_store_that_is_not_there_is_not_made(tmp_path, monkeypatch, uri):
    """Nor is that an error: the first run makes it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(tmp_path))
    found = store.look()
    assert (found.facts["answers"], found.problems) == (None, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://me:secret@127.0.0.1:1", "Connection refused; start it, or set MLFLOW_TRACKING_"),
        ("sqlite:///{}", "which is a folder"),
        ("sqlite:///{}/text.db", "file is not a database; set MLFLOW_TRACKING_URI to one that"),
        ("nonsense://me:secret@host", "; set MLFLOW_TRACKING_URI to one that works"),
    ],
)
def test_a_store_that_does_not_answer_is_told(tmp_path, monkeypatch, uri, said):
    """In a line that says what to do, and holds no password."""
    (tmp_path / "text.db").write_text("This is no database.")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(tmp_path))
    found = store.look()
    (problem,) = found.problems
    assert found.facts["answers"] is False
    assert said in problem
    assert "\n" not in problem
    assert "secret" not in str(found)


def test_a_store_that_is_silent_is_waited_for_only_a_while(monkeypatch):
    """However long MLflow itself would wait."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setattr(store, "PATIENCE_S", 0.1)
    end = threading.Event()
    monkeypatch.setattr(store, "_ask", end.wait)
    (problem,) = store.look().problems
    end.set()
    assert problem.startswith("MLflow at 'http://127.0.0.1:1' does not answer within 0.1 s; start")


def test_what_waits_is_counted_and_stays(tmp_path, monkeypatch):
    """A damaged outbox is told, beside those that can be read."""
    monkeypatch.setenv("INITFLOW_OUTBOX", str(tmp_path))
    made = Outbox(tmp_path / "1.outbox", "http://server")
    for kind in ("a", "b", "c"):
        made.add(Entry(kind, "run"))
    made.refuse(3, "not taken")
    made.close()
    (tmp_path / "2.outbox").write_text("damaged\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    found = outboxes.look()
    (left,) = found.facts["left"]
    assert (left["tracking"], left["waiting"], left["refused"]) == ("http://server", 2, 1)
    (problem,) = found.problems
    assert problem.endswith("is damaged at line 1: remove the file to forget it")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_plugins_are_tried_and_broken_ones_told(tmp_path, monkeypatch):
    """Schemes and models, from a folder; those that come with the package are there anyway."""
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "plugins"
    (project(home, "mine", {"mine": "mine:fill"}) / "mine.py").write_text(
        "def fill(weight):\n    weight.zero_()\n"
    )
    (project(home, "hurt", {"hurt": "hurt:fill"}) / "hurt.py").write_text("import no_such_module")
    model = project(home, "net", {"net": "net:build"})
    table = (model / "pyproject.toml").read_text().replace(".initializers", ".models")
    (model / "pyproject.toml").write_text(table)
    (model / "net.py").write_text("raise RuntimeError('no net')")
    found = plugins.look()
    offered = {one["name"]: one["where"] for one in found.facts["schemes"]}
    assert offered["mine"] == "plugins/mine"
    assert "critical" in offered
    assert found.facts["models"] == []
    hurt, net = found.problems
    assert hurt.startswith("scheme 'hurt' of hurt 1.0 (plugins/hurt): ModuleNotFoundError: ")
    assert net.startswith("model 'net' of net 1.0 (plugins/net): RuntimeError: no net: mend or ")
    monkeypatch.setenv("INITFLOW_PLUGINS_DIR", "nowhere")
    (problem,) = plugins.look().problems
    assert problem == "plugins_dir must be a folder, not 'nowhere'; INITFLOW_PLUGINS_DIR names it"


def test_data_sets_are_found_and_not_downloaded(tmp_path, monkeypatch):
    """The digits are always there."""
    monkeypatch.setenv("INITFLOW_DATA_DIR", str(tmp_path))
    write_raw(tmp_path, small_mnist())
    found = data.look()
    there = {name for name, is_there in found.facts["there"].items() if is_there}
    assert there == {"mnist", "digits"}
    assert found.facts["folder"] == str(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"free": 10**6}, ["has 1 MB left: make room, or give "] * 3),
        ({"writable": False}, ["cannot be written: give "] * 3),
    ],
)
def test_folders_have_room_and_can_be_written(store, monkeypatch, change, said):
    """None of them is made; that of the data may be another's."""
    monkeypatch.setenv("INITFLOW_OUTBOX", "out/box")
    free = change.get("free", 10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(os, "access", lambda *_: change.get("writable", True))
    found = folders.look()
    assert list(found.facts["folders"]) == ["runs", "data", "models", "outbox", "temporary"]
    assert len(found.problems) == len(said)
    names = ("MLFLOW_TRACKING_URI", "INITFLOW_OUTBOX", "TMPDIR")
    for problem, part, name in zip(found.problems, said, names, strict=False):
        assert f"{part}{name} another one" in problem
    assert not outbox.folder().exists()
    monkeypatch.setattr(connection, "is_served", lambda: True)
    assert "runs" not in folders.look().facts["folders"]


def test_one_part_that_fails_leaves_the_others(monkeypatch):
    """It is broken itself; the home folder is in nothing that is told."""
    monkeypatch.setenv("HOME", "/home/me")
    for name in examination.PARTS:
        part = import_module(f"initflow.checkup.{name}")
        monkeypatch.setattr(part, "look", lambda: Finding({"paths": ["/home/me/x", {"n": 1}]}))

    def fail():
        raise RuntimeError("no /home/me/data, but /home/me2")

    def lack():
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(data, "look", fail)
    for part in (machine, plugins):
        monkeypatch.setattr(part, "look", lack)
    found = examination.look()
    assert found.problems == [
        "torch cannot be imported: install it, and look again",
        "data: cannot be looked at (RuntimeError: no ~/data, but /home/me2); please report it",
    ]
    assert found.parts["store"] == {"paths": ["~/x", {"n": 1}]}
    assert found.parts["data"] == {}
    assert list(found.as_json()) == ["problems", *examination.PARTS]

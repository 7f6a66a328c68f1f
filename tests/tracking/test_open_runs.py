"""Runs that processes left open when they died: known to the next one, and closed by it."""

import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import mlflow
import pytest

from initflow.errors import OutageError
from initflow.tracking import delivery, open_runs, outbox, runs
from tests.conftest import python
from tests.test_end_to_end import TIMEOUT_S, run, warm_environment
from tests.test_end_to_end import runs as runs_in

TRACKING = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """A folder of this test's own."""
    monkeypatch.setenv("INITFLOW_OUTBOX", str(tmp_path / "outbox"))
    open_runs._notes.clear()
    yield
    open_runs._notes.clear()


def files():
    return (
        sorted(path.name for path in outbox.folder().glob("*")) if outbox.folder().is_dir() else []
    )


def dead(*noted):
    """What another process noted, (tracking, run, is open) each, before it died."""
    outbox.folder().mkdir(parents=True, exist_ok=True)
    path = outbox.folder() / f"dead{len(files())}{open_runs.SUFFIX}"
    for tracking, name, is_open in noted:
        open_runs._write(path, tracking, name, is_open=is_open)
    return path


def left():
    return [(one.tracking, one.runs) for one in open_runs.left_open()]


def test_what_is_open_is_noted_and_what_is_closed_leaves_nothing():
    """A file while there is something, and none after it."""
    open_runs.opened(TRACKING, "a")
    open_runs.opened(TRACKING, "b")
    open_runs.closed(TRACKING, "a")
    (path,) = outbox.folder().glob(f"*{open_runs.SUFFIX}")
    assert open_runs._read(path) == [(TRACKING, "b")]
    open_runs.closed(TRACKING, "b")
    open_runs.closed(TRACKING, "never opened")
    assert files() == []


def test_what_a_living_process_has_open_is_its_own():
    """Also this one's: nobody else is told of it."""
    open_runs.opened(TRACKING, "a")
    assert left() == []
    program = (
        "from initflow.tracking import open_runs; print([o.runs for o in open_runs.left_open()])"
    )
    assert python(program) == "[]\n"


def test_a_fork_notes_its_own():
    """What its parent has open stays its parent's, also when the fork has ended."""
    open_runs.opened(TRACKING, "parent's")
    child = os.fork()
    if not child:
        open_runs.opened(TRACKING, "child's")
        os._exit(0)  # as if it were killed
    os.waitpid(child, 0)
    assert left() == [(TRACKING, ("child's",))]


def test_what_a_dead_process_left_open_is_told_until_it_is_forgotten():
    """By where it is, each run once; then its file is gone."""
    dead(("one", "a", True), ("two", "b", True), ("one", "c", True), ("one", "a", False))
    assert set(left()) == {("one", ("c",)), ("two", ("b",))}
    for one in open_runs.left_open():
        for name in one.runs:
            one.forget(name)
    assert left() == []
    assert files() == []


@pytest.mark.parametrize(
    "line", ["", "{", "[1]", '{"host": 1}', '"text"', json.dumps({"host": "h", "run": "r"})]
)
def test_a_damaged_line_hides_no_other(line):
    """The last one may have been cut off as it was written."""
    path = dead((TRACKING, "a", True))
    with path.open("a") as file:
        file.write(f"{line}\n")
    open_runs._write(path, TRACKING, "b", is_open=True)
    assert left() == [(TRACKING, ("a", "b"))]


def test_another_machines_file_is_left_alone(monkeypatch):
    """Where machines share a home folder."""
    path = dead((TRACKING, "a", True))
    monkeypatch.setattr(open_runs.platform, "node", lambda: "another")
    assert left() == []
    assert path.is_file()


def test_where_nothing_can_be_noted_training_goes_on(monkeypatch, tmp_path):
    """A file stands where the folder would be."""
    (tmp_path / "no folder").write_text("")
    monkeypatch.setenv("INITFLOW_OUTBOX", str(tmp_path / "no folder" / "outbox"))
    open_runs.opened(TRACKING, "a")
    open_runs.closed(TRACKING, "a")
    assert left() == []


def ended(store, *names):
    """A run for each of ``names``, which is its status or its end."""
    client = mlflow.MlflowClient(store)
    found = []
    for name in names:
        tags = {delivery.KEY_TAG: f"{outbox.KEY}{name}", delivery.OPENER: "dead0"}
        made = client.create_run("0", run_name=name, tags=tags)
        if name == "deleted":
            client.delete_run(made.info.run_id)
        elif name not in ("RUNNING", "by key"):
            client.set_terminated(made.info.run_id, name)
        found.append(made.info.run_id)
    return client, found


def test_only_what_is_open_is_closed(store):
    """With the tag; what has ended, was deleted or never was is left as it is, and forgotten."""
    client, ids = ended(store, "RUNNING", "by key", "FINISHED", "FAILED", "deleted")
    never = f"{outbox.KEY}{'0' * 32}"
    tracking = delivery.sender(store).tracking
    names = [*ids[:1], f"{outbox.KEY}by key", *ids[2:], never, "0" * 32]
    dead(*((tracking, name, True) for name in names))
    runs.close_left_open()
    found = [client.get_run(one) for one in ids]
    assert [one.info.status for one in found] == [
        "KILLED",
        "KILLED",
        "FINISHED",
        "FAILED",
        "RUNNING",
    ]
    tags = [one.data.tags.get(delivery.ORPHANED) for one in found]
    assert tags == ["true", "true", None, None, None]
    assert files() == []


def test_a_run_that_another_process_has_opened_since_is_that_ones(store):
    """As a tuning does that goes on, on another machine, too: it is RUNNING, but not ours."""
    client, ids = ended(store, "RUNNING", "RUNNING")
    client.set_tag(ids[0], delivery.OPENER, "another")
    dead(*((delivery.sender(store).tracking, one, True) for one in ids))
    runs.close_left_open()
    assert [client.get_run(one).info.status for one in ids] == ["RUNNING", "KILLED"]
    assert left() == []


def test_a_run_that_is_opened_again_is_tagged_anew(store):
    """Before it is RUNNING."""
    with runs.start(name="parent", description="", params={}, tags={}) as parent:
        settings = {"name": "nested", "description": "", "params": {}, "tags": {}}
        with parent.nested(**settings) as first:
            pass
        mlflow.MlflowClient().set_tag(first.id, delivery.OPENER, "another")
        with parent.nested(**settings, resumed=first.id) as again:
            tags = mlflow.get_run(again.id).data.tags
            (path,) = outbox.folder().glob(f"*{open_runs.SUFFIX}")
            assert tags[delivery.OPENER] == path.stem
            assert mlflow.get_run(parent.id).data.tags[delivery.OPENER] == path.stem
    assert files() == []


def test_a_run_that_waits_to_be_made_is_not_forgotten(store, monkeypatch):
    """Its process died while the server was away."""
    dead((delivery.sender(store).tracking, f"{outbox.KEY}{'0' * 32}", True))
    monkeypatch.setattr(outbox, "paths", lambda: [Path("waiting.outbox")])
    runs.close_left_open()
    assert len(left()) == 1


def test_where_nothing_answers_it_is_left_for_the_next(store, monkeypatch):
    """And the first such answer is the last question."""
    _, ids = ended(store, "RUNNING", "RUNNING")
    dead(*((delivery.sender(store).tracking, one, True) for one in ids))
    asked = []

    def away(_, run, _opener):
        asked.append(run)
        raise OutageError("away")

    with monkeypatch.context() as patch:
        patch.setattr(delivery, "close_orphan", away)
        runs.close_left_open()
    assert asked == ids[:1]
    runs.close_left_open()
    assert left() == []


def test_a_server_that_does_not_answer_is_asked_once(store, monkeypatch):
    """However many processes died."""
    for _ in range(3):
        dead((delivery.sender(store).tracking, "0" * 32, True))
    asked = []

    def away(_, run, _opener):
        asked.append(run)
        raise OutageError("away")

    monkeypatch.setattr(delivery, "close_orphan", away)
    runs.close_left_open()
    assert len(asked) == 1
    assert len(left()) == 3


def test_a_full_disk_ends_no_command(store, monkeypatch):
    """What cannot be noted as closed is looked at again the next time."""
    client, (id_,) = ended(store, "RUNNING")
    dead((delivery.sender(store).tracking, id_, True))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(open_runs, "_write", full)
        runs.close_left_open()
    assert client.get_run(id_).info.status == "KILLED"
    runs.close_left_open()
    assert left() == []


def test_what_is_refused_for_lack_of_rights_is_left_for_later(store, monkeypatch):
    """With the password it may be closed; others are."""
    client, ids = ended(store, "RUNNING", "by key")
    dead(*((delivery.sender(store).tracking, one, True) for one in ids))
    real = delivery.close_orphan

    def refuse(where, run, opener):
        if run == ids[0]:
            raise mlflow.MlflowException("no rights")
        real(where, run, opener)

    monkeypatch.setattr(delivery, "close_orphan", refuse)
    runs.close_left_open()
    assert [runs for _, runs in left()] == [(ids[0],)]
    assert client.get_run(ids[1]).info.status == "KILLED"


def test_elsewhere_is_for_sync(store, tmp_path):
    """Runs in another store are closed by the command that sends everything."""
    other = f"sqlite:///{tmp_path}/other.db"
    client, (id_,) = ended(other, "RUNNING")
    dead((other, id_, True), (f"sqlite:///{tmp_path}/gone.db", "a", True))
    runs.close_left_open()
    assert client.get_run(id_).info.status == "RUNNING"
    runs.close_left_open(everywhere=True)
    assert client.get_run(id_).info.status == "KILLED"
    assert not (tmp_path / "gone.db").exists()
    assert left() == [(f"sqlite:///{tmp_path}/gone.db", ("a",))]


ENDLESS = ("--dataset", "digits", "--epochs", "1000000", "--threads", "1", "--log-model", "false")
VICTIMS = {
    "train": ("train", *ENDLESS),
    "compare": ("compare", "--inits", "he", "--activations", "relu", "--seeds", "2", *ENDLESS),
    "diagnose": ("diagnose", "--depth", "400", "--width", "250", "--dataset", "digits"),
    "workers": ("compare", "--inits", "he,lecun", "--workers", "2", "--seeds", "2", *ENDLESS),
}


@pytest.mark.end_to_end
def test_the_next_command_closes_the_runs_of_killed_ones(tmp_path):
    """Of train, compare and diagnose; those of one that lives are left open."""
    shell = warm_environment(tmp_path)

    def begun(name, arguments):
        return subprocess.Popen(
            ["initflow", *arguments, "--experiment", name],
            cwd=tmp_path,
            env=shell,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def by_experiment():
        client = mlflow.MlflowClient(shell["MLFLOW_TRACKING_URI"])
        there, found = runs_in(tmp_path), {}
        # After them, as each is made after its experiment.
        names = {e.experiment_id: e.name for e in client.search_experiments()}
        for one in there:
            found.setdefault(names[one.info.experiment_id], []).append(one)
        return found

    processes = {name: begun(name, arguments) for name, arguments in VICTIMS.items()}
    survivor = begun("survivor", VICTIMS["train"])
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while by_experiment().keys() < {*VICTIMS, "survivor"}:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        for process in processes.values():
            process.kill()
            process.wait()
        before = by_experiment()
        assert {one.info.status for name in VICTIMS for one in before[name]} >= {"RUNNING"}
        done = run(tmp_path, "initflow", "diagnose", "--dataset", "digits", "--depth", "2")
        assert done.returncode == 0, done.stderr
        after = by_experiment()
        for name in VICTIMS:
            was = {one.info.run_id: one.info.status for one in before[name]}
            for one in after[name]:
                orphaned = one.data.tags.get(delivery.ORPHANED)
                if was[one.info.run_id] == "RUNNING":
                    assert (one.info.status, orphaned) == ("KILLED", "true")
                else:
                    assert (one.info.status, orphaned) == (was[one.info.run_id], None)
        (lives,) = after["survivor"]
        assert (lives.info.status, lives.data.tags.get(delivery.ORPHANED)) == ("RUNNING", None)
    finally:
        survivor.send_signal(signal.SIGINT)
        survivor.wait(TIMEOUT_S)
        for process in processes.values():
            process.kill()
            process.wait()
    (ended,) = by_experiment()["survivor"]
    assert (ended.info.status, ended.data.tags.get(delivery.ORPHANED)) == ("KILLED", None)

"""Outages of a real MLflow server: it is killed, deaf, sick, slow, and training goes on.

What is in MLflow afterwards is, down to the bytes of the files, what an undisturbed run leaves.
"""

import hashlib
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from initflow.cli import process
from initflow.core import machine
from initflow.core.configurations import CompareConfig, TrainConfig, TuneConfig
from initflow.diagnostics.record import start, train_together
from initflow.errors import TrackingError
from initflow.experiments import network_run, train
from initflow.experiments.comparisons.compare import compare
from initflow.experiments.tuning.tune import tune
from initflow.initializers import plugins
from initflow.tracking import connection, delivery, outages, outbox, runs, unsent
from initflow.training import datasets
from tests.cluster import missing, wait
from tests.network import Road, Server
from tests.test_end_to_end import free_port

# Whole figures fill a small disk.
pytestmark = [pytest.mark.end_to_end, pytest.mark.usefixtures("whole_figures")]

CONFIG = TrainConfig(dataset="digits", epochs=2, eval_every=5, probe=100, hidden="20", threads=1)
OF_MANY = {
    "dataset": "digits",
    "hidden": "20",
    "epochs": 2,
    "eval_every": 10,
    "probe": 0,
    "threads": 1,
}
OWN = {delivery.KEY_TAG, delivery.OPENER, "mlflow.source.name"}  # what tells runs apart


class Site:
    """A server, the road to it, and what an undisturbed run leaves there."""

    def __init__(self, folder):
        self.server = Server(folder)
        self.server.start()
        self.road = Road(self.server.port, delay_s=0.15)
        self.client = mlflow.MlflowClient(self.server.address)

    @property
    def sender(self):
        return delivery.sender(self.road.address)

    def seen(self, run_id, tmp_path, store=None):
        """All that is there of a run, but for what tells runs apart."""
        client = mlflow.MlflowClient(store) if store else self.client
        run = client.get_run(run_id)
        history = {
            key: sorted((m.step, m.value) for m in client.get_metric_history(run_id, key))
            for key in run.data.metrics
        }
        folder = tmp_path / run_id
        folder.mkdir()
        files = mlflow.artifacts.download_artifacts(
            run_id=run_id, tracking_uri=store or self.server.address, dst_path=str(folder)
        )
        content = {
            str(path.relative_to(files)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in Path(files).rglob("*")
            if path.is_file()
        }
        (output,) = run.outputs.model_outputs
        model = client.get_logged_model(output.model_id)
        return {
            "status": run.info.status,
            "params": run.data.params,
            "tags": {key: value for key, value in run.data.tags.items() if key not in OWN},
            "history": history,
            "files": content,
            "inputs": [one.dataset.digest for one in run.inputs.dataset_inputs],
            "model": (model.status, sorted({metric.key for metric in model.metrics})),
        }

    def with_key(self, run_id):
        """The runs that share a run's key: itself, and those made twice."""
        run = self.client.get_run(run_id)
        key = run.data.tags[delivery.KEY_TAG]
        where = [experiment.experiment_id for experiment in self.client.search_experiments()]
        return self.client.search_runs(where, f"tags.`{delivery.KEY_TAG}` = '{key}'")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = Site(tmp_path_factory.mktemp("site"))
    with machine.threads(1):
        yield made
    made.road.close()
    made.server.kill()


@pytest.fixture(scope="module")
def undisturbed(site, tmp_path_factory):
    """What a run leaves that nothing happens to."""
    mlflow.set_tracking_uri(site.server.address)
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # no repository, as those it is compared with
        result = train.train(CONFIG, experiment="undisturbed")
    return site.seen(result.run_id, folder)


@pytest.fixture(autouse=True)
def road(site, tmp_path, monkeypatch):
    """The road, open, as the tracking server, and an outbox of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INITFLOW_OUTBOX", str(tmp_path / "outbox"))
    monkeypatch.setattr(unsent, "CLOSING_PATIENCE_S", 0.5)
    monkeypatch.setattr("initflow.tracking.sender.PAUSES_S", (0.05, 0.3))
    site.road.mode = "open"
    mlflow.set_tracking_uri(site.road.address)
    yield site.road
    site.road.mode = "open"
    assert site.sender.flush(60)
    wait(lambda: not outbox.paths())
    mlflow.set_tracking_uri(None)


def in_the_middle(do):
    """Does it once, when some of the training is through."""
    done = []

    def progress(what, through, _):
        if what.startswith("training") and through >= 10 and not done:
            done.append(True)
            do()

    return progress


@pytest.mark.parametrize("mode", ["closed", "sick", "deaf", "slow"])
def test_training_goes_on_and_nothing_is_lost_or_twice(
    site, undisturbed, tmp_path, monkeypatch, mode
):
    """Whatever the road does from the middle of the training on."""
    road = site.road
    monkeypatch.setattr(site.sender, "_way", replace(site.sender._way, slow_s=0.1))

    def spoil():
        road.mode = mode

    result = train.train(CONFIG, experiment=mode, progress=in_the_middle(spoil))
    assert result.outcome == "finished"
    if mode != "deaf":  # which may be through by now
        assert site.sender.waiting() > 0
        (path,) = outbox.paths()
        assert outbox.left(path).waiting == site.sender.waiting()
    if mode in ("closed", "sick"):
        road.mode = "open"
    assert site.sender.flush(60)
    assert site.seen(result.run_id, tmp_path) == undisturbed
    assert len(site.with_key(result.run_id)) == 1
    assert (road.lost > 0) >= (mode == "deaf")


def test_a_server_that_was_never_there_when_it_was_needed(site, road, undisturbed, tmp_path):
    """The run, its experiment and all that is in it are made when it is there."""
    road.mode = "closed"
    result = train.train(CONFIG, experiment="from nowhere")
    assert result.run_id.startswith(outbox.KEY)
    (line,) = unsent.waiting_lines()
    place = re.escape(str(tmp_path / "outbox"))
    assert re.fullmatch(
        rf"\d+ entries wait in '{place}/\S+' for MLflow at '{road.address}' \(.+\): "
        r"'initflow sync' sends them, or remove the file to forget them\.",
        line,
    )
    road.mode = "open"
    assert site.sender.flush(60)
    run_id = runs.with_ids(result.run.id)
    assert site.seen(run_id, tmp_path) == undisturbed
    assert result.run_id == run_id
    (run,) = site.with_key(run_id)
    assert site.client.get_experiment(run.info.experiment_id).name == "from nowhere"


def test_a_server_that_is_killed_and_started_again(site, road, undisturbed, tmp_path):
    """In the middle of a run, as the power does."""
    result = train.train(CONFIG, experiment="killed", progress=in_the_middle(site.server.kill))
    assert site.sender.waiting() > 0
    site.server.start()
    assert site.sender.flush(60)
    assert site.seen(result.run_id, tmp_path) == undisturbed


def test_a_run_made_twice_is_there_once(site, road, monkeypatch):
    """The answer to its making comes too late: it was made, and is found."""
    road.mode = "deaf"
    monkeypatch.setattr(road, "passed", 2)  # the next answer is heard, the one to its making is not
    with runs.start(
        name="once", description="", params={}, tags={}, experiment="undisturbed"
    ) as run:
        road.mode = "open"
        assert site.sender.flush(60)
    (found,) = site.with_key(runs.with_ids(run.id))
    assert found.info.status == "FINISHED"
    assert road.lost > 0


@pytest.fixture(scope="module")
def trained():
    """A network with all that its run carries, and its data."""
    splits = datasets.load(CONFIG)
    record = start(CONFIG, plugins.find(CONFIG.init), splits)
    with machine.threads(1):
        train_together([record], splits)
    return record, splits


def written_below(site, trained, tmp_path, heard):
    """What is there of a network's run, written at its end, after so many answers were heard."""
    site.road.mode, resolved = "open", machine.Resolved("cpu", 1)
    with runs.start(name="above", description="", params={}, tags={}, experiment="below") as above:
        site.road.heard = heard
        try:
            of = network_run.log_network(above, *trained, name="one", resolved=resolved, tags={})
        finally:
            was_cut_off = site.road.heard < 0
            site.road.heard, site.road.mode = math.inf, "open"
        assert site.sender.flush(60)
    (run,) = site.client.search_runs(
        [runs.with_ids(above.experiment_id)], f"tags.`mlflow.parentRunId` = '{above.id}'"
    )
    assert run.info.run_id == runs.with_ids(of.run_id)
    assert len(site.with_key(run.info.run_id)) == 1
    condition = f"source_run_id = '{run.info.run_id}'"
    (model,) = site.client.search_logged_models([run.info.experiment_id], condition)
    seen = site.seen(run.info.run_id, tmp_path)
    del seen["tags"]["mlflow.parentRunId"]
    files = site.client.list_logged_model_artifacts(model.model_id)
    return {**seen, "model files": sorted(file.path for file in files)}, was_cut_off


def test_a_run_that_is_written_at_its_end_is_there_once(site, road, trained, tmp_path):
    """Whichever answer to what it takes is lost, with the server away from then on for a while."""
    undisturbed, was_cut_off = written_below(site, trained, tmp_path, math.inf)
    assert not was_cut_off
    heard = 0
    while was_cut_off or not heard:
        found, was_cut_off = written_below(site, trained, tmp_path, heard)
        assert found == undisturbed, heard
        heard += 1 if heard < 2 else 3
    assert heard > 15


def killed(work):
    """Run ``work`` in a forked process that is killed at its end, as if in its midst."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def test_what_a_killed_process_left_is_sent_by_sync(site, road, undisturbed, tmp_path, capsys):
    """By the command, which says how much; the second time there is nothing left."""

    def work():
        train.train(CONFIG, experiment="left behind")

    road.mode = "closed"
    killed(work)
    (path,) = outbox.paths()
    waiting = outbox.left(path).waiting
    assert waiting > 10
    assert process.main(["sync"]) == 1
    out, err = capsys.readouterr()
    assert out == "0 entries were sent.\n"
    assert err.startswith(f"Error: {waiting} entries wait in '{path}' for MLflow at ")
    road.mode = "open"
    assert process.main(["sync"]) == 0
    assert capsys.readouterr().out == f"{waiting} entries were sent.\n"
    where = site.client.get_experiment_by_name("left behind").experiment_id
    (run,) = site.client.search_runs([where])
    assert site.seen(run.info.run_id, tmp_path) == undisturbed
    assert process.main(["sync"]) == 0
    assert capsys.readouterr().out == "0 entries were sent.\n"


def test_a_proxy_that_lets_nobody_in_refuses_nothing(site, road, capsys):
    """What waits goes on waiting: the server has not seen it."""
    road.mode = "closed"
    small = CONFIG.__class__(dataset="digits", epochs=1, probe=0, log_model=False, threads=1)
    killed(lambda: train.train(small, experiment="stranger"))
    road.mode = "strange"
    assert process.main(["sync"]) == 1
    assert "wait in" in capsys.readouterr().err
    (path,) = outbox.paths()
    assert outbox.left(path).refused == 0
    road.mode = "open"
    assert process.main(["sync"]) == 0


def test_a_run_that_was_deleted_holds_up_no_other(site, road, capsys):
    """Its entries are refused, and the next outbox is sent."""
    small = CONFIG.__class__(dataset="digits", epochs=1, probe=0, log_model=False, threads=1)

    road.open_for = 8  # enough for the run to be there
    killed(lambda: train.train(small, experiment="deleted"))
    killed(lambda: train.train(small, experiment="kept"))
    where = site.client.get_experiment_by_name("deleted").experiment_id
    (run,) = site.client.search_runs([where])
    site.client.delete_run(run.info.run_id)
    road.open_for = math.inf
    assert process.main(["sync"]) == 1
    assert "were refused by MLflow" in capsys.readouterr().err
    where = site.client.get_experiment_by_name("kept").experiment_id
    (run,) = site.client.search_runs([where])
    assert run.info.status == "FINISHED"
    (path,) = outbox.paths()
    outbox.Outbox.reopened(path).discard()


def test_a_users_own_requests_keep_their_patience(road):
    """Ours are impatient, in the thread that makes them alone."""
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES as RETRIES

    with connection.impatient():
        assert RETRIES.get() == 1
        seen = []
        other = threading.Thread(target=lambda: seen.append(RETRIES.get()))
        other.start()
        other.join()
    assert seen == [RETRIES.get()] == [7]


def test_headers_are_asked_for_once_in_our_requests_alone():
    """Whether there are any for Databricks, which MLflow would find out at each request."""

    class Provider:
        asked = 0

        def in_context(self):
            self.asked += 1
            return False

    connection._ask_once(Provider)
    provider = Provider()
    for _ in range(2):
        with connection.impatient():
            assert [provider.in_context(), provider.in_context()] == [False, False]
            assert provider.asked == 1
    assert provider.in_context() is False
    assert provider.asked == 2


def test_watching_tells_of_what_waits(site, road, monkeypatch, caplog):
    """In the log, as there is no command that ends."""
    import torch

    import initflow

    model = torch.nn.Linear(3, 2)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "told of")
    with mlflow.start_run():
        with caplog.at_level("WARNING", logger="initflow"), initflow.watch(model, every=1):
            road.mode = "closed"
            model(torch.ones(4, 3)).sum().backward()
        road.mode = "open"
        assert site.sender.flush(60)
    (record,) = [record for record in caplog.records if record.name == "initflow"]
    assert re.match(r"\d+ entr(y waits|ies wait) in ", record.getMessage())


def test_the_next_command_sends_what_waits(site, undisturbed, tmp_path, monkeypatch, capsys):
    """Before its own; the line of the one before told of it."""
    site.road.mode = "closed"

    def work():
        train.train(CONFIG, experiment="earlier")

    killed(work)
    site.road.mode = "open"
    monkeypatch.setattr(unsent, "CLOSING_PATIENCE_S", 60.0)  # on a machine that is busy, too
    small = ["--dataset", "digits", "--epochs", "1", "--probe", "0", "--log-model", "false"]
    assert process.main(["train", *small, "--experiment", "later"]) == 0
    assert "wait" not in capsys.readouterr().out
    where = site.client.get_experiment_by_name("earlier").experiment_id
    (run,) = site.client.search_runs([where])
    assert site.seen(run.info.run_id, tmp_path) == undisturbed


def test_the_closing_line_says_what_waits(site, road, capsys):
    """The training itself is a success."""
    road.mode = "closed"
    small = ["--dataset", "digits", "--epochs", "1", "--probe", "0", "--log-model", "false"]
    assert process.main(["train", *small, "--experiment", "told"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    last = out.splitlines()[-1]
    assert re.match(r"\d+ entries wait in '.*\.outbox' for MLflow at 'http://127", last)


def test_where_nothing_can_be_kept_it_is_an_error(site, road, monkeypatch, capsys):
    """Said at the end, after what came of the training; the exit code is 1."""
    road.mode = "closed"
    monkeypatch.setattr(outbox, "LIMIT", 0)
    monkeypatch.setattr("initflow.tracking.sender.IN_MEMORY", 0)
    small = ["--dataset", "digits", "--epochs", "1", "--probe", "0", "--log-model", "false"]
    assert process.main(["train", *small, "--experiment", "lost"]) == 1
    out, err = capsys.readouterr()
    assert "test accuracy after" in out, err
    assert re.match(r"Error: \d+ entries for MLflow at '.*' are lost, as neither it nor the ", err)
    site.sender.lost = 0


def test_a_comparison_goes_on(site, road):
    """Its parent has keys where the ids of the runs below it belong; in the end it has ids."""
    config = CompareConfig(inits="he,zero", activations="relu", seeds=2, **OF_MANY)
    road.mode = "closed"
    result = compare(config, experiment="compared")
    road.mode = "open"
    assert site.sender.flush(90)
    parent = runs.with_ids(result.run.id)
    where = site.client.get_run(parent).info.experiment_id
    there = {run.info.run_id: run for run in site.client.search_runs([where])}
    assert {run.info.status for run in there.values()} == {"FINISHED"}
    below = there.keys() - {parent}
    assert len(below) == 4
    assert {there[one].data.tags["mlflow.parentRunId"] for one in below} == {parent}
    described = there[parent].data.tags["mlflow.note.content"]
    assert all(one in described for one in below)
    found = site.client.get_experiment(where)
    (view,) = (tag for tag in found.tags if tag.startswith("mlflow.sharedViewState."))
    assert view.endswith(parent)
    report = mlflow.artifacts.load_text(f"runs:/{parent}/report.html")
    assert outbox.KEY not in report + described + str(found.tags)
    assert parent in report


def test_a_tuning_goes_on(site, road):
    """And the same command, when the server is back, finds all its trials there."""
    config = TuneConfig(
        inits="he", trials=4, batch=2, seeds=2, register="outage", study="outage", **OF_MANY
    )

    def close():
        road.mode = "closed"

    result = tune(config, experiment="tuned", progress=in_the_middle(close))
    assert result.rows[0].counts["finished"] + result.rows[0].counts["pruned"] == 4
    assert result.unregistered.startswith("MLflow at ")
    assert not result.versions
    road.mode = "open"
    assert site.sender.flush(90)
    again = tune(config, experiment="tuned")
    assert again.rows == result.rows
    assert list(again.versions.values()) == ["1"]
    where = site.client.get_experiment_by_name("tuned").experiment_id
    runs = site.client.search_runs([where])
    assert "RUNNING" not in {run.info.status for run in runs}
    assert not [run for run in runs if run.data.tags.get("initflow.orphaned") == "true"]
    trials = [run for run in runs if run.data.tags.get("initflow.tuning") == "trial"]
    assert len(trials) == 4
    tests = [run for run in runs if run.data.tags.get("initflow.tuning") in ("tuned", "untuned")]
    assert len(tests) == 2 * (1 + (result.rows[0].lr != 0.1))


@pytest.fixture
def small_disk(tmp_path):
    """With room for a store, and not for what a run writes; it can be given more."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(option):
        command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(place)]
        return subprocess.run(command, check=False).returncode

    if not shutil.which("mount") or mount("size=1200k"):
        missing("right to mount a disk")
    yield place, lambda: mount("remount,size=64m")
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_store_whose_disk_is_full(site, undisturbed, small_disk, tmp_path, monkeypatch):
    """A file of this machine's: what it does not take waits on another disk."""
    place, enlarge = small_disk
    monkeypatch.chdir(place)
    store = f"sqlite:///{place}/mlflow.db"
    mlflow.set_tracking_uri(store)
    sender = delivery.sender(store)
    try:
        result = train.train(CONFIG, experiment="full")
        assert sender.waiting() > 0
        assert re.search("is full|No space left", sender.reason)
        assert list(unsent.waiting_lines())
        assert enlarge() == 0
        assert sender.flush(60)
        seen = site.seen(runs.with_ids(result.run.id), tmp_path, store)
        assert seen == undisturbed
    finally:
        mlflow.set_tracking_uri(site.road.address)


def test_watching_goes_on(site, road, monkeypatch):
    """Of any model, in the user's own run."""
    import torch

    import initflow

    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "watched")
    with mlflow.start_run() as run:
        with initflow.watch(model, every=1):
            for step in range(6):
                if step == 3:
                    road.mode = "closed"
                optimizer.zero_grad()
                model(torch.ones(4, 3)).sum().backward()
                optimizer.step()
        road.mode = "open"
        assert site.sender.flush(60)
    metrics = site.client.get_run(run.info.run_id).data.metrics
    key = next(key for key in metrics if key.startswith("weight_variance/"))
    steps = [m.step for m in site.client.get_metric_history(run.info.run_id, key)]
    assert sorted(steps) == list(range(6))


def test_a_server_that_is_none_is_an_error_where_it_is_asked(monkeypatch):
    """A tuning needs one that answers, and says for how long it was tried."""
    monkeypatch.setattr(outages, "SERVER_PATIENCE_S", 0.2)
    mlflow.set_tracking_uri(f"http://127.0.0.1:{free_port()}")
    began = time.monotonic()
    with pytest.raises(TrackingError, match=r"failed: .* \(tried for \d+ s\)"):
        tune(TuneConfig(inits="he", trials=1, **OF_MANY))
    assert time.monotonic() - began < 30

"""An interrupted command of many networks goes on where it stopped."""

import http.server
import json
import math
import re
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from initflow.core.configurations import CompareConfig, ReproduceConfig
from initflow.diagnostics.reading import untrained_signals
from initflow.errors import OutageError, TrackingError
from initflow.experiments.comparisons.compare import compare
from initflow.experiments.comparisons.reproduce import reproduce
from initflow.experiments.populations import resuming, stacking
from initflow.tracking import histories, runs
from initflow.tracking.logged_models.transactions import store_of
from initflow.training import cache
from tests import test_end_to_end
from tests.experiments.test_populations import configs, history, runs_of
from tests.experiments.test_reproduce import QUICK, small
from tests.serving import QuietServer

SETTINGS = {"dataset": "digits", "threads": 1, "stack": 2}
NETWORKS = configs(("he",), lr=1e30, probe=50) + configs(("he", "xavier", "zero"), probe=50)


def train(name, asked=NETWORKS, *, settings=(), fail_at=None, command="compare", **options):
    """Train the networks; where ``fail_at`` stacks are trained, Ctrl-C is pressed."""

    def interrupt(what, done, of):
        stacks = what.partition(", ")[2].split(" of ")[0]
        if fail_at is not None and stacks.isdigit() and int(stacks) >= fail_at:
            raise KeyboardInterrupt

    with (
        cache.cleared_after(),
        stacking.trained_population(
            CompareConfig(**SETTINGS | dict(settings)),
            asked,
            name="parent",
            summary="",
            experiment=name,
            progress=interrupt,
            resumable=command,
            **options,
        ) as population,
    ):
        return population


pytestmark = pytest.mark.usefixtures("tracked")


def all_runs(name):
    found = mlflow.search_runs(experiment_names=[name], output_format="list")
    return {run.info.run_id: run for run in found}


@pytest.fixture
def interrupted(request):
    """The name of an experiment in which two of four networks were trained."""
    with pytest.raises(KeyboardInterrupt):
        train(request.node.name, fail_at=2)
    return str(request.node.name)


def test_networks_that_are_there_are_not_trained_again(interrupted):
    """They are below the new run, with the same numbers as where nothing was interrupted."""
    kept = {
        run_id: (run.data.tags["initflow.weights_sha256"], history(run))
        for run_id, run in all_runs(interrupted).items()
        if run.info.status == "FINISHED"
    }
    assert len(kept) == 2
    again, whole = train(interrupted), train("whole")
    assert again.metrics == whole.metrics
    assert [member.config for member in again.members] == NETWORKS
    assert {member.run_id for member in again.members} > set(kept)
    for one, other in zip(again.members, whole.members, strict=True):
        assert one.config == other.config
        assert one.cell == other.cell
        assert one.last == other.last
        assert one.outcome == other.outcome
        assert one.signals.layers == other.signals.layers
        assert one.signals.nonfinite == other.signals.nonfinite
        assert one.is_exact == other.is_exact
    assert again.members[0].outcome.diverged_at is not None
    assert len(again.members[1].outcome.curve) > 1
    client = mlflow.MlflowClient()
    for member in again.members:
        run = client.get_run(member.run_id)
        assert run.data.tags["mlflow.parentRunId"] == again.run.id
        if member.run_id in kept:
            sha256, metrics = kept[member.run_id]
            assert run.data.tags["initflow.weights_sha256"] == sha256
            assert history(run) == metrics


def table(**changes):
    """A table of signals, of which something is as it cannot be."""
    first = {"layers": {"fc1": {"gradient_variance": 1.0}}, "nonfinite": {}} | changes
    return json.dumps({"measured": [{"step": 0, **first}]}).encode()


DAMAGED = [
    None,
    b"{",
    b"[]",
    b'{"measured": []}',
    b"\xff" * 9,
    table(layers={}),
    table(layers=[]),
    table(layers={"fc1": {"gradient_variance": "1"}}),
    table(layers={"fc1": {"gradient_variance": True}}),
    table(layers={"fc1": {"gradient_variance": math.inf}}),
    table(layers={"fc1": 1.0}),
    table(nonfinite={"gradient/fc1": None}),
    table(by_time={"lstm.l0": {"hidden_signal_variance": [1.0, "1"]}}),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_what_is_no_table_of_signals_is_told(content):
    """Whatever is wrong with it; and one that is right is read."""
    assert untrained_signals(table()).layers == {"fc1": {"gradient_variance": 1.0}}
    if content is not None:
        with pytest.raises(ValueError, match=r"no table of signals|codec|property name"):
            untrained_signals(content)


@pytest.mark.parametrize("content", [DAMAGED[0], DAMAGED[1], DAMAGED[7]])
def test_a_network_whose_table_of_signals_is_damaged_is_trained_anew(interrupted, content):
    """And its run stays where it was."""
    finished = [run for run in all_runs(interrupted).values() if run.info.status == "FINISHED"]
    damaged, whole = finished
    file = Path(damaged.info.artifact_uri.removeprefix("file://"), "signals.json")
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    again = train(interrupted)
    assert [member.config for member in again.members] == NETWORKS
    taken = {member.run_id for member in again.members} & set(all_runs(interrupted))
    assert whole.info.run_id in taken
    assert damaged.info.run_id not in {member.run_id for member in again.members}
    left = mlflow.get_run(damaged.info.run_id).data.tags["mlflow.parentRunId"]
    assert left == damaged.data.tags["mlflow.parentRunId"] != again.run.id


@pytest.mark.parametrize(
    ("command", "made", "table"),
    [
        (
            compare,
            lambda _: CompareConfig(
                **SETTINGS, inits="he,zero,normal:std=9", activations="relu,tanh", seeds=2, epochs=1
            ),
            "comparison.json",
        ),
        (
            reproduce,
            lambda folder: ReproduceConfig(table=small(folder, rows=2), seeds=2, stack=2, **QUICK),
            "reproduction.json",
        ),
    ],
    ids=["compare", "reproduce"],
)
def test_an_interrupted_comparison_ends_as_if_nothing_had_happened(command, made, table, tmp_path):
    """The same table, curves and figures, and no network is trained twice."""

    def interrupt(what, done, of):
        if " networks done" in what and not what.partition(", ")[2].startswith("0 "):
            raise KeyboardInterrupt

    def told(run):
        """All that the comparison says, but for ids."""
        client = mlflow.MlflowClient()
        text = Path(run.info.artifact_uri.removeprefix("file://"), table).read_text()
        return text, history(run), {file.path for file in client.list_artifacts(run.info.run_id)}

    settings, cut_off = made(tmp_path), f"{table} cut off"
    with pytest.raises(KeyboardInterrupt):
        command(settings, experiment=cut_off, progress=interrupt)
    before = {run_id for run_id, run in all_runs(cut_off).items() if run.info.status == "FINISHED"}
    again, whole = (command(settings, experiment=name) for name in (cut_off, f"{table} at once"))
    taken = {member.run_id for member in again.members} & before
    assert taken == before
    assert 0 < len(taken) < len(again.members)
    ours, theirs = (told(mlflow.get_run(result.run.id)) for result in (again, whole))
    assert ours == theirs
    n, more = len(again.members) - len(taken), len(taken)
    assert again.took()[0].startswith(f"Trained {n} networks in ")
    assert again.took()[1:] == [f"{more} networks came from an interrupted command."]
    assert len(whole.took()) == 1
    assert again.drawings().keys() == whole.drawings().keys()


KILLED = """
import os, time
from pathlib import Path
import torch
import mlflow
from initflow.core.configurations import CompareConfig
from initflow.experiments.comparisons.compare import compare

torch.set_num_threads(1)
for folders in {folders!r}:
    child = os.fork()
    if not child:
        mlflow.set_tracking_uri({store!r})
        compare(CompareConfig(**{settings!r}), experiment="by sigkill")
        os._exit(0)
    # A run's folder of files is there before the run itself.
    while len(list(Path("mlruns", {experiment!r}).glob("*"))) < folders:
        if os.waitpid(child, os.WNOHANG)[0]:
            raise SystemExit("it has ended")
        time.sleep(0.0005)
    os.kill(child, 9)
    _, status = os.waitpid(child, 0)
    print("killed" if status == 9 else "done", flush=True)
"""


@pytest.mark.end_to_end
def test_killed_while_it_writes_it_loses_nothing(tracked):
    """By SIGKILL, twice, each time in the midst of writing a network's run."""
    settings = SETTINGS | {"inits": "he,zero,normal:std=9", "activations": "relu", "seeds": 3}
    settings |= {"hidden": "16", "epochs": 1, "eval_every": 5, "probe": 50}
    whole = compare(CompareConfig(**settings), experiment="by nothing")
    mlflow.create_experiment("by sigkill", (tracked / "mlruns" / "killed").as_uri())
    program = KILLED.format(
        settings=settings, folders=[4, 8], store=mlflow.get_tracking_uri(), experiment="killed"
    )
    done = test_end_to_end.run(tracked, "python", "-c", program)
    assert done.stdout.split() == ["killed"] * 2, done.stderr
    before = finished("by sigkill")
    assert len(before) >= 2
    again = compare(CompareConfig(**settings), experiment="by sigkill")
    assert taken(again, before) == before
    assert again.taken_over == len(before)
    # No network has two finished runs.
    assert len(finished("by sigkill")) == len(again.members) + 1 == 10
    assert {run.info.status for run in all_runs("by sigkill").values()} == {"FINISHED", "KILLED"}
    assert again.rows == whole.rows
    assert again.sentences == whole.sentences
    assert [member.outcome for member in again.members] == [m.outcome for m in whole.members]
    tables = [
        Path(mlflow.get_run(result.run.id).info.artifact_uri.removeprefix("file://"), name)
        for result in (again, whole)
        for name in ("comparison.json", "comparison.csv")
    ]
    assert [path.read_bytes() for path in tables[:2]] == [path.read_bytes() for path in tables[2:]]


def test_what_was_whole_is_trained_anew(interrupted):
    """The same command once more: the first is finished, and has its networks."""
    again = train(interrupted)
    once_more = train(interrupted)
    assert not {m.run_id for m in again.members} & {m.run_id for m in once_more.members}


def test_how_the_work_is_shared_out_does_not_matter(interrupted):
    """Of another number of threads a network has other last bits, and is the same network."""
    before = set(all_runs(interrupted))
    asked = [replace(config, threads=2) for config in NETWORKS]
    shared = {"threads": 2, "stack": 1}
    again = train(interrupted, asked, settings=shared)
    assert [member.config for member in again.members] == asked
    assert len(before & {member.run_id for member in again.members}) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"lr": 0.05}},
        {"command": "reproduce"},
        {"asked": configs(("he", "xavier", "lecun", "orthogonal"), probe=50)},
    ],
    ids=["settings", "command", "schemes"],
)
def test_another_command_takes_nothing_over(interrupted, change):
    """Of other settings, or of other schemes."""
    before = set(all_runs(interrupted))
    assert not before & {member.run_id for member in train(interrupted, **change).members}


def test_another_version_of_the_code_takes_nothing_over(interrupted, monkeypatch):
    """Its networks may have other numbers."""
    monkeypatch.setattr(resuming.environment, "source_sha256", lambda: "0" * 64)
    before = set(all_runs(interrupted))
    assert not before & {member.run_id for member in train(interrupted).members}


def test_names_tell_networks_apart_that_differ_in_more_than_their_schemes():
    """By the settings in which they do."""
    asked = configs(("he",), lr=0.1) + configs(("he",), lr=0.2) + configs(("he",), hidden="8")
    train("named", asked)
    assert set(runs_of("named")) == {
        "parent",
        "he relu hidden 16 lr 0.1 seed 0",
        "he relu hidden 16 lr 0.2 seed 0",
        "he relu hidden 8 lr 0.1 seed 0",
    }


def test_the_test_images_can_stay_closed():
    """Nothing is measured on them, and a replay does not open them either."""
    (member,) = train("closed", configs(("he",)), tested=False).members
    assert set(member.last) == {"accuracy/train", "loss/peak", "loss/train"}
    assert 0.5 < member.last["accuracy/train"] <= 1


def finished(name):
    return {id_ for id_, run in all_runs(name).items() if run.info.status == "FINISHED"}


def taken(again, before):
    return {member.run_id for member in again.members} & before


@pytest.mark.parametrize(
    ("reading", "error"),
    [("read_file", TrackingError("refused")), ("read_file", OutageError("away"))],
)
def test_a_run_that_cannot_be_read_costs_its_own_network(interrupted, monkeypatch, reading, error):
    """The others are taken over, whether MLflow refuses or does not answer just then."""
    before, read, failed = finished(interrupted), getattr(runs, reading), []

    def fails(one, *rest):
        if not failed:
            failed.append(one.id)
            raise error
        return read(one, *rest)

    monkeypatch.setattr(runs, reading, fails)
    again = train(interrupted)
    assert [member.config for member in again.members] == NETWORKS
    assert taken(again, before) == before - set(failed)
    assert failed


def test_a_history_that_cannot_be_read_costs_its_own_network(interrupted, monkeypatch):
    """Asked for together, both are refused; one by one, only one."""
    before, of_run = finished(interrupted), histories.of_run
    damaged = min(before)

    def refused(*_):
        raise MlflowException("damaged")

    monkeypatch.setattr(histories, "of_runs", refused)
    monkeypatch.setattr(
        histories,
        "of_run",
        lambda c, run, key: refused() if run == damaged else of_run(c, run, key),
    )
    assert taken(train(interrupted), before) == before - {damaged}


def test_a_run_that_is_gone_by_now_costs_its_own_network(interrupted, monkeypatch):
    """Deleted after it was read: it is not moved, and its network is trained anew."""
    before, read = finished(interrupted), runs.read_file
    gone = min(before)

    def then_gone(one, *rest):
        found = read(one, *rest)
        if one.id == gone:
            mlflow.delete_run(gone)
        return found

    monkeypatch.setattr(runs, "read_file", then_gone)
    again = train(interrupted)
    assert [member.config for member in again.members] == NETWORKS
    assert taken(again, before) == before - {gone}
    for run_id in before - {gone}:
        assert mlflow.get_run(run_id).data.tags["mlflow.parentRunId"] == again.run.id


def test_after_some_outages_mlflow_is_asked_no_more(interrupted, monkeypatch):
    """What is left stays where a later command finds it."""
    before = finished(interrupted)

    def away(*_):
        raise OutageError("away")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "read_file", away)
        patch.setattr(resuming, "OUTAGES", 1)
        assert not taken(train(interrupted), before)
    assert taken(train(interrupted), before) == before


def test_of_two_commands_at_once_one_takes_over(interrupted):
    """The other one sees its tag, as long as it is running, and trains anew."""
    before, client = finished(interrupted), mlflow.MlflowClient()
    (killed,) = (
        run
        for run in all_runs(interrupted).values()
        if run.info.status == "KILLED" and run.info.run_name == "parent"
    )
    other = client.create_run(killed.info.experiment_id).info.run_id
    client.set_tag(killed.info.run_id, resuming.CLAIM + other, "true")
    assert not taken(train(interrupted), before)
    client.set_terminated(other, "KILLED")
    assert taken(train(interrupted), before) == before


class Counted(http.server.BaseHTTPRequestHandler):
    """A server's answers to questions for histories, which it counts."""

    values = ()
    status = 200

    def do_GET(self):
        self.asked.append(self.path)
        body = json.dumps({"metrics": list(self.values)}).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def counted():
    """Such a server, as a client sees it."""
    handler = type("Handler", (Counted,), {"asked": []})
    with QuietServer(handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler, mlflow.MlflowClient(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()


def test_a_server_is_asked_for_many_histories_at_once(counted):
    """As its page asks it; each run's values come back in the order of their steps."""
    handler, client = counted
    handler.values = [
        {"run_id": run, "key": "k", "value": step / 10, "step": step, "timestamp": 0}
        for run in ("b", "a")
        for step in (5, 0)
    ]
    found = histories.of_runs(client, ["a", "b", "c"], "k")
    assert found == {run: [(0, 0.0), (5, 0.5)] for run in "ab"}
    (asked,) = handler.asked
    assert re.findall(r"run_id=(\w)", asked) == ["a", "b", "c"]


def test_what_was_logged_twice_at_a_step_stays_in_its_order(counted):
    """By the time, whatever the values are: the last is the one that counts."""
    handler, client = counted
    handler.values = [
        {"run_id": "a", "value": value, "step": 0, "timestamp": time}
        for time, value in ((2, 0.5), (1, 0.9))
    ]
    assert histories.of_runs(client, ["a"], "k") == {"a": [(0, 0.9), (0, 0.5)]}


@pytest.mark.parametrize("damaged", [{"run_id": "a"}, {"run_id": "a", "value": None, "step": 0}, 3])
def test_what_is_no_history_is_refused(counted, damaged):
    """And no part of it is taken."""
    handler, client = counted
    handler.values = [damaged]
    with pytest.raises(MlflowException, match="no histories"):
        histories.of_runs(client, ["a"], "k")


def test_a_server_that_knows_no_such_question_is_asked_run_by_run(counted, monkeypatch):
    """As one that would leave some of the values out."""
    handler, client = counted
    asked = []
    monkeypatch.setattr(
        histories, "of_run", lambda _, run, key: asked.append((run, key)) or [(0, 1.0)]
    )
    handler.status = 404
    assert histories.of_runs(client, ["a", "b"], "k") == {run: [(0, 1.0)] for run in "ab"}
    handler.status = 200
    handler.values = [
        {"run_id": "a", "value": 1.0, "step": step, "timestamp": 0} for step in range(3)
    ]
    monkeypatch.setattr(histories, "MOST", 3)
    assert histories.of_runs(client, ["a", "b"], "k") == {run: [(0, 1.0)] for run in "ab"}
    assert asked == [("a", "k"), ("b", "k")] * 2


def test_questions_do_not_grow_with_the_networks_taken_over(interrupted, monkeypatch):
    """Runs are found by pages and histories read together; files lie in a folder: two of each."""
    before, store = finished(interrupted), store_of(mlflow.MlflowClient())
    asked = []
    for name in (
        "_search_runs",
        "get_metric_history",
        "get_metric_history_bulk",
        "_list_artifacts",
        "get_run",
    ):
        if hasattr(type(store), name):
            real = getattr(type(store), name)

            def noting(self, *rest, real=real, name=name, **named):
                asked.append(name)
                return real(self, *rest, **named)

            monkeypatch.setattr(type(store), name, noting)
    real = resuming.taken_over

    def noted(*rest):
        asked.clear()
        found = real(*rest)
        counts.update(asked)
        return found

    counts = Counter()
    monkeypatch.setattr(resuming, "taken_over", noted)
    assert taken(train(interrupted), before) == before
    # The interrupted command; the networks below it.
    assert counts["_search_runs"] == 2
    assert counts["get_metric_history_bulk"] == 1
    assert not counts["get_metric_history"]
    # Whether another one has claimed it.
    assert counts["get_run"] == 1

"""Real processes: mlflow run, a model server, signals, no network, an install."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest

from tests import warm
from tests.conftest import ROOT, new_store

pytestmark = pytest.mark.end_to_end

BIN = Path(sys.executable).parent
TIMEOUT_S = 240


def environment(folder, **more):
    """A shell's, with this Python first and a store of its own in ``folder``."""
    shell = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return shell | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        **more,
    }


def warm_environment(folder, **more):
    """As :func:`environment`, for commands that start warm and find their store's tables made."""
    if not (folder / "mlflow.db").exists():
        new_store(folder)
    shell = environment(folder, **more)
    return shell | {"PATH": f"{warm.folder()}{os.pathsep}{shell['PATH']}"}


def run(folder, *command, cold=False, **more):
    """Run ``command`` in ``folder`` to its end; ``cold`` starts it as a user's shell does."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=(environment if cold else warm_environment)(folder, **more),
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def mlflow_run(folder, *parameters, entry_point="main", **more):
    options = [option for parameter in parameters for option in ("-P", parameter)]
    command = ("mlflow", "run", ROOT, "-e", entry_point, "--env-manager", "local")
    return run(folder, *command, "--experiment-name", "e2e", *options, **more)


def runs(folder):
    """Every MLflow run in the store of ``folder``."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments))


def family(folder):
    """The one run of the store that has no parent, and the others, all below it."""
    (parent,) = [r for r in runs(folder) if "mlflow.parentRunId" not in r.data.tags]
    nested = [r for r in runs(folder) if r.info.run_id != parent.info.run_id]
    assert {r.data.tags["mlflow.parentRunId"] for r in nested} <= {parent.info.run_id}
    assert {r.info.experiment_id for r in nested} <= {parent.info.experiment_id}
    return parent, nested


@pytest.fixture(scope="module")
def project_run(tmp_path_factory):
    """`mlflow run . -P init=he` on the digits, with one parameter in an odd spelling."""
    folder = tmp_path_factory.mktemp("project")
    parameters = ("init=he", "dataset=digits", "lr=0.10", "hidden=64,32")
    done = mlflow_run(folder, *parameters, cold=True)
    return folder, done


def test_mlflow_run_leaves_one_complete_run(project_run):
    """The run that MLflow made carries all of the contract, and no parameter was fought over."""
    folder, done = project_run
    assert done.returncode == 0, done.stderr
    (logged,) = runs(folder)
    assert logged.info.status == "FINISHED"
    params = logged.data.params
    assert (params["lr"], params["hidden"], params["data_dir"]) == ("0.10", "64,32", "none")
    assert params["resolved.device"] in ("cpu", "cuda:0")
    metrics = set(logged.data.metrics)
    assert {"accuracy/test", "loss/test", "loss/train", "lr"} <= metrics
    assert {"preactivation_variance/fc3", "predicted_gradient_second_moment/fc1"} <= metrics
    assert logged.data.metrics["accuracy/test"] > 0.9
    assert logged.data.tags["initflow.outcome"] == "finished"
    assert logged.data.tags["mlflow.project.entryPoint"] == "main"
    assert logged.data.tags["mlflow.note.content"].startswith("A 64-64-32-10 network with relu")
    folder = Path(logged.info.artifact_uri.removeprefix("file://"))
    artifacts = {path.name for path in folder.iterdir()}
    assert artifacts - {"uncommitted.diff"} == {  # which a clean checkout has none of
        "config.json",
        "learning_curves.png",
        "predicted_and_measured.png",
        "received.png",
        "replay.json",
        "signals.json",
        "signals.png",
        "trace.safetensors",
        "weight_histograms.png",
        "weights.safetensors",
    }
    assert json.loads((folder / "config.json").read_text())["lr"] == "0.1"
    assert logged.outputs.model_outputs


def test_mlflow_run_prints_what_came_of_it(project_run):
    """The table, and the next command in the form that the user came with."""
    _, done = project_run
    assert re.search(r"he .*\d\d\.\d\d% .* s .*[0-9a-f]{32}", done.stdout)
    following = done.stdout.splitlines()[-1].partition("against: ")[2]
    assert following == (
        "mlflow run . --env-manager local --experiment-name e2e "
        "-P init=normal -P dataset=digits -P hidden=64,32"
    )
    assert "Traceback" not in done.stderr


def free_port():
    """One that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def served(folder, model):
    """The address of a server of ``model``, up and answering."""
    port = free_port()
    command = ["mlflow", "models", "serve", "--env-manager", "local", "--host", "127.0.0.1"]
    with subprocess.Popen(
        [*command, "-m", model, "-p", str(port)],
        cwd=folder,
        env=warm_environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            ping = urllib.request.Request(f"{address}/ping")  # noqa: S310 - the address is ours
            deadline = time.monotonic() + TIMEOUT_S
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError), urllib.request.urlopen(ping):  # noqa: S310
                    break
                assert server.poll() is None, "the server ended"
                time.sleep(0.3)
            yield address
        finally:
            os.killpg(server.pid, signal.SIGTERM)


def test_the_logged_model_is_served(project_run):
    """`mlflow models serve` takes batches of 1 and 7 in every form; a wrong width is one line."""
    folder, _ = project_run
    (logged,) = runs(folder)
    model = f"runs:/{logged.info.run_id}/model"
    images = np.random.default_rng(0).random((7, 64), dtype=np.float32)
    ones = images.round()
    with served(folder, model) as address:

        def answered(content, kind="application/json"):
            request = urllib.request.Request(  # noqa: S310 - the address is ours
                f"{address}/invocations", content.encode(), {"Content-Type": kind}
            )
            with urllib.request.urlopen(request) as answer:  # noqa: S310 - as above
                found = json.load(answer)["predictions"]
            return np.array([list(row.values()) if isinstance(row, dict) else row for row in found])

        one, seven = (answered(json.dumps({"inputs": b.tolist()})) for b in (images[:1], images))
        whole = answered(json.dumps({"inputs": ones.tolist()}))
        frame = pd.DataFrame(ones.astype(int))
        for content, kind in (
            (json.dumps({"inputs": ones.astype(int).tolist()}), "application/json"),
            (json.dumps({"instances": ones.tolist()}), "application/json"),
            (json.dumps({"dataframe_split": frame.to_dict(orient="split")}), "application/json"),
            (json.dumps({"dataframe_records": frame.to_dict("records")}), "application/json"),
            (frame.to_csv(index=False), "text/csv"),
        ):
            np.testing.assert_array_equal(answered(content, kind), whole)
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            answered(json.dumps({"inputs": images[:, :50].tolist()}))
        assert json.load(refused.value)["message"] == (
            "this model takes images of 64 pixels, as numbers of shape (n, 64), not (7, 50)"
        )
    assert (one.shape, seven.shape) == ((1, 10), (7, 10))
    np.testing.assert_allclose(one, seven[:1], rtol=1e-4, atol=1e-5)


def test_mlflow_run_diagnoses_and_guards(tmp_path):
    """The runs nest below the one that MLflow made; `fail_on` is the exit code."""
    settings = ("inits=he,xavier", "activations=relu", "dataset=digits")
    guard = ("fail_on=vanishing,exploding", "depth=30", "probe=200")
    done = mlflow_run(tmp_path, *settings, *guard, entry_point="diagnose")
    assert done.returncode == 1
    error = (
        "Error: fail_on=vanishing,exploding: xavier relu is vanishing forward, vanishing backward"
    )
    assert f"{error}\n" in done.stderr
    parent, nested = family(tmp_path)
    assert {r.info.run_name for r in nested} == {
        f"{init} relu 64-100x30-10" for init in ("he", "xavier")
    }
    assert parent.data.tags["mlflow.project.entryPoint"] == "diagnose"
    assert parent.info.status == "FAILED"  # by mlflow run, as its command failed


def test_mlflow_run_shows_the_plane(tmp_path):
    """In one run, with its numbers and its figure."""
    settings = ("activation=tanh", "inits=he,xavier", "points=2")
    done = mlflow_run(tmp_path, *settings, entry_point="phase")
    assert done.returncode == 0, done.stderr
    assert "chaotic" in done.stdout
    (run,) = runs(tmp_path)
    assert run.data.tags["mlflow.project.entryPoint"] == "phase"
    assert run.info.status == "FINISHED"
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    assert {"phase.csv", "phase.json", "phase.png"} <= {path.name for path in folder.iterdir()}


def test_mlflow_run_diagnoses_a_model(tmp_path):
    """One of the user's own, by a path from where the command is typed."""
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(9)), nn.Linear(64, 10))\n"
    )
    settings = (f"model={tmp_path}/mine.py:build", "inits=lecun", "dataset=digits", "draws=3")
    done = mlflow_run(tmp_path, *settings, "fail_on=vanishing", entry_point="diagnose")
    assert done.returncode == 1
    error = "Error: fail_on=vanishing: default Sequential is vanishing forward, vanishing backward"
    assert f"{error}\n" in done.stderr
    parent, nested = family(tmp_path)
    assert {r.data.tags["initflow.verdict.backward"] for r in nested} == {"vanishing", "stable"}
    assert parent.data.tags["mlflow.project.entryPoint"] == "diagnose"


SMALL = ("hidden=50x5", "dataset=digits", "epochs=2", "eval_every=10", "log_model=false")


def artifacts(logged):
    """The folder of a run's artifacts."""
    return Path(logged.info.artifact_uri.removeprefix("file://"))


def test_mlflow_run_finds_the_trainable_depth(tmp_path):
    """The entry point, to its end: the run of MLflow with one of each network below it."""
    parameters = ("dataset=digits", "points=2", "depths=1,3", "lrs=0.1", "updates=20", "seeds=2")
    done = mlflow_run(tmp_path, *parameters, "workers=2", entry_point="trainability")
    assert done.returncode == 0, done.stderr
    parent, nested = family(tmp_path)
    assert parent.info.status == "FINISHED"
    assert len(nested) == 8
    assert "trainability.csv has the run of every network" in done.stdout
    folder = Path(parent.info.artifact_uri.removeprefix("file://"))
    files = {"trainability.csv", "trainability.json", "trainability.png", "report.html"}
    assert files <= {file.name for file in folder.iterdir()}


def test_mlflow_run_compares(tmp_path):
    """All networks below the run that MLflow made, one kind diverges; what came of it is said."""
    schemes = ("inits=normal,he", "seeds=2")
    done = mlflow_run(tmp_path, *schemes, *SMALL, entry_point="compare")
    assert done.returncode == 0, done.stderr
    parent, nested = family(tmp_path)
    kinds = [(init, activation) for init in ("normal", "he") for activation in ("tanh", "relu")]
    assert {r.info.run_name for r in nested} == {
        f"{init} {activation} seed {seed}" for init, activation in kinds for seed in (0, 1)
    }
    assert {r.info.status for r in (parent, *nested)} == {"FINISHED"}
    assert parent.data.tags["mlflow.project.entryPoint"] == "compare"
    outcomes = {r.info.run_name: r.data.tags["initflow.outcome"] for r in nested}
    assert outcomes["normal relu seed 0"] == "diverged"
    assert outcomes["he relu seed 1"] == "finished"
    for init, activation in kinds:
        assert re.search(rf"\n {init} +{activation} ", done.stdout)
    sentences = json.loads((artifacts(parent) / "comparison.json").read_text())["sentences"]
    assert "\n".join(sentences) in done.stdout
    place = f"/#/experiments/{parent.info.experiment_id}/runs?"
    view = f"&viewStateShareKey={parent.info.run_id}\n"
    assert re.search(rf": http://127\.0\.0\.1:5000{re.escape(place)}\S*{view}", done.stdout)
    report = (artifacts(parent) / "report.html").read_text()
    assert sentences[0] in report
    launched = (
        "mlflow run . -e compare --env-manager local --experiment-name e2e -P inits=normal,he"
    )
    assert launched in report


def test_mlflow_run_tunes(tmp_path):
    """Below the run that MLflow made a run for each scheme, below that each trial."""
    done = mlflow_run(
        tmp_path, "inits=normal,he", "trials=3", "seeds=2", *SMALL, entry_point="tune"
    )
    assert done.returncode == 0, done.stderr
    found = runs(tmp_path)
    parent_of = {r.info.run_id: r.data.tags.get("mlflow.parentRunId") for r in found}
    (parent,) = (r for r in found if not parent_of[r.info.run_id])
    assert parent.data.tags["mlflow.project.entryPoint"] == "tune"
    schemes = [r for r in found if parent_of[r.info.run_id] == parent.info.run_id]
    assert {r.info.run_name for r in schemes} == {"tune normal relu", "tune he relu"}
    trials = [r for r in found if r.data.tags.get("initflow.tuning") == "trial"]
    assert len(trials) == 2 * 3
    assert {parent_of[r.info.run_id] for r in trials} == {r.info.run_id for r in schemes}
    assert "RUNNING" not in {r.info.status for r in found}
    tuning = json.loads((artifacts(parent) / "tuning.json").read_text())
    assert "\n".join(tuning["sentences"]) in done.stdout
    study = parent.data.params["resolved.study"]
    assert (tmp_path / "studies" / f"{study}.journal").is_file()


TABLE = """
title = "A small table"
source = "Made up."
notes = ["The second number was never seen."]

[settings]
dataset = "digits"
hidden = "50"
epochs = 2
eval_every = 10

[[rows]]
name = "He"
init = "he"
activation = "relu"
published = { 10 = 85.0, 30 = 92.0 }

[[rows]]
name = "He, tanh"
init = "he"
activation = "tanh"
published = { 30 = 5.0 }
"""


def test_mlflow_run_reproduces_a_table(tmp_path):
    """A table of one's own, its numbers beside ours."""
    (tmp_path / "small.toml").write_text(TABLE)
    settings = (f"table={tmp_path}/small.toml", "seeds=3", "log_model=false")
    done = mlflow_run(tmp_path, *settings, entry_point="reproduce")
    assert done.returncode == 0, done.stderr
    parent, nested = family(tmp_path)
    assert len(nested) == 6
    assert {r.info.status for r in (parent, *nested)} == {"FINISHED"}
    assert re.search(r"\n He +10 +85\.00 .*\n +30 +92\.00 .* yes", done.stdout)
    assert re.search(r"\n He, tanh +30 +5\.00 .* no", done.stdout)
    assert "Of 2 published final accuracies, 1 lie" in done.stdout
    assert "The second number was never seen." in done.stdout
    assert f"viewStateShareKey={parent.info.run_id}\n" in done.stdout
    there = {path.name for path in artifacts(parent).iterdir()}
    assert {"report.html", "reproduction.json", "published_and_ours.png"} <= there


def test_mlflow_run_tries_every_learning_rate(tmp_path):
    """Over depths: its table, its sentences, and all figures and numbers as artifacts."""
    settings = ("inits=he", "over=depth", "depths=1,3", "rates=4", "updates=25", "seeds=2")
    more = ("hidden=12", "dataset=digits", "lr_low=0.01")
    done = mlflow_run(tmp_path, *settings, *more, entry_point="rates")
    assert done.returncode == 0, done.stderr
    parent, nested = family(tmp_path)
    assert len(nested) == 16
    assert {r.info.status for r in (parent, *nested)} == {"FINISHED"}
    assert "he: the largest stable rate goes as depth^" in done.stdout
    there = {path.name for path in artifacts(parent).iterdir()}
    assert {"report.html", "rates.csv", "rates.json", "rates.png", "stable_rates.png"} <= there


@pytest.mark.mnist
def test_mlflow_run_on_the_real_mnist(tmp_path, mnist):
    """The main job: 97.0 to 98.2 % after 3,000 iterations."""
    done = mlflow_run(tmp_path, "init=he", f"data_dir={mnist}", "log_model=false")
    assert done.returncode == 0, done.stderr
    (logged,) = runs(tmp_path)
    assert 0.970 <= logged.data.metrics["accuracy/test"] <= 0.982
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    history = client.get_metric_history(logged.info.run_id, "accuracy/test")
    assert max(metric.step for metric in history) == 3_000


@pytest.mark.parametrize(
    ("entry_point", "parameter", "message"),
    [
        ("main", "lr=abc", "Error: lr must be a number above 0 and at most 1e30, not 'abc'"),
        ("main", "init=hee", "(did you mean 'he'?)"),
        ("main", "nonsense=1", "Error: No such option '--nonsense'"),
        ("compare", "inits=xavier,hee", "(did you mean 'he'?)"),
        ("reproduce", "table=tutorail", "(did you mean 'tutorial'?)"),
    ],
)
def test_a_mistake_in_mlflow_run_fails_its_run(tmp_path, entry_point, parameter, message):
    """One line, and nothing is left RUNNING."""
    done = mlflow_run(tmp_path, parameter, entry_point=entry_point)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert message in line
    assert "Traceback" not in done.stderr
    (logged,) = runs(tmp_path)
    assert logged.info.status == "FAILED"


def count(folder, what):
    """How many there are in the store by now, of ``what`` SQL selects."""
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{folder}/mlflow.db?mode=ro", uri=True)
        ) as db:
            return db.execute(f"SELECT count(*) FROM {what}").fetchone()[0]  # noqa: S608 - our own
    except sqlite3.OperationalError:
        return 0


@pytest.mark.parametrize(
    ("sent", "code", "word"),
    [
        (signal.SIGINT, 130, "Interrupted"),
        (signal.SIGTERM, 143, "Terminated"),
        (signal.SIGHUP, 129, "Hung up"),
    ],
)
def test_a_stopped_training_is_closed_as_killed(tmp_path, sent, code, word):
    """With all that was measured so far, and one line that says where it is."""
    command = ["initflow", "train", "--dataset", "digits", "--epochs", "1000000"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=warm_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as training:
        deadline = time.monotonic() + TIMEOUT_S
        while not count(tmp_path, "metrics WHERE step > 0") and time.monotonic() < deadline:
            assert training.poll() is None, training.stderr.read()
            time.sleep(0.2)
        training.send_signal(sent)
        time.sleep(0.02)
        training.send_signal(sent)  # an impatient second one changes nothing
        out, err = training.communicate(timeout=TIMEOUT_S)
    (logged,) = runs(tmp_path)
    assert training.returncode == code
    assert err == f"{word}; what was measured so far is in run {logged.info.run_id}\n"
    assert out == ""
    assert logged.info.status == "KILLED"
    assert logged.data.metrics["accuracy/test"] > 0.9
    assert "initflow.outcome" not in logged.data.tags


def test_a_stopped_comparison_is_closed_as_killed(tmp_path):
    """With a run for each network whose training was cut off, and what was measured of it."""
    small = ("--dataset", "digits", "--hidden", "20x2", "--epochs", "1000000", "--seeds", "2")
    with subprocess.Popen(
        ["initflow", "compare", "--inits", "he,zero", "--activations", "relu", *small],
        cwd=tmp_path,
        env=warm_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as comparing:
        deadline = time.monotonic() + TIMEOUT_S
        while not count(tmp_path, "runs") and time.monotonic() < deadline:
            assert comparing.poll() is None, comparing.stderr.read()
            time.sleep(0.2)
        time.sleep(5)  # in mid-training: what is measured comes to the store at the end
        comparing.send_signal(signal.SIGINT)
        time.sleep(0.02)
        comparing.send_signal(signal.SIGINT)
        out, err = comparing.communicate(timeout=TIMEOUT_S)
    parent, nested = family(tmp_path)
    assert comparing.returncode == 130
    assert err == f"Interrupted; what was measured so far is in run {parent.info.run_id}\n"
    assert out == ""
    assert {r.info.status for r in (parent, *nested)} == {"KILLED"}
    accuracies = {r.info.run_name: r.data.metrics["accuracy/test"] for r in nested}
    assert accuracies.keys() == {f"{init} relu seed {n}" for init in ("he", "zero") for n in (0, 1)}
    assert accuracies["he relu seed 1"] > 0.8


NO_NETWORK = '''
"""Loaded by Python at its start: nothing beyond this machine can be reached."""
import socket

def refuse(*_):
    raise OSError("no network")

real = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX:
        refuse()
    return real(self, address)

socket.socket.connect = connect
socket.getaddrinfo = refuse
'''


def test_training_needs_neither_network_nor_git(tmp_path):
    """On the digits all works, in silence; a data set that is not there ends with what to do."""
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    offline = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "XDG_CACHE_HOME": str(tmp_path)}
    train = ("initflow", "train", "--dataset", "digits")
    done = run(tmp_path, *train, cold=True, PATH=str(BIN), **offline)
    assert done.returncode == 0, done.stderr
    assert "git" not in done.stderr.lower()
    assert len(runs(tmp_path)) == 1
    done = run(tmp_path, "initflow", "train", "--dataset", "kmnist", **offline)
    assert done.returncode == 1
    assert re.fullmatch(
        r"Error: kmnist is not in '.*', which is not there, and cannot be downloaded "
        r"\(.*no network.*\); point data_dir or INITFLOW_DATA_DIR to a folder that holds "
        r"KMNIST/raw, or use dataset=digits, .*\n",
        done.stderr,
    )
    assert len(runs(tmp_path)) == 1


DROPPED = """
def dropped(weight, fan_in, generator):
    weight.normal_(0.0, fan_in**-0.5, generator=generator)
"""


def write_plugin(folder, version):
    """A plugin's folder, whose scheme is `dropped`."""
    folder.mkdir(parents=True)
    (folder / "dropped_init.py").write_text(DROPPED)
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "dropped-plugin"\nversion = "{version}"\n'
        '[project.entry-points."initflow.initializers"]\ndropped = "dropped_init:dropped"\n'
    )


def test_an_edit_of_the_checkout_is_never_stale(tmp_path):
    """`mlflow run` of a copy runs the copy's source, and a plugin as soon as it lies there."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "initflow", copy / "initflow")
    for name in ("MLproject", "conda.yaml"):
        shutil.copy(ROOT / name, copy)
    init = copy / "initflow" / "__init__.py"
    init.write_text(init.read_text().replace('__version__ = "', '__version__ = "edited-'))
    write_plugin(copy / "plugins" / "dropped", "0.7")
    command = ("mlflow", "run", copy, "--env-manager", "local", "-P", "dataset=digits")
    more = ("-P", "log_model=false", "-P", "init=dropped")
    done = run(tmp_path, *command, *more, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    (logged,) = runs(tmp_path)
    assert logged.data.tags["initflow.version"].startswith("edited-")
    assert logged.data.tags["initflow.provider"] == "dropped-plugin 0.7"


def test_mlflow_run_diagnoses_a_plugin(tmp_path):
    """At depth 100 the signal survives under `critical` where Xavier's fades."""
    done = run(
        tmp_path, "mlflow", "run", ROOT, "-e", "diagnose", "--env-manager", "local",
        "--experiment-name", "e2e", "-P", "inits=xavier,critical", "-P", "activations=tanh",
        "-P", "depth=100", "-P", "dataset=digits",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    by_scheme = {run.data.tags.get("initflow.scheme"): run.data for run in runs(tmp_path)}
    signal = {
        scheme: by_scheme[scheme].metrics["signal_variance/fc100"]
        for scheme in ("xavier", "critical")
    }
    assert signal["critical"] > 4 * signal["xavier"]
    assert by_scheme["critical"].tags["initflow.provider"] == "initflow-critical 0.1.0"
    assert re.search(r"\n +critical +tanh +stable +stable ", done.stdout)


def test_a_plugin_by_a_real_pip_install(tmp_path):
    """Into an environment of its own, which borrows our packages: found and used."""
    folder = tmp_path / "plugins" / "dropped"
    write_plugin(folder, "0.7")
    assert (
        run(tmp_path, sys.executable, "-m", "venv", "--without-pip", tmp_path / "env").returncode
        == 0
    )
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env").rglob("site-packages")
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "ours.pth").write_text(ours)  # 6 GB of packages, which are not copied
    pip = ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index")
    done = run(tmp_path, python, *pip, folder)
    assert done.returncode == 0, done.stderr
    (site / "dropped_init.py").write_text((site / "dropped_init.py").read_text() + "# installed\n")

    def shown(where):
        done = run(where, python, "-m", "initflow", "schemes", "dropped", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["provider"]

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert shown(elsewhere) == "dropped-plugin 0.7"
    toml = folder / "pyproject.toml"
    toml.write_text(toml.read_text().replace("0.7", "0.8"))
    assert shown(tmp_path) == "dropped-plugin 0.8"

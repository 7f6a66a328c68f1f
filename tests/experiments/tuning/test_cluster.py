"""Tuning and comparing on a Ray cluster, with PostgreSQL and MLflow's server, all of it real.

The driver, and then a node, are killed at the worst moment: workers have written trials' runs, and
cannot tell the studies of them yet. What came of it is seen by Optuna's and MLflow's own clients.
"""

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import mlflow
import optuna
import psycopg
import pytest
from optuna.trial import TrialState

from initflow.cli import process
from initflow.core.configurations import CompareConfig
from initflow.experiments.comparisons.compare import compare
from initflow.experiments.tuning import searches, storages
from initflow.tracking import outages
from tests.cluster import (
    HOST,
    PASSWORD,
    TIMEOUT_S,
    answers,
    postgresql,
    ray_cluster,
    tracking_server,
    wait,
)
from tests.test_end_to_end import environment, free_port

pytestmark = pytest.mark.end_to_end

SCHEMES = ("he", "normal")
TRIALS, SEEDS, WORKERS = 16, 2, 2  # enough for both kills to find the study under way
SMALL = {
    "inits": ",".join(SCHEMES),
    "dataset": "digits",
    "hidden": "20",
    "epochs": 4,
    "eval_every": 15,
    "log_model": "false",
    "seeds": SEEDS,
    "backend": "ray",
    "workers": WORKERS,
}
STUDY = "killed"  # and the experiment's name
PARENT, ORPHANED = "mlflow.parentRunId", "initflow.orphaned"


def command(name, **settings):
    """The command line of ``name`` with these settings."""
    pairs = ((f"--{key.replace('_', '-')}", str(value)) for key, value in settings.items())
    return [name, *(word for pair in pairs for word in pair)]


def has(run, **tags):
    return {
        f"initflow.{key}": value for key, value in tags.items()
    }.items() <= run.data.tags.items()


def is_orphan(run):
    return run.data.tags.get(ORPHANED) == "true"


def trial_of(run):
    """Its scheme and number."""
    return run.data.tags.get("initflow.scheme"), int(run.data.tags.get("initflow.trial", -1))


def is_through(trial):
    """Whether it counts: a failed one has a reason."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (
        trial.state == TrialState.FAIL and searches.ERROR in trial.user_attrs
    )


class Site:
    """Where the services are: ``database`` has the studies, ``server`` is MLflow's address."""

    def __init__(self, folder, database, server, nodes):
        self.folder, self.database, self.server, self.nodes = folder, database, server, nodes
        self.client = mlflow.MlflowClient(server)

    @functools.cached_property
    def storage(self):
        """Opened late: its tables are the command's to make."""
        return optuna.storages.RDBStorage(self.database)

    def close(self):
        self.storage.engine.dispose()

    def trials(self):
        """Those of both studies, by scheme and number."""
        names = {scheme: f"{STUDY}: {scheme} relu" for scheme in SCHEMES}
        loaded = {
            s: optuna.load_study(study_name=n, storage=self.storage) for s, n in names.items()
        }
        return {(scheme, t.number): t for scheme, study in loaded.items() for t in study.trials}

    def runs(self, experiment=STUDY):
        found = self.client.get_experiment_by_name(experiment)
        return list(self.client.search_runs([found.experiment_id])) if found else []

    def through(self):
        """How many trials are."""
        return sum(map(is_through, self.trials().values())) if self.runs() else 0

    def untold(self):
        """The closed runs of trials that their studies do not know to be through."""
        running = [key for key, t in self.trials().items() if t.state == TrialState.RUNNING]
        closed = [run for run in self.runs() if run.info.status != "RUNNING"]
        return [run for run in closed if trial_of(run) in running]

    @contextlib.contextmanager
    def worst_moment(self):
        """The untold runs, one of each worker's; they stay untold as long as this lasts."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            with psycopg.connect(self.database) as connection:
                connection.execute("LOCK TABLE trials IN SHARE MODE")  # it can be read only
                patience = time.monotonic() + 2  # a worker may have had nothing at hand
                while time.monotonic() < patience:
                    if len(untold := self.untold()) == WORKERS:
                        yield untold
                        return
                    time.sleep(0.1)  # the server is the workers', too
            time.sleep(0.2)
        raise TimeoutError

    def at_work(self):
        """The processes of nodes that carry out tasks."""
        listed = ["ps", "-e", "-o", "pid=", "-o", "ppid=", "-o", "args="]
        lines = subprocess.run(listed, check=True, capture_output=True, text=True).stdout
        found = re.findall(r"(\d+) +(\d+) +ray::_carry_out_on_node", lines)
        return [(int(pid), int(parent)) for pid, parent in found]

    @contextlib.contextmanager
    def tuning(self):
        """The command, at work."""
        settings = {"trials": TRIALS, "batch": 2, "study": STUDY, "experiment": STUDY}
        words = command("tune", **SMALL, **settings, storage=self.database)
        with (
            (self.folder / "tune.log").open("w") as log,
            subprocess.Popen(
                [sys.executable, "-m", "initflow", *words],
                cwd=self.folder,
                env=environment(
                    self.folder,
                    MLFLOW_TRACKING_URI=self.server,
                    RAY_ADDRESS=self.nodes.address,
                    OMP_NUM_THREADS="1",
                ),
                stdout=log,
                stderr=log,
            ) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    def printed(self):
        return (self.folder / "tune.log").read_text()

    def wait_for(self, n, process):
        """Until ``n`` trials are through, some of many: ``process`` is in the midst of it."""

        def there():
            assert process.poll() is None, self.printed()
            return self.through() >= n

        wait(there, every_s=0.3)  # which asks the server for all runs


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with (
        postgresql("optuna", "mlflow") as (for_studies, for_runs),
        tracking_server(for_runs, folder) as server,
        ray_cluster() as nodes,
    ):
        wait(lambda: answers(server))
        with contextlib.closing(Site(folder, for_studies, server, nodes)) as site:
            yield site


@pytest.fixture(scope="module")
def begun_again(site):
    """The command, once more after its driver was killed; untold are the runs of that moment."""
    with site.tuning() as first:
        site.wait_for(2, first)
        with site.worst_moment() as untold:
            first.kill()
            wait(lambda: not site.at_work())  # Ray ends what it was at
    with site.tuning() as second:
        yield second, untold


@pytest.fixture
def driver(site, tmp_path, monkeypatch, capsys):
    """The command in this process, with all that it needs; it returns its code and one line."""

    def run(words):
        code = process.main(list(words))
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
        return code, err.removeprefix("Error: ")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", site.nodes.address)
    mlflow.set_tracking_uri(site.server)
    yield run
    mlflow.set_tracking_uri(None)


def weights(site, experiment):
    """The hashes of each network's weights, before and after training."""
    names = ("initial_weights_sha256", "weights_sha256")
    return {
        run.info.run_name: [run.data.tags[f"initflow.{name}"] for name in names]
        for run in site.runs(experiment)
        if PARENT in run.data.tags
    }


@pytest.mark.parametrize("name", ["tune", "compare"])
def test_a_local_store_of_runs_is_refused(driver, tmp_path, name):
    """Other machines could not write to it."""
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    code, told = driver(command(name, backend="ray", dataset="digits"))
    assert code == 2
    assert told.startswith("backend=ray needs MLflow's tracking server, for the runs that other ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("storage", ["auto", "studies/some.journal", "sqlite:///studies.db"])
def test_a_local_storage_of_studies_is_refused(site, driver, tmp_path, storage):
    """For the same reason."""
    words = command("tune", backend="ray", dataset="digits", storage=storage, experiment="none")
    code, told = driver(words)
    assert code == 2
    assert told.startswith("backend=ray needs storage in a database that all machines reach, such ")
    assert not list(tmp_path.iterdir())
    assert not site.client.get_experiment_by_name("none")


@pytest.mark.parametrize("name", ["tune", "compare"])
def test_a_cluster_that_is_not_there_is_told(site, driver, monkeypatch, name):
    """With its address."""
    address = f"{HOST}:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    storage = {"storage": site.database} if name == "tune" else {}
    words = command(name, backend="ray", dataset="digits", experiment="none", **storage)
    code, told = driver(words)
    assert code == 2
    assert told.startswith(f"no Ray cluster at '{address}' (")
    assert not site.client.get_experiment_by_name("none")


@pytest.mark.parametrize("name", ["tune", "compare"])
def test_a_server_that_does_not_answer_is_told(site, driver, monkeypatch, name):
    """With the time that was waited for it, and without the password of its address."""
    monkeypatch.setattr(outages, "SERVER_PATIENCE_S", 1)
    port = free_port()
    mlflow.set_tracking_uri(f"http://me:{PASSWORD}@{HOST}:{port}")
    storage = {"storage": site.database} if name == "tune" else {}
    code, told = driver(command(name, backend="ray", dataset="digits", **storage))
    assert code == 1
    assert told.startswith(f"MLflow at 'http://{HOST}:{port}' failed: ")
    assert re.search(r" \(tried for \d+ s\)\n$", told)
    assert PASSWORD not in told


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ((r":\d+/", ":{port}/"), "[Cc]onnection refused"),
        ((f":{PASSWORD}@", f":{PASSWORD[::-1]}@"), "password authentication failed"),
        (("/optuna", "/nowhere"), '"nowhere" does not exist'),
    ],
    ids=["no server", "wrong password", "no database"],
)
def test_a_database_that_does_not_answer_is_told(site, driver, monkeypatch, other, reason):
    """With the time that was waited for it, the reason, and without the password."""
    monkeypatch.setattr(storages, "PATIENCE_S", 1.0)
    pattern, replacement = other
    storage = re.sub(pattern, replacement.format(port=free_port()), site.database)
    assert storage != site.database
    words = command("tune", backend="ray", dataset="digits", storage=storage, experiment="none")
    code, told = driver(words)
    assert code == 1
    assert re.match(rf"storage 'postgresql://.*' cannot be used, tried for \d+ s: .*{reason}", told)
    assert PASSWORD not in told
    assert PASSWORD[::-1] not in told
    assert not site.client.get_experiment_by_name("none")


@pytest.fixture(scope="module")
def through(site, begun_again):
    """After the command has gone on, a node was killed, and it has ended in peace.

    Told are the runs that were untold when the driver was killed, and those when the node was.
    """
    driver, before = begun_again
    site.wait_for(site.through() + 2, driver)
    (mortal,) = site.nodes.worker_nodes
    (raylet,) = (started.process.pid for started in mortal.all_processes["raylet"])
    with site.worst_moment() as untold:
        lost = [pid for pid, parent in site.at_work() if parent == raylet]
        site.nodes.remove_node(mortal, allow_graceful=False)
        for pid in lost:  # as the machine itself is gone
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert len(lost) == 1
    assert driver.wait(TIMEOUT_S) == 0, site.printed()
    return before, untold


def test_no_trial_is_lost_or_counted_twice(site, through):
    """What was cut off is a failure without a reason, and its setting was tried again."""
    trials = site.trials()
    assert {t.state for t in trials.values()} <= {
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
    }
    for scheme in SCHEMES:
        counted = [t for (s, _), t in trials.items() if s == scheme and is_through(t)]
        assert len(counted) == TRIALS
        assert len({(t.params["lr"], t.params["gamma"]) for t in counted}) == TRIALS
    for (scheme, number), trial in trials.items():
        if not is_through(trial):
            again = [
                t
                for (s, n), t in trials.items()
                if s == scheme and n > number and t.params == trial.params and is_through(t)
            ]
            assert len(again) == 1


def test_the_worst_moments_were_met(site, through):
    """Of the driver's death both untold runs are disowned, of the node's the one of its worker."""
    before, after = through
    trials, now = site.trials(), {run.info.run_id: run for run in site.runs()}
    orphans = [[is_orphan(now[run.info.run_id]) for run in untold] for untold in (before, after)]
    assert orphans[0] == [True, True]
    assert sorted(orphans[1]) == [False, True]
    for run in (*before, *after):
        assert is_through(trials[trial_of(run)]) != is_orphan(now[run.info.run_id])


def test_each_trial_that_counts_has_its_run(site, through):
    """One, closed as what became of it, below its scheme's; all others are disowned."""
    runs, trials = site.runs(), site.trials()
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    assert {run.info.status for run in runs if is_orphan(run)} == {"KILLED"}
    runs = [run for run in runs if not is_orphan(run)]
    (parent,) = (run for run in runs if has(run, tuning="study"))
    assert parent.info.status == "FINISHED"
    of_scheme = {r.data.tags["initflow.scheme"]: r for r in runs if has(r, tuning="scheme")}
    assert set(of_scheme) == set(SCHEMES)
    assert len([run for run in runs if has(run, tuning="scheme")]) == len(SCHEMES)
    assert {run.data.tags[PARENT] for run in of_scheme.values()} == {parent.info.run_id}
    of_trials = [run for run in runs if has(run, tuning="trial")]
    counted = {key: trial for key, trial in trials.items() if is_through(trial)}
    assert sorted(map(trial_of, of_trials)) == sorted(counted)
    statuses = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED"}
    for run in of_trials:
        scheme, _ = trial_of(run)
        trial = counted[trial_of(run)]
        assert run.data.tags[PARENT] == of_scheme[scheme].info.run_id
        assert run.info.status == statuses[trial.state]
        assert float(run.data.params["lr"]) == trial.params["lr"]
        if trial.state == TrialState.COMPLETE:
            seen = site.client.get_metric_history(run.info.run_id, "accuracy/validation")
            assert trial.value == max(metric.value for metric in seen if metric.step)
            assert run.data.tags["initflow.outcome"] == "finished"


def test_the_best_settings_are_tested(site, through):
    """Under each fresh seed once, by networks that saw all images."""
    trials = site.trials()
    tested = [run for run in site.runs() if has(run, tuning="tuned") and not is_orphan(run)]
    assert sorted(
        (run.data.tags["initflow.scheme"], run.data.params["seed"]) for run in tested
    ) == [(scheme, str(seed)) for scheme, seed in product(SCHEMES, range(1, SEEDS + 1))]
    for run in tested:
        scheme = run.data.tags["initflow.scheme"]
        own = [t for (s, _), t in trials.items() if s == scheme and t.state == TrialState.COMPLETE]
        best = max(own, key=lambda trial: (trial.value, -trial.number))
        assert float(run.data.params["lr"]) == best.params["lr"]
        assert 0 < run.data.metrics["accuracy/test"] <= 1


def test_the_password_is_told_nobody(site, through, tmp_path):
    """Runs' parameters and files are for many eyes."""
    for run in site.runs():
        assert PASSWORD not in str(run.data.params)
        assert PASSWORD not in str(run.data.tags)
        if PARENT not in run.data.tags and not is_orphan(run):
            folder = mlflow.artifacts.download_artifacts(
                run_id=run.info.run_id, tracking_uri=site.server, dst_path=str(tmp_path)
            )
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            assert {"config.json", "report.html"} <= {path.name for path in files}
            assert not [path.name for path in files if PASSWORD.encode() in path.read_bytes()]


def test_the_command_prints_its_own_words(site, through):
    """Not MLflow's or Ray's, and no password."""
    printed = site.printed()
    assert re.match(r"\s*scheme +lr +gamma ", printed)
    assert "🏃" not in printed
    assert f"Study {STUDY} is kept in postgresql://initflow:***@{HOST}:" in printed
    assert PASSWORD not in printed


@pytest.mark.parametrize(
    ("kind", "own"),
    [("relu", {"activations": "relu"}), ("gru", {"model": "gru", "hidden": "5", "epochs": 1})],
    ids=["mlp", "gru"],
)
def test_networks_compared_on_a_cluster_are_those_of_this_machine(site, through, driver, kind, own):
    """Bit for bit, in the same runs, by what is left of the cluster."""
    settings = SMALL | own
    on_nodes = CompareConfig(**settings, stack=2)
    here = CompareConfig(**settings | {"backend": "local", "workers": 1}, threads=1)
    compare(on_nodes, experiment=f"{kind} on nodes")
    compare(here, experiment=f"{kind} here")
    found = weights(site, f"{kind} on nodes")
    assert set(found) == {f"{s} {kind} seed {n}" for s, n in product(SCHEMES, range(SEEDS))}
    assert found == weights(site, f"{kind} here")
    assert {run.info.status for run in site.runs(f"{kind} on nodes")} == {"FINISHED"}

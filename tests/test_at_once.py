"""Processes that start at the same moment: on an empty store, on one file, on one data cache.

They are forks of one that has imported what takes seconds, let go together.
"""

import collections
import contextlib
import functools
import hashlib
import http.server
import json
import os
import sqlite3
import subprocess
import sys
import threading

import pytest

from tests.conftest import ROOT, small_mnist, write_raw
from tests.serving import QuietServer

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
]

TRIALS = 3  # of each study
WARM = """
import json, os, sys, traceback
import mlflow, sklearn.model_selection, torch, torchvision.datasets
from initflow.experiments import failures, train as training
from initflow.experiments.tuning import running, searches, storages, studies
from initflow.training import datasets
from initflow.core.configurations import TrainConfig
from initflow.errors import StudyError

def train(n, folder, chosen):
    os.environ.update(chosen, INITFLOW_OUTBOX=folder + "/outbox")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    config = TrainConfig(
        dataset="digits", hidden="16", epochs=1, probe=0, threads=1, log_model=False, seed=n
    )
    failures.log_figures = lambda *_: {}  # which take longest, and meet nobody
    return training.train(config).run_id

def load(n, folder, mirror, resources):
    theirs = torchvision.datasets.MNIST
    theirs.mirrors, theirs.resources = [mirror], [tuple(pair) for pair in resources]
    return datasets.load(TrainConfig(data_dir=folder + "/data")).digest

def study(n, storage, name):
    search = searches.Search(
        storage, name.format(n), (0.1, 1.0), (0.5, 1.0), "random", "none", n, 10, 5
    )
    try:
        with storages.locked(storage, name.format(n)):
            mine = studies.Study(search, {}, (0.5, 0.9))
            for asked in mine.ask(TRIALS):
                trying = running.RunningTrials(search, [asked])
                trying.report(asked.number, 5, 0.1)
                trying.finished(asked.number, asked.lr)
            return len(mine.trials())
    except StudyError as error:
        return str(error)

torch.set_num_threads(1)
print(flush=True)
for line in sys.stdin:
    work, processes, *given = json.loads(line)
    waiting, gate = os.pipe()
    children = []
    for n in range(processes):
        answer, mine = os.pipe()
        if not os.fork():
            os.close(gate)
            os.read(waiting, 1)  # until all are there and the gate is closed
            try:
                os.chdir(given[0]) if os.path.isdir(given[0]) else None
                outcome = globals()[work](n, *given)
            except BaseException:
                outcome = traceback.format_exc()
            os.write(mine, json.dumps(outcome).encode())
            os._exit(0)
        os.close(mine)
        children.append(answer)
    os.close(waiting)
    os.close(gate)
    print(json.dumps([json.load(os.fdopen(answer)) for answer in children]), flush=True)
    for _ in children:
        os.wait()
"""


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """The process that is forked."""
    home = tmp_path_factory.mktemp("home")
    with subprocess.Popen(
        [sys.executable, "-c", f"TRIALS = {TRIALS}\n{WARM}"],
        cwd=home,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        yield process
        process.stdin.close()


@pytest.fixture
def at_once(warm):
    """What each of so many processes makes of the same work."""

    def carry_out(processes, work, *given):
        warm.stdin.write(json.dumps([work, processes, *given]) + "\n")
        warm.stdin.flush()
        return json.loads(warm.stdout.readline())

    return carry_out


def rows(file, query):
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
        return database.execute(query).fetchall()


@pytest.mark.parametrize(
    ("processes", "chosen"), [(2, {"MLFLOW_EXPERIMENT_NAME": "chosen"}), (8, {})]
)
def test_the_first_uses_of_an_empty_store(tmp_path, at_once, processes, chosen):
    """Each leaves its whole run, all in one experiment."""
    run_ids = at_once(processes, "train", str(tmp_path), chosen)
    store = tmp_path / "mlflow.db"
    kept = rows(store, "SELECT run_uuid, status, experiment_id FROM runs")
    assert {run for run, _, _ in kept} == set(run_ids)
    assert {status for _, status, _ in kept} == {"FINISHED"}
    assert len({experiment for _, _, experiment in kept}) == 1
    seeds = rows(store, "SELECT value FROM params WHERE key = 'seed'")
    assert sorted(int(seed) for (seed,) in seeds) == list(range(processes))
    of_runs = "SELECT run_uuid, count(*) FROM {} GROUP BY run_uuid"
    for table in ("metrics", "params", "tags"):
        counts = rows(store, of_runs.format(table))
        assert len(counts) == processes
        assert len({count for _, count in counts}) == 1


@pytest.fixture
def mirror(tmp_path):
    """A local server of a small MNIST, which counts what is asked for: (address, files, counts)."""
    raw = write_raw(tmp_path / "served", small_mnist(), packed=True)
    counts = collections.Counter()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            counts[self.path.strip("/")] += 1
            super().do_GET()

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(raw))
    with QuietServer(handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        checksums = [
            (path.name, hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest())
            for path in sorted(raw.iterdir())
        ]
        yield f"http://127.0.0.1:{server.server_port}/", checksums, counts
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("processes", [2, 8])
def test_the_first_uses_of_a_data_set(tmp_path, at_once, mirror, processes):
    """One downloads it, once; the others wait, and all have the same."""
    address, checksums, counts = mirror
    (tmp_path / "alone").mkdir()
    at_once(1, "load", str(tmp_path / "alone"), address, checksums)
    of_one = counts.copy()  # torchvision asks for each twice, at first for where it is
    digests = at_once(processes, "load", str(tmp_path), address, checksums)
    assert len(digests) == processes
    assert len(set(digests)) == 1
    assert len(digests[0]) == 64
    assert of_one.keys() == {name for name, _ in checksums}
    assert counts - of_one == of_one
    home = tmp_path / "data" / "MNIST"
    files = {path.name: path.read_bytes() for path in (home / "raw").glob("*-ubyte")}
    assert files == small_mnist()
    assert [path.name for path in home.iterdir()] == ["raw"]
    assert not list((tmp_path / "data").glob(".download-*"))


@pytest.mark.parametrize("processes", [2, 8])
@pytest.mark.parametrize("file", ["studies.db", "studies.journal"])
def test_the_first_studies_in_one_file(tmp_path, at_once, processes, file):
    """Each of its own: none is lost, none fails because the file was not there."""
    storage = f"sqlite:///{tmp_path / file}" if file.endswith(".db") else str(tmp_path / file)
    assert at_once(processes, "study", storage, "study {}") == [TRIALS] * processes
    if file.endswith(".db"):
        query = "SELECT study_id, count(*) FROM trials WHERE state = 'COMPLETE' GROUP BY study_id"
        assert [count for _, count in rows(tmp_path / file, query)] == [TRIALS] * processes


def test_one_study_is_one_processs(tmp_path, at_once):
    """Of eight that want it at once one has it; the others are told in a line, or come after it."""
    answers = at_once(8, "study", str(tmp_path / "studies.journal"), "the same")
    taken = "study 'the same' is being tuned by another process"
    assert TRIALS in answers
    assert all(isinstance(a, int) or a.startswith(taken) for a in answers), answers
    assert max(a for a in answers if isinstance(a, int)) == TRIALS * sum(
        isinstance(a, int) for a in answers
    )

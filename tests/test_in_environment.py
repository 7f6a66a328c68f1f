"""Every entry point in the environment that MLflow builds, from a clone with nothing installed.

It installs some 6 GB, and is no part of what developers run all day: `make test-project` runs it.
"""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest

from tests import outside
from tests.conftest import ROOT, SMALL_TABLE
from tests.network import Server
from tests.repository import committed
from tests.test_end_to_end import BIN, free_port, runs

pytestmark = pytest.mark.project

# The README's.
COMMAND = "mlflow run . --env-manager uv --experiment-name initflow -P init=he -P dataset=digits"
SMALL = ("dataset=digits", "hidden=8", "epochs=1", "eval_every=15", "probe=50")
PAIR = ("inits=he,critical", "activations=tanh", "seeds=2", "workers=2", *SMALL)


class Site:
    """A clone, the store beside it, and what is needed to run something in it."""

    def __init__(self, folder):
        self.clone, self.store, self.environments = folder / "clone", folder, folder / "envs"
        self.clone.mkdir()
        committed(self.clone)
        self.shell = {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "MLFLOW_ENV_ROOT": str(self.environments),
            "INITFLOW_OUTBOX": str(folder / "outbox"),
        }

    def run(self, *command, **more):
        """What ``command`` prints in the clone, where it is to end well."""
        return outside.run(self.clone, *command, **self.shell | more)

    def entry_point(self, name, *parameters, experiment=None, **more):
        options = [option for parameter in parameters for option in ("-P", parameter)]
        command = ("mlflow", "run", ".", "-e", name, "--env-manager", "uv")
        return self.run(*command, "--experiment-name", experiment or name, *options, **more)

    @property
    def python(self):
        """That of the environment, in which initflow is no distribution."""
        (python,) = self.environments.glob("mlflow-*/bin/python")
        return python


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The clone, after the first network was trained in it."""
    made = Site(tmp_path_factory.mktemp("project"))
    made.run(*shlex.split(COMMAND))
    yield made
    shutil.rmtree(made.environments)


def test_nothing_is_installed(site):
    """Neither in the clone nor in the environment; the source is the clone's."""
    assert not list(site.clone.rglob("*.egg-info"))
    program = (
        "import importlib.metadata as m, initflow; print(initflow.__file__)\n"
        "print([d.name for d in m.distributions() if 'initflow' in d.name])"
    )
    assert site.run(site.python, "-c", program) == f"{site.clone}/initflow/__init__.py\n[]\n"


ENTRY_POINTS = {
    "train": (("init=lsuv", *SMALL), "test accuracy after", {"replay.json", "signals.png"}),
    "diagnose": (
        ("inits=he,critical", "depth=3", "dataset=digits"),
        "critical",
        {"diagnosis.json", "schemes_by_layer.png"},
    ),
    "phase": (("inits=he,critical", "points=5"), "critical", {"phase.csv", "phase.png"}),
    "compare": (PAIR, "2 seeds", {"comparison.csv", "report.html", "accuracies.png"}),
    "tune": (
        ("inits=he,critical", "trials=2", "seeds=2", "workers=2", *SMALL),
        "Each at its best",
        {"tuning.csv", "report.html", "tuned_and_untuned.png"},
    ),
    "trainability": (
        ("dataset=digits", "points=2", "depths=1,3", "lrs=0.1", "updates=20", "workers=2"),
        "trainability.csv has the run of every network",
        {"trainability.csv", "trainability.json", "trainability.png", "report.html"},
    ),
    "rates": (
        ("inits=he,critical", "rates=3", "updates=20", "seeds=2", "hidden=8", "dataset=digits"),
        "critical",
        {"rates.csv", "report.html", "rates.png"},
    ),
    "reproduce": (
        ("table=small.toml", "seeds=2", "workers=2"),
        "85.00",
        {"reproduction.json", "report.html", "published_and_ours.png"},
    ),
}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_every_entry_point_works(site, name):
    """To the end: its table printed, its numbers, figures and report in its run."""
    (site.clone / "small.toml").write_text(SMALL_TABLE)
    parameters, said, files = ENTRY_POINTS[name]
    assert said in site.entry_point(name, *parameters)
    (parent,) = (
        run for run in runs(site.store) if run.data.tags.get("mlflow.project.entryPoint") == name
    )
    assert parent.info.status == "FINISHED"
    folder = parent.info.artifact_uri.removeprefix("file://")
    assert files <= {path.name for path in Path(folder).iterdir()}


def test_a_run_is_verified_and_exported(site, tmp_path):
    """By the entry point, and by the command of the clone."""
    (trained,) = (
        run for run in runs(site.store) if run.data.tags.get("mlflow.project.entryPoint") == "main"
    )
    said = site.entry_point("verify", f"run_id={trained.info.run_id}")
    assert "identical" in said
    command = (site.python, "-m", "initflow")
    site.run(*command, "export", trained.info.run_id, "--to", tmp_path / "bundle")
    assert "identical" in site.run(*command, "verify", tmp_path / "bundle")


def test_commands_beside_the_entry_points(site):
    """What has none is given as `python -m initflow`."""
    command = (site.python, "-m", "initflow")
    assert "0 entries were sent" in site.run(*command, "sync")
    assert "critical" in site.run(*command, "schemes")
    found = json.loads(site.run(*command, "plugins", "list", "--json"))["plugins"]
    assert {"critical", "looks-linear", "lsuv", "template"} <= {one["name"] for one in found}


def test_on_a_ray_cluster(site):
    """Where the environment has the extra: its workers import the clone's source, too."""
    pins = (ROOT / "requirements-dev.lock").read_text().splitlines()
    (ray,) = (pin for pin in pins if pin.startswith("ray=="))
    site.run("uv", "pip", "install", "--python", site.python, ray)
    server, port = Server(site.store), free_port()
    server.start()
    command = site.python.parent / "ray"
    site.run(command, "start", "--head", f"--port={port}", "--num-cpus=2", "--disable-usage-stats")
    try:
        said = site.entry_point(
            "compare",
            *PAIR,
            "backend=ray",
            experiment="ray",
            MLFLOW_TRACKING_URI=server.address,
            RAY_ADDRESS=f"127.0.0.1:{port}",
        )
    finally:
        site.run(command, "stop", "--force")
        server.kill()
    assert "2 seeds" in said

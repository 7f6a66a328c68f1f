"""What pip installs of the distributions, in fresh environments where no checkout is in sight.

Each takes some 6 GB for a while: `make test-package` runs it.
"""

import json
import os
import sys
from pathlib import Path

import pytest

import initflow
from tests import outside
from tests.conftest import ROOT
from tests.repository import committed

pytestmark = pytest.mark.project
UV = Path(sys.executable).with_name("uv")
WATCH = """
import mlflow, torch
import initflow as inf
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
inf.initialize(model, "auto")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with mlflow.start_run() as run, inf.watch(model, every=1):
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(20, 8)).square().sum().backward()
        optimizer.step()
client = mlflow.MlflowClient()
print(len(client.get_metric_history(run.info.run_id, "gradient_variance/0")))
try:
    inf.train(dataset="digits")
except inf.SettingError as error:
    print(error)
"""


class Environment:
    """A fresh virtual environment, and a folder that its commands are given in."""

    def __init__(self, folder):
        self.folder = folder
        own, outer = folder / "venv" / "bin", os.environ["PATH"]
        self.shell = {
            "PATH": f"{own}{os.pathsep}{outer}",
            "VIRTUAL_ENV": str(folder / "venv"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "INITFLOW_OUTBOX": str(folder / "outbox"),
        }
        self.run(UV, "venv", "--quiet", "--python", sys.executable, "venv")

    def install(self, *what):
        """With what the lock has, as far as it is needed."""
        self.run(UV, "pip", "install", "--quiet", "--constraint", ROOT / "requirements.lock", *what)

    def run(self, *command):
        return outside.run(self.folder, *command, **self.shell)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with both distributions, each as it would be uploaded."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "source").mkdir()
    committed(folder / "source")
    outside.run(folder, UV, "build", "--quiet", "--out-dir", folder, "source")
    return folder


def test_the_wheel_brings_all_that_its_commands_need(built, tmp_path):
    """The command, the schemes that come with it, a network, and a project of one's own."""
    there = Environment(tmp_path)
    (wheel,) = built.glob("*.whl")
    there.install(wheel)
    assert there.run("initflow", "--version") == f"initflow {initflow.__version__}\n"
    assert there.run("initflow", "doctor").endswith("\nNothing is broken.\n")
    listed = json.loads(there.run("initflow", "plugins", "list", "--json"))["plugins"]
    assert {"critical", "looks-linear", "lsuv"} <= {p["name"] for p in listed if p["shipped"]}
    small = ("--dataset", "digits", "--hidden", "8", "--epochs", "1", "--activation", "tanh")
    done = json.loads(there.run("initflow", "train", "--init", "critical", *small, "--json"))
    replayed = there.run("initflow", "verify", done["run_id"])
    assert "Identical" in replayed
    there.run("initflow", "project", "mine")
    parameters = ("-P", "init=he", "-P", "dataset=digits", "-P", "epochs=1")
    there.run("mlflow", "run", "mine", "--env-manager", "local", *parameters)


def test_watching_takes_torch_and_mlflow_and_what_is_missing_then_can_be_added(built, tmp_path):
    """By the source distribution, without its dependencies; then what the error says is typed."""
    there = Environment(tmp_path)
    there.install("torch", "mlflow")
    (source,) = built.glob("*.tar.gz")
    there.install("--no-deps", source)
    steps, error = there.run("python", "-c", WATCH).splitlines()[-2:]
    assert steps == "3"
    before, _, typed = error.partition(": pip install ")
    assert before.startswith("initflow.train needs the package ")
    extra = typed.strip("'").removeprefix("initflow")
    there.install(f"initflow{extra} @ {source.as_uri()}")
    small = ("--dataset", "digits", "--hidden", "8", "--epochs", "1")
    there.run("initflow", "train", *small)

"""What pip installs of the distributions, in fresh environments where no checkout is in sight.

Each takes some 6 GB for a while: `make test-package` runs it.
"""

import json
import os
import re
import shutil
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
    """A fresh virtual environment, and a folder that its commands are given in.

    ``built`` stands in for the package index that initflow comes from.
    """

    def __init__(self, folder, built):
        self.folder, own = folder, folder / "venv" / "bin"
        others = [one for one in os.environ["PATH"].split(os.pathsep) if Path(one) != UV.parent]
        self.shell = {
            "PATH": os.pathsep.join([str(own), *others]),
            "VIRTUAL_ENV": str(folder / "venv"),
            "UV_FIND_LINKS": str(built),
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "MLFLOW_ENV_ROOT": str(folder / "envs"),
            "INITFLOW_OUTBOX": str(folder / "outbox"),
        }
        self.run(UV, "venv", "--quiet", "--python", sys.executable, "venv")
        (own / "uv").symlink_to(UV)  # which MLflow looks for

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
    """As of a package index: the command, schemes, a network, a project that MLflow sets up."""
    there = Environment(tmp_path, built)
    there.install(f"initflow=={initflow.__version__}")
    assert there.run("initflow", "--version") == f"initflow {initflow.__version__}\n"
    assert there.run("initflow", "doctor").endswith("\nNothing is broken.\n")
    listed = json.loads(there.run("initflow", "plugins", "list", "--json"))["plugins"]
    assert {"critical", "looks-linear", "lsuv"} <= {p["name"] for p in listed if p["shipped"]}
    small = ("--dataset", "digits", "--hidden", "8", "--epochs", "1", "--activation", "tanh")
    done = json.loads(there.run("initflow", "train", "--init", "critical", *small, "--json"))
    replayed = there.run("initflow", "verify", done["run_id"])
    assert "Identical" in replayed
    there.run("initflow", "project", "mine")
    parameters = ("-P", "init=template", "-P", "dataset=digits", "-P", "epochs=1")
    said = there.run("mlflow", "run", "mine", "--env-manager", "uv", *parameters)
    assert re.search(r"template .* \d\d\.\d\d% ", said)
    (its,) = (tmp_path / "envs").glob("mlflow-*")
    assert len(list(its.glob("lib/*/site-packages/initflow/shipped"))) == 1
    shutil.rmtree(its)


def test_watching_takes_torch_and_mlflow_and_what_is_missing_then_can_be_added(built, tmp_path):
    """By the source distribution, without its dependencies; then what the error says is typed."""
    there = Environment(tmp_path, built)
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

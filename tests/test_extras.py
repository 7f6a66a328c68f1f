"""What each part of the package needs: watching torch and mlflow alone, others say what to type."""

import json
import tomllib

import pytest
from packaging.requirements import Requirement

from initflow.errors import EXTRAS, SettingError, naming_extras
from tests.conftest import ROOT, python

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"scikit-learn": "sklearn"}  # by the distribution's name, where it is another one
ABSENT = sorted(name for name in EXTRAS if EXTRAS[name] in ("experiments", "tune"))

WITHOUT = f"""
import sys

class Without:
    '''A finder of modules that does not find those of ABSENT.'''

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        absent = name.partition(".")[0] in {ABSENT}
        return None if absent else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import json, mlflow, torch
import initflow as inf

model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
images, labels = torch.randn(32, 8), torch.randint(0, 4, (32,))
loss = torch.nn.functional.cross_entropy
inf.initialize(model, "auto")
found = inf.inspect(model, (images, labels), loss)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with mlflow.start_run() as run, inf.watch(model, every=1):
    for _ in range(2):
        optimizer.zero_grad()
        loss(model(images), labels).backward()
        optimizer.step()
logged = mlflow.get_run(run.info.run_id).data

def error(function, *arguments, **settings):
    try:
        function(*arguments, **settings)
    except inf.SettingError as error:
        return str(error)

import initflow.cli.process
print(json.dumps({{
    "measured": found.metrics()["activation_variance/0"],
    "logged": logged.metrics["activation_variance/0"],
    "tags": logged.tags,
    "compare": error(lambda: inf.compare),
    "figure": error(found.figures),
    "command": initflow.cli.process.main(["schemes"]),
}}))
"""


def test_watching_needs_torch_and_mlflow_alone(tmp_path, monkeypatch):
    """With none of the others there; what is missing where it is needed is one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INITFLOW_OUTBOX")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    said = json.loads(python(WITHOUT).splitlines()[-1])
    assert said["measured"] > 0
    assert said["logged"] > 0
    assert "initflow.watch_failed" not in said["tags"]
    ending = "needs the package {}: pip install 'initflow[experiments]'".format
    assert said["compare"] == f"initflow.compare {ending('safetensors')}"
    assert said["figure"] == f"a figure {ending('matplotlib')}"
    assert said["command"] == 2


@pytest.mark.parametrize("package", EXTRAS)
def test_every_extra_that_an_error_names_brings_the_package(package):
    """Also where a part of it is what is not found; other errors are left as they are."""
    distributions = {Requirement(r).name for r in PROJECT["optional-dependencies"][EXTRAS[package]]}
    assert package in {MODULES.get(name, name) for name in distributions}
    with pytest.raises(SettingError) as error, naming_extras("this"):
        raise ModuleNotFoundError("No module", name=f"{package}.part")
    assert str(error.value) == (
        f"this needs the package {package}: pip install 'initflow[{EXTRAS[package]}]'"
    )
    with pytest.raises(ModuleNotFoundError), naming_extras("this"):
        raise ModuleNotFoundError("No module", name=f"{package}_of_others")


def test_a_plain_install_has_all_that_the_commands_need():
    """What an extra names of it again has the same bounds."""
    optional = PROJECT["optional-dependencies"]
    assert {*optional["experiments"], *optional["tune"]} < set(PROJECT["dependencies"])

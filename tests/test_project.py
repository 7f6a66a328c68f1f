"""MLproject, conda.yaml, the pins and the packaging say the same as the code."""

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields

import pytest
import yaml
from mlflow.projects import utils
from mlflow.utils.environment import _PythonEnv
from packaging.requirements import Requirement

from initflow.core.configurations import (
    TrainConfig,
    VerifyConfig,
)
from tests.commands import SETTINGS as COMMANDS
from tests.commands import WITH_A_RUN, read
from tests.conftest import ROOT
from tests.test_architecture import imports

PROJECT = yaml.safe_load((ROOT / "MLproject").read_text())
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = [
    Requirement(line)
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
]
STANDARD = {*sys.stdlib_module_names, "initflow"}
SETTINGS = {"main": TrainConfig, **{name: COMMANDS[name] for name in WITH_A_RUN}}
REQUIRED = {"verify": ["run_id"]}  # what has no default, and is no option but an argument
every_entry_point = pytest.mark.parametrize("name", PROJECT["entry_points"])


def test_mlflow_reads_the_project():
    """With its name and its entry points."""
    project = utils.load_project(str(ROOT))
    assert project.name == "initflow"
    assert set(project._entry_points) == set(SETTINGS)


@every_entry_point
def test_parameters_and_defaults_are_those_of_the_configuration(name):
    """None missing, none besides, each default the same text."""
    parameters = PROJECT["entry_points"][name]["parameters"]
    required = [key for key, parameter in parameters.items() if "default" not in parameter]
    assert required == REQUIRED.get(name, [])
    defaults = {key: str(p["default"]) for key, p in parameters.items() if key not in required}
    assert defaults == SETTINGS[name]().as_text()


@every_entry_point
def test_every_parameter_is_passed_to_its_option(name):
    """Once, and nothing else is."""
    command = PROJECT["entry_points"][name]["command"]
    passed = re.findall(r"--([a-z0-9-]+) \{([a-z0-9_]+)\}", command)
    assert passed == [(s.name.replace("_", "-"), s.name) for s in fields(SETTINGS[name])]
    bare = re.sub(r" --[a-z0-9-]+ \{[a-z0-9_]+\}", "", command)
    arguments = [f"{{{key}}}" for key in REQUIRED.get(name, [])]
    assert bare == " ".join(["python -m initflow", name.replace("main", "train"), *arguments])


@every_entry_point
def test_the_command_that_mlflow_builds_is_read_back(name, tmp_path):
    """From the project's defaults to the configuration's, through MLflow's own quoting."""
    entry_point = utils.load_project(str(ROOT)).get_entry_point(name)
    settings = SETTINGS[name]
    given = {"inits": "he:mode=fan_out"}
    if name == "reproduce":
        given = {"table": "assignment"}
    elif name == "trainability":
        given = {"lrs": "0.1,0.01"}
    elif settings in (TrainConfig, VerifyConfig):
        given = {"init": "normal:std=0.05"}
    required = dict.fromkeys(REQUIRED.get(name, []), "x y")
    command = entry_point.compute_command(given | required, str(tmp_path))
    *_, called, words = command.split(" ", 4)
    config, more = read(called, words)
    more = {key: more[key] for key in more.keys() - {"experiment"}}
    assert more == required
    assert config == settings(**given)


def test_the_three_managers_read_the_same_from_conda_yaml():
    """What uv and virtualenv take of it is all that conda installs, but for pip itself."""
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())
    *packages, pip = conda["dependencies"]
    read = _PythonEnv.from_conda_yaml(str(ROOT / "conda.yaml"))
    assert packages == [f"python={read.python}", *read.build_dependencies]
    assert pip == {"pip": read.dependencies}
    assert read.dependencies == ["-r requirements.lock"]


def test_the_environment_holds_everything_declared_and_not_the_project():
    """Every dependency is pinned within its bounds; the source is the checkout's."""
    pinned = {}
    for requirement in LOCK:
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        pinned.setdefault(requirement.name, []).append(specifier.version)
    for declared in map(Requirement, PYPROJECT["project"]["dependencies"]):
        assert declared.name in pinned
        assert all(declared.specifier.contains(version) for version in pinned[declared.name])
        assert str(declared.specifier).startswith(">=")
    assert "initflow" not in pinned


def name_of(requirement):
    return Requirement(requirement).name


def test_every_import_is_declared():
    """No package is used that only another one happens to bring; some are an extra's."""
    project = PYPROJECT["project"]
    declared = {Requirement(d).name for d in project["dependencies"]}
    optional = project["optional-dependencies"]
    modules = {
        name.split(".")[0] for path in (ROOT / "initflow").rglob("*.py") for name in imports(path)
    }
    names = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
    used = {names.get(module, module) for module in modules - STANDARD}
    others = used - declared
    assert others == {"lightning", "transformers"}
    assert all(name in map(name_of, optional[name]) for name in others)
    assert declared == used - others


def test_the_pins_name_no_index_no_host_no_path():
    """And none of the CUDA libraries, which torch pins itself and its CPU build does not need."""
    for name in ("requirements.lock", "requirements-dev.lock", "requirements-docs.lock"):
        text = (ROOT / name).read_text()
        assert not re.search(r"://|--|file:|@", text)
        assert not re.search(r"^(nvidia-|cuda-|triton=)", text, re.MULTILINE)


def test_this_environment_is_the_pinned_one():
    """The tests run with what `mlflow run` installs."""
    from importlib.metadata import version

    for requirement in LOCK:
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(version(requirement.name)), requirement


def test_there_is_no_uv_lock():
    """It would make `mlflow run --env-manager uv` ignore conda.yaml and fail."""
    assert not (ROOT / "uv.lock").exists()


@pytest.mark.parametrize("ready", [True, False])
def test_a_second_make_installs_nothing(tmp_path, ready):
    """Once the environment is there and newer than the pins; else it is made."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "requirements-dev.lock"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    if ready:
        (tmp_path / ".venv").mkdir()
        (tmp_path / ".venv" / ".ready").touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make", "--dry-run", "run"],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert ("pip install" in done.stdout) != ready
    assert "mlflow run . --env-manager local" in done.stdout

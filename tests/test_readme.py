"""The README is true: its commands run, its tables are the code's, its places are there."""

import ast
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import urllib.request
from dataclasses import fields

import mlflow
import pytest

import initflow
from initflow.core.configurations import (
    ACTIVATION_NAMES,
    DATASET_NAMES,
    VERDICTS,
    CompareConfig,
    DiagnoseConfig,
    ReproduceConfig,
    TrainConfig,
    TuneConfig,
    VerifyConfig,
)
from initflow.initializers.built_in import BUILT_IN
from initflow.initializers.plugins import load_all
from initflow.testing import assert_initializer_contract
from initflow.tracking import ui
from tests.conftest import ROOT
from tests.test_end_to_end import environment, free_port, run, runs

README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci" / "run").read_text()
CONSOLE = "".join(re.findall(r"```console\n(.*?)```", README, re.DOTALL))
COMMANDS = re.findall(r"^\$ (.*)$", CONSOLE, re.MULTILINE)

# Where else a command of the README is run; all others are run here, in a folder of their own.
ELSEWHERE = {
    "make run": "step make run\n",
    "source .venv/bin/activate": "step source .venv/bin/activate\n",
}
IN_TESTS = {
    "mlflow run . --env-manager uv --experiment-name initflow -P init=he -P dataset=digits": "site",
    "mlflow run URI -v VERSION --env-manager uv --experiment-name initflow -P init=he "
    "-P dataset=digits": "test_a_version_is_a_tag_or_a_commit_too",
    "make ui": "test_make_ui_serves_the_runs_on_this_machine_only",
    "pip install .": "test_the_package_installs_and_gives_the_command",
    "export INITFLOW_DATA_DIR=/path/to/data": "test_the_folder_is_the_option_then_the_variable",
    "mlflow run . --env-manager local --experiment-name initflow -P init=he "
    "-P data_dir=/path/to/data": "test_mlflow_run_on_the_real_mnist",
    "mlflow run . -e diagnose --env-manager local --experiment-name initflow -P inits=he "
    "-P activations=relu -P dataset=digits -P fail_on=vanishing,exploding": (
        "test_mlflow_run_diagnoses_and_guards"
    ),
    "mlflow run . -e compare --env-manager local --experiment-name initflow "
    "-P inits=normal,xavier,he -P seeds=10": "test_mlflow_run_compares",
    "mlflow run . -e tune --env-manager local --experiment-name initflow "
    "-P inits=normal,xavier,he": "test_mlflow_run_tunes",
    "initflow reproduce --table tutorial": "test_tutorial",
    "initflow verify RUN_ID": "test_the_command_tells_what_is_identical",
    "mlflow run . -e verify --env-manager local --experiment-name initflow -P run_id=RUN_ID": (
        "test_mlflow_run_verifies_a_run"
    ),
    "initflow export RUN_ID --to he-on-digits": "test_what_is_exported_needs_no_server",
    "initflow verify he-on-digits": "test_what_is_exported_needs_no_server",
    "mlflow run . -e diagnose --env-manager local --experiment-name initflow "
    "-P inits=xavier,critical -P activations=tanh -P depth=100 -P dataset=digits": (
        "test_mlflow_run_diagnoses_a_plugin"
    ),
}
HERE = [c for c in COMMANDS if c not in ELSEWHERE | IN_TESTS]


def test_every_command_is_run_somewhere():
    """By .ci/run, by a test of its own, or below; and no entry is left of one that is gone."""
    assert COMMANDS
    assert set(COMMANDS) >= ELSEWHERE.keys() | IN_TESTS.keys()
    for step in ELSEWHERE.values():
        assert step in CI
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in IN_TESTS.values():
        assert f"def {name}" in tests
    assert all(command.startswith("initflow ") for command in HERE)


@pytest.mark.end_to_end
@pytest.mark.parametrize("command", HERE)
def test_commands_of_the_command_line(tmp_path, command):
    """As they stand, each in a folder that has nothing but the plugins."""
    shutil.copytree(ROOT / "plugins", tmp_path / "plugins")
    if command == "initflow plugins check mine":
        assert run(tmp_path, *shlex.split("initflow plugins new mine")).returncode == 0
    done = run(tmp_path, *shlex.split(command))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Error" not in done.stdout


@pytest.mark.end_to_end
def test_make_ui_serves_the_runs_on_this_machine_only(tmp_path):
    """MLflow's page answers on 127.0.0.1, with the store it is given, and ends when it is told."""
    port = free_port()
    with subprocess.Popen(
        ["make", "ui", f"PORT={port}"],
        cwd=ROOT,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as make:
        try:
            told = next(line for line in make.stdout if line.startswith("MLflow's page: "))
            assert told.split()[-1].startswith(f"http://127.0.0.1:{port}/#/experiments")
            deadline = time.monotonic() + 120
            page = ""
            while not page and time.monotonic() < deadline:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
                        page = answer.read().decode()
                except OSError:
                    assert make.poll() is None
                    time.sleep(0.5)
            assert "<title>MLflow</title>" in page
            assert ui.HOST == "127.0.0.1"
            make.terminate()  # which it passes on to the command, as that does to the server
            make.communicate(timeout=120)  # until none of them holds the output
            with pytest.raises(OSError, match="refused"):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(make.pid, signal.SIGKILL)
    assert (tmp_path / "mlflow.db").is_file()


@pytest.mark.end_to_end
def test_the_python_example(tmp_path):
    """It prints the id of a run that is there, and its accuracy."""
    example, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = run(tmp_path, "python", "-c", example)
    assert done.returncode == 0, done.stderr
    (logged,) = runs(tmp_path)
    accuracy = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(logged.info.run_id)
    assert done.stdout.split() == [
        logged.info.run_id,
        str(accuracy.data.metrics["accuracy/test"]),
    ]


WATCHED = """
import mlflow
import torch

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
images, labels = torch.randn(20, 8), torch.arange(20) % 3

def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
"""


@pytest.mark.end_to_end
def test_the_example_with_any_model(tmp_path):
    """Two steps in a run, and the same keys printed."""
    _, example, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = run(tmp_path, "python", "-c", WATCHED + example)
    assert done.returncode == 0, done.stderr
    (logged,) = runs(tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    history = client.get_metric_history(logged.info.run_id, "gradient_variance/0")
    assert [metric.step for metric in history] == [0, 100]
    assert set(logged.data.metrics) == set(ast.literal_eval(done.stdout))


def test_the_table_of_parameters_is_the_configuration():
    """Names, defaults and meanings, in order."""
    _, _, section = README.partition("\n## Parameters")
    assert parameters(section) == documented(TrainConfig)


def test_the_diagnosis_parameters_are_its_configuration():
    """Those of its own in a table, the others by name."""
    section = README.partition("## What travels")[2].partition("### Signals")[0]
    rows = parameters(section)
    assert [row for row in documented(DiagnoseConfig) if row in rows] == rows
    for name, _, _ in set(documented(DiagnoseConfig)) - set(rows):
        assert f"`{name}`" in section
    for verdict in VERDICTS:
        assert f"`{verdict}`" in section


@pytest.mark.parametrize(
    ("settings", "start", "end"),
    [
        (CompareConfig, "## Comparing schemes", "### Published tables"),
        (ReproduceConfig, "### Published tables", "## Tuning"),
        (TuneConfig, "## Tuning", "## Proof"),
        (VerifyConfig, "## Proof", "## Parameters"),
    ],
)
def test_the_parameters_of_many_are_their_configuration(settings, start, end):
    """Those of its own in a table, the others by name or as those of training."""
    section = README.partition(start)[2].partition(end)[0]
    rows = parameters(section)
    assert [row for row in documented(settings) if row in rows] == rows
    left = {name for name, _, _ in set(documented(settings)) - set(rows)}
    if "All others are those of" in section:
        left -= {setting.name for setting in fields(TrainConfig)}
    for name in left:
        assert f"`{name}`" in section


def parameters(text):
    """The rows of a table of parameters."""
    return re.findall(r"^\| `(\w+)` \| `([^`]*)` \| (.*) \|$", text, re.MULTILINE)


def documented(settings):
    defaults = settings().as_text()
    return [(s.name, defaults[s.name], s.metadata["meaning"]) for s in fields(settings)]


def test_the_table_of_schemes_is_the_built_in_ones():
    """Names in order, arguments with their defaults."""
    table = README.partition("### Schemes")[2].partition("### Plugins")[0]
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \| .* \| (.*) ?\|$", table, re.MULTILINE)
    told = {}
    for names, arguments in rows:
        for name in re.findall(r"`(\w+)`", names):
            told[name] = dict(re.findall(r"`(\w+)` \(([^)]+)\)", arguments))
    assert list(told) == list(BUILT_IN)
    for name, scheme in BUILT_IN.items():
        assert told[name] == {key: str(p.default) for key, p in scheme.parameters.items()}


def test_the_table_of_plugins_is_what_is_there():
    """Names and arguments with their defaults; the example is an initializer."""
    table = README.partition("### Plugins")[2].partition("## Your own")[0]
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| (.*) \|$", table, re.MULTILINE)
    told = {name: dict(re.findall(r"`(\w+)` \(([^)]+)\)", text)) for name, text in rows}
    there = {
        plugin.name: {key: str(value) for key, value in scheme.values.items()}
        for plugin, scheme in load_all(ROOT / "plugins")
    }
    assert told == there
    (example,) = re.findall(r"```python\n(.*?)```", table, re.DOTALL)
    namespace = {"initflow": initflow}
    exec(example, namespace)  # noqa: S102 - it is the example
    assert_initializer_contract(namespace["mine"])


def test_activations_and_data_sets_are_all_named():
    """As the configuration has them."""
    for name in (*ACTIVATION_NAMES, *DATASET_NAMES):
        assert f"`{name}`" in README


def test_links_and_places_are_there():
    """Every relative link, and every file and folder of the table."""
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    places = re.findall(r"`([\w./-]+)`", README.partition("## Where things are")[2])
    names = [place for place in places if "/" in place or "." in place or place[0].isupper()]
    assert links
    assert names
    for name in {*links, *names}:
        assert (ROOT / name).exists(), name

"""The README and docs/ are true: commands run, tables are the code's, links lead somewhere."""

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
import torch
import yaml

from docs import deep
from docs import parameters as script
from initflow.cli.commands import cli
from initflow.core.configurations import (
    ACTIVATION_NAMES,
    DATASET_NAMES,
    VERDICTS,
    TrainConfig,
)
from initflow.initializers.built_in import BUILT_IN
from initflow.initializers.plugins import load_all
from initflow.testing import assert_initializer_contract
from initflow.tracking import ui
from tests.commands import SETTINGS, WITH_A_RUN, read
from tests.conftest import ROOT
from tests.test_claims import COMMANDS as OF_CLAIMS
from tests.test_end_to_end import environment, free_port, run, runs

README = (ROOT / "README.md").read_text()
OF_THE_ROOT = sorted(path.name for path in ROOT.glob("*.md"))
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
CI = (ROOT / ".ci" / "run").read_text()


def commands(text):
    """What stands behind a $ in the console blocks of a page."""
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return re.findall(r"^ *\$ (.*)$", "".join(blocks), re.MULTILINE)


def section(text, heading):
    """What stands below a heading, up to the next one that is no deeper."""
    level = len(heading) - len(heading.lstrip("#"))
    _, found, rest = text.partition(f"\n{heading}\n")
    assert found, heading
    return re.split(rf"^#{{1,{level}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def example(text, heading):
    """The first Python example below a heading."""
    return re.findall(r"```python\n(.*?)```", section(text, heading), re.DOTALL)[0]


COMMANDS = list(dict.fromkeys(c for text in (README, *PAGES.values()) for c in commands(text)))

# Where else a command is run; all others are run here, in a folder of their own.
A_MODEL = "initflow diagnose --model mine.py:build --inits he,auto --dataset digits"
ELSEWHERE = {
    "make run": "step make run\n",
    "source .venv/bin/activate": "step source .venv/bin/activate\n",
}
IN_TESTS = {
    "mlflow run . --env-manager uv --experiment-name initflow -P init=he -P dataset=digits": "site",
    "mlflow run URI -v VERSION --env-manager uv --experiment-name initflow -P init=he "
    "-P dataset=digits": "test_a_version_is_a_tag_or_a_commit_too",
    "make ui": "test_make_ui_serves_the_runs_on_this_machine_only",
    "initflow project my-project": "test_a_project_of_ones_own_runs_anywhere",
    "mlflow run my-project --env-manager local --experiment-name initflow -P init=template "
    "-P dataset=digits": "test_a_project_of_ones_own_runs_anywhere",
    "pip install --no-deps .": "test_watching_needs_torch_and_mlflow_alone",
    "pip install .": "test_pip_installs_the_checkout",
    "export INITFLOW_DATA_DIR=/path/to/data": "test_the_folder_is_the_option_then_the_variable",
    "mlflow run . --env-manager local --experiment-name initflow -P init=he "
    "-P data_dir=/path/to/data": "test_mlflow_run_on_the_real_mnist",
    "mlflow run . -e diagnose --env-manager local --experiment-name initflow -P inits=he "
    "-P activations=relu -P dataset=digits -P fail_on=vanishing,exploding": (
        "test_mlflow_run_diagnoses_and_guards"
    ),
    "mlflow run . -e trainability --env-manager local --experiment-name initflow "
    "-P activation=relu -P seeds=1": "test_mlflow_run_finds_the_trainable_depth",
    "mlflow run . -e compare --env-manager local --experiment-name initflow "
    "-P inits=normal,xavier,he -P seeds=10": "test_mlflow_run_compares",
    "mlflow run . -e tune --env-manager local --experiment-name initflow "
    "-P inits=normal,xavier,he": "test_mlflow_run_tunes",
    "initflow rates --inits normal,lecun,xavier,he": (
        "test_each_network_is_the_one_that_trains_alone"
    ),
    "initflow rates --inits xavier,he --over depth --rates 13": (
        "test_mlflow_run_tries_every_learning_rate"
    ),
    "initflow rates --inits he --over width --hidden 100x3 --widths 32,64,128,256 "
    "--parametrizations standard,mup --lr-low 0.01 --rates 13": (
        "test_the_run_has_numbers_figures_and_verdicts"
    ),
    "initflow rates --inits he --over width --hidden 100x3 --widths 64,128,256,512,1024 "
    "--parametrizations standard,mup --lr-low 0.05 --lr-high 0.1 --rates 2 --updates 4 --seeds 5": (
        "test_what_the_first_updates_change_is_that_of_a_plain_loop"
    ),
    "initflow reproduce --table tutorial": "test_tutorial",
    "initflow reproduce --table assignment --seeds 3": "test_assignment",
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
    A_MODEL: "test_the_example_of_a_diagnosis_of_a_model",
    "mlflow run . -e diagnose --env-manager local --experiment-name initflow "
    "-P model=path/to/mine.py:build -P inits=auto -P dataset=digits "
    "-P fail_on=vanishing,exploding": "test_mlflow_run_diagnoses_a_model",
    "initflow diagnose --inits mine,he --activations relu --dataset digits": (
        "test_the_first_commands_lead_from_nothing_to_a_trained_network"
    ),
    "initflow train --init mine --dataset digits": (
        "test_the_first_commands_lead_from_nothing_to_a_trained_network"
    ),
    "initflow train --init path/to/file.py:mine:gain=1.5 --dataset digits": (
        "test_functions_are_named_by_their_place"
    ),
    "initflow train --init package.module:mine --dataset digits": (
        "test_functions_are_named_by_their_place"
    ),
    "initflow train --init mine --plugins-dir plugins --dataset digits": (
        "test_it_is_the_same_to_all_commands"
    ),
    "initflow diagnose --inits mine:gain=1.5,he --activations relu --dataset digits": (
        "test_it_is_the_same_to_all_commands"
    ),
    "mlflow run . -e diagnose --env-manager local --experiment-name initflow -P inits=mine,he "
    "-P dataset=digits": "test_it_is_the_same_to_all_commands",
    "make claims": "test_figures_are_drawn_of_what_is_measured",
    "docker build -t initflow .": "test_what_the_image_is_built_of_is_there",
    'docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" initflow train --init he '
    "--dataset digits": "test_the_command_for_the_image_is_valid",
}
# On MNIST, and too long to run: that page's own test holds their options and values.
CLAIMS = {f"initflow {words}": "test_the_commands_of_the_page_are_valid" for words in OF_CLAIMS}
# On several machines: what does the same on one, in tests/cluster.py or a test.
ON_A_CLUSTER = {
    "pip install 'initflow[ray,postgresql]'": "test_on_a_ray_cluster",
    "createdb optuna && createdb mlflow": "postgresql",
    'mlflow server --host 0.0.0.0 --allowed-hosts "head:*,localhost:*" --backend-store-uri '
    "postgresql://me@localhost/mlflow --artifacts-destination /srv/mlflow": "tracking_server",
    "ray get-auth-token --generate": "ray_cluster",
    "export RAY_AUTH_MODE=token": "ray_cluster",
    "ray start --head --port=6379": "ray_cluster",
    "ray start --address=head:6379": "ray_cluster",
    "export RAY_AUTH_MODE=token RAY_ADDRESS=head:6379 MLFLOW_TRACKING_URI=http://head:5000": (
        "driver"
    ),
    "initflow tune --inits normal,xavier,he --trials 200 --backend ray --workers 16 "
    "--storage postgresql://me@head/optuna": "test_no_trial_is_lost_or_counted_twice",
    "initflow compare --seeds 50 --backend ray --workers 16": (
        "test_networks_compared_on_a_cluster_are_those_of_this_machine"
    ),
}
# On MNIST, many minutes long: their options and values are held below, the rest on the digits.
LARGE = {
    "initflow trainability --depths 5,10,15,20,30,40,60,100 --workers 2": (
        "test_the_commands_of_large_pictures_are_valid"
    ),
    "initflow trainability --activation relu --points 13 --depths 5,10,20,40,80 --lrs 0.001,0.01 "
    "--seeds 1": "test_the_commands_of_large_pictures_are_valid",
}
# Measured for the page: as large ones, their options and values are held below.
CHOOSING = dict.fromkeys(commands(PAGES["choosing.md"]), "test_the_commands_of_choosing_are_valid")
THERE = ELSEWHERE | IN_TESTS | CLAIMS | ON_A_CLUSTER | LARGE | CHOOSING
HERE = [c for c in COMMANDS if c not in THERE]


def test_every_command_is_run_somewhere():
    """By .ci/run, by a test of its own, or below; and no entry is left of one that is gone."""
    for page, text in PAGES.items():
        assert text.count("```console") == 0 or commands(text), page
    assert commands(README)
    assert set(COMMANDS) >= THERE.keys()
    for step in ELSEWHERE.values():
        assert step in CI
    files = (*(ROOT / "tests").rglob("test_*.py"), ROOT / "tests" / "cluster.py")
    tests = "".join(path.read_text() for path in files)
    for name in (IN_TESTS | CLAIMS | ON_A_CLUSTER | LARGE | CHOOSING).values():
        assert f"def {name}" in tests
    assert all(command.startswith("initflow ") for command in HERE)


@pytest.mark.parametrize("command", [c for c in ON_A_CLUSTER if c.startswith("initflow ")])
def test_the_commands_of_a_cluster_are_valid(command):
    """Every option and value."""
    _, name, words = command.split(" ", 2)
    settings, more = read(name, words)
    assert more == {"experiment": None}
    assert (settings.backend, settings.workers) == ("ray", 16)


@pytest.mark.parametrize("command", LARGE)
def test_the_commands_of_large_pictures_are_valid(command):
    """Every option and value; the picture is of as many networks as it says."""
    _, name, words = command.split(" ", 2)
    settings, _ = read(name, words)
    assert settings.points * len(settings.depths) * len(settings.lrs) * settings.seeds > 100


@pytest.mark.parametrize("command", CHOOSING)
def test_the_commands_of_choosing_are_valid(command):
    """Every option and value, and each model is one that its function builds."""
    _, name, words = command.split(" ", 2)
    settings, _ = read(name, words)
    path, _, function = settings.model.partition(":")
    assert path == "docs/deep.py"
    model = getattr(deep, function)((8, 8), 10)
    assert model(torch.rand(2, 8, 8)).shape == (2, 10)


@pytest.mark.end_to_end
@pytest.mark.parametrize("command", HERE)
def test_commands_of_the_command_line(tmp_path, monkeypatch, command):
    """As they stand, each in a folder that has nothing but the plugins, or what an example made."""
    shutil.copytree(ROOT / "plugins", tmp_path / "plugins")
    if "iris.npz" in command:
        monkeypatch.chdir(tmp_path)
        exec(example(PAGES["training.md"], "### Arrays of your own"), {})  # noqa: S102 - it is one
    if "net.py" in command:
        (tmp_path / "net.py").write_text(example(PAGES["training.md"], "## Models"))
    if command == "initflow plugins check mine":
        assert run(tmp_path, *shlex.split("initflow plugins new mine")).returncode == 0
    done = run(tmp_path, *shlex.split(command))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Error" not in done.stdout
    assert_shown(command, done.stdout)


def shown(text, command):
    """The lines of output that a page has below a command."""
    block = re.search(rf"^\$ {re.escape(command)}\n((?:(?!\$ |```).*\n)*)", text, re.MULTILINE)
    return [line for line in block[1].splitlines() if line.strip()] if block else []


def alike(line):
    """A line but for its numbers, how wide its columns are, and how long its rules."""
    return re.sub(r"[─━]+", "─", re.sub(r"(\b[0-9a-f]{32}\b|RUN_ID|[\d.]+)", "0", line)).split()


def assert_shown(command, printed):
    """What the README shows below a command is among what it prints, but for numbers."""
    there = [alike(line) for line in printed.splitlines()]
    for line in shown(README, command):
        assert alike(line) in there, line


def test_the_readme_shows_what_commands_print():
    """Of each of the things to do next; a line of it that is not printed would be found."""
    of = {command: shown(README, command) for command in commands(README)}
    assert {command.split()[1] for command, lines in of.items() if lines} == {
        "compare", "plugins", "tune", "verify",
    }  # fmt: skip
    with pytest.raises(AssertionError):
        assert_shown("initflow plugins check mine", "'yours' keeps its contract.")


def test_the_readme_s_look_into_a_model(capsys):
    """It prints what stands below it, but for numbers: they are near, whatever rounds them."""
    text = section(README, "### 2. Look into your own model")
    exec(example(README, "### 2. Look into your own model"), {})  # noqa: S102 - our own
    printed = capsys.readouterr().out
    (there,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    assert [alike(line) for line in printed.splitlines()] == [
        alike(line) for line in there.splitlines()
    ]
    numbers = [[float(n) for n in re.findall(r"\d[\d.e-]*\d", t)] for t in (printed, there)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.05)


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


LOOKED_AT = """
assert "<table" in comparison._repr_html_()
assert len(comparison.to_pandas()) > 0
figures = comparison.figures()
assert figures
assert {type(figure).__name__ for figure in figures.values()} == {"Figure"}
"""


@pytest.mark.end_to_end
def test_the_python_example(tmp_path):
    """A network with the tags that are documented, and a comparison of ten, to look at."""
    done = run(tmp_path, "python", "-c", example(PAGES["python.md"], "## Functions") + LOOKED_AT)
    assert done.returncode == 0, done.stderr
    run_id, accuracy = done.stdout.split()
    logged = {one.info.run_id: one for one in runs(tmp_path)}
    assert len(logged) == 1 + 1 + 2 * 5
    data = logged[run_id].data
    assert accuracy == str(data.metrics["accuracy/test"])
    tags = re.findall(r"`(initflow\.[\w.]+)`", section(PAGES["training.md"], "### Tags"))
    assert {"initflow.scheme", "initflow.data"} < set(tags)
    assert set(tags) - data.tags.keys() == {"initflow.diverged_at_step"}
    assert any(tag.startswith("initflow.env.") for tag in data.tags)


@pytest.mark.end_to_end
def test_the_python_example_of_tuning(tmp_path):
    """It prints a table of both schemes."""
    done = run(tmp_path, "python", "-c", example(PAGES["tuning.md"], "## From Python"))
    assert done.returncode == 0, done.stderr
    assert "xavier" in done.stdout
    assert "he" in done.stdout


WATCHING, *_ = re.findall(r"```python\n(.*?)```", PAGES["watching.md"], re.DOTALL)
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
    """Two steps in a run, and the same keys printed, but for those of updates."""
    done = run(tmp_path, "python", "-c", WATCHED + WATCHING)
    assert done.returncode == 0, done.stderr
    (logged,) = runs(tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    history = client.get_metric_history(logged.info.run_id, "gradient_variance/0")
    assert [metric.step for metric in history] == [0, 100]
    of_forwards = {key for key in logged.data.metrics if not key.startswith("update_ratio/")}
    assert of_forwards == set(ast.literal_eval(done.stdout))


def test_the_example_of_looking_into_a_model(tmp_path, monkeypatch, capsys):
    """It prints how the signal travels, and leaves its figure."""
    monkeypatch.chdir(tmp_path)
    exec(example(PAGES["watching.md"], "## inspect"), {})  # noqa: S102 - our own
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "<Inspection: Sequential, 3 layers>"
    assert printed[1].startswith("From 0 to 4, the pre-activations' mean square goes from ")
    assert (tmp_path / "signals_by_layer.png").read_bytes().startswith(b"\x89PNG")


def test_the_examples_of_initializing_a_model():
    """They run as they stand, one after the other, and the report is a table."""
    first, second, _ = re.findall(r"```python\n(.*?)```", PAGES["models.md"], re.DOTALL)
    spaces = {}
    exec(first, spaces)  # noqa: S102 - our own
    assert [row.scheme for row in spaces["report"].filled] == ["gain", "lecun"]
    exec(second, spaces)  # noqa: S102 - our own
    assert spaces["model"].layer1[0].bn2.weight[0].item() == pytest.approx(8**-0.5)
    assert spaces["model"].fc.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_the_example_of_a_diagnosis_of_a_model(tmp_path):
    """The file and the command, as they stand."""
    *_, file = re.findall(r"```python\n(.*?)```", PAGES["models.md"], re.DOTALL)
    (tmp_path / "mine.py").write_text(file)
    done = run(tmp_path, *shlex.split(A_MODEL))
    assert done.returncode == 0, done.stderr
    assert re.search(r"\n +auto +Sequential +stable +stable ", done.stdout)
    assert "Not predicted" not in done.stdout


def test_the_page_of_parameters_is_what_the_script_writes():
    """To the letter, so that no table is kept by hand."""
    assert PAGES["parameters.md"] == script.page(), "run: python docs/parameters.py"


def test_every_command_has_its_parameters():
    """In a section of its own, or by name where it has no settings; each section is linked."""
    text = PAGES["parameters.md"]
    lead, _, _ = text.partition("\n## ")
    without = {name for name in cli.commands if name not in SETTINGS}
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == list(SETTINGS)
    assert without == {"completion", "doctor", "export", "project", "ui", "sync"}
    for name in without:
        assert f"`initflow {name}`" in lead
    for name in WITH_A_RUN:
        assert any(f"](parameters.md#{name})" in page for page in PAGES.values()), name


@pytest.mark.parametrize(("name", "settings"), SETTINGS.items())
def test_the_parameters_are_the_configuration(name, settings):
    """Those of its own in a table, the others by name as those of training; each of them once."""
    text = section(PAGES["parameters.md"], f"## {name}")
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \| (.*) \| (.*) \|$", text, re.MULTILINE)
    assert text.count("\n| `") == len(rows)
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    others = "".join(part for part in paragraphs if part.endswith(" of [train](#train)."))
    trains = {row[0]: row for row in documented(TrainConfig)}
    shared = [trains[one] for one in re.findall(r"`(\w+)`", others)]
    assert sorted(rows + shared) == sorted(documented(settings))


def documented(settings):
    """Names, defaults, meanings and values."""
    defaults = settings().as_text()
    return [
        (s.name, defaults[s.name], s.metadata["meaning"], s.metadata["kind"].expected)
        for s in fields(settings)
    ]


def test_verdicts_are_all_named():
    """As the configuration has them."""
    for verdict in VERDICTS:
        assert f"`{verdict}`" in section(PAGES["signals.md"], "## Verdicts")


def test_the_entry_points_are_the_projects():
    """By name, in the first section."""
    text = section(PAGES["project.md"], "## From a checkout")
    told = {*re.findall(r"`-e (\w+)`", text), *re.findall(r"`(main|train)`", text)}
    assert told == yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"].keys()


def test_the_table_of_schemes_is_the_built_in_ones():
    """Names in order, arguments with their defaults."""
    table = section(PAGES["training.md"], "## Schemes")
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \| .* \| (.*) ?\|$", table, re.MULTILINE)
    told = {}
    for names, arguments in rows:
        for name in re.findall(r"`(\w+)`", names):
            told[name] = dict(re.findall(r"`(\w+)` \(([^)]+)\)", arguments))
    assert list(told) == list(BUILT_IN)
    for name, scheme in BUILT_IN.items():
        assert told[name] == {key: str(p.default) for key, p in scheme.parameters.items()}


def test_the_table_of_plugins_is_what_is_there():
    """Names and arguments with their defaults; the README names them, too."""
    table = section(PAGES["plugins.md"], "## Those that are here")
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| (.*) \|$", table, re.MULTILINE)
    told = {name: dict(re.findall(r"`(\w+)` \(([^)]+)\)", text)) for name, text in rows}
    there = {
        plugin.name: {key: str(value) for key, value in scheme.values.items()}
        for plugin, scheme in load_all(ROOT / "plugins")
    }
    assert told == there
    for name in there.keys() - {"template"}:
        assert f"`{name}`" in section(README, "### 3. Write an initializer")


def test_the_example_of_a_scheme_is_an_initializer():
    """As it stands."""
    namespace = {}
    exec(example(PAGES["plugins.md"], "## The function"), namespace)  # noqa: S102 - it is the example
    assert_initializer_contract(namespace["mine"])


def test_activations_and_data_sets_are_all_named():
    """As the configuration has them."""
    for heading, names in (
        ("## Activation functions", ACTIVATION_NAMES),
        ("## Data sets", DATASET_NAMES),
    ):
        text = section(PAGES["training.md"], heading)
        for name in names:
            assert f"`{name}`" in text


def test_the_readme_is_short():
    """What needs more room has a page in docs/."""
    assert len(README.splitlines()) <= 200


def prose(text):
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def links(text):
    """The relative links and images of a page, as a path and a heading's anchor."""
    return re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", re.sub(r"`[^`\n]*`", "", prose(text)))


def anchors(text):
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*OF_THE_ROOT, *(f"docs/{page}" for page in PAGES)])
def test_links_lead_somewhere(page):
    """Each to a file or folder that is there, and to a heading that it has."""
    place = ROOT / page
    for target, anchor in links(place.read_text()):
        there = (place.parent / target) if target else place
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text()), f"{target}#{anchor}"


def test_places_are_there():
    """Every file, folder and room of the table."""
    table = section(PAGES["project.md"], "## Where things are")
    places = re.findall(r"`([\w./-]+)`", table)
    names = [place for place in places if "/" in place or "." in place or place[0].isupper()]
    rooms = [place for place in places if place.islower() and place.isalpha()]
    assert len(names) > 5
    assert {"core", "cli"} < set(rooms)
    for name in (*names, *(f"initflow/{room}" for room in rooms)):
        assert (ROOT / name).exists(), name

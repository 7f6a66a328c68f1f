"""The shape of the code: imports follow the data, and starting is light."""

import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# A module imports only from those before it.
ORDER = [
    "errors",
    "paths",
    "config",
    "finder",
    "isolation",
    "importing",
    "seeds",
    "machine",
    "environment",
    "context",
    "workers",
    "idx",
    "data",
    "activations",
    "signature",
    "scheme",
    "contract",
    "initializers",
    "model",
    "plugins",
    "testing",
    "catalogue",
    "scaffold",
    "supplies",
    "propagation",
    "signals",
    "theory",
    "prediction",
    "verdict",
    "measure",
    "reading",
    "train",
    "record",
    "provenance",
    "replay",
    "comparison",
    "trials",
    "published",
    "webpage",
    "drawing",
    "figures",
    "comparison_figures",
    "tuning_figures",
    "bundle",
    "observed",
    "layers",
    "recorder",
    "inspection",
    "sampler_state",
    "studies",
    "mlflow_page",
    "outbox",
    "open_runs",
    "sender",
    "served_model",
    "delivery",
    "unsent",
    "track",
    "failures",
    "watching",
    "experiment",
    "populations",
    "overview",
    "compare",
    "reproduce",
    "tuning",
    "plan",
    "finals",
    "tune",
    "diagnose",
    "verify",
    "report",
    "cli",
]
ONLY_IN = {
    "mlflow": ("delivery", "served_model", "track"),
    "matplotlib": ("drawing",),
    "optuna": ("studies",),
    "ray": ("workers",),
    "click": ("cli",),
}
MODULES = {path.stem: path for path in (ROOT / "initflow").glob("*.py")}


def imports(path):
    """Every module imported anywhere in the file, by its full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_its_place():
    """None is left out of the order."""
    assert set(ORDER) | {"__init__", "__main__"} == set(MODULES)


@pytest.mark.parametrize("name", ORDER)
def test_imports_follow_the_data(name):
    """From the settings to the command line, never back."""
    prefix = "initflow."
    ours = {i.removeprefix(prefix).split(".")[0] for i in imports(MODULES[name]) if prefix in i}
    assert ours & set(ORDER) <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("name", ORDER)
def test_libraries_stay_where_they_belong(name):
    """MLflow in the tracking, matplotlib where figures are drawn, click in the command line."""
    heads = {module.split(".")[0] for module in imports(MODULES[name])}
    for library, places in ONLY_IN.items():
        assert library not in heads or name in (places or ())


@pytest.mark.parametrize("name", sorted(set(ORDER) - {"cli"}))
def test_only_the_command_line_prints_or_exits(name):
    """No print, no exit, no echo elsewhere."""
    calls = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(MODULES[name].read_text()))
        if isinstance(node, ast.Call)
    }
    assert not calls & {"print", "sys.exit", "exit", "quit", "os._exit", "click.echo"}


# What these answer is only there where the distribution is, which initflow is not in `mlflow run`.
INSTALLED = {f"importlib.metadata.{name}" for name in ("files", "metadata", "requires", "version")}


@pytest.mark.parametrize("name", ORDER)
def test_nothing_asks_for_what_only_an_installed_package_has(name):
    """Not by name: what is not installed is no error, and a version is the module's own."""
    text = MODULES[name].read_text()
    asked = {f"importlib.{call}" for call in re.findall(r"\bmetadata\.\w+(?=\()", text)}
    assert not INSTALLED & (asked | set(imports(MODULES[name])))


HEAVY = {"torch", "mlflow", "optuna", "matplotlib", "numpy", "sklearn", "torchvision", "rich"}


@pytest.mark.parametrize("statement", ["import initflow", "import initflow.cli"])
def test_importing_is_light(statement):
    """Neither the package nor the command loads anything heavy."""
    program = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert not HEAVY & {name.split(".")[0] for name in done.stdout.split()}


def test_importing_starts_no_work_of_torchvision():
    """The training needs neither torchvision nor what it drags in."""
    program = "import initflow.experiment; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert not {"torchvision", "torch._dynamo", "optuna"} & set(done.stdout.split())

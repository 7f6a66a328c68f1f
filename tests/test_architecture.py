"""The shape of the code: imports follow the data, and starting is light."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, python

PACKAGE = ROOT / "initflow"
# Every module by its full name; of a room, the room's name.
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
ROOMS = {name: file for name, file in MODULES.items() if file.name == "__init__.py"}
PRINTING = {f"initflow.cli.{name}" for name in ("commands", "console", "process")}
INNER = sorted(MODULES.keys() - PRINTING)


def imports(path):
    """Every module imported anywhere in the file, by its full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def lint(folder):
    """What import-linter says of the package in ``folder``, by the contracts of pyproject.toml."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of the package, to break."""
    folder = tmp_path_factory.mktemp("house")
    shutil.copytree(PACKAGE, folder / "initflow", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    assert lint(folder).returncode == 0
    return folder


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        # Up to a room above, also where it is only needed at times, or for a type.
        ("core/seeds.py", "from initflow.training import model", "Rooms stand in one order"),
        (
            "theory/infinite_width.py",
            "def late():\n    from initflow.reporting import drawing",
            "Rooms stand in one order",
        ),
        (
            "training/idx.py",
            "import typing\nif typing.TYPE_CHECKING:\n    from initflow import testing",
            "Rooms stand in one order",
        ),
        # To a module after it in the same room.
        (
            "core/paths.py",
            "from initflow.core import workers",
            "Modules of core stand in one order",
        ),
        (
            "experiments/replay/provenance.py",
            "from initflow.experiments.replay import bundle",
            "Modules of experiments/replay stand in one order",
        ),
        # A library where it does not belong.
        ("experiments/failures.py", "import mlflow", "mlflow is imported by tracking alone"),
        ("tracking/outbox.py", "import mlflow", "mlflow is imported by tracking alone"),
        ("experiments/train.py", "import optuna", "optuna is imported by experiments/tuning alone"),
        (
            "experiments/tuning/plan.py",
            "import optuna",
            "optuna is imported by experiments/tuning alone",
        ),
        (
            "tracking/runs.py",
            "import matplotlib.pyplot",
            "matplotlib is imported by reporting.drawing alone",
        ),
        ("core/workers.py", "import ray", "ray, an optional package"),
        ("tracking/watching/watch.py", "import lightning", "lightning and transformers are"),
        (
            "tracking/watching/callbacks.py",
            "from initflow.tracking.watching import transformers_callback",
            "callbacks for optional packages are loaded by their name",
        ),
        ("experiments/comparisons/compare.py", "import click", "click is imported by cli alone"),
    ],
)
def test_a_broken_rule_is_told(house, module, line, broken):
    """`make lint` fails for each, and names it."""
    file = house / "initflow" / module
    kept = file.read_text()
    file.write_text(f"{kept}\n{line}\n")
    try:
        done = lint(house)
    finally:
        file.write_text(kept)
    assert done.returncode == 1
    assert re.search(rf"^{broken}.* BROKEN", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize("place", ["helpers.py", "core/helpers.py", "leftovers/__init__.py"])
def test_a_module_without_a_place_is_told(house, place):
    """The contracts are exhaustive: nothing is added that they say nothing of."""
    file = house / "initflow" / place
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    try:
        done = lint(house)
    finally:
        shutil.rmtree(file.parent) if file.name == "__init__.py" else file.unlink()
    assert done.returncode == 1
    name = f"initflow/{place}".removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert f"\n- {name}\n" in done.stdout


def test_make_lint_checks_the_contracts():
    """Nobody has to think of it."""
    (recipe,) = re.findall(
        r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert "lint-imports" in recipe


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_a_room_says_what_it_is_for(name):
    """In a docstring, and is empty otherwise, or lazy."""
    tree = ast.parse(ROOMS[name].read_text())
    assert len((ast.get_docstring(tree) or "").split()) >= 15
    if name != "initflow":  # what it loads when it is imported is tested below
        assert set(imports(ROOMS[name])) <= {"initflow.core.lazy.attach"}
    assert name.rpartition(".")[2] not in {"utils", "common", "helpers", "misc"}


@pytest.mark.parametrize("name", sorted(set(ROOMS) - {"initflow"}))
def test_a_room_is_neither_crowded_nor_empty(name):
    """From four to about fourteen modules."""
    inside = [file for file in ROOMS[name].parent.glob("*.py") if file.name != "__init__.py"]
    inside += list(ROOMS[name].parent.glob("*/__init__.py"))
    assert 4 <= len(inside) <= 15


def test_the_page_on_the_code_names_every_room_and_module():
    """So that it is what a reader needs, and stays true; the drawing has the rooms."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawn = (ROOT / "docs" / "images" / "rooms.svg").read_text()
    for name in MODULES.keys() - {"initflow", "initflow.__main__"}:
        place, own = name.removeprefix("initflow.").replace(".", "/"), name.rpartition(".")[2]
        is_room = name in ROOMS or place == "errors"
        named = f"**{place}**" if is_room else f"`{own}"
        assert named in page, name
        if name in ROOMS:
            assert f">{own}<" in drawn
    told = set(re.findall(r"`(?:\w+/)*(\w+)\.py`", page))
    assert told <= {name.rpartition(".")[2] for name in MODULES} | {
        "__init__",
        "examples",
        "test_train",
    }


@pytest.mark.parametrize("name", INNER)
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


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_asks_for_what_only_an_installed_package_has(name):
    """Not by name: what is not installed is no error, and a version is the module's own."""
    text = MODULES[name].read_text()
    asked = {f"importlib.{call}" for call in re.findall(r"\bmetadata\.\w+(?=\()", text)}
    assert not INSTALLED & (asked | set(imports(MODULES[name])))


HEAVY = {"torch", "mlflow", "optuna", "matplotlib", "numpy", "sklearn", "torchvision", "rich"}


@pytest.mark.parametrize("statement", ["import initflow", "import initflow.cli.process"])
def test_importing_is_light(statement):
    """Neither the package nor the command loads anything heavy."""
    loaded = python(f"{statement}; import sys; print(*sys.modules)").split()
    assert not HEAVY & {name.split(".")[0] for name in loaded}


def test_commands_import_what_they_train_with():
    """Neither torchvision nor what it drags in, nor what only figures or exports take."""
    code = "import sys, initflow.experiments.{}; print(*sys.modules)".format
    loaded = python(code("train, initflow.experiments.comparisons.compare")).split()
    slow = {"torchvision", "torch._dynamo", "mlflow.pytorch", "sklearn", "scipy.stats"}
    slow |= {"matplotlib", "optuna.visualization"}
    assert not {*slow, "optuna"} & set(loaded)
    assert not slow & set(python(code("tuning.tune")).split())

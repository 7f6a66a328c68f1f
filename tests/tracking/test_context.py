"""MLflow's runs get the environment's tags where a process uses initflow, and are never harmed."""

import functools
import os
import subprocess
import sys

import mlflow
import pytest
from mlflow.tracking.context import registry
from torch import nn

import initflow.diagnostics.signals  # with which this process uses initflow
from initflow import errors
from initflow.core import environment
from initflow.tracking import context
from initflow.tracking.context import AT_WORK, EnvironmentTags
from tests.conftest import ROOT, python
from tests.test_architecture import MODULES, imports

TAGS = environment.tags().keys()


def started():
    """The tags of a run that a user opens, as the store has them."""
    with mlflow.start_run() as run:
        pass
    return mlflow.get_run(run.info.run_id).data.tags


def test_mlflow_finds_the_provider_by_its_entry_point():
    """Once, among its own."""
    found = [p for p in registry._run_context_provider_registry if isinstance(p, EnvironmentTags)]
    assert len(found) == 1


def test_runs_that_a_user_opens_have_the_tags(store):
    """Beside MLflow's own; they say what this process computes with."""
    tags = started()
    assert environment.tags().items() <= tags.items()
    assert "mlflow.user" in tags


def test_a_tag_of_the_users_own_wins(store):
    """As with MLflow's other providers."""
    with mlflow.start_run(tags={"initflow.env.blas": "mine"}) as run:
        pass
    assert mlflow.get_run(run.info.run_id).data.tags["initflow.env.blas"] == "mine"


@pytest.mark.parametrize(("value", "tagged"), [("false", False), ("False", False), ("", True)])
def test_they_can_be_switched_off(store, monkeypatch, value, tagged):
    """By an environment variable, at any time; empty is as if it were not there."""
    monkeypatch.setenv("INITFLOW_CONTEXT_TAGS", value)
    assert (started().keys() & TAGS == TAGS) == tagged
    monkeypatch.setenv("INITFLOW_CONTEXT_TAGS", "true")
    assert started().keys() & TAGS == TAGS


@pytest.fixture
def warned(monkeypatch):
    """What MLflow warns of."""
    lines = []
    monkeypatch.setattr(registry._logger, "warning", lambda text, *a: lines.append(text % a))
    return lines


def test_an_odd_switch_is_warned_of_and_the_run_starts(store, monkeypatch, warned):
    """In one line that says what would be right; there are no tags then."""
    monkeypatch.setenv("INITFLOW_CONTEXT_TAGS", "maybe")
    assert not started().keys() & TAGS
    (line,) = warned
    assert line.endswith("INITFLOW_CONTEXT_TAGS must be true or false, not 'maybe'")


@pytest.mark.parametrize("failure", [RuntimeError("no"), OSError(28, "full"), ImportError("gone")])
def test_whatever_fails_here_the_run_starts(store, monkeypatch, warned, failure):
    """MLflow warns of it in one line."""

    def fail():
        raise failure

    monkeypatch.setattr(environment, "tags", fail)
    tags = started()
    assert "mlflow.user" in tags
    assert not tags.keys() & TAGS
    (line,) = warned
    assert line.endswith(str(failure))


def test_a_process_that_only_has_mlflow_is_left_alone(monkeypatch):
    """What MLflow's asking loads of initflow is not its use; any work is."""
    loaded = {name: m for name, m in sys.modules.items() if not name.startswith("initflow.")}
    idle = ["tracking", "errors", "cli.commands", "initializers.finder", *SETTINGS, *NO_WORK]
    monkeypatch.setattr(sys, "modules", loaded | {f"initflow.{name}": None for name in idle})
    assert {f"initflow.{name}" for name in idle} <= MODULES.keys()
    assert not EnvironmentTags().in_context()
    for name in AT_WORK:
        assert f"initflow.{name}" in MODULES
        monkeypatch.setattr(sys, "modules", loaded | {f"initflow.{name}": None})
        assert EnvironmentTags().in_context()


# They load torch to tell of the machine, to keep its state, for its generators or its switches;
# and initflow doctor looks at what is there.
TOOLS = ("environment", "isolation", "importing", "machine", "seeds", "workers")
SETTINGS = [f"core.{name}" for name in ("configurations", "kinds", "settings", "paths")]
LOOKS = [f"checkup.{name}" for name in ("examination", "store", "machine")]
NO_WORK = ["tracking.context", *(f"core.{name}" for name in TOOLS), *LOOKS]
read = functools.cache(lambda name: list(imports(MODULES[name])))


def loads(name):
    """All modules of ours that a module loads, by name, and whether torch is loaded with them."""
    found, heavy, waiting = set(), False, [name]
    while waiting:
        one = waiting.pop()
        module = one if one in MODULES else one.rpartition(".")[0]
        if module in found or module not in MODULES:
            continue
        found.add(module)
        for imported in read(module):
            heavy = heavy or imported.partition(".")[0] == "torch"
            waiting += [imported] * (imported.startswith("initflow.") and module != "initflow")
    return found, heavy


def test_every_module_that_computes_counts_as_use():
    """It loads torch, and one of those that the provider looks for, which all load torch."""
    at_work = {f"initflow.{name}" for name in AT_WORK}
    for name in MODULES.keys() - {f"initflow.{idle}" for idle in NO_WORK}:
        if not name.startswith("initflow.cli"):  # it loads them when a command runs
            found, heavy = loads(name)
            assert bool(found & at_work) == heavy, name
    assert all(loads(name)[1] for name in at_work)


def test_what_mlflow_loads_of_its_room_is_nothing():
    """The room's own file imports nothing, and the module nothing heavy."""
    loaded = python("import sys, initflow.tracking.context; print(*sys.modules)").split()
    ours = {name for name in loaded if name.startswith("initflow")}
    light = {"initflow.core", "initflow.core.lazy", "initflow.errors", "initflow.tracking"}
    assert ours <= light | {"initflow", "initflow.tracking.context"}


def test_watching_tags_the_run_that_is_open_already(store, monkeypatch):
    """As the process may use initflow only since; unless it is switched off."""
    model = nn.Linear(2, 2)
    monkeypatch.setattr(context, "AT_WORK", ())  # not before it watches
    with mlflow.start_run() as run:
        assert not run.data.tags.keys() & TAGS
        with initflow.watch(model):
            pass
        assert environment.tags().items() <= mlflow.get_run(run.info.run_id).data.tags.items()
    monkeypatch.setenv("INITFLOW_CONTEXT_TAGS", "false")
    with mlflow.start_run() as run, initflow.watch(model):
        pass
    assert not mlflow.get_run(run.info.run_id).data.tags.keys() & TAGS


def test_watching_says_what_is_odd_of_the_switch(store, monkeypatch):
    """As it is called by the user, it raises, and leaves no hook behind."""
    model = nn.Linear(2, 2)
    monkeypatch.setenv("INITFLOW_CONTEXT_TAGS", "0")
    message = "^INITFLOW_CONTEXT_TAGS must be true or false, not '0'$"
    with (
        mlflow.start_run(),
        pytest.raises(errors.SettingError, match=message),
        initflow.watch(model),
    ):
        pass
    assert not model._forward_pre_hooks


@pytest.mark.end_to_end
def test_mlflow_alone_loads_no_torch(tmp_path):
    """It asks the provider at each run, in a process that only has `import mlflow`."""
    program = (
        "import sys, mlflow\n"
        "with mlflow.start_run() as run: pass\n"
        "print(sorted(t for t in run.data.tags if t.startswith('initflow')))\n"
        "print('torch' in sys.modules, 'initflow.tracking.context' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ
        | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-2:] == ["[]", "False True"]

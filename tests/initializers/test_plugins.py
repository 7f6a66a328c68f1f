"""Plugins in use: the four ways to one, what cannot be loaded, and what a run says of it."""

import importlib
import json
import shutil
import sys
import textwrap
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import initflow
from initflow import TrainConfig
from initflow.core import importing, paths
from initflow.core.configurations import DiagnoseConfig
from initflow.errors import InitflowError, PluginError, SettingError
from initflow.experiments.train import train
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.built_in import BUILT_IN
from initflow.initializers.plugins import find, load_all
from initflow.training import model
from tests.initializers.test_finder import install, project

CODE = '''
import initflow

@initflow.initializer(variance=lambda fan_in, gain: gain**2 / fan_in)
def fill(weight, fan_in, generator, *, gain: float = 1.0):
    """N(0, gain²/fan_in)."""
    weight.normal_(0.0, gain / fan_in**0.5, generator=generator)
'''


@pytest.fixture
def place(tmp_path, monkeypatch, nothing_shipped):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def folder(place, name, code=CODE, layout="src", module=None, **more):
    """A plugin's folder in `plugins`, whose scheme is its module's `fill`."""
    module = module or name.replace("-", "_")
    home = project(place / "plugins", name, {name: f"{module}:fill"}, **more)
    source = home / "src" if layout == "src" else home
    source.mkdir(exist_ok=True)
    (source / f"{module}.py").write_text(textwrap.dedent(code))
    return home


def weights(scheme, seed=0):
    relu = ACTIVATIONS["relu"]
    return model.initialize((20, 10, 5), scheme, relu, bias_init="zeros", seed=seed).weights[0][0]


@pytest.mark.parametrize("layout", ["src", "flat"])
def test_a_folder_is_used_in_place(place, layout):
    """Both layouts; the scheme takes arguments, states its variance and says who offers it."""
    folder(place, "mine", layout=layout, version="0.4")
    scheme = find("mine:gain=2")
    assert (scheme.spec, scheme.provider) == ("mine:gain=2.0", "mine 0.4")
    assert scheme.variance(model.Place(16, 4)) == 0.25
    assert weights(scheme).std().item() == pytest.approx(2 / 20**0.5, rel=0.1)


def test_an_installed_distribution_is_used(place, monkeypatch):
    """By its entry point."""
    site = place / "site"
    install(site, "their-plugin", {"theirs": "their_plugin:fill"}, "3.2")
    (site / "their_plugin.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(site))
    assert find("theirs").provider == "their-plugin 3.2"


@pytest.mark.parametrize(
    "spec", ["here/inits.py:fill", "{}/here/inits.py:fill:gain=2", "here.inits:fill"]
)
def test_a_function_is_named_by_its_place(place, monkeypatch, spec):
    """A file, relative or not, or a module on the path; its content is its version."""
    monkeypatch.syspath_prepend(str(place))
    (place / "here").mkdir()
    (place / "here" / "inits.py").write_text(CODE)
    spec = spec.format(place)
    scheme = find(spec)
    assert scheme.spec == spec.replace("gain=2", "gain=2.0")
    assert find(scheme.spec).values == scheme.values
    content = (place / "here" / "inits.py").read_bytes()
    assert scheme.provider.endswith(f" sha256:{importing.digest(content)}")


def test_a_function_of_an_installed_module_has_its_distribution(place):
    """And its version."""
    with pytest.raises(PluginError, match="an initializer asks for 'weight', or for 'network'"):
        find("rich.pretty:pprint")
    provider = importing._provider(importlib.import_module("rich.pretty"))
    assert provider == f"rich {importlib.metadata.version('rich')}"


def test_an_edited_file_is_not_stale(place, monkeypatch):
    """It is run anew each time, with those beside it, also after a quick edit of one digit."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = place / "edited.py"
    providers = set()
    for gain in ("1.0", "2.0", "3.0"):
        (place / "beside.py").write_text(f"GAIN = {gain}\n" + "#" * int(float(gain)))
        code = CODE.replace("gain: float = 1.0", f"gain: float = {gain}, more: float = GAIN")
        file.write_text("from beside import GAIN\n" + code)
        scheme = find("edited.py:fill")
        assert scheme.values == {"gain": float(gain), "more": float(gain)}
        providers.add(scheme.provider)
    assert len(providers) == 3
    assert "beside" not in sys.modules


def test_an_edited_folder_is_not_stale(place):
    """Within one process too: its provider is that of the weights."""
    for version, gain in (("1.0", "1.0"), ("2.0", "20.0")):
        shutil.rmtree(place / "plugins", ignore_errors=True)
        home = folder(
            place, "mine", "from helper_of_mine import GAIN" + CODE.replace("1.0", "GAIN")
        )
        (home / "src" / "helper_of_mine.py").write_text(f"GAIN = {gain}\n")
        toml = home / "pyproject.toml"
        toml.write_text(toml.read_text().replace("1.0", version))
        scheme = find("mine")
        assert (scheme.provider, scheme.values) == (f"mine {version}", {"gain": float(gain)})


def test_files_with_helpers_of_one_name_have_their_own(place):
    """Each what lies beside it."""
    for name in ("a", "b"):
        (place / name).mkdir()
        (place / name / "inits.py").write_text(
            "from util import NAME\ndef fill(weight, *, name: str = NAME): weight.zero_()\n"
        )
        (place / name / "util.py").write_text(f"NAME = '{name}'\n")
    assert find("a/inits.py:fill").values == {"name": "a"}
    assert find("b/inits.py:fill").values == {"name": "b"}


def test_folders_with_helpers_of_one_name_are_told(place):
    """Installed, one would overwrite the other's."""
    for name in ("first", "second"):
        home = folder(place, name)
        (home / "src" / "helpers.py").write_text("")
        (home / "src" / "conftest.py").write_text("")
    find("first")
    with pytest.raises(PluginError, match="its module 'helpers' has the name of another one, /"):
        find("second")


def test_a_plugin_without_a_version_has_that_of_its_content(place):
    """Where pyproject.toml leaves it to be found out."""
    home = folder(place, "dynamic")
    toml = home / "pyproject.toml"
    toml.write_text(toml.read_text().replace('version = "1.0"', 'dynamic = ["version"]'))
    content = (home / "src" / "dynamic.py").read_bytes()
    assert find("dynamic").provider == f"dynamic sha256:{importing.digest(content)}"


def test_arguments_of_partial_functions_and_callable_objects(place):
    """Typed by their annotations, also where others name what is not there at run time."""
    (place / "odd.py").write_text(
        "from __future__ import annotations\n"
        "import functools\n"
        "def base(weight: Nowhere, *, gain: float = 1, slope: int = 3): weight.zero_()\n"
        "part = functools.partial(base, slope=4)\n"
        "class Filling:\n"
        "    def __call__(self, weight: Nowhere, *, gain: float = 1): weight.zero_()\n"
        "filling = Filling()\n"
    )
    assert find("odd.py:part:gain=2").values == {"gain": 2.0, "slope": 4}
    assert find("odd.py:filling:gain=2").values == {"gain": 2.0}


def test_a_function_of_the_notebook_is_used(place, monkeypatch):
    """By its name; a later definition of the name takes its place."""

    @initflow.initializer(variance=lambda fan_in: 1 / fan_in)
    def own(weight, fan_in, generator):
        weight.normal_(0.0, fan_in**-0.5, generator=generator)

    own.__module__ = "__main__"
    monkeypatch.setattr(sys.modules["__main__"], "own", own, raising=False)
    scheme = find("own")
    assert scheme.fill is own
    assert scheme.provider == "__main__"
    monkeypatch.setattr(sys.modules["__main__"], "he", own, raising=False)
    with pytest.raises(PluginError, match="'he' is the name of a built-in scheme"):
        find("he")


def test_the_four_ways_give_the_same_weights(place, monkeypatch):
    """One source: in a folder, installed, by its place, in the notebook."""
    home = folder(place, "one-way")
    source = home / "src" / "one_way.py"
    by_folder = weights(find("one-way"))
    del sys.modules["one_way"]
    install(place / "site", "one-way", {"one-way": "one_way:fill"})
    (place / "site" / "one_way.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(place / "site"))
    monkeypatch.setenv("INITFLOW_PLUGINS_DIR", str(place / "site"))
    by_entry_point = weights(find("one-way"))
    assert "site" in sys.modules["one_way"].__file__
    by_place = weights(find(f"{source}:fill"))
    notebook: dict[str, object] = {"__name__": "__main__"}
    exec(CODE, notebook)  # noqa: S102 - what a notebook does
    monkeypatch.setattr(sys.modules["__main__"], "cell", notebook["fill"], raising=False)
    by_notebook = weights(find("cell"))
    for other in (by_entry_point, by_place, by_notebook):
        assert torch.equal(by_folder, other)


def test_the_folder_is_used_where_it_is_installed_too(place, monkeypatch):
    """Also where the installed copy, which may be stale, is loaded already."""
    install(place / "site", "twice", {"twice": "twice:fill"})
    (place / "site" / "twice.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(place / "site"))
    installed = importlib.import_module("twice")
    home = folder(place, "twice", CODE.replace("gain: float = 1.0", "gain: float = 5.0"))
    scheme = find("twice")
    assert scheme.values == {"gain": 5.0}
    assert sys.modules["twice"] is not installed
    assert Path(sys.modules["twice"].__file__).is_relative_to(home)


def test_the_path_is_left_with_nothing_hidden(place):
    """A flat plugin's `tests`, `setup` and the like come last on it."""
    home = folder(place, "flat-one", layout="flat")
    first = sys.path[0]
    find("flat-one")
    assert (sys.path[0], sys.path[-1]) == (first, str(home))


BROKEN = {
    "does not import": (
        "import no_such_module_of_any_kind",
        "ModuleNotFoundError: No module named",
    ),
    "has an error": ("def fill(:", "SyntaxError: invalid syntax"),
    "fails": ("1 / 0", "ZeroDivisionError: division by zero"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "has no such function": ("def fil(weight): pass", "AttributeError: module "),
    "is no function": ("fill = 3", "an initializer is a function, not int"),
    "is a module": ("import torch as fill", "an initializer is a function, not module"),
    "asks for nothing": ("def fill(x=1): pass", "asks for 'weight', or for 'network': this one"),
    "asks for too much": (
        "def fill(weight, epochs): pass",
        "depth, generator: 'epochs' is none of them and, for an argument, has no default",
    ),
    "mixes both kinds": (
        "def fill(network, weight): pass",
        "an initializer that asks for 'network' is not given 'weight'",
    ),
    "mixes them otherwise": (
        "def fill(weight, images): pass",
        "an initializer that asks for 'weight' is not given 'images'",
    ),
    "takes anything": ("def fill(weight, **more): pass", "'**more' names none"),
    "goes by position": ("def fill(weight, /): pass", "called by parameter name: not so 'weight'"),
    "is a class": (
        "class fill:\n    def __init__(self, weight): pass",
        "is a function, not a class",
    ),
    "is asynchronous": ("async def fill(weight): pass", "a plain function, without async or yield"),
    "yields": ("def fill(weight): yield", "a plain function, without async or yield"),
    "has a default of an odd kind": (
        "import numpy as np\ndef fill(weight, *, gain: float = np.float32(1)): pass",
        "the default of 'gain' must be float, not ",
    ),
    "has a default that is no word of its own": (
        "from typing import Literal\ndef fill(weight, *, m: Literal['a', 'b'] = 'c'): pass",
        "the default of 'm' must be one of a, b, not 'c'",
    ),
    "has an odd type": (
        "def fill(weight, *, shape: tuple = ()): pass",
        "must be annotated as bool, int, float, str or a Literal of words, not 'tuple'",
    ),
    "has a type that is not there": (
        "from __future__ import annotations\ndef fill(weight, *, a: Nowhere = 1): pass",
        "annotation of 'a': name 'Nowhere' is not defined",
    ),
    "states a variance of something": (
        "import initflow\n@initflow.initializer(variance=lambda fan: 1)\ndef fill(weight): pass",
        "what a stated variance asks for must be one of fan_in, fan_out, activation, layer, depth",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_plugin_is_kept_with_its_cause(place, how):
    """Asking for it gives that cause, and the others are as well as ever."""
    code, cause = BROKEN[how]
    folder(place, "hurt", code)
    folder(place, "well")
    with pytest.raises(PluginError) as error:
        find("hurt")
    assert str(error.value).startswith("scheme 'hurt' of hurt 1.0 (plugins/hurt): ")
    assert cause in str(error.value)
    assert "\n" not in str(error.value)
    loaded = {plugin.name: scheme for plugin, scheme in load_all()}
    assert str(loaded["hurt"]) == str(error.value)
    assert loaded["well"].name == "well"
    assert find("well").name == "well"


def test_a_hanging_import_is_given_up(place, monkeypatch):
    """After a time limit; the others load."""
    monkeypatch.setattr(importing, "LIMIT_S", 0.3)
    folder(place, "hangs", "import time\nwhile True: time.sleep(0.01)")
    folder(place, "well")
    started = time.monotonic()
    with pytest.raises(PluginError, match=r"TimeoutError: not done within 0\.3 s"):
        find("hangs")
    assert time.monotonic() - started < 20
    assert str(place) not in sys.path[0]
    assert find("well").name == "well"


@pytest.mark.parametrize("function", ["mine", "mine:", ":fill", "not a place", ""])
def test_an_entry_point_that_names_no_function(place, function):
    """Is told as it stands."""
    project(place / "plugins", "odd", {"odd": function})
    with pytest.raises(PluginError, match=f"its entry point '{function}' is not module:function"):
        find("odd")


@pytest.mark.parametrize("name", ["random", "json", "initflow", "sys", "colorsys", "optuna"])
def test_a_module_with_the_name_of_another_is_refused(place, name):
    """It would be taken for the one that is loaded, or hide one that is loaded later."""
    folder(place, "clash", module=name)
    with pytest.raises(PluginError, match=f"its module '{name}' has the name of another one, "):
        find("clash")


def test_two_folders_with_one_module_name_are_told(place):
    """The second is refused, and says by what."""
    folder(place, "first", module="initializer")
    folder(place, "second", module="initializer")
    assert find("first").name == "first"
    with pytest.raises(PluginError, match=r"of another one, .*plugins/first/src/initializer\.py"):
        find("second")


MISTAKES = [
    ("nowhere.py:fill", SettingError, "init 'nowhere.py:fill': there is no file 'nowhere.py'"),
    ("no_such_module:fill", PluginError, "ModuleNotFoundError: No module named 'no_such_module'"),
    ("file.py:nothing", PluginError, "has no attribute 'nothing'"),
    ("file.py:fill:gain", SettingError, "init must look like name or name:key=value"),
    ("file.py:fill:gian=1", SettingError, "argument of scheme 'file.py:fill' must be one of gain"),
    ("file.py:fill:gain=x", SettingError, "file.py:fill:gain must be a finite number, not 'x'"),
    ("mine:fan_out", SettingError, "init must look like name or name:key=value"),
    ("he:fan_out", SettingError, "init must look like name or name:key=value"),
    ("mien", SettingError, "identity, mean_field, mine, not 'mien' (did you mean 'mine'?)"),
    ("file.py", SettingError, "init must be one of zero"),
    ("file.py:not a name", SettingError, "init must look like name or name:key=value"),
]


@pytest.mark.parametrize(("spec", "kind", "message"), MISTAKES)
def test_mistakes_are_named_with_what_would_be_right(place, spec, kind, message):
    """One line."""
    (place / "file.py").write_text(CODE)
    folder(place, "mine")
    with pytest.raises(kind) as error:
        find(spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@given(st.from_regex(r"[a-z_./:=,0-9 -]{1,40}", fullmatch=True))
def test_any_text_is_a_scheme_or_one_of_our_errors(place, spec):
    """Whatever is asked for."""
    try:
        find(spec)
    except InitflowError:
        return
    assert spec.partition(":")[0].strip() in BUILT_IN


def test_what_an_import_changes_for_all_is_put_back(place, capsys):
    """Settings and random states; what it prints goes to standard error."""
    folder(
        place,
        "rude",
        "import os, torch\n"
        "torch.set_default_dtype(torch.float64); torch.manual_seed(7); os.chdir('/')\n"
        "print('hello')\n"
        "def stated():\n"
        "    print('stating')\n"
        "    torch.manual_seed(8)\n"
        "    return 1.0\n"
        "def fill(weight, generator):\n"
        "    print('filling')\n"
        "    weight.normal_(generator=generator)\n"
        "import initflow\n"
        "initflow.initializer(variance=stated)(fill)\n",
    )
    before = torch.get_rng_state()
    weights(find("rude"))
    assert torch.get_default_dtype() is torch.float32
    assert torch.equal(torch.get_rng_state(), before)
    assert Path.cwd() == place
    out, err = capsys.readouterr()
    assert (out, set(err.split())) == ("", {"hello", "stating", "filling"})


def test_one_that_comes_with_the_package_stands_beside_the_users(place, monkeypatch):
    """Whichever is used first, both go on: a plugin may import its modules when it runs."""
    monkeypatch.setattr(paths, "SHIPPED_PLUGINS", ("initflow-critical",))
    late = "def fill(weight):\n    import beside\n    weight.fill_(beside.VALUE)\n"
    home = folder(place, "late", late)
    (home / "src" / "beside.py").write_text("VALUE = 2.0\n")
    before = find("critical")
    scheme, after = find("late"), find("critical")
    assert weights(scheme).unique().tolist() == [2.0]
    assert before.provider == after.provider == "initflow-critical 0.1.0"
    assert weights(before).equal(weights(after))


def test_objects_of_a_notebook_that_answer_to_any_name(place, monkeypatch):
    """Or that fail at any: they are no initializers, and trouble no scheme."""

    class Odd:
        def __getattr__(self, name):
            raise RuntimeError("outside of its context")

    monkeypatch.setattr(sys.modules["__main__"], "odd", Odd(), raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "mock", Mock(), raising=False)
    assert find("he").name == "he"
    assert [plugin.name for plugin, _ in load_all()] == []


def test_what_an_activation_cannot_have_is_refused_before_a_run_is_made(place, store):
    """By the scheme's own words, for each activation that was asked for."""
    import mlflow

    folder(
        place,
        "picky",
        "def fill(weight, activation):\n"
        "    if activation.name == 'tanh':\n"
        "        raise ValueError('picky is not for tanh')\n"
        "    weight.zero_()\n",
    )
    from initflow.experiments.untrained.diagnose import diagnose

    before = Path(place / "mlflow.db").read_bytes()
    for run in (
        lambda: train(TrainConfig(init="picky", activation="tanh", dataset="digits")),
        lambda: diagnose(
            DiagnoseConfig(inits="he,picky", activations="relu,tanh", dataset="digits")
        ),
    ):
        with pytest.raises(SettingError, match=r"^scheme 'picky': picky is not for tanh$"):
            run()
    assert Path(place / "mlflow.db").read_bytes() == before
    assert mlflow.active_run() is None


def test_a_training_says_which_distribution_and_version_made_the_weights(place, store):
    """In its tags; its parameters and its name have the spec, its configuration the folder."""
    import mlflow

    folder(place, "mine", version="0.4")
    config = TrainConfig(
        init="mine:gain=1.5", dataset="digits", epochs=1, log_model=False, plugins_dir="plugins"
    )
    result = train(config)
    run = mlflow.MlflowClient().get_run(result.run_id)
    assert run.data.tags["initflow.scheme"] == "mine:gain=1.5"
    assert run.data.tags["initflow.provider"] == "mine 0.4"
    assert run.data.params["plugins_dir"] == "plugins"
    assert run.info.run_name.startswith("mine:gain=1.5 relu")
    predicted = result.reading.predicted["preactivation_second_moment"][0]
    assert predicted.holds(result.signals[0][1].layers["fc1"]["preactivation_second_moment"])


def test_a_diagnosis_takes_functions_by_their_place(place, store):
    """Beside built-in schemes; its metrics have keys that MLflow takes."""
    import mlflow

    from initflow.experiments.untrained.diagnose import diagnose

    (place / "inits.py").write_text(CODE)
    (place / ("long" * 50)).mkdir()
    (place / ("long" * 50) / "inits.py").write_text(CODE)
    spec = f"{place}//inits.py:fill:gain=1.5"
    other = f"{place}/_inits.py:fill:gain=1.5"
    longest = f"{place}/{'long' * 50}/inits.py:fill:gain=1.5"
    (place / "_inits.py").write_text(CODE)
    diagnosis = diagnose(
        DiagnoseConfig(
            inits=f"he,{spec},{other},{longest}",
            activations="relu",
            depth=2,
            width=20,
            dataset="digits",
            probe=50,
        )
    )
    assert [init for init, _ in diagnosis.readings] == ["he", spec, other, longest]
    metrics = mlflow.MlflowClient().get_run(diagnosis.run.id).data.metrics
    keys = [key for key in metrics if "inits.py" in key and key.startswith("gradient")]
    assert len(keys) == 3
    assert all(key.count("/") == 1 for key in keys)
    nested = mlflow.search_runs(search_all_experiments=True, output_format="list")
    providers = {run.data.tags.get("initflow.provider", "") for run in nested}
    assert any(provider.startswith(f"{place}//inits.py sha256:") for provider in providers)
    json.dumps([list(cell) for cell in diagnosis.readings])

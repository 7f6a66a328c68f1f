"""What `import initflow as inf` offers: its names, functions of settings, results to look at."""

import html
import inspect
import json
import re
import shutil
import sys
from types import ModuleType, SimpleNamespace

import mlflow
import numpy as np
import pytest
from matplotlib.figure import Figure

import initflow as inf
from initflow.core import progress as progressing
from initflow.core.progress import shown, silent
from initflow.experiments.public import public
from initflow.reporting import figures
from initflow.tracking import runs
from tests.commands import WITH_A_RUN
from tests.conftest import ROOT, SMALL_TABLE, python

# A name that goes, or comes, is a decision: users hold on to these.
NAMES = {
    *(
        "train",
        "compare",
        "trainability",
        "rates",
        "tune",
        "diagnose",
        "phase",
        "reproduce",
        "verify",
    ),
    *("TrainConfig", "CompareConfig", "TuneConfig", "DiagnoseConfig", "ReproduceConfig"),
    "TrainabilityConfig",
    *(
        "VerifyConfig",
        "PhaseConfig",
        "RatesConfig",
        "export",
        "inspect",
        "watch",
        "initializer",
        "initializers",
        "theory",
        "testing",
    ),
    *("initialize", "lightning_callback", "transformers_callback"),
    *("InitflowError", "SettingError", "PluginError", "DataError", "TrackingError", "OutageError"),
    *("OutboxError", "StudyError", "GivenUpError", "WorkError", "ReplayError", "ReportError"),
    *("VerdictError", "compare_runs", "read"),
}
SMALL = {"dataset": "digits", "hidden": "8", "epochs": 1, "probe": 100, "eval_every": 10}
SMALL |= {"threads": 1, "log_model": False}
RANGE = {"dataset": "digits", "hidden": "8", "rates": 3, "updates": 20, "threads": 1}
OF_MANY = SMALL | {"progress": False}


def test_the_public_names_are_frozen():
    """And are what completion offers."""
    assert set(dir(inf)) == set(inf.__all__) == NAMES
    for name in NAMES:
        getattr(inf, name)
    with pytest.raises(AttributeError, match=r"^module 'initflow' has no attribute 'wach'$"):
        inf.wach  # noqa: B018 - it is a slip


@pytest.mark.parametrize(("name", "some"), [("theory", "mean_field"), ("initializers", "BUILT_IN")])
def test_namespaces_are_lazy_too(name, some):
    """Their names complete, and are there when they are asked for."""
    namespace = getattr(inf, name)
    assert isinstance(namespace, ModuleType)
    assert some in dir(namespace) == sorted(namespace.__all__)
    for public_name in namespace.__all__:
        assert getattr(namespace, public_name) is not None


def test_a_new_python_has_them_by_attribute():
    """Without any import of a room."""
    program = (
        "import sys, initflow as inf\n"
        "assert not {'torch', 'mlflow', 'pandas', 'optuna', 'matplotlib'} & sys.modules.keys()\n"
        "print(inf.theory.mean_field(inf.initializers.ACTIVATIONS['relu'], 2.0, 0.0).chi_1)"
    )
    assert float(python(program)) == pytest.approx(1.0)


@pytest.mark.parametrize("name", WITH_A_RUN)
def test_help_tells_the_settings(name):
    """With their defaults, as notebooks show them."""
    told = inspect.signature(getattr(inf, name)).parameters
    kind = getattr(inf, f"{name.capitalize()}Config")
    assert {key: told[key].default for key in kind.__dataclass_fields__} == {
        key: field.default for key, field in kind.__dataclass_fields__.items()
    }
    assert (told["config"].default, told["config"].annotation) == (None, f"{kind.__name__} | None")
    assert (told["progress"].default, told["progress"].annotation) == (True, "bool | Progress")
    assert "config" in getattr(inf, name).__wrapped__.__annotations__
    words = inspect.getdoc(getattr(inf, name))
    assert f":class:`initflow.{kind.__name__}`" in words
    meanings = inspect.getdoc(kind)
    for field in kind.__dataclass_fields__.values():
        assert f"- ``{field.name}``: {field.metadata['meaning'][:20]}" in meanings


def probed(**settings):
    """A function of settings that gives what it got."""

    @public(inf.TrainConfig)
    def function(config, *, experiment=None, progress):
        return config, experiment, progress

    return function(**settings)


def test_a_configuration_or_its_settings():
    """As text or as Python values; the rest has its default."""
    config = inf.TrainConfig(init="xavier", hidden=(8, 8))
    assert probed(config=config)[0] is config
    assert probed(init="xavier", hidden="8x2", experiment="mine")[:2] == (config, "mine")
    assert probed()[0] == inf.TrainConfig()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"initt": "he"}, r"a setting must be one of .*not 'initt' \(did you mean 'init'\?\)"),
        ({"lr": "fast"}, "lr must be a number above 0"),
        (
            {"config": inf.TrainConfig(), "lr": 1, "init": "he"},
            "must stand in the TrainConfig that is given, not beside it: lr, init$",
        ),
        ({"config": "he"}, "^config must be a TrainConfig, not 'he'$"),
        ({"config": inf.CompareConfig()}, "^config must be a TrainConfig, not "),
    ],
)
def test_wrong_settings_are_told(settings, said):
    """Before anything is made, in one line."""
    with pytest.raises(inf.SettingError, match=said) as caught:
        probed(**settings)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def results(tracked):
    """One of each, by the command's name."""
    table = tracked / "table.toml"
    table.write_text(SMALL_TABLE)
    grid = {"inits": ["he", "zero"], "activations": ["relu"]}
    trained = inf.train(**SMALL | {"log_model": True}, progress=False)
    return {
        "train": trained,
        "compare": inf.compare(**OF_MANY, **grid, seeds=2),
        "tune": inf.tune(**OF_MANY, inits=["he"], trials=2, seeds=2),
        "diagnose": inf.diagnose(dataset="digits", depth=2, probe=50, **grid, progress=False),
        "phase": inf.phase(inits=["he", "zero"], points=4, progress=False),
        "rates": inf.rates(**RANGE, inits=["he"], seeds=2, progress=False),
        "reproduce": inf.reproduce(table=table, seeds=2, log_model=False, progress=False),
        "verify": inf.verify(trained, progress=False),
        "trainability": inf.trainability(
            dataset="digits", points=2, depths=[1, 3], width=8, updates=20, seeds=1, progress=False
        ),
    }


SHOWN = {
    "train": ("<Training: he, relu, 64-8-10, digits>", {"learning_curves", "weight_histograms"}),
    "compare": ("<Comparison: 64-8-10 networks on digits, 2 seeds>", {"accuracies"}),
    "tune": ("<Tuning: 64-8-10 networks with relu on digits, tuned>", {"rates_and_accuracies"}),
    "diagnose": ("<Diagnosis: untrained 64-100x2-10 networks on digits>", {"schemes_by_layer"}),
    "phase": ("<Phase: Deep networks with tanh, by their variances>", {"phase"}),
    "rates": ("<Rates: Learning rates of 64-8-10 networks with relu on digits, ", {"rates"}),
    "reproduce": ("<Reproduction: A small table, 2 seeds>", {"published_and_ours"}),
    "verify": ("<Verification: run ", set()),
    "trainability": ("<Trainability: tanh, width 8, σ_b² = 0.05: 20 updates", {"trainability"}),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_result_is_something_to_look_at(results, name):
    """A short repr, the sentences and numbers as HTML, a table, figures."""
    result, (written, drawn) = results[name], SHOWN[name]
    assert repr(result).startswith(written)
    assert len(repr(result)) < 100
    table = result.to_pandas()
    assert len(table) >= 1
    shown = result._repr_html_()
    assert "<table" in shown
    assert shown.count("<p>") == len(result.conclusions)
    figures = result.figures()
    assert drawn <= figures.keys()
    assert all(isinstance(figure, Figure) for figure in figures.values())
    assert re.findall(r"<summary>(\w+)</summary><img src=.data:image/png", shown) == [*figures]
    assert shown.count("<details open>") == bool(figures)


def test_a_figure_is_had_by_its_name(results):
    """And a name that there is none of is told with those that there are."""
    assert isinstance(results["compare"].figure("accuracies"), Figure)
    with pytest.raises(inf.SettingError, match=r"^name must be one of accuracies, .*'accuracy'"):
        results["compare"].figure("accuracy")


@pytest.mark.parametrize("name", ["compare", "rates", "reproduce", "trainability"])
def test_the_networks_of_a_result_are_a_table_too(results, name):
    """A row for each, with the id of its run and the settings in which they differ."""
    table = results[name].runs_to_pandas()
    assert list(table["run_id"]) == results[name].ids
    for row in table.to_dict("records"):
        run = mlflow.get_run(row["run_id"])
        assert row["init"] == run.data.tags["initflow.scheme"]
        told = {"seed": str(row["seed"])} | ({"lr": str(row["lr"])} if name == "rates" else {})
        assert told.items() <= run.data.params.items()
        measured = {key: value for key, value in row.items() if "/" in key}
        assert measured
        assert measured.items() <= run.data.metrics.items()
    assert ("lr" in table) == (name == "rates")


def test_tables_hold_the_numbers_that_the_runs_have(results):
    """To the last digit."""
    trained = results["train"].to_pandas()
    run = mlflow.get_run(results["train"].run_id)
    assert trained["accuracy/test"].dropna().iloc[-1] == run.data.metrics["accuracy/test"]
    compared = results["compare"].to_pandas().set_index("init")
    for row in results["compare"].rows:
        assert compared.loc[row.cell.init, "accuracy_mean"] == row.mean
    (study,) = results["tune"].trials.values()
    assert list(results["tune"].to_pandas()["lr"]) == [trial.lr for trial in study]
    diagnosed = results["diagnose"].to_pandas().set_index("init")
    assert diagnosed.loc["he", "backward"] == "stable"
    assert list(results["verify"].to_pandas()["verdict"]) == ["identical"] * 4


def test_a_result_is_json_too(results):
    """With the id of its run, where it has one."""
    for result in results.values():
        values = json.loads(json.dumps(result.as_json(), allow_nan=False))
        assert len(values["numbers"]) == len(result.to_pandas())
        assert values.get("run_id") == getattr(result, "run_id", None)


def test_what_is_shown_is_escaped(results, monkeypatch):
    """A scheme's name may hold markup."""
    result = results["compare"]
    monkeypatch.setattr(result, "sentences", ["<script>alert(1)</script> & more"])
    assert "<p>&lt;script&gt;alert(1)&lt;/script&gt; &amp; more</p>" in result._repr_html_()


def test_a_run_is_exported_and_verified_by_its_result(results, tmp_path):
    """By the result itself, its id, or the folder."""
    command = inf.export(results["train"], to=tmp_path / "it")
    assert command == f"initflow verify {tmp_path / 'it'}"
    for what in (results["train"].run_id, tmp_path / "it", str(tmp_path / "it")):
        assert inf.verify(what, device="cpu", progress=False).verdict == "identical"


@pytest.mark.parametrize("what", [None, 5, b"x", object()])
def test_what_is_no_run_is_told(what, tmp_path):
    """In one line, before anything is read."""
    with pytest.raises(inf.SettingError, match=r"^run must be the id of a run, a result"):
        inf.verify(what)
    with pytest.raises(inf.SettingError, match=r"^run must be the id of a run, a result"):
        inf.export(what, tmp_path / "it")


def test_one_network_of_many_is_verified_by_what_has_its_id(results):
    """A member of a comparison has one."""
    (member, *_) = results["compare"].members
    assert inf.verify(member, progress=False).verdict == "identical"


def test_an_experiment_has_a_name(tracked):
    """And is no number."""
    with pytest.raises(inf.SettingError, match=r"^experiment must be a name, not '5'$"):
        inf.train(**OF_MANY, experiment=5)


def test_numbers_of_numpy_are_numbers():
    """As they come out of an array."""
    config, *_ = probed(seed=np.int64(3), lr=np.float32(0.5), hidden=[np.int32(8)])
    assert config == inf.TrainConfig(seed=3, lr=0.5, hidden=(8,))
    with pytest.raises(inf.SettingError, match="seed must be a whole number"):
        probed(seed=np.float64(3.5))


def test_what_failed_is_said(tracked, caplog, monkeypatch):
    """By a warning, and where the result is shown; the others are there."""
    monkeypatch.setattr(figures, "_moments", None)
    made = inf.diagnose(dataset="digits", depth=2, inits=["he"], activations=["relu"], probe=50)
    assert "schemes_by_layer.png could not be made" in made._repr_html_()
    assert "schemes_by_layer.png could not be made" in caplog.text
    real = runs.Run.log_data

    def refuse(run, *given):
        if isinstance(run, runs.Draft) and run.entries[0].values["name"] == "zero relu seed 0":
            raise inf.TrackingError("no <room>")
        real(run, *given)

    monkeypatch.setattr(runs.Run, "log_data", refuse)
    compared = inf.compare(**OF_MANY, inits=["he", "zero"], activations=["relu"], seeds=2)
    assert compared.failed
    (said,) = compared.warnings()
    assert said == "zero relu seed 0 failed: no <room>"
    assert said in caplog.text
    assert html.escape(said) in compared._repr_html_()


def test_it_is_light_whatever_the_environment_says():
    """EAGER_IMPORT, which some set for other packages, changes nothing."""
    program = "import sys, initflow; print(initflow.SettingError.__name__, 'torch' in sys.modules)"
    assert python(program, EAGER_IMPORT="1") == "SettingError False\n"


def test_the_folder_above_the_checkout_does_not_hide_it(tmp_path):
    """There, the checkout itself is a folder `initflow` that is no package."""
    (tmp_path / "initflow").mkdir()
    assert python("import initflow; print(initflow.train)", tmp_path).startswith("<function train")


def test_it_can_be_imported_from_a_zip_file(tmp_path):
    """As some clusters send packages."""
    packed = shutil.make_archive(str(tmp_path / "it"), "zip", ROOT, "initflow")
    program = (
        f"import sys; sys.path.insert(0, {packed!r})\n"
        "import initflow as inf; print(inf.__file__, inf.theory.mean_field.__name__)"
    )
    assert python(program, tmp_path) == f"{packed}/initflow/__init__.py mean_field\n"


# Progress.


def test_progress_is_silent_where_nobody_looks(capsys):
    """In a script whose errors go to a file, or where it is told not to show any."""
    for given in (True, False):
        with shown(given) as told:
            assert told is silent
            told("training", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_progress_may_be_a_callback():
    """It is told what is done, how much, and of how much."""
    calls = []

    def note(*call):
        calls.append(call)

    with shown(note) as told:
        told("training", 1, 2)
    assert calls == [("training", 1, 2)]


def test_progress_is_a_bar_in_a_terminal(monkeypatch, capsys):
    """On standard error, so that results can be piped; gone at the end."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with shown(progress=True) as told:
        told("training", 1, 2)
        print("a result")  # noqa: T201 - of a script's own
    out, err = capsys.readouterr()
    assert out == "a result\n"
    assert "training" in err


def test_progress_is_an_element_in_a_notebook(monkeypatch):
    """Plain HTML, whose text is escaped; no widget is needed."""
    displayed = []

    handle = SimpleNamespace(update=lambda what, **how: displayed.append((what, how)))
    display = ModuleType("IPython.display")
    display.display = lambda *_, **__: handle
    ipython = ModuleType("IPython")
    shell = SimpleNamespace(kernel="there is one")
    ipython.display, ipython.get_ipython = display, lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert progressing._in_notebook()
    with shown(progress=True) as told:
        told("he & <b>", 1, 4)
    (during, how), (after, _) = displayed
    assert how == {"raw": True}
    assert during["text/plain"] == "he & <b>"
    assert re.fullmatch(
        r'<progress value="1" max="4"[^>]*></progress> he &amp; &lt;b&gt;', during["text/html"]
    )
    assert after == {"text/plain": "", "text/html": ""}  # it is gone at the end

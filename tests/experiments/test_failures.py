"""What fails after the numbers are there: it is told, and nothing is lost by it."""

import json
import logging
from pathlib import Path

import mlflow
import pytest

from initflow.cli import process
from initflow.core import environment
from initflow.errors import ReportError
from initflow.experiments import failures
from tests.conftest import SMALL_TABLE

SMALL = ("--dataset", "digits", "--hidden", "8", "--epochs", "1", "--eval-every", "15")
OWN = ("--probe", "20", "--threads", "1", "--log-model", "false")
TWO = ("--inits", "he,lecun")
# What is printed, and what must be there whatever is drawn: files of the run without a parent.
COMMANDS = {
    "train": (("train", *SMALL, *OWN), "test accuracy after", ["signals.json", "replay.json"]),
    "compare": (
        ("compare", *TWO, "--activations", "relu", "--seeds", "2", *SMALL, *OWN),
        "lecun",
        ["comparison.csv", "comparison.json"],
    ),
    "tune": (
        ("tune", *TWO, "--trials", "2", "--seeds", "2", *SMALL, *OWN),
        "lecun",
        ["tuning.csv", "tuning.json"],
    ),
    "rates": (
        (
            *("rates", *TWO, "--dataset", "digits", "--hidden", "8", "--rates", "2"),
            *("--updates", "15", "--seeds", "1", "--threads", "1"),
        ),
        "lecun",
        ["rates.csv", "rates.json"],
    ),
    "reproduce": (
        ("reproduce", "--table", "small.toml", "--seeds", "2", "--log-model", "false"),
        "85.00",
        ["reproduction.json"],
    ),
    "trainability": (
        (
            *("trainability", "--dataset", "digits", "--points", "2", "--depths", "1,3"),
            *("--seeds", "1", "--lrs", "0.1", "--updates", "20", "--threads", "1"),
        ),
        "trainability.csv has the run of every network",
        ["trainability.csv", "trainability.json"],
    ),
    "diagnose": (
        ("diagnose", *TWO, "--activations", "relu", "--depth", "2", "--dataset", "digits"),
        "lecun",
        ["diagnosis.json"],
    ),
    "phase": (("phase", *TWO, "--points", "4"), "lecun", ["phase.json"]),
}
with_a_report = {"compare": "report.html", "tune": "report.html"}
with_a_report |= {"rates": "report.html", "trainability": "report.html", "reproduce": "report.html"}


def top(store):
    """The run that has no parent, and its files by name."""
    (run,) = [
        run
        for run in mlflow.search_runs(search_all_experiments=True, output_format="list")
        if "mlflow.parentRunId" not in run.data.tags
    ]
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    return run, {file.name: file for file in folder.iterdir()}


def fail(*_, **__):
    raise RuntimeError("no room for\na figure")


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_are_kept_where_nothing_can_be_drawn_or_reported(
    command, store, tmp_path, capsys, monkeypatch
):
    """The table printed and logged, each figure told in one line with its cause, exit code 1."""
    (tmp_path / "small.toml").write_text(SMALL_TABLE)
    arguments, said, files = COMMANDS[command]
    monkeypatch.setattr(failures, "png", fail)
    monkeypatch.setattr(environment, "shown", fail)
    assert process.main(list(arguments)) == 1
    told = capsys.readouterr()
    assert said in told.out
    (line,) = told.err.splitlines()
    assert line.startswith("Error: ")
    figure = ".png could not be made: RuntimeError: no room for"
    assert figure in line
    report = with_a_report.get(command)
    assert not report or f"{report} could not be made: RuntimeError: no room for" in line
    run, there = top(store)
    assert run.info.status == "FINISHED"
    assert set(files) <= set(there)
    assert report not in there
    assert not any(name.endswith(".png") for name in there) or command == "tune"  # Optuna's
    for name in files:
        text = there[name].read_text()
        assert json.loads(text) if name.endswith(".json") else text.count("\n") >= 3


def test_a_tuning_is_kept_where_the_registry_refuses_its_model(store, capsys, monkeypatch):
    """Told in one line, exit code 1, the table printed and logged."""
    from initflow.errors import TrackingError
    from initflow.tracking import registry

    def refuse(*_):
        raise TrackingError("no room in the registry")

    monkeypatch.setattr(registry, "register", refuse)
    arguments, said, files = COMMANDS["tune"]
    assert process.main([*arguments, "--register", "mine"]) == 1
    told = capsys.readouterr()
    assert said in told.out
    what = "the versions in the registry could not be made"
    assert told.err == f"Error: {what}: no room in the registry\n"
    _, there = top(store)
    assert {*files, "report.html"} <= set(there)


def test_a_report_shows_the_figures_that_could_be_drawn(store, monkeypatch):
    """And says of the others that they are missing, and why."""
    from initflow.core.configurations import CompareConfig
    from initflow.experiments.comparisons.compare import compare
    from initflow.reporting import comparison_figures

    monkeypatch.setattr(comparison_figures, "comparison_curves", fail)
    small = {"dataset": "digits", "hidden": "8", "epochs": 1, "log_model": False, "probe": 20}
    result = compare(CompareConfig(inits="he,lecun", activations="relu", seeds=2, **small))
    assert result.failures == {"learning_curves.png": "RuntimeError: no room for"}
    _, there = top(store)
    page = there["report.html"].read_text()
    assert page.count("data:image/png") == 2
    assert "learning_curves.png could not be made: RuntimeError: no room for" in page
    assert "Learning curves" not in page


@pytest.mark.parametrize("what", ["model", "figures"])
def test_a_network_is_none_the_worse_for_its_model_or_figures(store, monkeypatch, what):
    """Of many, too: it is named, and the comparison has it."""
    from initflow.core.configurations import CompareConfig
    from initflow.experiments import network_run
    from initflow.experiments.comparisons.compare import compare
    from initflow.tracking.logged_models import model_files

    if what == "model":
        monkeypatch.setattr(model_files, "of", fail)
    else:
        monkeypatch.setattr(network_run.figures, "weight_histograms", fail)
    small = {"dataset": "digits", "hidden": "8", "epochs": 1, "probe": 0}
    small |= {"log_model": what == "model", "run_figures": what == "figures"}
    result = compare(CompareConfig(inits="he", activations="relu", seeds=2, **small))
    name = {"model": "model", "figures": "weight_histograms.png"}[what]
    assert result.failures == {
        f"{name} of he relu seed {seed}": "RuntimeError: no room for" for seed in (0, 1)
    }
    assert len(result.members) == 2
    assert not result.failed


def test_what_fails_is_noted_with_its_traceback_in_the_log(caplog):
    """And what comes after it is done."""
    failed = {}
    with caplog.at_level(logging.WARNING, "initflow"), failures.noted(failed, "the report"):
        raise ValueError("odd")
    assert failed == {"the report": "ValueError: odd"}
    assert "Traceback" in caplog.text
    with pytest.raises(ReportError, match="the report could not be made: ValueError: odd"):
        failures.check(failed)
    failures.check({})


def test_a_verdict_and_a_figure_that_failed_are_told_in_one_line(store, capsys, monkeypatch):
    """The verdict first, which the user asked for."""
    monkeypatch.setattr(failures, "png", fail)
    arguments, _, _ = COMMANDS["diagnose"]
    assert process.main([*arguments, "--fail-on", "stable,vanishing"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: fail_on=stable,vanishing: he relu is ")
    assert "; schemes_by_layer.png could not be made: RuntimeError: no room for" in line


def test_an_interruption_is_no_failure():
    """Ctrl-C in the middle of drawing ends it."""
    failed = {}
    with pytest.raises(KeyboardInterrupt), failures.noted(failed, "the report"):
        raise KeyboardInterrupt
    assert not failed


def test_debug_shows_why(store, capsys, caplog, monkeypatch):
    """With the traceback of the figure that could not be drawn."""
    monkeypatch.setattr(failures, "png", fail)
    with caplog.at_level(logging.WARNING, "initflow"):
        assert process.main(["--debug", *COMMANDS["train"][0]]) == 1
    assert "in fail" in caplog.text

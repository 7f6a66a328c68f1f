"""A comparison that logs the models of its best networks alone."""

from dataclasses import replace

import mlflow
import pytest

from initflow.core.configurations import CompareConfig, TrainConfig
from initflow.errors import SettingError
from initflow.experiments.comparisons import best_models
from initflow.experiments.comparisons.compare import compare
from initflow.experiments.populations import best_networks
from initflow.experiments.populations.best_networks import Best
from initflow.reporting.seed_statistics import Cell
from initflow.training import model
from tests.conftest import models_of

pytestmark = pytest.mark.usefixtures("tracked")
SETTINGS = {
    "dataset": "digits",
    "hidden": "12",
    "epochs": 1,
    "eval_every": 7,
    "probe": 0,
    "threads": 1,
    "stack": 2,
    "inits": "he,xavier",
    "activations": "relu",
    "seeds": 3,
    "log_model": "best",
}


def compared(name, progress=None, **own):
    """The comparison, and the runs of its networks in the experiment ``name``."""
    config = CompareConfig(**SETTINGS | own)
    result = compare(config, experiment=name, progress=progress or (lambda *_: None))
    return result, networks_of(name, result.run.id)


def networks_of(name, parent):
    found = mlflow.search_runs(experiment_names=[name], output_format="list")
    return [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent]


def assert_best_alone(runs, metric="accuracy/test"):
    """Those of each scheme with the highest accuracy have their own model, and no other has one."""
    schemes = {}
    for run in sorted(runs, key=lambda run: int(run.data.params["seed"])):
        schemes.setdefault(run.data.tags["initflow.scheme"], []).append(run)
    for some in schemes.values():
        trained = [run for run in some if run.data.tags["initflow.outcome"] == "finished"]
        best = max(trained, key=lambda run: run.data.metrics[metric], default=None)  # the first
        for run in some:
            assert len(models_of(run)) == (run is best)
            assert run.data.tags.get("initflow.best") == (metric if run is best else None)
            assert run.info.status == "FINISHED"
            assert run.data.params["log_model"] == "false"
        if best is not None:
            (model_id,) = models_of(best)
            state = mlflow.pyfunc.load_model(f"models:/{model_id}").get_raw_model().state_dict()
            assert model.weights_sha256(state) == best.data.tags["initflow.weights_sha256"]
            metrics = mlflow.get_logged_model(model_id).metrics
            assert {one.key: one.value for one in metrics}.items() <= best.data.metrics.items()
            assert metric in {one.key for one in metrics}


@pytest.mark.parametrize(
    ("own", "metric"),
    [
        ({}, "accuracy/test"),
        ({"workers": 2, "seeds": 2}, "accuracy/test"),
        ({"validation": 200, "seeds": 2, "inits": "he"}, "accuracy/validation"),
        ({"inits": "zero,normal:std=1e30", "seeds": 2}, "accuracy/test"),
    ],
    ids=["one worker", "two workers", "held out", "alike and diverged"],
)
def test_the_best_of_each_scheme_has_a_model(request, own, metric):
    """And no other; of networks that are as good the one of the first seed, of diverged none."""
    result, runs = compared(request.node.name, **own)
    assert result.failures == {}
    assert_best_alone(runs, metric)
    of_members = {member.run_id: member.model_id for member in result.members}
    assert of_members == {run.info.run_id: next(iter(models_of(run)), None) for run in runs}


@pytest.mark.parametrize(("seed", "is_best"), [(0, False), (2, True)])
def test_a_best_network_that_was_taken_over_is_trained_once_more(
    request, monkeypatch, seed, is_best
):
    """To the same bits: its weights were not kept by the command that was interrupted."""
    name, again = request.node.name, []

    def interrupt(what, *_):
        stacks = what.partition(", ")[2].split(" of ")[0]
        if stacks.isdigit() and int(stacks) >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compared(name, interrupt, seed=seed)
    own = best_models._again
    monkeypatch.setattr(
        best_models, "_again", lambda config, *rest: again.append(config) or own(config, *rest)
    )
    result, runs = compared(name, seed=seed)
    assert len(runs) == 6
    assert result.taken_over == 2
    assert result.failures == {}
    assert_best_alone(runs)
    assert bool(again) == is_best
    of_first = [run for run in runs if int(run.data.params["seed"]) == seed]
    best = {run.data.params["init"] for run in of_first if models_of(run)}
    assert {config.init for config in again} == best
    assert {config.seed for config in again} <= {seed}


def test_one_that_comes_out_otherwise_is_told_and_has_no_model(request, monkeypatch):
    """As where kernels promise no bits; the comparison is whole all the same."""
    name = request.node.name

    def interrupt(what, *_):
        if what == "logging the best models":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compared(name, interrupt, seeds=1)
    monkeypatch.setattr(model, "weights_sha256", lambda _: "0" * 64)
    result, runs = compared(name, seeds=1)
    assert result.taken_over == 2
    assert [models_of(run) for run in runs] == [[], []]
    assert set(result.failures) == {"model of he relu seed 0", "model of xavier relu seed 0"}
    why = "an interrupted command trained it, and trained again on cpu it has other bits"
    assert set(result.failures.values()) == {why}
    assert mlflow.get_run(result.run.id).info.status == "FINISHED"


def test_what_was_logged_before_an_interruption_is_not_logged_twice(request, monkeypatch):
    """The next command finds it."""
    name = request.node.name

    def interrupt(what, done, _):
        if what == "logging the best models" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compared(name, interrupt, seeds=1)
    _, runs = compared(name, seeds=1)
    assert_best_alone(runs)


def test_of_networks_that_are_not_feed_forward_too(request):
    """Their program is made anew with the weights that were kept."""
    _, runs = compared(request.node.name, model="cnn", inits="he", seeds=2, channels="2", kernel=3)
    assert sorted(len(models_of(run)) for run in runs) == [0, 1]
    best = max(runs, key=lambda run: run.data.metrics["accuracy/test"])
    assert models_of(best)


def test_one_network_of_each_cell_is_kept():
    """The best by its accuracy and, of the same one, the first seed, in whatever order."""
    cells = [Cell("he", "relu"), Cell("he", "tanh")]
    ranks = {0: 0.5, 1: 0.75, 2: 0.75, 3: 0.25}
    config = TrainConfig(validation=10)
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
        best = {}
        for seed in order:
            last = {"accuracy/validation": ranks[seed], "accuracy/test": 1.0 - ranks[seed]}.get
            its = best_networks.rank(replace(config, seed=seed), last)
            others = {cell: Best(its, 1, {}) for cell in cells}
            best_networks.take(best, others)
            assert others == {}
        assert best == {cell: Best((0.75, -1), 1, {}) for cell in cells}
    assert best_networks.rank(config, {}.get) is None
    of_test = best_networks.rank(TrainConfig(), {"accuracy/test": 0.5}.get)
    assert of_test == (0.5, 0)


@pytest.mark.parametrize(
    ("value", "found", "of_networks"),
    [
        (True, "true", True),
        ("True", "true", True),
        (False, "false", False),
        ("best", "best", False),
        ("bets", None, None),
        (None, None, None),
    ],
)
def test_which_models_are_logged_is_a_setting_of_the_comparison(value, found, of_networks):
    """As of one network it is true or false, and one more."""
    if found is None:
        with pytest.raises(SettingError, match="log_model must be one of true, false, best"):
            CompareConfig(log_model=value)
        return
    config = CompareConfig(log_model=value)
    assert config.as_text()["log_model"] == found
    assert config.network("he", "relu", 0).log_model is of_networks
    with pytest.raises(SettingError, match="log_model must be true or false, not 'best'"):
        TrainConfig(log_model="best")

"""Many networks as stacks: how they are parted, what each run carries, and what fails alone."""

import gc
import json
import math
import pickle
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException

from initflow.core import machine
from initflow.core.configurations import CompareConfig, TrainConfig
from initflow.diagnostics import record
from initflow.diagnostics.signals import Signals
from initflow.errors import InitflowError, TrackingError, WorkError
from initflow.experiments import failures, train
from initflow.experiments.populations import members, stacking
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.tracking import mlflow_page, runs
from initflow.tracking.delivery import KEY_TAG, OPENER
from initflow.training import cache, datasets, model, propagation, trainer
from tests.conftest import models_of

QUICK = {
    "dataset": "digits",
    "hidden": "16",
    "epochs": 1,
    "eval_every": 5,
    "probe": 0,
    "log_model": False,
}
MIB = 1024**2


def configs(inits, activations=("relu",), seeds=(0,), **own):
    """In the order of a comparison: seed by seed."""
    return [
        TrainConfig(**(QUICK | own | {"init": init, "activation": activation, "seed": seed}))
        for seed in seeds
        for activation in activations
        for init in inits
    ]


def train_all(asked, name, *, stack=None, threads=1, run_figures=False, **options):
    """What came of the networks, trained below a run in the experiment ``name``."""
    settings = CompareConfig(dataset="digits", stack=stack, threads=threads)
    with (
        cache.cleared_after(),
        stacking.trained_population(
            settings,
            asked,
            name="parent",
            summary="",
            experiment=name,
            run_figures=run_figures,
            **options,
        ) as population,
    ):
        return population


def runs_of(name):
    """The runs of an experiment by their name, the first before later ones of the same name."""
    runs = mlflow.search_runs(
        experiment_names=[name], order_by=["start_time DESC"], output_format="list"
    )
    return {run.info.run_name: run for run in runs}


def statuses(name):
    return {run_name: run.info.status for run_name, run in runs_of(name).items()}


def history(run):
    """Each metric's (step, value) pairs by step."""
    client = mlflow.MlflowClient()
    return {
        key: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, key))
        for key in run.data.metrics
    }


def hashes(name):
    """Initial and final weights', and the verdicts, by the name of a run."""
    runs = runs_of(name)
    runs.pop("parent")
    same = ("initial_weights_sha256", "weights_sha256", "verdict.forward", "verdict.backward")
    return {
        run_name: tuple(run.data.tags.get(f"initflow.{name}") for name in same)
        for run_name, run in runs.items()
    }


def artifacts(run):
    return {file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id)}


def train_one(config, name):
    """The run of a training by itself."""
    return mlflow.get_run(train.train(config, experiment=name).run_id)


def own_tags(run):
    """Those that we give, but for the one that tells any two runs apart."""
    tags = run.data.tags.items()
    return {k: v for k, v in tags if k.startswith("initflow.") and k not in (KEY_TAG, OPENER)}


def assert_carries_all_of(run, alone):
    """A network's run has whatever the run of ``train`` has, but figures and a model's folder."""
    theirs, ours = alone.data.tags, run.data.tags
    assert own_tags(alone).items() <= ours.items()
    assert ours["mlflow.note.content"] == theirs["mlflow.note.content"]
    of_mlflow = {key for key in theirs if key.startswith("mlflow.")}
    assert of_mlflow - set(ours) == set()
    assert run.data.params == alone.data.params
    their_history = history(alone)
    our_history = history(run)
    assert {k: v for k, v in our_history.items() if not k.startswith("by_layer/")} == their_history
    files = {file for file in artifacts(alone) if file.endswith(".json")}
    assert files <= artifacts(run)
    for file in files:
        uris = [f"runs:/{each.info.run_id}/{file}" for each in (run, alone)]
        one, other = map(mlflow.artifacts.load_text, uris)
        assert one == other
    (one,), (other,) = run.inputs.dataset_inputs, alone.inputs.dataset_inputs
    assert one.dataset.to_dictionary() == other.dataset.to_dictionary()
    contexts = [[(tag.key, tag.value) for tag in each.tags] for each in (one, other)]
    assert contexts[0] == contexts[1]


# How they are parted.


def sized(memory):
    """The last cache has so many bytes."""
    patch = pytest.MonkeyPatch()
    patch.setattr(machine, "working_memory", lambda _: memory)
    return patch


VALUES = {
    "init": ["he", "zero"],
    "activation": ["relu", "tanh"],
    "seed": [0, 1, 2],
    "lr": [0.1, 0.2],
    "gamma": [0.9, 1.0],
    "momentum": [0.0, 0.9],
    "nesterov": [True, False],
    "hidden": ["16", "100", "none"],
    "batch_size": [50, 100],
    "epochs": [1, 2],
    "validation": [0, 100, 200],
    "probe": [0, 50],
    "eval_every": [5, 7],
    "normalize": ["unit", "half"],
    "bias_init": ["pytorch", "zeros"],
    "weight_decay": ["auto", 0.1],
    "clip": ["none", 1.0],
}


@st.composite
def several(draw):
    """Settings of networks in any order, each like the one before but for a setting or none."""
    changes = st.sampled_from([(name, value) for name in VALUES for value in VALUES[name]])
    own = {name: draw(st.sampled_from(VALUES[name])) for name in ("seed", "validation")}
    asked = []
    for change in draw(st.lists(st.none() | changes, max_size=25)):
        own |= dict([change] if change else [])
        asked.append(TrainConfig(**(QUICK | own)))
    return asked


SHARED = ("hidden", "batch_size", "epochs", "validation", "probe", "eval_every", "normalize")


@settings(max_examples=60)
@given(several(), st.none() | st.integers(1, 7), st.integers(1, 4 * MIB))
def test_stacks_are_the_networks_in_their_order(asked, stack, memory):
    """None is lost; what trains together can; no stack is larger than it may be, or empty."""
    patch = sized(memory)
    try:
        found = list(stacking.stacks(asked, 64, 10, "cpu", stack))
        assert [config for together in found for config in together] == asked
        for together in found:
            first = together[0]
            widths = (64, *first.hidden, 10)
            limit = stack or stacking.room(widths, first.batch_size, "cpu")
            assert 1 <= len(together) <= limit
            for config in together:
                assert all(getattr(config, name) == getattr(first, name) for name in SHARED)
                assert not config.validation or config.seed == first.seed
    finally:
        patch.undo()


@settings(max_examples=60)
@given(
    cells=st.integers(1, 5),
    seeds=st.integers(1, 9),
    room=st.integers(1, 40),
    validation=st.booleans(),
)
@example(cells=4, seeds=5, room=9, validation=False)
@example(cells=3, seeds=2, room=2, validation=False)
def test_networks_of_a_seed_stay_together_where_there_is_room(cells, seeds, room, validation):
    """As many seeds at once as fit as a whole; only where not even one fits, it is parted."""
    inits = ("he", "zero", "lecun", "xavier", "normal")[:cells]
    asked = configs(inits, seeds=range(seeds), validation=100 * validation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacking, "room", lambda *_: room)
        found = list(stacking.stacks(asked, 64, 10, "cpu", None))
    by_seed = [{config.seed for config in together} for together in found]
    if room >= cells:
        assert all(
            len(together) == cells * len(of) for together, of in zip(found, by_seed, strict=True)
        )
        at_once = 1 if validation else room // cells
        assert len(found) == math.ceil(seeds / at_once)
        assert {len(of) for of in by_seed[:-1]} <= {at_once}
    elif validation:
        assert [len(together) for together in found] == [
            min(room, cells - at) for _ in range(seeds) for at in range(0, cells, room)
        ]
    else:
        assert len(found) == math.ceil(cells * seeds / room)


def test_what_is_asked_for_is_the_size():
    """Though it parts the networks of a seed; those without validation images only."""
    asked = configs(["he", "zero"], ["relu", "tanh"], [0, 1])
    assert [len(s) for s in stacking.stacks(asked, 64, 10, "cpu", 3)] == [3, 3, 2]
    assert [len(s) for s in stacking.stacks(asked, 64, 10, "cpu", 100)] == [8]
    own = configs(["he", "zero"], ["relu", "tanh"], [0, 1], validation=100)
    assert [len(s) for s in stacking.stacks(own, 64, 10, "cpu", 3)] == [3, 1, 3, 1]
    assert [len(s) for s in stacking.stacks(own, 64, 10, "cpu", 100)] == [4, 4]


@pytest.mark.parametrize(
    ("own", "stacks"),
    [
        ({"lr": 0.01, "gamma": 0.5, "momentum": 0.0, "nesterov": False}, 1),
        ({"init": "zero", "activation": "tanh", "seed": 9}, 1),
        ({"clip": 1, "weight_decay": 0.1}, 1),
        ({"parametrization": "mup", "base_width": 8}, 1),
        ({"optimizer": "adam"}, 2),
        ({"schedule": "cosine"}, 2),
        ({"hidden": "17"}, 2),
        ({"batch_size": 99}, 2),
        ({"epochs": 2}, 2),
        ({"dataset": "mnist"}, 2),
        ({"normalize": "half"}, 2),
        ({"eval_every": 6}, 2),
        ({"probe": 50}, 2),
        ({"validation": 100}, 2),
    ],
    ids=str,
)
def test_what_may_differ_within_a_stack(own, stacks):
    """What a recipe has of its own; not the shape, the batches' size, the steps or the data."""
    asked = [TrainConfig(**QUICK), TrainConfig(**(QUICK | own))]
    assert len(list(stacking.stacks(asked, 64, 10, "cpu", 10))) == stacks


def test_networks_by_adam_with_other_betas_train_together():
    """Though what is usual for SGD would be refused beside them."""
    asked = [
        TrainConfig(**(QUICK | {"optimizer": "adam", "schedule": "cosine"} | own))
        for own in ({}, {"lr": 0.01}, {"betas": "0.5,0.9"}, {"eps": 1e-3}, {"weight_decay": 1})
    ]
    assert len(list(stacking.stacks(asked, 64, 10, "cpu", 10))) == 1


def test_room_is_what_half_of_the_last_cache_holds():
    """Of parameters, gradients, momenta and activations; on CUDA of the free memory."""
    patch = sized(16 * MIB)
    try:
        assert stacking.room((784, 100, 10), 100, "cpu") == 7
        assert stacking.room((64, 16, 10), 100, "cpu") == 149
        assert stacking.room((784, 4_000, 10), 100, "cpu") == 1
        assert stacking.room((784, 100, 10), 100, "cpu", "adam") == 5
    finally:
        patch.undo()
    patch = sized(140 * 1024**3)
    try:
        assert stacking.room((784, 100, 10), 100, "cuda:0") > 10_000
    finally:
        patch.undo()


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 1_000), max_size=5),
    st.integers(1, 500),
    st.integers(0, 512 * MIB),
)
def test_larger_networks_have_less_room(hidden, batch, memory):
    """And there is always room for one."""
    patch = sized(memory)
    try:
        room = stacking.room((784, *hidden, 10), batch, "cpu")
        assert room >= 1
        assert room >= stacking.room((784, *hidden, 10, 10), batch, "cpu")
        assert room >= stacking.room((784, *hidden, 10), batch + 1, "cpu")
        weights = 784 * (hidden[0] if hidden else 10)
        assert room == 1 or room * 3 * 4 * weights <= memory / 2
    finally:
        patch.undo()


# What they come to.


def test_weights_are_those_of_train_however_they_are_stacked(tracked, monkeypatch):
    """Final and initial ones, verdicts, and every metric at every step."""
    asked = configs(["he", "xavier:gain=1.5"], ["relu", "tanh"], [0, 7], probe=50)
    for stack in (1, 3, None):
        train_all(asked, f"stack {stack}", stack=stack)
    found = [hashes(f"stack {stack}") for stack in (1, 3, None)]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0].values())) == len(asked)
    monkeypatch.setattr(failures, "log_figures", lambda *_: {})
    for config, stack in ((asked[1], 3), (asked[6], None)):
        alone = train_one(config, "one by one")
        name = alone.info.run_name.replace(" digits", "")
        assert_carries_all_of(runs_of(f"stack {stack}")[name], alone)


def test_with_two_threads_and_images_held_out_too(tracked, monkeypatch):
    """Each seed has validation images of its own, and a stack all that its seed has."""
    asked = configs(["he", "lecun"], ["tanh"], [3, 4], validation=200)
    with pytest.MonkeyPatch.context() as patch:
        stacks = []
        real = stacking.train_together
        patch.setattr(
            stacking,
            "train_together",
            lambda r, *a, **k: stacks.append(len(r)) or real(r, *a, **k),
        )
        train_all(asked, "held out", threads=2)
    assert stacks == [2, 2]
    monkeypatch.setattr(failures, "log_figures", lambda *_: {})
    runs = runs_of("held out")
    for config in asked[1:3]:
        alone = train_one(replace(config, threads=2), "held out alone")
        run = runs[alone.info.run_name.replace(" digits", "")]
        assert "accuracy/validation" in run.data.metrics
        assert history(run) == history(alone)
        assert own_tags(alone).items() <= run.data.tags.items()


@pytest.fixture(scope="module")
def carried(tracked):
    """Two networks with all that there is, and one of them by itself."""
    own = {"probe": 50, "log_model": True, "hidden": "16,8", "normalize": "standard"}
    asked = configs(["he:mode=fan_out"], ["tanh"], [5], validation=100, **own)
    population = train_all(asked, "whole", run_figures=True)
    runs = runs_of("whole")
    return population, runs, asked[0], train_one(asked[0], "whole alone")


def test_a_run_carries_all_that_a_run_of_train_carries(carried):
    """Params, tags, metrics, tables, data, the description, and figures where they are asked."""
    population, runs, config, alone = carried
    run = runs["he:mode=fan_out tanh seed 5"]
    assert_carries_all_of(run, alone)
    params = {k: v for k, v in run.data.params.items() if not k.startswith("resolved.")}
    assert TrainConfig(**params) == config
    assert set(params) == {setting.name for setting in fields(TrainConfig)}
    assert artifacts(run) == artifacts(alone)
    assert sum(file.endswith(".png") for file in artifacts(run)) == 5
    more = set(run.data.tags) - set(alone.data.tags)
    groups = ["he:mode=fan_out"]
    group = mlflow_page.run_tags(groups)[0]
    assert more == {
        "initflow.bit_identical_to_alone",
        "initflow.stack",
        "mlflow.parentRunId",
        *group,
    }
    assert run.data.tags["initflow.bit_identical_to_alone"] == "true"
    assert group.items() <= run.data.tags.items()
    assert group[mlflow_page.group_tag(groups)] == "he:mode=fan_out"
    assert run.data.tags["mlflow.parentRunId"] == runs["parent"].info.run_id
    assert run.info.status == "FINISHED"
    assert [member.run_id for member in population.members] == [run.info.run_id]


def test_its_model_is_that_of_train(carried):
    """It predicts the same, and has the last values of the metrics."""
    _, runs, _, alone = carried
    run = runs["he:mode=fan_out tanh seed 5"]
    images = np.random.default_rng(0).random((7, 64), dtype=np.float32)
    loaded = [mlflow.pyfunc.load_model(f"runs:/{each.info.run_id}/model") for each in (run, alone)]
    np.testing.assert_array_equal(*(each.predict(images) for each in loaded))
    state = loaded[0].get_raw_model().state_dict()
    weights = {k: v for k, v in state.items() if k.startswith("fc")}
    assert model.weights_sha256(weights) == run.data.tags["initflow.weights_sha256"]
    (model_id,) = models_of(run)
    logged = mlflow.get_logged_model(model_id)
    assert {metric.key: metric.value for metric in logged.metrics} == run.data.metrics
    assert logged.source_run_id == run.info.run_id


def test_the_model_of_train_has_the_last_values_too(carried):
    """MLflow's page of models shows them."""
    *_, alone = carried
    (model_id,) = models_of(alone)
    metrics = mlflow.get_logged_model(model_id).metrics
    accuracies = [metric.value for metric in metrics if metric.key == "accuracy/test"]
    assert accuracies == [alone.data.metrics["accuracy/test"]]


def test_the_untrained_signals_are_drawn_by_layer(carried):
    """The layer's number is the step."""
    _, runs, _, _ = carried
    found = history(runs["he:mode=fan_out tanh seed 5"])
    forward = [(layer, found[f"preactivation_variance/fc{layer}"][0][1]) for layer in (1, 2, 3)]
    assert found["by_layer/preactivation_variance"] == forward
    *before, last = (found[f"gradient_variance/fc{layer}"][0][1] for layer in (1, 2, 3))
    assert found["by_layer/relative_gradient_variance"] == [
        *((layer, value / last) for layer, value in enumerate(before, start=1)),
        (3, 1.0),
    ]
    keys = {key for key in found if key.startswith("by_layer/")}
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("gradients", "relative"),
    [
        ([4e-9, 2e-9, 1e-9], [4.0, 2.0, 1.0]),
        ([None, 2.0, 4.0], [None, 0.5, 1.0]),
        ([1.0, 0.0], [None, None]),
        ([1.0, None], [None, None]),
        ([1e300, 1e-300], [None, 1.0]),
    ],
)
def test_gradients_by_layer_are_relative_to_the_last_layers(gradients, relative):
    """Whatever is not a finite number is left out."""
    layers = {
        f"fc{at}": {} if value is None else {"gradient_variance": value}
        for at, value in enumerate(gradients, start=1)
    }
    found = stacking.by_layer(Signals(layers, {}))
    assert found["relative_gradient_variance"] == pytest.approx(relative)


def test_little_is_kept_of_a_network(tracked):
    """However deep it is: what figures show of its signals, and no name of a metric twice."""
    asked = configs(["he", "xavier"], hidden="8x30", probe=50, eval_every=1)
    population = train_all(asked, "small")
    for member in population.members:
        assert {key for of in member.signals.layers.values() for key in of} <= set(members.KEPT)
        assert len(member.signals.layers) == 31
        assert len(pickle.dumps(replace(member, config=asked[0]))) < 8_000
    assert len(population.metrics) > 500


def test_a_network_is_forgotten_when_it_is_written(tracked, monkeypatch):
    """The next ones of its stack are written without its weights and losses in memory."""
    alive, known, write = [], [], stacking.network_run.log_network

    def log_network(parent, one, *rest, **more):
        known.append(weakref.ref(one))
        gc.collect()
        alive.append(sum(ref() is not None for ref in known))
        return write(parent, one, *rest, **more)

    monkeypatch.setattr(stacking.network_run, "log_network", log_network)
    train_all(configs(["he", "xavier", "zero"]), "forgotten", stack=3)
    assert alive == [1, 1, 1]


def test_no_figure_and_no_model_unless_asked(tracked):
    """They take longer than training it; more than MLflow takes at once of metrics is logged."""
    (config,) = configs(["he"], epochs=3, eval_every=1, probe=50, hidden="8x3")
    population = train_all([config], "long")
    (member,) = population.members
    run = mlflow.get_run(member.run_id)
    assert artifacts(run) == {"config.json", "replay.json", "signals.json", "trace.safetensors"}
    assert not models_of(run)
    found = {k: v for k, v in history(run).items() if not k.startswith(("by_layer", "predicted"))}
    assert sum(map(len, found.values())) > 2_000
    updates = trainer.iterations(TrainConfig(epochs=3), 1_437)
    for points in found.values():
        assert [step for step, _ in points] == list(range(updates + 1))
    assert population.metrics == set(run.data.metrics)
    assert member.outcome.curve == found["accuracy/test"]


def test_one_that_diverges_is_a_result_and_leaves_the_others_alone(tracked):
    """With its step, with finite values only, and without a model."""
    own = {"hidden": "50x4", "lr": 0.02, "probe": 50, "log_model": True}
    inits = ["he", "normal", "lecun"]
    population = train_all(configs(inits, ["linear"], **own), "with one", stack=3)
    train_all(configs(["he", "lecun"], ["linear"], **(own | {"log_model": False})), "without")
    found, without = hashes("with one"), hashes("without")
    assert {name: found[name] for name in without} == without
    runs = runs_of("with one")
    assert set(statuses("with one").values()) == {"FINISHED"}
    run = runs["normal linear seed 0"]
    step = int(run.data.tags["initflow.diverged_at_step"])
    assert 0 < step < 15
    assert run.data.tags["initflow.outcome"] == "diverged"
    assert f"not finite at iteration {step}" in run.data.tags["mlflow.note.content"]
    assert all(math.isfinite(value) for points in history(run).values() for _, value in points)
    assert max(at for points in history(run).values() for at, _ in points) <= max(step, 5)
    assert not models_of(run)
    for name in without:
        assert runs[name].data.tags["initflow.outcome"] == "finished"
        assert "initflow.diverged_at_step" not in runs[name].data.tags
        assert len(models_of(runs[name])) == 1
    outcomes = [member.outcome.diverged_at for member in population.members]
    assert outcomes == [None, step, None]
    alone = record.start(configs(["normal"], ["linear"], **own)[0], find("normal"), load())
    record.train_together([alone], load())
    assert alone.diverged_at == step
    assert model.weights_sha256(alone.trained) == found["normal linear seed 0"][1]


def test_one_that_is_not_finite_from_the_start_is_a_result_too(tracked):
    """Though no layer's gradient is a number."""
    asked = configs(["normal:std=1e30", "he"], ["linear"], probe=50)
    population = train_all(asked, "at once")
    assert population.failed == {}
    run = runs_of("at once")["normal:std=1e+30 linear seed 0"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["initflow.diverged_at_step"] == "0"
    assert all(math.isfinite(value) for value in run.data.metrics.values())


def load():
    return datasets.load(TrainConfig(**QUICK))


# What fails.


def test_where_no_run_can_be_written_that_is_the_error(tracked, monkeypatch):
    """Of the parent too: there is nothing to compare."""

    def refuse(*_):
        raise TrackingError("the disk is full")

    monkeypatch.setattr(runs.Run, "log_history", refuse)
    with pytest.raises(InitflowError, match="no network was left: the disk is full"):
        train_all(configs(["he", "lecun"]), "full")
    assert set(statuses("full").values()) == {"FAILED"}


PLUGIN = """
def positive(weight, generator):
    weight.normal_(0, 0.1, generator=generator)
    if weight.shape[1] == 64 and weight[0, 0] > 0:
        raise RuntimeError("the first weight is positive")
"""


def seeds_of(scheme):
    """The first three seeds for which it fills a network, and two for which it does not."""
    splits, whole, broken = load(), [], []
    for seed in range(100):
        try:
            record.start(TrainConfig(**QUICK, seed=seed), scheme, splits)
            whole.append(seed)
        except InitflowError:
            broken.append(seed)
        if len(whole) > 2 and len(broken) > 1:
            return whole[:3], broken[:2]
    return pytest.fail("no such seeds")


def test_a_scheme_that_fails_under_one_seed_leaves_the_others_whole(tracked, tmp_path):
    """Its run says why; the weights of the others are those that they have without it."""
    (tmp_path / "odd.py").write_text(PLUGIN)
    init = f"{tmp_path}/odd.py:positive"
    whole, broken = seeds_of(find(init))
    seeds = [whole[0], broken[0], whole[1], broken[1], whole[2]]
    spec = find(init).spec
    population = train_all(configs([init, "he"], seeds=seeds), "odd")
    names = {f"{spec} relu seed {seed}" for seed in broken}
    assert set(population.failed) == names
    assert all("the first weight is positive" in why for why in population.failed.values())
    assert [(member.cell.init, member.outcome.seed) for member in population.members] == [
        (own, seed) for seed in seeds for own in (spec, "he") if own == "he" or seed in whole
    ]
    runs = runs_of("odd")
    assert {name for name, run in runs.items() if run.info.status == "FAILED"} == names
    assert Counter(run.info.status for run in runs.values()) == {"FAILED": 2, "FINISHED": 9}
    for name in names:
        run = runs[name]
        assert run.data.tags["initflow.outcome"] == "failed"
        assert "the first weight is positive" in run.data.tags["mlflow.note.content"]
        assert run.data.tags["mlflow.parentRunId"] == runs["parent"].info.run_id
        assert run.data.params["init"] == init
        assert run.data.metrics == {}
    train_all(configs(["he"], seeds=seeds), "without odd")
    assert hashes("without odd").items() <= hashes("odd").items()


def test_a_stack_in_which_none_can_start_is_passed_over(tracked, tmp_path):
    """The next one is trained."""
    (tmp_path / "odd.py").write_text(PLUGIN)
    init = f"{tmp_path}/odd.py:positive"
    whole, broken = seeds_of(find(init))
    asked = configs([init], seeds=[whole[0], broken[0], whole[1]])
    population = train_all(asked, "alone and odd", stack=1)
    assert [member.outcome.seed for member in population.members] == whole[:2]
    assert len(population.failed) == 1


def interrupt(error, *, after):
    """Raises ``error`` in the stack before which ``after`` networks were done."""

    def progress(what, done, of):
        if f"{after} of" in what and done > of / 2:
            raise error

    return progress


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "KILLED"), (SystemExit(), "KILLED"), (RuntimeError("no"), "FAILED")],
    ids=repr,
)
def test_an_interruption_keeps_what_was_measured(tracked, error, status):
    """Stacks before are whole, the one it cut off is closed with its metrics, none is RUNNING."""
    name = f"cut off by {error!r}"
    asked = configs(["he", "lecun"], seeds=[0, 1, 2], probe=50)
    with pytest.raises(type(error)) as raised:
        train_all(asked, name, stack=2, progress=interrupt(error, after=2))
    assert raised.value is error
    assert mlflow.active_run() is None
    assert statuses(name) == {
        "parent": status,
        "he relu seed 0": "FINISHED",
        "lecun relu seed 0": "FINISHED",
        "he relu seed 1": status,
        "lecun relu seed 1": status,
    }
    runs = runs_of(name)
    assert (status == "KILLED") == any(
        runs["parent"].info.run_id in note for note in getattr(error, "__notes__", ())
    )
    (config,) = configs(["he"], seeds=[1], probe=50)
    whole = record.start(config, find("he"), load())
    record.train_together([whole], load())
    run = runs["he relu seed 1"]
    found = history(run)
    assert [step for step, _ in found["accuracy/test"]] == [0, 5, 10]
    assert found == {k: v[:3] for k, v in whole.history.items()}
    assert {k: v for k, v in run.data.params.items() if not k.startswith("resolved.")} == (
        config.as_text()
    )
    assert run.data.tags["mlflow.parentRunId"] == runs["parent"].info.run_id
    assert mlflow_page.run_tags(["he", "lecun"])[0].items() <= run.data.tags.items()
    assert "initflow.weights_sha256" not in run.data.tags
    assert "config.json" in artifacts(run)
    assert len(run.inputs.dataset_inputs) == 1


@pytest.mark.parametrize("method", ["log_json", "log_history", "log_data"])
def test_a_run_that_cannot_be_written_leaves_the_others_whole(tracked, monkeypatch, method):
    """It is FAILED, and what it failed by is kept."""
    name, real = f"without {method}", getattr(runs.Run, method)

    def refuse(run, *args, **options):
        if run.id.startswith("waiting-") and run.entries[0].values["name"] == "lecun relu seed 0":
            raise TrackingError(f"no {method}")
        return real(run, *args, **options)

    monkeypatch.setattr(runs.Run, method, refuse)
    asked = configs(["he", "lecun"], seeds=[0, 1])
    population = train_all(asked, name, stack=4)
    assert population.failed == {"lecun relu seed 0": f"no {method}"}
    assert statuses(name) == {
        "parent": "FINISHED",
        "he relu seed 0": "FINISHED",
        "lecun relu seed 0": "FAILED",
        "he relu seed 1": "FINISHED",
        "lecun relu seed 1": "FINISHED",
    }
    assert len(population.members) == 3


@pytest.mark.parametrize(
    ("error", "status"), [(MlflowException("locked"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_run_whose_params_cannot_be_written_is_closed(tracked, monkeypatch, error, status):
    """It was made, so it has to end."""
    name, real = f"params {error!r}", mlflow.MlflowClient.log_batch

    def refuse(client, run_id, metrics=(), params=(), tags=(), **options):
        if any((param.key, param.value) == ("seed", "1") for param in params):
            raise error
        return real(client, run_id, metrics, params, tags, **options)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", refuse)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            train_all(configs(["he"], seeds=[0, 1]), name)
    else:
        assert set(train_all(configs(["he"], seeds=[0, 1]), name).failed) == {"he relu seed 1"}
    found = statuses(name)
    assert "RUNNING" not in found.values()
    assert found["he relu seed 1"] == status


def test_a_run_cut_off_in_the_middle_of_a_statement_is_closed(tracked, monkeypatch):
    """What SQLite had begun to write is let go, so that the run's end can be written."""
    from sqlalchemy.engine.default import DefaultDialect

    real, cut = DefaultDialect.do_executemany, []

    def executemany(self, cursor, statement, parameters, context=None):
        if cut or "INTO metrics" not in statement:
            return real(self, cursor, statement, parameters, context)
        cut.append(statement)

        def stop():
            yield parameters[0]
            raise KeyboardInterrupt

        return cursor.executemany(statement, stop())

    monkeypatch.setattr(DefaultDialect, "do_executemany", executemany)
    with pytest.raises(KeyboardInterrupt):
        train_all(configs(["he", "lecun"]), "in a statement")
    monkeypatch.undo()
    assert cut
    assert set(statuses("in a statement").values()) == {"KILLED"}


def test_an_interruption_while_runs_are_written_loses_none(tracked, monkeypatch):
    """Those written before stay whole, and of those after are the measurements."""
    real = runs.Run.log_data

    def interrupt(run, splits):
        if run.id.startswith("waiting-") and run.entries[0].values["name"] == "lecun relu seed 0":
            raise KeyboardInterrupt
        real(run, splits)

    monkeypatch.setattr(runs.Run, "log_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_all(configs(["he", "lecun"], seeds=[0, 1]), "writing", stack=4)
    assert statuses("writing") == {
        "parent": "KILLED",
        "he relu seed 0": "FINISHED",
        "lecun relu seed 0": "KILLED",
        "he relu seed 1": "KILLED",
        "lecun relu seed 1": "KILLED",
    }
    found = history(runs_of("writing")["he relu seed 1"])
    assert [step for step, _ in found["accuracy/test"]] == [0, 5, 10, 15]


# What it takes.

MEASURE_MEMORY = """
import json, re
from pathlib import Path
import torch
from initflow.diagnostics import record
from initflow.initializers import plugins
from initflow.training import trainer
from initflow.training.splits import Split, Splits
from initflow.core.configurations import CompareConfig, TrainConfig

torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)

def split(n):
    return Split(torch.rand(n, 784, generator=g), torch.randint(10, (n,), generator=g))

of = "0" * 64, "memory", (1, 28, 28), 10
splits = Splits("synthetic", split(60_000), None, split(500), 0.0, 1.0, *of)
trainer.batch_order = lambda images, seed, epoch: torch.arange(500) * (seed + 1)  # five updates
configs = [TrainConfig(seed=n // 8, epochs=1, probe=100) for n in range(200)]
scheme = plugins.find("he")

def memory(line):  # of this process alone: getrusage's peak may be that of who started it
    return int(re.search(rf"{line}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

before, told = memory("VmRSS"), []
records = [record.start(config, scheme, splits) for config in configs]
record.train_together(records, splits, progress=lambda *what: told.append(what))
peak = memory("VmHWM")
steps = [one.step for one in records]
evaluations = [len(one.history["accuracy/test"]) for one in records]
print(json.dumps({"before": before, "peak": peak, "steps": steps, "evaluations": evaluations}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_200_networks_train_at_once_in_little_memory():
    """784-100-10 each: less than 1.5 GB beside the data, of the size of MNIST."""
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY], check=True, capture_output=True, text=True
    )
    found = json.loads(ran.stdout)
    assert found["before"] > 60_000 * 784 * 4  # or the peak would be that of other things
    assert found["steps"] == [5] * 200
    assert found["evaluations"] == [2] * 200
    assert 200 * 79_510 * 4 < found["peak"] - found["before"] < 1.5e9


@pytest.mark.parametrize(
    ("n", "told"),
    [
        (2, "2 networks at once do not fit into memory: give 'stack' a number below 2"),
        (1, "a network of this size does not fit into memory: it takes a smaller one"),
    ],
)
def test_networks_that_do_not_fit_into_memory_are_told_in_a_line(tracked, monkeypatch, n, told):
    """By PyTorch's own error, which is of a training that asks for more than there is."""
    monkeypatch.setattr(stacking, "train_together", lambda *_, **__: torch.empty(1 << 60))
    with pytest.raises(WorkError, match=f"^{told}$"):
        train_all(configs(["he", "xavier"][:n]), f"too large {n}")
    (killed,) = {status for name, status in statuses(f"too large {n}").items() if name != "parent"}
    assert killed == "FAILED"


def test_networks_that_end_one_by_one_leave_no_buffers_behind(monkeypatch):
    """Each ending makes buffers for those that go on; a hundred of them would fill the memory."""
    import weakref

    made = []
    real = propagation.Pass.__init__

    def init(self, *args, **options):
        real(self, *args, **options)
        made.append(weakref.ref(self))

    monkeypatch.setattr(propagation.Pass, "__init__", init)
    splits = load()
    networks = [record.start(config, find("he"), splits).initial for config in configs(["he"] * 10)]
    recipe = trainer.Recipe(ACTIVATIONS["relu"], 0, [0.1])
    stack = model.Parameters.stack(networks, "cpu")
    population = trainer.Trainer(stack, [recipe] * 10, splits.train)
    alive = []
    for checkpoint in population.train(batch_size=100, eval_every=1):
        alive.append(sum(both() is not None for both in made))
        if checkpoint.step < 9:
            population.stop(checkpoint.step)
    assert len(made) >= 10
    assert max(alive) <= 3

"""One tracked run: what it carries in MLflow, however it ends."""

import math
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException

import initflow
from initflow.core.configurations import TrainConfig
from initflow.diagnostics import networks
from initflow.diagnostics.signals import QUANTITIES
from initflow.errors import InitflowError, SettingError, TrackingError
from initflow.experiments import network_run, train
from initflow.experiments.replay import provenance
from initflow.initializers.activations import ACTIVATIONS
from initflow.tracking.delivery import KEY_TAG, OPENER
from initflow.training import datasets, model, trainer
from tests.conftest import models_of

QUICK = {"dataset": "digits", "log_model": False, "eval_every": 20, "probe": 0}

OF_ACTIVATIONS = {
    "activation_variance",
    "activation_second_moment",
    "dead_fraction",
    "saturated_fraction",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run on the digits, with validation and a normalization, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        config = TrainConfig(
            init="xavier:gain=1.5",
            activation="tanh",
            dataset="digits",
            hidden="32,16",
            validation=100,
            normalize="standard",
            eval_every=20,
            threads=1,
            seed=3,
        )
        told = []
        result = train.train(config, progress=lambda *what: told.append(what))
        assert not result.failures
        yield result, mlflow.get_run(result.run_id), told
        mlflow.set_tracking_uri(None)


def test_metrics_are_the_contracts(finished):
    """Names, steps from before the first update to the last, and finite fractions."""
    result, run, _ = finished
    once = {
        f"{quantity}/{layer}"
        for quantity in QUANTITIES.keys() - {"branch_ratio", "update_ratio"}
        for layer in ("fc1", "fc2", "fc3")
        if layer != "fc3" or quantity not in OF_ACTIVATIONS
    }
    predicted = {key for key in result.history if key.startswith("predicted_")}
    assert set(result.history) - predicted == once | {
        "accuracy/test",
        "accuracy/train",
        "accuracy/validation",
        "loss/peak",
        "loss/test",
        "loss/train",
        "loss/validation",
        "lr",
    }
    assert set(run.data.metrics) == set(result.history)
    client = mlflow.MlflowClient()
    for key in set(result.history) - predicted:
        logged = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
        assert sorted(logged) == result.history[key]
        assert [step for step, _ in sorted(logged)] == [0, 20, 40, 60, 70]
        assert all(math.isfinite(value) for _, value in logged)
    assert 0.85 < run.data.metrics["accuracy/test"] <= 1
    assert result.last("accuracy/test") == run.data.metrics["accuracy/test"]
    assert result.last("loss/nothing") is None
    assert len(result.losses) == result.step == 70
    assert result.last("loss/train") == pytest.approx(sum(result.losses[60:]) / 10)


def test_params_are_the_whole_configuration_and_what_auto_became(finished):
    """As text that gives the configuration back."""
    result, run, _ = finished
    resolved = {k: v for k, v in run.data.params.items() if k.startswith("resolved.")}
    assert resolved == {"resolved.device": "cpu", "resolved.threads": "1"}
    params = {k: v for k, v in run.data.params.items() if k not in resolved}
    assert TrainConfig(**params) == result.config


def test_tags_name_version_scheme_outcome_and_weights(finished):
    """The hashes are those of the network that was trained, before and after."""
    result, run, _ = finished
    tags = {k: v for k, v in run.data.tags.items() if k.startswith("initflow.")}
    tags = {k: v for k, v in tags.items() if not k.startswith(("initflow.env.", KEY_TAG, OPENER))}
    initial = model.initialize(
        (64, 32, 16, 10), result.scheme, ACTIVATIONS["relu"], bias_init="pytorch", seed=3
    )
    final = tags.pop("initflow.weights_sha256")
    assert tags == {
        "initflow.version": initflow.__version__,
        "initflow.scheme": "xavier:gain=1.5",
        "initflow.provider": "built-in",
        "initflow.data": "published",
        "initflow.data_sha256": datasets.load(result.config).digest,
        "initflow.outcome": "finished",
        "initflow.losses_sha256": provenance.losses_sha256(result.losses),
        "initflow.verdict.forward": "stable",
        "initflow.verdict.backward": "stable",
        "initflow.initial_weights_sha256": model.weights_sha256(initial.state()),
    }
    logged = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model").get_raw_model()
    weights = {k: v for k, v in logged.state_dict().items() if k.startswith("fc")}
    assert model.weights_sha256(weights) == final


def test_what_theory_predicts_is_beside_what_was_measured(finished):
    """At step 0, under the measured quantity's name, and near to it."""
    result, run, _ = finished
    metrics = run.data.metrics
    client = mlflow.MlflowClient()
    keys = [key for key in metrics if key.startswith("predicted_")]
    assert len(keys) == 3 + 2 + 3
    for key in keys:
        (predicted,) = client.get_metric_history(run.info.run_id, key)
        step, measured = result.history[key.removeprefix("predicted_")][0]
        assert (predicted.step, step) == (0, 0)
        assert predicted.value == pytest.approx(measured, rel=0.8)
    assert run.data.tags["initflow.verdict.forward"] == "stable"
    assert run.data.tags["initflow.verdict.backward"] == "stable"


def test_the_signals_are_a_table_and_figures(finished):
    """JSON with every step and layer; the figures are whole PNG files."""
    result, run, _ = finished
    table = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/signals.json")
    assert table["quantities"] == QUANTITIES
    assert [at["step"] for at in table["measured"]] == [0, 20, 40, 60, 70]
    for at, (_, signals) in zip(table["measured"], result.signals, strict=True):
        assert at["layers"] == signals.layers
    assert table["predicted"]["gradient_second_moment"]["fc1"]["expected"] > 0
    assert table["verdict"] == {"forward": "stable", "backward": "stable", "advice": ""}
    for name in ("predicted_and_measured", "signals", "received"):
        file = mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/{name}.png")
        assert Path(file).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_measuring_leaves_the_training_bit_identical(store, activation):
    """Weights and every loss, with a probe and without."""
    runs = [
        train.train(TrainConfig(**(QUICK | {"probe": probe}), activation=activation))
        for probe in (0, 1_000)
    ]
    without, measured = runs
    assert without.losses == measured.losses
    hashes = {mlflow.get_run(r.run_id).data.tags["initflow.weights_sha256"] for r in runs}
    assert len(hashes) == 1
    assert without.signals == [] != measured.signals
    keys = set(mlflow.get_run(without.run_id).data.metrics)
    assert keys == {"accuracy/test", "accuracy/train", "loss/peak", "loss/test", "loss/train", "lr"}


@pytest.mark.parametrize("hidden", ["none", "20x30"])
def test_any_depth_is_measured_and_drawn(store, hidden):
    """No hidden layer, and many."""
    config = TrainConfig(**(QUICK | {"probe": 50}), hidden=hidden, epochs=1)
    result = train.train(config)
    assert mlflow.get_run(result.run_id).info.status == "FINISHED"
    assert len(result.signals[0][1].layers) == len(config.hidden) + 1


def test_what_explodes_at_once_is_measured_where_it_is_finite(store):
    """The layers before, and the verdict; nothing that is not finite is logged."""
    config = TrainConfig(
        **(QUICK | {"probe": 50}), init="normal:std=1e4", hidden="50x20", activation="linear"
    )
    result = train.train(config)
    run = mlflow.get_run(result.run_id)
    assert result.diverged_at == 0
    assert run.data.tags["initflow.verdict.forward"] == "exploding"
    assert "preactivation_variance/fc1" in run.data.metrics
    assert "preactivation_variance/fc21" not in run.data.metrics
    assert all(math.isfinite(value) for value in run.data.metrics.values())
    table = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/signals.json")
    assert table["measured"][0]["nonfinite"]["preactivation/fc21"] > 0


def test_the_description_reads_as_a_sentence(finished):
    """It says what was trained and what came of it."""
    result, run, _ = finished
    accuracy = f"{result.last('accuracy/test'):.2%}"
    assert run.data.tags["mlflow.note.content"] == (
        "A 64-32-16-10 network with tanh, initialized by xavier:gain=1.5, on 1,337 images of "
        "digits: 5 epochs of batches of 100, SGD with lr 0.1, gamma 0.96, Nesterov momentum 0.9; "
        "seed 3. Untrained, its signal is stable forward, stable backward. "
        f"It ended at {accuracy} test accuracy after 70 iterations."
    )
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "xavier:gain=1.5 tanh digits seed 3"
    assert mlflow.get_experiment(run.info.experiment_id).name == "initflow"


def test_the_data_set_is_an_input_with_a_real_digest(finished):
    """Of all pixels and labels, not of the first ones."""
    _, run, _ = finished
    (logged,) = run.inputs.dataset_inputs
    splits = datasets.load(TrainConfig(dataset="digits"))
    assert (logged.dataset.name, logged.dataset.digest) == ("digits", splits.digest[:32])
    assert "load_digits" in logged.dataset.source
    assert "[1437, 64]" in logged.dataset.schema


@pytest.mark.parametrize("batch", [1, 7])
def test_the_logged_model_takes_any_batch(finished, batch):
    """Raw pixels in [0, 1] in, logits out: those of the network that was trained."""
    result, run, _ = finished
    images = np.random.default_rng(0).random((batch, 64), dtype=np.float32)
    loaded = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
    predicted = loaded.predict(images)
    assert predicted.shape == (batch, 10)
    splits = datasets.load(result.config)
    plain = loaded.get_raw_model().state_dict()
    weights = {k: v for k, v in plain.items() if k.startswith("fc")}
    module = model.to_module(weights, ACTIVATIONS["tanh"], mean=splits.mean, std=splits.std)
    with torch.no_grad():
        expected = module(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(predicted, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.needs("mlflow>=3.9")
def test_pytorchs_flavor_loads_the_same_module(finished, served):
    """With the names and numbers of its weights."""
    _, run, _ = finished
    state = mlflow.pytorch.load_model(f"runs:/{run.info.run_id}/model").state_dict()
    expected = served.get_raw_model().state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.needs("mlflow<3.9")
def test_pytorchs_flavor_says_what_loads_the_module(finished):
    """In the one line that this MLflow has for it."""
    _, run, _ = finished
    told = r"mlflow\.pyfunc\.load_model\(model_uri\)\.get_raw_model\(\) is the module"
    with pytest.raises(mlflow.exceptions.MlflowException, match=told) as caught:
        mlflow.pytorch.load_model(f"runs:/{run.info.run_id}/model")
    assert str(caught.value).count("\n") == 0


FORMS = {
    "float32": lambda x: x,
    "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.astype(np.float16),
    "int64": lambda x: x.astype(np.int64),
    "uint8": lambda x: x.astype(np.uint8),
    "bool": lambda x: x.astype(bool),
    "list": lambda x: x.tolist(),
    "tuples": lambda x: list(map(tuple, x.tolist())),
    "frame": pd.DataFrame,
    "frame of float64": lambda x: pd.DataFrame(x.astype(np.float64)),
    "frame of integers": lambda x: pd.DataFrame(x.astype(np.int64)),
    "named columns": lambda x: pd.DataFrame(x, columns=[f"pixel {i}" for i in range(x.shape[1])]),
    "column of lists": lambda x: pd.DataFrame({"image": x.tolist()}),
    "column of arrays": lambda x: pd.DataFrame({"image": list(x)}),
    "columns in memory": np.asfortranarray,
    "every other": lambda x: np.repeat(x, 2, axis=0)[::2],
    "transposed twice": lambda x: x.T.copy().T,
}


@pytest.fixture(scope="module")
def served(finished):
    """The logged model, as whoever uses it loads it."""
    _, run, _ = finished
    return mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_logged_model_takes_what_numpy_and_pandas_give(served, form, batch):
    """Zeros and ones, which every type can say: the same logits to the bit."""
    images = np.random.default_rng(0).integers(0, 2, (batch, 64)).astype(np.float32)
    given = FORMS[form](images)
    found = served.predict(given)
    assert isinstance(found, pd.DataFrame) == isinstance(given, pd.DataFrame)
    np.testing.assert_array_equal(np.asarray(found), served.predict(images))


def test_a_frame_keeps_its_index(served):
    """So that what is predicted can be joined with what was asked."""
    frame = pd.DataFrame(np.zeros((3, 64)), index=["a", "b", "c"])
    assert list(served.predict(frame).index) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (np.zeros((3, 50)), r"\(n, 64\), not \(3, 50\)"),
        (np.zeros((3, 65), np.float32), r"\(n, 64\), not \(3, 65\)"),
        (np.zeros(64), r"\(n, 64\), not \(64,\)"),
        (np.zeros((2, 8, 7)), r"\(n, 64\), not \(2, 56\)"),
        (pd.DataFrame(np.zeros((2, 63))), r"\(n, 64\), not \(2, 63\)"),
        (pd.DataFrame({"image": [[0.0] * 63] * 2}), r"\(n, 64\), not \(2, 63\)"),
        ([[0.0] * 64, [0.0] * 63], r"\(n, 64\), not lists of several lengths"),
        ([["a"] * 64], r"\(n, 64\), not other values"),
        ([], r"\(n, 64\), not \(0,\)"),
    ],
    ids=["narrow", "wide", "flat", "square", "frame", "column", "ragged", "letters", "empty"],
)
def test_a_wrong_width_is_one_line(served, given, told):
    """That says what would be right."""
    with pytest.raises(mlflow.exceptions.MlflowException, match=told) as caught:
        served.predict(given)
    said = str(caught.value)
    assert said.startswith("this model takes images of 64 pixels")
    assert said.count("\n") == 0
    assert caught.value.get_http_status_code() == 400


def test_the_logged_model_needs_no_initflow(finished, tmp_path):
    """It is loaded where there is none, and says in words what it takes."""
    _, run, _ = finished
    folder = mlflow.artifacts.download_artifacts(
        f"runs:/{run.info.run_id}/model", dst_path=str(tmp_path)
    )
    program = (
        "import sys; sys.modules['initflow'] = None\n"
        "import mlflow.pyfunc\n"
        f"model = mlflow.pyfunc.load_model({folder!r})\n"
        "print(len(model.predict([[0.5] * 64] * 3)), model.metadata.metadata['input'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout == "3 pixels in [0, 1], as numbers of shape (n, 64)\n"


def test_the_logged_model_reaches_the_logged_accuracy(finished):
    """On the test images, as they come from the data set."""
    _, run, _ = finished
    splits = datasets.load(TrainConfig(dataset="digits"))
    loaded = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
    predicted = loaded.predict(splits.test.images.numpy()).argmax(axis=1)
    accuracy = (predicted == splits.test.labels.numpy()).mean()
    assert accuracy == pytest.approx(run.data.metrics["accuracy/test"])


def test_the_models_requirements_are_stated_not_guessed(finished):
    """Exactly the two that it needs, without a local version that no index has."""
    _, run, _ = finished
    file = mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/model/requirements.txt")
    names = sorted(line.partition("==")[0] for line in Path(file).read_text().splitlines())
    assert names == ["mlflow", "torch"]


def test_the_configuration_is_an_artifact_too(finished):
    """As our own text, which params are not where MLflow wrote them first."""
    result, run, _ = finished
    logged = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/config.json")
    assert logged.pop("resolved.device") == "cpu"
    assert logged.pop("resolved.threads") == "1"
    assert TrainConfig(**logged) == result.config


def test_figures_are_artifacts(finished):
    """PNG files, whole."""
    _, run, _ = finished
    for name in ("learning_curves.png", "weight_histograms.png"):
        file = mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/{name}")
        assert Path(file).read_bytes().startswith(b"\x89PNG")


def test_progress_is_told_to_the_end(finished):
    """What is being done, and how much of it."""
    _, _, told = finished
    assert [(done, of) for what, done, of in told if what == "training"][-1] == (70, 70)


def test_the_same_configuration_gives_the_same_run(store):
    """Every number and both hashes, whatever happened before in the process."""
    config = TrainConfig(**QUICK, threads=1)
    first = train.train(config)
    torch.manual_seed(99)
    second = train.train(config)
    assert first.history == second.history
    tags = [mlflow.get_run(r.run_id).data.tags for r in (first, second)]
    for tag in ("initflow.weights_sha256", "initflow.initial_weights_sha256"):
        assert tags[0][tag] == tags[1][tag]


def test_schemes_of_one_seed_see_the_same_batches(store, monkeypatch):
    """What one scheme draws changes no other stream."""
    seen = []
    real = trainer.batch_order

    def order(*arguments):
        seen.append(real(*arguments))
        return seen[-1]

    for module in (trainer, networks):
        monkeypatch.setattr(module, "batch_order", order)
    for init in ("zero", "he"):
        train.train(TrainConfig(**QUICK, init=init))
    half = len(seen) // 2
    assert half == 6  # five epochs, and the first batch for the loss at step 0
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("init", ["he", "orthogonal"])
def test_initial_weights_do_not_depend_on_the_callers_threads(store, init):
    """Also where LAPACK draws: the run's own number of threads decides."""
    hashes = set()
    before = torch.get_num_threads()
    try:
        for ambient in (1, 2):
            torch.set_num_threads(ambient)
            config = TrainConfig(**QUICK, init=init, threads=1, epochs=1, hidden="300,100")
            result = train.train(config)
            tags = mlflow.get_run(result.run_id).data.tags
            hashes.add(tags["initflow.initial_weights_sha256"])
    finally:
        torch.set_num_threads(before)
    assert len(hashes) == 1


DIVERGING = {
    "on the way": {"init": "normal", "activation": "linear", "hidden": "50x4", "lr": 5},
    "at its start": {"init": "constant:value=1e20", "hidden": "50x4"},
    "in its last update": {"batch_size": 2_000, "epochs": 1, "lr": 1e30, "hidden": "50x2"},
}


@pytest.mark.parametrize("when", DIVERGING)
def test_a_divergence_is_found_whenever_it_comes(store, when):
    """Not only by a training batch: what is left must have a finite loss to be a result."""
    config = TrainConfig(**(QUICK | {"eval_every": 1} | DIVERGING[when]))
    result = train.train(config)
    run = mlflow.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["initflow.outcome"] == "diverged"
    assert run.data.tags["initflow.diverged_at_step"] == str(result.step)
    assert "initflow.weights_sha256" in run.data.tags
    assert (result.step == 0) == (when == "at its start")
    for points in result.history.values():
        steps = [step for step, _ in points]
        assert len(steps) == len(set(steps))
        assert all(math.isfinite(value) for _, value in points)


def test_a_diverging_run_keeps_what_was_measured_and_says_when(store):
    """Finite values only, no model, a tag with the step, and a finished run."""
    config = TrainConfig(
        dataset="digits", init="normal", activation="linear", hidden="50x4", lr=5, eval_every=2
    )
    result = train.train(config)
    run = mlflow.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["initflow.outcome"] == "diverged"
    assert run.data.tags["initflow.diverged_at_step"] == str(result.diverged_at)
    assert result.diverged_at == result.step > 0
    assert all(math.isfinite(v) for points in result.history.values() for _, v in points)
    assert result.history["accuracy/test"][0][0] == 0
    assert f"not finite at iteration {result.diverged_at}" in run.data.tags["mlflow.note.content"]
    assert not models_of(run)


def test_a_run_that_fails_is_closed_as_failed(store, monkeypatch):
    """With its first measurements, and the error that caused it."""

    def fail(*_):
        raise RuntimeError("no more")

    monkeypatch.setattr(network_run, "result_tags", fail)
    with pytest.raises(RuntimeError, match="no more"):
        train.train(TrainConfig(**QUICK))
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.status == "FAILED"
    assert "accuracy/test" in run.data.metrics
    assert mlflow.active_run() is None


def test_an_interrupted_run_is_closed_as_killed(store):
    """And says in which run the measurements are."""

    def interrupt(what, done, _):
        if what == "training" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interruption:
        train.train(TrainConfig(**QUICK), progress=interrupt)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.status == "KILLED"
    assert {"accuracy/test", "loss/train"} <= set(run.data.metrics)
    assert run.info.run_id in interruption.value.__notes__[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"init": "hee"},
        {"init": "he:mode=x"},
        {"device": "cuda:99"},
        {"validation": 1_430},
    ],
    ids=str,
)
def test_wrong_settings_make_no_run(store, settings):
    """One error, before anything is written."""
    with pytest.raises(SettingError):
        train.train(TrainConfig(**(QUICK | settings)))
    assert mlflow.search_experiments(filter_string="name = 'initflow'") == []


def test_missing_data_makes_no_run(store, tmp_path, monkeypatch):
    """The same for what is not on disk."""
    from torchvision import datasets

    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:1/"])
    with pytest.raises(InitflowError, match="cannot be downloaded"):
        train.train(TrainConfig(data_dir=tmp_path / "none"))
    assert mlflow.search_experiments(filter_string="name = 'initflow'") == []


def test_the_experiment_is_the_option_or_the_variable_or_ours(store, monkeypatch):
    """In that order."""
    config = TrainConfig(**QUICK, epochs=1)

    def name(**options):
        result = train.train(config, **options)
        return mlflow.get_experiment(result.run.experiment_id).name

    assert name() == "initflow"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "by-variable")
    assert name() == "by-variable"
    assert name(experiment="by-option") == "by-option"


def test_a_run_that_has_ended_is_not_trained_into(store, monkeypatch):
    """Two trainings in one run would be neither."""
    first = train.train(TrainConfig(**QUICK, epochs=1))
    monkeypatch.setenv("MLFLOW_RUN_ID", first.run_id)
    with pytest.raises(SettingError, match=f"not '{first.run_id}', which is FINISHED"):
        train.train(TrainConfig(**QUICK, init="zero"))
    assert mlflow.get_run(first.run_id).data.tags["initflow.scheme"] == "he"


@pytest.mark.parametrize("fault", [KeyboardInterrupt, MlflowException("locked")], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_a_run_cut_off_while_closing_is_closed_all_the_same(store, monkeypatch, fault, nested):
    """By the end that comes of it."""
    real, faults = mlflow.MlflowClient.set_terminated, [fault]

    def set_terminated(client, *of_run):
        if faults:
            raise faults.pop()
        real(client, *of_run)

    monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", set_terminated)
    if nested:
        mlflow.start_run(experiment_id=mlflow.create_experiment("notebook"))
    outer = mlflow.active_run()
    with pytest.raises((KeyboardInterrupt, TrackingError)):
        train.train(TrainConfig(**QUICK, epochs=1))
    status = {
        run.info.run_name: run.info.status
        for run in mlflow.search_runs(search_all_experiments=True, output_format="list")
    }
    assert status.pop("he relu digits seed 0") == (
        "KILLED" if fault is KeyboardInterrupt else "FAILED"
    )
    if nested:  # the caller's own run goes on
        assert mlflow.active_run().info.run_id == outer.info.run_id
        assert status == {outer.info.run_name: "RUNNING"}
        mlflow.end_run()
    assert mlflow.active_run() is None


@pytest.mark.parametrize("uri", ["http://[", "mysql://u:p@h:abc/x", "sqlite:////{tmp}"])
def test_an_address_that_is_none_is_one_error(store, tmp_path, uri):
    """Whatever MLflow or the database's driver raises for it."""
    mlflow.set_tracking_uri(uri.replace("{tmp}", "dev/null/x.db"))
    with pytest.raises(TrackingError, match=r"MLflow at .* failed: "):
        train.train(TrainConfig(**QUICK))


def test_an_experiment_cannot_be_chosen_inside_mlflow_run(store, monkeypatch):
    """MLflow has made the run by then."""
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(SettingError, match="give mlflow run --experiment-name instead"):
        train.train(TrainConfig(**QUICK), experiment="mine")


def test_what_mlflow_refuses_is_one_error_with_the_address(store, tmp_path):
    """A store that cannot be made, and one that is none."""
    (tmp_path / "file").write_text("")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(TrackingError, match=r"file/mlflow.db' failed: .*File exists"):
        train.train(TrainConfig(**QUICK))
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/damaged.db")
    (tmp_path / "damaged.db").write_bytes(b"no database" * 100)
    with pytest.raises(TrackingError, match=r"damaged.db' failed: .*not a database"):
        train.train(TrainConfig(**QUICK))


def test_addresses_are_told_without_credentials(store, monkeypatch):
    """Errors end up in logs."""
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)  # of 10, half a minute
    mlflow.set_tracking_uri("postgresql://user:sec@ret@127.0.0.1:1/mlflow")
    with pytest.raises(TrackingError) as error:
        train.train(TrainConfig(**QUICK))
    assert "127.0.0.1" in str(error.value)
    assert "ret" not in str(error.value).replace("refused", "")


def test_inside_an_open_run_it_is_nested(store):
    """As in a notebook, whose own run goes on."""
    with mlflow.start_run(experiment_id=mlflow.create_experiment("notebook")) as mine:
        result = train.train(TrainConfig(**QUICK, epochs=1))
        assert mlflow.active_run().info.run_id == mine.info.run_id
        with pytest.raises(TrackingError):
            train.train(TrainConfig(**QUICK), experiment="x" * 1_000)
        assert mlflow.active_run().info.run_id == mine.info.run_id
    tags = mlflow.get_run(result.run_id).data.tags
    assert tags["mlflow.parentRunId"] == mine.info.run_id
    assert mlflow.get_run(mine.info.run_id).info.status == "FINISHED"


def test_threads_are_set_for_the_run_and_put_back(store):
    """A caller's own setting survives."""
    before = torch.get_num_threads()
    result = train.train(TrainConfig(**QUICK, threads=3, epochs=1))
    assert mlflow.get_run(result.run_id).data.params["resolved.threads"] == "3"
    assert torch.get_num_threads() == before

"""Data of one's own in the commands: trained on, compared, tuned, diagnosed, exported, verified."""

import json
import shlex

import mlflow
import numpy as np
import pytest

from initflow.cli import process
from initflow.core.configurations import (
    CompareConfig,
    DiagnoseConfig,
    NetworkConfig,
    TrainConfig,
    TuneConfig,
    VerifyConfig,
)
from initflow.diagnostics import catalogue
from initflow.errors import DataError, InitflowError, ReplayError, SettingError
from initflow.experiments import train, verify
from initflow.experiments.comparisons import compare
from initflow.experiments.replay import bundle, provenance
from initflow.experiments.replay.retraining import IDENTICAL
from initflow.experiments.tuning import tune
from initflow.experiments.untrained import diagnose
from initflow.training import datasets
from tests.replaying import evidence
from tests.test_end_to_end import mlflow_run
from tests.training.test_arrays import given, saved

CODE = """
import numpy as np

def load():
    return dict(np.load({path!r}))

def failing():
    raise RuntimeError("no database")
"""
MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(18, 4))
"""
QUICK = {
    "hidden": "7",
    "epochs": 2,
    "batch_size": 10,
    "normalize": "standard",
    "probe": 0,
    "threads": 1,
    "log_model": False,
}
SHAPE = "12-7-4"  # of the network


def arrays():
    """Four classes, which the features tell apart, of shape (2, 3, 2)."""
    found = given(classes=4, shape=(2, 3, 2), train=80, test=40)
    for part in ("train", "test"):
        found[f"x_{part}"][:, 0, 0, 0] += 30 * found[f"y_{part}"]
        found[f"x_{part}"][:, 1, 2, 1] -= 30 * (found[f"y_{part}"] == 1)
    return found


@pytest.fixture(scope="module")
def path(tracked):
    """A file of arrays in the working folder, with code that gives the same."""
    named = saved(tracked, arrays())
    (tracked / "own.py").write_text(CODE.format(path=named))
    return named


@pytest.fixture(scope="module")
def result(path):
    """One training that kept its weights and its model, on a relative path."""
    settings = QUICK | {"dataset": "own.npz", "epochs": 30, "log_model": True, "probe": 20}
    return train.train(TrainConfig(**settings, validation=12), experiment="own")


def test_a_run_says_what_it_was_trained_on(result, path):
    """Its name and title by the file's name, its parameter as it was typed, its input by digest."""
    run = mlflow.get_run(result.run_id)
    assert run.info.run_name == "he relu own.npz seed 0"
    assert result.title == f"he, relu, {SHAPE}, own.npz"
    assert run.data.params["dataset"] == "own.npz"
    assert run.data.tags["initflow.data"] == "own"
    said = run.data.tags["mlflow.note.content"]
    assert f"A {SHAPE} network with relu, initialized by he, on 68 examples of own.npz: " in said
    assert "not the published" not in said
    (given_in,) = run.inputs.dataset_inputs
    splits = datasets.load(TrainConfig(dataset=path))
    assert given_in.dataset.digest == splits.digest[:32]
    assert json.loads(given_in.dataset.source)["tags"]["source"] == path
    columns = json.loads(given_in.dataset.schema)["mlflow_colspec"]
    assert [(c["name"], c["tensor-spec"]["dtype"], c["tensor-spec"]["shape"]) for c in columns] == [
        ("train_features", "float32", [80, 12]),
        ("train_labels", "int64", [80]),
        ("test_features", "float32", [40, 12]),
        ("test_labels", "int64", [40]),
    ]
    assert result.last("accuracy/test") > 0.9
    kept = json.loads(mlflow.artifacts.load_text(f"runs:/{result.run_id}/replay.json"))["data"]
    assert (kept["pixels"], kept["shape"], kept["classes"]) == (12, [2, 3, 2], 4)


def test_the_logged_model_takes_what_the_file_has(result):
    """Flat, without a word of how it was standardized; it is as right as the run says."""
    found = arrays()
    loaded = mlflow.pyfunc.load_model(f"runs:/{result.run_id}/model")
    logits = loaded.predict(found["x_test"].reshape(40, 12))
    accuracy = float((logits.argmax(1) == found["y_test"]).mean())
    assert accuracy == pytest.approx(result.last("accuracy/test"))
    told = loaded.metadata.metadata["input"]
    assert told == "features as the data has them, as numbers of shape (n, 12)"


def test_it_is_verified_where_the_data_is(result, path, tmp_path, monkeypatch):
    """As it was, by another path, by a function; other data is refused."""
    assert verified(result.run_id).verdict == IDENTICAL
    assert verified(result.run_id, dataset="own.py:load").verdict == IDENTICAL
    other = saved(tmp_path, arrays() | {"x_test": arrays()["x_test"] + 1})
    with pytest.raises(DataError, match=r"dataset own.npz in '.*' has the digest .*…, and the net"):
        verified(result.run_id, dataset=other)
    monkeypatch.chdir(tmp_path / "..")
    with pytest.raises(
        ReplayError, match=r"its data, 'own.npz', is not here: say by dataset where"
    ):
        verified(result.run_id)
    assert verified(result.run_id, dataset=path).verdict == IDENTICAL


def verified(what, **settings):
    return verify.verify(str(what), VerifyConfig(**settings)).replay


def test_a_folder_chooses_neither_a_file_nor_a_function_for_data(result, tmp_path):
    """Its user names them; the command that it tells does so."""
    verify.export(result, tmp_path / "it")
    with pytest.raises(ReplayError, match=r"'own.npz', which is not read or run because a folder"):
        verified(tmp_path / "it")
    assert verified(tmp_path / "it", dataset="own.npz").verdict == IDENTICAL
    kept = evidence(TrainConfig(**QUICK, dataset="own.py:load"))
    assert bundle.verifying(kept.provenance, "x") == "initflow verify x --dataset own.py:load"
    bundle.write(tmp_path / "other", provenance.files(kept))
    with pytest.raises(ReplayError, match=r"'own.py:load', which is not read or run because"):
        verified(tmp_path / "other")
    assert verified(tmp_path / "other", dataset="own.py:load").verdict == IDENTICAL


def test_a_comparison_of_several_workers(path):
    """Each calls the function; the numbers are those of one process that reads the file."""
    settings = QUICK | {"inits": "he,xavier", "activations": "relu", "seeds": 2}
    one, two = (
        compare.compare(CompareConfig(**settings, dataset=dataset, workers=n), experiment="both")
        for n, dataset in ((1, "own.npz"), (2, "own.py:load"))
    )
    assert [row.mean for row in one.rows] == [row.mean for row in two.rows]
    assert one.title == f"{SHAPE} networks on own.npz, 2 seeds"
    name = mlflow.get_run(two.run_id).info.run_name
    assert name == "compare relu own.py:load 2 schemes 2 seeds"


def test_a_function_of_a_notebook_is_not_found_elsewhere(path, monkeypatch):
    """It is told before anything is trained."""
    from initflow.core import importing

    monkeypatch.setattr(importing, "by_place", lambda _: (arrays, "a notebook"))
    monkeypatch.delattr("__main__.__file__", raising=False)
    config = CompareConfig(**QUICK, inits="he", seeds=1, dataset="__main__:load", workers=2)
    with pytest.raises(SettingError, match="'__main__:load' is defined where its workers cannot"):
        compare.compare(config, experiment="notebook")


def test_a_tuning(path):
    """The study's name is one, whatever the path is."""
    settings = {"inits": "he", "trials": 2, "seeds": 1, "dataset": f"{path[:-7]}./own.npz"}
    tuning = tune.tune(TuneConfig(**QUICK | settings), experiment="tune")
    assert tuning.plan.study.startswith("own.npz-relu-")
    assert tuning.plan.title == f"{SHAPE} networks with relu on own.npz"
    assert tuning.plan.validation == 80 // 6


def test_a_diagnosis_and_schemes(path, tracked):
    """Of the feed-forward network, of a model that takes the features in their shape."""
    settings = {"dataset": "own.npz", "inits": "he", "activations": "relu", "threads": 1}
    plain = diagnose.diagnose(DiagnoseConfig(**settings, depth=2, width=7), experiment="look")
    assert plain.title == "untrained 12-7x2-4 networks on own.npz"
    (tracked / "net.py").write_text(MODEL)
    del settings["activations"]
    config = DiagnoseConfig(**settings, model="net.py:build", draws=2)
    own = diagnose.diagnose(config, experiment="look")
    assert own.title == "untrained Sequential of net.py:build on 64 examples of own.npz"
    entry = catalogue.filled("he", NetworkConfig(dataset="own.npz", hidden="7"))
    assert [(layer.fan_in, layer.fan_out) for layer in entry.layers] == [(12, 7), (7, 4)]
    assert catalogue.entries(NetworkConfig(dataset="own.npz", hidden="7"))[0].layers[0].fan_in == 12


OF_COMMANDS = {
    "train": TrainConfig,
    "compare": CompareConfig,
    "tune": TuneConfig,
    "diagnose": DiagnoseConfig,
}


@pytest.mark.parametrize("command", OF_COMMANDS)
@pytest.mark.parametrize("kind", ["absent.npz", "bad.npz", "own.py:absent", "own.py:failing"])
def test_bad_data_is_one_line_before_any_run(path, tracked, command, kind, capsys):
    """Of every command; no run is made of it."""
    saved(tracked, given(), "bad.npz", x_train=np.full((30, 4), np.nan))
    before = len(mlflow.search_runs(search_all_experiments=True, output_format="list"))
    line = OF_COMMANDS[command](dataset=kind).command(command)
    assert process.main(shlex.split(line)[1:]) in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith(f"Error: dataset '{kind}'")
    assert len(mlflow.search_runs(search_all_experiments=True, output_format="list")) == before


def test_replays_before_shapes_were_recorded_are_read(result):
    """Their sets had ten classes, and square images mostly."""
    kept = evidence(TrainConfig(**QUICK, dataset="digits"))
    files = provenance.files(kept)
    told = json.loads(files["replay.json"])
    del told["data"]["shape"], told["data"]["classes"]
    from initflow.experiments.replay import recorded

    again = recorded.read(json.dumps(told).encode(), "it")
    assert again == kept.provenance
    told["data"] |= {"shape": [8, 9], "classes": 10}
    with pytest.raises(InitflowError, match=r"data: shape must be a list of whole numbers, whose"):
        recorded.read(json.dumps(told).encode(), "it")


@pytest.mark.end_to_end
def test_mlflow_run_trains_on_a_file(tracked, path):
    """As the command does."""
    settings = QUICK | {"dataset": path, "log_model": "false"}
    done = mlflow_run(tracked, *(f"{name}={value}" for name, value in settings.items()))
    assert done.returncode == 0, done.stderr
    (run,) = mlflow.search_runs(experiment_names=["e2e"], output_format="list")
    assert f"A {SHAPE} network" in run.data.tags["mlflow.note.content"]
    assert run.data.params["dataset"] == path

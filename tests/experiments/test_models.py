"""Other networks than the feed-forward one, through all commands: trained, logged, proven."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

import initflow as inf
from initflow.errors import ReplayError, SettingError
from initflow.experiments.replay import recorded
from initflow.training import datasets

NET = """
from torch import nn

def build(shape, classes):
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * (height - 2) * (width - 2), classes),
    )
"""
SMALL = {
    "dataset": "digits", "epochs": 2, "eval_every": 10, "normalize": "standard", "lr": 0.02,
    "probe": 50, "threads": 1, "progress": False,
}  # fmt: skip
OF = {
    "cnn": {"model": "cnn", "hidden": 12},
    "lstm": {"model": "lstm", "hidden": 9, "init": "orthogonal"},
    "own": {"init": "default"},
}


@pytest.fixture
def net(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(NET)
    return f"{path}:build"


@pytest.fixture(params=OF)
def trained(request, store, net):
    return inf.train(**SMALL | {"model": net} | OF[request.param])


def of_run(run_id):
    return mlflow.get_run(run_id).data


def test_a_run_carries_what_any_run_does(trained, tmp_path):
    """Metrics, tags, the description, figures, the model, which predicts, and its proof."""
    data, model = of_run(trained.run_id), trained.config.model
    assert data.params["model"] == model
    assert data.tags["initflow.outcome"] == "finished"
    built_in = model in ("cnn", "lstm")
    provider = data.tags["initflow.model_provider"]
    assert provider == "built-in" if built_in else "net.py sha256:" in provider
    assert data.tags["initflow.verdict.forward"]
    assert data.metrics["accuracy/test"] == trained.last("accuracy/test") > 0.2
    layer = {"cnn": "conv2", "lstm": "lstm1.l0.forget"}.get(model, "0")
    assert data.metrics[f"gradient_variance/{layer}"] > 0
    title = {"cnn": "A cnn 6,16 + 12 network with relu", "lstm": "An lstm 9 network"}
    note = data.tags["mlflow.note.content"]
    assert note.startswith(title.get(model, "A net.py:build network, initialized by default"))
    names = {file.path for file in mlflow.MlflowClient().list_artifacts(trained.run_id)}
    assert {"learning_curves.png", "predicted_and_measured.png", "signals.png"} <= names
    assert "received.png" not in names  # of feed-forward networks

    served = mlflow.pyfunc.load_model(f"runs:/{trained.run_id}/model")
    splits = datasets.load(trained.config)
    pixels = (splits.test.images[:5] * splits.std + splits.mean).numpy()
    module = trained.initial.copy(trained.trained).module.eval()
    with torch.no_grad():
        expected = module(splits.test.images[:5].view(5, 1, 8, 8)).numpy()
    np.testing.assert_allclose(served.predict(pixels), expected, atol=1e-4)
    images = pixels[:1].reshape(1, 1, 8, 8)  # as they look, and one alone
    np.testing.assert_allclose(served.predict(images), expected[:1], atol=1e-4)
    assert_proven(trained, tmp_path)


def assert_proven(trained, tmp_path):
    """Bit for bit; from a folder, code of the user's is run only where the user names it."""
    assert inf.verify(trained.run_id, progress=False).verdict == "identical"
    inf.export(trained.run_id, tmp_path / "bundle")
    model = trained.config.model
    if ":" in model:
        with pytest.raises(ReplayError, match="its model is built by a function by its place"):
            inf.verify(tmp_path / "bundle", progress=False)
    own = {"model": model} if ":" in model else {}
    assert inf.verify(tmp_path / "bundle", **own, progress=False).verdict == "identical"


def test_a_changed_model_is_told(store, net, tmp_path):
    """By its source, and as a difference where its numbers are others."""
    trained = inf.train(**SMALL | {"model": net})
    path = Path(net.partition(":")[0])
    path.write_text(NET.replace("nn.ReLU()", "nn.Tanh()"))
    found = inf.verify(trained.run_id, progress=False)
    assert found.verdict == "different"
    assert "source of the model" in str(found.conclusions)


def test_a_replay_that_lies_about_its_tensors_is_refused(store, tmp_path):
    """Shapes are checked before anything of that size is read."""
    trained = inf.train(**SMALL | OF["lstm"])
    inf.export(trained.run_id, tmp_path / "bundle")
    replay = tmp_path / "bundle" / "replay.json"
    whole = json.loads(replay.read_text())
    for shapes, said in (
        ({"a": [2**20, 2**20]}, "numbers in all"),
        ({"a": [-1]}, "a list of whole numbers for a"),
        ({"a": "b"}, "a list of whole numbers for a"),
    ):
        changed = whole | {"model": whole["model"] | {"shapes": shapes}}
        with pytest.raises(ReplayError, match=said):
            recorded.read(json.dumps(changed).encode(), "here")
    del whole["model"]
    with pytest.raises(ReplayError, match="model must be there for all models but mlp"):
        recorded.read(json.dumps(whole).encode(), "here")


def test_a_comparison(store, net):
    """Networks have the numbers that they have alone, trained by two workers."""
    settings = {"model": net, "inits": "he,default", "seeds": 2, "workers": 2}
    found = inf.compare(**SMALL | settings)
    assert [str(row.cell) for row in found.rows] == ["he net.py:build", "default net.py:build"]
    assert "net.py:build networks on digits" in found.title
    runs = {of_run(one).params["init"]: of_run(one) for one in found.ids}
    alone = inf.train(**SMALL | {"model": net, "init": "he", "seed": 1})
    assert runs["he"].tags["initflow.bit_identical_to_alone"] == "true"
    of_seed = [of_run(m.run_id) for m in found.members
               if m.cell.init == "he" and m.outcome.seed == 1]  # fmt: skip
    assert (
        of_seed[0].tags["initflow.weights_sha256"]
        == of_run(alone.run_id).tags["initflow.weights_sha256"]
    )


def test_a_comparison_of_activations(store):
    """A cnn has them, as the feed-forward network does."""
    found = inf.compare(**SMALL | {"model": "cnn", "hidden": 12, "inits": "he", "seeds": 1})
    assert [str(row.cell) for row in found.rows] == ["he tanh", "he relu"]


def test_a_tuning(store):
    """Trials, a best one, and its test."""
    settings = {"model": "gru", "hidden": 5, "inits": "orthogonal", "trials": 2, "seeds": 1}
    found = inf.tune(**SMALL | settings)
    (row,) = found.rows
    assert str(row.cell) == "orthogonal gru"
    assert found.title.startswith("gru 5 networks on digits")


def test_a_diagnosis_of_a_built_in_model(store):
    """As of a model of the user's, with the activations that it may have."""
    settings = {name: SMALL[name] for name in ("dataset", "threads", "progress")}
    found = inf.diagnose(model="rnn", inits="orthogonal", hidden=12, draws=3, **settings)
    cells = [(cell.init, cell.activation) for cell in found.readings]
    assert cells == [(i, a) for a in ("tanh", "relu") for i in ("default", "orthogonal")]
    assert found.title == "untrained rnn 12 network on 64 images of digits"
    cnn = inf.diagnose(model="cnn", inits="he", activations="relu", draws=3, **settings)
    assert list(next(iter(cnn.readings.values())).signals.layers) == [
        "conv1",
        "conv2",
        "fc1",
        "fc2",
    ]


def test_what_a_builder_draws_is_told(store, net):
    """A function of the user's is seeded, and the description says what it drew from."""
    run = of_run(inf.train(**SMALL | {"model": net}).run_id)
    assert "built from torch's random state, seeded by seed" in run.tags["mlflow.note.content"]


def test_a_comparison_with_a_model_of_a_notebook_needs_no_workers(store, monkeypatch):
    """Which could not find it."""
    monkeypatch.delattr("__main__.__file__", raising=False)  # which a script has
    monkeypatch.setattr("__main__.build_it", build_it, raising=False)
    monkeypatch.setattr(build_it, "__module__", "__main__")
    with pytest.raises(SettingError, match="model '__main__:build_it' is defined where its work"):
        inf.compare(**SMALL | {"model": build_it, "inits": "he", "seeds": 1, "workers": 2})
    assert mlflow.search_runs(output_format="list", search_all_experiments=True) == []


def build_it(shape, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))

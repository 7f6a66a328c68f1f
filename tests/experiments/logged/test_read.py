"""One run read back: of any script, of initflow with its signals, and of a watched training."""

import re

import mlflow
import numpy as np
import pytest
import torch
from torch import nn

import initflow as inf
from initflow.errors import SettingError

SMALL = {"dataset": "digits", "epochs": 1, "probe": 100, "threads": 1, "log_model": False}


def drawn(figure):
    """All that stands in its panels: lines, heat maps and their titles."""
    return [
        (
            axes.get_title(),
            [line.get_xydata().tolist() for line in axes.lines],
            [np.ma.filled(image.get_array(), np.nan).tolist() for image in axes.images],
        )
        for axes in figure.axes
    ]


def test_a_training_is_read_back(tracked):
    """The numbers of its result, and its signals beside theory, drawn as it drew them."""
    trained = inf.train(hidden="8,8", **SMALL)
    read = inf.read(trained)
    assert list(read.drawings()) == ["metrics", "predicted_and_measured", "signals"]
    for name in ("predicted_and_measured", "signals"):
        assert str(drawn(read.figure(name))) == str(drawn(trained.figure(name)))
    page = read._repr_html_()
    assert page.count("<img") == 3
    assert "<th>accuracy/test</th>" in page  # and none of layers
    assert not re.search(r"<th>[^<]*/fc1</th>", page)
    assert f"{len(read.to_pandas().columns) - page.count('<th>')} metrics of layers" in page
    shown = [axes.get_title() for axes in read.figure("metrics").axes if axes.lines]
    assert shown[0].startswith("accuracy/")
    assert not [title for title in shown if title.endswith("/fc1")]
    assert list(read.numbers()) == list(trained.numbers())
    assert read.metrics["accuracy/test"] == trained.last("accuracy/test")
    assert read.params["init"] == "he"
    assert not read.problems()
    signals = read.signals_to_pandas()
    first = signals[signals["step"] == 0]
    for quantity, intervals in trained.reading.by_layer().items():
        of_it = first[first["quantity"] == quantity].set_index("layer")
        for layer, interval in intervals.items():
            assert of_it.loc[layer, "median"] == pytest.approx(interval.median, nan_ok=True)
            assert of_it.loc[layer, "measured"] == trained.reading.signals.layers[layer][quantity]
    assert signals[signals["step"] > 0]["median"].isna().all()


def test_a_recurrent_network_is_drawn_through_time_again(tracked):
    """As in its result."""
    trained = inf.train(model="rnn", hidden="6", updates=1, **SMALL)
    read = inf.read(trained)
    for name in ("predicted_and_measured", "through_time"):
        assert str(drawn(read.figure(name))) == str(drawn(trained.figure(name)))


def test_a_watched_training_is_drawn(tracked):
    """Its layers by their numbers, over the steps at which each was measured; no theory."""
    layers = [layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.Tanh())]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mlflow.start_run() as run, inf.watch(model, every=2):
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(9, 4)).square().mean().backward()
            optimizer.step()
    read = inf.read(run.info.run_id)
    signals = read.signals_to_pandas()
    assert list(signals.columns) == ["step", "layer", "quantity", "measured"]
    assert signals["layer"].unique().tolist() == ["0", "2", "4", "6", "8", "10"]
    assert list(read.drawings()) == ["signals"]
    heat = {
        title.partition("\n")[0]: images[0]
        for title, _, images in drawn(read.figure("signals"))
        if images
    }
    assert np.shape(heat["weight variance"]) == np.shape(heat["update ratio"]) == (6, 3)
    last = read.history["mean_cosine/10"]["value"]
    np.testing.assert_allclose(heat["mean cosine"][-1], last)
    assert len(read.figure_of("mean_cosine/10").axes[0].lines) == 1


def test_any_run_is_read_back(tracked):
    """As MLflow has it: no signals, and what is no number stays."""
    with mlflow.start_run() as run:
        mlflow.log_param("lr", 0.1)
        for step, loss in enumerate([0.9, float("nan"), 0.3]):
            mlflow.log_metric("val_loss", loss, step)
        mlflow.log_metric("weight_variance", 1.0)
        mlflow.log_text("[]", "signals.json")
    read = inf.read(mlflow.get_run(run.info.run_id))
    assert (read.params, read.metrics, read.status) == (
        {"lr": "0.1"},
        {"val_loss": 0.3, "weight_variance": 1.0},
        "FINISHED",
    )
    assert read.history["val_loss"]["step"].tolist() == [0, 1, 2]
    assert read.to_pandas()["val_loss"].isna().tolist() == [False, True, False]
    assert not read.signals
    assert list(read.drawings()) == ["metrics"]
    assert read.problems()[0].startswith("signals.json could not be read: no table of signals")
    assert len(read.figure("metrics").axes[0].lines[0].get_xdata()) == 2
    with pytest.raises(
        SettingError, match=r"^metric must be one of val_loss, weight_variance, not 'loss'"
    ):
        read.figure_of("loss")


def test_an_id_of_no_run_is_told(tracked):
    """In one line."""
    with pytest.raises(SettingError, match=r"^a run must be .*, which has no 'no'$"):
        inf.read("no")

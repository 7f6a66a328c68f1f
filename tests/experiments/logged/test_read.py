"""One run read back: of any script, and of initflow with its signals."""

import mlflow
import pytest

import initflow as inf
from initflow.errors import SettingError


def test_a_training_is_read_back(tracked):
    """The numbers of its result, and its signals beside theory."""
    trained = inf.train(
        dataset="digits", hidden="8,8", epochs=1, probe=100, threads=1, log_model=False
    )
    read = inf.read(trained)
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


def test_any_run_is_read_back(tracked):
    """As MLflow has it: no signals, and what is no number stays."""
    with mlflow.start_run() as run:
        mlflow.log_param("lr", 0.1)
        for step, loss in enumerate([0.9, float("nan"), 0.3]):
            mlflow.log_metric("val_loss", loss, step)
        mlflow.log_text("[]", "signals.json")
    read = inf.read(mlflow.get_run(run.info.run_id))
    assert (read.params, read.metrics, read.status) == (
        {"lr": "0.1"},
        {"val_loss": 0.3},
        "FINISHED",
    )
    assert read.history["val_loss"]["step"].tolist() == [0, 1, 2]
    assert read.to_pandas()["val_loss"].isna().tolist() == [False, True, False]
    assert not read.signals
    assert read.problems()[0].startswith("signals.json could not be read: no table of signals")
    assert len(read.figure("metrics").axes[0].lines[0].get_xdata()) == 2
    with pytest.raises(SettingError, match=r"^metric must be one of val_loss, not 'loss'"):
        read.figure_of("loss")


def test_an_id_of_no_run_is_told(tracked):
    """In one line."""
    with pytest.raises(SettingError, match=r"^a run must be .*, which has no 'no'$"):
        inf.read("no")

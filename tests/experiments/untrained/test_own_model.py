"""A diagnosis of a model of the user's: every scheme in it, measured, predicted, judged."""

import json
import math
import textwrap
from itertools import pairwise
from pathlib import Path

import mlflow
import pytest
import torch
from torch import nn

import initflow as inf
from initflow.errors import SettingError

MODELS = """
    import torch
    from torch import nn

    def cnn():
        return nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 10)
        )

    def deep():
        layers = [nn.Linear(8, 8, bias=False) for _ in range(12)]
        return nn.Sequential(*layers), (torch.randn(20, 8), torch.randn(20, 8))

    class Recurrent(nn.Module):
        def __init__(self, ways):
            super().__init__()
            self.lstm = nn.LSTM(3, 8, batch_first=True, bidirectional=ways == 2)
            self.head = nn.Linear(8 * ways, 5)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    def recurrent():
        return Recurrent(1), (torch.randn(6, 4, 3), torch.arange(6) % 5)

    def both_ways():
        return Recurrent(2), (torch.randn(6, 4, 3), torch.arange(6) % 5)

    def own_loss():
        return nn.Linear(4, 2), torch.randn(7, 4), lambda outputs: outputs.square().sum()

    def no_images():
        return nn.Linear(5, 5)

    def wrong_batch():
        return nn.Linear(5, 5), torch.randn(3, 4)

    def wrong_loss():
        return nn.Linear(4, 2), torch.randn(7, 4), lambda outputs: 3

    def other_device():
        return nn.Linear(4, 2), torch.randn(7, 4, device="meta")

    def raises():
        raise RuntimeError("no weights today")
"""
SMALL = {"dataset": "digits", "draws": 4, "threads": 1, "progress": False}


def all_runs():
    return mlflow.search_runs(output_format="list", search_all_experiments=True)


@pytest.fixture
def place(store, tmp_path):
    (tmp_path / "mine.py").write_text(textwrap.dedent(MODELS))
    return lambda name: f"{tmp_path}/mine.py:{name}"


def test_schemes_side_by_side_on_images(place, tmp_path):
    """The weights as built come first; each has a run, a band by draws, and a prediction."""
    found = inf.diagnose(model=place("cnn"), inits="he,auto", **SMALL)
    assert [(cell.init, cell.activation) for cell in found.readings] == [
        ("default", "Sequential"),
        ("he", "Sequential"),
        ("auto", "Sequential"),
    ]
    for reading in found.readings.values():
        assert str(reading.verdict) == "stable forward, stable backward"
        assert list(reading.signals.layers) == ["0", "4"]
        for intervals in reading.predicted.values():
            for interval in intervals:
                assert interval.low < interval.expected < interval.high
    assert found.conclusions == []
    runs = {
        run.info.run_name: run
        for run in mlflow.search_runs(output_format="list", search_all_experiments=True)
    }
    assert len(runs) == 4
    run = runs["auto Sequential mine.py:cnn"]
    assert run.data.tags["initflow.model"] == place("cnn")
    assert run.data.tags["initflow.model_provider"].startswith(f"{tmp_path}/mine.py sha256:")
    assert run.data.tags["initflow.verdict.forward"] == "stable"
    assert run.data.metrics["predicted_preactivation_second_moment/0"] > 0
    (parent,) = (r for name, r in runs.items() if name.startswith("diagnose"))
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    file = mlflow.artifacts.download_artifacts(f"runs:/{parent.info.run_id}/diagnosis.json")
    table = json.loads(Path(file).read_text(), parse_constant=pytest.fail)
    assert [row["init"] for row in table["networks"]] == ["default", "he", "auto"]
    assert found.figures()["schemes_by_layer"].axes


def test_what_is_drawn_follows_from_the_seed(place):
    """The same numbers again; others from another seed, and in the band."""
    settings = SMALL | {"inits": "he", "model": place("deep")}
    first, again, other = (inf.diagnose(**settings, seed=seed) for seed in (0, 0, 1))
    read = lambda found: [r.signals.metrics() for r in found.readings.values()]  # noqa: E731
    assert read(first) == read(again) != read(other)
    (_, he), (_, next_he) = (list(one.readings.values()) for one in (first, other))
    band = he.predicted["preactivation_second_moment"][0]
    assert band.low < next_he.signals.layers["0"]["preactivation_second_moment"] < band.high


def test_a_prediction_of_linear_layers_is_exact(place):
    """Of n inputs with weights of variance v, the mean square is that of the inputs, times n·v."""
    found = inf.diagnose(model=place("deep"), inits="normal:std=0.5", **SMALL)
    torch.manual_seed(0)
    _, reading = found.readings.values()
    expected = [i.expected for i in reading.predicted["preactivation_second_moment"]]
    for before, after in pairwise(expected):
        assert after == pytest.approx(8 * 0.25 * before, rel=1e-6)


def test_what_vanishes_is_told_and_fails(place):
    """With what to try instead; ``fail_on`` names the schemes."""
    found = inf.diagnose(model=place("deep"), inits="normal:std=0.01", fail_on="vanishing", **SMALL)
    reading = found.readings["normal:std=0.01", "Sequential"]
    assert str(reading.verdict) == "vanishing forward, vanishing backward"
    assert list(found.failed) == [("default", "Sequential"), ("normal:std=0.01", "Sequential")]
    assert found.conclusions[0].startswith("default Sequential, normal:std=0.01 Sequential: ")
    assert "Try init=auto." in found.conclusions[0]


def test_where_there_is_no_rule_it_is_said(place):
    """A recurrent layer is measured and judged, with a band; nothing is predicted behind it."""
    found = inf.diagnose(model=place("both_ways"), inits="auto", **SMALL)
    (told,) = found.conclusions
    ways = "forward in 9 of 9 layers and backward in 8 of 9 layers"
    assert told == f"Not predicted {ways}: no rule for both directions of lstm in lstm."
    reading = found.readings["auto", "Recurrent"]
    assert list(reading.signals.layers)[-1] == "head"
    for interval in reading.predicted["preactivation_second_moment"]:
        assert math.isnan(interval.expected)
        assert 0 < interval.low < interval.high
    assert "predicted_preactivation_second_moment/head" not in reading.metrics()
    assert not reading.outside()["gradient_second_moment"]
    for interval in reading.by_time["lstm.l0_reverse"]["hidden_second_moment"]:
        assert math.isnan(interval.expected)
        assert 0 < interval.low < interval.high
    assert not any(key.startswith("predicted_hidden") for key in reading.metrics())


def test_a_recurrent_layer_is_predicted_by_time(place):
    """In metrics, in the table of a network, and in a figure; and all layers on the way."""
    found = inf.diagnose(model=place("recurrent"), inits="auto", **SMALL)
    assert not found.conclusions
    reading = found.readings["auto", "Recurrent"]
    for intervals in reading.predicted.values():
        assert all(interval.expected > 0 for interval in intervals)
    series = reading.by_time["lstm.l0"]
    by_gradient = series["hidden_gradient_second_moment"]
    assert len(by_gradient) == 4
    assert all(0 < one.low < one.high and one.expected > 0 for one in by_gradient)
    assert all(math.isnan(one.expected) for one in series["hidden_signal_variance"])
    metrics = reading.metrics()
    at_end = metrics["predicted_hidden_second_moment/lstm.l0.time_100"]
    assert at_end == series["hidden_second_moment"][-1].expected
    assert {f"predicted_{key}" for key in reading.signals.metrics() if "lstm.l0.time" in key} - {
        f"predicted_hidden_signal_variance/lstm.l0.time_{at}" for at in ("000", "033", "067", "100")
    } == {key for key in metrics if "lstm.l0.time" in key}
    assert "through_time" in found.figures()
    run = next(run for run in all_runs() if run.info.run_name.startswith("auto"))
    assert run.data.metrics["predicted_hidden_second_moment/lstm.l0.time_100"] == at_end
    file = mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/signals.json")
    table = json.loads(Path(file).read_text(), parse_constant=pytest.fail)
    assert table["measured"][0]["by_time"]["lstm.l0"] == reading.signals.by_time["lstm.l0"]
    own = table["predicted_by_time"]["lstm.l0"]["hidden_second_moment"][-1]
    assert own["expected"] == at_end
    assert "hidden_second_moment" in table["quantities"]
    files = mlflow.artifacts.list_artifacts(run_id=run.info.run_id)
    assert "through_time.png" in [file.path for file in files]


def test_a_loss_of_ones_own(place):
    """It is the one that the gradients are of."""
    found = inf.diagnose(model=place("own_loss"), inits="he", **SMALL)
    reading = found.readings["he", "Linear"]
    values = reading.signals.layers["linear"]
    ratio = values["gradient_second_moment"] / values["preactivation_second_moment"]
    assert ratio == pytest.approx(4)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("no_images", {}, "takes no images of digits: have it give (module, batch)"),
        ("wrong_batch", {}, "model takes no batch of shape (3, 4)"),
        ("wrong_loss", {}, "loss must give one number as a tensor, not int"),
        ("raises", {}, "failed: RuntimeError: no weights today"),
        ("nothing", {}, "has no attribute 'nothing'"),
        ("cnn", {"inits": "hee"}, "init must be one of"),
        ("cnn", {"inits": "he:gain=2"}, "argument of scheme 'he' must be one of"),
        ("cnn", {"inits": "normal:std=1,normal:std=1.0"}, "inits must be schemes that differ"),
        ("cnn", {"depth": 3}, "depth=3 is for model=mlp, not for"),
        ("cnn", {"draws": 1}, "draws must be a whole number, at least 2"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_run(place, name, settings, said):
    """They name the model, or the value, and what would be right."""
    with pytest.raises(SettingError) as caught:
        inf.diagnose(model=place(name), **({"inits": "he"} | SMALL | settings))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not all_runs()


def test_a_function_itself(monkeypatch, store):
    """As a notebook has it; one that has no place is refused."""
    monkeypatch.setattr("__main__.build_it", build_it, raising=False)
    monkeypatch.setattr(build_it, "__module__", "__main__")
    found = inf.diagnose(model=build_it, inits="he", **SMALL)
    assert found.config.model == "__main__:build_it"
    with pytest.raises(
        SettingError, match="model must be a model's name, or the function that builds"
    ):
        inf.DiagnoseConfig(model=lambda: nn.Linear(1, 1))


def build_it():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

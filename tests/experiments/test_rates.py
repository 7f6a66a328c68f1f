"""The learning-rate range of schemes, on digits: each rate as that network alone has it."""

import json
from pathlib import Path

import mlflow
import pytest
import torch

from initflow.core.configurations import RatesConfig, TrainConfig
from initflow.diagnostics import coordinates, curvature, measure, networks
from initflow.diagnostics.record import start, train_together
from initflow.errors import SettingError
from initflow.experiments.comparisons import rates as experiment
from initflow.experiments.comparisons.rates import rates
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.reporting.drawing import png
from initflow.training import datasets, trainer

SMALL = {"dataset": "digits", "hidden": "16", "threads": 1, "updates": 40, "progress": False}
RANGE = {"rates": 5, "lr_low": 0.01, "lr_high": 100.0, "seeds": 2}


@pytest.fixture(scope="module")
def found(tracked):
    """Two schemes over widths, in both parametrizations."""
    return rates(
        **SMALL | RANGE,
        inits=["he", "normal"],
        over="width",
        widths=[8, 32],
        parametrizations=["standard", "mup"],
        base_width=8,
    )


def test_each_network_is_the_one_that_trains_alone(found):
    """At its rate, without the test images; its accuracy on those held out is in the table."""
    assert len(found.tried) == 2 * 2 * 2 * 5 * 2
    chosen = [one for one in found.tried if one.group.kind.init == "he" and one.seed == 1][::7]
    assert len(chosen) > 2
    for one in chosen:
        config = TrainConfig(**mlflow.get_run(one.run_id).data.params_without_resolved)
        assert (config.validation, config.epochs) == (1437 // 6, 40)
        splits = datasets.load(config).untested()
        record = start(config, find(config.init), splits)
        train_together([record], splits)
        assert one.lr == config.lr
        assert one.outcome == record.outcome
        if record.outcome == "finished":
            assert one.accuracy == record.last("accuracy/validation")
            assert one.peak == record.last("loss/peak")
            assert one.start == pytest.approx(record.history["loss/validation"][0][1])


@pytest.fixture(autouse=True)
def _settings_of_a_run(monkeypatch):
    """Those of a network's run, without what auto became."""
    monkeypatch.setattr(
        mlflow.entities.RunData,
        "params_without_resolved",
        property(lambda data: {k: v for k, v in data.params.items() if "resolved" not in k}),
        raising=False,
    )


def test_the_range_of_each_scheme_has_both_ends(found):
    """Low rates are stable and the highest are not; the best lies between."""
    for row in found.rows:
        if row.group.kind.init == "he":
            assert row.stable.n == 2
            assert 0.01 <= row.stable.mean < 100
            assert row.predicted.mean == pytest.approx(row.stable.mean, rel=50)
            assert row.accuracy.mean > 0.6
    assert {one.outcome for one in found.tried} <= {"finished", "diverged"}


def test_what_theory_predicts_is_of_the_very_networks(found):
    """From the largest eigenvalue, with Nesterov's momentum of 0.9."""
    for start_of in found.starts[::5]:
        (init, parametrization), width = start_of.group
        base = 8 if parametrization == "mup" else 100
        config = TrainConfig(
            init=init, dataset="digits", hidden=(width,), validation=1437 // 6, lr=0.1,
            parametrization=parametrization, base_width=base, seed=start_of.seed,
        )  # fmt: skip
        splits = datasets.load(config)
        network = networks.initialize(config, find(init), splits)
        factors = [width / 8, width / 8, 8 / width, 1.0] if parametrization == "mup" else None
        eigenvalue = curvature.largest_eigenvalue(
            network, ACTIVATIONS["relu"], measure.probe(splits.train, 1_000), factors
        )
        assert start_of.curvature == pytest.approx(eigenvalue, rel=1e-4)
        assert start_of.predicted == pytest.approx(3.8 / 2.8 / eigenvalue, rel=1e-4)


def test_what_the_first_updates_change_is_that_of_a_plain_loop(tracked):
    """Of torch.nn and torch.optim; the untrained network has changed nothing."""
    config = TrainConfig(dataset="digits", hidden=(12, 9), lr=0.2, activation="tanh", validation=99)
    splits = datasets.load(config)
    probe = measure.probe(splits.train, 50)
    found = coordinates.changes(config, find("he"), splits, probe)
    assert [(one.step, one.layer) for one in found] == [
        (step, f"fc{layer}") for step in range(5) for layer in (1, 2, 3)
    ]
    assert all(one.change == 0 for one in found[:3])
    state = networks.initialize(config, find("he"), splits).state()
    layers = []
    for at in (1, 2, 3):
        weight = state[f"fc{at}.weight"]
        layer = torch.nn.Linear(*reversed(weight.shape))
        layer.load_state_dict({"weight": weight, "bias": state[f"fc{at}.bias"]})
        layers.append(layer)

    def forward(x):
        passed = []
        for layer in layers:
            passed.append(layer(x))
            x = torch.tanh(passed[-1])
        return passed

    parameters = [p for layer in layers for p in layer.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9, nesterov=True)
    order = trainer.batch_order(len(splits.train), 0, 0)
    before = [x.detach() for x in forward(probe.images)]
    for batch in order.split(100)[:4]:
        optimizer.zero_grad()
        logits = forward(splits.train.images[batch])[-1]
        torch.nn.functional.cross_entropy(logits, splits.train.labels[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        after = forward(probe.images)
    for one, now, was in zip(found[-3:], after, before, strict=True):
        assert one.size == pytest.approx(float(now.square().mean().sqrt()), rel=1e-5)
        assert one.change == pytest.approx(float((now - was).square().mean().sqrt()), rel=1e-4)


def test_the_run_has_numbers_figures_and_verdicts(found):
    """As CSV, JSON and PNG files, a report, metrics by rate, and a sentence for each scheme."""
    run = mlflow.get_run(found.run_id)
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    files = {path.name for path in folder.iterdir()}
    tables = {"rates.csv", "coordinates.csv", "rates.json", "report.html"}
    assert tables | {"rates.png", "stable_rates.png", "coordinates.png"} <= files
    table = json.loads((folder / "rates.json").read_text())
    assert len(table["rows"]) == 8
    assert len(table["slopes"]) == 4
    assert {one["layer"] for one in table["coordinates"]} == {"fc1", "fc2"}
    assert table["sentences"] == list(found.conclusions)
    assert len(found.conclusions) == 8
    assert len((folder / "rates.csv").read_text().splitlines()) == 1 + len(found.tried)
    assert "accuracy_by_rate/he 8" in run.data.metrics
    assert not any("test" in key for key in run.data.metrics)
    nested = mlflow.get_run(found.tried[0].run_id)
    assert not {"accuracy/test", "loss/test"} & nested.data.metrics.keys()
    assert found.problems() == []


def test_a_range_goes_on_where_it_was_interrupted(tracked, monkeypatch):
    """What was trained is not trained again, and its numbers are those of a whole one."""
    settings = SMALL | {"rates": 3, "seeds": 2, "inits": ["he"], "stack": 3, "updates": 20}
    whole = rates(**settings, experiment="whole")
    from initflow.experiments.populations import stacking

    trained, train = [], stacking.train_together

    def watched(records, *more, **named):
        trained.append(len(records))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(records, *more, **named)

    monkeypatch.setattr(stacking, "train_together", watched)
    with pytest.raises(KeyboardInterrupt):
        rates(**settings, experiment="parts")
    again = rates(**settings, experiment="parts")
    assert trained == [3, 3, 3]
    numbers = [
        [{k: v for k, v in row.items() if k != "run_id"} for row in one.numbers()]
        for one in (whole, again)
    ]
    assert numbers[0] == numbers[1]
    assert whole.conclusions == again.conclusions


@pytest.mark.parametrize(
    "own", [{"optimizer": "adam", "lr_high": 1.0}, {"clip": 1.0}, {"inits": ["zero"]}], ids=str
)
def test_where_theory_says_nothing_there_is_no_prediction(own, tracked):
    """As of Adam, whose steps it does not bound alone; figures are drawn all the same."""
    found = rates(**SMALL | {"rates": 3, "seeds": 1, "updates": 5, "inits": ["he"]} | own)
    said = "predicts" in found.conclusions[0]
    assert said == (own.get("inits") is not None and found.rows[0].stable is not None)
    for figure in found.figures().values():
        assert png(figure).startswith(b"\x89PNG")


def test_a_network_that_cannot_be_made_leaves_the_others_whole(tracked, tmp_path):
    """Of one width a scheme fails: that is told, and all else is there."""
    (tmp_path / "odd.py").write_text(
        "def fill(weight, fan_out, generator):\n"
        "    if fan_out == 24:\n"
        "        raise ValueError('not of width 24')\n"
        "    weight.normal_(0.0, 0.1, generator=generator)\n"
    )
    small = {"rates": 2, "lr_low": 0.01, "lr_high": 0.1, "seeds": 1, "updates": 5}
    odd = f"{tmp_path}/odd.py:fill"
    found = rates(**SMALL | small, inits=["he", odd], over="width", widths=[16, 24])
    assert len(found.failed) == 2
    assert all("not of width 24" in why for why in found.failed.values())
    assert {(one.group.kind.init == "he", one.group.size) for one in found.tried} == {
        (True, 16), (True, 24), (False, 16),
    }  # fmt: skip
    assert {one.group for one in found.starts} == {one.group for one in found.tried}
    assert {one.kind.init == "he" for one in found.coordinates} == {True, False}


def test_the_rates_are_at_equal_factors():
    """With both ends, to six digits."""
    assert RatesConfig(rates=5, lr_high=10).range == (0.001, 0.01, 0.1, 1.0, 10.0)
    assert RatesConfig().range[:3] == (0.001, 0.00177828, 0.00316228)
    assert len(RatesConfig().range) == 17


def test_too_many_images_held_out_are_told_before_a_run_is_made(store):
    """One line."""
    with pytest.raises(SettingError, match="validation"):
        rates(**SMALL, validation=1_437)
    assert mlflow.search_runs(search_all_experiments=True, output_format="list") == []
    assert experiment.SHARE == 6

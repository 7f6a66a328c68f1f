"""A diagnosis: what is read of each network, and what it leaves in MLflow."""

import json
import math
from pathlib import Path

import mlflow
import pytest

from initflow.core.configurations import DiagnoseConfig
from initflow.diagnostics import measure
from initflow.errors import SettingError
from initflow.experiments.untrained import diagnose
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.theory.prediction import PREDICTED
from initflow.training import datasets, model

SETTINGS = {
    "inits": "zero,lecun,he:mode=fan_out",
    "activations": "relu,tanh",
    "depth": 12,
    "width": 30,
    "dataset": "digits",
    "probe": 200,
    "threads": 1,
    "seed": 4,
}
CELLS = [
    (init, activation)
    for init in ("zero", "lecun", "he:mode=fan_out")
    for activation in ("relu", "tanh")
]


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory):
    """A diagnosis of six networks, its runs by name, and what was told on the way."""
    folder = tmp_path_factory.mktemp("diagnosis")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        told = []
        diagnosis = diagnose.diagnose(
            DiagnoseConfig(**SETTINGS),
            experiment="mine",
            progress=lambda *what: told.append(what),
        )
        runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
        yield diagnosis, {run.info.run_name: run for run in runs}, told
        mlflow.set_tracking_uri(None)


def test_every_scheme_meets_every_activation(diagnosed):
    """One nested run each, in the parent's experiment, all finished, told as it goes."""
    diagnosis, runs, told = diagnosed
    assert list(diagnosis.readings) == CELLS
    parent = runs.pop("diagnose 64-30x12-10 digits seed 4")
    assert parent.info.run_id == diagnosis.run.id
    assert set(runs) == {f"{init} {activation} 64-30x12-10" for init, activation in CELLS}
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.experiment_id == parent.info.experiment_id
        assert run.info.status == "FINISHED"
    assert parent.info.status == "FINISHED"
    assert mlflow.get_experiment(parent.info.experiment_id).name == "mine"
    assert told[-1] == ("drawing and logging", 6, 6)


def test_a_nested_run_has_the_networks_signals_and_verdict(diagnosed):
    """Those of the same network measured by itself, at step 0; nothing was trained."""
    diagnosis, runs, _ = diagnosed
    run = runs["lecun relu 64-30x12-10"]
    splits = datasets.load(diagnosis.config.network("lecun", "relu"))
    widths = (64, *(30,) * 12, 10)
    parameters = model.initialize(
        widths, find("lecun"), ACTIVATIONS["relu"], bias_init="pytorch", seed=4
    )
    probe = measure.probe(splits.train, 200)
    (seen,) = measure.observe(parameters, [ACTIVATIONS["relu"]], probe)
    logged = run.data.metrics
    expected = seen.signals.metrics()
    assert {k for k in logged if not k.startswith("predicted_")} == set(expected)
    for key, value in expected.items():
        assert logged[key] == pytest.approx(value, rel=1e-5)
    assert {k.partition("/")[0] for k in logged if k.startswith("predicted_")} == {
        f"predicted_{quantity}" for quantity in PREDICTED
    }
    assert run.data.tags["initflow.verdict.backward"] == "vanishing"
    assert run.data.tags["initflow.initial_weights_sha256"] == model.weights_sha256(
        parameters.state()
    )
    assert run.data.params["init"] == "lecun"
    assert "Try init=he." in run.data.tags["mlflow.note.content"]


def test_the_parent_draws_lines_by_layer(diagnosed):
    """A metric for each network whose step is the layer; keys that MLflow takes."""
    diagnosis, _, _ = diagnosed
    client = mlflow.MlflowClient()
    history = client.get_metric_history(
        diagnosis.run.id, "gradient_second_moment/he:mode_fan_out tanh"
    )
    reading = diagnosis.readings["he:mode=fan_out", "tanh"]
    measured = reading.signals.by_layer("gradient_second_moment")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == list(
        enumerate(measured, start=1)
    )


def test_all_of_it_is_a_table_and_a_figure(diagnosed):
    """JSON that any reader takes, and a whole PNG."""
    diagnosis, _, _ = diagnosed
    file = mlflow.artifacts.download_artifacts(f"runs:/{diagnosis.run.id}/diagnosis.json")
    table = json.loads(Path(file).read_text(), parse_constant=pytest.fail)
    assert [(row["init"], row["activation"]) for row in table["networks"]] == CELLS
    first = table["networks"][0]
    assert first["verdict"]["forward"] == "symmetric"
    assert set(first["predicted"]) == set(PREDICTED)
    figure = mlflow.artifacts.download_artifacts(f"runs:/{diagnosis.run.id}/schemes_by_layer.png")
    assert Path(figure).read_bytes().startswith(b"\x89PNG")


def test_a_reading_says_which_layers_are_outside_the_band(diagnosed):
    """Few under a scheme that the theory is of; with PyTorch's biases too."""
    diagnosis, _, _ = diagnosed
    outside = diagnosis.readings["lecun", "tanh"].outside()
    assert set(outside) == set(PREDICTED)
    assert sum(map(len, outside.values())) <= 4


def test_weights_that_theory_is_not_of_lie_outside(store):
    """Constant weights add up the signal, where independent ones do not."""
    settings = SETTINGS | {"inits": "constant", "activations": "relu", "depth": 3}
    reading = diagnose.diagnose(DiagnoseConfig(**settings)).readings["constant", "relu"]
    assert reading.outside()["preactivation_second_moment"] == ["fc1", "fc2", "fc3", "fc4"]


def test_what_is_not_finite_is_text_in_the_table(store):
    """Exploding weights: infinite predictions, and measurements that are missing."""
    settings = SETTINGS | {"inits": "normal:std=1e4", "activations": "relu", "depth": 30}
    diagnosis = diagnose.diagnose(DiagnoseConfig(**settings))
    ((_, reading),) = diagnosis.readings.items()
    assert reading.verdict.forward == "exploding"
    file = mlflow.artifacts.download_artifacts(f"runs:/{diagnosis.run.id}/diagnosis.json")
    table = json.loads(Path(file).read_text(), parse_constant=pytest.fail)
    assert table["networks"][0]["mean_field"]["q_star"] == "inf"
    metrics = mlflow.get_run(diagnosis.run.id).data.metrics
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    ("fail_on", "failed"),
    [(None, 0), ("symmetric", 2), ("vanishing,symmetric", 3), ("exploding", 0)],
)
def test_what_fails_is_a_verdict_either_way(diagnosed, fail_on, failed):
    """Forward or backward."""
    from dataclasses import replace

    diagnosis, _, _ = diagnosed
    config = DiagnoseConfig(**SETTINGS, fail_on=fail_on)
    assert len(replace(diagnosis, config=config).failed) == failed


@pytest.mark.parametrize(
    "settings", [{"inits": "hee"}, {"inits": "he,he:mode=x"}, {"device": "cuda:99"}], ids=str
)
def test_wrong_settings_make_no_run(store, settings):
    """One error, before anything is written."""
    with pytest.raises(SettingError):
        diagnose.diagnose(DiagnoseConfig(**(SETTINGS | settings)))
    assert mlflow.search_experiments(filter_string="name = 'initflow'") == []


def test_an_interrupted_diagnosis_is_closed_as_killed(store):
    """The parent and what was open below it; what was read stays."""

    def interrupt(what, done, _):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose.diagnose(DiagnoseConfig(**SETTINGS), progress=interrupt)
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert sorted(run.info.status for run in runs) == ["FINISHED", "FINISHED", "KILLED"]
    assert mlflow.active_run() is None


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_diagnosis_cut_off_in_the_middle_of_a_statement_is_closed(store, monkeypatch, stop):
    """What SQLite had begun to write is let go, so that the ends of all runs can be written."""
    from sqlalchemy.engine.default import DefaultDialect

    real, left = DefaultDialect.do_executemany, [4]

    def executemany(self, cursor, statement, parameters, context=None):
        left[0] -= 1
        if left[0]:
            return real(self, cursor, statement, parameters, context)

        def cut_off():
            yield parameters[0]
            raise stop

        return cursor.executemany(statement, cut_off())

    monkeypatch.setattr(DefaultDialect, "do_executemany", executemany)
    with pytest.raises(stop):
        diagnose.diagnose(DiagnoseConfig(**SETTINGS))
    assert left[0] <= 0
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    statuses = {run.info.status for run in runs}
    assert "KILLED" in statuses
    assert "RUNNING" not in statuses

"""The trainable depth, from its settings to the runs: whole, interrupted and gone on with."""

import csv
import io
import json
import signal
import statistics

import mlflow
import pytest

import initflow
from initflow.core.configurations import TrainabilityConfig
from initflow.errors import SettingError
from initflow.experiments.comparisons import trainability
from initflow.reporting.pictures import trainability_statistics as plane_statistics
from initflow.tracking import runs

QUICK = {
    "dataset": "digits",
    "points": 2,
    "depths": "12,2",
    "width": 10,
    "lrs": "0.1,0.01",
    "updates": 20,
    "eval_every": 10,
    "seeds": 2,
    "seed": 3,
    "threads": 1,
}
NETWORKS = 2 * 2 * 2 * 2


def train(name, progress=lambda *_: None, **own):
    return trainability.trainability(
        TrainabilityConfig(**(QUICK | own)), experiment=name, progress=progress
    )


def logged(result, file):
    return mlflow.artifacts.load_text(f"runs:/{result.run.id}/{file}")


def rows(result):
    return list(csv.DictReader(io.StringIO(logged(result, "trainability.csv"))))


@pytest.fixture(scope="module")
def trained(tracked):
    return train("trained")


def test_every_place_of_the_plane_has_a_network_under_every_seed(trained):
    """A row and a run for each, with the scheme, the depth and the rate that its place is of."""
    table = rows(trained)
    assert len(table) == NETWORKS == len({row["run_id"] for row in table})
    assert {float(row["sigma_w2"]) for row in table} == {1.0, 4.0}
    assert {row["seed"] for row in table} == {"3", "4"}
    for row in table[:: NETWORKS // 5]:
        run = mlflow.get_run(row["run_id"])
        params = run.data.params
        spec = f"mean_field:sigma_w2={float(row['sigma_w2']):g},sigma_b2=0.05"
        hidden = {"12": "10x12", "2": "10x2"}[row["depth"]]
        assert (params["init"], params["hidden"], params["updates"]) == (spec, hidden, "20")
        assert (params["lr"], params["seed"]) == (row["lr"], row["seed"])
        assert run.data.metrics["accuracy/train"] == float(row["accuracy"])
        assert run.data.metrics["loss/train"] == float(row["loss"])
        assert "accuracy/test" not in run.data.metrics
        assert run.data.tags["mlflow.parentRunId"] == trained.run.id
    names = {
        run.data.tags["mlflow.runName"]
        for run in mlflow.search_runs(experiment_names=["trained"], output_format="list")
    }
    assert len(names) == NETWORKS + 1


def test_any_network_is_verified(trained):
    """Bit for bit, from what its run recorded; no test images are needed."""
    deepest = max(trained.networks, key=lambda one: one.depth)
    assert initflow.verify(deepest.run_id, progress=False).verdict == "identical"


def test_its_run_carries_means_edges_and_c(trained):
    """As JSON, as metrics with the depth as step, and as figure and report."""
    kept = json.loads(logged(trained, "trainability.json"))
    assert kept["sentences"] == list(trained.sentences)
    metrics = mlflow.get_run(trained.run.id).data.metrics
    client = mlflow.MlflowClient()
    for plane, its in zip(trained.planes, kept["planes"], strict=True):
        assert its == json.loads(json.dumps(plane_statistics.as_json(plane)))
        assert its["depth"] == [2, 12]
        of_place = [
            one.accuracy
            for one in trained.networks
            if (one.lr, one.sigma_w2, one.depth) == (plane.lr, 4.0, 12)
        ]
        assert its["accuracy"][1][1] == pytest.approx(statistics.fmean(of_place))
        key = f"accuracy_by_depth/lr {plane.lr:g}/sigma_w2 4"
        points = sorted(
            (point.step, point.value) for point in client.get_metric_history(trained.run.id, key)
        )
        assert points == [(2, its["accuracy"][0][1]), (12, its["accuracy"][1][1])]
        assert metrics[f"diverged/lr {plane.lr:g}"] == 0
        if plane.fit and plane.fit.c:
            assert metrics[f"c/lr {plane.lr:g}"] == plane.fit.c
    files = {file.path for file in client.list_artifacts(trained.run.id)}
    assert {"trainability.png", "report.html", "config.json"} <= files
    assert trained.failures == {}
    description = mlflow.get_run(trained.run.id).data.tags["mlflow.note.content"]
    assert "[Accuracy by depth](#/experiments/" in description


def test_what_diverges_is_there_and_marked(tracked):
    """Counted in the run, in the table and in a sentence; without an accuracy."""
    result = train("diverging", activation="relu", lrs="1e30", depths="2,3", seeds=1)
    assert {row["outcome"] for row in rows(result)} == {"diverged"}
    assert {row["accuracy"] for row in rows(result)} == {""}
    assert result.sentences[-1] == "4 networks diverged."
    assert mlflow.get_run(result.run.id).data.metrics["diverged"] == 4


def test_ctrl_c_in_the_middle_loses_nothing(tracked, trained):
    """By a signal: the next command has the same numbers, and trains only what was not there."""

    def interrupt(what, done, of):
        told = what.partition(", ")[2].split(" of ")[0]
        if told.isdigit() and int(told) >= NETWORKS // 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            train("interrupted", interrupt, stack=2)
    finally:
        signal.signal(signal.SIGINT, before)
    found = mlflow.search_runs(experiment_names=["interrupted"], output_format="list")
    kept = {run.info.run_id for run in found if run.info.status == "FINISHED"}
    assert len(kept) == NETWORKS // 2
    again = train("interrupted", stack=2)
    ids = {one.run_id for one in again.networks}
    assert kept < ids
    assert len(ids) == NETWORKS
    bare = [plane_statistics.values(one) | {"run_id": ""} for one in again.networks]
    assert bare == [plane_statistics.values(one) | {"run_id": ""} for one in trained.networks]
    assert again.sentences == trained.sentences
    now = mlflow.search_runs(experiment_names=["interrupted"], output_format="list")
    fresh = {run.info.run_id for run in now} - {run.info.run_id for run in found}
    assert len(fresh) == 1 + NETWORKS // 2
    assert all(mlflow.get_run(run_id).data.tags[runs.PARENT] == again.run.id for run_id in kept)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"sigma_w2_low": 4.0}, "sigma_w2_low must be below sigma_w2_high, not '4'"),
        (
            {"sigma_w2_high": 1.000001, "points": 9},
            "points must be so few that values of σ_w² from",
        ),
        ({"depths": [3]}, "depths must be two or more whole numbers between commas"),
        ({"depths": [3, 3]}, "none twice, from 1 to 1000, not"),
        ({"width": 65_536, "depths": "5,1000"}, "width x depths must be widths such as"),
        ({"device": "cuda:99"}, "device must be auto or cpu"),
        ({"lrs": "0.1,fast"}, "lrs must be learning rates between commas, none twice"),
    ],
)
def test_wrong_settings_make_no_run(tracked, own, said):
    """One line, before anything is trained."""
    with pytest.raises(SettingError, match=said):
        train("never", **own)
    assert mlflow.get_experiment_by_name("never") is None

"""A reproduction: a table of the digits, run again, and what it leaves in MLflow."""

import html
import json
import math
import statistics
from pathlib import Path

import mlflow
import pytest
from scipy import stats

from initflow.core.configurations import ReproduceConfig, TrainConfig
from initflow.errors import SettingError
from initflow.experiments import train
from initflow.experiments.comparisons.reproduce import reproduce

TABLE = """
title = "Handwritten <digits>"
source = "A notebook & its author."
notes = ["It says [nothing] more.", "Nor <less>."]

[settings]
dataset = "digits"
hidden = "24"
epochs = 3
eval_every = 15
bias_init = "zeros"

# Measured of ours are 0, 15, 30 and 45.
[[rows]]
name = "he: relu"
init = "he"
activation = "relu"
published = { 15 = 12.34, 20 = 77.77, 30 = 91.5, 45 = 93.21 }

[[rows]]
name = "xavier <b>"
init = "xavier"
activation = "tanh"
published = { 45 = 1.23 }

[[rows]]
name = "no numbers"
init = "normal:std=0.3"
activation = "tanh"
"""
ROWS = {
    "he: relu": ("he", "relu"),
    "xavier <b>": ("xavier", "tanh"),
    "no numbers": ("normal:std=0.3", "tanh"),
}
SEEDS = (4, 5, 6)
SETTINGS = {"seed": 4, "seeds": 3, "probe": 20, "threads": 1, "log_model": False}


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """A working folder with a store that all share, as making one takes a second."""
    folder = tmp_path_factory.mktemp("reproduction")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        yield folder
        mlflow.set_tracking_uri(None)


def runs_of(experiment):
    """All runs of the experiment of this name."""
    return mlflow.search_runs(experiment_names=[experiment], output_format="list")


@pytest.fixture(scope="module")
def reproduced(home):
    """Nine small networks, their runs, and what was told on the way."""
    (home / "mine.toml").write_text(TABLE)
    told = []
    result = reproduce(
        ReproduceConfig(table="mine.toml", **SETTINGS),
        experiment="mine",
        progress=lambda *what: told.append(what),
    )
    return result, runs_of("mine"), told


@pytest.fixture(scope="module")
def parent(reproduced):
    _, runs, _ = reproduced
    (run,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return run


def artifact(run, name):
    return Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/{name}"))


def curves(runs):
    """Of each init and activation, seed by seed, test accuracies as MLflow has them."""
    client, found = mlflow.MlflowClient(), {}
    for run in runs:
        params = run.data.params
        if "mlflow.parentRunId" in run.data.tags:
            history = client.get_metric_history(run.info.run_id, "accuracy/test")
            cell = found.setdefault((params["init"], params["activation"]), {})
            cell[int(params["seed"])] = {point.step: point.value for point in history}
    return found


def test_every_row_is_run_under_every_seed(reproduced, parent):
    """A nested run each, in the parent's experiment, all finished, with the table's settings."""
    _, runs, told = reproduced
    nested = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in nested} == {parent.info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.info.experiment_id for run in runs} == {parent.info.experiment_id}
    assert mlflow.get_experiment(parent.info.experiment_id).name == "mine"
    cells = [
        (run.data.params["init"], run.data.params["activation"], int(run.data.params["seed"]))
        for run in nested
    ]
    assert sorted(cells) == sorted((*cell, seed) for cell in ROWS.values() for seed in SEEDS)
    for run in nested:
        params = run.data.params
        shared = ("dataset", "hidden", "epochs", "eval_every", "bias_init", "probe", "lr")
        assert [params[name] for name in shared] == (
            ["digits", "24", "3", "15", "zeros", "20", "0.1"]
        )
    assert len({run.info.run_name for run in nested}) == 9
    assert told[-1][1:] == (9, 9)


def test_a_network_is_the_one_that_training_alone_gives(reproduced):
    """Weights and accuracy, bit for bit, of the same settings."""
    _, runs, _ = reproduced
    (run,) = [
        run
        for run in runs
        if (run.data.params.get("init"), run.data.params["seed"]) == ("xavier", "5")
    ]
    alone = train.train(
        TrainConfig(
            init="xavier", activation="tanh", dataset="digits", hidden=24, epochs=3, seed=5,
            eval_every=15, bias_init="zeros", probe=20, threads=1, log_model=False,
        )
    )  # fmt: skip
    tags = mlflow.get_run(alone.run.id).data.tags
    for tag in ("initflow.weights_sha256", "initflow.initial_weights_sha256"):
        assert run.data.tags[tag] == tags[tag]
    assert run.data.metrics["accuracy/test"] == alone.last("accuracy/test")


def test_the_numbers_are_those_of_the_nested_runs(reproduced, parent):
    """reproduction.json, worked out once more from what MLflow has of each network."""
    _, runs, _ = reproduced
    found = json.loads(
        artifact(parent, "reproduction.json").read_text(), parse_constant=pytest.fail
    )
    assert [row["name"] for row in found["rows"]] == list(ROWS)
    assert {row["name"]: (row["init"], row["activation"]) for row in found["rows"]} == ROWS
    measured = curves(runs)
    published = {
        "he: relu": {15: 0.1234, 30: 0.915, 45: 0.9321},  # at 20 nothing of ours was measured
        "xavier <b>": {45: 0.0123},
        "no numbers": {},
    }
    for row in found["rows"]:
        ours = measured[row["init"], row["activation"]]
        assert set(ours) == set(SEEDS)
        ends = [ours[seed][45] for seed in SEEDS]
        low, high = stats.ttest_1samp(ends, 0).confidence_interval(0.95)
        assert (row["n"], row["diverged"]) == (3, 0)
        assert row["accuracy_mean"] == pytest.approx(statistics.mean(ends))
        assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx((low, high))
        expected = published[row["name"]]
        assert [check["iteration"] for check in row["checks"]] == list(expected)
        for check in row["checks"]:
            at = [ours[seed][check["iteration"]] for seed in SEEDS]
            scale = statistics.stdev(at) * math.sqrt(4 / 3)
            low, high = stats.t(2, statistics.mean(at), scale).interval(0.95)
            assert check["published"] == pytest.approx(expected[check["iteration"]])
            assert (check["n"], check["mean"]) == (3, pytest.approx(statistics.mean(at)))
            assert (check["seed_low"], check["seed_high"]) == pytest.approx((low, high))
            assert check["explained"] == (low <= check["published"] <= high)
    assert (found["table"], found["title"]) == ("mine", "Handwritten <digits>")
    assert found["source"] == "A notebook & its author."
    assert found["notes"] == ["It says [nothing] more.", "Nor <less>."]
    assert found["failed"] == {}


def test_the_sentence_counts_what_the_table_explains(reproduced, parent):
    """The numbers are chosen so that some are explained, and one of a hundredth is not."""
    result, _, _ = reproduced
    found = json.loads(artifact(parent, "reproduction.json").read_text())
    checks = [row["checks"] for row in found["rows"]]
    explained = [check["explained"] for of_row in checks for check in of_row]
    assert found["rows"][1]["checks"][0]["explained"] is False
    assert True in explained
    assert list(result.sentences) == found["sentences"]
    (sentence,) = result.sentences
    numbers = [int(word) for word in sentence.replace(",", " ").replace(".", " ").split()
               if word.isdigit()]  # fmt: skip
    last = sum(of_row[-1]["explained"] for of_row in checks if of_row)
    assert numbers == [2, last, 95, 3, len(explained), sum(explained)]


def test_the_parent_carries_the_report(reproduced, parent):
    """A page with everything, a figure, all numbers; a description that begins with links."""
    result, _, _ = reproduced
    there = {file.path for file in mlflow.artifacts.list_artifacts(run_id=parent.info.run_id)}
    assert {"config.json", "published_and_ours.png", "report.html", "reproduction.json"} <= there
    assert artifact(parent, "published_and_ours.png").read_bytes().startswith(b"\x89PNG")
    page = artifact(parent, "report.html").read_text()
    assert page.count("<h1") == 1
    assert "<b>" not in page  # of a row's name
    text = html.unescape(page.replace("<wbr>", ""))
    for part in (
        "Handwritten <digits>, 3 seeds",
        *result.sentences,
        "A notebook & its author.",
        "It says [nothing] more.",
        "Nor <less>.",
        *ROWS,
        "initflow reproduce --table mine.toml",
        *("12.34", "91.50", "93.21", "1.23"),
    ):
        assert part in text
    assert "77.77" not in text  # nothing of ours was measured there
    description = parent.data.tags["mlflow.note.content"]
    assert description.startswith("[")
    for part in (*result.sentences, "Handwritten <digits>", "A notebook & its author."):
        assert part in html.unescape(description)
    assert "<digits>" not in description
    assert parent.data.params["table"] == "mine.toml"
    assert parent.data.tags["initflow.version"]


def test_the_parent_has_the_mean_curves(reproduced, parent):
    """By iteration, over the seeds, for MLflow's own charts."""
    _, runs, _ = reproduced
    history = mlflow.MlflowClient().get_metric_history(
        parent.info.run_id, "accuracy_by_iteration/he relu"
    )
    ours = curves(runs)["he", "relu"]
    assert {point.step: point.value for point in history} == {
        step: pytest.approx(statistics.mean(ours[seed][step] for seed in SEEDS))
        for step in (0, 15, 30, 45)
    }


def small(folder, *, replacing=(), rows=1):
    """The path of a table of the first ``rows`` rows, one epoch, with parts replaced."""
    head, *each = TABLE.split("[[rows]]")
    text = "[[rows]]".join([head.replace("epochs = 3", "epochs = 1"), *each[:rows]])
    for part, by in replacing:
        assert part in text
        text = text.replace(part, by)
    (folder / "mine.toml").write_text(text)
    return str(folder / "mine.toml")


QUICK = {"probe": 0, "threads": 1, "log_model": False}


def test_one_seed_claims_no_interval(tmp_path):
    """Neither in numbers nor in words; the numbers are told all the same."""
    result = reproduce(ReproduceConfig(table=small(tmp_path), seeds=1, **QUICK))
    (check,) = result.checks["he: relu"]
    assert (check.n, check.explained, check.low, check.seed_low) == (1, None, None, None)
    assert "no interval" in result.sentences[0]
    run = mlflow.get_run(result.run.id)
    page = html.unescape(artifact(run, "report.html").read_text().replace("<wbr>", ""))
    assert "one seed cannot say" in page
    assert "12.34" in page


def test_a_row_whose_seeds_all_diverge_leaves_the_rest(tmp_path):
    """It is counted and said, and the report of the others is whole."""
    exploding = [('"xavier"', '"normal:std=1e30"'), ('"tanh"', '"linear"')]
    table = small(tmp_path, rows=2, replacing=[*exploding, ("45 = 1.23", "15 = 1.23")])
    result = reproduce(ReproduceConfig(table=table, seeds=2, **QUICK), experiment="lost")
    lost = result.rows["xavier <b>"]
    assert (lost.n, lost.diverged, lost.mean) == (0, 2, None)
    assert result.rows["he: relu"].n == 2
    assert result.checks["xavier <b>"] == []
    runs = runs_of("lost")
    assert [run.info.status for run in runs] == ["FINISHED"] * 5
    outcomes = sorted(run.data.tags.get("initflow.outcome", "") for run in runs)
    assert outcomes == ["", "diverged", "diverged", "finished", "finished"]
    run = mlflow.get_run(result.run.id)
    found = json.loads(artifact(run, "reproduction.json").read_text(), parse_constant=pytest.fail)
    assert found["rows"][1]["accuracy_mean"] is None
    page = html.unescape(artifact(run, "report.html").read_text().replace("<wbr>", ""))
    assert "1.23" in page  # what was published is shown, ours or not
    assert "nothing published" not in page


def test_a_row_whose_signals_cannot_be_measured_leaves_the_rest(tmp_path):
    """Too large for numbers in every layer: there is no line by layer of it."""
    exploding = [('"xavier"', '"normal:std=1e30"'), ('"tanh"', '"relu"'), ('"24"', '"24x3"')]
    table = small(tmp_path, rows=2, replacing=exploding)
    result = reproduce(ReproduceConfig(table=table, seeds=2, **(QUICK | {"probe": 10})))
    assert dict(result.failed) == {}
    assert len(result.members) == 4


MODELS = """
title = "Models"
source = "A notebook."
notes = []

[settings]
dataset = "digits"
hidden = "8"
epochs = 1
eval_every = 15

[[rows]]
name = "mlp"
init = "he"
activation = "relu"

[[rows]]
name = "cnn"
model = "cnn"
init = "he"
activation = "relu"
published = { 15 = 50 }

[[rows]]
name = "lstm"
model = "lstm"
init = "he"
"""


def test_rows_of_several_models_are_told_apart(tmp_path):
    """Networks of one scheme and activation: each row has its own, as each is trained alone."""
    (tmp_path / "models.toml").write_text(MODELS)
    settings = {"table": str(tmp_path / "models.toml"), "seeds": 2, **QUICK}
    result = reproduce(ReproduceConfig(**settings), experiment="models")
    runs = [run for run in runs_of("models") if "mlflow.parentRunId" in run.data.tags]
    assert sorted(run.info.run_name for run in runs) == [
        f"he {kind} seed {seed}" for kind in ("cnn relu", "lstm", "mlp relu") for seed in (0, 1)
    ]
    by_model = {(run.data.params["model"], int(run.data.params["seed"])): run for run in runs}
    for row in result.table.rows:
        assert result.rows[row.name].n == 2
        for outcome in result.by_row[row.name]:
            run = by_model[row.model, outcome.seed]
            assert outcome.accuracy == run.data.metrics["accuracy/test"]
    alone = train.train(dataset="digits", model="cnn", hidden="8", epochs=1, init="he", **QUICK)
    assert result.by_row["cnn"][0].accuracy == alone.last("accuracy/test")
    page = html.unescape(artifact(mlflow.get_run(result.run.id), "report.html").read_text())
    for scheme in ("he mlp relu", "he cnn relu", "he lstm"):
        assert scheme in page.replace("<wbr>", "")
    found = json.loads(artifact(mlflow.get_run(result.run.id), "reproduction.json").read_text())
    assert [row["model"] for row in found["rows"]] == ["mlp", "cnn", "lstm"]


@pytest.mark.parametrize(
    ("replacing", "message"),
    [
        ([('"he"', '"hee"')], "not 'hee' (did you mean 'he'?)"),
        ([('"he"', '"normal:std=x"')], "normal:std must be a finite number, not 'x'"),
        (
            [('"he"', '"normal:std=1"'), ('"xavier"', '"normal:std=1.0"'), ('"tanh"', '"relu"')],
            "normal:std=1.0",
        ),
        ([('"digits"', '"digit"')], "not 'digit' (did you mean 'digits'?)"),
        ([("eval_every", "eval")], "'eval'"),
        ([("12.34", "1234")], "1234"),
    ],
    ids=str,
)
def test_a_wrong_table_makes_no_run(tmp_path, replacing, message):
    """One error that names the file and the value, before anything is written."""
    table = small(tmp_path, replacing=replacing, rows=2)
    with pytest.raises(SettingError) as error:
        reproduce(ReproduceConfig(table=table, seeds=2, **QUICK), experiment=tmp_path.name)
    assert message in str(error.value)
    assert table in str(error.value)
    assert "\n" not in str(error.value)
    assert mlflow.get_experiment_by_name(tmp_path.name) is None


def test_an_interrupted_reproduction_is_closed_as_killed(tmp_path):
    """The parent and what was cut off; what was trained before stays."""

    def interrupt(what, done, of):
        if "2 of 4 networks done" in what and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce(
            ReproduceConfig(table=small(tmp_path, rows=2), seeds=2, stack=2, **QUICK),
            progress=interrupt,
            experiment="cut off",
        )
    runs = runs_of("cut off")
    assert sorted(run.info.status for run in runs) == ["FINISHED"] * 2 + ["KILLED"] * 3
    assert mlflow.active_run() is None

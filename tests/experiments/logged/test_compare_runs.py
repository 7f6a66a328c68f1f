"""Runs in MLflow compared over a parameter: those of `compare`, and others."""

import itertools
from dataclasses import astuple

import mlflow
import numpy as np
import pytest
from mlflow.entities import Metric, Param, RunTag
from scipy import stats

import initflow as inf
from initflow.errors import SettingError

NUMBERS = itertools.count()
# Final values by learning rate, as independent runs have them.
LOSSES = {"0.1": [0.31, 0.35, 0.33, 0.30], "0.01": [0.52, 0.47, 0.55], "1": [0.9, 0.91]}


def logged(where, values, *, status="FINISHED", metric="val_loss", tags=(), **params):
    """The id of a run of MLflow's own with the ``values`` of a metric over steps."""
    client = mlflow.MlflowClient()
    run = client.create_run(where).info.run_id
    metrics = [Metric(metric, value, 0, step) for step, value in enumerate(values)]
    client.log_batch(
        run,
        metrics,
        [Param(key, str(value)) for key, value in params.items()],
        [RunTag(key, str(value)) for key, value in dict(tags).items()],
    )
    client.set_terminated(run, status)
    return run


@pytest.fixture
def experiment(tracked):
    """The name and the id of a new one."""
    name = f"plain {next(NUMBERS)}"
    return name, mlflow.create_experiment(name)


def by_rate(where, **own):
    return {
        lr: [logged(where, [1.0, value], lr=lr, **own) for value in values]
        for lr, values in LOSSES.items()
    }


def test_it_says_what_compare_says(tracked):
    """Of the run of a comparison, the very rows and differences."""
    compared = inf.compare(
        inits=["he", "normal:std=0.5"],
        activations=["relu", "tanh"],
        seeds=3,
        dataset="digits",
        hidden="16",
        epochs=1,
        eval_every=5,
        probe=0,
        threads=1,
        log_model=False,
        progress=False,
    )
    for selection in (compared, compared.run_id, compared.ids):
        read = inf.compare_runs(selection, by="init", within="activation")
        assert {row.cell: row for row in read.rows} == {row.cell: row for row in compared.rows}
        found = {
            frozenset([one.better, one.worse, one.activation]): one for one in read.differences
        }
        for pair in compared.differences:
            of_runs = found.pop(frozenset([pair.better, pair.worse, pair.activation]))
            ours, theirs = (astuple(one)[3:] for one in (of_runs, pair))
            assert ours == pytest.approx(theirs, rel=1e-12)
        assert not found
        assert sorted(read.conclusions) == sorted(compared.conclusions)
        assert read.problems() == []
    table = read.runs_to_pandas()
    assert set(table["run_id"]) == set(compared.ids)
    assert set(table["seed"]) == {"0", "1", "2"}


def test_independent_runs_are_welchs(experiment):
    """Each statistic against scipy's; of a loss less is better."""
    name, where = experiment
    by_rate(where)
    read = inf.compare_runs(experiment=name, by="lr", metric="val_loss")
    assert [row.cell.init for row in read.rows] == ["lr=0.01", "lr=0.1", "lr=1"]
    for row, lr in zip(read.rows, ["0.01", "0.1", "1"], strict=True):
        values = LOSSES[lr]
        assert (row.n, row.mean) == (len(values), pytest.approx(np.mean(values)))
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (row.low, row.high) == pytest.approx(tuple(interval))
    for pair in read.differences:
        better, worse = (LOSSES[one.removeprefix("lr=")] for one in (pair.better, pair.worse))
        theirs = stats.ttest_ind(worse, better, equal_var=False)
        assert pair.p == pytest.approx(theirs.pvalue)
        assert (pair.low, pair.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    corrected = [pair.p_holm for pair in read.differences]
    ps = [pair.p for pair in read.differences]
    steps = np.maximum.accumulate(np.sort(ps) * np.arange(len(ps), 0, -1))
    assert sorted(corrected) == pytest.approx(steps)
    assert read.conclusions[0].startswith("lr=0.1 beats lr=1 by 0.58")
    assert read.to_pandas()["n"].tolist() == [3, 4, 2]


def test_groups_of_the_same_seeds_are_paired(experiment):
    """Under any name; a seed that failed is still one of both, and is left out of the means."""
    _, where = experiment
    a, b = [0.31, 0.42, 0.55], [0.29, 0.41, 0.50]
    runs = [
        logged(where, [value], optimizer=name, random_state=seed)
        for name, values in (("sgd", a), ("adam", b))
        for seed, value in enumerate(values)
    ]
    runs += [logged(where, [0.1], optimizer="sgd", random_state=3)]
    runs += [logged(where, [9.0], optimizer="adam", random_state=3, status="FAILED")]
    given = {"by": "optimizer", "metric": "val_loss", "seed": "random_state"}
    (pair,) = inf.compare_runs(runs, **given).differences
    theirs = stats.ttest_rel(a, b)
    assert (pair.better, pair.n) == ("adam", 3)
    assert pair.p == pytest.approx(theirs.pvalue)
    assert (pair.low, pair.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert inf.compare_runs(runs, **given).problems() == ["Left out: 1 run (failed)."]
    more = [*runs, logged(where, [0.3], optimizer="sgd", random_state=4)]  # no longer the same
    (pair,) = inf.compare_runs(more, **given).differences
    assert pair.p == pytest.approx(stats.ttest_ind([*a, 0.1, 0.3], b, equal_var=False).pvalue)


def test_what_diverged_is_counted(experiment):
    """No finite end, or the tag; its steps until there are kept."""
    name, where = experiment
    logged(where, [1.0, 0.5], lr=0.1)
    logged(where, [1.0, float("inf")], lr=0.1)
    logged(where, [1.0, float("nan")], lr=1)
    logged(where, [2.0, 3.0], lr=1, tags={"initflow.diverged_at_step": 7})
    read = inf.compare_runs(experiment=name, by="lr", metric="val_loss")
    assert [(row.n, row.diverged) for row in read.rows] == [(1, 1), (0, 2)]
    assert [of.diverged_at for of in read.outcomes()[read.rows[1].cell]] == [1, 7]
    assert "diverged with" in read.conclusions[0]
    assert set(read.figures()) == {"values", "curves"}


def test_what_should_be_known_first_is_told(experiment):
    """Runs that do not count, other parameters, and values without any spread."""
    name, where = experiment
    for lr, values in {"0.1": [0.5, 0.5], "1e-2": [0.7, 0.7]}.items():
        for at, value in enumerate(values):
            logged(where, [value], lr=lr, batch=at, depth=3)
    logged(where, [0.1], batch=0, depth=3)
    logged(where, [0.1], metric="other", lr=0.1, depth=3)
    logged(where, [0.1], lr=0.1, depth=3, status="KILLED")
    read = inf.compare_runs(experiment=name, by="lr", metric="val_loss")
    assert read.problems() == [
        "Left out: 1 run (no 'lr').",
        "Left out: 1 run (no 'val_loss').",
        "Left out: 1 run (killed).",
        "The runs differ in other parameters, too: batch.",
        "All 2 runs of lr=0.01 came to the same value: that says nothing of how much runs differ.",
        "All 2 runs of lr=0.1 came to the same value: that says nothing of how much runs differ.",
        (
            "lr=0.1 and lr=0.01 differ by the same in all 4 runs: an interval without a width is "
            "no proof."
        ),
    ]
    assert "Left out: 1 run (killed)." in read._repr_html_()


def test_runs_are_meant_in_many_ways(experiment):
    """As MLflow gives them, by a search, by tags, in another store."""
    name, where = experiment
    ids = by_rate(where, tags={"team": "a", "initflow.kind": "x"})
    everything = [one for some in ids.values() for one in some]
    given = {"by": "lr", "metric": "val_loss"}
    whole = inf.compare_runs(everything, **given).rows
    for selection in (
        [mlflow.get_run(one) for one in everything],
        mlflow.search_runs([where]),
        mlflow.search_runs([where])["run_id"],
    ):
        found = inf.compare_runs(selection, **given).to_pandas()
        assert found["mean"].tolist() == pytest.approx([row.mean for row in whole])
    some = inf.compare_runs(experiment=name, filter="params.lr != '1'", **given)
    assert [row.cell.init for row in some.rows] == ["lr=0.01", "lr=0.1"]
    assert inf.compare_runs(everything, by="team", metric="val_loss").rows[0].n == 9
    assert inf.compare_runs(everything, by="kind", metric="val_loss").rows[0].cell.init == "x"
    here = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("sqlite:///nowhere.db")
    try:
        assert inf.compare_runs(everything, tracking_uri=here, **given).rows == whole
    finally:
        mlflow.set_tracking_uri(here)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"by": "lrr"}, r"^by must be one of lr, not 'lrr' \(did you mean 'lr'\?\)$"),
        ({"within": "deep"}, "^within must be one of lr, not 'deep'"),
        ({"within": "lr"}, "^within must be another parameter than by, not 'lr'$"),
        ({"metric": "loss"}, "^metric must be one of val_loss, not 'loss'"),
        ({"by": 3}, "^by must be a name, not 3$"),
        (
            {"selection": "a" * 32},
            f"^a run must be one in MLflow at .*, which has no '{'a' * 32}'$",
        ),
        ({"selection": [7]}, "^a run must be an id, a result or a run of MLflow's, not 7$"),
        ({"selection": []}, "^selection must have a run, but is empty$"),
        ({"selection": 3}, "^selection must be runs or their ids, not 3$"),
        ({"selection": None}, "^selection or experiment must be given, one of both$"),
        ({"filter": "x"}, "^filter must be given with an experiment, not with a selection$"),
        ({"selection": None, "experiment": "gone"}, "which has no 'gone'$"),
    ],
)
def test_what_is_not_there_is_told(experiment, given, said):
    """In one line, with what would be right."""
    run = logged(experiment[1], [0.3], lr=0.1)
    arguments = {"selection": [run], "by": "lr", "metric": "val_loss"} | given
    with pytest.raises(SettingError, match=said) as caught:
        inf.compare_runs(**arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingError, match=f"a run with runs below it, not '{run}'"):
        inf.compare_runs(run, by="lr", metric="val_loss")


def test_a_parameter_that_is_the_group_in_other_words_is_not_told(experiment):
    """As init is the scheme of a run of ours; one that is so in some runs alone is told."""
    name, where = experiment
    for scheme in ("he", "zero"):
        logged(where, [0.5], scheme=scheme, init=scheme, other="he")
    assert inf.compare_runs(experiment=name, by="scheme", metric="val_loss").problems() == []
    logged(where, [0.5], scheme="he", init="he:mode=fan_out", other="he")
    (told,) = inf.compare_runs(experiment=name, by="scheme", metric="val_loss").problems()[:1]
    assert told == "The runs differ in other parameters, too: init."

"""A comparison: what its run says of the networks' runs below it, and what it does not start."""

import base64
import csv
import io
import json
import math
import statistics
import zlib
from pathlib import Path

import mlflow
import numpy as np
import pytest
from scipy import stats

import initflow
from initflow.core import machine, workers
from initflow.core.configurations import CompareConfig, TrainConfig
from initflow.diagnostics import record
from initflow.errors import InitflowError, PluginError, SettingError
from initflow.experiments.comparisons import compare
from initflow.experiments.populations import arrangement
from initflow.initializers.plugins import find
from initflow.reporting.seed_statistics import Cell
from initflow.tracking import mlflow_page
from initflow.training import datasets, propagation

QUICK = {
    "dataset": "digits",
    "hidden": "16",
    "epochs": 1,
    "eval_every": 5,
    "probe": 0,
    "threads": 1,
    "log_model": False,
}
SEEDS = (2, 3, 4)
CELLS = [
    Cell(init, activation)
    for activation in ("relu", "tanh")
    for init in ("he", "xavier:gain=1.5", "normal:std=0.5")
]


def run_comparison(name, **own):
    """What came of it, its run, and those below by name."""
    told = []
    result = compare.compare(
        CompareConfig(**(QUICK | own)),
        experiment=name,
        progress=lambda *what: told.append(what),
    )
    runs = mlflow.search_runs(experiment_names=[name], output_format="list")
    parent = mlflow.get_run(result.run.id)
    nested = [run for run in runs if run.info.run_id != parent.info.run_id]
    return result, parent, {run.info.run_name: run for run in nested}, told


@pytest.fixture(scope="module")
def compared(tracked):
    """Three schemes with two activations under three seeds."""
    return run_comparison(
        "whole",
        inits=",".join(dict.fromkeys(cell.init for cell in CELLS)),
        activations="relu,tanh",
        seeds=3,
        seed=2,
        hidden="64,32",
        normalize="standard",
        probe=50,
        epochs=2,
    )


def history(run, key):
    points = mlflow.MlflowClient().get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in points)


def text(run, file):
    return mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/{file}")


def description(run):
    return run.data.tags["mlflow.note.content"]


def curves(nested, cell, seeds=SEEDS):
    """The test accuracy of each seed of a cell, as its run has it."""
    return [
        history(nested[f"{cell.init} {cell.activation} seed {seed}"], "accuracy/test")
        for seed in seeds
    ]


def spelled(cell):
    """As a metric's key has it."""
    return str(cell).replace("=", "_")


def test_every_scheme_meets_every_activation_under_every_seed(compared):
    """One run each, below one; none of the same name, all finished."""
    result, parent, nested, told = compared
    assert set(nested) == {
        f"{cell.init} {cell.activation} seed {seed}" for cell in CELLS for seed in SEEDS
    }
    for run in nested.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.experiment_id == parent.info.experiment_id
        assert run.info.status == "FINISHED"
        assert run.data.tags["initflow.bit_identical_to_alone"] == "true"
    assert parent.info.status == "FINISHED"
    assert "mlflow.parentRunId" not in parent.data.tags
    assert mlflow.get_experiment(parent.info.experiment_id).name == "whole"
    assert result.failed == {}
    assert len(result.members) == len(nested) == 18
    assert {what for what, _, _ in told} > {"comparing, drawing and logging"}
    assert any("0 of 18 networks done" in what for what, _, _ in told)
    assert mlflow.active_run() is None


def test_the_run_carries_its_settings_and_the_data(compared):
    """As text that gives the configuration back."""
    result, parent, nested, _ = compared
    params = {k: v for k, v in parent.data.params.items() if not k.startswith("resolved.")}
    assert CompareConfig(**params) == result.config
    assert parent.data.params["resolved.threads"] == "1"
    assert parent.data.params["resolved.device"] == "cpu"
    assert json.loads(text(parent, "config.json")) == parent.data.params
    assert parent.data.tags["initflow.version"] == initflow.__version__
    one = nested["he relu seed 3"]
    (ours,), (theirs,) = parent.inputs.dataset_inputs, one.inputs.dataset_inputs
    assert ours.dataset.digest == theirs.dataset.digest
    own = {k: v for k, v in one.data.params.items() if not k.startswith("resolved.")}
    assert TrainConfig(**own) == result.config.network("he", "relu", 3)


def test_its_metrics_are_the_means_over_the_seeds(compared):
    """Of the accuracy by iteration, of the untrained signal and gradient by layer."""
    _, parent, nested, _ = compared
    sections = {
        "signal_by_layer": "preactivation_variance",
        "relative_gradient_by_layer": "gradient_variance",
    }
    assert set(parent.data.metrics) == {
        f"{section}/{spelled(cell)}"
        for section in ("accuracy_by_iteration", *sections)
        for cell in CELLS
    }
    for cell in CELLS:
        found = history(parent, f"accuracy_by_iteration/{spelled(cell)}")
        of_seeds = np.array(curves(nested, cell))
        assert [step for step, _ in found] == [0, 5, 10, 15, 20, 25, 30]
        np.testing.assert_allclose(found, of_seeds.mean(axis=0), rtol=1e-12)
        for section, quantity in sections.items():
            layers = history(parent, f"{section}/{spelled(cell)}")
            assert [layer for layer, _ in layers] == [1, 2, 3]
            for layer, mean in layers:
                of_seeds = [nested[f"{cell.init} {cell.activation} seed {seed}"] for seed in SEEDS]
                untrained = [history(run, f"{quantity}/fc{layer}")[0] for run in of_seeds]
                assert {step for step, _ in untrained} == {0}
                values = [value for _, value in untrained]
                if quantity == "gradient_variance":
                    last = [history(run, f"{quantity}/fc3")[0][1] for run in of_seeds]
                    values = [value / at_last for value, at_last in zip(values, last, strict=True)]
                assert mean == pytest.approx(statistics.fmean(values), rel=1e-12)


def test_the_table_is_that_of_the_runs_below(compared):
    """Mean, deviation, t-interval and the median iteration, computed again from their metrics."""
    result, parent, nested, _ = compared
    table = json.loads(text(parent, "comparison.json"), parse_constant=pytest.fail)
    assert [(row["init"], row["activation"]) for row in table["rows"]] == CELLS
    for row, cell in zip(table["rows"], CELLS, strict=True):
        of_seeds = curves(nested, cell)
        final = np.array([curve[-1][1] for curve in of_seeds])
        low, high = stats.t.interval(0.95, 2, final.mean(), stats.sem(final))
        assert (row["n"], row["diverged"]) == (3, 0)
        found = [row[f"accuracy_{what}"] for what in ("mean", "std", "low", "high")]
        assert found == pytest.approx([final.mean(), final.std(ddof=1), low, high], rel=1e-9)
        for percent in (90, 95):
            firsts = [
                next((step for step, accuracy in curve if accuracy >= percent / 100), math.inf)
                for curve in of_seeds
            ]
            median = sorted(firsts)[1]
            expected = None if math.isinf(median) else median
            assert row[f"iterations_to_{percent}"] == expected
    assert any(row["iterations_to_90"] for row in table["rows"])
    lines = list(csv.DictReader(io.StringIO(text(parent, "comparison.csv"))))
    assert lines == [
        {key: "" if value is None else str(value) for key, value in row.items()}
        for row in table["rows"]
    ]
    assert table["sentences"] == list(result.sentences)
    assert table["failed"] == {}


def test_the_differences_are_paired_by_seed(compared):
    """A paired t-test, corrected for all pairs of the comparison by Holm's method."""
    _, parent, nested, _ = compared
    table = json.loads(text(parent, "comparison.json"))
    assert len(table["differences"]) == 6
    p_values = []
    for pair in table["differences"]:
        better, worse = (
            [curve[-1][1] for curve in curves(nested, Cell(pair[which], pair["activation"]))]
            for which in ("better", "worse")
        )
        expected = stats.ttest_rel(better, worse)
        interval = expected.confidence_interval(0.95)
        effect = np.mean(better) - np.mean(worse)
        assert pair["n"] == 3
        assert pair["effect"] == pytest.approx(effect, abs=1e-9)
        assert effect >= 0
        assert pair["p"] == pytest.approx(expected.pvalue, rel=1e-6)
        assert [pair["low"], pair["high"]] == pytest.approx([*interval], abs=1e-9)
        p_values.append(expected.pvalue)
    floor = 0.0
    for rank, at in enumerate(np.argsort(p_values)):
        floor = max(floor, min(1.0, (6 - rank) * p_values[at]))
        assert table["differences"][at]["p_holm"] == pytest.approx(floor, rel=1e-6)
        assert table["differences"][at]["significant"] == (floor <= 0.05)


def test_its_files_are_whole(compared):
    """Three pictures, the table twice, and a page that needs nothing else."""
    result, parent, _, _ = compared
    files = {f.path for f in mlflow.MlflowClient().list_artifacts(parent.info.run_id)}
    pictures = {"accuracies.png", "learning_curves.png", "signals_by_layer.png"}
    tables = {"comparison.csv", "comparison.json", "config.json"}
    assert files == pictures | tables | {"report.html"}
    page = text(parent, "report.html")
    for name in pictures:
        file = mlflow.artifacts.download_artifacts(f"runs:/{parent.info.run_id}/{name}")
        content = Path(file).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert base64.b64encode(content).decode() in page
    assert page.lower().startswith("<!doctype html>")
    for row in result.rows:
        assert f"{100 * row.mean:.2f}" in page
        assert row.cell.init in page
    assert "initflow compare --inits" in page
    assert parent.info.run_id in page


def test_its_description_begins_with_the_links(compared):
    """Then come the sentences, then what was trained."""
    result, parent, nested, _ = compared
    links, *paragraphs = description(parent).split("\n\n")
    ids = [member.run_id for member in result.members]
    assert links == mlflow_page.links(parent.info.experiment_id, parent.info.run_id, ids)
    assert set(ids) == {run.info.run_id for run in nested.values()}
    assert paragraphs[:-1] == list(result.sentences)
    assert len(result.sentences) == 2
    assert paragraphs[-1] == (
        "18 64-64-32-10 networks on digits: he, xavier:gain=1.5, normal:std=0.5 with relu, tanh, "
        "3 seeds, 2 epochs."
    )


def test_the_experiment_has_a_saved_view_of_it(compared):
    """Which shows the runs below it alone, by their group."""
    _, parent, nested, _ = compared
    tags = mlflow.get_experiment(parent.info.experiment_id).tags
    view = json.loads(tags[f"mlflow.sharedViewState.{parent.info.run_id}"])
    packed = base64.b64decode(view["state"].removeprefix("deflate;"))
    state = json.loads(zlib.decompress(packed))
    assert state["searchFilter"] == f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    groups = [f"{cell.init}, {cell.activation}" for cell in CELLS]
    tag = mlflow_page.group_tag(groups)
    assert state["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": tag}]
    shown = {chart["metricKey"] for chart in state["compareRunCharts"]}
    assert shown == {
        "accuracy/test",
        "loss/test",
        "by_layer/preactivation_variance",
        "by_layer/relative_gradient_variance",
    }
    for run in nested.values():
        assert shown <= set(run.data.metrics)
        group = f"{run.data.params['init']}, {run.data.params['activation']}"
        assert run.data.tags[tag] == group
        assert run.data.tags["mlflow.runColor"] == mlflow_page.colour(tag, group)
    assert {run.data.tags[tag] for run in nested.values()} == set(groups)


def test_one_network_is_a_comparison_too(tracked):
    """Without signals there is no picture of them, and without others no difference."""
    result, parent, nested, _ = run_comparison("one", inits="he", activations="relu", seeds=1)
    files = {f.path for f in mlflow.MlflowClient().list_artifacts(parent.info.run_id)}
    assert "signals_by_layer.png" not in files
    assert set(nested) == {"he relu seed 0"}
    assert set(parent.data.metrics) == {"accuracy_by_iteration/he relu"}
    assert result.differences == []
    assert "reaches" in description(parent)
    assert not any(key.startswith("by_layer") for key in nested["he relu seed 0"].data.metrics)


# What diverges, fails, or is not as it should be.

SCHEMES = """
def fails(weight, generator):
    weight.normal_(0, 0.1, generator=generator)
    if weight.shape[1] == 64 and weight[0, 0] > 0:
        raise RuntimeError("the first weight is positive")


def explodes(weight, generator):
    weight.normal_(0, 0.1, generator=generator)
    if weight.shape[1] == 64 and weight[0, 0] > 0:
        weight.mul_(1e20)
"""


def fails_under(scheme, seed, splits):
    try:
        record.start(TrainConfig(**QUICK, seed=seed), scheme, splits)
    except InitflowError:
        return True
    return False


@pytest.fixture(scope="module")
def schemes(tmp_path_factory):
    """Where the two are, and the first seed that is well while the next is not."""
    file = tmp_path_factory.mktemp("schemes") / "odd.py"
    file.write_text(SCHEMES)
    splits, scheme = datasets.load(TrainConfig(**QUICK)), find(f"{file}:fails")
    failing = [fails_under(scheme, seed, splits) for seed in range(60)]
    pairs = zip(failing, failing[1:], failing[2:], strict=False)
    first = [*pairs].index((False, True, False))
    return file, first, failing.index(True)


@pytest.fixture(scope="module")
def damaged(tracked, schemes):
    """One scheme fails under the second seed, one diverges under it, one is whole."""
    file, first, _ = schemes
    inits = f"he,{file}:fails,{file}:explodes"
    found = run_comparison("damaged", inits=inits, activations="linear", seeds=3, seed=first)
    return *found[:3], file, first


def test_a_scheme_that_fails_later_is_told_of_everywhere(damaged):
    """In the table, in the description and on the page; the comparison is finished."""
    result, parent, nested, file, first = damaged
    failing = f"{find(f'{file}:fails').spec} linear seed {first + 1}"
    assert set(result.failed) == {failing}
    reason = result.failed[failing]
    assert "the first weight is positive" in reason
    assert parent.info.status == "FINISHED"
    assert {name for name, run in nested.items() if run.info.status != "FINISHED"} == {failing}
    assert nested[failing].info.status == "FAILED"
    assert len(nested) == 9
    assert f"{failing} failed: {reason}" in description(parent)
    table = json.loads(text(parent, "comparison.json"))
    assert table["failed"] == {failing: reason}
    page = text(parent, "report.html")
    assert "the first weight is positive" in page
    assert [row["n"] for row in table["rows"]] == [3, 2, 2]
    pairs = {(pair["better"], pair["worse"]): pair["n"] for pair in table["differences"]}
    assert set(pairs.values()) == {2}


def test_one_that_diverges_under_a_seed_is_counted(damaged):
    """Its mean is of the others, and so is the parent's curve."""
    _, parent, nested, file, first = damaged
    spec = find(f"{file}:explodes").spec
    run = nested[f"{spec} linear seed {first + 1}"]
    assert run.data.tags["initflow.outcome"] == "diverged"
    assert run.info.status == "FINISHED"
    table = json.loads(text(parent, "comparison.json"))
    row = table["rows"][2]
    assert (row["init"], row["n"], row["diverged"]) == (spec, 2, 1)
    of_seeds = np.array(curves(nested, Cell(spec, "linear"), (first, first + 2)))
    assert row["accuracy_mean"] == pytest.approx(of_seeds[:, -1, 1].mean())
    key = next(k for k in parent.data.metrics if k.startswith("acc") and "explodes" in k)
    np.testing.assert_allclose(history(parent, key), of_seeds.mean(axis=0), rtol=1e-12)
    assert "diverged with 1 of 3 seeds" in description(parent)
    assert [row["diverged"] for row in table["rows"]] == [0, 0, 1]


@pytest.mark.parametrize("own", [{"probe": 0}, {"probe": 50}, {"init": "zero"}], ids=str)
def test_a_scheme_that_always_diverges_is_a_row_too(tracked, own):
    """Beside others, or where no training finishes."""
    init = own.get("init", "normal:std=1e30")
    other = {"lr": 1e30, "inits": init} if "init" in own else {"inits": f"he,{init}"}
    name = f"diverged {own}"
    result, parent, nested, _ = run_comparison(
        name,
        **(other | {"activations": "linear", "seeds": 2, "probe": own.get("probe", 0)}),
    )
    assert result.failed == {}
    assert {run.info.status for run in (parent, *nested.values())} == {"FINISHED"}
    table = json.loads(text(parent, "comparison.json"))
    assert (table["rows"][-1]["n"], table["rows"][-1]["diverged"]) == (0, 2)
    assert "diverged with both seeds" in description(parent) or "init" in own


def test_a_scheme_that_fails_at_the_first_seed_makes_no_run(tracked, schemes):
    """It is an error before anything is trained."""
    file, _, failing = schemes
    with pytest.raises(PluginError, match="the first weight is positive"):
        run_comparison("none", inits=f"he,{file}:fails", activations="relu", seed=failing)
    assert mlflow.search_experiments(filter_string="name = 'none'") == []


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"inits": "he,xaver"}, r"not 'xaver' \(did you mean 'xavier'\?\)"),
        ({"inits": "he,xavier,he:mode=fan_in"}, "schemes that differ"),
        ({"inits": "xavier,normal:std=1,normal:std=1.0"}, "schemes that differ"),
        ({"inits": "he,he"}, "none twice"),
        ({"inits": "he:mode=x"}, "mode"),
        ({"inits": ""}, "inits must be"),
        ({"activations": "relu,thanh"}, "activations must be .* not 'relu,thanh'"),
        ({"seeds": 0}, "seeds must be a whole number, at least 1 .* not '0'"),
        ({"seeds": "abc"}, "seeds must be .* not 'abc'"),
        ({"stack": 0}, "stack must be 'auto' or a whole number, at least 1 .* not '0'"),
        ({"stack": "many"}, "stack must be 'auto' or"),
        ({"validation": 1_430}, "validation"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"run_figures": "perhaps"}, "run_figures must be true or false"),
    ],
    ids=lambda own: str(own) if isinstance(own, dict) else "",
)
def test_wrong_settings_make_no_run(tracked, own, message):
    """One error that names the value, before anything is written."""
    with pytest.raises(SettingError, match=message):
        run_comparison(f"none {own}", **own)
    assert f"none {own}" not in {experiment.name for experiment in mlflow.search_experiments()}


def test_where_stacks_round_differently_that_is_said(tracked, monkeypatch):
    """By the tag of each network's run, in the description and on the page."""
    off = propagation._Operation(
        propagation._linear.each,
        lambda biases, x, weights, out: out.copy_(
            (biases.unsqueeze(1) + x.expand(len(out), -1, -1) @ weights.mT) * (1 + 2**-20)
        ),
    )
    monkeypatch.setattr(propagation, "_linear", off)
    monkeypatch.setattr(propagation._Operation, "_is_exact", lambda *_: True)
    result, parent, nested, _ = run_comparison("off", inits="he,lecun", activations="relu", seeds=1)
    assert not any(member.is_exact for member in result.members)
    tags = {run.data.tags["initflow.bit_identical_to_alone"] for run in nested.values()}
    assert tags == {"false"}
    for told in (description(parent), text(parent, "report.html")):
        assert "not bit-identical to each one alone" in told


def test_where_they_do_not_nothing_is_said(compared):
    """Neither of that nor of anything else."""
    _, parent, _, _ = compared
    for told in (description(parent), text(parent, "report.html")):
        assert "bit-identical" not in told
        assert "failed" not in told


@pytest.mark.end_to_end
def test_workers_that_were_chosen_give_the_same_table(tracked, monkeypatch):
    """Of one thread each, as here; which the run and its last lines say."""
    monkeypatch.setattr(arrangement, "START_S", 0.0)
    monkeypatch.setattr(arrangement, "cores", lambda: 2)
    grid = {"inits": "he,xavier", "activations": "relu", "seeds": 2, "stack": 2, "threads": None}
    with workers.startable():
        chosen, parent, nested, _ = run_comparison("chosen", **grid)
    assert parent.data.params["resolved.workers"] == "2"
    assert parent.data.params["workers"] == "auto"
    assert {run.data.params["resolved.threads"] for run in nested.values()} == {"1"}
    assert "2 workers of 1 thread each (workers and threads: auto)" in " ".join(chosen.took())
    alone, parent, others, _ = run_comparison("here", **grid | {"workers": 1, "threads": 1})
    assert parent.data.params["resolved.workers"] == "1"
    assert "this process, with 1 thread." in " ".join(alone.took())
    assert chosen.rows == alone.rows
    hashes = "initflow.weights_sha256"
    assert len(nested) == 4
    assert {name: run.data.tags[hashes] for name, run in nested.items()} == {
        name: run.data.tags[hashes] for name, run in others.items()
    }
    network = next(iter(nested.values()))
    assert initflow.verify(network.info.run_id).verdict == "identical"


def test_threads_are_those_that_are_asked_for_and_put_back(tracked, monkeypatch):
    """While the networks are drawn, too: an orthogonal matrix depends on them."""
    from initflow.experiments.populations import stacking

    seen, real = [], stacking.start

    def start(*args):
        seen.append(machine.torch.get_num_threads())
        return real(*args)

    monkeypatch.setattr(stacking, "start", start)
    before = machine.torch.get_num_threads()
    _, parent, nested, _ = run_comparison(
        "threads", inits="orthogonal", activations="tanh", seeds=1, threads=3, hidden="4"
    )
    assert set(seen) == {3}
    assert parent.data.params["resolved.threads"] == "3"
    (run,) = nested.values()
    assert run.data.params["resolved.threads"] == "3"
    assert machine.torch.get_num_threads() == before

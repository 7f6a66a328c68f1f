"""The addresses in MLflow's page and its saved view: their form, their size, their colours."""

import base64
import json
import zlib
from itertools import combinations
from urllib.parse import parse_qs

import numpy as np
import pytest

from initflow.tracking import mlflow_page
from initflow.tracking.mlflow_page import ChartSection

PARENT = "0123456789abcdef0123456789abcdef"
GROUPS = [f"{init} {act}" for act in ("tanh", "relu") for init in ("normal", "lecun", "he")]
SECTIONS = (
    ChartSection("accuracy", ("accuracy/test", "loss/test")),
    ChartSection(
        "by_layer", ("by_layer/signal_variance",), logarithmic=("by_layer/signal_variance",)
    ),
)
DRAWS = np.random.default_rng(0).random(1000)  # what cannot be compressed
METRICS = ("accuracy/test", "loss/test", "loss/train", "lr", "b/fc1", "b/fc2", "a/fc1")


def view(**other):
    """A saved view: its key, its value, and the state in it."""
    arguments = {
        "parent_id": PARENT,
        "name": "compare tanh,relu mnist",
        "group_tag": "initflow.group.1",
        "groups": GROUPS,
        "sections": SECTIONS,
        "metrics": METRICS,
        "runs": 60,
        "now_ms": 1_700_000_000_000,
    }
    key, text = mlflow_page.saved_view(**arguments | other)
    value = json.loads(text)
    method, _, packed = value["state"].partition(";")
    assert method == "deflate"
    return key, value, json.loads(zlib.decompress(base64.b64decode(packed, validate=True)))


def query(address):
    return {key: values[0] for key, values in parse_qs(address.partition("?")[2]).items()}


def test_addresses_open_the_mode_for_training():
    """Of the runs, of a view of them, of a run and of its charts."""
    mode = "workflowType=machine_learning"
    runs = f"#/experiments/7/runs?{mode}&compareRunsMode=CHART"
    assert mlflow_page.runs_address("7") == runs
    assert mlflow_page.runs_address("7", "abc") == f"{runs}&viewStateShareKey=abc"
    assert mlflow_page.run_address("7", "abc") == f"#/experiments/7/runs/abc?{mode}"
    charts = mlflow_page.run_address("7", "abc", charts=True)
    assert charts == f"#/experiments/7/runs/abc/model-metrics?{mode}"
    assert mlflow_page.run_address("7/8", "a?b") == f"#/experiments/7%2F8/runs/a%3Fb?{mode}"


def test_the_comparison_names_every_run():
    """In order, as JSON, in letters that stay one Markdown link."""
    ids = [f"{n:032x}" for n in range(50)]
    address = mlflow_page.comparison_address("7", ids)
    assert address.startswith("#/compare-runs?runs=%5B%22")
    assert json.loads(query(address)["runs"]) == ids
    assert json.loads(query(address)["experiments"]) == ["7"]
    assert not set(address) & set(' "()[]<>+')


@pytest.mark.parametrize(
    ("server", "page"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000/"),
        ("https://me:secret@host/mlflow/", "https://host/mlflow/"),
        ("http://[::1]:5000/?a=b", "http://[::1]:5000/"),
    ],
)
def test_an_absolute_address(server, page):
    """On the server, below its path, without a password."""
    address = mlflow_page.runs_address("7")
    assert mlflow_page.absolute(server, address) == f"{page}{address}"


def test_links_stand_in_one_line():
    """To the view, to the runs one by one, to the charts."""
    ids = [f"{n:032x}" for n in range(mlflow_page.LINKED)]
    line = mlflow_page.links("7", PARENT, ids)
    assert "\n" not in line
    assert f"]({mlflow_page.runs_address('7', PARENT)})" in line
    assert f"[run by run]({mlflow_page.comparison_address('7', ids)})" in line
    assert f"]({mlflow_page.run_address('7', PARENT, charts=True)})" in line
    assert len(line) < 5_000


def test_links_leave_out_more_runs_than_a_description_holds():
    """And keep the others."""
    ids = [f"{n:032x}" for n in range(mlflow_page.LINKED + 1)]
    line = mlflow_page.links("7", PARENT, ids)
    assert "compare-runs" not in line
    assert line.count("](#/") == 2


def test_the_view_shows_the_runs_below_one_parent_in_groups():
    """Best first, every group, and folded."""
    key, value, state = view()
    assert key == f"mlflow.sharedViewState.{PARENT}"
    assert value["name"] == "compare tanh,relu mnist"
    assert value["createdAt"] == value["updatedAt"] == 1_700_000_000_000
    assert state["searchFilter"] == f"tags.`mlflow.parentRunId` = '{PARENT}'"
    by = {"mode": "tag", "groupByData": "initflow.group.1"}
    assert state["groupBy"] == {"aggregateFunction": "average", "groupByKeys": [by]}
    assert state["runsHiddenMode"] == "SHOW_ALL"
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`accuracy/test`", False)
    assert state["groupsExpanded"] == {f"tag.initflow.group.1.{group}": False for group in GROUPS}


def test_the_view_has_its_own_sections_first():
    """Each metric in one chart; what else was logged is folded below, by the page's names."""
    _, _, state = view()
    shown = [(s["name"], s["display"]) for s in state["compareRunSections"]]
    own, rest = [("accuracy", True), ("by_layer", True)], ["Model metrics", "a", "b", "loss"]
    assert shown == own + [(name, False) for name in rest]
    section = {s["uuid"]: s["name"] for s in state["compareRunSections"]}
    charts = [
        (section[c["metricSectionId"]], c["metricKey"], c["scaleType"])
        for c in state["compareRunCharts"]
    ]
    assert charts == [
        ("accuracy", "accuracy/test", "linear"),
        ("accuracy", "loss/test", "linear"),
        ("by_layer", "by_layer/signal_variance", "log"),
    ]


def test_of_more_runs_than_are_loaded_the_view_is_fair():
    """The page would load the best; by seed it loads some of each group."""
    _, _, state = view(runs=mlflow_page.LOADED + 1)
    assert (state["orderByKey"], state["orderByAsc"]) == ("params.`seed`", True)


def test_the_view_is_deterministic():
    """The same arguments, in whatever order the metrics come."""
    assert view() == view(metrics=set(METRICS))


def test_a_quote_does_not_end_the_filter():
    """It is doubled, as the page itself does."""
    _, _, state = view(parent_id="it's")
    assert state["searchFilter"] == "tags.`mlflow.parentRunId` = 'it''s'"


@pytest.mark.parametrize(
    "more",
    [
        {"groups": [f"scheme{n} {DRAWS[n]}" for n in range(300)]},
        {"metrics": [f"{draw}/fc1" for draw in DRAWS]},
        {"name": "compare é" * 100},
    ],
    ids=["groups", "metrics", "name"],
)
def test_the_view_is_never_too_long(more):
    """What can be left out is; the groups and the first sections stay."""
    _, value, state = view(**more)
    assert len(json.dumps(value, ensure_ascii=False).encode()) <= mlflow_page.LONGEST
    assert state["groupBy"]
    assert [s["name"] for s in state["compareRunSections"]][:2] == ["accuracy", "by_layer"]


def test_colours_are_those_of_the_page():
    """As they were seen in it."""
    seen = {
        "xavier relu": "#04867d",
        "lecun relu": "#4299e0",
        "he relu": "#e65b77",
        "he tanh": "#115026",
    }
    assert {group: mlflow_page.colour("initflow.group.142", group) for group in seen} == seen


@pytest.mark.parametrize("activations", [("relu",), ("tanh", "relu")], ids=len)
@pytest.mark.parametrize(
    "inits",
    [
        ("he",),
        ("normal", "lecun", "xavier", "he"),
        ("normal:std=0.1", "normal:std=0.2", "normal:std=0.3", "normal:std=0.4"),
        ("uniform", "normal", "lecun", "xavier", "he", "orthogonal"),
    ],
    ids=" ".join,
)
def test_groups_get_colours_that_differ(inits, activations):
    """All of them, from each other and from the background."""
    cells = [(init, activation) for activation in activations for init in inits]
    groups = mlflow_page.group_names(cells)
    tag = mlflow_page.group_tag(groups)
    colours = [mlflow_page.colour(tag, group) for group in groups]
    assert tag.startswith(f"{mlflow_page.GROUP}.")
    assert all(one != other for one, other in combinations([*colours, "#ffffff"], 2))


def test_groups_are_named_by_what_differs():
    """The activation too where there are several."""
    assert mlflow_page.group_names([("he", "relu"), ("xavier", "relu")]) == ["he", "xavier"]
    cells = [("he", "relu"), ("he", "tanh")]
    assert mlflow_page.group_names(cells) == ["he, relu", "he, tanh"]


def test_more_groups_than_colours():
    """There is a tag all the same, and for none at all."""
    for count in (0, 2 * len(mlflow_page.PALETTE)):
        assert mlflow_page.group_tag([str(n) for n in range(count)]) == f"{mlflow_page.GROUP}.1"


def test_many_groups_have_as_many_colours_as_there_can_be():
    """More than the first tag gives them; and a sentence says how many it is."""
    groups = [f"normal:std={0.01 * 1.6**at:.4g}" for at in range(20)]

    def colours(tag):
        return len({mlflow_page.colour(tag, group) for group in groups})

    tags = [f"{mlflow_page.GROUP}.{n}" for n in range(1, mlflow_page.GROUPINGS + 1)]
    most = max(map(colours, tags))
    assert colours(mlflow_page.group_tag(groups)) == most > colours(tags[0])
    told = mlflow_page.limits(groups, 60)
    assert told.startswith(f"MLflow's page has {most} colours for these 20 groups;")
    assert "loads" not in told


@pytest.mark.parametrize(
    ("runs", "told"), [(100, ""), (2_000, "MLflow's page loads 100 of the 2,000 runs")]
)
def test_what_the_page_shows_of_few_groups(runs, told):
    """All of it, but for more runs than it loads."""
    said = mlflow_page.limits(GROUPS, runs)
    assert said.startswith(told)
    assert bool(said) == bool(told)

"""An interrupted command of many networks goes on where it stopped."""

from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from initflow.core.configurations import CompareConfig, ReproduceConfig
from initflow.experiments import populations, resuming
from initflow.experiments.comparisons.compare import compare
from initflow.experiments.comparisons.reproduce import reproduce
from initflow.training import cache
from tests.experiments.test_populations import configs, history, runs_of
from tests.experiments.test_reproduce import QUICK, small

SETTINGS = {"dataset": "digits", "threads": 1, "stack": 2}
NETWORKS = configs(("he",), lr=1e30, probe=50) + configs(("he", "xavier", "zero"), probe=50)


def train(name, asked=NETWORKS, *, settings=(), fail_at=None, command="compare", **options):
    """Train the networks; where ``fail_at`` stacks are trained, Ctrl-C is pressed."""

    def interrupt(what, done, of):
        stacks = what.partition(", ")[2].split(" of ")[0]
        if fail_at is not None and stacks.isdigit() and int(stacks) >= fail_at:
            raise KeyboardInterrupt

    with (
        cache.cleared_after(),
        populations.trained_population(
            CompareConfig(**SETTINGS | dict(settings)),
            asked,
            name="parent",
            summary="",
            experiment=name,
            progress=interrupt,
            resumable=command,
            **options,
        ) as population,
    ):
        return population


pytestmark = pytest.mark.usefixtures("tracked")


def all_runs(name):
    found = mlflow.search_runs(experiment_names=[name], output_format="list")
    return {run.info.run_id: run for run in found}


@pytest.fixture
def interrupted(request):
    """The name of an experiment in which two of four networks were trained."""
    with pytest.raises(KeyboardInterrupt):
        train(request.node.name, fail_at=2)
    return str(request.node.name)


def test_networks_that_are_there_are_not_trained_again(interrupted):
    """They are below the new run, with the same numbers as where nothing was interrupted."""
    kept = {
        run_id: (run.data.tags["initflow.weights_sha256"], history(run))
        for run_id, run in all_runs(interrupted).items()
        if run.info.status == "FINISHED"
    }
    assert len(kept) == 2
    again, whole = train(interrupted), train("whole")
    assert again.metrics == whole.metrics
    assert [member.config for member in again.members] == NETWORKS
    assert {member.run_id for member in again.members} > set(kept)
    for one, other in zip(again.members, whole.members, strict=True):
        assert one.config == other.config
        assert one.cell == other.cell
        assert one.last == other.last
        assert one.outcome == other.outcome
        assert one.signals.layers == other.signals.layers
        assert one.signals.nonfinite == other.signals.nonfinite
        assert one.is_exact == other.is_exact
    assert again.members[0].outcome.diverged_at is not None
    assert len(again.members[1].outcome.curve) > 1
    client = mlflow.MlflowClient()
    for member in again.members:
        run = client.get_run(member.run_id)
        assert run.data.tags["mlflow.parentRunId"] == again.run.id
        if member.run_id in kept:
            sha256, metrics = kept[member.run_id]
            assert run.data.tags["initflow.weights_sha256"] == sha256
            assert history(run) == metrics


@pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"measured": []}', b"\xff" * 9])
def test_a_network_whose_table_of_signals_is_damaged_is_trained_anew(interrupted, content):
    """And its run stays where it was."""
    finished = [run for run in all_runs(interrupted).values() if run.info.status == "FINISHED"]
    damaged, whole = finished
    file = Path(damaged.info.artifact_uri.removeprefix("file://"), "signals.json")
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    again = train(interrupted)
    assert [member.config for member in again.members] == NETWORKS
    taken = {member.run_id for member in again.members} & set(all_runs(interrupted))
    assert whole.info.run_id in taken
    assert damaged.info.run_id not in {member.run_id for member in again.members}
    left = mlflow.get_run(damaged.info.run_id).data.tags["mlflow.parentRunId"]
    assert left == damaged.data.tags["mlflow.parentRunId"] != again.run.id


@pytest.mark.parametrize(
    ("command", "made", "table"),
    [
        (
            compare,
            lambda _: CompareConfig(
                **SETTINGS, inits="he,zero,normal:std=9", activations="relu,tanh", seeds=2, epochs=1
            ),
            "comparison.json",
        ),
        (
            reproduce,
            lambda folder: ReproduceConfig(table=small(folder, rows=2), seeds=2, stack=2, **QUICK),
            "reproduction.json",
        ),
    ],
    ids=["compare", "reproduce"],
)
def test_an_interrupted_comparison_ends_as_if_nothing_had_happened(command, made, table, tmp_path):
    """The same table, curves and figures, and no network is trained twice."""

    def interrupt(what, done, of):
        if " networks done" in what and not what.partition(", ")[2].startswith("0 "):
            raise KeyboardInterrupt

    def told(run):
        """All that the comparison says, but for ids."""
        client = mlflow.MlflowClient()
        text = Path(run.info.artifact_uri.removeprefix("file://"), table).read_text()
        return text, history(run), {file.path for file in client.list_artifacts(run.info.run_id)}

    settings, cut_off = made(tmp_path), f"{table} cut off"
    with pytest.raises(KeyboardInterrupt):
        command(settings, experiment=cut_off, progress=interrupt)
    before = {run_id for run_id, run in all_runs(cut_off).items() if run.info.status == "FINISHED"}
    again, whole = (command(settings, experiment=name) for name in (cut_off, f"{table} at once"))
    taken = {member.run_id for member in again.members} & before
    assert taken == before
    assert 0 < len(taken) < len(again.members)
    ours, theirs = (told(mlflow.get_run(result.run.id)) for result in (again, whole))
    assert ours == theirs
    n, more = len(again.members) - len(taken), len(taken)
    assert again.took()[0].startswith(f"Trained {n} networks in ")
    assert again.took()[1:] == [f"{more} networks came from an interrupted command."]
    assert len(whole.took()) == 1
    assert again.drawings().keys() == whole.drawings().keys()


def test_what_was_whole_is_trained_anew(interrupted):
    """The same command once more: the first is finished, and has its networks."""
    again = train(interrupted)
    once_more = train(interrupted)
    assert not {m.run_id for m in again.members} & {m.run_id for m in once_more.members}


def test_how_the_work_is_shared_out_does_not_matter(interrupted):
    """Of another number of threads a network has other last bits, and is the same network."""
    before = set(all_runs(interrupted))
    asked = [replace(config, threads=2) for config in NETWORKS]
    shared = {"threads": 2, "stack": 1}
    again = train(interrupted, asked, settings=shared)
    assert [member.config for member in again.members] == asked
    assert len(before & {member.run_id for member in again.members}) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"lr": 0.05}},
        {"command": "reproduce"},
        {"asked": configs(("he", "xavier", "lecun", "orthogonal"), probe=50)},
    ],
    ids=["settings", "command", "schemes"],
)
def test_another_command_takes_nothing_over(interrupted, change):
    """Of other settings, or of other schemes."""
    before = set(all_runs(interrupted))
    assert not before & {member.run_id for member in train(interrupted, **change).members}


def test_another_version_of_the_code_takes_nothing_over(interrupted, monkeypatch):
    """Its networks may have other numbers."""
    monkeypatch.setattr(resuming.environment, "source_sha256", lambda: "0" * 64)
    before = set(all_runs(interrupted))
    assert not before & {member.run_id for member in train(interrupted).members}


def test_names_tell_networks_apart_that_differ_in_more_than_their_schemes():
    """By the settings in which they do."""
    asked = configs(("he",), lr=0.1) + configs(("he",), lr=0.2) + configs(("he",), hidden="8")
    train("named", asked)
    assert set(runs_of("named")) == {
        "parent",
        "he relu hidden 16 lr 0.1 seed 0",
        "he relu hidden 16 lr 0.2 seed 0",
        "he relu hidden 8 lr 0.1 seed 0",
    }


def test_the_test_images_can_stay_closed():
    """Nothing is measured on them, and a replay does not open them either."""
    (member,) = train("closed", configs(("he",)), tested=False).members
    assert set(member.last) == {"accuracy/train", "loss/peak", "loss/train"}
    assert 0.5 < member.last["accuracy/train"] <= 1

"""Verifying runs and bundles: from MLflow or a folder, by the command, inside mlflow run."""

import json
import re
import shutil
from dataclasses import replace

import mlflow
import pytest

from initflow.cli import process
from initflow.core import repository
from initflow.core.configurations import CompareConfig, DiagnoseConfig, TuneConfig, VerifyConfig
from initflow.errors import DataError, InitflowError, ReplayError, SettingError
from initflow.experiments import train, verify
from initflow.experiments.comparisons import compare
from initflow.experiments.replay import bundle, provenance, recorded
from initflow.experiments.replay.provenance import REPLAY, TRACE, UNCOMMITTED, WEIGHTS
from initflow.experiments.replay.retraining import IDENTICAL, TOLERABLE
from initflow.experiments.tuning import tune
from initflow.experiments.untrained import diagnose
from initflow.tracking import connection
from tests.conftest import ROOT
from tests.experiments.replay.test_bundle import restated
from tests.experiments.replay.test_replay import PLUGIN, rounded
from tests.initializers.test_finder import project
from tests.replaying import QUICK, config, elsewhere, evidence, stated
from tests.test_end_to_end import mlflow_run

NONE = "0" * 32
ONE = QUICK | {"log_model": False}


def verified(what, **settings):
    return verify.verify(str(what), VerifyConfig(**settings)).replay


def below(run_id):
    """The runs below this one and below those, by their ids."""
    where = [mlflow.get_run(run_id).info.experiment_id]
    condition = f"tags.`mlflow.parentRunId` = '{run_id}'"
    found = mlflow.search_runs(where, condition, output_format="list")
    return found + [one for each in found for one in below(each.info.run_id)]


@pytest.fixture(scope="module")
def result(tracked):
    """One training that kept its weights."""
    return train.train(config(), experiment="train")


@pytest.fixture(scope="module")
def comparison(tracked):
    """Four networks of one stack, one kind of which diverges."""
    settings = {"inits": "he,normal:std=1e30", "activations": "linear", "seeds": 2}
    return compare.compare(CompareConfig(**ONE, **settings), experiment="compare")


@pytest.fixture(scope="module")
def tuning(tracked):
    """Trials, some of which were pruned, and tests."""
    settings = {"inits": "he", "trials": 12, "batch": 6, "seeds": 1, "study": "s", "epochs": 4}
    storage = str(tracked / "s.journal")
    return tune.tune(TuneConfig(**ONE | settings, storage=storage), experiment="tune")


def test_a_run_is_verified_and_leaves_no_trace(result):
    """From its id alone; MLflow is left as it is."""
    before = mlflow.search_runs(search_all_experiments=True)
    found = verified(result.run_id)
    assert found.verdict == IDENTICAL
    assert (
        found.provenance.losses == mlflow.get_run(result.run_id).data.tags["initflow.losses_sha256"]
    )
    assert mlflow.search_runs(search_all_experiments=True).equals(before)


def test_a_run_carries_what_it_takes(result):
    """Its files, with the tags' hashes."""
    files = {file.path for file in mlflow.MlflowClient().list_artifacts(result.run_id)}
    assert {REPLAY, TRACE, WEIGHTS} <= files
    tags = mlflow.get_run(result.run_id).data.tags
    told = mlflow.artifacts.load_dict(f"runs:/{result.run_id}/{REPLAY}")["sha256"]
    assert told == {
        "initial_weights": tags["initflow.initial_weights_sha256"],
        "final_weights": tags["initflow.weights_sha256"],
        "losses": tags["initflow.losses_sha256"],
    }


def test_members_of_a_comparison_are_verified_by_themselves(comparison):
    """Those that diverged too."""
    ids = [member.run_id for member in comparison.members]
    outcomes = {found.outcomes[0] for found in map(verified, ids) if found.verdict == IDENTICAL}
    assert len(ids) == 4
    assert outcomes == {"finished after 30 iterations", "diverged after 0 iterations"}


def test_trials_and_tests_are_verified_by_themselves(tuning):
    """Pruned ones, which end as they did, and finished ones; then the tests of the best setting."""
    networks = [run for run in below(tuning.run.id) if "initflow.outcome" in run.data.tags]
    found = {run.info.run_id: verified(run.info.run_id) for run in networks}
    assert {one.verdict for one in found.values()} == {IDENTICAL}
    assert {one.provenance.outcome for one in found.values()} >= {"finished", "pruned"}
    parts = {run.data.tags["initflow.tuning"] for run in networks}
    assert parts == {"trial", "tuned", "untuned"}
    for run in networks:
        is_trial = run.data.tags["initflow.tuning"] == "trial"
        assert found[run.info.run_id].provenance.tested != is_trial


def opened(name, **tags):
    """A run in the experiment ``name``, which stays MLflow's own choice for nobody else."""
    client = mlflow.MlflowClient()
    there = client.get_experiment_by_name(name)
    where = there.experiment_id if there else client.create_experiment(name)
    return client.create_run(where, tags=tags).info.run_id


def made(status="FINISHED", **tags):
    """A run that is not as it should be."""
    client = mlflow.MlflowClient()
    run_id = opened("odd", **{f"initflow.{key}": value for key, value in tags.items()})
    client.update_run(run_id, status)
    return run_id


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({}, "is of no network that initflow trained"),
        ({"version": "1"}, "is of no network that initflow trained"),
        ({"status": "RUNNING"}, "is RUNNING: wait for its end"),
        (
            {"status": "KILLED", "initial_weights_sha256": "x"},
            "ended KILLED before its training did: there are no final weights to compare with",
        ),
        ({"status": "FAILED", "initial_weights_sha256": "x"}, "ended FAILED before its training"),
        ({"initial_weights_sha256": "x"}, "is a diagnosis's, of a network that was not trained"),
        ({"status": "FAILED", "outcome": "failed"}, "of a network that could not be initialized"),
        (
            {"initial_weights_sha256": "x", "outcome": "finished", "version": "0.0.9"},
            "has no replay.json: it is of initflow 0.0.9, which did not record",
        ),
    ],
    ids=str,
)
def test_a_run_that_cannot_be_verified_is_told_why(tracked, run, said):
    """Each in a line that names it."""
    run_id = made(**run)
    with pytest.raises(ReplayError) as error:
        verified(run_id)
    assert str(error.value).startswith(f"run {run_id} ")
    assert said in str(error.value)


def test_a_run_that_is_not_there_is_told(tracked):
    """None of this id, one that was deleted, and what is neither an id nor a folder."""
    with pytest.raises(ReplayError, match=f"^there is no run {NONE} in MLflow at 'sqlite:.*'$"):
        verified(NONE)
    run_id = made()
    mlflow.delete_run(run_id)
    with pytest.raises(
        ReplayError, match=rf"{run_id} is deleted; mlflow runs restore --run-id {run_id} "
    ):
        verified(run_id)
    for odd in ("latest", "A" * 32, "a\0b", "x" * 5_000, f"../{NONE}"):
        with pytest.raises(SettingError, match=r"^run must be the id of a run, 32 digits"):
            verified(odd)


def test_a_run_of_many_names_some_of_them(comparison, tuning):
    """Of a comparison, of a tuning, of one scheme of it; each can be verified."""
    networks = [member.run_id for member in comparison.members]
    with pytest.raises(
        ReplayError, match="is of 4 networks, each of which is verified by"
    ) as error:
        verified(comparison.run.id)
    named = re.findall(verify.RUN_ID, str(error.value))[1:]
    assert len(named) == 3
    assert set(named) < set(networks)
    for run in (tuning.run.id, below(tuning.run.id)[0].info.run_id):
        with pytest.raises(ReplayError, match=r"is of 1\d networks, each of which"):
            verified(run)


def test_a_diagnosis_has_nothing_trained(tracked):
    """Neither the run nor those below it."""
    settings = {"inits": "he", "activations": "relu", "depth": 2, "width": 5, "dataset": "digits"}
    found = diagnose.diagnose(DiagnoseConfig(**settings, threads=1), experiment="diagnose")
    with pytest.raises(ReplayError, match="is a diagnosis, in which nothing was trained"):
        verified(found.run.id)
    with pytest.raises(ReplayError, match="is a diagnosis's, of a network that was not trained"):
        verified(below(found.run.id)[0].info.run_id)


def test_a_run_whose_record_is_damaged_is_told(tracked, tmp_path):
    """As it is of a folder's."""
    run_id = train.train(config(**ONE), experiment="damaged").run_id
    (tmp_path / REPLAY).write_text("{")
    mlflow.MlflowClient().log_artifact(run_id, str(tmp_path / REPLAY))
    with pytest.raises(ReplayError, match=f"^run {run_id}: replay.json is no JSON"):
        verified(run_id)
    with (tmp_path / REPLAY).open("wb") as file:
        file.truncate(recorded.LARGEST + 1)
    mlflow.MlflowClient().log_artifact(run_id, str(tmp_path / REPLAY))
    with pytest.raises(InitflowError, match="has 4,194,305 bytes, and may have 4,194,304"):
        verified(run_id)


@pytest.fixture
def exported(result, tmp_path):
    verify.export(result.run_id, tmp_path / "it")
    return tmp_path / "it"


def test_what_is_exported_needs_no_server(exported, result, monkeypatch):
    """Verified without MLflow; the report has the course of its metrics."""
    monkeypatch.setattr(connection, "client", None)
    found = verified(exported)
    assert found.verdict == IDENTICAL
    accuracy = f"{result.last('accuracy/test'):.2%}"
    assert accuracy in (exported / bundle.REPORT).read_text()
    assert result.run_id in (exported / bundle.REPORT).read_text()


def test_what_was_not_committed_is_beside_what_was_trained(tracked, tmp_path, monkeypatch):
    """In the run of a training, and of a comparison in the one above all others."""
    here = repository.Repository("c" * 40, "dirty", "diff --git a/x b/x\n")
    monkeypatch.setattr(repository, "current", lambda: here)
    alone = train.train(config(**ONE), experiment="dirty").run_id
    settings = CompareConfig(**ONE, inits="he", activations="relu", seeds=1)
    population = compare.compare(settings, experiment="dirty")
    (member,) = population.members
    for run_id in (alone, population.run.id):
        text = mlflow.artifacts.load_text(f"runs:/{run_id}/{UNCOMMITTED}")
        assert text == repository.current().diff
    folder = tmp_path / "it"
    verify.export(member.run_id, folder)
    assert (folder / UNCOMMITTED).read_text() == repository.current().diff


def test_what_cannot_be_exported_leaves_nothing(comparison, tracked, tmp_path):
    """A run of many, one that is not there, a folder that is full."""
    for run_id, said in (
        (comparison.run.id, "is of 4 networks"),
        (NONE, "there is no run"),
        ("latest", "run must be the id of a run"),
    ):
        with pytest.raises(InitflowError, match=said):
            verify.export(run_id, tmp_path / "it")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(SettingError, match="to must be a folder that is empty or not there"):
        verify.export(NONE, tmp_path / "full")


def rewritten(folder, *path, to):
    """Change a value of its replay.json and make the manifest match."""
    values = json.loads((folder / REPLAY).read_text())
    part = values
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = to
    (folder / REPLAY).write_text(json.dumps(values))
    restated(folder, REPLAY)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("lr", "0.1001"), ("seed", "1"), ("activation", "tanh"), ("init", "lecun")],
)
def test_a_parameter_that_was_changed_with_the_manifest_is_found_out(
    exported, capsys, setting, value
):
    """By training: one line that names where, exit 1."""
    rewritten(exported, "config", setting, to=value)
    assert process.main(["verify", str(exported)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"Error: Different: folder '{exported}' does not come out as")
    assert captured.err.count("\n") == 1
    at = "the losses differ first at iteration 1," if setting == "lr" else "differ first at"
    assert at in captured.err


def test_a_digest_of_other_images_is_an_error(exported):
    """With both digests."""
    rewritten(exported, "data", "digest", to="f" * 64)
    with pytest.raises(DataError, match=r"has the digest 70cb8757d0f9…, and .* with ffffffffffff…"):
        verified(exported)


def test_a_lie_about_the_number_of_updates_trains_nothing(exported, monkeypatch):
    """It does not go with the trace, or with the images."""
    rewritten(exported, "config", "epochs", to="1000000")
    with pytest.raises(ReplayError, match="updates must be 15000000 of a finished training"):
        verified(exported)
    rewritten(exported, "updates", to=15_000_000)
    with pytest.raises(ReplayError, match=r"losses must be F32 \(15000000,\), not F32 \(30,\)"):
        verified(exported)


def test_a_folder_chooses_neither_code_nor_paths(tmp_path, monkeypatch):
    """A function by its place is run only where its user names it."""
    code = tmp_path / "mine.py"
    code.write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    kept = evidence(config(init="mine.py:fill"))
    own = replace(kept.provenance.config, data_dir=tmp_path / "made", plugins_dir=tmp_path / "p")
    bundle.write(tmp_path / "it", provenance.files(stated(kept, config=own)))
    code.write_text("raise SystemExit('it was run')\n")
    with pytest.raises(
        ReplayError, match=r"'mine\.py:fill', which is not run because a folder says"
    ):
        verified("it")
    code.write_text(PLUGIN)
    found = verified("it", init="mine.py:fill")
    assert (found.verdict, found.differences) == (IDENTICAL, [])
    assert not (tmp_path / "made").exists()


def test_a_plugin_that_is_missing_is_told(tracked, tmp_path, monkeypatch):
    """And found where the user says, or where the run had it."""
    home = project(tmp_path / "mine", "own", {"own": "own:fill"}, version="3.1")
    (home / "own.py").write_text(PLUGIN)
    settings = config(init="own", plugins_dir=tmp_path / "mine", log_model=False)
    run_id = train.train(settings, experiment="plugin").run_id
    assert verified(run_id).verdict == IDENTICAL
    shutil.move(tmp_path / "mine", tmp_path / "theirs")
    with pytest.raises(ReplayError, match=r"its scheme 'own' of own 3\.1 is not here: install it"):
        verified(run_id)
    assert verified(run_id, plugins_dir=tmp_path / "theirs").verdict == IDENTICAL


def test_a_device_that_is_missing_is_told(tmp_path):
    """And another one is taken where the user says so, which is named as a difference."""
    kept = stated(evidence(config()), device="cuda:77")
    told = kept.provenance.environment
    facts = told["facts"] | {"device": "cuda:77"}
    kept = stated(kept, environment=told | {"facts": facts})
    bundle.write(tmp_path / "it", provenance.files(kept))
    with pytest.raises(
        ReplayError, match="it was trained on cuda:77, which is not here: device=cpu"
    ):
        verified(tmp_path / "it")
    found = verified(tmp_path / "it", device="cpu")
    assert found.verdict == IDENTICAL
    assert [one.what for one in found.differences] == ["device"]
    with pytest.raises(SettingError, match="not 'cuda:76'"):
        verified(tmp_path / "it", device="cuda:76")


# Differences that change no number: where and of which source it is, and tools.
HARMLESS = ("source_sha256", "git_", "python", "package ")


def test_a_bundle_made_when_all_modules_stood_in_one_folder_verifies():
    """Its source is told to be another, and its numbers come out again."""
    found = verified(ROOT / "tests" / "bundles" / "before_rooms")
    told = [difference.what for difference in found.differences]
    assert "source_sha256" in told
    matters = [what for what in told if not what.startswith(HARMLESS)]
    assert found.verdict == IDENTICAL or (matters and found.verdict == TOLERABLE)


def test_another_version_is_named_first_and_the_replay_goes_on(tmp_path, capsys):
    """As long as it records in the same form."""
    kept = evidence(config())
    told = kept.provenance.environment
    other = {"initflow": "0.0.1", "python": "2.7", "torch": told["facts"]["torch"]}
    kept = stated(kept, environment={"facts": other, "packages": {}, "variables": 7})
    bundle.write(tmp_path / "it", provenance.files(kept))
    assert verified(tmp_path / "it").differences[0][:2] == ("initflow", "0.0.1")
    assert process.main(["verify", str(tmp_path / "it")]) == 0
    shown = capsys.readouterr().out
    first = shown.index("0.0.1")
    assert first < shown.index("2.7") < shown.index("more packages.") < shown.index("Identical: ")


def test_the_command_tells_what_is_identical(result, installed, capsys, tmp_path):
    """A table and a sentence, and no other with the pinned versions; export tells what is next."""
    assert process.main(["verify", result.run_id]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"final weights +identical", shown)
    (told,) = re.findall(r"^Identical: .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert shown.endswith(told.replace("RUN_ID", result.run_id).replace(" 75 ", " 30 ") + "\n")
    assert process.main(["export", result.run_id, "--to", str(tmp_path / "it")]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith(f"Next, try it: initflow verify {tmp_path / 'it'}\n")
    assert process.main(shown.split()[-2:]) == 0


def test_the_command_ends_with_3_within_tolerance(tmp_path, capsys):
    """What is not as it was first, then where the numbers differ."""
    kept = elsewhere(evidence(config(activation="tanh"), change=rounded))
    bundle.write(tmp_path / "it", provenance.files(kept))
    assert process.main(["verify", str(tmp_path / "it")]) == 3
    shown = capsys.readouterr().out
    assert shown.index("cpu_capability") < shown.index("initial weights")
    assert re.search(
        r"initial weights +tolerable +fc1.weight\[0, 0\] +-?[\d.e-]+ +-?[\d.e-]+", shown
    )
    assert "Within tolerance, but not identical: the initial weights differ first at fc1" in shown


@pytest.mark.parametrize(("lr", "code"), [("0.1", 0), ("0.2", 1)])
def test_versions_that_are_not_pinned_are_told(exported, installed, capsys, lr, code):
    """With what came of it, by name."""
    promised = "The same bits are promised with torch {torch} and numpy {numpy}".format(**installed)
    installed["numpy"] = "2.0.1"
    rewritten(exported, "config", "lr", to=lr)
    assert process.main(["verify", str(exported)]) == code
    told = "".join(capsys.readouterr())
    assert told.endswith(f"{promised}, not with numpy 2.0.1.\n")


def test_inside_mlflow_run_the_result_is_in_its_run(result, installed, monkeypatch):
    """Tags, a table of what was compared, and the sentences."""
    installed["torch"] = "2.9.0"
    client = mlflow.MlflowClient()
    launched = opened("launched")
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    verified(result.run_id)
    run = client.get_run(launched)
    assert run.info.status == "FINISHED"
    assert run.data.tags["initflow.replay"] == IDENTICAL
    assert run.data.tags["initflow.verified"] == result.run_id
    assert run.data.tags["mlflow.note.content"].startswith("Identical: trained again, run ")
    assert run.data.tags["mlflow.note.content"].endswith(", not with torch 2.9.0.")
    told = mlflow.artifacts.load_dict(f"runs:/{launched}/verification.json")
    assert (told["verified"], told["verdict"]) == (result.run_id, IDENTICAL)
    assert told["parts"]["losses"] == {"verdict": IDENTICAL}
    assert told["promise"]["bits"] == "not promised"


@pytest.mark.end_to_end
def test_mlflow_run_verifies_a_run(result, tracked):
    """The entry point, by the run's id alone, in a process of its own."""
    done = mlflow_run(tracked, f"run_id={result.run_id}", entry_point="verify")
    assert done.returncode == 0, done.stderr
    assert f"Identical: trained again, run {result.run_id} has" in done.stdout

"""Tuning, from its settings to the runs: the same again, resumed, shared out, killed."""

import contextlib
import json
import random
import re
import time
from dataclasses import replace

import mlflow
import optuna
import pytest

from initflow.core import workers
from initflow.core.configurations import TrainConfig, TuneConfig
from initflow.errors import PluginError, SettingError, StudyError, TrackingError, WorkError
from initflow.experiments import network_run, train
from initflow.experiments.tuning import evaluation, plan, searches, storages, studies, tune
from initflow.reporting.seed_statistics import Cell
from tests import test_end_to_end
from tests.conftest import models_of

QUICK = {
    "dataset": "digits",
    "hidden": "16",
    "epochs": 2,
    "eval_every": 8,
    "probe": 0,
    "threads": 1,
    "trials": 9,
    "batch": 3,
    "seeds": 2,
    "log_model": False,
}
WHOLE = {"log_model": True, "probe": 50, "lr": 0.02}  # an untuned setting that is not the best
HE, NORMAL = Cell("he", "relu"), Cell("normal", "relu")


def config(folder, study, inits="he", **own):
    """Of a small study whose journal is in ``folder``."""
    storage = str(folder / f"{study}.journal")
    return TuneConfig(**QUICK | {"inits": inits, "study": study, "storage": storage} | own)


@pytest.fixture(scope="module")
def tuned(tracked):
    """Two schemes, tuned and tested with models, in a module's store."""
    return tune.tune(config(tracked, "whole", "he,normal", **WHOLE), experiment="whole")


PEACEFUL = {"trials": 12, "seeds": 1}


@pytest.fixture(scope="module")
def peaceful(tuned, tracked):
    """Settings of two schemes' studies that nothing disturbed, and how long they took, in s.

    Others with the same seed must become what they are. It comes after ``tuned``, which pays for
    all that is imported.
    """
    settings = config(tracked, "peaceful", "he,normal", **PEACEFUL)
    started = time.monotonic()
    tune.tune(settings, experiment="peaceful")
    return settings, time.monotonic() - started


def runs_of(name):
    return mlflow.search_runs(experiment_names=[name], output_format="list")


def part(runs, which):
    """Those runs that are a ``trial``, ``tuned``, …, without orphans, from the first on."""
    found = [run for run in runs if run.data.tags.get("initflow.tuning") == which]
    found = [run for run in found if run.data.tags.get("initflow.orphaned") != "true"]
    return sorted(found, key=lambda run: (run.info.start_time, run.info.run_name))


def kept(settings, cell):
    """The trials in the study's storage, by Optuna itself, without those that were cut off."""
    backend = optuna.storages.journal.JournalFileBackend(settings.storage)
    storage = optuna.storages.JournalStorage(backend)
    study = optuna.load_study(storage=storage, study_name=f"{settings.study}: {cell}")
    return [t for t in study.trials if t.state.name != "FAIL" or searches.ERROR in t.user_attrs]


def values(settings, cell):
    """What was tried and what came of it, in this order."""
    return [(t.params, t.state.name, t.value, t.intermediate_values) for t in kept(settings, cell)]


def test_every_scheme_gets_the_same_trials(tuned):
    """As many, and the first drawn at random from the same settings; the untuned one first."""
    first, second = ([(t.lr, t.gamma) for t in tuned.trials[cell]] for cell in (HE, NORMAL))
    assert len(first) == len(second) == 9
    assert first[0] == (0.02, 0.96)
    assert first[:9] == second[:9]  # before the tenth the sampler has too few to learn from
    assert len(set(first)) == 9


def test_a_trial_is_the_training_of_its_network_alone(tuned, tracked):
    """Bit for bit, though it was trained in a stack: what its validation images say is the same."""
    trial = next(t for t in tuned.trials[HE][1:] if t.outcome == "finished")
    network = tuned.plan.config.trial("he", trial.lr, trial.gamma, tuned.plan.validation)
    alone = train.train(network, experiment="alone")
    reached = max(value for step, value in alone.history["accuracy/validation"] if step)
    (run,) = (r for r in part(runs_of("whole"), "trial") if is_trial(r, trial.number, "he"))
    of_alone = mlflow.get_run(alone.run_id)
    assert trial.accuracy == reached
    key = "initflow.weights_sha256"
    assert run.data.tags[key] == of_alone.data.tags[key]
    assert {k: v for k, v in run.data.params.items() if not k.startswith("resolved")} == {
        k: v for k, v in of_alone.data.params.items() if not k.startswith("resolved")
    }


def is_trial(run, number, init):
    tags = run.data.tags
    return (tags["initflow.trial"], tags["initflow.scheme"]) == (str(number), init)


def test_the_test_images_are_opened_once(tuned):
    """By the networks that are tested, on all training images; no trial sees them."""
    runs = runs_of("whole")
    for trial in part(runs, "trial"):
        assert not any(key.endswith("/test") for key in trial.data.metrics)
        assert trial.data.params["validation"] == str(tuned.plan.validation) == str(1437 // 6)
    tested = part(runs, "tuned") + part(runs, "untuned")
    assert {run.data.params["validation"] for run in tested} == {"0"}
    assert sorted(int(run.data.params["seed"]) for run in tested) == [1, 1, 1, 1, 2, 2, 2, 2]
    assert {run.data.params["seed"] for run in part(runs, "trial")} == {"0"}
    assert all("accuracy/test" in run.data.metrics for run in tested)


def test_the_runs_form_a_tree(tuned):
    """The tuning, a run for each scheme, below it one for each trial and each test."""
    runs = runs_of("whole")
    parent_of = {run.info.run_id: run.data.tags.get("mlflow.parentRunId") for run in runs}
    schemes = {run.info.run_id for run in part(runs, "scheme")}
    assert {parent_of[one] for one in schemes} == {tuned.run.id}
    for run in part(runs, "trial") + part(runs, "tuned") + part(runs, "untuned"):
        assert parent_of[run.info.run_id] in schemes
    names = [run.info.run_name for run in runs]
    assert len(set(names)) == len(names) - 9  # both schemes try the same settings
    assert len(runs) == 1 + 2 + 2 * 9 + 2 * 4


def test_a_run_says_what_became_of_its_trial(tuned):
    """KILLED for pruned, and all that was measured until then."""
    runs = {
        (run.data.tags["initflow.scheme"], int(run.data.tags["initflow.trial"])): run
        for run in part(runs_of("whole"), "trial")
    }
    outcomes = set()
    for cell, trials in tuned.trials.items():
        for trial in trials:
            run = runs[cell.init, trial.number]
            outcomes.add(trial.outcome)
            assert run.data.tags["initflow.outcome"] == trial.outcome
            assert run.info.status == ("KILLED" if trial.outcome == "pruned" else "FINISHED")
            history = mlflow.MlflowClient().get_metric_history(
                run.info.run_id, "accuracy/validation"
            )
            assert max(m.value for m in history if m.step) == trial.accuracy
            assert float(run.data.params["lr"]) == trial.lr
            assert float(run.data.params["gamma"]) == trial.gamma
            pruned = f"It was pruned at {history[-1].value:.2%} validation accuracy"
            said = run.data.tags["mlflow.note.content"]
            assert (pruned in said) == (trial.outcome == "pruned")
    assert outcomes == {"finished", "pruned"}


def test_the_table_is_what_the_runs_say(tuned):
    """Computed again from MLflow's side."""
    runs = runs_of("whole")
    table = json.loads(mlflow.artifacts.load_text(f"runs:/{tuned.run.id}/tuning.json"))
    for row in table["rows"]:
        finished = [
            run
            for run in part(runs, "trial")
            if run.data.tags["initflow.scheme"] == row["init"] and run.info.status == "FINISHED"
        ]
        best = max(
            max(m.value for m in history(run, "accuracy/validation") if m.step) for run in finished
        )
        assert row["validation_accuracy"] == best
        tested = [
            run.data.metrics["accuracy/test"]
            for run in part(runs, "tuned")
            if run.data.tags["initflow.scheme"] == row["init"]
        ]
        assert row["test_accuracy_mean"] == pytest.approx(sum(tested) / 2, abs=1e-12)
        assert row["finished"] + row["pruned"] == 9
    assert table["sentences"] == list(tuned.sentences)


def history(run, key):
    return mlflow.MlflowClient().get_metric_history(run.info.run_id, key)


def test_what_a_tuning_leaves(tuned):
    """Figures, tables and a page in its run, Optuna's figures in those of the schemes."""
    client = mlflow.MlflowClient()
    files = {file.path for file in client.list_artifacts(tuned.run.id)}
    assert files == {
        "config.json",
        "rates_and_accuracies.png",
        "report.html",
        "tuned_and_untuned.png",
        "tuning.csv",
        "tuning.json",
    }
    for run in part(runs_of("whole"), "scheme"):
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert files == {"history.png", "slice.png", "contour.png", "importances.png"}
        course = history(run, "trials/best")
        assert [m.step for m in course] == list(range(1, 10))
        assert [m.value for m in course] == sorted(m.value for m in course)
    html = mlflow.artifacts.load_text(f"runs:/{tuned.run.id}/report.html")
    assert "initflow tune --inits he,normal --trials 9" in html
    assert all(sentence in html for sentence in tuned.sentences)


def test_the_model_is_of_the_best_setting_and_of_the_first_seed(tuned):
    """Not of the seed that did best on the test images."""
    with_model = [run for run in runs_of("whole") if models_of(run)]
    assert len(with_model) == 2
    for run in with_model:
        assert run.data.tags["initflow.tuning"] == "tuned"
        assert run.data.params["seed"] == "1"


def test_models_are_registered_once(tuned, tracked):
    """A version for each scheme, the best by its validation images under an alias."""
    client = mlflow.MlflowClient()
    for _ in range(2):
        again = config(tracked, "whole", "he,normal", register="digits-model", **WHOLE)
        result = tune.tune(again, experiment="whole")
        versions = client.search_model_versions("name = 'digits-model'")
        assert {int(v.version) for v in versions} == {1, 2}
        assert sorted(result.versions.values()) == ["1", "2"]
    best = max(result.rows, key=lambda row: row.accuracy).cell
    aliased = client.get_model_version_by_alias("digits-model", "best")
    assert str(aliased.version) == result.versions[best]
    assert aliased.tags["init"] == best.init
    model = mlflow.pyfunc.load_model("models:/digits-model@best")
    assert model.metadata.run_id == aliased.run_id
    # All of it was known: nothing was trained again, and the scheme's runs went on.
    runs = runs_of("whole")
    assert len(part(runs, "trial")) == 18
    assert len(part(runs, "tuned")) == 4
    assert len(part(runs, "scheme")) == 2
    assert {r.data.tags["mlflow.parentRunId"] for r in part(runs, "scheme")} == {result.run.id}
    assert not result.spent.training


def test_the_same_seed_gives_the_same_trials_and_values(tracked):
    """Past the sampler's random beginning, pruning included; another seed gives others."""
    settings = [
        config(tracked, name, trials=trials, seed=seed, seeds=1)
        for name, seed, trials in (("one", 3, 14), ("other", 3, 14), ("third", 4, 5))
    ]
    results = [tune.tune(one, experiment=one.study) for one in settings]
    one, other, third = (values(one, HE) for one in settings)
    assert one == other
    tried, of_another = ([v[0] for v in found[1:5]] for found in (one, third))
    assert not any(setting in tried for setting in of_another)
    assert results[0].rows == results[1].rows


def test_more_workers_try_the_same(peaceful, tracked):
    """Two of them with two schemes: each study goes on one batch after the other."""
    alone, _ = peaceful
    shared = config(tracked, "by-two", "he,normal", workers=2, **PEACEFUL)
    tune.tune(shared, experiment="by-two")
    for cell in (HE, NORMAL):
        assert values(alone, cell) == values(shared, cell)
    tags = ("initflow.weights_sha256", "initflow.scheme", "initflow.trial", "initflow.tuning")
    tracks = [
        sorted(str([run.data.tags.get(tag) for tag in tags]) for run in runs_of(name))
        for name in ("peaceful", "by-two")
    ]
    assert tracks[0] == tracks[1]


def test_a_study_is_the_work_of_one_worker(tracked):
    """However much it is: with more workers than studies it would depend on who is faster."""
    work, most = tune._work(plan.of(config(tracked, "work", "he,normal", batch=3, **PEACEFUL)))
    assert len(work) == 2
    assert {(part.networks, part.together) for part in work} == {(12 + 2 * 1, 3)}
    assert most >= 1


def test_a_worker_that_is_faster_tries_no_other(peaceful, tracked, monkeypatch):
    """It does not take a study whose batch before is still another worker's."""
    alone, _ = peaceful
    shared = config(tracked, "unequal", "he,normal", **PEACEFUL)
    there = workers.worker_pool

    @contextlib.contextmanager
    def worker_pool(*settings):
        with there(*settings) as pool:
            yield replace(pool, size=2)

    def results(_, work, next_task):
        """Those of two workers, one of which never gets anything done beside the other."""
        at_hand = []
        while True:
            while len(at_hand) < 2 and (task := next_task()) is not None:
                at_hand.append(task)
            if not at_hand:
                return
            at_hand.sort(key=lambda task: task.configs[0].init == "he")
            yield at_hand[-1], work(at_hand.pop())

    monkeypatch.setattr(workers, "worker_pool", worker_pool)
    with monkeypatch.context() as patch:
        patch.setattr(workers, "results", results)
        tune.tune(shared, experiment="unequal")
    for cell in (HE, NORMAL):
        assert values(alone, cell) == values(shared, cell)


def test_an_interruption_leaves_no_run_open_and_goes_on(peaceful, tracked):
    """Cut off in a batch: the same settings again, as if nothing had been."""
    whole, _ = peaceful
    cut = config(tracked, "interrupted", **PEACEFUL)

    shares = []

    def interrupt(what, done, of):
        if "trials done" in what:
            shares.append(done / of)
        if "6 of 12 trials done" in what and done / of > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune.tune(cut, experiment="interrupted", progress=interrupt)
    assert shares == sorted(shares)  # of all trials, not of each batch anew
    assert shares[0] < 0.25
    assert 0.5 < shares[-1] <= 0.75
    assert "RUNNING" not in {run.info.status for run in runs_of("interrupted")}
    assert len(kept(cut, HE)) == 6 + 3  # those that wait to be tried again
    result = tune.tune(cut, experiment="interrupted")
    assert values(cut, HE) == values(whole, HE)
    assert len(part(runs_of("interrupted"), "trial")) == 12
    assert len(result.trials[HE]) == 12
    assert result.rows[0].counts["finished"] + result.rows[0].counts["pruned"] == 12


def test_more_trials_go_on_where_fewer_ended(tracked):
    """The same command with more of them keeps what is there."""
    few = config(tracked, "grows", trials=6, seeds=1)
    tune.tune(few, experiment="grows")
    before = values(few, HE)
    tune.tune(config(tracked, "grows", trials=10, seeds=1), experiment="grows")
    after = values(few, HE)
    assert after[:6] == before
    assert len(after) == 10


def test_a_trial_that_diverges_is_a_result_and_never_the_best(tracked):
    """It is told as the worst there is, and marked."""
    settings = config(tracked, "diverges", "normal", activation="linear", lr_high=10, seeds=1)
    result = tune.tune(settings, experiment="diverges")
    counts = result.rows[0].counts
    assert counts["diverged"] > 0
    for trial in kept(settings, Cell("normal", "linear")):
        diverged = trial.user_attrs.get(searches.DIVERGED, False)
        assert (trial.value == 0.0) == diverged
    runs = part(runs_of("diverges"), "trial")
    diverged = [run for run in runs if run.data.tags["initflow.outcome"] == "diverged"]
    assert len(diverged) == counts["diverged"]
    assert {run.info.status for run in diverged} == {"FINISHED"}
    assert result.rows[0].best.outcome == "finished"


def test_where_all_diverge_there_is_nothing_to_test(tracked):
    """But the untuned setting, which says so too; no figure or table fails over it."""
    own = {"activation": "linear", "lr_low": 1e4, "lr_high": 1e5, "lr": 1e4, "trials": 3}
    result = tune.tune(config(tracked, "lost", "normal", **own), experiment="lost")
    (row,) = result.rows
    assert row.best is None
    assert row.counts["diverged"] == 3
    assert not part(runs_of("lost"), "tuned")
    assert row.untuned.diverged == 2
    assert any("no trial finished" in line for line in result.closing_lines())


FAILING = """
import torch

def sometimes(weight, *, generator):
    torch.nn.init.normal_(weight, 0, 0.1, generator=generator)
    if FAILS:
        weight[0, 0] = float("nan")
"""


def test_a_failing_scheme_is_an_error_before_anything_is_made(tracked, tmp_path):
    """Its first network is drawn before a run is made."""
    (tmp_path / "odd.py").write_text(FAILING.replace("FAILS", "True"))
    settings = config(tracked, "fails", f"{tmp_path}/odd.py:sometimes")
    with pytest.raises(PluginError, match="odd"):
        tune.tune(settings, experiment="fails")
    assert mlflow.get_experiment_by_name("fails") is None


@pytest.mark.parametrize(
    ("own", "error", "said"),
    [
        ({"lr_low": 1e-2}, SettingError, "lr_low=0.001, not lr_low=0.01"),
        ({"gamma_high": 0.9}, SettingError, "gamma_high=1.0, not gamma_high=0.9"),
        ({"epochs": 3}, SettingError, "epochs=2, not epochs=3"),
        ({"validation": 100}, SettingError, "validation=239, not validation=100"),
        ({"seed": 1}, SettingError, "seed=0, not seed=1"),
        ({"backend": "ray"}, SettingError, "needs MLflow's tracking server"),
        ({"storage": "/proc/none/x.journal"}, StudyError, "cannot be written"),
        ({"storage": "nodatabase://me:secret@host/x"}, SettingError, "nodatabase://me:***@host"),
    ],
)
def test_a_wrong_setting_is_an_error_before_anything_is_made(tuned, tracked, own, error, said):
    """In one line; no run is made, and the study stays as it is."""
    settings = config(tracked, "whole", "he,normal", **WHOLE | own)
    before = len(runs_of("whole"))
    with pytest.raises(error) as raised:
        tune.tune(settings, experiment="whole")
    assert re.search(re.escape(said), str(raised.value)), raised.value
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)
    assert len(runs_of("whole")) == before


def test_a_server_that_does_not_answer_is_told_with_the_time(tracked, monkeypatch):
    """Instead of MLflow's minutes of silence."""
    monkeypatch.setattr("initflow.tracking.outages.SERVER_PATIENCE_S", 0.5)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("http://user:secret@127.0.0.1:9")
    try:
        with pytest.raises(
            TrackingError, match=r"127.0.0.1:9' failed.*\(tried for \d+ s\)"
        ) as told:
            tune.tune(config(tracked, "unreachable"))
    finally:
        mlflow.set_tracking_uri(before)
    assert "secret" not in str(told.value)


def test_a_worker_that_dies_has_its_trials_tried_again(peaceful, tracked, monkeypatch):
    """Killed twice, between other workers' work; the study is as without it."""
    whole, _ = peaceful
    killed = config(tracked, "deadly", **PEACEFUL)
    there = workers.results
    lost = []

    def results(pool, work, next_task):
        def deadly(batch):
            if len(lost) < 2 and batch.pending[0].number >= 3:
                lost.append(batch)
                raise workers.WorkerLostError("killed")
            return work(batch)

        return there(pool, deadly, next_task)

    monkeypatch.setattr(workers, "results", results)
    tune.tune(killed, experiment="deadly")
    assert len(lost) == 2
    assert values(killed, HE) == values(whole, HE)
    assert len(part(runs_of("deadly"), "trial")) == 12


@pytest.mark.parametrize("deaths", [8, 9])
def test_a_node_takes_all_its_workers_with_it(tracked, monkeypatch, deaths):
    """All of a pool at once are no reason to give up, but each of them three times in a row is."""
    study, there, lost = f"node-{deaths}", workers.worker_pool, []

    def results(pool, work, next_task):
        while (batch := next_task()) is not None:
            if len(lost) < deaths:
                lost.append(batch)
                yield batch, workers.WorkerLostError("killed")
            else:
                yield batch, work(batch)

    @contextlib.contextmanager
    def worker_pool(backend, size, threads):
        with there(backend, 1, threads) as pool:
            yield replace(pool, size=size)

    monkeypatch.setattr(workers, "worker_pool", worker_pool)
    monkeypatch.setattr(workers, "results", results)
    expected = pytest.raises(WorkError, match=r"^9 workers died one after the other: killed$")
    with expected if deaths == 9 else contextlib.nullcontext():
        tune.tune(config(tracked, study, workers=3, seeds=1), experiment=study)
    assert len(part(runs_of(study), "trial")) == (0 if deaths == 9 else 9)


def test_a_worker_taken_for_dead_that_lives_on_counts_for_nothing(tracked, monkeypatch):
    """It has written its run when it learns of that: the run is disowned."""
    settings = config(tracked, "undead", trials=3, seeds=1)
    there = network_run.log_network
    given_up = []

    def log_network(run, record, *arguments, tags, **own):
        logged = there(run, record, *arguments, tags=tags, **own)
        if not given_up and tags.get("initflow.tuning") == "trial":
            given_up.append(logged.run_id)
            storage = storages.open_storage(settings.storage)
            study = optuna.load_study(storage=storage, study_name="undead: he relu")
            study.tell(tags["initflow.trial"], state=optuna.trial.TrialState.FAIL)
        return logged

    monkeypatch.setattr(network_run, "log_network", log_network)
    with pytest.raises(StudyError, match=r"^trial 0 of study 'undead: he relu' was given up mean"):
        tune.tune(settings, experiment="undead")
    (orphan,) = (run for run in runs_of("undead") if run.info.run_id in given_up)
    assert orphan.data.tags["initflow.orphaned"] == "true"
    assert orphan.info.status == "KILLED"
    tune.tune(settings, experiment="undead")
    assert len(kept(settings, HE)) == 3
    assert len(part(runs_of("undead"), "trial")) == 3


KILLED = """
import os, sys, time
import torch
import mlflow
from initflow.experiments.tuning import tune
from initflow.core.configurations import TuneConfig

torch.set_num_threads(1)
settings = {settings!r}
for delay in {delays!r}:
    child = os.fork()
    if not child:
        mlflow.set_tracking_uri({store!r})
        tune.tune(TuneConfig(**settings), experiment="killed")
        os._exit(0)
    until = time.monotonic() + delay
    while time.monotonic() < until and not os.waitpid(child, os.WNOHANG)[0]:
        time.sleep(0.01)
    try:
        os.kill(child, 9)
        _, status = os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        continue
    print("killed" if status == 9 else "done", flush=True)
"""


@pytest.mark.end_to_end
def test_killed_at_ten_moments_it_loses_nothing(peaceful, tracked):
    """By SIGKILL, a process of its own each time: resumed, it is as if nothing had been."""
    whole, took = peaceful
    settings = QUICK | PEACEFUL | {"inits": "he,normal", "study": "killed"}
    settings |= {"storage": str(tracked / "killed.journal")}
    moments = random.Random(0)  # noqa: S311 - of when to kill
    delays = [moments.uniform(0.05, 0.35) * took for _ in range(10)]
    program = KILLED.format(settings=settings, delays=delays, store=mlflow.get_tracking_uri())
    done = test_end_to_end.run(tracked, "python", "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split().count("killed") >= 5, done.stdout + done.stderr
    result = tune.tune(TuneConfig(**settings), experiment="killed")
    for cell in (HE, NORMAL):
        hurt = TuneConfig(**settings)
        assert values(hurt, cell) == values(whole, cell)
        assert len(result.trials[cell]) == 12
    runs = runs_of("killed")
    assert "RUNNING" not in {run.info.status for run in runs}
    trials = part(runs, "trial")
    numbers = [(r.data.tags["initflow.scheme"], r.data.tags["initflow.trial"]) for r in trials]
    assert len(set(numbers)) == len(numbers) == 24
    assert len(part(runs, "tuned")) == len(part(runs_of("peaceful"), "tuned")) == 2
    tested = {run.info.run_id for run in part(runs, "tuned") + part(runs, "untuned")}
    known = set()
    for cell in (HE, NORMAL):
        described = {**result.plan.described, "scheme": f"{cell.init} (built-in)"}
        known |= evaluation.tested_runs(
            studies.Study(result.plan.search(cell), described, (0.1, 0.96))
        )
    assert tested == known


def test_a_smaller_budget_counts_for_all(tracked):
    """One scheme had more trials before: of them only so many of the first are compared."""
    shared = {"trials": 6, "seeds": 1}
    more = tune.tune(config(tracked, "budget", "he", **shared), experiment="budget")
    both = config(tracked, "budget", "he,normal", **shared | {"trials": 3})
    fewer = tune.tune(both, experiment="budget")
    assert [len(found) for found in fewer.trials.values()] == [3, 3]
    assert fewer.trials[HE] == more.trials[HE][:3]
    assert sum(fewer.rows[0].counts.values()) == 3


def test_a_study_is_known_by_itself_not_by_its_name(tracked, tmp_path):
    """Another of the same name, in another storage, leaves the first one's runs alone."""
    first = config(tracked, "namesake", trials=3, seeds=1)
    tune.tune(first, experiment="namesake")
    before = {run.info.run_id: run.info.status for run in runs_of("namesake")}
    tune.tune(config(tmp_path, "namesake", trials=3, seeds=1), experiment="namesake")
    after = {run.info.run_id: run for run in runs_of("namesake")}
    assert before == {one: after[one].info.status for one in before}
    assert not any("initflow.orphaned" in after[one].data.tags for one in before)
    assert len(after) == 2 * len(before)


def test_orphans_in_another_experiment_are_closed_too(tracked):
    """A study goes on in the one that it is told; nothing is left open in the first."""
    settings = config(tracked, "moves", trials=3, seeds=1)
    tune.tune(settings, experiment="moves-from")
    for run in runs_of("moves-from"):
        if run.data.tags["initflow.tuning"] in ("study", "scheme"):
            mlflow.MlflowClient().update_run(run.info.run_id, "RUNNING")  # as a kill leaves it
    tune.tune(settings, experiment="moves-to")
    assert "RUNNING" not in {run.info.status for run in runs_of("moves-from")}
    assert len(part(runs_of("moves-to"), "tuned")) == 1  # tested again, where its run is to be


def test_a_refused_scheme_leaves_no_study_behind(tracked):
    """One of several is of another study: none of the others is made."""
    tune.tune(config(tracked, "several", "he", trials=1, seeds=1), experiment="several")
    wrong = config(tracked, "several", "normal,he", trials=1, seeds=1, lr_high=2)
    with pytest.raises(SettingError, match=r"lr_high=1\.0, not lr_high=2\.0"):
        tune.tune(wrong, experiment="several")
    right = config(tracked, "several", "normal,he", trials=1, seeds=1)
    assert len(tune.tune(right, experiment="several").rows) == 2


def test_mlflows_own_database_is_no_storage(tracked):
    """Optuna's tables would break it, and it theirs."""
    before = mlflow.get_tracking_uri()
    settings = TuneConfig(**QUICK, storage=before)
    with pytest.raises(SettingError, match="must be another database than MLflow's"):
        tune.tune(settings)


def test_a_version_that_was_deleted_is_made_again(tracked):
    """The registry is the user's to tidy."""
    settings = config(tracked, "tidied", trials=1, seeds=1, register="tidied")
    assert tune.tune(settings, experiment="tidied").versions == {HE: "1"}
    mlflow.MlflowClient().delete_model_version("tidied", "1")
    assert tune.tune(settings, experiment="tidied").versions == {HE: "2"}


NOTEBOOK = """
import sys
import initflow
from initflow.core.configurations import TuneConfig
from initflow.errors import SettingError
from initflow.experiments.tuning.tune import tune

@initflow.initializer
def mine(weight, generator):
    weight.normal_(0.0, 0.1, generator=generator)

try:
    tune(TuneConfig(inits="mine", dataset="digits", workers=2))
except SettingError as error:
    print(error)
"""


@pytest.mark.end_to_end
def test_workers_cannot_use_what_a_notebook_defines(tmp_path):
    """Which is said before anything is made."""
    store = tmp_path / "new.db"
    done = test_end_to_end.run(
        tmp_path, "python", "-c", NOTEBOOK, MLFLOW_TRACKING_URI=f"sqlite:///{store}"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("init 'mine' is defined where its workers cannot find it")
    assert not store.exists()


def test_one_network_is_tested_where_the_untuned_setting_is_the_best(tracked):
    """Then the two are the same networks, of which none is trained twice."""
    settings = config(tracked, "first", trials=1, seeds=2)
    result = tune.tune(settings, experiment="first")
    row = result.rows[0]
    assert (row.lr, row.gamma) == (0.1, 0.96)
    assert row.tested == row.untuned
    assert len(part(runs_of("first"), "tuned")) == 2
    assert not part(runs_of("first"), "untuned")


def test_along_a_cosine_only_the_rate_is_searched(tracked):
    """By Adam too; nothing that is told has a gamma, and the same command has nothing to do."""
    settings = config(
        tracked, "cosine", trials=4, seeds=2, optimizer="adam", schedule="cosine", lr=0.003
    )
    result = tune.tune(settings, experiment="cosine")
    (found,) = result.trials.values()
    assert found[0].lr == 0.003
    assert len({trial.lr for trial in found}) == 4
    assert {trial.gamma for trial in found} == {result.rows[0].gamma} == {None}
    told = [*result.sentences, result.plan.summary, result.plan.untuned]
    tables = [section.blocks[-1] for section in result.sections({})]
    told += [column.name for table in tables for column in table.columns]
    runs = runs_of("cosine")
    told += [run.info.run_name for run in runs]
    told += [run.data.tags["mlflow.note.content"] for run in runs]
    assert any("Adam with lr 0.003, along a cosine to 0" in text for text in told)
    assert not [text for text in told if "gamma" in text]
    assert not [run for run in runs if "best/gamma" in run.data.metrics]
    assert any("best/lr" in run.data.metrics for run in runs)
    rates = mlflow.MlflowClient().get_metric_history(part(runs, "trial")[0].info.run_id, "lr")
    assert rates[-1].value == pytest.approx(0.003 / 2)  # in the second of two epochs

    again = tune.tune(settings, experiment="cosine")
    assert again.rows == result.rows
    assert len(part(runs_of("cosine"), "trial")) == 4


def test_inside_an_mlflow_run_the_parent_is_that(tracked, monkeypatch):
    """As when MLflow's launcher or a notebook has opened one: it is nested below."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "notebook")
    with mlflow.start_run() as mine:
        result = tune.tune(config(tracked, "inner", trials=2, seeds=1))
    parent = mlflow.get_run(result.run.id)
    assert parent.data.tags["mlflow.parentRunId"] == mine.info.run_id


def test_a_setting_of_one_network_is_what_train_takes():
    """The command of a trial is that of a training."""
    network = TuneConfig(**QUICK).trial("he", 0.3, 0.9, 100)
    assert isinstance(network, TrainConfig)
    assert (network.lr, network.gamma, network.validation) == (0.3, 0.9, 100)

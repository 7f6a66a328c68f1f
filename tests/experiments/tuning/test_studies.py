"""Studies: what is asked and told, resumed wherever it was cut, in any storage, held by one."""

import dataclasses
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import sqlalchemy
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt

from initflow.core.configurations import ADDED, PRUNERS, SAMPLERS
from initflow.errors import GivenUpError, SettingError, StudyError
from initflow.experiments.tuning import running, samplers, searches, storages, studies
from initflow.experiments.tuning.running import RunningTrials
from initflow.experiments.tuning.searches import PendingTrial, Search
from initflow.experiments.tuning.studies import Study
from tests.conftest import ROOT

NAME = "digits"  # that a user knows the study by
SETTINGS = {"dataset": "digits", "lr_low": "0.001"}
FIRST = (0.1, 0.96)
UPDATES, EVERY = 40, 10
TOO_HIGH = 0.5  # the rate above which a training diverges


@pytest.fixture(autouse=True)
def _closed(monkeypatch):
    """No test finds a storage that another one has opened, or waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    storages.forget()
    yield
    storages.forget()


@pytest.fixture
def journal(tmp_path):
    return str(tmp_path / "studies" / "digits.journal")


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A database with Optuna's tables, which take a while to make."""
    file = tmp_path_factory.mktemp("empty") / "optuna.db"
    storages.open_storage(f"sqlite:///{file}").engine.dispose()
    storages.forget()
    return file


@pytest.fixture
def database(tmp_path, empty):
    shutil.copy(empty, tmp_path)
    return f"sqlite:///{tmp_path}/optuna.db"


@pytest.fixture
def shared(database, monkeypatch):
    """A database that is taken for one of several machines, where time goes fast."""
    monkeypatch.setattr(storages, "is_shared", lambda _: True)
    monkeypatch.setattr(storages, "STALE_S", 1)
    monkeypatch.setattr(storages, "HEARTBEAT_S", 1)
    storages.open_storage(database)  # Optuna's own clock has whole seconds
    monkeypatch.setattr(storages, "HEARTBEAT_S", 0.1)
    short = SimpleNamespace(monotonic=time.monotonic, sleep=lambda s: time.sleep(s / 10))
    for module in (storages, studies):
        monkeypatch.setattr(module, "time", short)
    return database


def searching(storage, **own):
    found = Search(
        storage=str(storage),
        name=f"{NAME}: he relu",
        lr=(1e-3, 1.0),
        gamma=(0.8, 1.0),
        sampler="random",
        pruner="none",
        seed=0,
        updates=UPDATES,
        eval_every=EVERY,
    )
    return dataclasses.replace(found, **own)


def opened(storage, described=SETTINGS, first=FIRST, **own):
    return Study(searching(storage, **own), described, first)


def reopened(storage, **own):
    """As another process would."""
    storages.forget()
    return opened(storage, **own)


def accuracy(lr, gamma, step):
    """Of a made-up network: highest at 0.1 and 0.95, and slow to rise for some rates."""
    off = 0.05 * (math.log10(lr) + 1) ** 2 + 0.3 * (gamma - 0.95) ** 2
    return round(0.97 - off - (1 + math.sin(1000 * lr)) / (step + 1), 4)


def carry_out(study, asked, told=None):
    """Train all that were ``asked`` for together, and tell the first ``told`` of them."""
    trying, running, ends = RunningTrials(study.search, asked), list(asked), {}
    for step in range(EVERY, UPDATES + 1, EVERY):
        for one in list(running):
            if one.lr > TOO_HIGH and step > EVERY:
                ends[one.number] = trying.diverged
            else:
                trying.report(one.number, step, accuracy(one.lr, one.gamma, step))
                if trying.should_prune(one.number):
                    ends[one.number] = trying.pruned
        running = [one for one in running if one.number not in ends]
    for one in asked[:told]:
        if one.number in ends:
            ends[one.number](one.number)
        else:
            trying.finished(one.number, accuracy(one.lr, one.gamma, UPDATES))


def whole(search, trials, batch):
    """What a process leaves that makes ``trials`` of the study, the earlier ones included."""
    with storages.locked(search.storage, NAME):
        study = Study(search, SETTINGS, FIRST)
        study.recover()
        while (begun := study.begun()) < trials:
            carry_out(study, study.ask(min(batch - begun % batch, trials - begun)))
        return results(study)


def results(study):
    """Setting and outcome of every trial, in the order they were asked for."""
    return [(t.lr, t.gamma, t.outcome, t.accuracy) for t in study.trials()]


def tried(study, *ends):
    """One trial after the other that ends so: an accuracy, None for one that failed."""
    for end in ends:
        (asked,) = study.ask(1)
        trying = RunningTrials(study.search, [asked])
        if end is None:
            trying.failed(asked.number, "no such thing")
            continue
        trying.report(asked.number, EVERY, abs(end))
        if end < 0:
            trying.diverged(asked.number)
        else:
            trying.finished(asked.number, end)


def by_optuna(search):
    """The study as Optuna itself shows it."""
    storage = storages.open_storage(search.storage)
    return optuna.load_study(study_name=search.name, storage=storage)


# What is asked


def test_the_untuned_setting_comes_first(journal):
    """Once, however often the study is opened; what follows is of the sampler."""
    assert [(one.number, one.lr, one.gamma) for one in opened(journal).ask(1)] == [(0, *FIRST)]
    others = reopened(journal).ask(3)
    assert not [one for one in others if (one.lr, one.gamma) == FIRST]


@pytest.mark.parametrize("first", [(2.0, 0.96), (1e-4, 0.96), (0.1, 0.5)])
def test_an_untuned_setting_out_of_bounds_is_not_tried(journal, first):
    """Nor moved to where the bounds are."""
    asked = opened(journal, first=first).ask(4)
    assert all(0.001 <= one.lr <= 1 and 0.8 <= one.gamma <= 1 for one in asked)
    assert first not in [(one.lr, one.gamma) for one in asked]


def test_the_bounds_are_within_them(journal):
    """Whoever sets a bound to the untuned value has it tried."""
    (asked,) = opened(journal, lr=(0.1, 1.0), gamma=(0.5, 0.96)).ask(1)
    assert (asked.lr, asked.gamma) == FIRST


def test_rates_are_searched_by_their_logarithm(journal):
    """As many below the geometric mean as above; gamma evenly."""
    asked = opened(journal, first=(9, 9)).ask(40)
    assert 12 < sum(one.lr < 10**-1.5 for one in asked) < 28
    assert 12 < sum(one.gamma < 0.9 for one in asked) < 28


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("lr", "gamma"),
    [((0.1, 0.1), (0.8, 1.0)), ((0.001, 1.0), (0.96, 0.96)), ((0.1, 0.1), (0.96, 0.96))],
)
def test_bounds_may_be_equal(journal, sampler, lr, gamma):
    """Then there is nothing to search of the two."""
    search = searching(journal, sampler=sampler, lr=lr, gamma=gamma)
    found = whole(search, 4, 2)
    assert found[0][:2] == FIRST
    assert all(lr[0] <= one[0] <= lr[1] and gamma[0] <= one[1] <= gamma[1] for one in found)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_gamma_may_not_be_searched(journal, sampler):
    """As along a cosine: trials have none, the first one has the untuned rate."""
    search = searching(journal, sampler=sampler, gamma=None)
    study = Study(search, SETTINGS, (FIRST[0], None))
    for _ in range(6):
        asked = study.ask(2)
        running = RunningTrials(search, asked)
        for one in asked:
            running.report(one.number, UPDATES, accuracy(one.lr, 0.95, UPDATES))
            running.finished(one.number, accuracy(one.lr, 0.95, UPDATES))
    found = study.trials()
    assert [one.number for one in found] == list(range(12))
    assert {one.gamma for one in found} == {None}
    assert found[0].lr == FIRST[0]
    assert len({one.lr for one in found}) == 12
    study.interrupt([one.number for one in study.ask(1)])  # and is tried again
    assert len(study.interrupted()) == 1
    assert set(study.figures()) == {"history", "slice"}


@pytest.mark.parametrize(
    "gamma",
    # Of a single setting, older versions of Optuna learn nothing.
    [pytest.param(None, marks=pytest.mark.needs("optuna>=5")), (0.8, 1.0)],
    ids=str,
)
def test_cmaes_learns_over_generations(journal, gamma):
    """What it learned is read back and goes on, also to a second generation and a third."""
    search = searching(journal, sampler="cmaes", gamma=gamma)
    study = Study(search, SETTINGS, (FIRST[0], FIRST[1] if gamma else None))
    for _ in range(15):
        asked = study.ask(2)
        trying = RunningTrials(search, asked)
        for one in asked:
            reached = accuracy(one.lr, one.gamma or 0.95, UPDATES)
            trying.report(one.number, UPDATES, reached)
            trying.finished(one.number, reached)
    learned = [t.number for t in study._all() if any("optimizer" in key for key in t.system_attrs)]
    assert len(learned) > 2
    assert len({one.lr for one in study.trials()}) == 30


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_learns_from_what_it_is_told(journal, tmp_path, sampler):
    """All but the random one ask for other settings where the accuracies were others."""

    def after(storage, sign):
        study = opened(storage, sampler=sampler)
        for _ in range(12):
            (one,) = study.ask(1)
            RunningTrials(study.search, [one]).finished(one.number, 0.5 + sign * one.lr / 3)
        return [(one.lr, one.gamma) for one in study.ask(1)]

    risen, fallen = after(journal, 1), after(str(tmp_path / "other.journal"), -1)
    assert (risen == fallen) == (sampler == "random")


def test_a_diverged_trial_is_learnt_from(journal):
    """TPE keeps away from the rates that diverged, which a failed trial would not make it do."""
    study = opened(journal, sampler="tpe", first=(9, 9))
    for one in study.ask(20):
        trying = RunningTrials(study.search, [one])
        if one.lr > 0.03:
            trying.diverged(one.number)
        else:
            trying.finished(one.number, 0.5)
    assert max(one.lr for one in study.ask(5)) < 0.1


def test_the_sampler_is_seeded(journal, tmp_path):
    """Another seed, other settings; another scheme's study begins with the same ones."""
    settings = [(one.lr, one.gamma) for one in opened(journal).ask(3)]
    named = [(one.lr, one.gamma) for one in opened(journal, name="digits: normal relu").ask(3)]
    other = opened(tmp_path / "other.journal", seed=1).ask(3)
    assert named == settings
    assert not {(one.lr, one.gamma) for one in other[1:]} & set(settings)


def test_a_sampler_that_is_not_there(monkeypatch):
    """One line says what to install."""
    monkeypatch.setattr(samplers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SettingError, match=r"^sampler=cmaes needs .*: pip install cmaes$"):
        samplers.check_sampler("cmaes")
    samplers.check_sampler("tpe")


# What is told


def test_how_trials_end(journal):
    """Optuna's state, value and marks of each end, and the trial that is made of it."""
    study = opened(journal)
    asked = study.ask(5)
    trying = RunningTrials(study.search, asked)
    for number, seen in enumerate([(0.5, 0.9, 0.8), (0.7, 0.3), (0.6,), (), (0.1,)]):
        for step, value in enumerate(seen, 1):
            trying.report(number, step * EVERY, value)
    trying.finished(0, 0.9)
    trying.diverged(1)
    trying.pruned(2)
    trying.failed(3, "ValueError: no")
    kept = by_optuna(study.search).trials
    states = ["COMPLETE", "COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    assert [trial.state.name for trial in kept] == states
    assert [trial.value for trial in kept] == [0.9, running.WORST, 0.6, None, None]
    assert kept[1].user_attrs[searches.DIVERGED] is True
    assert kept[3].user_attrs[searches.ERROR] == "ValueError: no"
    assert kept[0].intermediate_values == {10: 0.5, 20: 0.9, 30: 0.8}
    found = [(t.number, t.outcome, t.accuracy) for t in study.trials()]
    ends = [(0, "finished", 0.9), (1, "diverged", 0.7), (2, "pruned", 0.6), (3, "failed", None)]
    assert found == ends
    assert [(t.lr, t.gamma) for t in study.trials()] == [(a.lr, a.gamma) for a in asked[:4]]
    assert study.begun() == 5


def test_a_diverged_trial_is_never_the_best(journal):
    """Not for Optuna either, whatever was seen of it before."""
    study = opened(journal)
    tried(study, -0.99, 0.01)
    assert by_optuna(study.search).best_trial.number == 1


def test_a_failed_trial_counts(journal):
    """It would fail again: its place is not given to another."""
    study = opened(journal)
    tried(study, None, None, 0.5)
    study.recover()
    assert study.begun() == len(study.trials()) == 3
    assert study.interrupted() == []


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        ("report", "journal"),
        ("finished", "journal"),
        ("diverged", "journal"),
        ("pruned", "journal"),
        ("failed", "journal"),
        ("report", "database"),
        ("failed", "database"),
    ],
)
def test_what_was_given_up_meanwhile_is_not_told(request, kind, end):
    """One line of ours; the trial stays cut off and its other try is the one that counts."""
    study = opened(request.getfixturevalue(kind))
    (asked,) = study.ask(1)
    late = RunningTrials(study.search, [asked])
    study.interrupt([asked.number])
    given = {"report": (EVERY, 0.5), "finished": (0.5,), "failed": ("reason",)}.get(end, ())
    with pytest.raises(GivenUpError, match=r"^trial 0 of .* was given up meanwhile by another"):
        getattr(late, end)(0, *given)
    assert study.trials() == []
    assert study.interrupted() == [0]
    (again,) = study.ask(1)
    assert (again.number, again.lr, again.gamma) == (1, *FIRST)
    RunningTrials(study.search, [again]).finished(again.number, 0.9)
    assert results(study) == [(*FIRST, "finished", None)]


@pytest.mark.parametrize("pruner", PRUNERS)
def test_what_was_given_up_meanwhile_is_not_judged(journal, pruner):
    """Where the pruner keeps a mark of its own with it."""
    study = opened(journal, pruner=pruner)
    (asked,) = study.ask(1)
    late = RunningTrials(study.search, [asked])
    late.report(asked.number, EVERY, 0.5)
    study.interrupt([asked.number])
    if pruner == "hyperband":
        with pytest.raises(GivenUpError):
            late.should_prune(asked.number)
    else:
        assert not late.should_prune(asked.number)


def test_a_trial_is_told_once(journal):
    """What is through stays as it is, also when its worker is given up."""
    study = opened(journal)
    tried(study, 0.9)
    (asked,) = study.ask(1)
    study.interrupt([0, asked.number])
    assert results(study) == [(*FIRST, "finished", 0.9)]
    assert study.interrupted() == [1]


# Trials that are given up early


def pruned_at(study, curve, steps):
    """The step at which a trial that goes like ``curve`` is given up, or None."""
    (asked,) = study.ask(1)
    trying = RunningTrials(study.search, [asked])
    for step in steps:
        trying.report(asked.number, step, curve(step))
        if trying.should_prune(asked.number):
            trying.pruned(asked.number)
            return step
    trying.finished(asked.number, curve(steps[-1]))
    return None


def good(step):
    return 0.9 - 1 / (step + 2)


def bad(step):
    return 0.3 - 1 / (step + 2)


@pytest.mark.parametrize(("eval_every", "first"), [(10, 10), (3, 12), (7, 14)])
def test_the_median_waits_a_quarter_of_the_training(journal, eval_every, first):
    """Then the first evaluation that is below the median of those before it is the last."""
    study = opened(journal, pruner="median", eval_every=eval_every)
    steps = range(eval_every, UPDATES + 1, eval_every)
    assert [pruned_at(study, good, steps) for _ in range(samplers.STARTUP)] == [None] * 5
    assert pruned_at(study, bad, steps) == first
    assert pruned_at(study, good, steps) is None
    assert [trial.outcome for trial in study.trials()][5:] == ["pruned", "finished"]


def test_the_median_needs_trials_to_compare_with(journal):
    """Five that finished, of which one that was given up is none."""
    study = opened(journal, pruner="median")
    steps = range(EVERY, UPDATES + 1, EVERY)
    for _ in range(samplers.STARTUP - 1):
        assert pruned_at(study, good, steps) is None
    for one in study.ask(3):
        RunningTrials(study.search, [one]).pruned(one.number)
    assert pruned_at(study, bad, steps) is None
    assert pruned_at(study, bad, steps) == EVERY


@pytest.mark.parametrize(("pruner", "prunes"), [("hyperband", True), ("none", False)])
def test_other_pruners(journal, pruner, prunes):
    """Hyperband gives up most trials that are far behind; without a pruner none is."""
    study, steps = opened(journal, pruner=pruner), range(EVERY, UPDATES + 1, EVERY)
    for _ in range(6):
        pruned_at(study, good, steps)
    ends = [pruned_at(study, bad, steps) for _ in range(6)]
    assert any(ends) == prunes


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_training_of_one_evaluation(journal, pruner):
    """Which comes at its end, where there is nothing left to give up."""
    search = searching(journal, pruner=pruner, updates=5, eval_every=500)
    study = Study(search, SETTINGS, FIRST)
    for _ in range(8):
        (asked,) = study.ask(1)
        trying = RunningTrials(search, [asked])
        trying.report(asked.number, 5, 0.5)
        trying.should_prune(asked.number)
        trying.finished(asked.number, 0.5)
    assert study.begun() == 8


def test_a_batch_is_judged_by_those_before_it(journal, tmp_path):
    """So it is the same whether the device has room for all of it or for one after the other."""

    def pruned(storage, size):
        study = opened(storage, pruner="median")
        carry_out(study, study.ask(samplers.STARTUP))
        asked = study.ask(6)
        for begin in range(0, 6, size):
            carry_out(study, asked[begin : begin + size])
        return results(study)

    together = pruned(journal, 6)
    assert pruned(tmp_path / "other.journal", 1) == together
    assert "pruned" in [outcome for _, _, outcome, _ in together]


# The same again, and wherever it was cut


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("pruner", PRUNERS)
def test_the_same_again(tmp_path, sampler, pruner):
    """With one seed and one batch: the same settings and values."""
    first, second = (
        whole(searching(tmp_path / f"{i}.journal", sampler=sampler, pruner=pruner), 12, 4)
        for i in range(2)
    )
    assert first == second
    assert len({setting[:2] for setting in first}) == 12


@pytest.mark.parametrize("batch", [1, 3, 30])
def test_a_study_may_have_any_number_of_trials(journal, batch):
    """One, or fewer than a batch; more of them later, and none twice."""
    search = searching(journal, sampler="tpe")
    one = whole(search, 1, batch)
    five = whole(search, 5, batch)
    assert one == five[:1]
    assert whole(search, 5, batch) == whole(search, 2, batch) == five
    assert len({setting[:2] for setting in five}) == 5


class Cuttable:
    """An uninterrupted study in a journal, which holds a line for everything that was written.

    What a kill leaves is the journal's beginning, up to any line.
    """

    def __init__(self, folder, trials, batch, **own):
        self.file = Path(folder) / "a.journal"
        self.trials, self.batch = trials, batch
        self.search = searching(self.file, **own)
        self.expected = whole(self.search, trials, batch)
        self.content = self.lines

    @property
    def lines(self):
        return self.file.read_bytes().splitlines(keepends=True)

    def resumed(self, *cuts):
        """After kills, each at the place in what is written by then; a fraction of it."""
        self.file.write_bytes(b"".join(self.content))
        for cut in cuts:
            lines = self.lines
            self.file.write_bytes(b"".join(lines[: round(cut * len(lines))]))
            found = whole(self.search, self.trials, self.batch)
        return found


def test_resumed_after_a_kill_at_any_place(tmp_path):
    """Before and after everything that is ever written, be it asked, seen, told or set up."""
    study = Cuttable(tmp_path, 5, 2, pruner="median")
    total = len(study.content)
    assert total > 40
    for place in range(total + 1):
        assert study.resumed(place / total) == study.expected, study.content[place - 1 : place + 1]


RESUMED = [
    ("tpe", "none", 14, 4),
    ("tpe", "median", 14, 7),
    ("tpe", "hyperband", 13, 3),
    ("cmaes", "median", 14, 5),
    ("gp", "none", 12, 1),
]


@pytest.mark.parametrize(("sampler", "pruner", "trials", "batch"), RESUMED)
def test_resumed_after_kills(tmp_path_factory, sampler, pruner, trials, batch):
    """One after the other, also while it was resumed: the same settings in the same order."""
    folder = tmp_path_factory.mktemp("cut")
    study = Cuttable(folder, trials, batch, sampler=sampler, pruner=pruner)
    assert len({setting[:2] for setting in study.expected}) == trials

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=3))
    @settings(max_examples=2 if sampler == "gp" else 8)
    def same(cuts):
        assert study.resumed(*cuts) == study.expected

    same()


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=6))
@settings(max_examples=15)
def test_what_was_asked_for_and_not_told_is_asked_for_again(steps):
    """In its order, before anything new, after a process that told some of its batch."""
    with tempfile.TemporaryDirectory() as folder:
        file, ask = Path(folder) / "a.journal", []
        for n, told in steps:
            study = reopened(file)
            study.recover()
            asked = study.ask(n)
            new = [(one.lr, one.gamma) for one in asked]
            assert new[: len(ask)] == ask[:n]
            carry_out(study, asked, told)
            ask = new[told:] + ask[n:]
        left = reopened(file)
        left.recover()
        assert [(one.lr, one.gamma) for one in left.ask(len(ask))] == ask
        assert len(left.trials()) == len(set(results(left)))


def test_a_kill_while_what_was_cut_off_is_put_back(journal):
    """Some of it waits again, some does not: all is asked for in its order."""
    study = opened(journal)
    expected = [(one.lr, one.gamma) for one in study.ask(4)]
    study = reopened(journal)
    study.recover()
    study.ask(2)  # of the four
    study = reopened(journal)
    study.recover()
    study.recover()
    assert [(one.lr, one.gamma) for one in study.ask(4)] == expected
    assert study.begun() == 4


def test_a_batch_may_be_another_size_when_resumed(journal):
    """What was asked for stays; what comes then is chosen knowing other trials."""
    search = searching(journal, sampler="tpe", pruner="median")
    before = whole(search, 6, 3)
    after = whole(search, 13, 5)
    assert after[:6] == before
    assert len({setting[:2] for setting in after}) == 13


def test_a_cut_off_trial_does_not_count(journal):
    """It is listed by its number, and no result."""
    study = opened(journal)
    study.ask(3)
    study = reopened(journal)
    assert study.begun() == 3
    study.recover()
    assert (study.begun(), study.trials(), study.interrupted()) == (0, [], [0, 1, 2])
    assert [one.number for one in study.ask(2)] == [3, 4]


# Journals


@pytest.mark.parametrize(
    "name",
    ["a b/ü ~x.journal", "~/x.journal", "x.journal", "./../up.journal", "no-suffix", "%s{}.j"],
)
def test_journals_of_any_name(tmp_path, monkeypatch, name):
    """Relative to the working folder; folders are made."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with storages.locked(name, NAME):
        tried(opened(name), 0.5)
    assert Path(name).is_file()
    with storages.locked(name, NAME):
        assert results(opened(name)) == [(*FIRST, "finished", 0.5)]


def test_a_last_line_that_was_cut_is_mended(journal):
    """At every byte of the last lines: what was written before is there, and it goes on."""
    with storages.locked(journal, NAME):
        tried(opened(journal), 0.5, 0.6)
    file = Path(journal)
    content = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(ends[-3], len(content) + 1):
        file.write_bytes(content[:cut])
        storages.forget()
        storages.open_storage(journal)
        lasting = max(end for end in ends if end <= cut)
        assert file.read_bytes() == content[:lasting]
        if cut % 50 == 0:
            study = reopened(journal)
            study.recover()
            tried(study, *[0.6] * (2 - study.begun()))
            assert len(results(study)) == 2
            assert results(study)[0] == (*FIRST, "finished", 0.5)


@pytest.mark.parametrize("cut", [0, 1, 5, 11, 40])
def test_a_first_line_that_was_cut_is_mended(journal, cut):
    """There is nothing before it."""
    with storages.locked(journal, NAME):
        opened(journal)
    file = Path(journal)
    file.write_bytes(file.read_bytes()[:cut])
    with storages.locked(journal, NAME):
        assert len(opened(journal).ask(1)) == 1


FOREIGN = {
    "text": b"hello\nworld",
    "lines": b"hello\nworld\n",
    "json": b'{"a": 1}',
    "many": b'{"a": 1}\n{"b": 2}\n',
    "numbers": b"1\n2\n",
    "null": b"null\n",
    "bytes": bytes(range(256)),
    "sqlite": b"SQLite format 3\x00abc\ndef",
    "empty line": b"\n",
    "strange": b'{"op_code":99,"worker_id":"x"}\n',
    "less": b'{"op_code":0,"worker_id":"x"}\n',
    "broken": b'{"op_code":0,"worker_id":"x"\n{"op_code":0}\n',
    "other": b"\xff\xfe\n\x00",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_no_journal(tmp_path, content):
    """One line says so, and nothing of it is lost."""
    file = tmp_path / "mine.txt"
    file.write_bytes(content)
    with pytest.raises(StudyError, match=r"mine\.txt' is no journal of Optuna: ") as caught:
        opened(file)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        ("file/x.journal", r"(File exists|Not a directory)"),
        ("/proc/nowhere/x.journal", "No such file or directory"),
        ("n" * 300, "File name too long"),
        ("sqlite:///file/x.db", r"(File exists|Not a directory)"),
        (f"sqlite:///{'n' * 300}", "File name too long"),
    ],
)
def test_where_nothing_can_be_written(tmp_path, monkeypatch, storage, reason):
    """One line that names the place and the system's reason."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with (
        pytest.raises(StudyError, match=rf"^storage '{storage}' cannot be written: {reason}$"),
        storages.locked(storage, NAME),
    ):
        opened(storage)


def test_where_nothing_can_be_written_any_more(journal):
    """The same from a worker, which holds no lock."""
    with storages.locked(journal, NAME):
        study = opened(journal)
    search = dataclasses.replace(study.search, storage=f"{journal}/below")
    with pytest.raises(StudyError, match="cannot be written"):
        RunningTrials(search, [])


def test_a_journal_with_another_beside_it(tmp_path):
    """The default names of two studies are two files."""
    assert storages.journal(tmp_path, "mnist-relu-1234") == f"{tmp_path}/mnist-relu-1234.journal"
    assert storages.journal(tmp_path, "a") != storages.journal(tmp_path, "b")


# A study of that name


@pytest.mark.parametrize("kind", ["journal", "database"])
def test_a_study_of_other_settings(request, kind):
    """One line with what it had, what it has now, and what to do; the study is as it was."""
    storage = request.getfixturevalue(kind)
    tried(opened(storage), 0.5)
    with pytest.raises(SettingError) as caught:
        reopened(storage, described={"dataset": "mnist", "lr_low": "0.01"})
    assert str(caught.value) == (
        "study 'digits: he relu' is there already, with dataset=digits, lr_low=0.001, not "
        "dataset=mnist, lr_low=0.01; give study another name"
    )
    with pytest.raises(SettingError, match=r"with momentum=\?, not momentum=0\.9;"):
        reopened(storage, described=SETTINGS | {"momentum": "0.9"})
    assert len(reopened(storage).trials()) == 1


def test_a_study_of_an_earlier_version_goes_on(journal):
    """With the settings that all had before there was a choice, and with no others."""
    tried(opened(journal), 0.5)
    assert len(reopened(journal, described=SETTINGS | ADDED).trials()) == 1
    with pytest.raises(SettingError, match="with optimizer=sgd, not optimizer=adam;"):
        reopened(journal, described=SETTINGS | ADDED | {"optimizer": "adam"})


def test_a_study_that_is_not_ours(journal):
    """Of whoever used Optuna in the same file: not gone on with."""
    Path(journal).parent.mkdir()
    storage = storages.open_storage(journal)
    made = optuna.create_study(storage=storage, study_name="digits: he relu")
    made.add_trial(optuna.trial.create_trial(value=0.5))
    with pytest.raises(SettingError, match=r"is there already, with dataset=\?, .*another name$"):
        opened(journal)


def test_schemes_have_studies_of_their_own_in_one_storage(journal):
    """What one is told the other does not know."""
    one, other = opened(journal), opened(journal, name="digits: normal:std=0.1 relu")
    tried(one, 0.5, 0.6)
    assert (len(one.trials()), len(other.trials())) == (2, 0)


@pytest.mark.parametrize("kind", ["journal", "database"])
def test_studies_of_any_name(request, kind):
    """A scheme's spec is part of it."""
    storage = request.getfixturevalue(kind)
    names = ["digits: =1.py:f relu", "ü/b\nc", "'; --", "%s{}"]
    for name in names:
        opened(storage, name=name).ask(1)
    assert [reopened(storage, name=name).begun() for name in names] == [1] * 4


@pytest.mark.parametrize("kind", ["journal", "database"])
def test_what_is_remembered(request, kind):
    """Plain values, after it is opened again too, and the last of one key."""
    storage = request.getfixturevalue(kind)
    study = opened(storage)
    assert study.user_attr("initflow.tested") is None
    value = {"lr 0.1": {"curve": [[0, 0.1], [10, 0.97531]], "diverged_at": None, "é": "x" * 5000}}
    study.set_user_attr("initflow.tested", {"old": 1})
    study.set_user_attr("initflow.tested", value)
    assert reopened(storage).user_attr("initflow.tested") == value


# Held by one process


HOLDER = """
import sys
from initflow.experiments.tuning import storages
with storages.locked(sys.argv[1], sys.argv[3]), storages.locked(sys.argv[2], sys.argv[3]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time(journal, database):
    """Another one is refused in one line, until the holder is dead, however it died."""
    command = [sys.executable, "-c", HOLDER, journal, database, NAME]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        for storage in (journal, database):
            with (
                pytest.raises(StudyError, match=r"^study 'digits' is being tuned by another"),
                storages.locked(storage, NAME),
            ):
                pass
            with storages.locked(storage, "another"):
                pass
        holder.kill()
        holder.wait()
        for storage in (journal, database):
            with storages.locked(storage, NAME):
                assert len(opened(storage).ask(1)) == 1


@pytest.mark.parametrize("kind", ["journal", "database"])
def test_it_is_free_again(request, kind):
    """After its end, an error too; and what was opened is closed."""
    storage = request.getfixturevalue(kind)
    with pytest.raises(SettingError), storages.locked(storage, NAME):  # noqa: PT012 - two steps
        opened(storage)
        opened(storage, described={"dataset": "mnist"})
    assert storages.open_storage.cache_info().currsize == 0
    with storages.locked(storage, NAME):
        pass


# Databases


def test_a_study_in_a_database(database, tmp_path):
    """The same settings as in a journal; each trial begins with a heartbeat."""
    search = searching(database, pruner="median")
    found = whole(search, 6, 3)
    journal = searching(tmp_path / "a.journal", pruner="median")
    assert found == whole(journal, 6, 3)
    with storages.locked(database, NAME):
        study = Study(search, SETTINGS, FIRST)
        asked = study.ask(2)
        assert set(heartbeats_in(database)) >= {one.key for one in asked}
        study = Study(search, SETTINGS, FIRST)
        study.recover()
        assert [(a.lr, a.gamma) for a in study.ask(2)] == [(a.lr, a.gamma) for a in asked]


def heartbeats_in(database):
    """When each trial's was, by its key."""
    storage = storages.open_storage(database)
    with storage.engine.connect() as connection:
        rows = connection.execute(
            sqlalchemy.text("SELECT trial_id, heartbeat FROM trial_heartbeats")
        )
        return {key: str(when) for key, when in rows}


@pytest.mark.parametrize(
    ("storage", "instead"),
    [("a", f"a/{NAME}.journal"), ("sqlite:///a/", f"sqlite:///a/{NAME}.db")],
)
def test_a_folder_is_no_storage(tmp_path, monkeypatch, storage, instead):
    """It is told at once, with what would be one; nothing is left beside it."""
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    said = f"^storage must be a file, such as '{instead}', not '{storage}', which is a folder$"
    with pytest.raises(SettingError, match=said), storages.locked(storage, NAME):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_is_none(tmp_path, monkeypatch, url):
    """Nothing could go on there."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match="must outlive its process"), storages.locked(url, NAME):
        pass
    assert not list(tmp_path.iterdir())


def test_databases_of_any_name(tmp_path, monkeypatch):
    """As a file may have."""
    monkeypatch.chdir(tmp_path)
    url = "sqlite:///a b ü%~.db"
    with storages.locked(url, NAME):
        tried(opened(url), 0.5)
        assert len(opened(url).trials()) == 1


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        ("nosuch://host/x", "Can't load plugin: sqlalchemy.dialects:nosuch"),
        ("postgresql+nosuch://u:***@h/x", "Can't load plugin: .*nosuch"),
        ("oracle://u:***@h/x", "Failed to import DB access module"),
        ("sqlite://host/x.db", "Invalid SQLite URL"),
        ("sqlite ://x", "Could not parse"),
        ("://x", "Could not parse"),
        ("postgresql://u:***@h:port/x", "its port is no number"),
    ],
)
def test_a_database_that_is_none(storage, reason, tmp_path, monkeypatch):
    """One line, with what is missing and without the password."""
    monkeypatch.chdir(tmp_path)
    url = storage.replace("***", "s3cret")
    with (
        pytest.raises(SettingError, match=rf"not '.*': .*{reason}") as caught,
        storages.locked(url, NAME),
    ):
        opened(url)
    message = str(caught.value)
    assert f"not '{storage}': " in message
    assert message.startswith("storage must be a journal's path or a database's URL whose driver")
    assert "s3cret" not in message
    assert "\n" not in message


def test_a_server_that_does_not_answer(monkeypatch):
    """It is tried for a while, which the one line tells, with the server's reason."""
    pytest.importorskip("psycopg")
    monkeypatch.setattr(storages, "PATIENCE_S", 1.0)
    url = "postgresql+psycopg://me:s3cret@127.0.0.1:1/optuna"
    started = time.monotonic()
    with (
        pytest.raises(StudyError) as caught,
        storages.locked(url, NAME),
    ):
        opened(url)
    assert 1 <= time.monotonic() - started < 60
    message = str(caught.value)
    assert re.match(
        r"storage 'postgresql\+psycopg://me:\*\*\*@127\.0\.0\.1:1/optuna' cannot be used, "
        r"tried for \d+ s: ",
        message,
    )
    assert "refused" in message
    assert "\n" not in message


def test_a_server_that_answers_late(monkeypatch):
    """It is found when it is there."""
    attempts = []
    monkeypatch.setattr(storages.time, "sleep", lambda _: None)

    def connect():
        attempts.append(1)
        if len(attempts) < 3:
            raise storages.StorageInternalError("starting")
        return "there"

    assert storages._patiently(connect, "postgresql://h/x") == "there"


def test_a_database_that_fails_on_the_way(database):
    """One line, as from whatever else is asked of it."""
    study = opened(database)
    (asked,) = study.ask(1)
    trying = RunningTrials(study.search, [asked])
    with storages.open_storage(database).engine.begin() as connection:
        connection.execute(sqlalchemy.text("DROP TABLE trial_intermediate_values"))
        connection.execute(sqlalchemy.text("DROP TABLE study_user_attributes"))
    with pytest.raises(StudyError, match=r"^storage 'sqlite:.*' failed: .*no such table: trial_"):
        trying.report(asked.number, EVERY, 0.5)
    with pytest.raises(StudyError, match=r"^storage 'sqlite:.*' failed: .*no such table: study_"):
        study.set_user_attr("key", "value")


PASSWORDS = {
    "postgresql://u:s3cret@h/x": "postgresql://u:***@h/x",
    "postgresql://u:s3cret@h:5432/x": "postgresql://u:***@h:5432/x",
    "mysql+pymysql://:s3cret@h": "mysql+pymysql://:***@h",
    "postgresql://u:s3cret/@h/x": "postgresql://u:***@h/x",
    "postgresql://u:s3cret#?@h/x": "postgresql://u:***@h/x",
    "postgresql://u:s3cret%zz@h/x": "postgresql://u:***@h/x",
    "postgresql://u:s3[cret@h/x": "postgresql://u:***@h/x",
    "postgresql://u:p@s3cret@h/x": "postgresql://u:***@h/x",
    "postgresql://u:s3cret@h:port/x": "postgresql://u:***@h:port/x",
    "postgresql ://u:s3cret@h/x": "postgresql ://u:***@h/x",
    "postgresql://h/x?PASSWORD=s3cret&user=u": "postgresql://h/x?PASSWORD=***&user=u",
    "postgresql://u@h/x?sslpassword=s3cret": "postgresql://u@h/x?sslpassword=***",
    "postgresql ://u@h/x?password=s3cret": "postgresql ://u@h/x?password=***",
    "postgresql://h/x": "postgresql://h/x",
    "sqlite:///a.db": "sqlite:///a.db",
    "a:b@c.journal": "a:b@c.journal",
}


@pytest.mark.parametrize(("storage", "shown"), PASSWORDS.items())
def test_a_storage_is_shown_without_its_password(storage, shown):
    """Wherever it stands, and whatever is in it."""
    assert storages.shown(storage) == shown


@given(st.text("aZ0 ü€:/?#[]%&=+;'\"\\~*,$!|<>{}", min_size=1))
@settings(max_examples=30)
def test_no_password_is_shown(password):
    """Whatever is in it."""
    shown = storages.shown(f"postgresql://u:{password}QQ@host/name")
    assert "QQ" not in shown
    assert shown.endswith("host/name")


@pytest.mark.parametrize(
    ("storage", "database", "shared"),
    [
        ("a.journal", False, False),
        ("sqlite:///a.db", True, False),
        ("postgresql://h/x", True, True),
        ("mysql+pymysql://h/x", True, True),
    ],
)
def test_kinds_of_storage(storage, database, shared):
    """By which it is known who may be at work in it."""
    assert (storages.is_database(storage), storages.is_shared(storage)) == (database, shared)


# Heartbeats


def test_fresh_trials_of_another_process_are_left_alone(shared):
    """As long as its heartbeats come it is alive: one line says so, and nothing is cut off."""
    study = opened(shared)
    asked = study.ask(2)
    with (
        running.heartbeats(shared, lambda: asked),
        pytest.raises(StudyError, match=r"^study 'digits: he relu' is being tuned"),
    ):
        opened(shared).recover()
    assert study.interrupted() == []
    carry_out(study, asked)
    assert len(study.trials()) == 2


def test_stale_trials_are_tried_again(shared):
    """Also one that never had a heartbeat, as its process died first; not one that is fresh."""
    study = opened(shared)
    asked = study.ask(3)
    with storages.open_storage(shared).engine.begin() as connection:
        for statement in (
            "UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')",
            "UPDATE trials SET datetime_start = datetime('now', 'localtime', '-1 hour')",
            "DELETE FROM trial_heartbeats WHERE trial_id = :last",
        ):
            connection.execute(sqlalchemy.text(statement), {"last": asked[-1].key})
    storages.open_storage(shared).record_heartbeat(asked[0].key)
    other = opened(shared)
    other._interrupt_stale()
    assert other.interrupted() == [1, 2]
    carry_out(study, asked[:1])
    other.recover()
    settings = [(one.lr, one.gamma) for one in asked]
    assert [(one.lr, one.gamma) for one in other.ask(2)] == settings[1:]
    assert other.begun() == 3


def test_a_trial_that_ends_while_it_is_waited_for(shared):
    """Its process was alive, and is through: nothing is cut off, and nothing refused."""
    study = opened(shared)
    asked = study.ask(1)
    ending = threading.Timer(0.5, carry_out, [study, asked])
    ending.start()
    other = opened(shared)
    other.recover()
    ending.join()
    assert len(other.trials()) == 1
    assert other.interrupted() == []


def test_heartbeats_are_sent_while_it_lasts(shared, monkeypatch):
    """Again and again, for what is at hand at the time."""
    monkeypatch.setattr(storages, "HEARTBEAT_S", 0.02)
    study = opened(shared)
    at_hand = study.ask(2)
    storage = storages.open_storage(shared)
    sent = []
    monkeypatch.setattr(storage, "record_heartbeat", sent.append)
    with running.heartbeats(shared, lambda: at_hand):
        wait_until(lambda: sent.count(at_hand[1].key) > 1)
        gone = at_hand.pop()
        time.sleep(0.1)
        sent.clear()
        wait_until(lambda: len(sent) > 2)
    assert gone.key not in sent
    beats = len(sent)
    time.sleep(0.15)
    assert len(sent) == beats


def wait_until(come, seconds=60):
    end = time.monotonic() + seconds
    while not come():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_heartbeat_that_fails_is_no_failure(shared, monkeypatch):
    """The next one may arrive."""
    monkeypatch.setattr(storages, "HEARTBEAT_S", 0.01)
    storage, calls = storages.open_storage(shared), []

    def fails(key):
        calls.append(key)
        raise storages.StorageInternalError("gone")

    monkeypatch.setattr(storage, "record_heartbeat", fails)
    with running.heartbeats(shared, lambda: [PendingTrial(1, 0, 0.1, 0.9)]):
        wait_until(lambda: len(calls) > 2)


def test_a_journal_has_no_heartbeats(journal):
    """Its lock says all."""
    study = opened(journal)
    asked = study.ask(1)
    before = threading.active_count()
    with running.heartbeats(journal, lambda: asked):
        assert threading.active_count() == before


# Figures


PLOTS = {
    (): [],
    (0.9,): ["history"],
    (0.9, 0.8): ["history"],
    (0.5, 0.5, 0.5, -0.3): ["contour", "history", "slice"],
    (-0.1, -0.2, -0.3): [],
    (None, None): [],
    (0.0, -0.3, None, 0.0, 0.7): ["contour", "history", "importances", "slice"],
}


@pytest.mark.usefixtures("whole_figures")
@pytest.mark.parametrize(("ends", "names"), PLOTS.items(), ids=str)
def test_figures(journal, ends, names):
    """PNG files of those that the trials are enough for; pyplot keeps none of them."""
    study = opened(journal)
    tried(study, *ends)
    figures = study.figures()
    assert sorted(figures) == names
    for content in figures.values():
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", content[16:24])
        assert 300 < width < 4000
        assert 300 < height < 4000
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    "bounds",
    [
        {"lr": (0.1, 0.1), "gamma": (0.96, 0.96)},
        {"lr": (0.1, 0.1000001), "gamma": (0.96, 0.960001)},
    ],
    ids=str,
)
def test_figures_where_there_is_little_to_search(journal, bounds):
    """Or nothing: without a warning."""
    study = opened(journal, **bounds)
    tried(study, 0.9, 0.8, 0.7, 0.6)
    assert "history" in study.figures()
    assert plt.get_fignums() == []


def test_figures_of_a_study_on_its_way(journal):
    """Trials that are running, pruned or cut off are in nobody's way."""
    study = opened(journal)
    tried(study, 0.9, 0.8, 0.7)
    asked = study.ask(3)
    RunningTrials(study.search, asked).pruned(asked[0].number)
    study.interrupt([asked[1].number])
    assert set(study.figures()) == {"history", "slice", "contour", "importances"}

"""What trials say: the best of them, the rates it bears, and what tuning changes, in words."""

import csv
import io
import json
import math
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from initflow.reporting import formats, seed_statistics, sentences, trials
from initflow.reporting.seed_statistics import Cell, Outcome
from initflow.reporting.trials import (
    OUTCOMES,
    Trial,
    as_csv,
    as_json,
    best,
    tolerance,
    tolerated,
)
from tests.conftest import ROOT

IMAGES = 10_000  # whose counts the accuracies are
SETTING = "lr 0.1 and gamma 0.96"


def finished(lr, accuracy, number=0):
    return Trial(number, lr, 0.96, "finished", accuracy)


def trained(accuracies):
    """An outcome for each final test accuracy, under seeds from 1 on; None is one that diverged."""
    return [
        Outcome(seed, [(0, 0.1)], 7) if end is None else Outcome(seed, [(0, 0.1), (500, end)])
        for seed, end in enumerate(accuracies, 1)
    ]


def around(mean, apart=0.001, n=10):
    """Half above and half below, which makes the interval's half width 0.754 · ``apart``."""
    return [mean + apart, mean - apart] * (n // 2)


def shifted(mean):
    """Like :func:`around`, in another order of seeds: its distance to that varies."""
    return [mean + 0.001, mean + 0.001, mean - 0.001, mean - 0.001] * 2 + [mean] * 2


def with_relu(schemes):
    return {Cell(init, "relu"): trained(ends) for init, ends in schemes.items()}


accuracies = st.integers(0, IMAGES).map(lambda right: right / IMAGES)
rates = st.floats(1e-6, 1e3)
some_trials = st.lists(
    st.one_of(
        st.tuples(rates, st.just("finished"), accuracies),
        st.tuples(rates, st.sampled_from(["pruned", "diverged"]), st.none() | accuracies),
        st.tuples(rates, st.just("failed"), st.none()),
    ),
    max_size=12,
).map(lambda found: [Trial(i, lr, 0.9, *end) for i, (lr, *end) in enumerate(found)])


def finished_of(found):
    return [trial for trial in found if trial.outcome == "finished"]


# The best trial, and the rates near it


@given(some_trials)
@settings(max_examples=100)
def test_the_best_is_a_finished_trial_that_none_surpasses(found):
    """The first of equals; one that was given up or diverged is never it, however good it was."""
    ends = [trial.accuracy for trial in finished_of(found)]
    top = best(found)
    if not ends:
        assert top is None
        return
    assert top.outcome == "finished"
    assert top.accuracy == max(ends)
    assert top is next(t for t in finished_of(found) if t.accuracy == top.accuracy)


@given(some_trials)
@settings(max_examples=100)
def test_the_tolerance_is_the_range_of_rates_within_a_hundred_images_of_the_best(found):
    """Of finished trials; counted in images, which are whole."""
    counts = {trial.number: round(trial.accuracy * IMAGES) for trial in finished_of(found)}
    near = [t.lr for t in finished_of(found) if counts[t.number] >= max(counts.values()) - 100]
    assert tolerance(found) == ((min(near), max(near)) if near else None)


def test_a_whole_point_below_the_best_is_within_it():
    """For every count of images: no rounding of fractions decides it."""
    for right in range(101, IMAGES + 1):
        top, point_below = finished(0.1, right / IMAGES), finished(0.5, (right - 100) / IMAGES)
        lower = finished(0.9, (right - 101) / IMAGES)
        assert tolerance([top, lower, point_below]) == (0.1, 0.5)


@pytest.mark.parametrize(
    ("found", "top", "near"),
    [
        ([], None, None),
        ([Trial(0, 0.1, 0.9, "failed", None)], None, None),
        ([Trial(0, 0.1, 0.9, "diverged", 0.99), Trial(1, 0.1, 0.9, "pruned", 0.98)], None, None),
        ([finished(0.1, 0.0)], 0.0, (0.1, 0.1)),
        ([finished(0.1, 0.9), Trial(1, 2.0, 0.9, "diverged", 0.95)], 0.9, (0.1, 0.1)),
        ([finished(0.1, 0.9), finished(0.3, 0.905), finished(0.01, 0.8)], 0.905, (0.1, 0.3)),
        # The true range may have a gap.
        ([finished(0.1, 0.9), finished(0.2, 0.1), finished(0.4, 0.9)], 0.9, (0.1, 0.4)),
    ],
)
def test_best_and_tolerance_of(found, top, near):
    """By hand."""
    assert (best(found) and best(found).accuracy) == top
    assert tolerance(found) == near


def test_tuned_is_all_that_is_known_of_a_scheme():
    """Its best trial, how the trials ended, and two rows of its networks that were tested."""
    found = [
        finished(0.1, 0.96, 0),
        Trial(1, 0.9, 0.9, "diverged", 0.2),
        finished(0.2, 0.97, 2),
        Trial(3, 0.01, 0.9, "pruned", 0.3),
        Trial(5, 0.02, 0.9, "pruned", None),
    ]
    row = trials.tuned(Cell("he", "relu"), found, trained([0.98, 0.97]), trained([0.9, None]))
    assert row.best == found[2]
    assert (row.lr, row.gamma, row.accuracy) == (0.2, 0.96, 0.97)
    assert row.tolerance == (0.1, 0.2)
    assert row.counts == {"finished": 2, "pruned": 2, "diverged": 1, "failed": 0}
    assert tuple(row.counts) == OUTCOMES
    assert (row.tested.n, row.tested.mean, row.tested.diverged) == (2, pytest.approx(0.975), 0)
    assert (row.untuned.n, row.untuned.mean, row.untuned.diverged) == (1, 0.9, 1)


def test_a_scheme_without_a_finished_trial_has_no_setting():
    """Nor a network that was tested with one."""
    found = [Trial(0, 0.1, 0.9, "diverged", 0.2)]
    row = trials.tuned(Cell("normal", "relu"), found, [], trained([None, None]))
    assert (row.best, row.lr, row.gamma, row.accuracy, row.tolerance) == (None,) * 5
    assert (row.tested.n, row.untuned.diverged) == (0, 2)


@given(some_trials)
@settings(max_examples=30)
def test_every_trial_is_counted_once(found):
    """By its outcome."""
    row = trials.tuned(Cell("he", "relu"), found, [], [])
    assert sum(row.counts.values()) == len(found)
    assert all(row.counts[end] == sum(t.outcome == end for t in found) for end in OUTCOMES)


# In words


CHANGES = [
    (  # a difference that goes
        {"he": around(0.90), "xavier": shifted(0.95)},
        {"he": around(0.97), "xavier": shifted(0.97)},
        "What tuning changes: xavier no longer beats he.",
    ),
    (  # one that comes
        {"he": around(0.97), "xavier": shifted(0.97)},
        {"he": around(0.97), "xavier": shifted(0.95)},
        "What tuning changes: he beats xavier, by 2.0 ± 0.1 points.",
    ),
    (  # one that turns round
        {"he": around(0.90), "xavier": shifted(0.95)},
        {"he": around(0.97), "xavier": shifted(0.95)},
        "What tuning changes: he beats xavier, which beat it untuned.",
    ),
    (  # several, those of the largest difference first
        {"he": around(0.97), "xavier": shifted(0.97), "normal": around(0.50)},
        {"he": around(0.98), "xavier": shifted(0.97), "normal": around(0.98)},
        (
            "What tuning changes: he no longer beats normal; normal beats xavier, which beat it "
            "untuned; he beats xavier, by 1.0 ± 0.1 points."
        ),
    ),
    (  # a smaller lead is a lead
        {"he": around(0.97), "normal": shifted(0.50)},
        {"he": around(0.98), "normal": shifted(0.96)},
        "Tuning changes no verdict: he beats normal by 2.0 ± 0.1 points instead of 47.0 ± 0.1.",
    ),
    (  # of several, the widest
        {"he": around(0.97), "normal": shifted(0.50), "lecun": shifted(0.90)},
        {"he": around(0.98), "normal": shifted(0.90), "lecun": shifted(0.94)},
        (
            "Tuning changes no verdict: for one, he beats normal by 8.0 ± 0.1 points instead of "
            "47.0 ± 0.1."
        ),
    ),
    (  # nothing to tell before and after
        {"he": around(0.97), "xavier": shifted(0.97)},
        {"he": around(0.98), "xavier": shifted(0.98)},
        "Tuning changes no verdict: with it as without, no scheme is seen to beat another.",
    ),
    (  # trains only when tuned: a verdict that was not there before, beside a pair without one
        {"he": around(0.97), "xavier": shifted(0.97), "normal": [None] * 10},
        {"he": around(0.97), "xavier": shifted(0.97), "normal": around(0.90)},
        (
            "What tuning changes: he beats normal, by 7.0 ± 0.0 points: too few untuned trainings "
            "finished to compare them; xavier beats normal, by 7.0 ± 0.1 points: too few untuned "
            "trainings finished to compare them."
        ),
    ),
    (  # no trial of it finished, so that there is no network to be tested
        {"he": around(0.97), "xavier": shifted(0.97), "normal": shifted(0.90)},
        {"he": around(0.97), "xavier": shifted(0.97), "normal": []},
        (
            "What tuning changes: he no longer beats normal: too few tuned trainings finished to "
            "compare them; xavier no longer beats normal: too few tuned trainings finished to "
            "compare them."
        ),
    ),
]


@pytest.mark.parametrize(("untuned", "tuned", "change"), CHANGES)
def test_what_tuning_changes(untuned, tuned, change):
    """Word for word: of each pair of schemes whose verdict is another once they are tuned."""
    said = trials.tuning_sentences(with_relu(tuned), with_relu(untuned), SETTING)
    assert said[-1] == change
    assert len(said) == 3


def test_the_sentences_of_both_comparisons_come_first():
    """They are those of a comparison, each after what it is of."""
    untuned = with_relu({"he": around(0.90), "xavier": shifted(0.95)})
    tuned = with_relu({"he": around(0.97), "xavier": shifted(0.97)})
    said = trials.tuning_sentences(tuned, untuned, SETTING)
    (of_tuned,) = sentences.comparison_sentences(tuned, "Each at its best: ")
    (of_untuned,) = sentences.comparison_sentences(untuned, f"All at {SETTING}: ")
    assert said[:2] == [of_tuned, of_untuned]
    assert of_untuned == (
        "All at lr 0.1 and gamma 0.96: xavier beats he by 5.0 ± 0.1 points over 10 seeds."
    )


@pytest.mark.parametrize(
    ("untuned", "tuned"),
    [
        ({"he": around(0.9)}, {"he": around(0.97)}),
        ({"he": [0.9], "xavier": [0.8]}, {"he": [0.97], "xavier": [0.97]}),
        ({"he": [0.9, 0.9], "xavier": [None, None]}, {"he": [0.9, 0.9], "xavier": []}),
    ],
)
def test_nothing_is_said_of_a_change_where_no_two_schemes_are_compared(untuned, tuned):
    """One scheme alone, one seed, or none that finished."""
    assert len(trials.tuning_sentences(with_relu(tuned), with_relu(untuned), SETTING)) == 2


def verdicts(outcomes):
    """Who beats whom, of a comparison."""
    found = seed_statistics.differences(outcomes)
    return {(pair.better, pair.worse): pair for pair in found if pair.significant}


ends = st.lists(st.none() | accuracies, min_size=3, max_size=3)
schemes = st.fixed_dictionaries(dict.fromkeys(("he", "xavier", "normal"), ends))


@given(schemes, schemes)
@settings(max_examples=60)
def test_the_change_told_is_that_of_the_verdicts(untuned, tuned):
    """Whatever the accuracies are: told where a verdict comes, goes or turns, and only there."""
    untuned, tuned = with_relu(untuned), with_relu(tuned)
    said = trials.tuning_sentences(tuned, untuned, SETTING)[2:]
    before, after = verdicts(untuned), verdicts(tuned)
    changed = {frozenset(pair) for pair in before.keys() ^ after.keys()}
    if changed:
        (told,) = said
        assert told.startswith("What tuning changes: ")
        assert len(told.split("; ")) == len(changed)
        for better, worse in after.keys() - before.keys():
            assert f"{better} beats {worse}, " in told
        for better, worse in before.keys() - after.keys():
            if (worse, better) not in after:
                assert f"{better} no longer beats {worse}" in told
    else:
        assert all(told.startswith("Tuning changes no verdict: ") for told in said)
        assert not said or ("no scheme" in said[0]) == (not after)


def test_equal_changes_are_told_in_the_same_order_in_every_process():
    """Python's hash of a name, another in each process, decides nothing."""
    program = (
        "from tests.reporting.test_trials import *\n"
        "lasting = {name: around(0.9) for name in ('b', 'a')} | {'z': shifted(0.5)}\n"
        "print(trials.tuning_sentences(with_relu(lasting), with_relu(lasting), SETTING)[-1])\n"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    assert len({process.communicate()[0] for process in running}) == 1
    assert all(process.returncode == 0 for process in running)


# Files


def row_of(init="he", found=(), tested=(), untuned=()):
    return trials.tuned(Cell(init, "relu"), found, trained(tested), trained(untuned))


def test_the_files_have_every_number():
    """The same in both, those of the trials in the JSON file alone."""
    found = [finished(0.1, 0.96), Trial(1, 0.9, 0.9, "failed", None)]
    row = row_of("he", found, [0.98, 0.96], [0.9, 0.9])
    low, high = row.tested.low, row.tested.high
    values = {
        "init": "he",
        "activation": "relu",
        "lr": 0.1,
        "gamma": 0.96,
        "validation_accuracy": 0.96,
        "n": 2,
        "test_accuracy_mean": 0.97,
        "test_accuracy_low": low,
        "test_accuracy_high": high,
        "untuned_accuracy_mean": 0.9,
        "untuned_accuracy_low": 0.9,
        "untuned_accuracy_high": 0.9,
        "lr_tolerated_low": 0.1,
        "lr_tolerated_high": 0.1,
        "finished": 1,
        "pruned": 0,
        "diverged": 0,
        "failed": 1,
    }
    content = as_json([row], {row.cell: found}, ["Said."])
    (kept,) = content["rows"]
    assert kept.pop("trials") == [
        {"number": 0, "lr": 0.1, "gamma": 0.96, "outcome": "finished", "accuracy": 0.96},
        {"number": 1, "lr": 0.9, "gamma": 0.9, "outcome": "failed", "accuracy": None},
    ]
    assert kept == values
    assert content["sentences"] == ["Said."]
    (line,) = csv.DictReader(io.StringIO(as_csv([row])))
    assert line == {name: str(value) for name, value in values.items()}


def test_what_is_not_known_is_null_or_empty():
    """Never NaN, which is no JSON."""
    row = row_of("normal", [Trial(0, 0.1, 0.9, "diverged", None)], [], [None])
    content = json.loads(json.dumps(as_json([row], {row.cell: []}, []), allow_nan=False))
    unknown = {name for name, value in content["rows"][0].items() if value is None}
    assert {"lr", "gamma", "validation_accuracy", "lr_tolerated_low"} < unknown
    (line,) = csv.DictReader(io.StringIO(as_csv([row])))
    assert {name for name, value in line.items() if not value} == unknown
    assert line["diverged"] == "1"


@pytest.mark.parametrize("init", ["=1.py:f", "+x", "@sum", 'a "b", c', "ü\nx"])
def test_a_scheme_of_any_name_survives_the_files(init):
    """As text, which a spreadsheet does not compute."""
    (line,) = csv.DictReader(io.StringIO(as_csv([row_of(init)])))
    assert line["init"] == (f"'{init}" if init[0] in "=+@" else init)


# Numbers as text


@pytest.mark.parametrize(
    ("near", "text"),
    [
        (None, "–"),
        ((0.02, 0.3), "0.02 to 0.3 (×15)"),
        ((0.1, 0.1), "0.1 to 0.1 (×1)"),
        ((0.1, 0.123), "0.1 to 0.123 (×1.2)"),
        ((0.01, 0.0999), "0.01 to 0.0999 (×10)"),
        ((0.001, 0.5), "0.001 to 0.5 (×500)"),
        ((0.0001, 1.0), "0.0001 to 1 (×10000)"),
        ((1e-5, 0.123), "1e-05 to 0.123 (×12000)"),
    ],
)
def test_a_tolerance_in_words(near, text):
    """How many times the highest is the lowest, in two digits, without an exponent."""
    assert tolerated(near) == text


@given(rates)
@settings(max_examples=30)
def test_a_rate_has_three_digits(value):
    """None is a dash."""
    assert math.isclose(float(formats.rounded(value)), value, rel_tol=0.005)
    assert formats.rounded(None) == formats.NONE

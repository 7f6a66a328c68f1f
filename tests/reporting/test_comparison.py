"""Comparison of schemes over seeds: scipy's tests, published examples, simulations, exact texts."""

import csv
import dataclasses
import io
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from initflow.reporting import seed_statistics, sentences, thinning
from initflow.reporting.seed_statistics import (
    Cell,
    Difference,
    Measure,
    Outcome,
    as_csv,
    as_json,
    differences,
    rows,
)

IMAGES = 10_000  # whose counts the accuracies are


def trained(accuracies, first_seed=0):
    """An outcome for each final accuracy; None is a training that diverged."""
    return [
        Outcome(seed, [(0, 0.1)], 7) if end is None else Outcome(seed, [(0, 0.1), (500, end)])
        for seed, end in enumerate(accuracies, first_seed)
    ]


def with_relu(schemes):
    return {Cell(init, "relu"): trained(ends) for init, ends in schemes.items()}


def around(mean, apart, n=10):
    """Accuracies as far from their mean as ``apart``, half above and half below.

    The half width of the interval is t · apart · √(n / (n - 1)) / √n = t · apart / √(n - 1), with
    the t of n - 1 degrees of freedom: 0.754 · apart of 10, 1.837 · apart of 4.
    """
    return [mean + apart, mean - apart] * (n // 2)


def sentence(schemes):
    (text,) = sentences.comparison_sentences(with_relu(schemes))
    return text


accuracies = st.integers(0, IMAGES).map(lambda right: right / IMAGES)
endings = st.lists(st.none() | accuracies, max_size=6)
comparisons = st.dictionaries(
    st.builds(Cell, st.sampled_from(["he", "xavier", "normal"]), st.sampled_from(["relu", "elu"])),
    endings.map(trained),
    max_size=6,
)


# Rows


@pytest.mark.parametrize(
    ("ends", "half"),
    [  # t of n - 1 degrees of freedom from any table: 12.7062, 4.3027, 2.7764
        ([0.97, 0.98], 12.7062 * 0.005),
        ([0.96, 0.97, 0.98], 4.3027 * 0.01 / math.sqrt(3)),
        ([0.95, 0.96, 0.97, 0.98, 0.99], 2.7764 * math.sqrt(0.00025 / 5)),
    ],
)
def test_the_interval_of_a_mean_is_that_of_the_tables(ends, half):
    """Mean, sample standard deviation and interval, worked out by hand."""
    (row,) = rows(with_relu({"he": ends}))
    assert (row.n, row.diverged) == (len(ends), 0)
    assert row.mean == pytest.approx(sum(ends) / len(ends))
    assert row.std == pytest.approx(np.std(ends, ddof=1))
    assert row.low == pytest.approx(row.mean - half, rel=1e-5)
    assert row.high == pytest.approx(row.mean + half, rel=1e-5)


@given(st.lists(accuracies, min_size=2, max_size=12).filter(lambda ends: len(set(ends)) > 1))
@settings(max_examples=30)
def test_the_interval_of_a_mean_is_scipys(ends):
    """As scipy inverts its t-test."""
    (row,) = rows(with_relu({"he": ends}))
    low, high = stats.ttest_1samp(ends, 0.5).confidence_interval(0.95)
    assert (row.low, row.high) == pytest.approx((low, high), rel=1e-9, abs=1e-12)


def test_the_interval_of_a_mean_covers_it():
    """In 95 of 100 comparisons, where accuracies are normally distributed."""
    ends = np.random.default_rng(0).normal(0.9, 0.01, (2_000, 5))
    found = rows({Cell(f"{i}", "relu"): trained(five) for i, five in enumerate(ends.tolist())})
    covered = sum(row.low <= 0.9 <= row.high for row in found) / len(found)
    assert covered == pytest.approx(0.95, abs=0.015)


def test_a_seed_that_diverged_has_no_accuracy():
    """It is counted, and the others make up the mean."""
    (row,) = rows(with_relu({"normal": [0.9, None, 0.92, None]}))
    assert (row.n, row.diverged) == (2, 2)
    assert row.mean == pytest.approx(0.91)


@pytest.mark.parametrize(
    ("ends", "mean", "n", "diverged"),
    [([0.9], 0.9, 1, 0), ([0.9, None], 0.9, 1, 1), ([None], None, 0, 1), ([], None, 0, 0)],
)
def test_no_interval_is_claimed_for_fewer_than_two(ends, mean, n, diverged):
    """Nor a standard deviation; nor a mean of none."""
    row = seed_statistics.Row(Cell("he", "relu"), n, mean, None, None, None, None, None, diverged)
    if mean == 0.9:
        row = dataclasses.replace(row, to_90=500)
    assert rows(with_relu({"he": ends})) == [row]


def test_equal_accuracies_have_an_interval_of_no_width():
    """Exactly, whatever 0.1 is in binary."""
    (row,) = rows(with_relu({"zero": [0.1135] * 7}))
    assert (row.mean, row.std, row.low, row.high) == (0.1135, 0, 0.1135, 0.1135)


def curve(*points, diverged_at=None):
    return Outcome(0, points, diverged_at)


@pytest.mark.parametrize(
    ("outcomes", "to_90", "to_95"),
    [
        ([curve((0, 0.1), (500, 0.9), (1000, 0.95))], 500, 1000),
        ([curve((0, 0.1), (500, 0.91), (1000, 0.89), (1500, 0.93))], 500, None),
        ([curve((0, 0.96))], 0, 0),
        # The median of three, one of which never got there.
        ([curve((500, 0.9)), curve((500, 0.1)), curve((500, 0.1), (900, 0.9))], 900, None),
        # The lower one of two, and of four, so that something was measured then.
        ([curve((500, 0.9)), curve((600, 0.9))], 500, None),
        ([curve((500, 0.9)), curve((500, 0.1))], 500, None),
        ([curve((i, 0.99)) for i in (400, 100, 300, 200)], 200, 200),
        # More than half never did.
        ([curve((500, 0.9)), *[curve((500, 0.1))] * 2], None, None),
        # One that diverged counts as all others do.
        ([curve((500, 0.96), diverged_at=900)], 500, 500),
        ([curve((500, 0.96)), *[curve((0, 0.1), diverged_at=3)] * 2], None, None),
        ([curve()], None, None),
    ],
)
def test_iterations_to_an_accuracy(outcomes, to_90, to_95):
    """The first that shows it, in the lower median over all seeds, or none."""
    (row,) = rows({Cell("he", "relu"): outcomes})
    assert (row.to_90, row.to_95) == (to_90, to_95)


def test_rows_are_in_the_order_given():
    """Of the mapping, not of the names or the accuracies."""
    cells = [Cell("xavier", "tanh"), Cell("he", "relu"), Cell("he", "tanh")]
    found = rows({cell: trained([0.9, 0.8]) for cell in cells})
    assert [row.cell for row in found] == cells
    assert str(found[1].cell) == "he relu"


# Differences


def test_students_own_example():
    """Extra sleep of ten patients under two drugs: t = 4.06 (Biometrika 6, 1908), with R's digits.

    R's ``t.test(sleep$extra[11:20], sleep$extra[1:10], paired = TRUE)`` gives p = 0.002833 and
    the interval from 0.7001142 to 2.4598858.
    """
    one = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    two = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    (found,) = differences(with_relu({"one": one, "two": two}))
    assert (found.better, found.worse, found.n) == ("two", "one", 10)
    assert found.effect == pytest.approx(1.58)
    assert (found.low, found.high) == pytest.approx((0.7001142, 2.4598858), abs=5e-8)
    assert found.p == found.p_holm == pytest.approx(0.002833, abs=5e-7)
    assert found.largest == found.high
    assert found.significant


@given(st.lists(st.tuples(accuracies, accuracies), min_size=2, max_size=12))
@settings(max_examples=40)
def test_differences_are_scipys(pairs):
    """Of the paired t-test, which has no answer where all differences are equal."""
    one, other = zip(*pairs, strict=True)
    (found,) = differences(with_relu({"one": one, "other": other}))
    above = [round(a * IMAGES) - round(b * IMAGES) for a, b in pairs]
    assert found.better == ("one" if sum(above) >= 0 else "other")
    assert found.effect == pytest.approx(abs(sum(above)) / len(above) / IMAGES, abs=1e-12)
    if len(set(above)) == 1:
        assert (found.low, found.high) == (found.effect, found.effect)
        assert found.p == (0 if any(above) else 1)
        return
    sides = (one, other) if found.better == "one" else (other, one)
    expected = stats.ttest_rel(*sides)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(interval), abs=1e-9)
    assert (found.p <= 0.05) == (found.low >= 0) or found.p == pytest.approx(0.05)
    assert found.largest == max(abs(found.low), abs(found.high))


@pytest.mark.parametrize(
    ("one", "other", "better", "effect", "p"),
    [
        ([0.1135] * 3, [0.1135] * 3, "one", 0, 1),
        ([0.9, 0.8, 0.7], [0.9, 0.8, 0.7], "one", 0, 1),
        ([0.9761, 0.9753, 0.3], [0.9751, 0.9743, 0.299], "one", 0.001, 0),
        ([0.1, 0.1], [0.3, 0.3], "other", 0.2, 0),
    ],
)
def test_differences_that_are_all_equal(one, other, better, effect, p):
    """They have an interval of no width, though no two of them are equal in binary."""
    (found,) = differences(with_relu({"one": one, "other": other}))
    worse = "other" if better == "one" else "one"
    assert found == Difference(
        "relu", better, worse, len(one), effect, effect, effect, p, found.p_holm
    )
    assert found.p_holm == p
    assert math.copysign(1, found.low) == 1  # nothing is -0.0


def test_seeds_are_matched_by_number():
    """Not by place; what one of the two did not finish is left out."""
    one = trained([0.5, 0.6, 0.7, None, 0.9])
    other = trained([0.58, 0.71, 0.8, 0.9], first_seed=1)[::-1]
    (found,) = differences({Cell("one", "relu"): one, Cell("other", "relu"): other})
    assert (found.better, found.n) == ("one", 3)  # seeds 1, 2 and 4: 0.02, -0.01 and 0.0
    expected = stats.ttest_1samp([0.02, -0.01, 0.0], 0)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.effect == pytest.approx(0.01 / 3)


@pytest.mark.parametrize("other", [[0.9], [None, 0.8, None], [None] * 3, []])
def test_pairs_that_share_fewer_than_two_seeds_are_left_out(other):
    """Nothing can be said of them."""
    assert differences(with_relu({"he": [0.9, 0.8, 0.7], "normal": other})) == []


def test_all_pairs_with_one_activation_are_compared():
    """None with another, in the order given; Holm's correction is for all of them."""
    cells = [("c", "tanh"), ("a", "relu"), ("b", "tanh"), ("a", "tanh"), ("b", "relu")]
    ends = {Cell(*cell): trained(around(0.9 + i / 100, 0.01, 4)) for i, cell in enumerate(cells)}
    found = differences(ends)
    assert [(d.activation, {d.better, d.worse}) for d in found] == [
        ("tanh", {"c", "b"}),
        ("tanh", {"c", "a"}),
        ("tanh", {"b", "a"}),
        ("relu", {"a", "b"}),
    ]
    assert [d.p_holm for d in found] == naive_holm([d.p for d in found])


@given(comparisons, st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_the_order_of_the_seeds_says_nothing(outcomes, shuffler):
    """To the last bit."""
    shuffled = {cell: shuffler.sample(seeds, len(seeds)) for cell, seeds in outcomes.items()}
    assert rows(shuffled) == rows(outcomes)
    assert differences(shuffled) == differences(outcomes)
    assert sentences.comparison_sentences(shuffled) == sentences.comparison_sentences(outcomes)


# Holm's method


def naive_holm(p_values):
    """By its definition: the largest, over all that are not larger, of p times those not smaller.

    Of equal ones the first is taken for the smaller.
    """
    ranked = sorted((p, i) for i, p in enumerate(p_values))
    return [
        max(
            min(1.0, p * sum(other >= (p, i) for other in ranked))
            for p, i in ranked
            if (p, i) <= (mine, j)
        )
        for j, mine in enumerate(p_values)
    ]


def rejected(p_values, alpha):
    """Holm's own words: test the smallest at α / m, the next at α / (m - 1), until one fails."""
    kept = set()
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[i] > alpha / (len(p_values) - rank):
            break
        kept.add(i)
    return kept


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        # Wikipedia, "Holm-Bonferroni method": the first and the last are rejected at 5 %.
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        # The example of R's HDLSSkST::Holm: the third and the last are rejected at 5 %.
        (
            [0.50, 0.01, 0.001, 0.69, 0.02, 0.05, 0.0025],
            [1.0, 0.05, 0.007, 1.0, 0.08, 0.15, 0.015],
        ),
        ([0.03], [0.03]),
        ([0.6, 0.6], [1.0, 1.0]),
        ([0.0, 0.0, 1.0], [0.0, 0.0, 1.0]),
        ([], []),
    ],
)
def test_published_examples_of_holms_method(p_values, corrected):
    """Their corrected p-values."""
    assert seed_statistics._holm(p_values) == pytest.approx(corrected)


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holms_method_is_its_definition(p_values):
    """No smaller than p, in the order of p, at most 1; and it rejects what Holm does."""
    corrected = seed_statistics._holm(p_values)
    assert corrected == naive_holm(p_values)
    assert all(p <= p_holm <= 1 for p, p_holm in zip(p_values, corrected, strict=True))
    in_order = [p_holm for _, p_holm in sorted(zip(p_values, corrected, strict=True))]
    assert in_order == sorted(in_order)
    for alpha in (0.05, 0.3):
        if not any(p_holm == pytest.approx(alpha) for p_holm in corrected):
            found = {i for i, p_holm in enumerate(corrected) if p_holm <= alpha}
            assert found == rejected(p_values, alpha)


def test_schemes_that_do_not_differ_are_seldom_told_apart():
    """Any two of four, in one comparison of twenty or fewer; each pair's interval covers 0."""
    ends = np.random.default_rng(1).normal(0.9, 0.01, (500, 4, 6))
    ends += np.random.default_rng(2).normal(0, 0.02, (500, 1, 6))  # what a seed gives to all
    found = [
        differences(with_relu({f"{i}": six for i, six in enumerate(schemes)}))
        for schemes in ends.tolist()
    ]
    assert all(len(pairs) == 6 for pairs in found)
    wrong = sum(any(pair.significant for pair in pairs) for pairs in found) / len(found)
    assert 0.02 < wrong < 0.05 + 2 * math.sqrt(0.05 * 0.95 / len(found))
    covered = [pair.low <= 0 <= pair.high for pairs in found for pair in pairs]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.015)


# Sentences

TEN = {
    "xavier": around(0.9755, 0.0018),
    "normal": around(0.927, 0.004),
    "he": [0.976] * 10,
    "random": around(0.964, 0.0013),
}
FIRST_OF_TEN = "he beats normal by 4.9 ± 0.3 points and random by 1.2 ± 0.1"


@pytest.mark.parametrize(
    ("schemes", "text"),
    [
        (
            TEN,
            f"{FIRST_OF_TEN}; between he and xavier 10 seeds show no difference larger than 0.2.",
        ),
        # Without one that does as well, the number of seeds is told with those that are beaten.
        (
            {"he": TEN["he"], "random": TEN["random"]},
            "he beats random by 1.2 ± 0.1 points over 10 seeds.",
        ),
        (
            {"he": TEN["he"], "xavier": TEN["xavier"]},
            "Between he and xavier 10 seeds show no difference larger than 0.2 points.",
        ),
        (
            TEN | {"lecun": around(0.9754, 0.005)},
            (
                f"{FIRST_OF_TEN}; between he and xavier 10 seeds show no difference larger than "
                "0.2 and between he and lecun none larger than 0.5."
            ),
        ),
        # Narrow intervals get more decimals, and what is told apart looks so.
        (
            {"he": [0.976] * 10, "lecun": around(0.9757, 0.0002)},
            "he beats lecun by 0.030 ± 0.015 points over 10 seeds.",
        ),
        (
            {"he": [0.976] * 10, "lecun": around(0.9746, 0.0018)},
            "he beats lecun by 0.140 ± 0.136 points over 10 seeds.",
        ),
        (
            {"he": [0.976] * 10, "lecun": around(0.97595, 0.0003)},
            "Between he and lecun 10 seeds show no difference larger than 0.028 points.",
        ),
        # Intervals without width.
        (
            {"constant": [0.1135] * 3, "zero": [0.1135] * 3, "he": [0.976] * 3},
            "he beats constant by 86.2 ± 0.0 points and zero by 86.2 ± 0.0 over 3 seeds.",
        ),
        (
            {"constant": [0.1135] * 3, "zero": [0.1135] * 3},
            "Between constant and zero 3 seeds show no difference at all.",
        ),
        (
            {"a": [0.5, 0.5, 0.5], "b": [0.4999, 0.4999, 0.4999]},
            "a beats b by 0.01 ± 0.00 points over 3 seeds.",
        ),
        # An interval that leaves 0 out, but not after Holm's correction for three pairs.
        (
            {"he": [0.976] * 4, "random": around(0.960, 0.007, 4), "b": around(0.9759, 0.01, 4)},
            (
                "he may beat random by 1.6 ± 1.3 points over 4 seeds, too few to settle it; "
                "between he and b 4 seeds show no difference larger than 1.9."
            ),
        ),
        # So few seeds that any difference is possible.
        ({"he": [0.98, 0.97], "x": [0.9, 0.1]}, "2 seeds are too few to tell he from x."),
        # One scheme.
        ({"he": around(0.976, 0.0013)}, "he reaches 97.6 ± 0.1 % over 10 seeds."),
        ({"he": around(0.976, 0.0003)}, "he reaches 97.600 ± 0.023 % over 10 seeds."),
        ({"zero": [0.1135] * 2}, "zero reaches 11.3 ± 0.0 % over 2 seeds."),
        (
            {"he": [0.976]},
            "he reaches 97.6 % with one seed: more seeds would say how sure that is.",
        ),
        # One seed.
        (
            {"he": [0.976], "xavier": [0.97]},
            "he is first with 97.6 %, but one seed shows no difference: use more seeds.",
        ),
        (
            {"he": [0.976], "b": [0.976], "c": [0.1]},
            "he and b are first with 97.6 %, but one seed shows no difference: use more seeds.",
        ),
        (
            {"he": [0.976, None], "xavier": [None, 0.97]},
            (
                "he is first with 97.6 %, but one seed shows no difference; he and xavier diverged "
                "with 1 of 2 seeds."
            ),
        ),
        (
            {"he": [0.976], "normal": [None]},
            (
                "he reaches 97.6 % with one seed: more seeds would say how sure that is; normal "
                "diverged with the only seed."
            ),
        ),
        ({"he": [0.976, None]}, "he reaches 97.6 % with one seed; he diverged with 1 of 2 seeds."),
        # Seeds that diverged.
        (
            TEN | {"normal": TEN["normal"][:8] + [None] * 2},
            (
                "he beats normal by 4.9 ± 0.4 points (8 shared seeds) and random by 1.2 ± 0.1 (10 "
                "seeds); between he and xavier 10 seeds show no difference larger than 0.2; normal "
                "diverged with 2 of 10 seeds."
            ),
        ),
        (
            {"he": TEN["he"], "normal": TEN["normal"][:8] + [None] * 2, "random": [None] * 10},
            (
                "he beats normal by 4.9 ± 0.4 points over 8 shared seeds; normal diverged with 2 "
                "of 10 seeds and random with all 10 seeds."
            ),
        ),
        (
            {"he": TEN["he"], "normal": [*TEN["normal"][:9], None], "xavier": TEN["xavier"]},
            (
                "he beats normal by 4.9 ± 0.3 points over 9 shared seeds; between he and xavier 10 "
                "seeds show no difference larger than 0.2; normal diverged with 1 of 10 seeds."
            ),
        ),
        (
            {"he": TEN["he"], "a": around(0.975, 0.005), "b": [*around(0.975, 0.008, 8), None]},
            (
                "Between he and a 10 seeds show no difference larger than 0.5 points and between "
                "he and b 8 shared seeds show none larger than 0.9; b diverged with 1 of 9 seeds."
            ),
        ),
        (
            {"he": [0.976] * 3, "normal": [None, 0.9, None], "zero": [None] * 3},
            (
                "he reaches 97.6 ± 0.0 % over 3 seeds; he and normal finished only one seed in "
                "common, too few to compare; normal diverged with 2 of 3 seeds and zero with all 3 "
                "seeds."
            ),
        ),
        (
            {"he": [0.97, 0.98, None, None], "normal": [None, None, 0.9, 0.9]},
            (
                "he reaches 97.5 ± 6.4 % over 2 seeds; he and normal finished no seed in common, "
                "too few to compare; he and normal diverged with 2 of 4 seeds."
            ),
        ),
        # The mean of the first is not above on the seeds that both finished.
        (
            {"a": [0.90] * 4 + [None] * 4, "b": around(0.92, 0.001, 4) + [0.5] * 4},
            "b beats a by 2.0 ± 0.2 points over 4 shared seeds; a diverged with 4 of 8 seeds.",
        ),
        # A single seed can be set against nothing, however well it did.
        (
            {"a": [0.99, None], "b": [0.9, 0.92]},
            (
                "b reaches 91.0 ± 12.7 % over 2 seeds; b and a finished only one seed in common, "
                "too few to compare; a diverged with 1 of 2 seeds."
            ),
        ),
        # Nothing to tell of.
        (
            {"he": [None] * 10, "normal": [None] * 10},
            "No training finished; he and normal diverged with all 10 seeds.",
        ),
        ({"he": [None] * 2}, "No training finished; he diverged with both seeds."),
        ({"he": [], "normal": []}, "No training finished."),
        (
            {"he": [0.976] * 2, "normal": []},
            "he reaches 97.6 ± 0.0 % over 2 seeds; normal finished no seed.",
        ),
    ],
)
def test_what_is_said(schemes, text):
    """To the letter, of every kind of comparison."""
    assert sentence(schemes) == text


def test_each_activation_has_its_sentence():
    """Those that tell schemes apart come first, by how far, then the others as they are given."""
    level = {"he": TEN["he"], "xavier": TEN["xavier"]}
    given_order = {
        "elu": level,
        "gelu": {"he": [None]},
        "tanh": {"he": TEN["he"], "random": TEN["random"]},
        "relu": TEN,
    }
    said = sentences.comparison_sentences(
        {
            Cell(init, activation): trained(ends)
            for activation, schemes in given_order.items()
            for init, ends in schemes.items()
        }
    )
    assert said == [
        (
            f"With relu, {FIRST_OF_TEN}; between he and xavier 10 seeds show no difference larger "
            "than 0.2."
        ),
        "With tanh, he beats random by 1.2 ± 0.1 points over 10 seeds.",
        "With elu, between he and xavier 10 seeds show no difference larger than 0.2 points.",
        "With gelu, no training finished; he diverged with the only seed.",
    ]


def test_nothing_is_said_of_nothing():
    """No cells, no words."""
    assert rows({}) == differences({}) == sentences.comparison_sentences({}) == []


@given(st.lists(st.tuples(accuracies, accuracies), min_size=2, max_size=10))
@settings(max_examples=60)
def test_a_bound_is_never_rounded_down(pairs):
    """And no half width reads 0 that is not."""
    one, other = zip(*pairs, strict=True)
    outcomes = with_relu({"one": one, "other": other})
    (text,), (found,) = sentences.comparison_sentences(outcomes), differences(outcomes)
    if bound := re.search(r"larger than ([\d.]+) points", text):
        shown, unit = float(bound[1]), 10 ** -len(bound[1].partition(".")[2])
        assert 100 * found.largest - 1e-9 <= shown < 100 * found.largest + unit + 1e-9
    elif shown := re.search(r"by ([\d.]+) ± ([\d.]+) points", text):
        value, half = 100 * found.effect, 100 * (found.high - found.effect)
        unit = 10 ** -len(shown[2].partition(".")[2])
        assert abs(float(shown[1]) - value) <= unit / 2 + 1e-9
        assert abs(float(shown[2]) - half) <= unit / 2 + 1e-9
        assert (float(shown[2]) == 0) == (half == 0)
        assert float(shown[1]) > 0
    else:
        assert "at all" in text or "too few to tell" in text


@given(comparisons)
@settings(max_examples=40)
def test_any_comparison_can_be_told(outcomes):
    """One sentence for each activation, with every scheme in it, and no number that is none."""
    said, found = sentences.comparison_sentences(outcomes), differences(outcomes)
    assert len(said) == len({cell.activation for cell in outcomes})
    json.dumps(as_json(rows(outcomes), found, said), allow_nan=False)
    for text in said:
        assert re.fullmatch(r"\S.*[^.;, ]\.", text)
        assert not re.search(r"nan|inf\b|None|-\d|  | ,|;;", text)
        assert text.count(" points") <= 1


# Files


def lines_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_a_table_for_other_programs():
    """Every number as it is, and what is not known empty."""
    outcomes = with_relu({"he": [0.97, 0.98], "normal": [None, None]})
    text = as_csv(rows(outcomes))
    assert text.splitlines()[0] == (
        "init,activation,n,accuracy_mean,accuracy_std,accuracy_low,accuracy_high,"
        "iterations_to_90,iterations_to_95,diverged"
    )
    he, normal = lines_of(text)
    (row, _) = rows(outcomes)
    assert [float(he[f"accuracy_{name}"]) for name in ("mean", "std", "low", "high")] == [
        row.mean,
        row.std,
        row.low,
        row.high,
    ]
    assert (he["n"], he["diverged"], he["iterations_to_95"]) == ("2", "0", "500")
    assert text.splitlines()[2] == "normal,relu,0,,,,,,,2"
    assert set(normal.values()) == {"normal", "relu", "0", "", "2"}


def test_a_table_without_rows_has_its_names():
    """So that any program can read it."""
    assert as_csv([]) == ",".join(seed_statistics.COLUMNS) + "\n"


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_any_spec_can_be_read_back(spec):
    """Commas and quotes too; what a spreadsheet would compute is marked as text."""
    (line,) = lines_of(as_csv(rows({Cell(spec, "relu"): []})))
    assert line["init"] == (f"'{spec}" if spec[0] in "=+-@" else spec)


def test_a_number_below_zero_is_no_formula():
    """An interval may go below 0 %, and stays a number."""
    (line,) = lines_of(as_csv(rows(with_relu({"he": [0.1, 0.2]}))))
    assert float(line["accuracy_low"]) < 0


def test_plain_values_for_json():
    """They are those of the rows and differences, by documented names."""
    outcomes = with_relu({"he": [0.97, 0.98, 0.97], "normal": [0.9, 0.93, 0.9], "zero": [None] * 3})
    table, pairs = rows(outcomes), differences(outcomes)
    said = sentences.comparison_sentences(outcomes)
    values = json.loads(json.dumps(as_json(table, pairs, said), allow_nan=False))
    assert list(values) == ["rows", "differences", "sentences"]
    assert values["sentences"] == said
    assert values["rows"][2] == dict.fromkeys(seed_statistics.COLUMNS) | {
        "init": "zero",
        "activation": "relu",
        "n": 0,
        "diverged": 3,
    }
    (pair,) = pairs
    names = ("activation", "better", "worse", "n", "effect", "low", "high", "p", "p_holm")
    expected = {name: getattr(pair, name) for name in names} | {"significant": pair.significant}
    assert values["differences"] == [expected]
    assert (pair.better, pair.worse, pair.significant) == ("he", "normal", True)


def test_starting_is_light():
    """Scipy is imported only where something is compared."""
    code = "import sys, initflow.reporting.sentences; sys.exit('scipy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("seeds", "images", "settled"), [(2, 1, False), (3, 1, False), (2, 300, True)]
)
def test_seeds_that_agree_by_chance_settle_nothing(seeds, images, settled):
    """Accuracies are counts: one image more on each of two seeds is no proof, 300 are."""
    tested = 360
    outcomes = {
        Cell(init, "relu"): [
            Outcome(seed, [(0, hits / tested)], None, tested) for seed in range(seeds)
        ]
        for init, hits in (("he", 30 + images), ("zero", 30))
    }
    (found,) = seed_statistics.differences(outcomes)
    assert found.effect == pytest.approx(images / tested)
    assert found.low < found.effect < found.high
    assert found.significant == settled


# Many schemes


def test_a_clause_names_few_of_many_schemes():
    """Those at its ends; between them the range, and every number is in the table."""
    ends = {f"s{at:02}": around(0.9 - at / 100, 0.001) for at in range(20)}
    text = sentence(ends)
    assert text.startswith(
        "s00 beats s19 by 19.0 ± 0.0 points, s18 by 18.0 ± 0.0, s17 by 17.0 ± 0.0, 13 others by "
        "4.0 to 16.0, s03 by 3.0 ± 0.0, s02 by 2.0 ± 0.0 and s01 by 1.0 ± 0.0 over 10 seeds"
    )


def test_of_many_schemes_without_a_difference_the_largest_bound_is_told():
    """It holds for all that are not named."""
    draws = np.random.default_rng(0).normal(0.9, 0.01, (20, 10))
    outcomes = with_relu({f"s{at:02}": ends for at, ends in enumerate(draws.tolist())})
    (text,) = sentences.comparison_sentences(outcomes)
    first = max(outcomes, key=lambda cell: np.mean(draws[list(outcomes).index(cell)])).init
    level = [
        pair.largest
        for pair in differences(outcomes)
        if first in (pair.better, pair.worse) and pair.p > 0.05
    ]
    assert len(level) > 8
    found = re.search(rf"between {first} and (\d+) others none larger than (\d+\.\d+)", text)
    assert int(found[1]) == len(level) - 6
    assert 0 <= float(found[2]) - 100 * max(level) < 0.1
    assert text.count(f"between {first} and") == 7


def test_so_it_is_where_a_seed_diverged():
    """Whose scheme is compared over fewer seeds, and named by itself."""
    draws = np.random.default_rng(0).normal(0.9, 0.01, (20, 10)).tolist()
    outcomes = with_relu(
        {f"s{at:02}": ends for at, ends in enumerate([[*draws[0][:9], None], *draws[1:]])}
    )
    (text,) = sentences.comparison_sentences(outcomes)
    assert text.count(" and s") < 10
    assert "others none larger than" in text


def test_many_schemes_of_which_nothing_is_known_are_counted():
    """Where the seeds bound no difference."""
    ends = {f"s{at:02}": [0.9, 0.1] if at % 2 else [0.1, 0.9 - at / 1000] for at in range(40)}
    (text,) = sentences.comparison_sentences(with_relu(ends))
    assert re.search(r"2 seeds are too few to tell s\d\d from \d+ others", text)


@pytest.mark.parametrize("n", [1, 8, 9, 20, 200])
@pytest.mark.parametrize("kinds", [1, 2, 12])
def test_schemes_to_be_drawn_are_at_most_eight(n, kinds):
    """In their order, the best with each function among them as far as there is room."""
    accuracies = np.random.default_rng(n).random((kinds, n))
    table = [
        seed_statistics.Row(Cell(f"s{at}", f"f{kind}"), 1, accuracies[kind, at], *[None] * 5, 0)
        for kind in range(kinds)
        for at in range(n)
    ]
    drawn = thinning.drawn(table)
    assert drawn == sorted(drawn, key=lambda name: int(name[1:]))
    assert len(drawn) == len(set(drawn)) == min(n, 8)
    best = list(dict.fromkeys(f"s{of.argmax()}" for of in accuracies))[:8]
    assert set(best) <= set(drawn)
    assert bool(thinning.sentence(table)) == (n > 8)
    last = sorted(
        set(range(n)) - {int(name[1:]) for name in best}, key=accuracies.mean(0).__getitem__
    )
    if n > 8:
        assert f"s{last[0]}" in drawn or len(best) == 8
        assert thinning.sentence(table).startswith(f"8 of {n} schemes")


def table_of(accuracies):
    """A row for each scheme."""
    return [
        seed_statistics.Row(Cell(f"s{at}", "relu"), 1, accuracy, *[None] * 5, 0)
        for at, accuracy in enumerate(accuracies)
    ]


def test_schemes_that_never_finished_give_way_to_those_that_did():
    """They have no curve to be drawn."""
    many = [None if at == 3 else at / 20 for at in range(20)]
    assert {"s0", "s19"} <= set(thinning.drawn(table_of(many)))
    assert "s3" not in thinning.drawn(table_of(many))
    few = [at / 20 if at < 5 else None for at in range(20)]
    assert set(thinning.drawn(table_of(few))) == {f"s{at}" for at in range(8)}


# Runs that share no seeds, and other measures than accuracies.

LOSS = Measure("loss/test", is_share=False, lower_is_better=True, is_paired=False)


@given(
    st.lists(st.floats(0, 10), min_size=2, max_size=9).filter(lambda ends: np.std(ends) > 1e-3),
    st.lists(st.floats(0, 10), min_size=2, max_size=9).filter(lambda ends: np.std(ends) > 1e-3),
)
@settings(max_examples=30)
def test_independent_runs_are_set_against_each_other_as_scipy_does(one, other):
    """By Welch's test: effect, interval and p-value; less is better."""
    (found,) = differences(with_relu({"a": one, "b": other}), LOSS)
    expected = stats.ttest_ind(other, one, equal_var=False)
    sign = 1 if found.better == "a" else -1
    low, high = sorted(sign * end for end in expected.confidence_interval(0.95))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9)
    assert found.effect == pytest.approx(abs(np.mean(one) - np.mean(other)), abs=1e-12)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert found.n == len(one) + len(other)


def test_welchs_test_errs_as_often_as_it_says():
    """In one comparison of twenty where nothing differs, though the spreads and numbers do."""
    random = np.random.default_rng(0)
    pairs = zip(random.normal(0, 1, (2_000, 4)), random.normal(0, 5, (2_000, 9)), strict=True)
    wrong = [
        pair.p <= 0.05
        for one, other in pairs
        for pair in differences(with_relu({"a": one.tolist(), "b": other.tolist()}), LOSS)
    ]
    assert np.mean(wrong) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(
    ("schemes", "text"),
    [
        (
            {"adam": [0.30, 0.32, 0.31], "sgd": [0.52, 0.49, 0.5]},
            "Adam beats sgd by 0.193 ± 0.031 over 6 runs.",
        ),
        (
            {"adam": [0.30, 0.32], "sgd": [0.31, 0.33, None]},
            "Between adam and sgd 4 runs show no difference larger than 0.071; sgd diverged with 1",
        ),
        ({"adam": [0.3, 0.3], "sgd": [0.4]}, "Adam reaches 0.3000 ± 0.0000 over 2 runs; sgd has"),
        ({"adam": [0.3], "sgd": [0.4]}, "Adam is first with 0.3, but one run shows no difference"),
        ({"adam": [1200.0, 1100.0, 1150.0]}, "Adam reaches 1150 ± 124 over 3 runs."),
    ],
)
def test_sentences_on_independent_runs(schemes, text):
    """Plain numbers, of which the lower is the better, and runs instead of seeds."""
    (said,) = sentences.comparison_sentences(with_relu(schemes), measure=LOSS)
    assert said.lower().startswith(text.lower())

"""The trainable depth: edges and c against brute force, a known c given back, exact sentences."""

import csv
import io
import json
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from initflow.reporting.pictures import trainability_sentences as sentences
from initflow.reporting.pictures import trainability_statistics as statistics
from initflow.reporting.pictures.trainability_statistics import (
    Edge,
    TrainedNetwork,
    edge,
    fitted,
    planes,
)

DEPTHS = (5, 10, 20, 40, 80)
# Of tanh with σ_b² = 0.05, to three digits.
SCALES = {1.0: 3.63, 1.4: 10.7, 1.6: 27.0, 1.76: math.inf, 2.2: 16.2, 3.0: 9.05, 4.0: 6.98}


def brute_edge(depths, accuracies, threshold):
    """Every split is tried; NumPy interpolates over the logarithm of the depth."""
    sides = [
        sum(a < threshold for a in accuracies[:k]) + sum(a >= threshold for a in accuracies[k:])
        for k in range(len(depths) + 1)
    ]
    k = int(np.argmin(sides))
    if k in (0, len(depths)):
        return float(depths[max(k - 1, 0)]), False
    at = np.interp(threshold, accuracies[k - 1 : k + 1][::-1], np.log(depths[k - 1 : k + 1])[::-1])
    return float(np.exp(at)), True


def brute_areas(cs, scales, edges, within):
    """Of each of ``cs``, in octaves of depth, summed over σ_w²."""
    lines = np.clip(np.outer(cs, scales), *within)
    return np.abs(np.log2(lines) - np.log2(edges)).sum(axis=1)


def networks_of(accuracy, *, seeds=(0,), lrs=(0.01,), outcome="finished"):
    """One at each place, whose accuracy is a function of σ_w², depth and seed."""
    return [
        TrainedNetwork(s, depth, lr, seed, accuracy(s, depth, seed), 0.5, outcome, f"{s}-{depth}")
        for lr in lrs
        for seed in seeds
        for s in SCALES
        for depth in DEPTHS
    ]


def of_known_c(cs):
    """Accuracies that fall where the depth is c · ξ, with the c of each seed."""

    def accuracy(sigma_w2, depth, seed):
        beyond = math.log(depth / (cs[seed] * SCALES[sigma_w2])) if SCALES[sigma_w2] < 1e9 else -9
        return 0.1 + 0.8 / (1 + math.exp(12 * beyond))

    return networks_of(accuracy, seeds=tuple(cs))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 20).map(lambda n: n / 20), min_size=2, max_size=5))
def test_an_edge_is_that_of_all_possible_splits(accuracies):
    """The one with the fewest depths on the wrong side; beyond the ends it says so."""
    depths = DEPTHS[: len(accuracies)]
    found = edge(dict(zip(depths, accuracies, strict=True)), 0.51)
    depth, inside = brute_edge(depths, accuracies, 0.51)
    assert found.depth == pytest.approx(depth)
    assert found.inside is inside


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.5, 50) | st.just(math.inf), st.floats(5, 80)), min_size=1, max_size=7
    )
)
@example([(1.0, 80.0), (2.0, 5.0)])  # as small at both ends, and larger between them
def test_c_is_where_no_other_has_a_smaller_area(both):
    """Of a fine grid of cs none is better than the one found."""
    scales, depths = zip(*both, strict=True)
    edges = [Edge(depth, inside=True) for depth in depths]
    c = fitted(scales, edges, (5, 80))
    if all(math.isinf(scale) for scale in scales):
        assert c is None
        return
    others = brute_areas(np.geomspace(0.05, 500, 20_001), scales, depths, (5, 80))
    assert brute_areas([c], scales, depths, (5, 80))[0] <= others.min() + 1e-9


@pytest.mark.parametrize("c", [1.7, 3.0, 6.0, 11.0])
def test_a_known_c_comes_back(c):
    """Also where half of the edges lie beyond the depths that there are."""
    (plane,) = planes(of_known_c({0: c}), SCALES, 10)
    assert plane.fit.c == pytest.approx(c, rel=0.12)
    assert plane.fit.factor < 1.1
    assert plane.fit.low is None
    assert plane.fit.holds
    assert plane.fit.agreeing > 0.9
    assert plane.threshold == pytest.approx(0.5, abs=0.01)
    assert plane.deepest == pytest.approx(
        np.mean(
            [
                s
                for s, found in zip(plane.sigma_w2s, plane.edges, strict=True)
                if found.depth == max(e.depth for e in plane.edges)
            ]
        )
    )


def test_the_interval_is_students_over_the_seeds():
    """Each seed has a c of its own; scipy's interval of their mean."""
    (plane,) = planes(of_known_c({3: 5.0, 4: 6.0, 5: 6.5}), SCALES, 10)
    cs = list(plane.fit.by_seed.values())
    assert list(plane.fit.by_seed) == [3, 4, 5]
    assert cs == pytest.approx([5.0, 6.0, 6.5], rel=0.12)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(cs), scale=stats.sem(cs))
    assert (plane.fit.low, plane.fit.high) == pytest.approx((low, high))


def test_theory_does_not_hold_where_one_depth_says_as_much():
    """All networks of up to 20 layers train, whatever their σ_w²."""
    (plane,) = planes(networks_of(lambda _, d, __: 0.9 if d <= 20 else 0.1), SCALES, 10)
    assert {round(found.depth, 6) for found in plane.edges} == {round(20 * 2**0.5, 6)}
    assert plane.fit.level == pytest.approx(1)
    assert not plane.fit.holds
    told = sentences.sentences([plane], 1.76)
    assert told[0].startswith("Theory does not hold: of the nearest line, ")
    assert "no nearer than that of a single depth for all σ_w² with 1.00." in told[0]


@pytest.mark.parametrize(
    ("factor", "level", "holds"),
    [(1.1, 1.5, True), (1.45, 2.0, True), (1.6, 3.0, False), (1.4, 1.42, False), (1.2, 1.1, False)],
)
def test_theory_holds_where_its_line_is_near_and_clearly_nearer_than_one_depth(
    factor, level, holds
):
    """Within a factor of 1.5, and a quarter of the distance nearer, both in depth."""
    fit = statistics.Fit(6.0, None, None, {}, factor, level, 0.9)
    assert fit.holds is holds


@pytest.mark.parametrize(
    ("accuracy", "said"),
    [
        (lambda *_: 0.1, "No network learned anything, so there is no edge"),
        (lambda *_: 0.9, "No edge lies between the shallowest and the deepest networks"),
    ],
    ids=["nothing", "everything"],
)
def test_where_nothing_or_everything_trains_no_c_is_claimed(accuracy, said):
    """It is None, and the sentence says why."""
    (plane,) = planes(networks_of(accuracy), SCALES, 10)
    assert plane.fit is None or plane.fit.c is None
    told = sentences.sentences([plane], None)
    assert told[0].startswith(said)
    assert not any("deepest at" in sentence for sentence in told)
    json.dumps(statistics.as_json(plane), allow_nan=False)


def test_a_network_that_diverged_counts_as_one_that_guesses():
    """In the mean accuracy and for the edge; it is counted and said."""
    trained = of_known_c({0: 6.0, 1: 6.0})
    lost = [
        TrainedNetwork(n.sigma_w2, n.depth, n.lr, n.seed, None, None, "diverged", n.run_id)
        if n.seed == 1 and n.sigma_w2 == 4.0
        else n
        for n in trained
    ]
    (plane,) = planes(lost, SCALES, 10)
    at = plane.sigma_w2s.index(4.0)
    assert [row[at] for row in plane.diverged] == [1] * len(DEPTHS)
    assert plane.count("diverged") == len(DEPTHS)
    assert plane.accuracies[0][at] == pytest.approx(0.5, abs=0.01)
    assert sentences.sentences([plane], 1.76)[-1] == ("5 networks diverged.")


@pytest.mark.parametrize(
    ("loss", "classes", "diverged", "expected"),
    [
        (0.4, 10, False, "finished"),
        (math.log(10), 10, False, "finished"),
        (1.6 * math.log(10), 10, False, "unstable"),
        (1.6 * math.log(2), 2, False, "unstable"),
        (1.6 * math.log(2), 10, False, "finished"),
        (None, 10, False, "unstable"),
        (0.4, 10, True, "diverged"),
    ],
)
def test_unstable_is_what_ended_far_above_guessing(loss, classes, diverged, expected):
    """By half above the loss of a network that gives every class the same chance."""
    assert statistics.outcome(loss, classes, diverged=diverged) == expected


def test_each_learning_rate_has_a_plane_and_says_so():
    """With one threshold for all, so that they can be held side by side."""
    trained = networks_of(lambda s, d, _: 0.9 if d <= 3 * SCALES[s] else 0.1, lrs=(0.1, 0.01))
    found = planes(trained, SCALES, 10)
    assert [plane.lr for plane in found] == [0.1, 0.01]
    assert len({plane.threshold for plane in found}) == 1
    told = sentences.sentences(found, 1.76)
    assert [s.split(",")[0] for s in told] == ["At lr 0.1"] * 2 + ["At lr 0.01"] * 2
    assert told[0].startswith("At lr 0.1, theory holds: networks train up to ")
    assert "(one seed has no interval) times its depth scale ξ" in told[0]
    assert told[1] == "At lr 0.1, networks train deepest at σ_w² = 1.68 (theory: 1.76)."


def test_the_files_hold_every_network_and_every_edge():
    """CSV row by row; JSON with null for an infinite scale."""
    trained = of_known_c({0: 6.0})
    rows = list(csv.DictReader(io.StringIO(statistics.as_csv(trained))))
    assert len(rows) == len(trained)
    assert tuple(rows[0]) == statistics.COLUMNS
    assert [float(row["accuracy"]) for row in rows] == [n.accuracy for n in trained]
    (plane,) = planes(trained, SCALES, 10)
    kept = json.loads(json.dumps(statistics.as_json(plane), allow_nan=False))
    assert kept["xi"][3] is None
    assert kept["edge"] == [found.depth for found in plane.edges]
    assert kept["fit"]["c"] == plane.fit.c
    assert np.shape(kept["accuracy"]) == (len(DEPTHS), len(SCALES))


def test_the_rows_of_the_table_say_where_an_edge_is_beyond_the_depths():
    """Below the shallowest, above the deepest, and what theory has there."""
    trained = networks_of(
        lambda s, d, _: 0.9 if s == 1.76 or (s > 1 and d <= 20) else 0.1, outcome="unstable"
    )
    (plane,) = planes(trained, SCALES, 10)
    rows = {row.sigma_w2: row for row in statistics.edge_rows(plane)}
    assert rows[1.0].told[2] == "< 5"
    assert rows[1.76].told == ("∞", "∞", "> 80")
    assert rows[4.0].told[0] == "6.98"
    assert rows[4.0].told[1] == f"{plane.fit.c * 6.98:.3g}"
    assert float(rows[4.0].told[2]) == pytest.approx(20 * 2**0.5, rel=0.01)
    assert {(row.diverged, row.unstable) for row in rows.values()} == {(0, len(DEPTHS))}

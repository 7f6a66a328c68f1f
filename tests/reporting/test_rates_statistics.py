"""What a range of learning rates says, held against plain loops, scipy and closed forms."""

import csv
import io
import json
import math

import numpy as np
import pytest
from scipy import stats

from initflow.reporting.pictures import rates_sentences, rates_statistics
from initflow.reporting.pictures.rates_statistics import (
    Coordinate,
    Group,
    Kind,
    Slope,
    Spread,
    Start,
    Tried,
)

HE = Kind("he", "standard")
MUP = Kind("he", "mup")
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
ALONE = Group(HE, None)


def tried(peaks, *, seed=0, group=ALONE, accuracies=None, rates=RATES):
    """Networks of one seed by rate: a peak in units of the loss at the start; None: diverged."""
    accuracies = accuracies or [None if peak is None else 0.5 for peak in peaks]
    return [
        Tried(
            group,
            lr,
            seed,
            accuracy,
            None if peak is None else 0.3,
            None if peak is None else 2.0 * peak,
            2.0,
            "diverged" if peak is None else "finished",
            f"run {seed} {lr}",
        )
        for lr, peak, accuracy in zip(rates, peaks, accuracies, strict=True)
    ]


def start(predicted, *, seed=0, group=ALONE):
    return Start(group, seed, 2.0, 2 / predicted, predicted)


@pytest.mark.parametrize(
    ("peaks", "limit"),
    [
        ([1, 1, 1.09, 1.2, None], 0.1),
        ([1, 1, 1.11, 1, 1], 0.03),  # what is stable above it does not count
        ([1.2, 1, 1, 1, 1], 0.0),
        ([None] * 5, 0.0),
        ([1] * 5, None),
        ([1, 1, 1, 1, None], 0.3),
    ],
)
def test_the_largest_stable_rate_is_that_below_the_first_rise(peaks, limit):
    """Of more than a tenth, or none where the lowest is not stable."""
    assert rates_statistics.largest_stable(tried(peaks)) == limit


def test_a_row_is_of_the_seeds_that_lie_within_the_range():
    """Geometric means with the t-interval of the logarithms, as scipy has it."""
    networks = [
        *tried([1, 1, 1, 2, 2], seed=0, accuracies=[0.9, 0.94, 0.95, 0.93, 0.1]),
        *tried([1, 1, 2, 2, 2], seed=1, accuracies=[0.9, 0.951, 0.94, 0.2, 0.1]),
        *tried([1, 1, 1, 1, 2], seed=2, accuracies=[0.91, 0.94, 0.96, 0.95, 0.1]),
        *tried([2] * 5, seed=3, accuracies=[0.9, 0.94, 0.95, 0.94, 0.1]),
        *tried([1] * 5, seed=4, accuracies=[0.9, 0.94, 0.95, 0.94, 0.1]),
    ]
    (row,) = rates_statistics.rows(networks, [start(0.1), start(0.4, seed=1)])
    logs = np.log([0.1, 0.03, 0.3])
    low, high = stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs))
    assert row.stable == Spread(3, *(pytest.approx(math.exp(x)) for x in (logs.mean(), low, high)))
    assert (row.unstable, row.unbounded) == (1, 1)
    assert row.predicted.mean == pytest.approx(0.2)
    assert row.ratio == pytest.approx(row.stable.mean / 0.2)
    assert row.holds
    assert row.best.mean == pytest.approx(math.exp(np.log([0.1, 0.03, 0.1, 0.1, 0.1]).mean()))
    assert row.accuracy.mean == pytest.approx(np.mean([0.95, 0.951, 0.96, 0.95, 0.95]))
    # Means are 0.902, 0.9422, 0.95, 0.792 and 0.1.
    assert row.within == (0.03, 0.1)


def test_where_a_seed_diverged_a_rate_is_not_among_the_best():
    """Its mean would be of the luckier seeds; where all did there is no best one."""
    one = tried([1, 1, 1, 1, None], accuracies=[0.8, 0.9, 0.91, 0.99, None])
    other = tried([1, 1, 1, None, None], seed=1, accuracies=[0.8, 0.9, 0.91, None, None])
    (row,) = rates_statistics.rows([*one, *other], [])
    assert row.within == (0.03, 0.1)
    assert (row.predicted, row.ratio, row.holds) == (None, None, None)
    (lost,) = rates_statistics.rows(tried([None] * 5), [])
    assert (lost.best, lost.accuracy, lost.within, lost.stable) == (None,) * 4
    assert lost.unstable == 1


def test_slopes_are_those_of_lines_through_logarithms():
    """Seed by seed, as numpy fits them; sizes without a stable rate in the range are left out."""
    networks, starts, measured = [], [], []
    for seed, limits in enumerate([(3, 2, 1, 5), (3, 1, 0, 2), (4, 2, 1, 1)]):
        sizes = (1, 2, 4, 8)
        for size, limit in zip(sizes, limits, strict=True):
            group = Group(HE, size)
            peaks = [1.0] * limit + [2.0] * (5 - limit)
            networks += tried(peaks, seed=seed, group=group)
            starts.append(start(0.3 / size, seed=seed, group=group))
        inside = [(s, RATES[n - 1]) for s, n in zip(sizes, limits, strict=True) if 0 < n < 5]
        measured.append(np.polyfit(*np.log(inside).T, 1)[0])
    (slope,) = rates_statistics.slopes(networks, starts)
    low, high = stats.t.interval(0.95, 2, np.mean(measured), stats.sem(measured))
    assert slope.measured.mean == pytest.approx(np.mean(measured))
    assert (slope.measured.low, slope.measured.high) == pytest.approx((low, high))
    assert slope.predicted.mean == pytest.approx(-1)
    assert slope.holds == (low <= -1 <= high)


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [((1, 0.5, 1.5), (2, 1.4, 2.6), True), ((1, 0.5, 1.5), (2, 1.6, 2.4), False)],
)
def test_theory_holds_where_intervals_overlap(one, other, meet):
    """Either way round; nothing is said where one is of a single seed, which has none."""
    one, other = Spread(3, *one), Spread(3, *other)
    assert one.overlaps(other) == other.overlaps(one) == meet
    assert Slope(HE, one, other).holds == meet
    assert Slope(HE, None, other).holds is None
    alone = Spread(1, 1.2, None, None)
    assert one.overlaps(alone) is alone.overlaps(one) is None
    (said,) = rates_sentences.sentences([], [Slope(HE, one, alone, 2)], [], "depth")
    assert said.replace("−", "-") == (
        f"he: the largest stable rate goes as depth^({one.mean:.2f} ± 0.50), the one predicted "
        "from the curvature at the start as depth^1.20 (2 limits beyond the range left out of "
        "both): one seed has no interval, so nothing is said of theory."
    )


def test_both_slopes_are_of_the_same_networks():
    """Where theory is right at every size it is so too where some lie beyond the range."""
    networks, starts = [], []
    for seed in (0, 1):
        for size, limit in ((1, 5), (2, 5), (4, 3), (8, 2), (16, 1)):
            group = Group(HE, size)
            networks += tried([1.0] * limit + [2.0] * (5 - limit), seed=seed, group=group)
            right = RATES[limit - 1] if limit < 5 else 100.0
            starts.append(start(right, seed=seed, group=group))
    (slope,) = rates_statistics.slopes(networks, starts)
    assert slope.measured == slope.predicted
    assert slope.beyond == 4
    assert slope.holds


def test_what_diverged_in_the_first_updates_is_said():
    """By its kind and width."""
    (said,) = rates_sentences.sentences([], [], [], "width", [Group(MUP, 64)])
    assert said.endswith("these diverged, and are left out of them: he mup of width 64.")


@pytest.mark.parametrize(
    ("slope", "verdict"),
    [(0.5, "growing"), (0.1, "flat"), (-0.1, "flat"), (-0.5, "vanishing")],
)
def test_the_coordinate_check_goes_by_the_last_update(slope, verdict):
    """By a least-squares line over the widths, for each layer."""
    found = [
        Coordinate(HE, width, seed, step, "fc2", 1.0, (1 + seed) * width ** (slope * (step - 3)))
        for width in (16, 64, 256)
        for seed in (0, 1)
        for step in (1, 2, 3, 4)
    ]
    (one,) = rates_statistics.coordinate_slopes(found)
    assert one.slope.mean == pytest.approx(slope)
    assert (one.layer, one.verdict) == ("fc2", verdict)


def test_files_have_every_network_and_all_that_is_said():
    """A line of CSV for each network; JSON that is JSON, whatever is infinite."""
    networks = tried([1, 1, 2, None, None])
    rows = rates_statistics.rows(networks, [start(0.1)])
    lines = list(csv.DictReader(io.StringIO(rates_statistics.as_csv(networks))))
    assert [line["lr"] for line in lines] == [str(lr) for lr in RATES]
    assert [line["stable"] for line in lines] == ["True", "True", "False", "False", "False"]
    assert lines[-1]["accuracy"] == ""
    starts = [start(0.1), Start(ALONE, 1, math.inf, math.inf, None)]
    table = rates_statistics.as_json(rows, [], [], starts, ["It is so."])
    again = json.loads(json.dumps(table, allow_nan=False))
    assert again["rows"][0]["stable"] == 0.03
    assert again["rows"][0]["predicted"] == pytest.approx(0.1)
    assert again["starts"][1]["largest_eigenvalue"] == "inf"


def test_sentences_say_whether_theory_holds():
    """Of each scheme, and of its slopes and layers."""
    networks = tried([1, 1, 1, 2, 2], accuracies=[0.9, 0.94, 0.95, 0.9, 0.1])
    rows = rates_statistics.rows(networks, [start(0.05)])
    (said,) = rates_sentences.sentences(rows, [], [], "none")
    assert said == (
        "he: stable up to lr 0.1, where the curvature at the start predicts 0.05 (measured over "
        "predicted 2: theory holds); best at lr 0.1 with 95.0 % on validation images, within a "
        "point of it from 0.03 to 0.1."
    )
    rows = rates_statistics.rows(tried([None] * 5), [start(0.001)])
    (said,) = rates_sentences.sentences(rows, [], [], "none")
    assert said == (
        "he: no rate of the range is stable with 1 seed, where the curvature at the start "
        "predicts 0.001; no training finished."
    )
    slopes = [
        Slope(HE, Spread(3, -0.9, -1.0, -0.8), Spread(3, -1.5, -1.6, -1.4)),
        Slope(MUP, None, None),
    ]
    layers = rates_statistics.coordinate_slopes(
        [Coordinate(MUP, width, 0, 4, "fc1", 1.0, 1.0) for width in (8, 16)]
    )
    first, second, third = rates_sentences.sentences(rows, slopes, layers, "width")
    assert first.replace("−", "-") == (
        "he: the largest stable rate goes as width^(-0.90 ± 0.10), the one predicted from the "
        "curvature at the start as width^(-1.50 ± 0.10): theory does not hold."
    )
    assert second == (
        "he mup: too few stable rates lie within the range to say how they go with width."
    )
    assert third == (
        "he in the mup parametrization: what the first updates change is flat over widths, as "
        "width^slope: fc1 flat (0.00)."
    )

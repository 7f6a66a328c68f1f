"""What the figures of a range of learning rates show."""

import math

import pytest

from initflow.reporting import drawing
from initflow.reporting.pictures import rates_figures, rates_sections, rates_statistics
from initflow.reporting.pictures.rates_statistics import Coordinate, Group, Kind
from tests.reporting.test_rates_statistics import RATES, start, tried

KINDS = [Kind(init, own) for init in ("he", "lecun") for own in ("standard", "mup")]


def networks(kinds, sizes=(None,)):
    """All rates up to one that rises with the kind are stable; the last one diverges."""
    found, starts = [], []
    for at, kind in enumerate(kinds):
        for size in sizes:
            group = Group(kind, size)
            for seed in (0, 1):
                peaks = [1.0] * (at % 3 + 1) + [2.0] * (3 - at % 3) + [None]
                accuracies = [0.9, 0.95, 0.93, 0.2, None]
                found += tried(peaks, seed=seed, group=group, accuracies=accuracies)
                starts.append(start(0.05 / (size or 1), seed=seed, group=group))
    return found, starts


def drawn(figure):
    assert drawing.png(figure).startswith(b"\x89PNG")
    return figure


@pytest.mark.parametrize("sizes", [(None,), (1, 2, 4, 8, 16)])
def test_every_scheme_has_its_curve_and_its_line(sizes):
    """Means at the rates where no seed diverged; a column for three sizes at most."""
    found, starts = networks(KINDS, sizes)
    rows = rates_statistics.rows(found, starts)
    figure = drawn(rates_figures.rates(found, rows, "depth", "Rates"))
    columns = min(3, len(sizes))
    assert len(figure.axes) == 3 * columns
    top, bottom = figure.axes[0], figure.axes[2 * columns]
    assert len(top.lines) == len(KINDS)
    for line in top.lines:
        assert list(line.get_xdata()) == list(RATES)
        expected = [0.9, 0.95, 0.93, 0.2, math.nan]  # where a seed diverged there is a gap
        assert list(line.get_ydata()) == pytest.approx(expected, nan_ok=True)
    places = [line.get_xdata()[0] for line in bottom.lines if len(line.get_xdata()) == 1]
    expected = [mean for at in range(4) for mean in (RATES[at % 3], 0.05 / (sizes[0] or 1))]
    assert places == pytest.approx(expected)
    assert [label.get_text() for label in bottom.get_yticklabels()] == list(map(str, KINDS))


def test_a_prediction_beyond_the_range_is_told():
    """At the end of the axis, with its number."""
    found, _ = networks(KINDS[:1])
    rows = rates_statistics.rows(found, [start(1e-9, group=Group(KINDS[0], None))])
    figure = drawn(rates_figures.rates(found, rows, "none", "Rates"))
    assert any("1e-09" in text.get_text() for text in figure.axes[2].texts)


def test_nothing_to_show_is_drawn_too():
    """Where every training diverged at once."""
    found = tried([None] * 5, group=Group(KINDS[0], None))
    drawn(rates_figures.rates(found, rates_statistics.rows(found, []), "none", "Rates"))


def test_stable_rates_stand_beside_those_predicted():
    """A solid and a dashed line for each kind, and both slopes in the legend."""
    found, starts = networks(KINDS[:2], (1, 4, 16))
    rows = rates_statistics.rows(found, starts)
    slopes = rates_statistics.slopes(found, starts)
    figure = drawn(rates_figures.stable_rates(rows, slopes, "depth", "Stable rates"))
    (axes,) = figure.axes
    measured, predicted = axes.lines[:2]
    assert list(measured.get_xdata()) == list(predicted.get_xdata())
    assert list(measured.get_xdata()) == pytest.approx([1, 4, 16], rel=0.03)
    assert list(measured.get_ydata()) == pytest.approx([RATES[0]] * 3)
    assert list(predicted.get_ydata()) == pytest.approx([0.05, 0.0125, 0.003125])
    (legend,) = figure.legends
    assert legend.texts[0].get_text().startswith("he: 0.00 ± 0.00, predicted −1.00")


def test_the_coordinate_check_has_a_panel_for_each_layer():
    """With its slope and verdict; of many layers the first, some and the last."""
    found = [
        Coordinate(kind, width, seed, step, f"fc{layer}", 1.0, math.sqrt(width) * step)
        for kind in KINDS[:2]
        for width in (16, 64, 256)
        for seed in (0, 1)
        for step in (1, 2, 3, 4)
        for layer in range(1, 7)
    ]
    slopes = rates_statistics.coordinate_slopes(found)
    figure = drawn(rates_figures.coordinates(found, slopes, "Coordinates"))
    assert len(figure.axes) == 2 * 4
    assert figure.axes[0].get_title() == "fc1: growing, 0.50"
    assert figure.axes[3].get_title() == "fc6: growing, 0.50"
    assert [len(axes.lines) for axes in figure.axes] == [4] * 8
    assert list(figure.axes[0].lines[3].get_ydata()) == pytest.approx([16, 32, 64])


def test_the_report_has_a_section_for_each_figure():
    """And its numbers in a table, also where there is no figure."""
    found, starts = networks(KINDS[:2], (1, 4))
    rows = rates_statistics.rows(found, starts)
    slopes = rates_statistics.slopes(found, starts)
    checked = rates_statistics.coordinate_slopes(
        [Coordinate(KINDS[1], width, 0, 4, "fc1", 1.0, width) for width in (8, 16)]
    )
    sections = rates_sections.sections(rows, slopes, checked, {})
    assert [len(section.blocks) for section in sections] == [1, 1, 1]
    assert [len(section.blocks[0].rows) for section in sections] == [4, 2, 1]
    assert sections[0].blocks[0].rows[0][:4] == ("he", "standard", "1", "0.01")
    assert sections[1].blocks[0].rows[0][-1] == "does not hold"
    assert sections[2].blocks[0].rows[0][-1] == "growing"
    none, every = (rates_statistics.rows(tried([peak] * 5), [])[0] for peak in (None, 1.0))
    assert (rates_sections.stable(none), rates_sections.stable(every)) == ("none", "all")

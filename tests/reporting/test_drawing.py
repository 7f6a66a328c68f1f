"""The look of all figures: what is told apart, and what comes of it as a file."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from initflow.reporting import drawing
from initflow.reporting.seed_statistics import Cell


def test_32_schemes_can_be_told_apart():
    """By colour, dashes and mark."""
    looks = [drawing.look(at) for at in range(32)]
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 32
    assert len({(look["color"], look["marker"]) for look in looks}) == 32


@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize(
    ("values", "labels"),
    [((1e-3, 1.0), {"0.001", "0.01", "0.1", "1"}), ((0.1, 0.9), {"0.1", "0.2", "0.5"})],
)
def test_a_logarithmic_axis_is_labelled_with_plain_numbers(name, values, labels):
    """Not with powers of ten; finer where it shows few of those."""
    figure = drawing.figure(4, 3, "title")
    axes = figure.subplots()
    axes.plot(values, values)
    drawing.log_scale(axes, name=name)
    assert getattr(axes, f"get_{name}scale")() == "log"
    assert {"x": axes.get_yscale(), "y": axes.get_xscale()}[name] == "linear"
    low, high = getattr(axes, f"get_{name}lim")()
    axis = getattr(axes, f"{name}axis")
    shown = {axis.get_major_formatter()(at) for at in axis.get_majorticklocs() if low <= at <= high}
    assert labels <= shown


def width(content):
    assert content.startswith(b"\x89PNG")
    return int.from_bytes(content[16:20])


def test_png_is_the_files_content():
    """In the figure's own pixels."""
    content = drawing.png(drawing.wide_figure(3, "title"))
    assert width(content) == drawing.WIDTH * drawing.DPI


@pytest.mark.parametrize("many", [(1, 1), (2, 2), (1, 3)], ids=str)
def test_a_figure_of_pyplot_is_closed_once_it_is_a_png(many):
    """The whole of it, whether one axes is given or an array; pyplot keeps what is not closed."""
    other = plt.figure()
    _, axes = plt.subplots(*many)
    np.ravel(axes)[0].set_title("a title that is much wider than the figure itself " * 3)
    assert width(drawing.png_by_pyplot(lambda: axes)) > 8 * drawing.DPI
    assert plt.get_fignums() == [other.number]
    plt.close(other)


def test_a_figure_of_pyplot_is_closed_even_if_it_cannot_be_drawn():
    """As when a formula in its title is none."""
    _, axes = plt.subplots()
    axes.set_title("$\\nonsense$")
    with pytest.raises(ValueError, match="nonsense"):
        drawing.png_by_pyplot(lambda: axes)
    assert not plt.get_fignums()


@pytest.mark.parametrize("part", [(0.11, 0.29), (0.1, 0.85), (0.1135, 0.1135), (0.5, 0.51)])
def test_a_narrow_axis_has_two_labels(part):
    """As many as its room is for: the outermost of those that a wide one has."""
    wide, narrow = drawing.figure(4, 3, "title").subplots(1, 2)
    drawing.accuracy_axis(wide, "x", part)
    drawing.accuracy_axis(narrow, "x", part, narrow=True)
    assert len(narrow.get_xticks()) == 2 <= len(wide.get_xticks())
    assert narrow.get_xlim() == wide.get_xlim()


def test_lines_are_as_high_as_their_names():
    """Those of long names stand further apart, and the lowest ones are of height 1."""
    cells = [Cell(name, "relu") for name in ("he", "x" * 100, "y" * 100, "xavier")]
    _, lines = drawing.accuracy_lines(cells, [(0.1, 0.9)], "title", "key")
    he, x, y, xavier = (at for at, _ in lines.values())
    assert he == 0
    assert y - x > x - he > 1
    assert xavier - y == pytest.approx(x - he)
    same = drawing.accuracy_lines(cells[1:3], [(0.1, 0.9)], "title", "key")[1]
    assert [at for at, _ in same.values()] == [0, 1]


def test_a_style_that_drawing_sets_ends_with_it():
    """As Optuna sets one for all figures of the process, ours included."""
    before = dict(plt.rcParams)

    def draw():
        plt.style.use("ggplot")
        return plt.subplots()[1]

    drawing.png_by_pyplot(draw)
    assert dict(plt.rcParams) == before

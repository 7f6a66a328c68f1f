"""What the terminal shows of several seeds: every number, within 100 columns, as it is."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from initflow.cli import tables
from initflow.core.configurations import ACTIVATION_NAMES, SCHEME_NAMES
from initflow.core.environment import Change
from initflow.reporting import webpage
from initflow.reporting.published import PublishedRow, checks
from initflow.reporting.seed_statistics import Cell, Outcome, Row, rows
from initflow.reporting.trials import Trial, tuned

COLUMNS = 100
ODD = "[red]my[/red] [/file.py:f[bold]:a=1,b=[x]"


def shown(table, columns=COLUMNS):
    """The lines of a table that is printed to a terminal so wide."""
    text = io.StringIO()
    Console(width=columns, file=text, color_system=None).print(table)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    assert "…" not in text.getvalue()
    return lines


def cells_of(lines, name):
    """The words of the row that begins with ``name``."""
    (line,) = [line for line in lines if line.strip().startswith(f"{name} ")]
    return line.strip().removeprefix(name).split()


def trained(ends, diverged=0, steps=(0, 500, 12_000)):
    """A network for each final accuracy, and some that diverged."""
    curves = [[(steps[0], 0.1), *((step, end) for step in steps[1:])] for end in ends]
    lost = [Outcome(100 + seed, [(0, 0.1)], 3) for seed in range(diverged)]
    return [*(Outcome(seed, curve) for seed, curve in enumerate(curves)), *lost]


def test_a_comparison_shows_every_number():
    """Percent with two digits; iterations with commas; how many seeds finished."""
    found = rows({Cell("he", "relu"): trained([0.96, 0.97, 0.98], steps=(0, 12_345))})
    # mean 97, std 1, t of 2 degrees of freedom 4.3027: 97 ± 2.48
    words = cells_of(shown(tables.comparison_table(found)), "he")
    assert " ".join(words) == "relu 3 97.00 94.52 to 99.48 1.00 12,345 12,345 0"


def test_a_comparison_claims_nothing_for_one_seed():
    """A mean and no interval; without a seed that finished not even that."""
    found = rows(
        {
            Cell("one", "tanh"): trained([0.5]),
            Cell("lost", "tanh"): trained([], diverged=2),
            Cell("none", "tanh"): [],
        }
    )
    lines = shown(tables.comparison_table(found))
    assert cells_of(lines, "one") == ["tanh", "1", "50.00", "–", "–", "–", "–", "0"]
    assert cells_of(lines, "lost") == ["tanh", "0", "–", "–", "–", "–", "–", "2"]
    assert cells_of(lines, "none") == ["tanh", "0", "–", "–", "–", "–", "–", "0"]


def test_what_diverged_is_red():
    """And nothing else."""
    text = io.StringIO()
    found = rows({Cell("he", "relu"): trained([0.9] * 2), Cell("bad", "relu"): trained([0.8], 4)})
    console = Console(width=COLUMNS, file=text, force_terminal=True, color_system="standard")
    console.print(tables.comparison_table(found))
    (line,) = [line for line in text.getvalue().splitlines() if "\x1b[31m" in line]
    assert line.split()[0] == "bad"


def test_a_comparison_of_all_schemes_fits():
    """Every built-in scheme with the longest activation, on a line of its own."""
    activation = max(ACTIVATION_NAMES, key=len)
    found = [
        Row(Cell(init, activation), 10, 0.5, 0.125, 0.25, 1.125, 100_000, 100_000, 10)
        for init in SCHEME_NAMES
    ]
    lines = shown(tables.comparison_table(found))
    for init in SCHEME_NAMES:
        assert cells_of(lines, init)[0] == activation
        assert cells_of(lines, init)[-1] == "10"


def test_a_long_scheme_is_folded_and_not_cut():
    """All of its letters are there, and all numbers beside it."""
    init = "plugins/some-folder/with/a_long_name.py:function:gain=2.0,other_argument=17"
    found = rows({Cell(init, "relu"): trained([0.9] * 2)})
    lines = shown(tables.comparison_table(found))
    body = [line for line in lines if line[1:].split(" ")[0] and line[1:].split(" ")[0] in init]
    assert "".join(line[1:].split(" ")[0] for line in body) == init
    assert "90.00" in body[0]


def test_a_scheme_is_shown_as_it_is():
    """Square brackets are no markup."""
    lines = shown(tables.comparison_table(rows({Cell(ODD, "relu"): trained([0.9] * 2)})), 130)
    assert any(ODD in line for line in lines)


def reproduction(published, *, ends=(0.9, 0.92), diverged=0, name="a row"):
    """As much of a reproduction as the table needs, with one row."""
    row = PublishedRow(name, "he", "relu", published)
    outcomes = trained(ends, diverged)
    (ours,) = rows({Cell(name, ""): outcomes})
    return SimpleNamespace(
        table=SimpleNamespace(rows=[row]),
        outcomes={name: outcomes},
        rows={name: ours},
        checks={name: checks(row, outcomes)},
    )


def test_a_reproduction_shows_published_and_ours():
    """With both intervals and the verdict, for the last iteration."""
    result = reproduction([(500, 0.9), (12_000, 0.123)])
    lines = shown(tables.reproduction_table(result))
    text = "\n".join(lines)
    # 91 ± 12.706 · 1.41421 / √2, and ± 12.706 · 1.41421 · √1.5
    assert "78.29 to 103.71" in text
    assert "68.99 to 113.01" in text
    for word in ("12.30", "91.00", "yes" if "12,000" in text else "no"):
        assert word in text
    assert " no " in f"{text} "


def test_a_reproduction_of_one_seed_claims_nothing():
    """The numbers, and that one seed cannot say."""
    text = "\n".join(shown(tables.reproduction_table(reproduction([(500, 0.9)], ends=(0.95,)))))
    assert "90.00" in text
    assert "95.00" in text
    assert "one seed cannot say" in text
    assert " to " not in text.partition("Test accuracy")[0].partition("Final")[0]


def test_a_reproduction_without_published_numbers_shows_ours():
    """The last accuracy of each seed, beside none of theirs."""
    lines = shown(tables.reproduction_table(reproduction([])))
    text = "\n".join(lines)
    assert "91.00" in text
    assert "78.29 to 103.71" in text
    assert "last" in text


@pytest.mark.parametrize(
    "result",
    [reproduction([(500, 0.1234)], ends=(), diverged=2), reproduction([(250, 0.1234)])],
    ids=["all diverged", "not measured there"],
)
def test_what_was_published_is_shown_where_ours_is_not(result):
    """A number without one of ours to hold it against; it is never called unpublished."""
    text = "\n".join(shown(tables.reproduction_table(result)))
    assert "12.34" in text
    assert "nothing published" not in text


def test_a_row_is_shown_as_it_is():
    """Square brackets are no markup, in the names of a table's rows either."""
    result = reproduction([(500, 0.9)], name=ODD)
    assert any(ODD in line for line in shown(tables.reproduction_table(result), 150))


def test_a_reproduction_fits():
    """A row with a long name, and intervals as wide as those of two seeds can be."""
    name = "truncated_normal: tanh"
    result = reproduction([(500, 0.9)], ends=(0.89, 0.9, 0.91), name=name)
    assert any(name in line for line in shown(tables.reproduction_table(result)))
    result = reproduction([(500, 0.9)], ends=(0.0, 1.0), name=name)
    lines = shown(tables.reproduction_table(result))
    assert any("−585.31 to 685.31" in line for line in lines)
    assert any("−1050.39 to 1150.39" in line for line in lines)


def of_a_study(init="normal", tests=(0.96, 0.97)):
    """A scheme after its study: two trials finished, all but one point apart, one diverged."""
    trials = [
        Trial(0, 0.0123456, 0.96, "finished", 0.95),
        Trial(1, 0.12345, 0.51234, "finished", 0.955),
        Trial(2, 0.9, 0.96, "diverged", None),
    ]
    outcomes = trained(tests)
    return tuned(Cell(init, "relu"), trials, outcomes, outcomes)


def test_a_tuning_shows_every_number():
    """On one line with the scheme, where there is room."""
    words = cells_of(shown(tables.tuning_table([of_a_study()], 140), 140), "normal")
    # 96.5 ± 12.706 · 0.70711 / √2
    assert " ".join(words) == (
        "0.123 0.512 95.50 96.50 90.15 to 102.85 96.50 0.0123 to 0.123 (×10) 2 0 1"
    )


@pytest.mark.parametrize("columns", [100, 120, 140])
@pytest.mark.parametrize("tests", [(0.96, 0.97), (0.1, 0.9)], ids=["narrow", "wide"])
def test_a_tuning_never_folds_a_short_name(columns, tests):
    """However wide the intervals are: without room they are left out."""
    found = [of_a_study("truncated_normal", tests), of_a_study("he", tests)]
    lines = shown(tables.tuning_table(found, columns), columns)
    for init in ("truncated_normal", "he"):
        assert cells_of(lines, init)[:3] == ["0.123", "0.512", "95.50"]
        assert cells_of(lines, init)[-3:] == ["2", "0", "1"]
    assert any(line.split()[:3] == ["scheme", "lr", "gamma"] for line in lines)


def test_a_tuning_along_a_cosine_has_no_gamma():
    """Neither a column of it nor a number."""
    trials = [Trial(0, 0.0123456, None, "finished", 0.95), Trial(1, 0.9, None, "diverged", None)]
    found = tuned(Cell("he", "relu"), trials, trained((0.96, 0.97)), trained((0.9, 0.9)))
    lines = shown(tables.tuning_table([found], 140), 140)
    assert any(line.split()[:3] == ["scheme", "lr", "validation"] for line in lines)
    assert cells_of(lines, "he")[:3] == ["0.0123", "95.00", "96.50"]


def test_a_long_scheme_does_not_cost_the_tuning_its_intervals():
    """It is folded beside them."""
    init = "plugins/some-folder/with/a_long_name.py:function:gain=2.0,other_argument=17"
    lines = shown(tables.tuning_table([of_a_study(init)], 140), 140)
    body = [line for line in lines if line[1:].split(" ")[0] and line[1:].split(" ")[0] in init]
    assert "".join(line[1:].split(" ")[0] for line in body) == init
    assert "90.15 to 102.85" in body[0]


def test_what_is_no_activation_function_is_not_called_one():
    """An LSTM's networks are told apart by the model."""
    for kind, word in (("tanh", "activation"), ("lstm", "model"), ("net.py:build", "model")):
        found = rows({Cell("he", kind): trained([0.9] * 2)})
        heading = next(line for line in shown(tables.comparison_table(found)) if "scheme" in line)
        assert heading.split()[1] == word
        assert f"scheme {word}" in " ".join(c.name for c in webpage.accuracy_table(found).columns)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("abcde", []),
        ("abcdef", ["And 1 more package."]),
        ("abcdefg", ["And 2 more packages."]),
    ],
)
def test_a_replay_counts_the_packages_that_its_table_leaves_out(names, said):
    """Of those with another version."""
    differences = [Change(f"package {name}", "1", "2") for name in names]
    assert tables.further_differences(differences) == said

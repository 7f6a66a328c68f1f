"""The report of an initialization: a table that fits, sentences, numbers."""

import pytest
import torch
from torch import nn

import initflow as inf
from tests.models.small import GPT, transformer


@pytest.fixture(scope="module")
def report():
    words = torch.zeros(1, 4, dtype=torch.int64)
    return inf.initialize(GPT(layers=2), "auto", batch=words, residual="scaled")


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_it_is_printed_as_a_table_that_fits(report, columns, monkeypatch):
    """A line for each matrix, no wider than the terminal, whose names keep their ends."""
    monkeypatch.setenv("COLUMNS", str(columns))
    title, _, head, *lines = str(report).splitlines()
    assert title == "GPT, 10 matrices, lecun, gain"
    assert head.split()[:3] == ["name", "kind", "in"]
    table = lines[: lines.index("")]
    assert len(table) == len(report.filled)
    if columns >= 80:
        assert max(map(len, [head, *table])) <= columns
    assert table[-1].split()[0].endswith("narrow")
    assert "Branches that are added: 4; 4 matrices × 0.5." in lines


def test_it_says_what_was_left_alone(report):
    """By reason, a few names of each."""
    told = " ".join(report.conclusions)
    assert "Left alone (tied to words.weight): head.weight." in told
    assert "Left alone (normalization): blocks.0.before.weight, " in told
    assert "and 7 more." in told


def test_its_numbers_are_a_table(report):
    """A row for each matrix, and one for each tensor left alone."""
    table = report.to_pandas().set_index("name")
    assert table.loc["blocks.0.wide", "activation"] == "gelu"
    assert table.loc["blocks.0.narrow", "stated"] == pytest.approx(1 / 128 / 4)
    assert table.loc["norm.weight", "left"] == "normalization"
    assert "<table" in report._repr_html_()
    assert repr(report).startswith("<Initialization: GPT, 10 matrices")


def test_what_is_not_known_is_said():
    """Activations that nobody could trace, weights behind a parametrization."""
    told = inf.initialize(transformer(1), "he").problems()
    assert told[0].startswith("model cannot be traced without a batch")
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    assert inf.initialize(model, "he").problems() == ["Filled through a parametrization: linear."]

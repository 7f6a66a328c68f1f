"""What `inspect` gives: the measured signals, as a result to look at."""

import dataclasses
import math

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all PyTorch code calls it

import initflow
from initflow.diagnostics import inspection
from initflow.diagnostics.signals import QUANTITIES, Signals
from tests.conftest import python


@pytest.fixture
def given():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU())
    model.append(nn.Linear(20, 3))
    return model, (torch.randn(20, 8), torch.arange(20) % 3), F.cross_entropy


@pytest.fixture
def found(given):
    return initflow.inspect(*given)


def test_it_is_the_signals(given, found):
    """All that was measured, by the same names, and equal to the next one of the same."""
    signals = inspection.inspect(*given)
    assert isinstance(found, Signals)
    for field in dataclasses.fields(Signals):
        assert getattr(found, field.name) == getattr(signals, field.name)
    assert found.metrics() == signals.metrics()
    assert found.by_layer("dead_fraction") == signals.by_layer("dead_fraction")
    assert found == initflow.inspect(*given)


def test_the_table_has_a_row_for_each_layer(found):
    """A column for each quantity, empty where a layer has none; every number that was measured."""
    table = found.to_pandas()
    assert list(table["layer"]) == ["0", "2", "4"]
    of_others = {"branch_ratio", "update_ratio"}  # of residual branches, of trainings
    assert list(table.columns) == ["layer", *(q for q in QUANTITIES if q not in of_others)]
    numbers = table.set_index("layer")
    for key, value in found.metrics().items():
        quantity, layer = key.split("/")
        assert numbers.loc[layer, quantity] == value
    assert numbers.notna().sum().sum() == len(found.metrics())
    assert math.isnan(numbers.loc["4", "dead_fraction"])


def test_it_is_something_to_look_at(found):
    """A short repr, sentences, HTML and a figure."""
    assert repr(found) == "<Inspection: Sequential, 3 layers>"
    q, gradient = (found.by_layer(f"{of}_second_moment") for of in ("preactivation", "gradient"))
    forward, backward, *flat = found.conclusions
    assert forward == (
        f"From 0 to 4, the pre-activations' mean square goes from {q[0]:.3g} to {q[2]:.3g}."
    )
    assert backward == (
        f"From 4 to 0, the gradient's mean square goes from {gradient[2]:.3g} to {gradient[0]:.3g}."
    )
    assert flat[-1].startswith("Saturated activations: at most ")
    page = found._repr_html_()
    assert page.count("<p>") == len(found.conclusions)
    assert "<table" in page
    assert page.count("<tr") == 1 + 3
    (name, figure), *others = found.figures().items()
    assert (name, type(figure), others) == ("signals_by_layer", Figure, [])
    assert figure.get_suptitle() == found.title


def test_what_is_missing_is_said():
    """Modules that are not measured, and values that are no numbers."""
    found = initflow.inspect(Odd(), (torch.ones(2, 3, 4), torch.zeros(2, 2)), F.mse_loss)
    lines = found.problems()
    assert any("not measured: mine (Mine)" in line for line in lines)
    assert "4 values are NaN or infinite: preactivation/fc" in lines
    assert all(f"<p>{line}</p>" in found._repr_html_() for line in lines)


class Mine(nn.Module):
    """A layer of one's own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.weight


class Odd(nn.Module):
    """With such a layer, and weights that overflow."""

    def __init__(self):
        super().__init__()
        self.mine, self.fc = Mine(), nn.Linear(4, 2)
        nn.init.constant_(self.fc.weight, 3e38)

    def forward(self, x):
        return self.fc(self.mine(x).sum(1))


def test_one_layer_is_enough():
    """There is no way to go then, and nothing is said of it."""
    found = initflow.inspect(nn.Linear(3, 2), torch.ones(4, 3), lambda y: y.sum())
    assert repr(found) == "<Inspection: Linear, 1 layer>"
    assert list(found.conclusions) == []
    assert len(found.to_pandas()) == 1


def test_looking_costs_no_more_than_measuring():
    """Neither mlflow nor what draws or tables is loaded before it is asked for."""
    program = (
        "import sys, torch, initflow as inf\n"
        "found = inf.inspect(torch.nn.Linear(3, 2), torch.ones(4, 3), lambda y: y.sum())\n"
        "print(sorted({'mlflow', 'matplotlib', 'pandas'} & sys.modules.keys()))\n"
        "found.figures(); found.to_pandas()\n"
        "print('mlflow' in sys.modules)"
    )
    assert python(program).split("\n")[:2] == ["[]", "False"]

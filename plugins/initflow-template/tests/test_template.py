"""The whole contract, and what this initializer claims of itself."""

import pytest
import torch

import initflow_template
from initflow.testing import assert_initializer_contract

initializer = initflow_template.template


def test_it_keeps_the_contract():
    """Finite, in place, from its generator alone, with the variance that it states."""
    assert_initializer_contract(initializer)


def test_all_weights_are_of_one_size():
    """√(2/fan_in) times the gain, with both signs."""
    weight = torch.empty(30, 50)
    initializer(weight, 50, torch.Generator().manual_seed(0), gain=2.0)
    assert weight.abs().unique().tolist() == pytest.approx([0.4])
    assert 0.4 < (weight > 0).double().mean() < 0.6


def test_a_gain_below_0_is_refused():
    """By a ValueError, which its user reads as one line."""
    with pytest.raises(ValueError, match="gain must be at least 0, not -1"):
        initializer(torch.empty(2, 2), 2, torch.Generator(), gain=-1.0)

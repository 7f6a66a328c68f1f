"""The depth scale of trainability: ξ_c, and 1/|log χ₁| where a signal has no size to keep."""

import math

import pytest

from initflow.initializers.activations import ACTIVATIONS
from initflow.theory.infinite_width import mean_field
from initflow.theory.trainable_depth import critical, depth_scales


def depth_scale(activation, sigma_w2, sigma_b2):
    (scale,) = depth_scales(activation, [sigma_w2], sigma_b2).values()
    return scale


@pytest.mark.parametrize("sigma_w2", [1.0, 1.4, 2.2, 4.0])
def test_tanh_loses_correlations(sigma_w2):
    """ξ_c, on both sides of the critical σ_w²."""
    found = depth_scale(ACTIVATIONS["tanh"], sigma_w2, 0.05)
    assert found == pytest.approx(mean_field(ACTIVATIONS["tanh"], sigma_w2, 0.05).xi_c)


@pytest.mark.parametrize("sigma_b2", [0.0, 0.05])
@pytest.mark.parametrize("sigma_w2", [0.5, 1.0, 1.9, 2.1, 4.0])
def test_relu_loses_the_size_of_signal_and_gradient(sigma_w2, sigma_b2):
    """Both go with σ_w²/2 a layer, so that the edge is a line at 2 whatever the biases."""
    found = depth_scale(ACTIVATIONS["relu"], sigma_w2, sigma_b2)
    assert found == pytest.approx(1 / abs(math.log(sigma_w2 / 2)), rel=1e-6)


def test_at_the_edge_of_relu_nothing_is_lost():
    """He's scheme keeps signal and gradient for ever."""
    assert depth_scale(ACTIVATIONS["relu"], 2.0, 0.0) == math.inf


def test_without_any_weights_all_is_lost_at_once():
    """No layer passes anything on."""
    assert depth_scale(ACTIVATIONS["relu"], 0.0, 0.0) == 0


@pytest.mark.parametrize(
    ("name", "sigma_b2", "low", "high", "expected"),
    [
        ("relu", 0.05, 1.0, 4.0, 2.0),
        ("tanh", 0.05, 1.0, 4.0, 1.76),  # Schoenholz et al.'s, by eye, of their figure 2
        ("tanh", 0.05, 2.0, 4.0, None),
        ("relu", 0.0, 0.5, 1.5, None),
    ],
)
def test_the_critical_variance_is_where_the_gradient_neither_vanishes_nor_explodes(
    name, sigma_b2, low, high, expected
):
    """None where it is not in the range."""
    found = critical(ACTIVATIONS[name], sigma_b2, low, high)
    assert found == (expected if expected is None else pytest.approx(expected, abs=0.01))

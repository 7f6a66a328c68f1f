"""Samples of normal variables: their moments, and means against quadrature."""

import pytest
import torch

from initflow.theory.integrals import expectation, pair_expectation
from initflow.theory.normal_samples import normal_samples, weighted_samples

ONE, HALF = torch.tensor(1.5).double(), torch.tensor(0.5).double()
FUNCTIONS = [torch.tanh, torch.relu, torch.nn.functional.gelu, torch.sigmoid]


@pytest.mark.parametrize("variables", [1, 2, 5, 18])
def test_moments_are_those_of_independent_normal_variables(variables):
    """The sum of the weights is 1, means are 0, and covariances 1 or, within a half, 0."""
    z, weights = weighted_samples(1024, variables)
    assert weights.sum() == pytest.approx(1)
    assert (weights @ z).abs().max() < 1e-9
    covariance = (z * weights[:, None]).T @ z
    assert (covariance - torch.eye(variables)).abs().max() < 1e-6
    assert (weights @ z.clamp(min=0).square()).tolist() == pytest.approx([0.5] * variables)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_of_one_variable_and_of_two_they_are_a_quadrature(function):
    """Within 1e-5 of one variable and 0.3 % of two, correlated or not, of the second moment."""
    scale, whole = ONE.sqrt(), expectation(lambda x: function(x).square(), ONE)
    z, weights = weighted_samples(1024, 1)
    mean = weights @ function(scale * z[:, 0]).square()
    assert mean.item() == pytest.approx(whole.item(), rel=1e-5)
    z, weights = weighted_samples(256, 2)
    for c in (torch.zeros(()).double(), HALF, -HALF, 2 * HALF):
        other = c * z[:, 0] + (1 - c.square()).sqrt() * z[:, 1]
        mean = weights @ (function(scale * z[:, 0]) * function(scale * other))
        exact = pair_expectation(function, ONE, c)
        assert abs(mean - exact) < 0.003 * whole


def test_they_are_the_same_ones_whenever_asked():
    """Whatever else the process draws."""
    before = normal_samples.__wrapped__(64, 4)
    torch.rand(3)
    assert torch.equal(before, normal_samples.__wrapped__(64, 4))

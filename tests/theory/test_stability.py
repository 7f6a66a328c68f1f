"""The largest learning rate on a quadratic, held against torch.optim on one."""

import pytest
import torch

from initflow.theory import stability

EIGENVALUES = (0.3, 2.0, 7.0)


@pytest.mark.parametrize(
    ("momentum", "nesterov", "closed"),
    [(0.0, False, 2 / 7), (0.9, False, 3.8 / 7), (0.9, True, 3.8 / 2.8 / 7), (0.5, True, 1.5 / 7)],
)
def test_a_quadratic_bears_it_and_no_more(momentum, nesterov, closed):
    """The loss falls at 98 % of the rate, and is beyond all bounds at 102 %."""
    rate = stability.largest_stable_rate(max(EIGENVALUES), momentum, nesterov=nesterov)
    assert rate == pytest.approx(closed)
    for share in (0.98, 1.02):
        x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([x], lr=share * rate, momentum=momentum, nesterov=nesterov)
        for _ in range(2_000):
            optimizer.zero_grad()
            (0.5 * (torch.tensor(EIGENVALUES) * x.square()).sum()).backward()
            optimizer.step()
        size = float(x.detach().norm())
        assert size < 1e-3 if share < 1 else size > 1e3

"""The number of layers that a trainable network's depth is measured in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from initflow.initializers.activations import Activation
from initflow.theory.criticality import critical_line
from initflow.theory.infinite_width import mean_fields


def depth_scales(
    activation: Activation, sigma_w2s: Sequence[float], sigma_b2: float
) -> dict[float, float]:
    """Of each σ_w² the layers over which what training needs is lost e-fold; inf where nothing is.

    Where the signal comes to a variance q*, that is ξ_c: two images become the same, or forget
    each other (Schoenholz et al. 2017, "Deep Information Propagation"). Where it goes to 0 or to
    infinity, as ReLU's does for every σ_w² but 2 without biases, a correlation may keep for ever
    while the size is lost, and the gradient's with it: there it is 1/|log χ₁| if that is less.
    """
    w = torch.tensor(list(sigma_w2s), dtype=torch.float64)
    fields = mean_fields(activation, w, torch.tensor(sigma_b2, dtype=torch.float64))
    change = fields.chi_1.log().abs()
    of_gradient = torch.where(change > 1e-6, 1 / change, torch.inf)
    settles = (fields.q_star > 0) & fields.q_star.isfinite()
    scales = torch.where(settles, fields.xi_c, torch.minimum(fields.xi_c, of_gradient))
    return dict(zip(sigma_w2s, scales.tolist(), strict=True))


def critical(activation: Activation, sigma_b2: float, low: float, high: float) -> float | None:
    """The σ_w² at which χ₁ is 1; None where there is none from ``low`` to ``high``."""
    sigma_w2 = critical_line(activation, torch.tensor(sigma_b2, dtype=torch.float64)).item()
    return sigma_w2 if low <= sigma_w2 <= high else None

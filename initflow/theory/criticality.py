"""Where a deep network is critical: the line on the plane of σ_w² and σ_b² on which χ₁ is 1.

There gradients neither grow nor shrink from layer to layer, and differences between inputs last
longest (Poole et al. 2016; Schoenholz et al. 2017, who call it the edge of chaos). By the variance
q* its points follow without a search:

    σ_w² = 1/E[φ′(√q* z)²],   σ_b² = q* − σ_w² E[φ(√q* z)²],   z ~ N(0, 1),

but not each of them is one: there are variances from which the variance map leads away.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from initflow.initializers.activations import Activation
from initflow.theory.infinite_width import check_variances, fixed_points
from initflow.theory.integrals import HUGE, TINY, check, second_moment, slope_moment
from initflow.theory.roots import root

LEAST, MOST = 1e-12, 1e8  # variances between which the line is followed
NEAR = 1e-6  # so near to 1 is χ₁ on the line


def critical_line(activation: Activation, sigma_b2: Tensor) -> Tensor:
    """The smallest σ_w² = fan_in · Var(W) at which χ₁ is 1 at q*, for each of ``sigma_b2``.

    - ``activation``: φ, an :class:`Activation`.
    - ``sigma_b2``: variances of the biases, of at least 0, a tensor of any shape.

    Returns a ``torch.float64`` tensor of the shape of ``sigma_b2``. It is NaN where there is none:
    there the variance grows without bound before the gradient is stable, as for GELU at small σ_b².
    Where q* is infinite, as for ReLU with biases, χ₁ is its limit. Raises :class:`SettingError`
    for what is none of these. Schoenholz et al. 2017, "Deep Information Propagation".
    """
    check(activation)
    check_variances(sigma_b2=sigma_b2)
    b = sigma_b2.double().flatten()
    ends = b.new_tensor([TINY, HUGE])
    candidates = (1 / slope_moment(activation, ends)).expand(len(b), -1)
    of = torch.arange(len(b)).repeat_interleave(2)
    q = torch.exp(torch.arange(math.log(LEAST), math.log(MOST), math.log(1.1), dtype=b.dtype))
    above = _biases(activation, q) > b[:, None]
    crossed, at = (above[:, 1:] != above[:, :-1]).nonzero(as_tuple=True)
    found = root(lambda q: _biases(activation, q) - b[crossed], q[at], q[at + 1])
    w = torch.cat([candidates.flatten(), 1 / slope_moment(activation, found)])
    of = torch.cat([of, crossed])
    # Only what the variance map leads to, from 1 as everywhere, is a network's variance.
    reached = fixed_points(activation, w, b[of]).clamp(TINY, HUGE)
    is_critical = (w * slope_moment(activation, reached) - 1).abs() < NEAR
    least = torch.full_like(b, math.inf)
    least = least.scatter_reduce(0, of[is_critical], w[is_critical], "amin")
    return torch.where(least.isfinite(), least, math.nan).view(sigma_b2.shape)


def _biases(activation: Activation, q: Tensor) -> Tensor:
    """σ_b² of the point at which ``q`` stays as it is and χ₁ is 1."""
    return q - second_moment(activation, q) / slope_moment(activation, q)

"""To which correlation two inputs come in a deep network, and how fast: for many at once.

With u₁ and u₂ of variance q and correlation c, let

    H(q, c) = E[(φ(u₁) − φ(u₂))²] / (2 (1 − c)).

The correlation map leaves c as it is where it is 1, and where σ_w² H(q, c) is the variance that
follows. Being the sum of a_k² (1 − c^k)/(1 − c) over the coefficients a_k of φ in Hermite's
polynomials, H rises with c from 0 to 1, where it is q E[φ′²]: so there is one such c at most. It
is smooth in log q and in the square root of the angle arccos c, and is interpolated in both by
Chebyshev polynomials: one table for a whole plane of networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from initflow.initializers.activations import Activation
from initflow.theory.integrals import difference_moment, slope_moment
from initflow.theory.roots import root

BY_ANGLE = 32  # nodes from correlation 1 to 0
# Nodes from the smallest to the largest variance: so many, and more for each e-fold between them.
# Fewer variances than that are nodes themselves.
BY_VARIANCE, BY_E_FOLD, MOST = 12, 3, 40
RIGHT = math.sqrt(math.pi / 2)  # the root of the angle at correlation 0


@dataclass(frozen=True)
class Correlations:
    """log H/q by n variances, one for each row: ``coefficients`` (n, BY_ANGLE) of Chebyshev's."""

    coefficients: Tensor

    @classmethod
    def of(cls, activation: Activation, q: Tensor) -> Correlations:
        """Those of an activation that is no constant, at each of ``q`` (n,), finite and above 0."""
        at = torch.from_numpy(np.unique(q.numpy()))
        low, high = at[0].log(), at[-1].log()
        n = min(MOST, BY_VARIANCE + math.ceil(BY_E_FOLD * (high - low).item()))
        is_interpolated = len(at) > n
        if is_interpolated:
            at = torch.exp(_scaled(_nodes(n), low, high))
        angle = _scaled(_nodes(BY_ANGLE), 0.0, RIGHT).square()[:-1]  # descending, without 0
        apart = 2 * (angle / 2).sin().square()
        table = q.new_empty(len(at), BY_ANGLE)
        for row, one in zip(table, at, strict=True):  # one by one: each has 32,000 points a node
            row[:-1] = difference_moment(activation, one, angle) / (apart * one)
            row[-1] = slope_moment(activation, one)
        by_angle = table.log() @ _to_coefficients(BY_ANGLE).T
        if not is_interpolated:
            return cls(by_angle[torch.searchsorted(at, q)])
        values = _chebyshev(_unscaled(q.log(), low, high), n) @ _to_coefficients(n)
        return cls(values @ by_angle)

    def settled(self, share: Tensor) -> Tensor:
        """The root of the angle at which H/q is ``share`` (n,), which it is at some."""
        target = share.log()
        low = torch.zeros_like(share)
        return root(lambda t: self._log(t) - target, low, low + RIGHT)

    def slope(self, t: Tensor) -> Tensor:
        """E[φ′(u₁) φ′(u₂)] = H/q + tan(angle/2) d(H/q)/d angle, at ``t`` (n,), as above."""
        steeper = self.coefficients @ _derivative(BY_ANGLE).T
        rising = (_chebyshev(_unscaled(t, 0.0, RIGHT), BY_ANGLE) * steeper).sum(-1) * 2 / RIGHT
        half = (t.square() / 2).tan() / (2 * t.clamp_min(1e-300))
        return self._log(t).exp() * (1 + half * rising)

    def _log(self, t: Tensor) -> Tensor:
        return (_chebyshev(_unscaled(t, 0.0, RIGHT), BY_ANGLE) * self.coefficients).sum(-1)


def _nodes(n: int) -> Tensor:
    """Chebyshev's points from 1 to -1, both among them."""
    return torch.cos(torch.arange(n, dtype=torch.float64) * math.pi / (n - 1))


def _scaled(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """From [-1, 1] to [``low``, ``high``]."""
    return low + (high - low) * (x + 1) / 2


def _unscaled(at: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    return 2 * (at - low) / (high - low) - 1


def _chebyshev(x: Tensor, n: int) -> Tensor:
    """The first ``n`` of Chebyshev's polynomials at ``x`` (…): (…, n)."""
    return torch.cos(torch.arange(n, dtype=x.dtype) * x.clamp(-1, 1).arccos().unsqueeze(-1))


def _to_coefficients(n: int) -> Tensor:
    """The matrix that takes values at the ``n`` points to coefficients."""
    points = np.asarray(_nodes(n))
    return torch.from_numpy(np.linalg.inv(np.polynomial.chebyshev.chebvander(points, n - 1)))


def _derivative(n: int) -> Tensor:
    """The matrix that takes ``n`` coefficients to those of the derivative, the last of them 0."""
    return torch.from_numpy(np.vstack([np.polynomial.chebyshev.chebder(np.eye(n)), np.zeros(n)]))

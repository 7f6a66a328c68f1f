"""Where functions turn from one sign to the other: many of them at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 100
ROUNDING = 4e-16
SMALLEST = 1e-300


def root(function: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """A root of each entry of a ``function`` of a tensor, between ``low`` and ``high``.

    Where it has one sign at both ends, the end at which it is nearer to 0. Chandrupatla 1997, "A
    new hybrid quadratic/bisection algorithm for finding the zero of a nonlinear function without
    using derivatives".
    """
    a, b = high, low
    at_a, at_b = function(a), function(b)
    bracketed = at_a.sign() * at_b.sign() <= 0
    best, at_best = torch.where(at_a.abs() < at_b.abs(), a, b), at_a.abs().minimum(at_b.abs())
    share = torch.full_like(a, 0.5)
    for _ in range(STEPS):
        x = a + share * (b - a)
        at_x = function(x)
        same = at_x.sign() == at_a.sign()
        c, at_c = torch.where(same, a, b), torch.where(same, at_a, at_b)
        b, at_b = torch.where(same, b, a), torch.where(same, at_b, at_a)
        a, at_a = x, at_x
        better = bracketed & (at_x.abs() < at_best)
        best, at_best = torch.where(better, x, best), torch.where(better, at_x.abs(), at_best)
        least = ROUNDING * best.abs() / (b - c).abs().clamp_min(SMALLEST)
        if bool(((least > 0.5) | (at_best == 0) | ~bracketed).all()):
            break
        xi, phi = (a - b) / (c - b), (at_a - at_b) / (at_c - at_b)
        inverse = at_a / (at_b - at_a) * at_c / (at_b - at_c)
        inverse = inverse + (c - a) / (b - a) * at_a / (at_c - at_a) * at_b / (at_c - at_b)
        quadratic = (phi.square() < xi) & ((1 - phi).square() < 1 - xi) & inverse.isfinite()
        least = least.clamp(max=0.5)
        share = torch.where(quadratic, inverse, 0.5).clamp(least, 1 - least)
    return best

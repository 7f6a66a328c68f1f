"""Weights and biases on the edge of chaos, for the activation function at hand."""

from __future__ import annotations

import functools
import math
from itertools import groupby

import torch
from torch import Tensor

import initflow
from initflow.initializers import Activation
from initflow.theory import second_moment, slope_moment

# A bias variance smaller than this share of q is 0 but for rounding, as relu's is.
ROUNDING = 1e-12

# Every number of two digits from 1e-6 to 9.9e6: where to look for a q that is possible.
LADDER = [float(f"{digits}e{power}") for power in range(-7, 6) for digits in range(10, 100)]


@functools.cache
def edge(activation: Activation, q: float) -> tuple[float, float]:
    """σ_w² = fan_in · Var(W) and σ_b² = Var(b) with χ₁ = 1 at the fixed point ``q``.

    Raises a :class:`ValueError` where σ_b² would be negative, with the q at which it is not.
    """
    if not 0 < q < math.inf:
        raise ValueError(f"q must be a finite number above 0, not {q:g}")
    sigma_w2, sigma_b2 = _solve(activation, [q])
    if sigma_b2 < 0:
        raise ValueError(
            f"{activation.name} has no critical point at q = {q:g}, where the biases' variance "
            f"would be {sigma_b2.item():.3g}: it has {_possible(activation)}"
        )
    return sigma_w2.item(), sigma_b2.item()


def _solve(activation: Activation, q: list[float]) -> tuple[Tensor, Tensor]:
    """σ_w² and σ_b², in double precision and possibly negative, for each of ``q``."""
    at = torch.tensor(q, dtype=torch.float64)
    sigma_w2 = 1 / slope_moment(activation, at)
    sigma_b2 = at - sigma_w2 * second_moment(activation, at)
    return sigma_w2, sigma_b2.where(sigma_b2.abs() > ROUNDING * at, 0.0)


def _possible(activation: Activation) -> str:
    """The q of :data:`LADDER` at which σ_b² is not negative, in words."""
    rungs = zip(LADDER, (_solve(activation, LADDER)[1] >= 0).tolist(), strict=True)
    ranges = []
    for possible, group in groupby(rungs, key=lambda rung: rung[1]):
        first, *_, last = [q for q, _ in group] * 2
        if possible:
            ranges.append(f"from {first:g}" + (f" to {last:g}" if last < LADDER[-1] else " on"))
    return "one " + " and ".join(ranges) if ranges else "none at any q"


@initflow.initializer(
    variance=lambda fan_in, activation, q: edge(activation, q)[0] / fan_in,
    bias_variance=lambda activation, q: edge(activation, q)[1],
)
def critical(
    weight: Tensor,
    bias: Tensor,
    fan_in: int,
    activation: Activation,
    generator: torch.Generator,
    *,
    q: float = 0.15,
) -> None:
    """N(0, σ_w²/fan_in) weights and N(0, σ_b²) biases, critical for the activation function φ.

    σ_w² = 1/E[φ′(√q z)²] and σ_b² = q − σ_w² E[φ(√q z)²], z ~ N(0, 1): the pre-activations'
    variance has the fixed point ``q``, and there the gradient's second moment stays the same
    from layer to layer (χ₁ = 1), so that both reach any depth. Neither is truncated. For relu
    this is He's scheme with biases 0, whatever q. Poole et al. 2016, "Exponential expressivity
    in deep neural networks through transient chaos"; Schoenholz et al. 2017, "Deep Information
    Propagation".

    A smaller q keeps images further apart, a larger one keeps them above rounding and chance;
    0.15 leaves tanh the most signal, or nearly, after 100 layers of 100 units, on digits and on
    MNIST. gelu and silu need a larger one (20 and 50, say): a small fixed point of theirs
    repels. Raises a ValueError where the biases' variance would be negative: sigmoid has a
    critical point only at a large q, softplus at none.
    """
    sigma_w2, sigma_b2 = edge(activation, q)
    weight.normal_(0.0, math.sqrt(sigma_w2 / fan_in), generator=generator)
    bias.normal_(0.0, math.sqrt(sigma_b2), generator=generator)

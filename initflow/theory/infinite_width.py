"""Mean-field theory of signal propagation: what the variances should be, layer by layer.

In a wide network with independent weights of mean 0, the pre-activations of a layer are
Gaussian, and their variance q follows from that of the layer before (Poole et al. 2016,
"Exponential expressivity in deep neural networks through transient chaos"; Schoenholz et al.
2017, "Deep Information Propagation"):

    q' = σ_w² E[φ(√q z)²] + σ_b²,   z ~ N(0, 1),   σ_w² = fan_in · Var(W),   σ_b² = Var(b).

Everything is in double precision, depends on nothing but its arguments and draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from initflow.initializers.activations import Activation
from initflow.theory.integrals import (
    log_slope,
    product_moment,
    second_moment,
    slope_moment,
    slope_product_moment,
)


@dataclass(frozen=True)
class MeanField:
    """An infinitely deep and wide network under one σ_w² and σ_b².

    ``q_star`` is the variance that the variance map leads to, ``chi_1`` the factor on the
    gradient's second moment per layer there (stable where it is 1), ``c_star`` the
    correlation that two inputs come to. ``xi_q`` and ``xi_c`` are the depths, in layers, over
    which the distances from ``q_star`` and ``c_star`` change e-fold.
    """

    q_star: float
    chi_1: float
    c_star: float
    xi_q: float
    xi_c: float


def variance_map(activation: Activation, q: Tensor, sigma_w2: float, sigma_b2: float) -> Tensor:
    """The next layer's pre-activation variance, for each of ``q``: σ_w² E[φ(√q z)²] + σ_b².

    ``sigma_w2`` is fan_in · Var(W), ``sigma_b2`` the variance of the biases.
    """
    return sigma_w2 * second_moment(activation, q) + sigma_b2


def correlation_map(
    activation: Activation, c: Tensor, q: float, sigma_w2: float, sigma_b2: float
) -> Tensor:
    """The next layer's correlation of two inputs with correlation ``c`` and variance ``q``."""
    at = torch.full_like(c, q)
    shared = sigma_w2 * product_moment(activation, at, c) + sigma_b2
    return shared / variance_map(activation, at, sigma_w2, sigma_b2)


def fixed_point(
    activation: Activation, sigma_w2: float, sigma_b2: float, start: float = 1.0
) -> float:
    """q*: where the variance map leads from ``start``; 0 or infinity where it ends nowhere else.

    A variance that the map leaves as it is (every one, for ReLU under He) is returned itself.
    """

    def growth(q: Tensor) -> Tensor:
        return variance_map(activation, q, sigma_w2, sigma_b2) / q - 1

    first = growth(_double(start)).item()
    if abs(first) < 1e-12:
        return start
    limit = 1e40 if first > 0 else sigma_b2 / 2 or 1e-9  # no variance is below σ_b²
    ratio = 1.1 if first > 0 else 1 / 1.1
    passed = start * ratio ** torch.arange(math.log(limit / start, ratio), dtype=torch.float64)
    turned = (growth(passed) * math.copysign(1, first) < -1e-12).nonzero()
    if not len(turned):
        return math.inf if first > 0 else 0.0
    beyond = passed[turned[0]].item()
    return _bisect(lambda q: growth(_double(q)).item() * first > 0, beyond / ratio, beyond)


def mean_field(activation: Activation, sigma_w2: float, sigma_b2: float) -> MeanField:
    """What many layers make of a signal, under one ``sigma_w2`` and ``sigma_b2``.

    ``sigma_w2`` is fan_in · Var(W), 2 under He's scheme and 1 under LeCun's; ``sigma_b2`` is the
    variance of the biases. Poole et al. 2016; Schoenholz et al. 2017.
    """
    q_star = fixed_point(activation, sigma_w2, sigma_b2)
    q = min(max(q_star, 1e-20), 1e20)
    at = _double(q)
    growth = variance_map(activation, at, sigma_w2, sigma_b2).item() / q  # 1, but at 0 and infinity
    slope_q = sigma_w2 * second_moment(activation, at).item() / q
    slope_q *= log_slope(lambda q: second_moment(activation, q), at).item()
    chi_1 = sigma_w2 * slope_moment(activation, at).item()

    def drawn_together(c: float) -> bool:
        return correlation_map(activation, _double(c), q, sigma_w2, sigma_b2).item() > c

    together = chi_1 <= growth * (1 + 1e-6)
    c_star = 1.0 if together else _bisect(drawn_together, 0.0, 1.0 - 1e-9)
    slope_c = sigma_w2 * slope_product_moment(activation, at, _double(c_star)).item()
    slope_c /= growth or 1.0  # where all weights are 0, nothing is left to correlate
    return MeanField(q_star, chi_1, c_star, _depth_scale(slope_q), _depth_scale(slope_c))


def _depth_scale(slope: float) -> float:
    change = abs(math.log(slope)) if slope > 0 else math.inf
    return 1 / change if change > 1e-6 else math.inf


def _double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _bisect(inside: Callable[[float], bool], low: float, high: float) -> float:
    """Where ``inside``, true at ``low`` and false at ``high``, turns."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) else (low, middle)
    return (low + high) / 2

"""Mean-field theory of signal propagation: what the variances should be, layer by layer.

In a wide network with independent weights of mean 0, the pre-activations of a layer are
Gaussian, and their variance q follows from that of the layer before (Poole et al. 2016,
"Exponential expressivity in deep neural networks through transient chaos"; Schoenholz et al.
2017, "Deep Information Propagation"):

    q' = σ_w² E[φ(√q z)²] + σ_b²,   z ~ N(0, 1),   σ_w² = fan_in · Var(W),   σ_b² = Var(b).

Expectations are closed forms where there is one, and else Gauss-Legendre quadrature, split
where the activation functions have their kinks, good to 1e-6 or better. Everything is in
double precision, depends on nothing but its arguments and draws nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from initflow.initializers.activations import LEAKY_RELU_SLOPE, Activation

FAR = 12.0  # standard deviations: what lies beyond weighs less than 1e-32
SHARP = 30.0  # where every activation function has gone over into its straight tail
NODES = 64
TINY, HUGE = 1e-75, 1e75  # variances whose fourth powers are still numbers


Function = Callable[[Tensor], Tensor]


# φ(x) = x for x > 0 and slope · x below, by name.
RECTIFIERS = {"relu": 0.0, "leaky_relu": LEAKY_RELU_SLOPE, "linear": 1.0}


@functools.cache
def _legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes in [0, 1] and their weights."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)


def expectation(function: Function, q: Tensor) -> Tensor:
    """E[f(√q z)] for each of ``q`` (…); f is smooth but for a kink or step at 0."""
    x, w = _legendre(NODES)
    scale = q.clamp(TINY, HUGE).sqrt().unsqueeze(-1)
    near = (SHARP / scale).clamp(max=FAR / 2)  # where f bends most
    z = torch.cat([near * x, near + (FAR - near) * x], -1)
    weight = torch.cat([near * w, (FAR - near) * w], -1) * torch.exp(-z.square() / 2)
    values = function(scale * z) + function(-scale * z)
    return (weight * values).sum(-1) / math.sqrt(2 * math.pi)


def pair_expectation(function: Function, q: Tensor, c: Tensor) -> Tensor:
    """E[f(u₁) f(u₂)], u₁ and u₂ of variance ``q`` and correlation ``c``, for each of both (…).

    In polar coordinates the kinks of f are four fixed angles.
    """
    x, w = _legendre(NODES)
    scale = q.clamp(TINY, HUGE).sqrt()[..., None, None]
    angle = torch.arccos(c.clamp(-1, 1)).unsqueeze(-1)
    start, theta, theta_weight = angle - math.pi / 2, [], []
    for length in (math.pi - angle, angle, math.pi - angle, angle):
        theta.append(start + length * x)
        theta_weight.append((length * w).expand_as(theta[-1]))
        start = start + length
    angles = torch.cat(theta, -1).unsqueeze(-2)
    near = (SHARP / scale).clamp(max=FAR / 2)
    r = torch.cat([near * x[:, None], near + (FAR - near) * x[:, None]], -2)
    r_weight = torch.cat([near * w[:, None], (FAR - near) * w[:, None]], -2)
    weight = r_weight * r * torch.exp(-r.square() / 2) * torch.cat(theta_weight, -1).unsqueeze(-2)
    values = function(scale * r * torch.cos(angles))
    values = values * function(scale * r * torch.cos(angles - angle.unsqueeze(-1)))
    return (weight * values).sum((-1, -2)) / (2 * math.pi)


def second_moment(activation: Activation, q: Tensor) -> Tensor:
    """E[φ(√q z)²] for each of ``q``; in closed form for rectifiers and gelu."""
    if activation.name in RECTIFIERS:
        return q * (1 + RECTIFIERS[activation.name] ** 2) / 2
    if activation.name == "gelu":
        # x·Φ(x): Stein's lemma twice, from E[Φ²] = 1/4 + arcsin(q/(1 + q))/2π.
        density = 1 / (2 * math.pi * (1 + 2 * q).sqrt())  # E[N(x; 0, 1)²]
        return q * (_mean_squared_normal_cdf(q) + 2 * q / (1 + q) * density)
    return expectation(lambda x: activation.function(x).square(), q)


def slope_moment(activation: Activation, q: Tensor) -> Tensor:
    """E[φ′(√q z)²] for each of ``q``; in closed form for rectifiers and gelu."""
    if activation.name in RECTIFIERS:
        return torch.full_like(q, (1 + RECTIFIERS[activation.name] ** 2) / 2)
    if activation.name == "gelu":
        density = 1 / (2 * math.pi * (1 + 2 * q).sqrt())
        return _mean_squared_normal_cdf(q) + density * (2 * q / (1 + q) + q / (1 + 2 * q))
    return expectation(lambda x: activation.derivative(x).square(), q)


def _mean_squared_normal_cdf(q: Tensor) -> Tensor:
    return 1 / 4 + torch.arcsin(q / (1 + q)) / (2 * math.pi)


def product_moment(activation: Activation, q: Tensor, c: Tensor) -> Tensor:
    """E[φ(u₁) φ(u₂)] at variance ``q`` and correlation ``c``; closed form for rectifiers.

    Cho and Saul 2009, "Kernel Methods for Deep Learning" (arc-cosine kernels).
    """
    if activation.name in RECTIFIERS:  # φ(x) = even · |x| + odd · x
        odd, even = _odd_and_even(activation)
        c = c.clamp(-1, 1)
        absolute = 2 / math.pi * ((1 - c.square()).sqrt() + c * torch.arcsin(c))
        return q * (odd**2 * c + even**2 * absolute)
    return pair_expectation(activation.function, q, c)


def slope_product_moment(activation: Activation, q: Tensor, c: Tensor) -> Tensor:
    """E[φ′(u₁) φ′(u₂)] at variance ``q`` and correlation ``c``; closed form for rectifiers."""
    if activation.name in RECTIFIERS:
        odd, even = _odd_and_even(activation)
        return odd**2 + even**2 * 2 / math.pi * torch.arcsin(c.clamp(-1, 1)) + 0 * q
    return pair_expectation(activation.derivative, q, c)


def _odd_and_even(activation: Activation) -> tuple[float, float]:
    slope = RECTIFIERS[activation.name]
    return (1 + slope) / 2, (1 - slope) / 2


def log_slope(function: Function, q: Tensor) -> Tensor:
    """d log f / d log q."""
    step = 1e-4
    return (function(q * (1 + step)) / function(q * (1 - step))).log() / (2 * step)


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
    """The next layer's pre-activation variance, for each of ``q``: σ_w² E[φ(√q z)²] + σ_b²."""
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
    """The fixed points and depth scales of a layer under ``sigma_w2`` and ``sigma_b2``."""
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

"""Means over Gaussian pre-activations: of an activation function, its slope, and of two images.

Closed forms where there is one, and else Gauss-Legendre quadrature, split where the activation
functions have their kinks, good to 1e-6 or better, in double precision.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

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
def _legendre() -> tuple[Tensor, Tensor]:
    """:data:`NODES` nodes in [0, 1] and their weights."""
    x, w = np.polynomial.legendre.leggauss(NODES)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)


def expectation(function: Function, q: Tensor) -> Tensor:
    """E[f(√q z)] for each of ``q`` (…); f is smooth but for a kink or step at 0."""
    x, w = _legendre()
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
    x, w = _legendre()
    scale = q.clamp(TINY, HUGE).sqrt()[..., None, None]
    angle = torch.arccos(c.clamp(-1, 1)).unsqueeze(-1)
    start, theta, theta_weight = angle - math.pi / 2, [], []
    for length in (math.pi - angle, angle, math.pi - angle, angle):
        theta.append(start + length * x)
        theta_weight.append(length * w)
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
        cumulative, density = _normal_moments(q)  # x·Φ(x): Stein's lemma twice
        return q * (cumulative + 2 * q / (1 + q) * density)
    return expectation(lambda x: activation.function(x).square(), q)


def slope_moment(activation: Activation, q: Tensor) -> Tensor:
    """E[φ′(√q z)²] for each of ``q``; in closed form for rectifiers and gelu."""
    if activation.name in RECTIFIERS:
        return torch.full_like(q, (1 + RECTIFIERS[activation.name] ** 2) / 2)
    if activation.name == "gelu":
        cumulative, density = _normal_moments(q)
        return cumulative + density * (2 * q / (1 + q) + q / (1 + 2 * q))
    return expectation(lambda x: activation.derivative(x).square(), q)


def _normal_moments(q: Tensor) -> tuple[Tensor, Tensor]:
    """E[Φ(√q z)²] and E[φ(√q z)²] of the standard normal distribution and its density."""
    cumulative = 1 / 4 + torch.arcsin(q / (1 + q)) / (2 * math.pi)
    return cumulative, 1 / (2 * math.pi * (1 + 2 * q).sqrt())


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

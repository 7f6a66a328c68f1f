"""What chance does in a network of finite width: the factors that a layer's second moments take on.

A second moment is a mean over a layer's n units, so chance multiplies what an infinitely wide
network would have by a factor of mean 1 and relative variance of order 1/n. The factors are taken
as log-normal and kept as logarithms, (:data:`NETWORKS`,): one number for each of the networks that
a band is read from. Nothing here draws from torch's own generator, and the same call gives the same
numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from initflow.initializers.activations import Activation
from initflow.theory.integrals import expectation, second_moment, slope_moment

NETWORKS = 8_192
FLOOR = 1e-60  # of variances; what chance makes of it is a number too


@functools.lru_cache(maxsize=2)
def network_draws(n: int) -> Tensor:
    """(n, networks) from N(0, 1), evenly spread."""
    sobol = torch.quasirandom.SobolEngine(n, scramble=True, seed=0)  # type: ignore[no-untyped-call]
    uniform: Tensor = sobol.draw(NETWORKS, dtype=torch.float64)
    draws: Tensor = torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12)).T.contiguous()
    return draws


@functools.lru_cache(maxsize=2)
def _image_draws(networks: int, images: int) -> Tensor:
    """(networks, images) from N(0, 1)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(networks, images, dtype=torch.float64, generator=generator)


def log_factor(relative_variance: float, draws: Tensor) -> Tensor:
    """The logarithm of a log-normal factor of mean 1, at each of ``draws`` from N(0, 1)."""
    variance = math.log1p(max(relative_variance, 0.0))
    return math.sqrt(variance) * draws - variance / 2


def log_mean_factor(variance: float, images: int) -> Tensor:
    """The logarithm of the mean of ``images`` log-normal factors of mean 1, (networks,).

    ``variance`` is that of one factor's logarithm. Where it is large the mean is not what is
    typical: one image outweighs all.
    """
    of_mean = math.expm1(min(variance, 700.0)) / images
    if of_mean < 1e-2:
        return log_factor(of_mean, _image_draws(NETWORKS, 1)[:, 0])
    draws = _image_draws(256, min(images, 1_000))
    factors = math.sqrt(variance) * draws - variance / 2
    return (factors.logsumexp(1) - math.log(factors.shape[1])).repeat(NETWORKS // len(draws))


def own_variance(own: float, common: float, units: int) -> float:
    """The variance of the logarithm of an image's own factor, beyond the one that all images share.

    ``own`` and ``common`` are the relative variances of one unit's square and of its covariance
    between two images; a mean over ``units`` has that share of them.
    """
    return max(0.0, math.log1p(max(own, 0.0) / units) - math.log1p(max(common, 0.0) / units))


def alignment(product: float, unevenness: float, units: int) -> float:
    """Root mean square cosine of two images, whose squared mean product is ``product``.

    Also of unrelated ones, products summed over n units have a mean square of order 1/n.
    """
    return min(1.0, math.sqrt(product + max(unevenness - product, 0.0) / units))


def grid(q: Tensor, log_factors: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Variances (40,) that cover q · e^``log_factors``, and how values there become (networks,)."""
    low, high = log_factors.min().item(), log_factors.max().item() + 1e-9
    at = torch.linspace(low, high, 40, dtype=torch.float64)
    return q * at.exp(), lambda values: torch.from_numpy(np.interp(log_factors, at, values))


def along_activations(activation: Activation, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How a layer treats the gradient along its own activations, for each of ``q``.

    In units of E[φ′²]: the part of the squared length along it that arrives along the activations
    of the layer before, what arrives there from other directions, and the weight of that direction
    among what φ′ lets pass. 1, 0 and 1 for a linear layer.
    """
    f, d = activation.function, activation.derivative
    q = q.clamp(FLOOR, 1 / FLOOR)
    slopes, moments = slope_moment(activation, q), second_moment(activation, q)
    kept = expectation(lambda x: x * d(x) * f(x), q, activation).square() / (moments * q * slopes)
    whole = expectation(lambda x: (x * d(x)).square(), q, activation) / (q * slopes)
    weight = expectation(lambda x: (f(x) * d(x)).square(), q, activation) / (moments * slopes)
    return kept, whole - kept, weight

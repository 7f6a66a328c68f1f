"""Samples of independent normal variables, for means that have no closed form.

Of one or two variables they are nodes of a quadrature, with weights; of more, evenly spread points
of equal weight. Odd moments are 0 in all of them, so that half of a rectified variable's square is
there, to the last bit; variances are 1.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

INSIDE = 1e-6  # how far from 0 and 1 what is turned into a normal variable stays
FAR = 7.0  # standard deviations
MOST = 32  # nodes on either side of 0
FEW = 2  # variables, of which products of nodes are taken


@functools.lru_cache(maxsize=64)
def weighted_samples(samples: int, variables: int) -> tuple[Tensor, Tensor]:
    """(samples, variables) and (samples,), their weights, whose sum is 1; about so many samples.

    The two halves of more than two variables are spread independently of each other: with either,
    the other's opposites are there, too.
    """
    if variables > FEW:
        return normal_samples(samples, variables), torch.full((samples,), 1 / samples).double()
    side = min(MOST, int(samples ** (1 / variables)) // 2)
    x, w = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(side))
    half = FAR * (x + 1) / 2  # split at 0, where activation functions have their kinks
    z, weights = torch.cat([-half.flip(0), half]), torch.cat([w.flip(0), w])
    weights = weights * torch.exp(-z.square() / 2)
    weights = weights / weights.sum()
    z = z / (weights @ z.square()).sqrt()
    places = torch.cartesian_prod(*[torch.arange(len(z))] * variables).reshape(-1, variables)
    return z[places], weights[places].prod(-1)


@functools.lru_cache(maxsize=64)
def normal_samples(samples: int, variables: int) -> Tensor:
    """(samples, variables), in double precision; the same ones whenever asked.

    Points of Sobol's sequence, scrambled, with the signs of either half of the variables turned:
    what is odd in one of the halves has the mean 0. Within a half, covariances are 0.
    """
    middle = (variables + 1) // 2
    quarter = samples // 4
    sequence = torch.quasirandom.SobolEngine(variables, scramble=True, seed=0)  # type: ignore[no-untyped-call]
    points: Tensor = sequence.draw(quarter)
    z = torch.special.ndtri(points.double().clamp(INSIDE, 1 - INSIDE))
    first, second = _uncorrelated(z[:, :middle]), _uncorrelated(z[:, middle:])
    signs = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    return torch.cat([torch.cat([a * first, b * second], 1) for a, b in signs])


def uncorrelated_samples(samples: int, variables: int, seed: int) -> Tensor:
    """(samples, variables), in double precision, others for another ``seed``.

    Their covariances are 0 where there are more than two samples a variable.
    """
    stream = torch.Generator().manual_seed(seed)
    return _uncorrelated(torch.randn(samples, variables, generator=stream, dtype=torch.double))


def _uncorrelated(z: Tensor) -> Tensor:
    if not z.shape[1]:
        return z
    covariance = z.T @ z / len(z)
    if len(z) <= 2 * z.shape[1]:
        return z / covariance.diagonal().sqrt()
    root = torch.linalg.cholesky(covariance)
    found: Tensor = torch.linalg.solve_triangular(root, z.T, upper=False)
    return found.T.contiguous()

"""Evenly spread samples of independent normal variables, for means that have no closed form."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

INSIDE = 1e-6  # how far from 0 and 1 what is turned into a normal variable stays


@functools.lru_cache(maxsize=64)
def normal_samples(samples: int, variables: int) -> Tensor:
    """(samples, variables), in double precision; the same ones whenever asked.

    Half of Sobol's sequence, scrambled, with its mirror image: odd moments are 0, so that half of
    a rectified variable's square is there, to the last bit. Variances are 1 and covariances 0, too.
    """
    half = samples // 2
    sequence = torch.quasirandom.SobolEngine(variables, scramble=True, seed=0)  # type: ignore[no-untyped-call]
    points: Tensor = sequence.draw(half)
    z = torch.special.ndtri(points.double().clamp(INSIDE, 1 - INSIDE))
    covariance = z.T @ z / half
    if half > 2 * variables:
        z = torch.linalg.solve_triangular(
            torch.linalg.cholesky(covariance), z.T, upper=False
        ).T.contiguous()
    else:
        z = z / covariance.diagonal().sqrt()
    return torch.cat([z, -z])

"""Where a function that nothing is known of is smooth: the pieces to integrate it on.

Adaptive bisection: a piece is kept where the polynomial through its Gauss-Legendre nodes is the
function, and its derivative, at points between them and at both ends, to 1e-10 of its size, and is
halved where it is not. So a kink or a step is closed in from both sides, to some 1e-14 of its
place, and on all other pieces Gauss-Legendre quadrature with those nodes is as good as exact.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from initflow.initializers.activations import Activation

NODES = 16
TOLERANCE, ROUNDING = 1e-10, 1e-14
DEEPEST = 46  # halvings, after which a piece is as narrow as double precision tells places apart
MOST = (
    4_096  # pieces that are halved at once: what oscillates faster, or is noise, is left as it is
)
MOST_BREAKS = 200
LEAST = 2.0**-20
OFF = 1.0123456789


@functools.cache
def legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """``nodes`` nodes in [0, 1] and their weights."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)


@functools.cache
def _checks() -> tuple[Tensor, Tensor]:
    """Points in [0, 1] between the nodes, and the matrix that takes values at the nodes to them."""
    nodes = legendre(NODES)[0]
    # At an end itself, the function may have the value of the piece beyond it.
    ends = nodes.new_tensor([1e-9]), nodes.new_tensor([1 - 1e-9])
    between = torch.cat([ends[0], (nodes[1:] + nodes[:-1]) / 2, ends[1]])
    vander = np.polynomial.legendre.legvander
    at_nodes, at_checks = (vander(2 * x.numpy() - 1, NODES - 1) for x in (nodes, between))
    return between, torch.from_numpy(np.linalg.solve(at_nodes.T, at_checks.T))


@dataclass(frozen=True)
class Pieces:
    """``edges``: (k + 1,), ascending, of the pieces; ``breaks``: (n,), where it has its kinks."""

    edges: Tensor
    breaks: Tensor


@functools.lru_cache(maxsize=256)
def pieces(activation: Activation, octaves: int) -> Pieces:
    """Those of an activation and its derivative between ±2^``octaves``."""
    edges = _start(octaves)
    low, high = edges[:-1], edges[1:]
    nodes, (between, interpolate) = legendre(NODES)[0], _checks()
    kept, breaks = [edges], [edges.new_zeros(1)]
    floor = ROUNDING * _both(activation, torch.linspace(-1, 1, 64, dtype=torch.float64)).amax(-1)
    for depth in range(DEEPEST):
        width = (high - low).unsqueeze(-1)
        values = _both(activation, low.unsqueeze(-1) + width * nodes)
        checked = _both(activation, low.unsqueeze(-1) + width * between)
        size = torch.maximum(values.abs().amax(-1), checked.abs().amax(-1))
        error = (values @ interpolate - checked).abs().amax(-1)
        rough = ((error > TOLERANCE * size + floor[:, None]) & size.isfinite()).any(0)
        if not rough.any() or rough.sum() > MOST:
            break
        low, high = low[rough], high[rough]
        middle = (low + high) / 2
        if depth == DEEPEST - 1:
            breaks.append(middle)
        kept.append(middle)
        low, high = torch.cat([low, middle]), torch.cat([middle, high])
    found = torch.cat(breaks).sort().values
    apart = torch.cat([found.new_ones(1, dtype=torch.bool), found.diff() > 1e-12 * found[1:].abs()])
    found = found[apart] if apart.sum() <= MOST_BREAKS else found.new_zeros(1)
    return Pieces(torch.cat(kept).sort().values, found)


def octaves(largest: float) -> int:
    """Those that reach as far as ``largest``."""
    return max(4, math.ceil(math.log2(largest)))


def _start(octaves: int) -> Tensor:
    """Edges to begin with: evenly where most of N(0, 1) lies, and two an octave beyond."""
    steps = torch.arange(2 * math.log2(LEAST), 2 * octaves + 1, dtype=torch.float64)
    positive = torch.cat([2 ** (steps / 2), torch.arange(1, 33, dtype=torch.float64) / 8])
    positive *= OFF  # a kink that is an edge from the first would not be found, and most are round
    return torch.cat([-positive, positive.new_zeros(1), positive]).sort().values


def _both(activation: Activation, x: Tensor) -> Tensor:
    """(2, …): the function at ``x``, and its derivative."""
    return torch.stack([activation.function(x), activation.derivative(x)])

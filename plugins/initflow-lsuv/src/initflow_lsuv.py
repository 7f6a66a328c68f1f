"""Orthonormal weights, then unit variance layer by layer, as measured on images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import initflow

ROUNDING = 16  # so many units in the last place of the outputs are no variance of theirs


@initflow.initializer
def lsuv(
    network: nn.Sequential,
    images: Tensor,
    generator: torch.Generator,
    *,
    tolerance: float = 0.1,
    max_iterations: int = 10,
) -> None:
    """Orthonormal weights, scaled until every layer's outputs have variance 1 on the images.

    Layer by layer from the first to the logits: the weights are drawn as ``orthogonal`` draws
    them, then divided by the standard deviation of the layer's pre-activations, over all images
    and units, until that variance is 1 to within ``tolerance``, at most ``max_iterations``
    times. Once would do but for the biases, which stay as they are. What does not vary cannot
    be scaled: a layer that receives nothing, or constants that it maps to one number, keeps its
    orthonormal weights. Mishkin and Matas 2015, "All you need is a good init", algorithm 1.

    Nothing is assumed of the activation function, and so no variance is stated. Raises a
    ValueError for a ``tolerance`` that is not above 0 or ``max_iterations`` below 1.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, not {tolerance:g}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, not {max_iterations}")
    x = images
    for module in network:
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight, generator=generator)
            _scale(module, x, tolerance, max_iterations)
        x = module(x)


def _scale(layer: nn.Linear, x: Tensor, tolerance: float, max_iterations: int) -> None:
    """Scale the weights of ``layer`` until its outputs for ``x`` (n, fan_in) have variance 1."""
    for _ in range(max_iterations):
        outputs = layer(x)
        variance = outputs.double().var(correction=0).item()
        reached = abs(variance - 1) <= tolerance
        if reached or not (_varies(outputs) and _varies(outputs - layer.bias)):
            return
        layer.weight.div_(variance**0.5)


def _varies(outputs: Tensor) -> bool:
    """Whether ``outputs`` are finite, and differ by more than rounding."""
    limits = torch.finfo(outputs.dtype)
    std = outputs.double().std(correction=0).item()
    least = max(ROUNDING * limits.eps * outputs.abs().max().item(), limits.tiny)
    return least < std < limits.max

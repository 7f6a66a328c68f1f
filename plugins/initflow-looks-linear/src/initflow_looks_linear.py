"""Mirrored weights: an untrained network that computes a linear map, although its units do not."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import initflow
from initflow.initializers import Activation

PROPORTIONAL = 1e-6  # to within this share, over the inputs that follow
INPUTS = (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0)


@functools.cache
def odd_slope(activation: Activation) -> float:
    """The s of φ(x) − φ(−x) = s·x, by which two mirrored units are linear together.

    1 for relu, gelu, silu and softplus. Raises a :class:`ValueError` for a φ without any.
    """
    x = torch.tensor(INPUTS, dtype=torch.float64)
    slopes = (activation.function(x) - activation.function(-x)) / x
    low, high = slopes.min().item(), slopes.max().item()
    if not 0 < low <= high <= low * (1 + PROPORTIONAL):
        raise ValueError(
            f"{activation.name} cannot look linear: φ(x) − φ(−x) must be a multiple of x, as "
            f"relu's is, but it is {slopes[0]:.3g}·x at x = {x[0]:g} and {slopes[-1]:.3g}·x at "
            f"x = {x[-1]:g}"
        )
    return slopes.mean().item()


def _scale(activation: Activation, layer: int, depth: int, gain: float) -> float:
    """What the orthonormal blocks are multiplied by: the activations before it count s-fold."""
    slope = odd_slope(activation) if depth > 1 else 1.0  # also the first layer refuses tanh
    return gain / slope if layer else gain


def _variance(
    *, fan_in: int, fan_out: int, activation: Activation, layer: int, depth: int, gain: float
) -> float:
    rows = fan_out if layer == depth - 1 else -(-fan_out // 2)
    columns = fan_in if layer == 0 or fan_in == 1 else fan_in // 2
    filled = 1 if layer == 0 or fan_in == 1 else 2 * columns / fan_in
    return filled * _scale(activation, layer, depth, gain) ** 2 / max(rows, columns)


@initflow.initializer(variance=_variance, bias_variance=lambda: 0.0)
def looks_linear(
    weight: Tensor,
    bias: Tensor,
    *,
    activation: Activation,
    layer: int,
    depth: int,
    generator: torch.Generator,
    gain: float = 1.0,
) -> None:
    """Orthonormal blocks, mirrored: [A; −A] first, [B, −B; −B, B] between, [C, −C] last.

    Each hidden unit has one that receives the opposite, and what follows takes the difference of
    the two, φ(x) − φ(−x) = s·x. So the untrained network computes the linear map
    gain^depth·C…BA, at any depth, and passes signals and gradients as that does. Biases are 0;
    blocks after an activation are divided by s, which is found from the activation function.
    The variance is gain²/max(rows, columns) of the block, divided by s², in a fully connected
    layer. Balduzzi, Frean, Leary, Lewis, Ma and McWilliams 2017, "The Shattered Gradients
    Problem: If resnets are the answer, then what is the question?"

    A hidden layer of odd width has one unit without a mirror image, which nothing listens to
    before training; a single unit is listened to as it is, and does not look linear. Of a
    convolution, channels are mirrored. Raises a ValueError for activation functions without
    such an s: tanh, sigmoid, elu, selu.
    """
    scale = _scale(activation, layer, depth, gain)
    units, inputs = weight.shape[:2]
    mirrored_units, mirrored_inputs = layer < depth - 1, layer > 0 and inputs > 1
    block = weight.new_empty(
        -(-units // 2) if mirrored_units else units,
        inputs // 2 if mirrored_inputs else inputs,
        *weight.shape[2:],
    )
    torch.nn.init.orthogonal_(block, scale, generator=generator)
    if mirrored_inputs:
        alone = block.new_zeros(len(block), inputs % 2, *weight.shape[2:])
        block = torch.cat([block, alone, -block], 1)
    if mirrored_units:
        block = torch.cat([block, -block])[:units]
    weight.copy_(block)
    bias.zero_()

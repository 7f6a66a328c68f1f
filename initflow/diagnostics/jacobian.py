"""Exact Jacobians of feed-forward networks, and the neural tangent kernel, on a few images.

With h_l the pre-activations of layer l, D_l = diag φ′(h_l) and L hidden layers, they are

- ``hidden``: ∂h_L/∂h_1 = W_L D_{L−1} … W_2 D_1, from the first hidden layer to the last,
- ``input_output``: ∂logits/∂x = W_{L+1} D_L W_L … D_1 W_1,
- ``fc1`` and so on: ∂φ(h_l)/∂φ(h_{l−1}) = D_l W_l, of a layer alone; of the last one W_{L+1}.

The empirical neural tangent kernel is Θ = ∂f/∂θ (∂f/∂θ)ᵀ, over all images and logits, θ being all
weights and biases (Jacot, Gabriel and Hongler 2018, "Neural Tangent Kernel"). It is formed of the
layers' Gram matrices, without the Jacobian by the parameters. All is in double precision.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from initflow.initializers.activations import Activation
from initflow.training.model import Parameters, layer_names

IMAGES = 16  # at most, and as few as it takes for VALUES singular values, but LEAST
VALUES = 1_600
LEAST = 2
TANGENT_IMAGES = 32  # of the neural tangent kernel, and fewer where there are many classes
TANGENT_ROWS = 2_000
HIDDEN, INPUT_OUTPUT = "hidden", "input_output"


@dataclass(frozen=True)
class Singular:
    """The singular values of a Jacobian on some images.

    ``logarithms``: (images, k), natural ones, descending; −∞ of those that are 0, or too small
    beside the largest for double precision to tell them from 0.
    """

    logarithms: Tensor

    @property
    def condition_number(self) -> float:
        """The largest over the smallest singular value, the median of the images'."""
        ends = self.logarithms[:, 0] - self.logarithms[:, -1]
        return math.inf if ends.isnan().any() else _exp(statistics.median(ends.tolist()))

    @property
    def largest(self) -> float:
        return _exp(self.logarithms.max().item())

    @property
    def mean_square(self) -> float:
        log_sum = torch.logsumexp(2 * self.logarithms.flatten(), 0).item()
        return _exp(log_sum - math.log(self.logarithms.numel()))

    @property
    def zero(self) -> float:
        """The share of those that are 0."""
        return self.logarithms.isneginf().double().mean().item()

    def quantile(self, share: float) -> float:
        values = self.logarithms.flatten().sort().values
        return _exp(values[min(int(share * len(values)), len(values) - 1)].item())


@dataclass(frozen=True)
class Jacobians:
    """What was measured on ``images`` images: by the Jacobian's name, where it is finite.

    ``tangent`` is the largest eigenvalue of Θ/n, n being ``tangent_images``; None where there are
    too many classes, or it is not finite.
    """

    images: int
    singular: dict[str, Singular]
    tangent: float | None
    tangent_images: int


def measure(parameters: Parameters, activation: Activation, images: Tensor) -> Jacobians:
    """The Jacobians of a network, a stack of one, on some of ``images`` (n, pixels), evenly spaced.

    The number of images is at most 16, and at least 2: 1,600 singular values are enough.
    """
    widths = parameters.widths
    n = min(max(VALUES // max(widths[1:-1], default=widths[-1]), LEAST), IMAGES, len(images))
    chain = _Chain(parameters, activation, _evenly(images, n))
    names = layer_names(len(chain.weights))
    products = {HIDDEN: (chain.slopes[:-1], chain.weights[1:-1])} if len(names) > 2 else {}
    found = {}
    for name, (slopes, weights) in products.items():
        first = torch.eye(widths[1], dtype=torch.float64)
        found[name] = _singular(n, [*zip(slopes, weights, strict=True)], first)
    through = [*zip(chain.slopes, chain.weights[1:], strict=True)]
    found[INPUT_OUTPUT] = _singular(n, through, chain.weights[0])
    last = chain.weights[-1].new_ones(n, widths[-1])  # which has no activation
    for name, weight, of in zip(names, chain.weights, [*chain.slopes, last], strict=True):
        found[name] = _values(of.unsqueeze(-1) * weight, torch.zeros(n, dtype=torch.float64), 1)
    there = {name: one for name, one in found.items() if one is not None}
    rows = min(TANGENT_IMAGES, TANGENT_ROWS // widths[-1], len(images))
    tangent = None
    if rows >= LEAST:
        tangent = _Chain(parameters, activation, _evenly(images, rows)).tangent()
    return Jacobians(n, there, tangent, rows)


def _evenly(images: Tensor, n: int) -> Tensor:
    return images[torch.arange(n) * len(images) // n]


class _Chain:
    """A network on some images: its ``weights`` (fan_out, fan_in), and ``slopes`` (n, units)."""

    def __init__(self, parameters: Parameters, activation: Activation, images: Tensor) -> None:
        self.weights = [weight[0].detach().cpu().double() for weight in parameters.weights]
        biases = [bias[0].detach().cpu().double() for bias in parameters.biases]
        self.inputs = [images.detach().cpu().double()]
        self.slopes: list[Tensor] = []
        for weight, bias in zip(self.weights[:-1], biases[:-1], strict=True):
            preactivations = self.inputs[-1] @ weight.T + bias
            self.slopes.append(activation.derivative(preactivations))
            self.inputs.append(activation.function(preactivations))

    def tangent(self) -> float | None:
        """The largest eigenvalue of Θ/n: the sum over the layers of (1 + x xᵀ) ∘ δ δᵀ.

        x are the inputs of a layer on two images, δ the logits' gradients by its pre-activations.
        """
        n, classes = len(self.inputs[0]), len(self.weights[-1])
        delta = torch.eye(classes, dtype=torch.float64).expand(n, -1, -1)
        kernel = torch.zeros(n, classes, n, classes, dtype=torch.float64)
        for at in range(len(self.weights) - 1, -1, -1):
            of_inputs = 1 + self.inputs[at] @ self.inputs[at].T
            flat = delta.reshape(n * classes, -1)
            of_delta = (flat @ flat.T).view(n, classes, n, classes)
            kernel += of_inputs[:, None, :, None] * of_delta
            if at:
                delta = delta @ self.weights[at] * self.slopes[at - 1].unsqueeze(1)
        whole = kernel.view(n * classes, n * classes)
        if not whole.isfinite().all():
            return None
        return float(torch.linalg.eigvalsh(whole)[-1]) / n


def _singular(n: int, factors: list[tuple[Tensor, Tensor]], first: Tensor) -> Singular | None:
    """Of W_k D_k … W_1 D_1 ``first``, for ``factors`` of D, (n, units), and W, and ``n`` images."""
    logs = torch.zeros(n, dtype=torch.float64)
    # From the side on which it is narrower.
    rows = len(factors[-1][1]) if factors else len(first)
    product = torch.eye(rows, dtype=torch.float64).expand(n, -1, -1)
    for slopes, weight in reversed(factors):
        product = product @ weight * slopes.unsqueeze(1)
        size = product.abs().amax((1, 2))
        size = size.where(size > 0, 1.0)
        product, logs = product / size[:, None, None], logs + size.log()
    return _values(product @ first, logs, len(factors) + 1)


def _values(matrices: Tensor, logs: Tensor, factors: int) -> Singular | None:
    """Singular values of (n, rows, columns) times e^``logs``; None where they are not finite."""
    if not (matrices.isfinite().all() and logs.isfinite().all()):
        return None
    values = torch.linalg.svdvals(matrices)
    # Each of the factors was rounded.
    least = values[:, :1] * max(matrices.shape[1:]) * factors * torch.finfo(values.dtype).eps
    logarithms = values.where(values > least, 0.0).log() + logs[:, None]
    return Singular(logarithms)


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf

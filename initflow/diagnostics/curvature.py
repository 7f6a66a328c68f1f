"""How sharply the loss curves at a network's weights: the largest eigenvalue of its Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from initflow.core.seeds import generator
from initflow.initializers.activations import Activation
from initflow.training.model import Parameters, network
from initflow.training.splits import Split

IMAGES = 1_000  # training images, evenly spaced, on which a network's curvature is measured
STEPS = 100  # of Lanczos' iteration, at most
TOLERANCE = 1e-3  # of the eigenvalue, at which it ends

Product = Callable[[Tensor], Tensor]  # of a symmetric matrix with a vector


def largest_eigenvalue(
    parameters: Parameters,
    activation: Activation,
    split: Split,
    factors: Sequence[float] | None = None,
) -> float:
    """That of the Hessian of the mean cross-entropy over ``split`` by all weights and biases.

    ``parameters`` are those of one network. Where each tensor's rate is multiplied by one of
    ``factors``, c, as in maximal updates, it is that of √c H √c, by which such steps go. By
    Lanczos' iteration with products of the Hessian (Pearlmutter 1994), to 0.1 %, from a start
    that is always the same; infinite where a number is not finite.
    """
    module = network(parameters.state(), activation)
    tensors = list(module.parameters())
    scales = [math.sqrt(factor) for factor in factors or [1.0] * len(tensors)]
    scale = torch.cat([torch.full((x.numel(),), s) for x, s in zip(tensors, scales, strict=True)])
    scale = scale.to(tensors[0].device)
    with torch.enable_grad():
        loss = functional.cross_entropy(module(split.images), split.labels)
        gradient = _flat(torch.autograd.grad(loss, tensors, create_graph=True))

    def product(vector: Tensor) -> Tensor:
        found = torch.autograd.grad(gradient, tensors, scale * vector.float(), retain_graph=True)
        return scale * _flat(found)

    return lanczos(product, len(scale), tensors[0].device)


def lanczos(product: Product, size: int, device: torch.device | str = "cpu") -> float:
    """The largest eigenvalue of a symmetric matrix of this ``size``, known by its ``product``.

    Every new vector is made orthogonal to all before it, twice, in double precision. It ends where
    what is left of the eigenvector that is found, as the size of its residual, is small.
    """
    start = torch.randn(size, generator=generator(0, "curvature"), dtype=torch.float64)
    vector = (start / start.norm()).to(device)
    basis = [vector]
    diagonal: list[float] = []
    beside: list[float] = []
    largest = math.inf
    for _ in range(min(size, STEPS)):
        image = product(basis[-1]).double()
        diagonal.append(float(image @ basis[-1]))
        if not math.isfinite(diagonal[-1]):
            return math.inf
        against = torch.stack(basis)
        for _ in range(2):
            image = image - against.T @ (against @ image)
        left = float(image.norm())
        small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if beside:
            small += torch.diag(torch.tensor(beside, dtype=torch.float64), 1)
            small += torch.diag(torch.tensor(beside, dtype=torch.float64), -1)
        values, vectors = torch.linalg.eigh(small)
        largest = float(values[-1])
        spread = float(values.abs().max())
        if left * abs(float(vectors[-1, -1])) <= TOLERANCE * abs(largest) or left <= 1e-12 * spread:
            break
        beside.append(left)
        basis.append(image / left)
    return largest


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])

"""Networks for ``docs/choosing.md``: 8 layers, plain and normalized, and 16 residual branches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import initflow

WIDTH, LAYERS, BRANCHES = 64, 8, 16


class Branch(nn.Module):
    """What is added to the trunk: two layers, with ReLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.last(torch.relu(self.first(x)))
        return added


def plain(shape: tuple[int, ...], classes: int) -> nn.Module:
    return _network(shape, classes, [one for _ in range(LAYERS) for one in _layer()])


def normalized(shape: tuple[int, ...], classes: int, layers: int = LAYERS) -> nn.Module:
    """A layer normalization in front of each ReLU."""
    hidden = [one for _ in range(layers) for one in _layer(nn.LayerNorm(WIDTH))]
    return _network(shape, classes, hidden)


def normalized_32(shape: tuple[int, ...], classes: int) -> nn.Module:
    """As ``normalized``, four times as deep."""
    return normalized(shape, classes, 32)


def residual(shape: tuple[int, ...], classes: int) -> nn.Module:
    return _network(shape, classes, [Branch() for _ in range(BRANCHES)])


def scaled(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Under He, each branch scaled by 1/√(their number)."""
    return _filled(residual(shape, classes), "scaled")


def zero(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Under He, each branch starting at 0."""
    return _filled(residual(shape, classes), "zero")


def _layer(*between: nn.Module) -> list[nn.Module]:
    return [nn.Linear(WIDTH, WIDTH), *between, nn.ReLU()]


def _network(shape: tuple[int, ...], classes: int, hidden: list[nn.Module]) -> nn.Module:
    pixels = torch.Size(shape).numel()
    first = [nn.Flatten(), nn.Linear(pixels, WIDTH), nn.ReLU()]
    return nn.Sequential(*first, *hidden, nn.Linear(WIDTH, classes))


def _filled(model: nn.Module, branches: str) -> nn.Module:
    seed = int(torch.randint(2**31, ()))  # which follows from the network's own
    initflow.initialize(model, "he", residual=branches, seed=seed)
    return model

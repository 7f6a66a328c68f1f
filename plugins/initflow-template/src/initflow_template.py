"""An initialization scheme for initflow: random signs of one size."""

import torch
from torch import Tensor

import initflow


def variance(fan_in: int, gain: float) -> float:
    """He's, times gain²."""
    return gain**2 * 2 / fan_in


@initflow.initializer(variance=variance)
def template(
    weight: Tensor,
    fan_in: int,
    generator: torch.Generator,
    *,
    gain: float = 1.0,
) -> None:
    """Every weight is +s or −s, with even odds, s = gain·√(2/fan_in): variance gain²·2/fan_in.

    He's variance without its spread: no unit starts with larger weights than another.
    Ramanujan, Wortsman, Kembhavi, Farhadi and Rastegari 2020, "What's Hidden in a Randomly
    Weighted Neural Network?", call it the signed Kaiming constant.
    """
    if gain < 0:
        raise ValueError(f"gain must be at least 0, not {gain:g}")
    weight.bernoulli_(0.5, generator=generator).sub_(0.5).mul_(2 * variance(fan_in, gain) ** 0.5)

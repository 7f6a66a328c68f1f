"""How features are scaled before training: all pixels alike, other features one by one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from initflow.training.splits import Scale

ROWS = 4_096  # that are looked at at once


def normalization(normalize: str, train: Tensor, white: int | None) -> tuple[Scale, Scale]:
    """What is taken off and divided by: mean and std of ``train``, (n, features), for "standard".

    Pixels, from 0 to ``white``, are scaled to [0, 1] before that; other features, where ``white``
    is None, are taken as they are.
    """
    if normalize == "unit":
        return 0.0, 1.0
    if normalize == "half":
        return 0.5, 0.5
    return _of_features(train) if white is None else _of_pixels(train, white)


def scaled(features: Tensor, white: int | None, mean: Scale, std: Scale) -> Tensor:
    """The features as a network takes them, float32, in a tensor of their own."""
    found = features.to(torch.float32, copy=True)
    if white is not None:
        found.div_(white)
    if (mean, std) != (0.0, 1.0):
        found.sub_(_operand(mean)).div_(_operand(std))
    return found


def _operand(scale: Scale) -> float | Tensor:
    return scale if isinstance(scale, float) else torch.tensor(scale, dtype=torch.float32)


def _of_pixels(train: Tensor, white: int) -> tuple[float, float]:
    # From integer counts, so that the last bit depends on no thread or order.
    counts = torch.bincount(train.flatten(), minlength=256).to(torch.float64)
    levels = torch.arange(len(counts), dtype=torch.float64) / white
    mean = (counts @ levels / counts.sum()).item()
    variance = (counts @ (levels - mean).square() / counts.sum()).item()
    return mean, variance**0.5


def _of_features(train: Tensor) -> tuple[Scale, Scale]:
    """Of each feature; one that is the same in all examples has the std 1, and becomes 0.

    NumPy sums in an order of its own, whatever the number of threads.
    """
    features = train.numpy()
    rows = [features[at : at + ROWS] for at in range(0, len(features), ROWS)]
    mean = sum(some.sum(0, dtype=np.float64) for some in rows) / len(features)
    squares = sum(np.square(some - mean).sum(0) for some in rows)
    std = np.sqrt(squares / len(features))
    constant = (features.max(0) == features.min(0)) | (std.astype(np.float32) == 0)
    mean = np.where(constant, features[0].astype(np.float64), mean)
    return tuple(mean.tolist()), tuple(np.where(constant, 1.0, std).tolist())

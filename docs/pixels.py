"""MNIST made small, as pictures and as sequences of pixels: ``dataset=docs/pixels.py:permuted``.

Permuted sequential MNIST (Le et al. 2015) has 784 steps of one pixel each, in an order drawn once.
Here the images are averaged first, to 14 × 14 pixels, 196 steps (``permuted``), or to 7 × 7, 49
steps (``coarse``), and only 10,000 of the training images are taken, so that two cores train on
them in minutes; all test images are. ``small`` has them as pictures. MNIST is found as
``dataset=mnist`` finds it, in ``INITFLOW_DATA_DIR`` or in the user's cache.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from initflow.core.configurations import TrainConfig
from initflow.training import datasets
from initflow.training.splits import Split

Array = npt.NDArray[np.uint8]
TRAINED_ON = 10_000
ORDER = 0  # the seed of the order


def permuted() -> tuple[Array, ...]:
    """Sequences of 196 pixels."""
    return _sequences(14)


def coarse() -> tuple[Array, ...]:
    """Sequences of 49 pixels."""
    return _sequences(7)


def small() -> tuple[Array, ...]:
    """Pictures (1, 14, 14)."""
    x_train, y_train, x_test, y_test = _parts(14, torch.arange(14**2))
    return x_train.reshape(-1, 1, 14, 14), y_train, x_test.reshape(-1, 1, 14, 14), y_test


def _sequences(side: int) -> tuple[Array, ...]:
    return _parts(side, torch.randperm(side**2, generator=torch.Generator().manual_seed(ORDER)))


def _parts(side: int, order: Tensor) -> tuple[Array, ...]:
    """Pixels (n, side²) in ``order`` and labels (n,), to train on and to test on."""
    splits = datasets.load(TrainConfig(dataset="mnist"))
    few = splits.train.take(torch.arange(TRAINED_ON))
    return (*read(few, side, order), *read(splits.test, side, order))


def read(split: Split, side: int, order: Tensor) -> tuple[Array, Array]:
    """The averaged pixels of each image in ``order``, from 0 to 255, and its label."""
    width = round(split.images.shape[1] ** 0.5)
    images = split.images.view(len(split), 1, width, width)
    averaged = functional.avg_pool2d(images, width // side).flatten(1)[:, order]
    return (averaged * 255).round().to(torch.uint8).numpy(), split.labels.to(torch.uint8).numpy()

"""Images and labels as tensors in memory: what networks are trained, chosen and tested on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from initflow.core.configurations import DATASET_NAMES

PUBLISHED, OWN, UNCHECKED = "published", "own", "unchecked"  # editions
Scale = float | tuple[float, ...]  # one for all features, or one for each
PIXELS, FEATURES = "pixels in [0, 1]", "features as the data has them"


@dataclass(frozen=True)
class Split:
    """``images``: (n, features) float32, normalized; ``labels``: (n,) int64.

    The features of one image, or of whatever it is, lie flat, in the C order of their shape.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor) -> Split:
        """The images and labels at ``indices``, (k,) int64."""
        indices = indices.to(self.labels.device)
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Splits:
    """One data set, ready to train on; ``validation`` is None where none is held out.

    ``shape`` is that of one example's features, as a model takes them: (1, 28, 28) of MNIST's;
    labels are from 0 to ``classes`` - 1. ``test`` is empty where it is kept closed: see
    :meth:`untested`. ``mean`` and ``std`` are what was taken off and divided by, after scaling
    pixels to [0, 1]: a number for all features, or one for each. ``takes`` says what features are
    before that. ``digest`` is the SHA-256 of all of them and of the labels, so that it names the
    data whatever was done to them; ``source`` says where they came from. ``edition`` is
    ``published`` where they are what is published under the ``name``, ``own`` where they are
    something else, and ``unchecked`` where that is not known.
    """

    name: str
    train: Split
    validation: Split | None
    test: Split
    mean: Scale
    std: Scale
    digest: str
    source: str
    shape: tuple[int, ...]
    classes: int
    edition: str = UNCHECKED
    takes: str = PIXELS

    @property
    def pixels(self) -> int:
        """How many features an example has."""
        return self.train.images.shape[1]

    @property
    def are(self) -> str:
        """What the examples are called, in sentences."""
        return "images" if self.takes == PIXELS else "examples"

    @property
    def tags(self) -> dict[str, object]:
        """MLflow tags that say what a run was trained on."""
        return {"initflow.data": self.edition, "initflow.data_sha256": self.digest}

    @property
    def remark(self) -> str:
        """A sentence on images that are not what their name makes one think; else nothing."""
        if self.edition != OWN or self.name not in DATASET_NAMES:
            return ""
        return (
            f"The data is the user's own, not the published {self.name}: its SHA-256 is "
            f"{self.digest}."
        )

    def described(self, sentence: str) -> str:
        """A sentence on what is trained on them, with the remark."""
        return f"{sentence} {self.remark}".rstrip()

    def to(self, device: torch.device) -> Splits:
        return replace(
            self,
            train=self.train.to(device),
            validation=self.validation and self.validation.to(device),
            test=self.test.to(device),
        )

    def untested(self) -> Splits:
        """The same without the test images, for choices that must not see them."""
        return replace(self, test=self.test.take(torch.tensor([], dtype=torch.int64)))

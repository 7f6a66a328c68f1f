"""Images and labels as tensors in memory: what networks are trained, chosen and tested on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

PUBLISHED, OWN, UNCHECKED = "published", "own", "unchecked"  # editions


@dataclass(frozen=True)
class Split:
    """``images``: (n, pixels) float32, normalized; ``labels``: (n,) int64."""

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

    ``test`` is empty where it is kept closed: see :meth:`untested`. ``mean`` and ``std`` are what
    was taken off and divided by after scaling pixels to [0, 1]. ``digest`` is the SHA-256 of all
    pixels and labels before that, so that it names the data whatever was done to them; ``source``
    says where they came from. ``edition`` is ``published`` where they are what is published under
    the ``name``, ``own`` where they are something else, and ``unchecked`` where that is not known.
    """

    name: str
    train: Split
    validation: Split | None
    test: Split
    mean: float
    std: float
    digest: str
    source: str
    edition: str = UNCHECKED

    @property
    def pixels(self) -> int:
        return self.train.images.shape[1]

    @property
    def tags(self) -> dict[str, object]:
        """MLflow tags that say what a run was trained on."""
        return {"initflow.data": self.edition, "initflow.data_sha256": self.digest}

    @property
    def remark(self) -> str:
        """A sentence on images that are not what their name makes one think; else nothing."""
        if self.edition != OWN:
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

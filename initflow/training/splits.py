"""Images and labels as tensors in memory: what networks are trained, chosen and tested on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from initflow.core.configurations import DATASET_NAMES

PUBLISHED, OWN, UNCHECKED = "published", "own", "unchecked"  # editions
Scale = float | tuple[float, ...]  # one for all features, or one for each
Integers = npt.NDArray[np.int64]
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


def parted(labels: Integers, held_out: int, seed: int) -> tuple[Integers, Integers]:
    """Indices of the examples that are kept, and of those ``held_out``, each class in its share.

    They are those of scikit-learn's ``train_test_split(..., test_size=held_out, stratify=labels,
    random_state=seed)``, in its order: splits are to stay as they are, and importing that takes
    most of a second. Raises a :class:`ValueError` for a class with a single example. Both parts
    must have room for an example of each class.
    """
    present, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if counts.min() < 2:
        single = present[counts < 2].tolist()
        raise ValueError(f"there is only one example of {single}")
    random = np.random.RandomState(seed)  # whose numbers NumPy never changes
    kept = _shares(counts, len(labels) - held_out, random)
    others = _shares(counts - kept, held_out, random)
    of_class = np.split(np.argsort(classes, kind="stable"), np.cumsum(counts)[:-1])
    parts: tuple[list[Integers], list[Integers]] = [], []
    for indices, n, m in zip(of_class, kept, others, strict=True):
        drawn = indices[random.permutation(len(indices))]
        parts[0].append(drawn[:n])
        parts[1].append(drawn[n : n + m])
    first, second = (random.permutation(np.concatenate(part)) for part in parts)
    return first, second


def _shares(counts: Integers, n: int, random: np.random.RandomState) -> Integers:
    """How many of each class are among ``n`` that are drawn, as most likely; of ties, some."""
    expected = counts / counts.sum() * n
    shares = np.floor(expected)
    missing, rest = int(n - shares.sum()), expected - shares
    for value in np.unique(rest)[::-1]:
        if missing <= 0:
            break
        (tied,) = np.where(rest == value)
        more = min(len(tied), missing)
        shares[random.choice(tied, size=more, replace=False)] += 1
        missing -= more
    return np.asarray(shares, dtype=np.int64)

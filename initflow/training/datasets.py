"""Data sets as tensors in memory: found, downloaded or given, recognized, split, normalized.

Downloading and its checksums are torchvision's, whose import takes seconds; what is on disk is read
without it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import importlib.util
import io
import math
import os
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch import Tensor

from initflow.core import paths
from initflow.core.configurations import TrainConfig
from initflow.core.seeds import stream_seed
from initflow.errors import DataError, SettingError
from initflow.training import arrays, cifar, idx, scaling
from initflow.training.splits import (
    FEATURES,
    OWN,
    PIXELS,
    PUBLISHED,
    UNCHECKED,
    Split,
    Splits,
    parted,
)

# The class in torchvision.datasets that downloads each set, the folder that it makes, and what else
# it is to be told.
TORCHVISION = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "emnist": "EMNIST",
    "cifar10": "CIFAR10",
}
HOMES = {name: f"{title}/raw" for name, title in TORCHVISION.items()} | {"cifar10": cifar.FOLDER}
ARGUMENTS = {"emnist": {"split": "balanced"}}
# What is published of each is known by the digest of its content, or by the MD5 of its archives, in
# the order of idx.NAMES.
DIGESTS = {"mnist": "c54f490d44c92af38910021fb156153f6ce3a85ed6ff525a7f979f3d52b949be"}
ARCHIVES = {
    "fashion-mnist": (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    "kmnist": (
        "bdb82020997e1d708af4cf47b453dcf7",
        "e144d726b3acfaa3e44228e80efcd344",
        "5c965bf0a639b31b8f53240b1b52f4d7",
        "7320c461ea6c1c855c0b718fb2a4b134",
    ),
}
# The shape of an image, and the classes, as they are published.
SIZES: dict[str, tuple[tuple[int, ...], int]] = {
    "mnist": ((1, 28, 28), 10),
    "fashion-mnist": ((1, 28, 28), 10),
    "kmnist": ((1, 28, 28), 10),
    "emnist": ((1, 28, 28), 47),
    "cifar10": (cifar.SHAPE, 10),
    "digits": ((1, 8, 8), 10),
}
DIGITS_TEST_IMAGES = 360
DOWNLOAD_TIMEOUT_S = 30.0
LONGEST_TITLE = 100  # characters

Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class _Loaded:
    """A data set as it comes.

    ``tensors`` holds ``{train,test}_{images,labels}``, the images as (n, features): uint8 with
    values from 0 to ``white`` or, where that is None, float32. ``shape``, ``classes``, ``digest``
    and ``edition`` are as in :class:`Splits`.
    """

    tensors: dict[str, Tensor]
    white: int | None
    shape: tuple[int, ...]
    classes: int
    digest: str
    source: str
    edition: str


def load(config: TrainConfig) -> Splits:
    """The data set of ``config``, split and normalized as it says.

    Raises :class:`DataError` where it is neither on disk nor can be downloaded, or where
    one of its files is missing or damaged, and :class:`SettingError` where more images are to
    be held out for validation than there are. What arrays of the user's own are refused for is in
    :mod:`initflow.training.arrays`.
    """
    loaded = _loaded(config)
    tensors, white = loaded.tensors, loaded.white
    mean, std = scaling.normalization(config.normalize, tensors["train_images"], white)
    if not std:
        raise DataError(f"normalize=standard: all training pixels in '{loaded.source}' are equal")

    def split(images: Tensor, labels: Tensor) -> Split:
        return Split(scaling.scaled(images, white, mean, std), labels.to(torch.int64))

    images, labels = tensors["train_images"], tensors["train_labels"]
    validation = None
    if config.validation:  # before pixels become numbers of four bytes
        kept, held_out = _hold_out(labels, loaded.classes, config)
        validation = split(images[held_out], labels[held_out])
        images, labels = images[kept], labels[kept]
    return Splits(
        name=title(config.dataset),
        train=split(images, labels),
        validation=validation,
        test=split(tensors["test_images"], tensors["test_labels"]),
        mean=mean,
        std=std,
        digest=loaded.digest,
        source=loaded.source,
        shape=loaded.shape,
        classes=loaded.classes,
        edition=loaded.edition,
        takes=FEATURES if white is None else PIXELS,
    )


def examples(config: TrainConfig) -> int:
    """How many there are to train on and to hold out for validation."""
    return len(_loaded(config).tensors["train_labels"])


def published(dataset: str) -> tuple[tuple[int, ...], int] | None:
    """The shape of a published image of ``dataset``, and its classes; None of what is one's own.

    Files of the user's under a published name may have other pixels.
    """
    return SIZES.get(dataset)


def title(dataset: str) -> str:
    """What ``dataset`` is called in names and titles: of a path its last part."""
    return Path(dataset).name[-LONGEST_TITLE:]


def size(config: TrainConfig, loaded: Callable[[TrainConfig], Splits]) -> tuple[int, int]:
    """Features of an example, and classes: a published set is not ``loaded`` for them."""
    known = published(config.dataset)
    if known:
        shape, classes = known
        return math.prod(shape), classes
    splits = loaded(config)
    return splits.pixels, splits.classes


def widths(pixels: int, hidden: Sequence[int], classes: int) -> tuple[int, ...]:
    """Of all layers of a network, from an image's pixels over ``hidden`` ones to the classes."""
    return (pixels, *hidden, classes)


def data_dir(given: Path | None) -> Path:
    """The data folder: the one given, else ``INITFLOW_DATA_DIR``, else in the user's cache."""
    if given is not None:
        return given
    if os.environ.get("INITFLOW_DATA_DIR"):
        return paths.own(os.environ["INITFLOW_DATA_DIR"])
    return _cache()


def _cache() -> Path:
    """The folder that only we put files into."""
    return paths.of_user("cache") / "data"


def _hold_out(labels: Tensor, classes: int, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Indices to train on and to hold out, each class in its share, in the set's own order."""
    validation = config.validation
    if len(labels) < 2 * classes:
        raise SettingError(
            f"validation must be 0, not '{validation}': to hold some out of {classes} classes "
            f"takes {2 * classes} training images, and there are {len(labels)}"
        )
    if not classes <= validation <= len(labels) - classes:
        raise SettingError(
            f"validation must be 0 or from {classes} to {len(labels) - classes} of the "
            f"{len(labels)} training images, not '{validation}'"
        )
    try:
        kept, held_out = parted(
            labels.numpy(), validation, stream_seed(config.seed, "validation") % 2**32
        )
    except ValueError as error:
        raise SettingError(
            f"validation must be 0 for these training images, not '{validation}': {error}"
        ) from error
    return torch.from_numpy(np.sort(kept)), torch.from_numpy(np.sort(held_out))


def _loaded(config: TrainConfig) -> _Loaded:
    name = config.dataset
    if name == "digits":
        return _digits()
    if name == "cifar10":
        return _cifar(data_dir(config.data_dir))
    if name in TORCHVISION:
        return _idx(name, data_dir(config.data_dir))
    given = arrays.load(name)
    white = 255 if given.tensors["train_images"].dtype == torch.uint8 else None
    digest = _content_digest(given.tensors)
    return _Loaded(given.tensors, white, given.shape, given.classes, digest, given.source, OWN)


def _digits() -> _Loaded:
    """scikit-learn's 1,797 digits of 8x8 pixels; which of them are the test is fixed."""
    images, labels = _digits_as_they_come()
    train, test = parted(labels, DIGITS_TEST_IMAGES, seed=0)
    tensors = {
        f"{part}_{name}": torch.from_numpy(array[rows].astype("uint8"))
        for name, array in (("images", images), ("labels", labels))
        for part, rows in (("train", train), ("test", test))
    }
    digest, source = _content_digest(tensors), "sklearn.datasets.load_digits"
    return _Loaded(tensors, 16, *SIZES["digits"], digest, source, PUBLISHED)


def _digits_as_they_come() -> tuple[Numbers, Numbers]:
    """Those of ``load_digits``, out of its file: importing it would take most of a second."""
    package = importlib.util.find_spec("sklearn")
    for folder in package.submodule_search_locations or () if package else ():
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.is_file():
            with gzip.open(file, "rt") as lines:
                table = np.loadtxt(lines, delimiter=",")
            return table[:, :-1], table[:, -1].astype(int)
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return images, labels


def _cifar(folder: Path) -> _Loaded:
    """CIFAR-10's published files in ``folder``, downloaded where there is none of them."""
    if not cifar.find(folder):
        packed = folder / cifar.ARCHIVE
        if os.path.exists(packed):  # noqa: PTH110 - never raises
            raise DataError(f"cifar10 in '{folder}' is packed: unpack '{packed}'")
        _download("cifar10", folder)
    place = cifar.find(folder)
    assert place
    tensors = {part: torch.from_numpy(array) for part, array in cifar.read(place).items()}
    tensors = {part: of.flatten(1) if of.ndim > 1 else of for part, of in tensors.items()}
    digest = _content_digest(tensors)
    return _Loaded(tensors, 255, *SIZES["cifar10"], digest, str(place.resolve()), PUBLISHED)


def _idx(name: str, folder: Path) -> _Loaded:
    """A data set of four IDX files in ``folder``, downloaded where there is none of them."""
    title, (_, classes) = TORCHVISION[name], SIZES[name]
    found = idx.find(folder, title)
    if found.is_empty:
        beside = idx.related(folder, title)
        if beside:
            raise DataError(
                f"{name} in '{folder}' is in no form that is read: {idx.listed(beside)}; nothing "
                "is downloaded beside files of a set"
            )
        _download(name, folder)
        found = idx.find(folder, title)
    try:
        if found.missing:
            raise _incomplete(name, folder, found)
        read = idx.read(found.taken, classes)
    except DataError as error:
        if folder != _cache():  # the user's own files are not for us to have deleted
            raise
        raise DataError(f"{error}; delete '{folder / title}' to have it downloaded anew") from error
    tensors = {part: torch.from_numpy(array) for part, array in read.items()}
    if name == "emnist":  # whose images lie on their side, mirrored
        tensors = {part: of.mT if of.ndim > 1 else of for part, of in tensors.items()}
    shape = (1, *tensors["train_images"].shape[1:])
    tensors = {part: of.flatten(1) if of.ndim > 1 else of for part, of in tensors.items()}
    digest = _content_digest(tensors)
    source = os.path.commonpath([file.parent.resolve() for file in found.taken.values()])
    known = _known(found, read, digest)
    if known not in (name, None):
        raise DataError(
            f"the files in '{source}' are {known}, not {name}: use dataset={known}, or point "
            f"data_dir to another folder"
        )
    own = OWN if name in DIGESTS else UNCHECKED
    edition = PUBLISHED if known else own
    return _Loaded(tensors, 255, shape, classes, digest, source, edition)


def _known(found: idx.Found, read: Mapping[str, idx.Array], digest: str) -> str | None:
    """The data set whose published files these are, by their content or by their archives'."""
    for name, known in DIGESTS.items():
        if digest == known:
            return name
    sums = {part: idx.checksums(files, read[part]) for part, files in found.files.items()}
    for name, archives in ARCHIVES.items():
        if all(known in sums[part] for part, known in zip(idx.NAMES, archives, strict=True)):
            return name
    return None


def _incomplete(name: str, folder: Path, found: idx.Found) -> DataError:
    home = TORCHVISION[name]
    refused = f"; not taken: {idx.listed(found.refused)}" if found.refused else ""
    return DataError(
        f"{name} in '{folder}' lacks {' and '.join(found.missing)}, looked for there and in "
        f"{home}/raw, {home} and raw, all four in one of them{refused}; nothing is downloaded "
        "beside files of a set"
    )


def _download(name: str, folder: Path) -> None:
    """Download into a folder of its own and move that in as a whole, one process at a time."""
    from torchvision import datasets

    home = HOMES[name]
    lock = folder / f".{TORCHVISION[name]}.lock"
    dataset = getattr(datasets, TORCHVISION[name])
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]  # noqa: PTH110 - never raises
    said = io.StringIO()  # torchvision prints to the terminal, which is the command line's
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(lock),
            tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch,
            contextlib.ExitStack() as afterwards,
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            if is_there(name, folder):  # another process was first
                return
            # torchvision sets none of its own and would wait for a silent server for ever.
            afterwards.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
            socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
            dataset(scratch, download=True, **ARGUMENTS.get(name, {}))
            _move_in(_needed(name, Path(scratch, home)), folder / home)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        if made:  # perhaps a slip of the pen: leave no trace of it
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)
                for path in made:
                    path.rmdir()
        raise DataError(
            f"{name} is not in '{folder}'{', which is not there,' if made else ''} "
            f"and cannot be downloaded "
            f"({' '.join(str(error).split())}); point data_dir or INITFLOW_DATA_DIR to a folder "
            f"that holds {home}, or use dataset=digits, which needs no download"
        ) from error


def is_there(name: str, folder: Path) -> bool:
    """Whether ``folder`` has files of the data set, so that nothing would be downloaded.

    The digits are scikit-learn's. Raises :class:`DataError` where it cannot be looked into.
    """
    if name == "digits":
        return bool(importlib.util.find_spec("sklearn"))
    if name == "cifar10":
        return cifar.find(folder) is not None
    return not idx.find(folder, TORCHVISION[name]).is_empty


def _needed(name: str, arrived: Path) -> Path:
    """The folder that arrived, without the gigabytes of EMNIST's other splits."""
    prefix = idx.PREFIXES.get(TORCHVISION[name], "")
    for file in arrived.iterdir():
        if not file.name.startswith(prefix):
            file.unlink()
    return arrived


def _move_in(arrived: Path, raw: Path) -> None:
    """All files of a folder at once, so that a process that is killed leaves all or none."""
    raw.parent.mkdir(parents=True, exist_ok=True)
    try:
        arrived.rename(raw)  # an empty folder is replaced
    except OSError:  # there is something else in it, which stays
        for file in arrived.iterdir():
            file.replace(raw / file.name)


def _content_digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        kind = "" if tensor.dtype == torch.uint8 else str(tensor.dtype)
        digest.update(f"{name}{tuple(tensor.shape)}{kind}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()

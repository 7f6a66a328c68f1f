"""Data sets as tensors in memory: found, downloaded, parsed once, split, normalized.

Downloading, checksums and the parsing of the files are torchvision's. What it parsed is
kept as one safetensors file beside the source, because importing torchvision takes
seconds and reading that file does not.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import math
import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import platformdirs
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from initflow.config import MAX_WIDTH, TrainConfig
from initflow.errors import DataError, SettingError
from initflow.seeds import stream_seed

# The class in torchvision.datasets that downloads each set; its name is also its folder's.
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}

CLASSES = 10
SIDE = {"digits": 8}  # pixels; of all others 28
DIGITS_TEST_IMAGES = 360
MAX_BYTES = 2**30  # of a data file; MNIST's largest has 47 million
DOWNLOAD_TIMEOUT_S = 30.0
PARSED_FORMAT = "1"
PARSED = {"train_images": 2, "train_labels": 1, "test_images": 2, "test_labels": 1}  # dimensions
NOT_IDX = "truncated, or not an IDX file of the kind its name says"


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
    says where they came from.
    """

    name: str
    train: Split
    validation: Split | None
    test: Split
    mean: float
    std: float
    digest: str
    source: str

    @property
    def pixels(self) -> int:
        return self.train.images.shape[1]

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


@dataclass(frozen=True)
class _Pixels:
    """A data set as it comes.

    ``tensors`` holds ``{train,test}_{images,labels}``, all uint8, the images as (n, pixels)
    with values from 0 to ``white``.
    """

    tensors: dict[str, Tensor]
    white: int
    source: str


def load(config: TrainConfig) -> Splits:
    """The data set of ``config``, split and normalized as it says.

    Raises :class:`DataError` where it is neither on disk nor can be downloaded, or where
    a file is damaged, and :class:`SettingError` where more images are to be held out for
    validation than there are.
    """
    if config.dataset == "digits":
        loaded = _digits()
    else:
        loaded = _idx(config.dataset, data_dir(config.data_dir))
    tensors = loaded.tensors
    mean, std = _normalization(config.normalize, tensors["train_images"], loaded.white)
    if not std:
        raise DataError(f"normalize=standard: all training pixels in '{loaded.source}' are equal")

    def split(images: Tensor, labels: Tensor) -> Split:
        scaled = images.to(torch.float32).div_(loaded.white)
        if config.normalize != "unit":
            scaled.sub_(mean).div_(std)
        return Split(scaled, labels.to(torch.int64))

    train = split(tensors["train_images"], tensors["train_labels"])
    validation = None
    if config.validation:
        kept, held_out = _hold_out(train.labels, config.validation, config.seed)
        train, validation = train.take(kept), train.take(held_out)
    return Splits(
        name=config.dataset,
        train=train,
        validation=validation,
        test=split(tensors["test_images"], tensors["test_labels"]),
        mean=mean,
        std=std,
        digest=_content_digest(tensors),
        source=loaded.source,
    )


def pixels(dataset: str) -> int:
    """Pixels of an image of ``dataset``, known without its files."""
    return SIDE.get(dataset, 28) ** 2


def data_dir(given: Path | None) -> Path:
    """The data folder: the one given, else ``INITFLOW_DATA_DIR``, else in the user's cache."""
    if given is not None:
        return given
    if os.environ.get("INITFLOW_DATA_DIR"):
        return Path(os.path.expanduser(os.environ["INITFLOW_DATA_DIR"]))  # noqa: PTH111 - as given
    return platformdirs.user_cache_path("initflow") / "data"


def _normalization(normalize: str, train_images: Tensor, white: int) -> tuple[float, float]:
    """Mean and standard deviation to normalize with, of pixels scaled to [0, 1]."""
    if normalize == "unit":
        return 0.0, 1.0
    if normalize == "half":
        return 0.5, 0.5
    # From integer counts, so that the last bit depends on no thread or order.
    counts = torch.bincount(train_images.flatten(), minlength=256).to(torch.float64)
    levels = torch.arange(len(counts), dtype=torch.float64) / white
    mean = (counts @ levels / counts.sum()).item()
    variance = (counts @ (levels - mean).square() / counts.sum()).item()
    return mean, variance**0.5


def _hold_out(labels: Tensor, validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and to hold out, each class in its share, in the set's own order."""
    from sklearn.model_selection import train_test_split

    if not CLASSES <= validation <= len(labels) - CLASSES:
        raise SettingError(
            f"validation must be 0 or from {CLASSES} to {len(labels) - CLASSES} of the "
            f"{len(labels)} training images, not '{validation}'"
        )
    try:
        kept, held_out = train_test_split(
            range(len(labels)),
            test_size=validation,
            stratify=labels.numpy(),
            random_state=stream_seed(seed, "validation") % 2**32,
        )
    except ValueError as error:
        raise SettingError(
            f"validation must be 0 for these training images, not '{validation}': {error}"
        ) from error
    return torch.tensor(sorted(kept)), torch.tensor(sorted(held_out))


def _digits() -> _Pixels:
    """scikit-learn's 1,797 digits of 8x8 pixels; which of them are the test is fixed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images, labels, test_size=DIGITS_TEST_IMAGES, stratify=labels, random_state=0
    )
    names = ("train_images", "test_images", "train_labels", "test_labels")
    tensors = {
        name: torch.from_numpy(array.astype("uint8"))
        for name, array in zip(names, split, strict=True)
    }
    return _Pixels(tensors, white=16, source="sklearn.datasets.load_digits")


def _idx(name: str, folder: Path) -> _Pixels:
    """A data set in torchvision's layout below ``folder``, downloaded if it is not there."""
    home = folder / TORCHVISION[name]
    raw = home / "raw"
    if not _is_complete(raw):
        _download(name, folder)
    source_digest = hashlib.sha256()
    for file in _raw_files(raw):
        _check_header(file)
        source_digest.update(_file_digest(file))
    stamp = {"format": PARSED_FORMAT, "source": source_digest.hexdigest()}

    # Beside the source; where that may not be written, in the user's cache.
    beside = home / "initflow-parsed.safetensors"
    shared = platformdirs.user_cache_path("initflow") / "parsed" / f"{stamp['source']}.safetensors"
    for file in (beside, shared):
        tensors = _read_parsed(file, stamp)
        if tensors:
            break
    else:
        tensors = _parse(raw)
        for file in (beside, shared):
            if _write_parsed(file, tensors, stamp):
                break
    return _Pixels(tensors, white=255, source=str(raw.resolve()))


def _raw_files(raw: Path) -> list[Path]:
    return [raw / names[part] for part in ("train", "test") for names in (IMAGES, LABELS)]


def _is_complete(raw: Path) -> bool:
    return all(os.path.isfile(file) for file in _raw_files(raw))  # noqa: PTH113 - never raises


def _check_header(path: Path) -> None:
    """Raise :class:`DataError` unless ``path`` is as large as its header says, and no larger.

    Before anything else is read of it: a header may promise any size.
    """
    dimensions = 3 if path.name in IMAGES.values() else 1
    length = 4 * (1 + dimensions)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from error
    if size > MAX_BYTES:
        raise _damaged(path, f"{size:,} bytes, where {MAX_BYTES:,} are the most")
    # Of unsigned bytes, so that a number in the file is a byte of it.
    is_idx = len(header) == length and header[:4] == bytes((0, 0, 8, dimensions))
    shape = struct.unpack(f">{dimensions}I", header[4:]) if is_idx else ()
    if not (shape and math.prod(shape) and size == length + math.prod(shape)):
        raise _damaged(path, NOT_IDX)
    if math.prod(shape[1:]) > MAX_WIDTH:
        raise _damaged(path, f"{shape[1]} x {shape[2]} pixels, where {MAX_WIDTH:,} are the most")


def _file_digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"data file '{path}' cannot be read: {error.strerror}")


def _download(name: str, folder: Path) -> None:
    """Download into a folder of its own and move the whole files in, one process at a time."""
    from torchvision import datasets

    raw = folder / TORCHVISION[name] / "raw"
    lock = folder / f".{TORCHVISION[name]}.lock"
    dataset = getattr(datasets, TORCHVISION[name])
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]  # noqa: PTH110 - never raises
    said = io.StringIO()  # torchvision tells the terminal, which is the command line's
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(lock),
            tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch,
            _socket_timeout(DOWNLOAD_TIMEOUT_S),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            if _is_complete(raw):  # another process was first
                return
            arriving = Path(scratch) / TORCHVISION[name] / "raw"
            arriving.mkdir(parents=True)
            # torchvision unpacks those that have the published checksum, and only those.
            for packed in (raw / f"{file.name}.gz" for file in _raw_files(raw)):
                if os.path.isfile(packed) and os.path.getsize(packed) <= MAX_BYTES:  # noqa: PTH113, PTH202 - the first never raises
                    shutil.copy(packed, arriving)
            dataset(scratch, download=True)
            raw.mkdir(parents=True, exist_ok=True)
            for file in _raw_files(arriving):
                file.replace(raw / file.name)
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
            f"that holds {TORCHVISION[name]}/raw, or use dataset=digits, which needs no download"
        ) from error


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torchvision sets none of its own and would wait for a silent server for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _parse(raw: Path) -> dict[str, Tensor]:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    def read(path: Path, parse: Any) -> Tensor:
        try:
            tensor: Tensor = parse(str(path))
        except OSError as error:
            raise _unreadable(path, error) from error
        except Exception as error:  # a damaged file fails in the parser in a dozen ways
            raise _damaged(path, NOT_IDX) from error
        return tensor.flatten(start_dim=1) if tensor.ndim > 1 else tensor

    tensors = {}
    for part in ("train", "test"):
        tensors[f"{part}_images"] = read(raw / IMAGES[part], read_image_file).contiguous()
        tensors[f"{part}_labels"] = read(raw / LABELS[part], read_label_file).to(torch.uint8)
    wrong = _wrong(tensors)
    if wrong:
        file, what = wrong
        raise _damaged(raw / file, what)
    return tensors


def _wrong(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Whose file does not go with the others, and why; None where all is well."""
    for part in ("train", "test"):
        images, labels = tensors[f"{part}_images"], tensors[f"{part}_labels"]
        if len(images) != len(labels):
            return LABELS[part], f"{len(labels)} labels for the {len(images)} images beside it"
        if labels.max() >= CLASSES:
            return LABELS[part], f"label {labels.max()} is not one of {CLASSES} classes"
    of_train, of_test = (tensors[f"{part}_images"].shape[1] for part in ("train", "test"))
    if of_train != of_test:
        return (
            IMAGES["test"],
            f"{of_test} pixels an image where the training set has {of_train}",
        )
    return None


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"data file '{path}' is damaged: {what}; delete it to have it downloaded anew")


def _content_digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()


def _read_parsed(path: Path, stamp: dict[str, str]) -> dict[str, Tensor] | None:
    """The tensors kept in ``path``, or None unless they are whole and made from that source."""
    try:
        if not path.is_file() or path.stat().st_size > 4 * MAX_BYTES:
            return None
        with safe_open(path, framework="pt") as file:
            kept = file.metadata() or {}
            if any(kept.get(key) != value for key, value in stamp.items()):
                return None
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            if not _says_it_is_parsed(slices):
                return None
            tensors = {name: file.get_tensor(name) for name in slices}
    except (OSError, SafetensorError):
        return None
    whole = _content_digest(tensors) == kept.get("content") and not _wrong(tensors)
    return tensors if whole else None


def _says_it_is_parsed(slices: Mapping[str, Any]) -> bool:
    """Whether a file's header promises what :func:`_parse` gives."""
    shapes = {name: kept.get_shape() for name, kept in slices.items()}
    return (
        {name: len(shape) for name, shape in shapes.items()} == PARSED
        and all(kept.get_dtype() == "U8" for kept in slices.values())
        and all(map(math.prod, shapes.values()))
    )


def _write_parsed(path: Path, tensors: dict[str, Tensor], stamp: dict[str, str]) -> bool:
    """Keep ``tensors`` in ``path``, whole or not at all; False where it may not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder marked read-only is left alone, also by root, whom nothing else would stop.
        if not path.parent.stat().st_mode & 0o222:
            return False
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".parsed-") as scratch:
            written = Path(scratch) / path.name
            save_file(tensors, written, {**stamp, "content": _content_digest(tensors)})
            written.replace(path)
    except (OSError, SafetensorError):
        return False
    return True

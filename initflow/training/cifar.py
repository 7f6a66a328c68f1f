"""CIFAR-10's six files as torchvision keeps them: known by their checksums, before they are read.

They are pickles. Only those whose MD5 is the published one are opened, and even of them nothing is
made but arrays of NumPy.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from initflow.errors import DataError, first_line

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
# The published files with their MD5, in the order of the images; the last is the test's.
SUMS = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
TEST = "test_batch"
SHAPE = (3, 32, 32)
LARGEST = 2**26  # bytes of a file; the published ones have 31 million
Array = npt.NDArray[np.uint8]

_reconstruct: Any = np.empty(0).__reduce__()[0]
# What the files may name, by Python's and NumPy's names of then and now.
_NAMED: Mapping[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, _encoding: text.encode("latin1"),
}


def find(folder: Path) -> Path | None:
    """Where there are some of the files: in the folder's own of that name, or in the folder."""
    for place in (folder / FOLDER, folder):
        if any(os.path.isfile(place / name) for name in SUMS):  # noqa: PTH113 - never raises
            return place
    return None


def read(place: Path) -> dict[str, Array]:
    """``{train,test}_{images,labels}``, the images as (n, 3, 32, 32), all uint8.

    Raises :class:`DataError`, which names the file, where one is missing or is not the published
    one.
    """
    parts: dict[str, list[Array]] = {}
    for name, md5 in SUMS.items():
        content = _content(place / name)
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise _error(place / name, "is not the published one, by its MD5, and so is not opened")
        split = "test" if name == TEST else "train"
        for of, array in _arrays(content, place / name).items():
            parts.setdefault(f"{split}_{of}", []).append(array)
    return {part: np.concatenate(arrays) for part, arrays in parts.items()}


def _content(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise _error(path, "is missing, or no plain file")
        with path.open("rb") as file:
            return file.read(LARGEST)
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror}") from error


def _arrays(content: bytes, path: Path) -> dict[str, Array]:
    try:
        reader = _Unpickler(io.BytesIO(content), encoding="latin1")
        values = reader.load()
        images = np.asarray(values["data"], np.uint8).reshape(-1, *SHAPE)
        return {"images": images, "labels": np.asarray(values["labels"], np.uint8)}
    except Exception as error:  # whatever a pickle does
        raise _error(path, f"is damaged: {first_line(error)}") from error


class _Unpickler(pickle.Unpickler):  # of what is known by its checksum
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, no array") from None


def _error(path: Path, what: str) -> DataError:
    return DataError(f"data file '{path}' {what}")

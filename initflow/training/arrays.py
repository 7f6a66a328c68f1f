"""Arrays of the user's own, of a file or of a function of theirs, checked before anything is done.

Nothing in a file is unpickled. Whatever is wrong is one line that says what would be right.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from initflow.core import importing, paths
from initflow.core.kinds import ARRAYS, MAX_CLASSES, MAX_FEATURES
from initflow.core.seeds import stream_seed
from initflow.errors import DataError, first_line

NAMES = ("x_train", "y_train", "x_test", "y_test")
PIXELS = np.dtype(np.uint8)  # the type of arrays that are pictures, from black to white
SEED = 0  # of what a function draws: data is the same whatever a network's seed
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Arrays:
    """``tensors`` holds ``{train,test}_{images,labels}``, the features as (n, features).

    They are uint8 where they are pixels, else float32, and in the order of ``shape``, one
    example's; labels are from 0 to ``classes`` - 1. ``source`` says where they came from.
    """

    tensors: dict[str, Tensor]
    shape: tuple[int, ...]
    classes: int
    source: str


def load(dataset: str) -> Arrays:
    """The arrays of ``path/to/file.npz``, or those that a function gives, by its place.

    They are :data:`NAMES`. What the function draws from global generators is the same each time.
    Raises :class:`DataError` for what is no set to classify, and :class:`SettingError` for a
    function that is not there or fails.
    """
    who = f"dataset '{dataset}'"
    given, source = _of_file(dataset, who) if dataset.endswith(ARRAYS) else _of_place(dataset, who)
    found = {name: _array(given[name], f"{who}: {name}") for name in NAMES}
    for part in ("train", "test"):
        _check_pair(found, part, who)
    train, test = found["x_train"], found["x_test"]
    if train.shape[1:] != test.shape[1:]:
        raise DataError(
            f"{who}: x_test must have examples of the shape {train.shape[1:]}, as x_train has, not "
            f"{test.shape[1:]}"
        )
    if (train.dtype == PIXELS) != (test.dtype == PIXELS):
        raise DataError(
            f"{who}: x_train and x_test must both be uint8, which are pixels, or neither, not "
            f"{train.dtype} and {test.dtype}"
        )
    classes = _classes(found, who)
    narrow = np.uint8 if classes <= 256 else np.int64  # as published sets have them
    tensors = {}
    for part in ("train", "test"):
        features = _features(found[f"x_{part}"], f"{who}: x_{part}")
        tensors[f"{part}_images"] = torch.from_numpy(features).flatten(1)
        tensors[f"{part}_labels"] = torch.from_numpy(found[f"y_{part}"].astype(narrow))
    return Arrays(tensors, train.shape[1:], classes, source)


def _of_file(dataset: str, who: str) -> tuple[Mapping[str, object], str]:
    path = paths.own_or_of_project(dataset)
    if not os.path.isfile(path):  # noqa: PTH113 - never raises
        raise DataError(f"{who}: there is no such file")
    try:
        with path.open("rb") as file:  # NumPy leaves open what it cannot read
            return _members(file, who), str(path.resolve())
    except OSError as error:
        raise DataError(f"{who} cannot be read: {error.strerror or first_line(error)}") from error


def _members(file: BinaryIO, who: str) -> Mapping[str, object]:
    odd = f"{who} is no file that numpy.savez wrote"
    try:
        found = np.load(file, allow_pickle=False)
    except Exception as error:  # whatever its bytes make NumPy do
        raise DataError(odd) from error
    if not isinstance(found, np.lib.npyio.NpzFile):
        raise DataError(f"{odd}: it holds a single array")
    _check_names(found.files, who)
    return {name: _member(found, name, who) for name in NAMES}


def _member(file: Mapping[str, Any], name: str, who: str) -> object:
    try:
        return file[name]
    except Exception as error:  # as above
        if "allow_pickle" in str(error):
            raise DataError(
                f"{who}: {name} holds Python objects, which are never unpickled: save numbers"
            ) from error
        raise DataError(f"{who}: {name} is damaged: {first_line(error)}") from error


def _of_place(dataset: str, who: str) -> tuple[Mapping[str, object], str]:
    made, provider = importing.called(dataset, who, stream_seed(SEED, "dataset"))
    if isinstance(made, Mapping):
        _check_names(made, who)
        return made, provider
    if isinstance(made, (tuple, list)) and len(made) == len(NAMES):
        return dict(zip(NAMES, made, strict=True)), provider
    many = f" of {len(made)}" if isinstance(made, (tuple, list)) else ""
    raise DataError(
        f"{who} must give the arrays {', '.join(NAMES)}, by these names or as a tuple in this "
        f"order, not {type(made).__name__}{many}"
    )


def _check_names(found: Any, who: str) -> None:
    missing = [name for name in NAMES if name not in found]
    if missing:
        names = ", ".join(map(str, list(found)[: 2 * len(NAMES)]))
        raise DataError(f"{who} lacks {' and '.join(missing)}; it has {names or 'nothing'}")


def _array(value: object, what: str) -> Array:
    """Whatever NumPy takes for an array of numbers."""
    try:
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            if value.dtype == torch.bfloat16:  # which NumPy has not
                value = value.float()
            array = value.numpy()
        else:
            array = np.asarray(value)
    except Exception as error:  # the value may be of any class
        raise DataError(f"{what} is no array: {first_line(error)}") from error
    if array.dtype.kind not in "biuf":
        raise DataError(f"{what} must hold numbers, not {_kind(array.dtype)}")
    return array


def _kind(dtype: np.dtype[Any]) -> str:
    return {"O": "Python objects", "U": "text", "S": "text"}.get(dtype.kind, str(dtype))


def _check_pair(found: Mapping[str, Array], part: str, who: str) -> None:
    """Raise where features and labels are not of shapes that go together."""
    x, y = found[f"x_{part}"], found[f"y_{part}"]
    if x.ndim < 2:
        raise DataError(
            f"{who}: x_{part} must have the shape (examples, features) or more axes, not {x.shape}"
        )
    if not x.size:
        raise DataError(f"{who}: x_{part} is empty: its shape is {x.shape}")
    if math.prod(x.shape[1:]) > MAX_FEATURES:
        raise DataError(
            f"{who}: x_{part} must have at most {MAX_FEATURES:,} features in an example, not "
            f"{math.prod(x.shape[1:]):,}"
        )
    if y.dtype.kind == "f":
        raise DataError(
            f"{who}: y_{part} must hold classes as whole numbers of an integer type, 0 to k-1, not "
            f"{y.dtype}: only classification is done"
        )
    if y.shape != x.shape[:1]:
        raise DataError(
            f"{who}: y_{part} must have the shape {x.shape[:1]}, a label for each example of "
            f"x_{part}, not {y.shape}"
        )


def _classes(found: Mapping[str, Array], who: str) -> int:
    """How many classes the training labels have: all of 0 to k-1, each at least once."""
    train, test = found["y_train"], found["y_test"]
    for name, labels in (("y_train", train), ("y_test", test)):
        if int(labels.min()) < 0:
            raise DataError(
                f"{who}: {name} must hold classes from 0 to k-1, not {int(labels.min())}"
            )
    classes = int(train.max()) + 1
    if classes > MAX_CLASSES:
        raise DataError(
            f"{who}: y_train must have at most {MAX_CLASSES:,} classes, 0 to {MAX_CLASSES - 1}, "
            f"not the class {classes - 1}"
        )
    absent = sorted(set(range(classes)) - set(np.unique(train).tolist()))
    if absent:
        raise DataError(
            f"{who}: y_train must have every class from 0 to k-1, and of 0 to {classes - 1} it "
            f"lacks {_few(absent)}: number them anew, as np.unique(y, return_inverse=True) does"
        )
    if classes == 1:
        raise DataError(f"{who}: y_train must have two classes at least, not class 0 alone")
    if int(test.max()) >= classes:
        raise DataError(
            f"{who}: y_test has the class {int(test.max())}, and y_train only 0 to {classes - 1}"
        )
    return classes


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")


def _features(array: Array, what: str) -> Array:
    """Pixels as they are, all else as float32, every one finite; in C order, and native."""
    if array.dtype == PIXELS:
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore", invalid="ignore"):
        features = np.ascontiguousarray(array, dtype=np.float32)
    finite = np.isfinite(features)
    if not finite.all():
        at = tuple(int(index) for index in np.unravel_index(int(finite.argmin()), features.shape))
        raise DataError(
            f"{what} must be finite in float32, which {array[at]} at {list(at)} is not, one of "
            f"{int((~finite).sum()):,}"
        )
    return features

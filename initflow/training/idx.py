"""The four IDX files of a data set: found by the names that they go by, checked and read.

Their content decides, so that it does not matter who named or packed them. Nothing is written, and
no more is read or unpacked than a header promises, within :data:`MAX_BYTES`.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import math
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from initflow.core.kinds import MAX_WIDTH
from initflow.errors import DataError

# As they are published, by what they hold.
NAMES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
Array = npt.NDArray[np.uint8]
MAX_BYTES = 2**30  # of a file, also unpacked; MNIST's largest has 47 million
PIECE = 2**20  # bytes that are unpacked at once
GZIP = b"\x1f\x8b"  # the first bytes of what gzip packed
DAMAGED, MISFIT, UNREADABLE = "is damaged", "does not fit", "cannot be read"
NOT_IDX = "truncated, or not an IDX file of the kind its name says"
NOT_GZIP = "a gzip archive that is truncated or was changed"
SHOWN = 3  # files that a message names

# The part of a name that says what is in it, and the whole, as 7-Zip, Kaggle and others have it.
_BEGINNING = re.compile(r"(train|t10k|test)[-_. ]?(images|labels)", re.IGNORECASE | re.ASCII)
_NAME = re.compile(_BEGINNING.pattern + r"[-_. ]?idx\d?([-_. ]?ubyte)?", _BEGINNING.flags)
_PACKED = (".gz", ".gzip")
_ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst")
_OTHERS = (".npz", ".npy", ".csv", ".pkl", ".pkl.gz", ".pt", ".mat", ".h5", ".parquet", ".arff")
_NOTES = (".md5", ".sha1", ".sha256", ".asc", ".sig", ".txt")  # of files, and none themselves
UNPACK = "unpack it"
NOT_READ = "only IDX files are read"
# What in a name says that it is of a set, and of any.
_WORDS = {
    "MNIST": r"(?<![a-z])(?<!fashion[-_ ])mnist",
    "FashionMNIST": r"fashion",
    "KMNIST": r"kmnist|kuzushiji",
    "EMNIST": r"emnist[-_ ]?balanced",
}
_SETS = r"mnist|fashion|kuzushiji"
# What the names of a set's files begin with, where another one of its splits lies beside it.
PREFIXES = {"EMNIST": "emnist-balanced-"}


@dataclass(frozen=True)
class Found:
    """What lies in the places of a data set.

    ``files`` has for each part of :data:`NAMES` all that can be read. ``taken`` are those of one
    place, the first that has all four or else the most, so that no two sets are mixed; there, what
    is not packed, in no folder of its own, and first by name. ``refused`` says of what else bears
    such a name why it cannot be, in words.
    """

    files: Mapping[str, Sequence[Path]]
    taken: Mapping[str, Path]
    refused: Mapping[Path, str]

    @property
    def is_empty(self) -> bool:
        return not (any(self.files.values()) or self.refused)

    @property
    def missing(self) -> list[str]:
        """The published names of the parts that are not taken."""
        return [name for part, name in NAMES.items() if part not in self.taken]


def places(folder: Path, name: str) -> list[Path]:
    """Where the files of the set called ``name`` may be: ``NAME/raw``, ``NAME``, ``raw``, here.

    Those that there are, in this order; letters are of any case, and the name with hyphens or
    without.
    """
    return [
        place
        for home in (*_homes(folder, name), folder)
        for place in (*(home / e for e in _entries(home) if e.lower() == "raw"), home)
    ]


def _homes(folder: Path, name: str) -> list[Path]:
    """The folders that are called like the set."""
    return [
        folder / entry
        for entry in _entries(folder)
        if re.sub("[-_ ]", "", entry).lower() == name.lower()
    ]


def find(folder: Path, name: str) -> Found:
    """What there is in the :func:`places` of the set. Of the files nothing is read.

    Raises :class:`DataError` where a folder cannot be looked into.
    """
    files: dict[str, list[Path]] = {part: [] for part in NAMES}
    taken: dict[str, Path] = {}
    refused: dict[Path, str] = {}
    for place in places(folder, name):
        here: list[tuple[tuple[bool, int, str], str, Path]] = []
        for entry in _entries(place):
            part, path = _part(entry, name), place / entry
            if not part:
                continue
            # Kaggle unpacks each file into a folder of the same name.
            within = [path / inner for inner in _entries(path) if _part(inner, name) == part]
            for file in within or [path]:
                reason = _refusal(file, NAMES[part], name)
                if reason:
                    refused[file] = reason
                else:
                    is_packed = file.name.lower().endswith(_PACKED)
                    here.append(((is_packed, len(file.parts), file.name.lower()), part, file))
        firsts: dict[str, Path] = {}
        for _, part, file in sorted(here):
            files[part].append(file)
            firsts.setdefault(part, file)
        taken = max(taken, firsts, key=len)  # of equals the first
    return Found(files, taken, refused)


def related(folder: Path, name: str) -> dict[Path, str]:
    """What else in the :func:`places` of the set may hold it, and why it is not taken."""
    looked_into, homes = places(folder, name), _homes(folder, name)
    found = {}
    for place in looked_into:
        for entry in _entries(place):
            path, lower, named = place / entry, entry.lower(), _BEGINNING.search(entry)
            of_any = named or lower.startswith("archive")
            of_set = re.search(_WORDS[name], lower) or (of_any and not re.search(_SETS, lower))
            # In a folder called like the set whatever there is may be it.
            if path in looked_into or not (of_set or place in homes) or lower.startswith("."):
                continue
            if path.is_dir() and any(find(path, name).files.values()):
                found[path] = "point data_dir to it"
            elif path.is_dir() or lower.endswith(_OTHERS):
                found[path] = NOT_READ
            elif named:
                found[path] = f"call it {PREFIXES.get(name, '')}{NAMES[_part_of(named)]}"
            elif lower.endswith(_ARCHIVES):
                found[path] = UNPACK
    return found


def listed(refused: Mapping[Path, str]) -> str:
    """Some files, each with the reason for which it is not taken."""
    shown = ", ".join(f"'{path}' ({why})" for path, why in list(refused.items())[:SHOWN])
    printable = "".join(c if c.isprintable() else "�" for c in shown)
    return printable + (", …" if len(refused) > SHOWN else "")


def read(files: Mapping[str, Path], classes: int) -> dict[str, Array]:
    """The pixels and labels in a file for each of :data:`NAMES`, uint8.

    Images are (n, rows, columns), labels (n,), each below ``classes``. Raises :class:`DataError`,
    which names the file, where one is damaged, cannot be read or does not go with the others.
    """
    # All headers before any content: what does not go together is not even unpacked.
    shapes = {part: _shape(files[part], part) for part in NAMES}
    for images, labels in (("train_images", "train_labels"), ("test_images", "test_labels")):
        (n, *_), (of_labels,) = shapes[images], shapes[labels]
        if n != of_labels:
            what = f"{of_labels} labels for the {n} images in '{files[images]}'"
            raise _error(files[labels], MISFIT, what)
    of_train, of_test = (math.prod(shapes[part][1:]) for part in ("train_images", "test_images"))
    if of_train != of_test:
        what = f"{of_test} pixels an image where the training set has {of_train}"
        raise _error(files["test_images"], MISFIT, what)
    arrays = {part: _content(files[part], shape) for part, shape in shapes.items()}
    for part in ("train_labels", "test_labels"):
        largest = int(arrays[part].max())
        if largest >= classes:
            what = f"label {largest} is not one of {classes} classes, 0 to {classes - 1}"
            raise _error(files[part], MISFIT, what)
    return arrays


def checksums(files: Sequence[Path], array: Array) -> set[str]:
    """The MD5 of those ``files`` that gzip packed and that hold ``array``, one of :func:`read`."""
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    checksum, size = zlib.crc32(array.data, zlib.crc32(header)), len(header) + array.nbytes
    # An archive ends with the checksum and the size of what is in it.
    end = struct.pack("<2I", checksum, size)
    found = set()
    for path in files:
        with contextlib.suppress(OSError), path.open("rb") as file:
            if file.read(len(GZIP)) != GZIP:
                continue
            file.seek(-len(end), os.SEEK_END)
            if file.read() == end:
                file.seek(0)
                found.add(hashlib.file_digest(file, "md5").hexdigest())
    return found


def _entries(folder: Path) -> list[str]:
    """The names in a folder; none where there is no folder."""
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 - names are all that is needed
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _error(folder, UNREADABLE, error.strerror) from error


def _part(name: str, title: str) -> str | None:
    """The part whose name ``name`` is, or begins with, in the set of this ``title``."""
    prefix = PREFIXES.get(title, "")
    found = _NAME.match(name[len(prefix) :]) if name.lower().startswith(prefix) else None
    return _part_of(found) if found and not name.lower().endswith(_NOTES) else None


def _part_of(found: re.Match[str]) -> str:
    return f"{'train' if found[1].lower() == 'train' else 'test'}_{found[2].lower()}"


def _refusal(path: Path, right: str, title: str) -> str:
    """Why ``path``, whose name begins with a part's, is none of its files; empty where it is."""
    prefix = PREFIXES.get(title, "")
    try:
        kind = path.stat().st_mode
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if stat.S_ISDIR(kind):
        return "a folder without that file"
    if not stat.S_ISREG(kind):
        return "not a file that can be read to its end"
    name = path.name.lower().removeprefix(prefix)
    if _NAME.fullmatch(name) or (
        name.endswith(_PACKED) and _NAME.fullmatch(name.rpartition(".")[0])
    ):
        return ""
    if name.endswith(_PACKED):
        return f"call it {prefix}{right}.gz"
    return UNPACK if name.endswith(_ARCHIVES) else f"call it {prefix}{right}"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[io.BufferedIOBase, int | None]]:
    """The content of a file and its size; unpacked where gzip packed it, and of unknown size.

    That, too, is seen by its content: browsers unpack files and keep their names.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise _error(path, DAMAGED, f"{size:,} bytes, where {MAX_BYTES:,} are the most")
            is_packed = file.read(len(GZIP)) == GZIP
            file.seek(0)
            if is_packed:
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield unpacked, None
            else:
                yield file, size
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _error(path, DAMAGED, NOT_GZIP) from error
    except OSError as error:
        raise _error(path, UNREADABLE, error.strerror) from error


def _shape(path: Path, part: str) -> tuple[int, ...]:
    """The shape in a file's header: (n, rows, columns) of images, (n,) of labels.

    Raises :class:`DataError` unless the file is as large as that says, and no larger than may be;
    of one that is packed that is seen when it is read.
    """
    dimensions = 3 if part.endswith("images") else 1
    length = 4 * (1 + dimensions)
    with _opened(path) as (file, size):
        header = file.read(length)
    # Of unsigned bytes, so that a number in the file is a byte of it.
    is_idx = len(header) == length and header[:4] == bytes((0, 0, 8, dimensions))
    shape = struct.unpack(f">{dimensions}I", header[4:]) if is_idx else ()
    whole = length + math.prod(shape)
    if not (shape and math.prod(shape) and size in (None, whole)):
        raise _error(path, DAMAGED, NOT_IDX)
    if whole > MAX_BYTES:
        what = f"{whole:,} bytes unpacked, where {MAX_BYTES:,} are the most"
        raise _error(path, DAMAGED, what)
    if math.prod(shape[1:]) > MAX_WIDTH:
        what = f"{shape[1]} x {shape[2]} pixels, where {MAX_WIDTH:,} are the most"
        raise _error(path, DAMAGED, what)
    return shape


def _content(path: Path, shape: tuple[int, ...]) -> Array:
    """What follows the header of a file that has the ``shape``."""
    start = 4 * (1 + len(shape))
    whole = start + math.prod(shape)
    content = bytearray()
    with _opened(path) as (file, _):
        # Until its end, where gzip's checksum is, but not on and on.
        while len(content) <= whole and (piece := file.read(PIECE)):
            content += piece
    if len(content) != whole:
        raise _error(path, DAMAGED, NOT_IDX)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _error(path: Path, trouble: str, what: str | None) -> DataError:
    return DataError(f"data file '{path}' {trouble}: {what}")

"""Data sets: layout, splits, normalization, what is kept, what is refused."""

import contextlib
import errno
import functools
import gzip
import hashlib
import html
import http.server
import importlib.util
import os
import pickle
import re
import shlex
import tarfile
import tempfile
import threading
import zipfile
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torchvision import datasets as torchvision_sets
from torchvision import transforms

from initflow.cli import process
from initflow.core.configurations import CompareConfig, DiagnoseConfig, TrainConfig, TuneConfig
from initflow.errors import DataError, SettingError
from initflow.training import cifar as cifar_files
from initflow.training import datasets, idx
from initflow.training.splits import OWN, PUBLISHED, UNCHECKED
from tests.conftest import idx as idx_file
from tests.conftest import python, small_mnist, write_raw
from tests.serving import QuietServer

pytestmark = pytest.mark.usefixtures("cache")


def load(folder=None, **settings):
    return datasets.load(TrainConfig(data_dir=folder, **({"dataset": "mnist"} | settings)))


@pytest.fixture
def folder(tmp_path):
    """A data folder with a small MNIST."""
    write_raw(tmp_path / "data", small_mnist())
    return tmp_path / "data"


@pytest.mark.mnist
def test_mnist_is_torchvisions(mnist):
    """Every pixel and label, as ToTensor gives them, and its published second moment."""
    splits = load(mnist)
    assert (len(splits.train), len(splits.test), splits.pixels) == (60_000, 10_000, 784)
    theirs = torchvision_sets.MNIST(mnist, train=False, transform=transforms.ToTensor())
    for index in (0, 1, 4_999, 9_999):
        image, label = theirs[index]
        assert torch.equal(splits.test.images[index], image.flatten())
        assert splits.test.labels[index] == label
    assert splits.train.images.square().mean().item() == pytest.approx(0.1120, abs=5e-5)


@pytest.mark.mnist
def test_mnist_normalized_has_its_published_mean_and_std(mnist):
    """0.1307 and 0.3081, and then mean 0 and second moment 1."""
    splits = load(mnist, normalize="standard")
    assert splits.mean == pytest.approx(0.1307, abs=5e-5)
    assert splits.std == pytest.approx(0.3081, abs=5e-5)
    assert splits.train.images.double().mean().item() == pytest.approx(0, abs=1e-5)
    assert splits.train.images.double().square().mean().item() == pytest.approx(1, abs=1e-5)


def test_digits_need_nothing_and_never_change():
    """1,797 images, split once and for all, each digit in its share."""
    splits = load(dataset="digits")
    assert (len(splits.train), len(splits.test), splits.pixels) == (1_437, 360, 64)
    assert splits.test.labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert splits.train.images.min() == 0
    assert splits.train.images.max() == 1
    assert splits.digest == load(dataset="digits", seed=5).digest
    assert splits.digest.startswith("70cb8757d0f949aa0caa4eee7609d20e")


def test_digits_are_scikit_learns_whether_its_file_is_found(monkeypatch):
    """They come out of the package's own file or, where that lies elsewhere, by its function."""
    images, labels = load_digits(return_X_y=True)
    read = datasets._digits_as_they_come()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for found in (read, datasets._digits_as_they_come()):
        assert np.array_equal(found[0], images)
        assert np.array_equal(found[1], labels)


def test_half_normalization_is_the_assignments(folder):
    """(x − 0.5)/0.5 in torchvision's own order of operations."""
    pixels = load(folder).train.images
    half = load(folder, normalize="half")
    assert torch.equal(half.train.images, transforms.Normalize(0.5, 0.5)(pixels[None, None])[0, 0])
    assert (half.mean, half.std) == (0.5, 0.5)


def test_standard_normalization_is_that_of_the_training_images(folder):
    """Against the plain mean and standard deviation in double precision."""
    unit, standard = load(folder), load(folder, normalize="standard", validation=50)
    pixels = unit.train.images.double()
    assert standard.mean == pytest.approx(pixels.mean().item(), rel=1e-6)
    assert standard.std == pytest.approx(pixels.std(correction=0).item(), rel=1e-6)
    expected = (unit.test.images - standard.mean) / standard.std
    torch.testing.assert_close(standard.test.images, expected)


@pytest.mark.parametrize("validation", [10, 57, 100])
def test_validation_images_are_taken_off_the_training_set(folder, validation):
    """None is in both, none is lost, each class in its share, the test set as it was."""
    whole, splits = load(folder), load(folder, validation=validation)
    assert whole.validation is None
    assert (len(splits.train), len(splits.validation)) == (200 - validation, validation)
    counts = splits.validation.labels.bincount(minlength=10)
    assert counts.max() - counts.min() <= 1
    parts = torch.cat([splits.train.images, splits.validation.images])
    assert {row.numpy().tobytes() for row in parts} == {
        row.numpy().tobytes() for row in whole.train.images
    }
    assert torch.equal(splits.test.images, whole.test.images)
    assert splits.digest == whole.digest


def test_the_seed_chooses_the_validation_images(folder):
    """The same again for the same seed, others for another."""
    first, again, other = (load(folder, validation=50, seed=s).validation for s in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize("validation", [5, 195, 10_000])
def test_more_validation_images_than_there_are(folder, validation):
    """The error says how many can be had."""
    with pytest.raises(SettingError, match=f"from 10 to 190 of the 200 training .* '{validation}'"):
        load(folder, validation=validation)


def test_the_folder_is_the_option_then_the_variable_then_the_cache(folder, cache, monkeypatch):
    """In that order."""
    assert datasets.data_dir(None) == cache / "initflow" / "data"
    monkeypatch.setenv("INITFLOW_DATA_DIR", str(folder))
    assert datasets.data_dir(None) == folder
    assert datasets.data_dir(folder / "other") == folder / "other"
    assert len(load().train) == 200


def test_torchvision_is_not_imported_for_what_is_on_disk(folder):
    """Importing it takes seconds, and reading the files does not; nothing is written."""
    before = sorted(folder.rglob("*"))
    program = (
        "import sys; from initflow.training import datasets;"
        "from initflow.core.configurations import TrainConfig;"
        f"s = datasets.load(TrainConfig(data_dir={str(folder)!r}));"
        "assert 'torchvision' not in sys.modules; print(s.digest)"
    )
    assert python(program).strip() == load(folder).digest
    assert sorted(folder.rglob("*")) == before


# How files are named, where they lie and how they are packed.
NAMED = {
    "as published": str,
    "7-Zip": lambda name: name.replace("-idx", ".idx"),
    "Kaggle": lambda name: f"{name}/{name}",
    "Kaggle's folder, 7-Zip's name": lambda name: f"{name}/{name.replace('-idx', '.idx')}",
    "capitals": str.upper,
    "test": lambda name: name.replace("t10k", "test"),
    "underscores": lambda name: name.replace("-", "_"),
    "no ubyte": lambda name: name.removesuffix("-ubyte"),
}
PLACES = ["MNIST/raw", "MNIST", "raw", ".", "mnist/RAW", "Mnist"]
PACKED = {
    "not": ("", bytes),
    "gzip": (".gz", lambda content: gzip.compress(content, 1, mtime=1)),
    "in capitals": (".GZ", gzip.compress),
    "in pieces": (".gz", lambda c: gzip.compress(c[:99]) + gzip.compress(c[99:])),
    "without saying so": ("", gzip.compress),
    "unpacked by the browser": (".gz", bytes),
}


def lay(folder, name, content, *, named="as published", place="MNIST/raw", packed="not"):
    """Write the file that is published as ``name`` in another way, and return its path."""
    suffix, pack = PACKED[packed]
    path = folder / place / f"{NAMED[named](name)}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack(content))
    return path


@pytest.fixture
def alone(monkeypatch):
    """No data set can be downloaded, and none is tried."""
    monkeypatch.setattr(datasets, "_download", lambda *_: pytest.fail("it was to be downloaded"))


WAYS = [
    *({"named": name} for name in NAMED),
    *({"place": place} for place in PLACES),
    *({"packed": packed} for packed in PACKED),
    {"named": "7-Zip", "place": ".", "packed": "gzip"},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_files_go_by_many_names(alone, folder, tmp_path, way):
    """7-Zip's, Kaggle's, in any case of letters, in the folder itself, packed by anyone: used."""
    laid = [lay(tmp_path / "new", *item, **way) for item in small_mnist().items()]
    before = sorted((tmp_path / "new").rglob("*"))
    splits = load(tmp_path / "new")
    assert splits.digest == load(folder).digest
    assert splits.source in {str(path.resolve()) for path in laid[0].parents}
    assert sorted((tmp_path / "new").rglob("*")) == before


WAY = st.fixed_dictionaries(
    {
        "named": st.sampled_from(sorted(NAMED)),
        "place": st.sampled_from(PLACES),
        "packed": st.sampled_from(sorted(PACKED)),
    }
)


@given(st.sampled_from(PLACES), st.tuples(*[st.lists(WAY, min_size=1, max_size=2)] * 4))
def test_any_mixture_of_names_places_and_packing_is_the_same_set(alone, place, ways):
    """Each of the four in a way of its own in one place; also in another way, anywhere."""
    files = small_mnist(train=12, test=11, side=3)
    with tempfile.TemporaryDirectory() as name:
        for item, (first, *others) in zip(files.items(), ways, strict=True):
            for way in ({**first, "place": place}, *others):
                # What one is a file in, the other is a folder in: the first stays.
                with contextlib.suppress(FileExistsError, IsADirectoryError, NotADirectoryError):
                    lay(Path(name), *item, **way)
        splits = load(Path(name))
    assert splits.digest == digest_of(files)


@functools.cache
def _digest(names):
    with tempfile.TemporaryDirectory() as name:
        write_raw(Path(name), dict(names))
        return load(Path(name)).digest


def digest_of(files):
    return _digest(tuple(files.items()))


@pytest.mark.parametrize("dataset", ["fashion-mnist", "kmnist"])
@pytest.mark.parametrize("place", ["{}/raw", "{}", "raw", "."])
def test_other_sets_have_folders_of_their_own(alone, tmp_path, dataset, place):
    """Called as torchvision calls them, or as we do; MNIST's is no place of theirs."""
    for home in (datasets.TORCHVISION[dataset], dataset):
        new = tmp_path / home
        write_raw(new, small_mnist(train=10))
        for item in small_mnist(train=20).items():
            lay(new, *item, place=place.format(home))
        assert len(load(new, dataset=dataset).train) == 20


def test_of_several_files_the_first_in_order_is_taken(alone, tmp_path):
    """By place, then what is not packed, then what is in no folder of its own, then by name."""
    ways = [
        {},
        {"named": "7-Zip"},
        {"named": "Kaggle's folder, 7-Zip's name", "place": "MNIST"},
        {"packed": "gzip", "place": "MNIST"},
        {"place": "raw"},
        {"place": "."},
    ]
    for n, way in reversed(list(enumerate(ways, start=1))):
        for item in small_mnist(train=10 * n).items():
            lay(tmp_path, *item, **way)
        assert len(load(tmp_path).train) == 10 * n


@pytest.mark.parametrize("strays", [1, 3])
def test_files_of_two_sets_are_never_mixed(alone, tmp_path, strays):
    """Strays where one looks first do not stand in for those of a whole set elsewhere."""
    whole, other = small_mnist(), small_mnist()
    other["train-labels-idx1-ubyte"] = idx_file(np.zeros(200))
    for item in whole.items():
        lay(tmp_path, *item, place=".")
    expected = load(tmp_path).digest
    for item in sorted(other.items(), reverse=True)[:strays]:
        lay(tmp_path, *item, place="MNIST/raw")
    assert load(tmp_path).digest == expected


def test_four_files_in_two_places_are_no_set(alone, tmp_path):
    """Nobody knows whether they belong together; the error says where they are to be."""
    items = sorted(small_mnist().items())
    for n, item in enumerate(items):
        lay(tmp_path, *item, place="raw" if n == 3 else ".")
    lacking = f"lacks {items[3][0]}, looked for there and in .*all four in one of them"
    with pytest.raises(DataError, match=lacking):
        load(tmp_path)


def test_a_link_to_a_file_elsewhere_is_followed(alone, folder, tmp_path):
    """As are links to the folders."""
    raw = folder / "MNIST" / "raw"
    images = raw / "train-images-idx3-ubyte"
    expected = load(folder).digest
    images.rename(tmp_path / "elsewhere")
    images.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "raw").symlink_to(raw)
    assert load(folder).digest == load(tmp_path / "linked").digest == expected


def test_a_read_only_folder_serves(folder):
    """Nothing is written to it, nor anywhere else."""
    places = [folder, folder / "MNIST", folder / "MNIST" / "raw"]
    for place in places:
        place.chmod(0o555)
    try:
        assert len(load(folder).train) == 200
    finally:
        for place in places:
            place.chmod(0o755)


def _idx(*shape, value=1):
    return idx_file(np.full(shape, value))


# What is done to which file, and what the error says of it.
NOT_IDX = "truncated, or not an IDX file of the kind its name says"
DAMAGED = {
    "truncated images": ("train-images-idx3-ubyte", lambda c: c[:-1], NOT_IDX),
    "truncated labels": ("train-labels-idx1-ubyte", lambda c: c[:-10], NOT_IDX),
    "empty": ("t10k-images-idx3-ubyte", lambda _: b"", NOT_IDX),
    "no image": ("t10k-images-idx3-ubyte", lambda _: _idx(0, 28, 28), NOT_IDX),
    "a web page": ("t10k-labels-idx1-ubyte", lambda _: b"<html>no</html>", NOT_IDX),
    "images": ("train-labels-idx1-ubyte", lambda _: _idx(9, 2, 2), NOT_IDX),
    "too few": ("train-labels-idx1-ubyte", lambda _: _idx(7), "7 labels for the 200 images"),
    "letters": ("train-labels-idx1-ubyte", lambda _: _idx(200, value=26), "label 26 is not one"),
    "another size": (
        "t10k-images-idx3-ubyte",
        lambda _: _idx(50, 8, 8),
        "64 pixels an image where the training set has 784",
    ),
}


@pytest.mark.parametrize("packed", ["not", "gzip"])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(alone, tmp_path, name, packed):
    """With what is wrong with it; it is the user's, so nobody says to delete it."""
    harmed, harm, message = DAMAGED[name]
    for file, content in small_mnist().items():
        path = lay(tmp_path, file, harm(content) if file == harmed else content, packed=packed)
        if file == harmed:
            expected = f"data file '{path}' "
    with pytest.raises(DataError) as error:
        load(tmp_path)
    assert str(error.value).startswith(expected)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "delete" not in str(error.value)


CUT = {
    "half": lambda c: c[: len(c) // 2],
    "its end": lambda c: c[:-1],
    "its head": lambda c: c[:5],
    "a bit": lambda c: c[:-7] + bytes([c[-7] ^ 1]) + c[-6:],
    "more after it": lambda c: c + b"x",
}


@pytest.mark.parametrize("name", CUT)
def test_a_damaged_archive_is_named(alone, tmp_path, name):
    """The others are whole; it is not taken for absent."""
    raw = write_raw(tmp_path, small_mnist(), packed=True)
    path = raw / "train-labels-idx1-ubyte.gz"
    path.write_bytes(CUT[name](path.read_bytes()))
    message = f"data file '{path}' is damaged: {idx.NOT_GZIP}"
    with pytest.raises(DataError, match=re.escape(message)):
        load(tmp_path)


# What lies where the file of the test images should be, and what the error says of it.
MISSING = {
    "nothing": (lambda _: None, ""),
    "7-Zip's archive": (
        lambda p: Path(f"{p}.7z").touch(),
        "t10k-images-idx3-ubyte.7z' (unpack it)",
    ),
    "a second download": (
        lambda p: Path(f"{p} (1).gz").touch(),
        "ubyte (1).gz' (call it t10k-images-idx3-ubyte.gz)",
    ),
    "a download that was cut": (
        lambda p: Path(f"{p}.part").touch(),
        "ubyte.part' (call it t10k-images-idx3-ubyte)",
    ),
    "a folder": (Path.mkdir, "ubyte' (a folder without that file)"),
    "a pipe": (os.mkfifo, "ubyte' (not a file that can be read to its end)"),
    "a link to nothing": (lambda p: p.symlink_to("nowhere"), "ubyte' (cannot be read: No such"),
}


@pytest.mark.parametrize("kind", MISSING)
@pytest.mark.parametrize("place", ["MNIST/raw", "."])
def test_three_of_four_files(alone, tmp_path, kind, place):
    """The missing one is named, with where it was looked for and what lies there instead."""
    for item in small_mnist().items():
        path = lay(tmp_path, *item, place=place)
        if path.name == "t10k-images-idx3-ubyte":
            missing = path
    missing.unlink()
    make, said = MISSING[kind]
    make(missing)
    with pytest.raises(DataError) as error:
        load(tmp_path)
    message = str(error.value)
    assert message.startswith(
        f"mnist in '{tmp_path}' lacks t10k-images-idx3-ubyte, looked for there and in MNIST/raw, "
        "MNIST and raw"
    )
    assert said in message
    assert ("not taken" in message) == bool(said)
    assert "delete" not in message
    assert message.endswith("; nothing is downloaded beside files of a set")


def _labels(own):
    """Letters, as EMNIST has them: 1 to 26."""
    return own | {"train-labels-idx1-ubyte": idx_file(np.arange(200) % 26 + 1)}


def _one_less(own):
    return {name: content for name, content in own.items() if "t10k-labels" not in name}


@pytest.mark.parametrize("harm", [_labels, _one_less])
def test_only_what_we_downloaded_may_be_deleted(alone, cache, tmp_path, monkeypatch, harm):
    """That is, in the cache folder; an error never says so of files in a folder of the user's."""
    ours, users = cache / "initflow" / "data", tmp_path / "users"
    for folder in (ours, users):
        write_raw(folder, harm(small_mnist()))
    advice = f"; delete '{ours / 'MNIST'}' to have it downloaded anew"
    with pytest.raises(DataError, match=f"{re.escape(advice)}$"):
        load()
    with pytest.raises(DataError) as error:
        load(users)
    assert "delete" not in str(error.value)
    monkeypatch.setenv("INITFLOW_DATA_DIR", str(users))
    with pytest.raises(DataError) as error:
        load()
    assert "delete" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(folder, monkeypatch):
    """With the system's reason."""
    path, real = folder / "MNIST" / "raw" / "train-images-idx3-ubyte", Path.open

    def fail(opened, *how):
        if opened == path:
            raise OSError(errno.EIO, "Input/output error")
        return real(opened, *how)

    monkeypatch.setattr(Path, "open", fail)
    message = f"data file '{path}' cannot be read: Input/output error"
    with pytest.raises(DataError, match=re.escape(message)):
        load(folder)


def test_a_folder_that_cannot_be_looked_into_is_named(alone, folder, monkeypatch):
    """It is not taken for an empty one."""
    raw, listdir = folder / "MNIST" / "raw", os.listdir

    def deny(path):
        if path == raw:
            raise PermissionError(errno.EACCES, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(idx.os, "listdir", deny)
    with pytest.raises(DataError, match=f"'{raw}' cannot be read: Permission denied"):
        load(folder)


# What a run says of its images.


@pytest.mark.mnist
def test_the_published_mnist_is_known_by_its_content(mnist, tmp_path):
    """Packed and named by anyone; with one other pixel it is the user's own."""
    raw = mnist / "MNIST" / "raw"
    for path in raw.glob("*-ubyte"):
        lay(tmp_path, path.name, path.read_bytes(), named="7-Zip", place=".", packed="gzip")
    splits = load(tmp_path)
    assert splits.edition == load(mnist).edition == PUBLISHED
    assert splits.remark == ""
    assert splits.tags == {"initflow.data": "published", "initflow.data_sha256": splits.digest}
    images = (raw / "t10k-images-idx3-ubyte").read_bytes()
    lay(tmp_path, "t10k-images-idx3-ubyte", images[:-1] + b"\1", place=".")
    own = load(tmp_path)
    assert own.edition == OWN
    assert own.remark == (
        "The data is the user's own, not the published mnist: its SHA-256 is " + own.digest + "."
    )


@pytest.mark.mnist
@pytest.mark.parametrize("dataset", ["fashion-mnist", "kmnist"])
def test_mnist_is_never_taken_for_another_set(mnist, tmp_path, dataset):
    """Whose files have the same names; the error says what it is."""
    (tmp_path / "raw").symlink_to(mnist / "MNIST" / "raw")
    message = f"are mnist, not {dataset}: use dataset=mnist, or point data_dir to another folder"
    with pytest.raises(DataError, match=message):
        load(tmp_path, dataset=dataset)


def test_a_set_of_other_images_is_the_users_own(folder):
    """Under the name mnist, whose content is known; the digits are what they are."""
    assert load(folder).edition == OWN
    assert load(dataset="digits").edition == PUBLISHED


def test_the_published_archives_are_torchvisions():
    """Their checksums, in the order of the parts."""
    for name, sums in datasets.ARCHIVES.items():
        resources = dict(getattr(torchvision_sets, datasets.TORCHVISION[name]).resources)
        assert [resources[f"{file}.gz"] for file in idx.NAMES.values()] == list(sums)


def test_sets_known_by_their_archives(alone, tmp_path, monkeypatch):
    """Published where those lie there, for what was unpacked of them too; else unchecked."""
    files = small_mnist()
    packed = {name: gzip.compress(files[name], mtime=0) for name in idx.NAMES.values()}
    sums = tuple(
        hashlib.md5(content, usedforsecurity=False).hexdigest() for content in packed.values()
    )
    place = "KMNIST/raw"
    for item in files.items():
        lay(tmp_path, *item, place=place)

    def edition():
        return load(tmp_path, dataset="kmnist").edition

    assert edition() == UNCHECKED
    for name, content in packed.items():
        (tmp_path / place / f"{name}.gz").write_bytes(content)
    assert edition() == UNCHECKED
    monkeypatch.setitem(datasets.ARCHIVES, "kmnist", sums)
    assert edition() == PUBLISHED
    other = lay(tmp_path, "t10k-images-idx3-ubyte", _idx(50, 28, 28), place=place)
    assert edition() == UNCHECKED  # what is read is not what is in the archive
    other.unlink()
    assert edition() == PUBLISHED
    (tmp_path / "KMNIST").rename(tmp_path / "MNIST")
    with pytest.raises(DataError, match="are kmnist, not mnist: use dataset=kmnist"):
        load(tmp_path)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local server of a small MNIST, which torchvision takes for its mirror."""
    files = small_mnist()
    raw = write_raw(tmp_path / "served", files, packed=True)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(raw))
    with QuietServer(handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        monkeypatch.setattr(
            torchvision_sets.MNIST, "mirrors", [f"http://127.0.0.1:{httpd.server_port}/"]
        )
        resources = [
            (path.name, hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest())
            for path in sorted(raw.iterdir())
        ]
        monkeypatch.setattr(torchvision_sets.MNIST, "resources", resources)
        yield raw
        httpd.shutdown()
        thread.join()


def emnist(split="balanced", train=94, test=47):
    """The four files of a small EMNIST by name, with images that lie on their side."""
    random = np.random.default_rng(1)
    files = {}
    for part, n in (("train", train), ("test", test)):
        images = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        for of, content in (("images-idx3", images), ("labels-idx1", np.arange(n) % 47)):
            files[f"emnist-{split}-{part}-{of}-ubyte"] = idx_file(content)
    return files


def cifar(folder, monkeypatch):
    """CIFAR-10's folder as torchvision keeps it, of 20 images a file, and what is in it."""
    random = np.random.default_rng(2)
    home = folder / "cifar-10-batches-py"
    home.mkdir(parents=True)
    held, sums = [], {}
    for name in cifar_files.SUMS:
        data = random.integers(0, 256, (20, 3_072), dtype=np.uint8)
        labels = random.permutation(np.arange(20) % 10).tolist()
        held.append((data, labels))
        # Under Python 2 they were written with NumPy's name of its time.
        content = pickle.dumps({"data": data, "labels": labels}, protocol=2)
        content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        (home / name).write_bytes(content)
        sums[name] = hashlib.md5(content, usedforsecurity=False).hexdigest()
    meta = pickle.dumps({"label_names": list("abcdefghij")}, protocol=2)
    (home / "batches.meta").write_bytes(meta)
    known = {"md5": hashlib.md5(meta, usedforsecurity=False).hexdigest()}
    theirs = torchvision_sets.CIFAR10
    monkeypatch.setattr(theirs, "meta", theirs.meta | known)
    monkeypatch.setattr(
        theirs, "train_list", [[n, s] for n, s in sums.items() if n != "test_batch"]
    )
    monkeypatch.setattr(theirs, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cifar_files, "SUMS", sums)
    return held


def test_cifars_files_are_torchvisions():
    """The MD5 of each."""
    theirs = torchvision_sets.CIFAR10
    assert dict([*theirs.train_list, *theirs.test_list]) == cifar_files.SUMS
    assert (theirs.base_folder, theirs.filename) == (cifar_files.FOLDER, cifar_files.ARCHIVE)


@pytest.mark.parametrize("place", [".", "cifar-10-batches-py"])
def test_cifar_is_torchvisions(alone, tmp_path, monkeypatch, place):
    """Channels first, in the order of the files, pixel for pixel as ToTensor gives them."""
    cifar(tmp_path, monkeypatch)
    splits = load(tmp_path / place, dataset="cifar10")
    assert (splits.shape, splits.classes, splits.edition) == ((3, 32, 32), 10, PUBLISHED)
    for train, split in ((True, splits.train), (False, splits.test)):
        theirs = torchvision_sets.CIFAR10(tmp_path, train=train, transform=transforms.ToTensor())
        assert len(split) == len(theirs)
        for (image, label), ours, is_label in zip(theirs, split.images, split.labels, strict=True):
            assert torch.equal(ours.view(3, 32, 32), image)
            assert is_label == label


class _Evil:
    def __reduce__(self):
        return os.system, ("touch was-run",)


def test_no_pickle_but_the_published_one_is_opened(alone, tmp_path, monkeypatch):
    """Nor would one of its checksum run anything."""
    cifar(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(DataError, match=rf"'{file}' is not the published one, by its MD5"):
        load(tmp_path, dataset="cifar10")
    made = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setitem(cifar_files.SUMS, "data_batch_3", made)
    with pytest.raises(DataError, match=r"is damaged: it names (posix|nt)\.system, no array"):
        load(tmp_path, dataset="cifar10")
    assert not (tmp_path / "was-run").exists()
    file.unlink()
    with pytest.raises(DataError, match=rf"'{file}' is missing"):
        load(tmp_path, dataset="cifar10")


def test_an_archive_of_cifar_is_to_be_unpacked(alone, tmp_path):
    """Nothing is downloaded beside it."""
    (tmp_path / cifar_files.ARCHIVE).write_bytes(b"")
    with pytest.raises(DataError, match=r"cifar10 in .* is packed: unpack '.*tar.gz'"):
        load(tmp_path, dataset="cifar10")


@pytest.mark.parametrize("place", ["EMNIST/raw", "EMNIST", "raw", "."])
def test_emnist_stands_upright(alone, tmp_path, place):
    """The balanced split alone, each image turned from how its file has it, of 47 classes."""
    for name, content in (emnist("letters") | emnist()).items():
        lay(tmp_path, name, content, place=place)
    splits = load(tmp_path, dataset="emnist")
    assert (splits.shape, splits.classes, len(splits.train)) == ((1, 28, 28), 47, 94)
    (tmp_path / "EMNIST" / "raw").mkdir(parents=True, exist_ok=True)
    for name, content in emnist().items():
        (tmp_path / "EMNIST" / "raw" / name).write_bytes(content)
    theirs = torchvision_sets.EMNIST(tmp_path, split="balanced", train=False)
    assert torch.equal(splits.test.images.view(-1, 28, 28), theirs.data.mT / 255)
    assert torch.equal(splits.test.labels, theirs.targets)


def test_another_split_of_emnist_is_not_taken(alone, tmp_path, monkeypatch):
    """It is in nobody's way."""
    for name, content in emnist("letters").items():
        lay(tmp_path, name, content, place="EMNIST/raw")

    def downloaded(*_):
        raise DataError("downloading")

    monkeypatch.setattr(datasets, "_download", downloaded)
    with pytest.raises(DataError, match="downloading"):
        load(tmp_path, dataset="emnist")


@contextlib.contextmanager
def served(folder):
    """A local server of the files in ``folder``, and its address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with QuietServer(handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_emnist_is_downloaded_without_its_other_splits(tmp_path, monkeypatch):
    """They would take gigabytes; the second time it is there."""
    (tmp_path / "served").mkdir()
    packed = tmp_path / "served" / "gzip.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in (emnist("letters") | emnist()).items():
            archive.writestr(f"gzip/{name}.gz", gzip.compress(content))
    md5 = hashlib.md5(packed.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(torchvision_sets.EMNIST, "md5", md5)
    with served(packed.parent) as address:
        monkeypatch.setattr(torchvision_sets.EMNIST, "url", f"{address}/gzip.zip")
        splits = load(tmp_path / "data", dataset="emnist")
    raw = tmp_path / "data" / "EMNIST" / "raw"
    assert {file.name: file.read_bytes() for file in raw.iterdir()} == emnist()
    assert load(tmp_path / "data", dataset="emnist").digest == splits.digest


def test_cifar_is_downloaded_once(tmp_path, monkeypatch, capsys):
    """Into the folder that torchvision gives it, and then read without torchvision."""
    held = cifar(tmp_path / "made", monkeypatch)
    (tmp_path / "served").mkdir()
    packed = tmp_path / "served" / cifar_files.ARCHIVE
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(tmp_path / "made" / cifar_files.FOLDER, cifar_files.FOLDER)
    md5 = hashlib.md5(packed.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(torchvision_sets.CIFAR10, "tgz_md5", md5)
    with served(packed.parent) as address:
        monkeypatch.setattr(torchvision_sets.CIFAR10, "url", f"{address}/{packed.name}")
        splits = load(tmp_path / "data", dataset="cifar10")
    assert np.array_equal(splits.test.images.numpy() * 255, held[-1][0])
    monkeypatch.setattr(datasets, "_download", lambda *_: pytest.fail("it is there"))
    assert load(tmp_path / "data", dataset="cifar10").digest == splits.digest
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("before", [(), ("MNIST/raw",), ("MNIST/raw/.DS_Store", "note.txt")])
def test_a_missing_data_set_is_downloaded_once(server, tmp_path, capsys, before):
    """By torchvision, whole files only, without a word on the terminal; what is there stays."""
    for name in before:
        path = tmp_path / "new" / name
        path.mkdir(parents=True) if name.endswith("raw") else lay(
            path.parent, path.name, b"", place="."
        )
    splits = load(tmp_path / "new")
    assert (len(splits.train), len(splits.test)) == (200, 50)
    raw = tmp_path / "new" / "MNIST" / "raw"
    assert {p.name: p.read_bytes() for p in raw.glob("*-ubyte")} == small_mnist()
    assert not list((tmp_path / "new").glob(".download-*"))
    for packed in server.iterdir():
        packed.unlink()
    assert load(tmp_path / "new").digest == splits.digest
    assert capsys.readouterr() == ("", "")
    assert all((tmp_path / "new" / name).exists() for name in before)


def test_a_download_arrives_by_one_step(tmp_path):
    """Whoever is killed leaves all files or none, also where an empty folder awaited them."""
    raw = write_raw(tmp_path / "arrived", small_mnist())
    inode = raw.stat().st_ino
    for target in (tmp_path / "absent" / "raw", tmp_path / "empty" / "raw"):
        if target.parent.name == "empty":
            target.mkdir(parents=True)
        datasets._move_in(raw, target)
        raw = target
        assert raw.stat().st_ino == inode  # it is the folder itself
        assert len(list(raw.iterdir())) == 4


def test_nothing_is_downloaded_beside_files_of_the_users_own(server, tmp_path):
    """Not even where there is only one, in an archive that is not read."""
    path = lay(tmp_path / "mine", "train-images-idx3-ubyte.7z", b"7z")
    with pytest.raises(DataError, match=r"lacks .*not taken: .*\.7z' \(unpack it\)"):
        load(tmp_path / "mine")
    assert [p for p in (tmp_path / "mine").rglob("*") if p.is_file()] == [path]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("archive.zip", "unpack it"),
        ("my-train-images-idx3-ubyte.gz", "call it train-images-idx3-ubyte"),
        ("MNIST/raw/mnist.tar.gz", "unpack it"),
        ("mnist.npz", "only IDX files are read"),
        ("raw/mnist_train.csv", "only IDX files are read"),
        ("mnist.pkl.gz", "only IDX files are read"),
        ("MNIST/train.csv", "only IDX files are read"),
        ("train-images.bin", "call it train-images-idx3-ubyte"),
        ("t10k-labels-ubyte", "call it t10k-labels-idx1-ubyte"),
    ],
)
def test_what_looks_like_the_set_and_is_not_taken_is_named(alone, tmp_path, name, reason):
    """With the reason, and nothing is downloaded beside it."""
    lay(tmp_path, name, b"", place=".")
    lay(tmp_path, "notes.zip", b"", place=".")
    message = f"mnist in '{tmp_path}' is in no form that is read: '{tmp_path / name}' ({reason});"
    with pytest.raises(DataError, match=re.escape(message)):
        load(tmp_path)


@pytest.mark.parametrize(
    "file", ["MNIST/processed/training.pt", "mnist_png/0/1.png", "MNIST/MNIST/raw/train-images"]
)
def test_a_folder_of_the_set_that_is_not_read_is_named(alone, tmp_path, file):
    """As another program has it; nothing is downloaded beside it."""
    lay(tmp_path, file, b"", place=".")
    folder = "/".join(file.split("/")[: 2 if file.startswith("MNIST/") else 1])
    with pytest.raises(DataError, match=re.escape(f"'{tmp_path / folder}' (only IDX files are")):
        load(tmp_path)


@pytest.mark.parametrize("deeper", ["MNIST/MNIST", "mnist_files"])
def test_a_set_one_folder_too_deep_is_told_where_it_is(alone, folder, tmp_path, deeper):
    """And there it is used."""
    (tmp_path / "data" / deeper).mkdir(parents=True)
    (folder / "MNIST" / "raw").rename(tmp_path / "data" / deeper / "raw")
    with pytest.raises(DataError, match=re.escape(f"{deeper}' (point data_dir to it)")):
        load(tmp_path / "data")
    load(tmp_path / "data" / deeper)


@pytest.mark.parametrize("note", ["train-images-idx3-ubyte.gz.md5", "train-images-idx3-ubyte.txt"])
def test_a_note_beside_the_files_is_none_of_them(alone, folder, note):
    """It is not in the way, nor in that of a download."""
    expected = load(folder).digest
    lay(folder, note, b"", place="MNIST/raw")
    assert load(folder).digest == expected
    found = idx.find(lay(folder / "new", note, b"", place="raw").parents[1], "MNIST")
    assert found.is_empty


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("mnist", "fashion-mnist.zip"),
        ("mnist", "FashionMNIST.tar.gz"),
        ("mnist", "emnist-letters-train-images-idx3-ubyte.gz"),
        ("mnist", "kmnist.npz"),
        ("mnist", "notes.zip"),
        ("fashion-mnist", "mnist.npz"),
        ("kmnist", "fashion_mnist.csv"),
    ],
)
def test_another_set_in_the_folder_is_in_nobodys_way(tmp_path, monkeypatch, dataset, name):
    """A folder may hold several, and folders of other things; however it is written."""
    lay(tmp_path, name, b"", place=".")
    (tmp_path / "notes").mkdir()
    monkeypatch.chdir(tmp_path)

    def downloaded(*_):
        raise DataError("downloading")

    monkeypatch.setattr(datasets, "_download", downloaded)
    for folder in (tmp_path, "."):
        with pytest.raises(DataError, match="downloading"):
            load(folder, dataset=dataset)


def test_a_download_with_the_wrong_checksum_is_refused(server, tmp_path):
    """Nothing of it stays."""
    wrong = server / "t10k-labels-idx1-ubyte.gz"
    wrong.write_bytes(wrong.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"cannot be downloaded .*corrupted"):
        load(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist", "kmnist"])
def test_without_data_and_network_one_error_says_all(tmp_path, monkeypatch, dataset):
    """Folder, cause, the variable, and the data set that is always there."""
    cls = getattr(torchvision_sets, datasets.TORCHVISION[dataset])
    monkeypatch.setattr(cls, "mirrors", ["http://127.0.0.1:1/"])
    with pytest.raises(DataError) as error:
        load(tmp_path / "nothing" / "below", dataset=dataset)
    message = str(error.value)
    for part in (
        dataset,
        f"'{tmp_path / 'nothing' / 'below'}', which is not there,",
        "refused",
        "INITFLOW_DATA_DIR",
        "dataset=digits",
    ):
        assert part in message
    assert "\n" not in message
    assert not (tmp_path / "nothing").exists()


def test_a_failed_download_leaves_an_existing_folder_in_place(tmp_path, monkeypatch):
    """Whatever else lies in it."""
    monkeypatch.setattr(torchvision_sets.MNIST, "mirrors", ["http://127.0.0.1:1/"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep")
    with pytest.raises(DataError, match="cannot be downloaded"):
        load(tmp_path / "mine")
    assert (tmp_path / "mine" / "note.txt").read_text() == "keep"


def test_images_that_cannot_be_split_or_normalized(tmp_path):
    """One image of a class, and nothing but white: our errors."""
    files = small_mnist()
    labels = np.arange(200) % 9
    labels[0] = 9
    write_raw(tmp_path / "few", files | {"train-labels-idx1-ubyte": idx_file(labels)})
    with pytest.raises(SettingError, match=r"validation must be 0 for these .* not '50'"):
        load(tmp_path / "few", validation=50)
    white = _idx(200, 28, 28, value=255)
    write_raw(tmp_path / "white", files | {"train-images-idx3-ubyte": white})
    with pytest.raises(DataError, match=r"normalize=standard: all training pixels in .* are equal"):
        load(tmp_path / "white", normalize="standard")


def test_a_folder_that_cannot_be_made(tmp_path):
    """A file stands where the folder should be."""
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"mnist is not in .*file/data', which .* cannot be downloaded"
    ):
        load(tmp_path / "file" / "data")


OF_COMMANDS = {
    "train": (TrainConfig, {}),
    "compare": (CompareConfig, {"inits": "he", "activations": "relu", "seeds": 2}),
    "tune": (TuneConfig, {"inits": "he", "trials": 1, "seeds": 1}),
    "diagnose": (DiagnoseConfig, {"inits": "he", "depth": 2, "width": 9}),
}


@pytest.mark.parametrize("command", OF_COMMANDS)
def test_every_run_tells_what_its_images_are(store, alone, tmp_path, command, capsys):
    """By tags; of the user's own, description, report and last lines say so, with its digest.

    They are used in any size, here 6 x 6 pixels.
    """
    settings, own = OF_COMMANDS[command]
    folder = tmp_path / "own"
    write_raw(folder, small_mnist(side=6))
    network = {} if command == "diagnose" else {"hidden": "9", "epochs": 1, "log_model": False}
    config = settings(dataset="mnist", data_dir=folder, threads=1, probe=9, **network, **own)
    assert process.main(shlex.split(config.command(command))[1:]) == 0
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    digest = load(folder).digest
    assert len(runs) >= {"train": 1, "compare": 3, "tune": 3, "diagnose": 2}[command]
    for one in runs:
        assert one.data.tags["initflow.data"] == "own"
        assert one.data.tags["initflow.data_sha256"] == digest
    if command in ("train", "diagnose"):
        shape = {"train": "36-9-10", "diagnose": "36-9x2-10"}[command]
        assert all(shape in one.data.tags["mlflow.note.content"] for one in runs)
    logged = [one for one in runs if one.inputs.dataset_inputs]
    assert logged
    said = f"The data is the user's own, not the published mnist: its SHA-256 is {digest}."
    for one in logged:
        assert one.data.tags["mlflow.note.content"].count(said) == 1
    if command in ("compare", "tune"):
        parent = min(logged, key=lambda one: one.info.start_time).info.run_id
        report = mlflow.artifacts.load_text(f"runs:/{parent}/report.html")
        assert said in html.unescape(report)
    assert capsys.readouterr().out.splitlines().count(said) == 1

"""Data sets: layout, splits, normalization, what is kept, what is refused."""

import errno
import functools
import hashlib
import http.server
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torchvision import datasets, transforms

from initflow import data
from initflow.config import TrainConfig
from initflow.errors import DataError, SettingError
from tests.conftest import ROOT, idx, small_mnist, write_raw
from tests.serving import QuietServer

pytestmark = pytest.mark.usefixtures("cache")


def load(folder=None, **settings):
    return data.load(TrainConfig(data_dir=folder, **({"dataset": "mnist"} | settings)))


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
    theirs = datasets.MNIST(mnist, train=False, transform=transforms.ToTensor())
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
    assert data.data_dir(None) == cache / "initflow" / "data"
    monkeypatch.setenv("INITFLOW_DATA_DIR", str(folder))
    assert data.data_dir(None) == folder
    assert data.data_dir(folder / "other") == folder / "other"
    assert len(load().train) == 200


KEPT = "MNIST/initflow-parsed.safetensors"


def test_what_was_parsed_is_kept_and_read_without_torchvision(folder):
    """The second load imports neither torchvision nor its parser, and gives the same."""
    first = load(folder)
    assert (folder / KEPT).is_file()
    program = (
        "import sys; from initflow import data; from initflow.config import TrainConfig;"
        f"s = data.load(TrainConfig(data_dir={str(folder)!r}));"
        "assert 'torchvision' not in sys.modules; print(s.digest)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == first.digest


def _cut(content):
    return content[: len(content) // 2]


def _flip(content):
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


@pytest.mark.parametrize("harm", [_cut, _flip, lambda _: b"", lambda _: b"\xff" * 100])
def test_a_damaged_kept_file_is_made_anew(folder, harm):
    """Half of it, one bit of a pixel, nothing, or nonsense: never taken for the data."""
    expected = load(folder)
    kept = folder / KEPT
    kept.write_bytes(harm(kept.read_bytes()))
    assert data._read_parsed(kept, {}) is None
    assert load(folder).digest == expected.digest
    assert len(data._read_parsed(kept, {})) == 4


def test_a_changed_source_is_parsed_anew(folder):
    """What is kept goes with the digest of the files it came from."""
    before = load(folder)
    changed = small_mnist(train=100)
    for name, content in changed.items():
        (folder / "MNIST" / "raw" / name).write_bytes(content)
    after = load(folder)
    assert len(after.train) == 100
    assert after.digest != before.digest


def test_a_read_only_folder_is_left_alone_and_the_users_cache_serves(folder, cache):
    """Also for root, whom permissions do not stop."""
    (folder / "MNIST").chmod(0o555)
    try:
        first = load(folder)
        assert not (folder / KEPT).exists()
        kept = list((cache / "initflow" / "parsed").glob("*.safetensors"))
        assert len(kept) == 1
        stamp = kept[0].stat().st_mtime_ns
        assert load(folder).digest == first.digest
        assert kept[0].stat().st_mtime_ns == stamp
    finally:
        (folder / "MNIST").chmod(0o755)


def test_nothing_half_written_is_left(folder):
    """Beside the data lies what was kept, and nothing temporary."""
    load(folder)
    assert sorted(path.name for path in (folder / "MNIST").iterdir()) == [
        "initflow-parsed.safetensors",
        "raw",
    ]


def _idx(*shape, value=1):
    return idx(np.full(shape, value))


# What is done to which file, and what the error says of it.
NOT_IDX = "truncated, or not an IDX file of the kind its name says"
DAMAGED = {
    "truncated images": ("train-images-idx3-ubyte", lambda c: c[:-1], NOT_IDX),
    "truncated labels": ("train-labels-idx1-ubyte", lambda c: c[:-10], NOT_IDX),
    "empty": ("t10k-images-idx3-ubyte", lambda _: b"", NOT_IDX),
    "no image": ("t10k-images-idx3-ubyte", lambda _: _idx(0, 28, 28), NOT_IDX),
    "lying header": (
        "train-images-idx3-ubyte",
        lambda c: c[:4] + b"\x7f\xff\xff\xff" + c[8:],
        NOT_IDX,
    ),
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


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(folder, name):
    """With what is wrong with it, and never another data set in its place."""
    file, harm, message = DAMAGED[name]
    path = folder / "MNIST" / "raw" / file
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(DataError) as error:
        load(folder)
    assert f"data file '{path}' is damaged: " in str(error.value)
    assert message in str(error.value)
    assert not (folder / KEPT).exists()


def test_a_file_that_cannot_be_read_is_named(folder, monkeypatch):
    """With the system's reason."""

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(data.hashlib, "file_digest", fail)
    path = folder / "MNIST" / "raw" / "train-images-idx3-ubyte"
    message = f"data file '{path}' cannot be read: Input/output error"
    with pytest.raises(DataError, match=re.escape(message)):
        load(folder)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local server of a small MNIST, which torchvision takes for its mirror."""
    files = small_mnist()
    raw = write_raw(tmp_path / "served", files, packed=True)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(raw))
    with QuietServer(handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{httpd.server_port}/"])
        resources = [
            (path.name, hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest())
            for path in sorted(raw.iterdir())
        ]
        monkeypatch.setattr(datasets.MNIST, "resources", resources)
        yield raw
        httpd.shutdown()
        thread.join()


def test_a_missing_data_set_is_downloaded_once(server, tmp_path, capsys):
    """By torchvision, whole files only, and without a word on the terminal."""
    splits = load(tmp_path / "new")
    assert (len(splits.train), len(splits.test)) == (200, 50)
    raw = tmp_path / "new" / "MNIST" / "raw"
    assert {p.name: p.read_bytes() for p in raw.iterdir()} == small_mnist()
    assert not list((tmp_path / "new").glob(".download-*"))
    for packed in server.iterdir():
        packed.unlink()
    assert load(tmp_path / "new").digest == splits.digest
    assert capsys.readouterr() == ("", "")


def test_packed_files_are_unpacked_without_the_network(server, tmp_path, monkeypatch):
    """A folder with torchvision's .gz files only."""
    write_raw(tmp_path / "packed", small_mnist(), packed=True)
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:1/"])
    assert server.is_dir()
    assert len(load(tmp_path / "packed").train) == 200


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
    cls = getattr(datasets, data.TORCHVISION[dataset])
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
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:1/"])
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
    write_raw(tmp_path / "few", files | {"train-labels-idx1-ubyte": idx(labels)})
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

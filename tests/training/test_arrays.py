"""Data of one's own: a file of arrays, or a function that gives them."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from initflow.core.configurations import TrainConfig
from initflow.core.kinds import MAX_FEATURES
from initflow.errors import DataError, SettingError
from initflow.training import arrays, cache, datasets, model
from initflow.training.splits import FEATURES, OWN, PIXELS
from tests.conftest import small_mnist, write_raw


def given(classes=3, shape=(4,), train=30, test=9, dtype=np.float64):
    """A small set: every class in it, features of any type."""
    random = np.random.default_rng(0)

    def features(n):
        if dtype == np.uint8:
            return random.integers(0, 256, (n, *shape), dtype=np.uint8)
        return (random.normal(3.0, 2.0, (n, *shape)) * 2).astype(dtype)

    return {
        "x_train": features(train),
        "y_train": np.arange(train) % classes,
        "x_test": features(test),
        "y_test": np.arange(test) % classes,
    }


def saved(folder, found=None, name="own.npz", **changed):
    """The path of a file of arrays, some of them ``changed`` or, by None, left out."""
    found = {**(given() if found is None else found), **changed}
    np.savez(folder / name, **{key: value for key, value in found.items() if value is not None})
    return str(folder / name)


def load(dataset, **settings):
    return datasets.load(TrainConfig(dataset=dataset, **settings))


SHAPES = [(1,), (4,), (5, 3), (2, 3, 4), (1, 2, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.uint8, np.float64, np.float16, np.int32, np.bool_, ">f4"])
def test_arrays_of_any_shape_and_type_are_taken(tmp_path, shape, dtype):
    """As they are, flat in the order of their shape; bytes are pixels, from black to white."""
    found = given(classes=5, shape=shape, dtype=dtype)
    splits = load(saved(tmp_path, found))
    assert (splits.shape, splits.classes, splits.pixels) == (shape, 5, int(np.prod(shape)))
    assert (splits.name, splits.edition, splits.remark) == ("own.npz", OWN, "")
    assert splits.takes == (PIXELS if dtype == np.uint8 else FEATURES)
    assert splits.source == str(tmp_path / "own.npz")
    for split, part in ((splits.train, "train"), (splits.test, "test")):
        expected = found[f"x_{part}"].astype(np.float32)
        if dtype == np.uint8:
            expected = expected / np.float32(255)
        assert np.array_equal(split.images.view(-1, *shape).numpy(), expected)
        assert np.array_equal(split.labels.numpy(), found[f"y_{part}"])
        assert (split.images.dtype, split.labels.dtype) == (torch.float32, torch.int64)


def test_the_order_in_memory_does_not_matter(tmp_path):
    """Fortran's order is the same set."""
    found = given(shape=(2, 3))
    turned = {name: np.asfortranarray(array) for name, array in found.items()}
    assert load(saved(tmp_path, found)).digest == load(saved(tmp_path, turned)).digest


def test_a_file_of_mnist_is_mnist(tmp_path):
    """The same digest, and the same bits to train on, as from its four files."""
    write_raw(tmp_path, small_mnist())
    theirs = datasets.load(TrainConfig(data_dir=tmp_path, normalize="standard"))
    raw = datasets._idx("mnist", tmp_path).tensors
    found = {
        f"{of}_{part}": raw[f"{part}_{name}"].numpy()
        for part in ("train", "test")
        for of, name in (("x", "images"), ("y", "labels"))
    }
    ours = load(saved(tmp_path, found), normalize="standard")
    assert ours.digest == theirs.digest
    assert (ours.mean, ours.std) == (theirs.mean, theirs.std)
    assert torch.equal(ours.test.images, theirs.test.images)


def test_the_digest_is_of_all_that_a_set_is(tmp_path):
    """One number, one label, the shape of the features, or their type: another digest."""
    found = given(classes=3, dtype=np.float32)
    x, y = found["x_train"].copy(), found["y_train"].copy()
    x[7, 2] += 1
    y[[4, 5]] = y[[5, 4]]
    sets = [
        found,
        found | {"x_train": x},
        found | {"y_train": y},
        {**found, **{k: found[k].astype(np.uint8) for k in ("x_train", "x_test")}},
    ]
    digests = [load(saved(tmp_path, one)).digest for one in sets]
    assert len(set(digests)) == len(sets)
    assert load(saved(tmp_path, found | {"names": np.array(["a"])})).digest == digests[0]


def test_standard_normalization_is_by_feature(tmp_path):
    """Mean 0 and std 1 of each over the training set, by the plain formula; a constant one is 0."""
    found = given(shape=(2, 3), train=5_000)
    found["x_train"][:, 0, 1] = found["x_test"][:, 0, 1] = 0.1
    found["x_test"][0, 0, 1] = 0.6
    splits = load(saved(tmp_path, found), normalize="standard")
    x, test = (
        found[f"x_{part}"].astype(np.float32).astype(np.float64) for part in ("train", "test")
    )
    mean, std = x.mean(0).ravel(), x.std(0).ravel()
    std[1] = 1.0
    np.testing.assert_allclose(splits.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(splits.std, std, rtol=1e-12)
    for split, whole in ((splits.train, x), (splits.test, test)):
        expected = (whole.reshape(len(whole), -1) - mean) / std
        np.testing.assert_allclose(split.images.numpy(), expected, rtol=2e-5, atol=2e-6)
    assert not splits.train.images[:, 1].any()
    assert splits.test.images[0, 1] == pytest.approx(0.5)


@pytest.mark.parametrize("normalize", ["unit", "half"])
def test_features_are_else_taken_as_they_are(tmp_path, normalize):
    """Half takes off a half and divides by it, also what is not between 0 and 1."""
    found = given()
    x = torch.from_numpy(found["x_train"]).float()
    splits = load(saved(tmp_path, found), normalize=normalize)
    assert torch.equal(splits.train.images, x if normalize == "unit" else (x - 0.5) / 0.5)


@pytest.mark.parametrize("normalize", ["unit", "half", "standard"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_the_logged_module_takes_what_the_file_has(tmp_path, normalize, dtype):
    """Its logits are those of the network that was fed what was normalized, to the bit."""
    found = given(shape=(2, 2), dtype=dtype)
    splits = load(saved(tmp_path, found), normalize=normalize)
    state = {
        "fc1.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        "fc1.bias": torch.ones(3),
    }
    module = model.to_module(state, None, mean=splits.mean, std=splits.std)
    raw = torch.from_numpy(found["x_test"]).float().flatten(1)
    raw = raw / 255 if dtype == np.uint8 else raw
    expected = splits.test.images @ state["fc1.weight"].T + 1
    torch.testing.assert_close(module(raw), expected, rtol=1e-6, atol=1e-6)
    inner = dict(module.named_children()).get("normalize", lambda x: x)
    assert torch.equal(inner(raw), splits.test.images)
    assert list(module.state_dict()) == list(state)


@pytest.mark.parametrize(("classes", "validation"), [(2, 2), (2, 11), (7, 20), (300, 310)])
def test_any_number_of_classes_is_held_out_by_its_share(tmp_path, classes, validation):
    """None is lost, each class is in both parts."""
    found = given(classes=classes, train=3 * classes + 30)
    splits = load(saved(tmp_path, found), validation=validation)
    assert (len(splits.validation), splits.classes) == (validation, classes)
    counts = splits.validation.labels.bincount(minlength=classes)
    assert counts.min() >= 1
    assert counts.max() - counts.min() <= 2
    assert splits.train.labels.bincount(minlength=classes).min() >= 1


@pytest.mark.parametrize(
    ("validation", "said"),
    [
        (1, "validation must be 0 or from 3 to 27 of the 30 training images, not '1'"),
        (28, "validation must be 0 or from 3 to 27 of the 30 training images, not '28'"),
    ],
)
def test_more_or_less_validation_than_can_be(tmp_path, validation, said):
    """The bounds follow from the classes."""
    with pytest.raises(SettingError, match=said):
        load(saved(tmp_path), validation=validation)


def test_too_few_examples_to_hold_out_of(tmp_path):
    """It is said what it takes."""
    path = saved(tmp_path, given(classes=3, train=5))
    with pytest.raises(SettingError, match="classes takes 6 training images, and there are 5"):
        load(path, validation=3)


WRONG = {
    "one lacks": ({"y_test": None}, "lacks y_test; it has x_train, y_train, x_test"),
    "objects": (
        {"x_train": np.array([[object()] * 4] * 30)},
        "x_train holds Python objects, which are never unpickled: save numbers",
    ),
    "text": ({"y_train": np.array(["a"] * 30)}, "y_train must hold numbers, not text"),
    "complex": ({"x_test": np.ones((9, 4), complex)}, "x_test must hold numbers, not complex128"),
    "NaN": (
        {"x_train": np.where(np.arange(120).reshape(30, 4) == 42, np.nan, 1.0)},
        r"x_train must be finite in float32, which nan at \[10, 2\] is not, one of 1",
    ),
    "infinite": ({"x_test": np.full((9, 4), np.inf)}, r"x_test must be finite .* inf at \[0, 0\]"),
    "too large": ({"x_test": np.full((9, 4), 1e39)}, r"1e\+39 at \[0, 0\] is not, one of 36"),
    "empty": ({"x_test": np.ones((0, 4)), "y_test": np.ones(0, int)}, "x_test is empty"),
    "no features": ({"x_train": np.ones((30, 0))}, r"x_train is empty: its shape is \(30, 0\)"),
    "one number each": ({"x_train": np.ones(30)}, r"must have the shape \(examples, features\)"),
    "one class": (
        {"y_train": np.zeros(30, int), "y_test": np.zeros(9, int)},
        "y_train must have two classes at least, not class 0 alone",
    ),
    "regression": (
        {"y_train": np.linspace(0, 1, 30)},
        "y_train must hold classes as whole numbers .* 0 to k-1, not float64: only classification",
    ),
    "one-hot": (
        {"y_train": np.eye(3, dtype=int)[np.arange(30) % 3]},
        r"y_train must have the shape \(30,\), a label for each example of x_train, not \(30, 3\)",
    ),
    "lengths": ({"y_test": np.arange(8) % 3}, r"y_test must have the shape \(9,\)"),
    "other features": (
        {"x_test": np.ones((9, 5))},
        r"x_test must have examples of the shape \(4,\), as x_train has, not \(5,\)",
    ),
    "half of it pixels": (
        {"x_test": np.ones((9, 4), np.uint8)},
        "must both be uint8, which are pixels, or neither, not float64 and uint8",
    ),
    "a class of the test alone": (
        {"y_test": np.arange(9) % 4},
        "y_test has the class 3, and y_train only 0 to 2",
    ),
    "negative": ({"y_train": np.arange(30) % 3 - 1}, "y_train must hold classes .* not -1"),
    "from 1 on": (
        {"y_train": np.arange(30) % 3 + 1},
        "y_train must have every class from 0 to k-1, and of 0 to 3 it lacks 0: number them anew",
    ),
    "gaps": ({"y_train": np.arange(30) % 3 * 9}, "lacks 1, 2, 3, 4, 5, …: number"),
    "too many": (
        {"y_train": np.arange(30).astype(np.uint64) + 2**63},
        "y_train must have at most 10,000 classes, 0 to 9999, not the class 9223372036854775837",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_set_to_classify_is_one_line(tmp_path, kind):
    """It names the data, the array, what is wrong and what would be right."""
    changed, said = WRONG[kind]
    path = saved(tmp_path, **changed)
    with pytest.raises(DataError, match=rf"^dataset '{path}'.*{said}") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_examples_of_too_many_features(tmp_path):
    """As many as a recorded network may have."""
    wide = MAX_FEATURES + 1
    found = {"x_train": np.zeros((2, wide), np.uint8), "x_test": np.zeros((1, wide), np.uint8)}
    path = saved(tmp_path, found, y_train=np.array([0, 1]), y_test=np.array([0]))
    with pytest.raises(DataError, match=r"must have at most 1,048,576 features .* not 1,048,577"):
        load(path)


def _single(path):
    with path.open("wb") as file:
        np.save(file, np.ones(3))


def _cut(path):
    buffer = io.BytesIO()
    np.savez(buffer, **given())
    path.write_bytes(buffer.getvalue()[:-200])


def _bent(path):
    buffer = io.BytesIO()
    np.savez(buffer, **given())
    content = bytearray(buffer.getvalue())
    content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))


FILES = {
    "none": (Path.exists, "there is no such file"),
    "a folder": (Path.mkdir, "there is no such file"),
    "nothing": (lambda path: path.write_bytes(b""), "is no file that numpy.savez wrote"),
    "text": (lambda path: path.write_text("1,2,3"), "is no file that numpy.savez wrote"),
    "a pickle": (lambda path: path.write_bytes(b"\x80\x04N."), "is no file that numpy.savez wrote"),
    "one array": (_single, "is no file that numpy.savez wrote: it holds a single array"),
    "cut off": (_cut, "is no file that numpy.savez wrote"),
    "a bit off": (_bent, "is damaged"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_none(tmp_path, kind):
    """It is told in one line."""
    make, said = FILES[kind]
    make(tmp_path / "x.npz")
    with pytest.raises(DataError, match=rf"^dataset '{tmp_path}/x.npz'.*{said}"):
        load(str(tmp_path / "x.npz"))


def test_a_relative_path_is_the_users(tmp_path, monkeypatch):
    """Of the working folder, with ~ for the home."""
    saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("own.npz").digest == load("~/own.npz").digest


FUNCTION = """
import random
import numpy as np
import torch

def load():
    x = np.random.normal(size=(30, 4)) + random.random() + torch.rand(()).item()
    y = torch.arange(30) % 3
    test = torch.from_numpy(x[:9]).bfloat16()
    return {"x_train": x, "y_train": y, "x_test": test, "y_test": y[:9]}

def in_order():
    return list(load().values())

def short():
    return [1, 2, 3]

def ragged():
    return load() | {"x_train": [[1], [1, 2]]}

def none():
    pass

def failing():
    raise RuntimeError("no database")

number = 3
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "own.py").write_text(FUNCTION)
    return str(tmp_path / "own.py")


def test_a_function_gives_arrays(code):
    """By name or in order; what it draws is the same each time, and nobody else's draws change."""
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    first, again = load(f"{code}:load"), load(f"{code}:in_order", seed=7)
    assert first.digest == again.digest
    assert (first.shape, first.classes, first.name) == ((4,), 3, "own.py:load")
    assert first.source.startswith(f"{code} sha256:")
    now = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    assert torch.equal(states[0], now[0])
    assert np.array_equal(states[1], now[1])
    assert states[2] == now[2]


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("short", DataError, "must give the arrays x_train, y_train, .* not list of 3"),
        ("none", DataError, "must give the arrays .* not NoneType"),
        ("ragged", DataError, "x_train is no array: "),
        ("failing", SettingError, "failed: RuntimeError: no database"),
        ("absent", SettingError, "has no attribute 'absent'"),
        ("number", SettingError, "must name a function, not int"),
    ],
)
def test_a_function_that_gives_none(code, name, error, said):
    """It is told in one line, which names it."""
    with pytest.raises(error, match=rf"^dataset '{code}:{name}'.*{said}"):
        load(f"{code}:{name}")


def test_a_function_that_is_not_there():
    """No such file, no such module."""
    with pytest.raises(SettingError, match=r"^dataset 'a/b.py:load': there is no file 'a/b.py'"):
        load("a/b.py:load")
    with pytest.raises(SettingError, match=r"^dataset 'no_such.module:load': ModuleNotFoundError"):
        load("no_such.module:load")


def mine():
    return given()


def test_a_function_may_be_given_itself():
    """As in a notebook; a lambda has no place."""
    config = TrainConfig(dataset=mine)
    assert config.dataset == f"{__name__}:mine"
    assert datasets.load(config).classes == 3
    with pytest.raises(SettingError, match=r"^dataset must be one of mnist, .*FILE.py:FUNCTION"):
        TrainConfig(dataset=lambda: 0)


@pytest.mark.parametrize("text", ["mnits", "x.npy", "x.csv", "load", "a.py", "", "a.py:f:g", 3])
def test_what_names_no_data_set(text):
    """The line has all names, and the close one."""
    with pytest.raises(SettingError, match=r"^dataset must be .*FILE.npz") as caught:
        TrainConfig(dataset=text)
    assert ("did you mean 'mnist'" in str(caught.value)) == (text == "mnits")


@pytest.mark.parametrize(
    ("dataset", "title"),
    [
        ("mnist", "mnist"),
        ("/some/where/iris.npz", "iris.npz"),
        ("some/where/own.py:load", "own.py:load"),
        ("package.module:load", "package.module:load"),
        ("x" * 300 + ".npz", "x" * 96 + ".npz"),
    ],
)
def test_titles_are_short(dataset, title):
    """The last part of a path."""
    assert datasets.title(dataset) == title


def test_the_title_of_a_network(tmp_path):
    """Published sets are not loaded for them, data of one's own is."""
    assert cache.title(TrainConfig(dataset="cifar10", hidden="7")) == "3072-7-10"
    assert cache.title(TrainConfig(dataset="emnist", hidden="7")) == "784-7-47"
    path = saved(tmp_path, given(classes=5, shape=(2, 3)))
    with cache.cleared_after():
        assert cache.title(TrainConfig(dataset=path, hidden="7")) == "6-7-5"


def test_labels_of_more_classes_than_a_byte_has(tmp_path):
    """They are told apart."""
    found = given(classes=1_000, train=1_000, test=1_000)
    splits = load(saved(tmp_path, found))
    assert splits.classes == 1_000
    assert torch.equal(splits.test.labels, torch.arange(1_000))


def test_nothing_of_the_users_is_changed(tmp_path):
    """What a function gave is its own also where it is float32, and standardized."""
    found = {k: v.astype(np.float32) if k[0] == "x" else v for k, v in given().items()}
    before = {name: array.copy() for name, array in found.items()}
    globals()["_kept"] = found
    load(f"{__name__}:kept", normalize="standard")
    assert all(np.array_equal(found[name], before[name]) for name in arrays.NAMES)


def kept():
    return globals()["_kept"]

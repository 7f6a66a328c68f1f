"""Published tables: the files, how they are read, and what a published number is held against."""

import math
import re
from importlib.resources import files

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.nn import functional

from initflow.core.configurations import ReproduceConfig, TrainConfig
from initflow.errors import SettingError
from initflow.models import published_models
from initflow.reporting import published
from initflow.reporting.published import (
    Check,
    PublishedRow,
    PublishedTable,
    checks,
    explained,
    sentence,
)
from initflow.reporting.seed_statistics import Outcome
from tests.test_reference_experiments import ASSIGNMENT, ASSIGNMENT_RANGES, TUTORIAL

MINE = """
title = "Handwritten digits"
source = "A notebook."
notes = ["It says <nothing> & no more."]

[settings]
dataset = "digits"
hidden = [30, 20]
epochs = 2
nesterov = false

[[rows]]
name = "first"
init = "he:mode=fan_out"
activation = "relu"
published = { 15 = 87.9, 30 = 97.39 }

[[rows]]
name = "second"
init = "he"
activation = "tanh"
"""


def curve_of(accuracies, first=0, every=500):
    """(iteration, accuracy) pairs, as a training leaves them."""
    return [(first + every * i, accuracy) for i, accuracy in enumerate(accuracies)]


def row(**by_iteration):
    """A row that publishes fractions: ``at500=0.9``."""
    pairs = [(int(at.removeprefix("at")), value) for at, value in by_iteration.items()]
    return PublishedRow("a row", "he", "relu", pairs)


def outcomes(ends, at=500):
    return [Outcome(seed, [(0, 0.1), (at, end)]) for seed, end in enumerate(ends)]


# The files


def test_the_published_tables_come_with_the_package():
    """Each is read from its file, and says where it is from."""
    assert published.names() == ["assignment", "normalized-cnn", "tutorial"]
    for name in published.names():
        assert files("initflow.reporting").joinpath("tables", f"{name}.toml").is_file()
        table = published.load(name)
        assert table.name == name
        assert "published" in table.source.lower()
        assert table.title
        assert all(isinstance(note, str) and note for note in table.notes)


def test_the_tutorials_numbers_are_those_of_the_reference():
    """Row by row, all six of each curve, in its order."""
    table = published.load("tutorial")
    names = ["normal: tanh", "lecun: tanh", "xavier: tanh", "xavier: relu", "he: relu"]
    assert [found.name for found in table.rows] == names
    assert [(found.init, found.activation) for found in table.rows] == list(TUTORIAL)
    for found, expected in zip(table.rows, TUTORIAL.values(), strict=True):
        iterations, accuracies = zip(*found.published, strict=True)
        assert iterations == (500, 1000, 1500, 2000, 2500, 3000)
        assert [100 * accuracy for accuracy in accuracies] == pytest.approx(expected)
    assert any("a third of LeCun's variance" in note for note in table.notes)
    assert any("2/(n_in + n_out)" in note for note in table.notes)


def test_the_tutorials_networks_are_those_of_the_reference():
    """Every setting of it, told here once more."""
    table, config = published.load("tutorial"), ReproduceConfig(probe=7, threads=2)
    for found in table.rows:
        assert table.network(found, 3, config) == TrainConfig(
            init=found.init,
            activation=found.activation,
            dataset="mnist",
            hidden=(100,),
            normalize="unit",
            bias_init="pytorch",
            batch_size=100,
            epochs=5,
            lr=0.1,
            gamma=0.96,
            momentum=0.9,
            nesterov=True,
            validation=0,
            eval_every=500,
            probe=7,
            threads=2,
            seed=3,
        )


def test_the_assignments_networks_are_those_of_the_reference():
    """Its text and not its code: zeros and a small Gaussian for real, a test every epoch."""
    table, config = published.load("assignment"), ReproduceConfig(probe=0, log_model=False)
    assert [found.name for found in table.rows] == ["zero", "random", "xavier", "he"]
    assert [found.init for found in table.rows] == list(ASSIGNMENT_RANGES)
    for found in table.rows:
        assert found.activation == "relu"
        assert found.published == []
        assert table.network(found, 0, config) == TrainConfig(
            init=found.init,
            activation="relu",
            dataset="mnist",
            nesterov=True,
            probe=0,
            log_model=False,
            **ASSIGNMENT,
        )
    assert "no accuracies" in table.source
    assert any("three faults" in note for note in table.notes)


def test_the_networks_of_the_convolutional_table_are_as_its_notebook_has_them():
    """Its settings, its numbers of right answers at the ends of ten epochs, and its model."""
    table, config = published.load("normalized-cnn"), ReproduceConfig(probe=0, log_model=False)
    assert [(row.name, row.init) for row in table.rows] == [
        ("xavier", "xavier"),
        ("kaiming", "he"),
        ("normal", "normal"),
    ]
    for row, right in zip(table.rows, (9902, 9870, 9211), strict=True):
        assert [at for at, _ in row.published] == list(range(938, 9_381, 938))
        assert row.published[-1] == (9_380, right / 10_000)
        assert row.model == "initflow.models.published_models:normalized_cnn"
        assert table.network(row, 1, config) == TrainConfig(
            init=row.init,
            model=row.model,
            dataset="mnist",
            normalize="standard",
            bias_init="pytorch",
            batch_size=64,
            epochs=10,
            lr=0.01,
            gamma=1.0,
            momentum=0.5,
            nesterov=False,
            eval_every=938,
            probe=0,
            log_model=False,
            seed=1,
        )
    assert "https://github.com/prateekkumarweb/CS5480-Assignments" in table.source


def test_the_model_of_the_convolutional_table_is_the_function_that_its_notebook_writes():
    """Pooled, normalized, rectified, in this order; scales from U(0, 1), as PyTorch had them."""
    torch.manual_seed(0)
    model = published_models.normalized_cnn((1, 28, 28), 10)
    parts = dict(model.named_children())
    images = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for is_training in (True, False):
        model.train(is_training)
        x = images
        for at in (1, 2):
            pooled = functional.max_pool2d(parts[f"conv{at}"](x), 2)
            x = functional.relu(parts[f"norm{at}"](pooled))
        x = functional.relu(parts["norm3"](parts["fc1"](x.view(-1, 320))))
        expected = parts["fc2"](x)
        assert expected.shape == (5, 10)
        assert torch.allclose(model(images), expected, atol=1e-5)
    for at in (1, 2, 3):
        scales = parts[f"norm{at}"].weight
        assert 0 <= scales.min() < 0.5 < scales.max() <= 1
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.dim() > 1}
    assert shapes == {
        "conv1.weight": (10, 1, 5, 5),
        "conv2.weight": (20, 10, 5, 5),
        "fc1.weight": (50, 320),
        "fc2.weight": (10, 50),
    }


MODELS = """
title = "Digits"
source = "A notebook."
notes = []

[settings]
dataset = "digits"
model = "cnn"
channels = "4,8"
kernel = 3

[[rows]]
name = "convolutions"
init = "he"
activation = "relu"

[[rows]]
name = "one layer"
model = "mlp"
init = "he"
activation = "relu"

[[rows]]
name = "recurrent"
model = "lstm"
init = "he"
"""


def test_rows_may_be_of_models(tmp_path):
    """One that names no other is of that of the settings; one with gates has no activation."""
    path = tmp_path / "models.toml"
    path.write_text(MODELS.replace('channels = "4,8"\nkernel = 3\n', ""))
    table, config = published.load(str(path)), ReproduceConfig()
    networks = [table.network(row, 0, config) for row in table.rows]
    assert [(one.model, one.kind) for one in networks] == [
        ("cnn", "relu"),
        ("mlp", "relu"),
        ("lstm", "lstm"),
    ]


@pytest.mark.parametrize(
    ("part", "by", "message"),
    [
        ('"lstm"', '"lstn"x', "line"),
        ('"lstm"', '"rnn"', "'activation' is missing"),
        ("kernel = 3", "kernel = 4", "kernel must be"),
        ('model = "mlp"\n', "", "no two of the same model, init and activation"),
        ("kernel = 3", "kernel = 3", "channels=4,8 is for model=cnn, not for 'mlp'"),
    ],
)
def test_a_damaged_table_of_models_is_told(tmp_path, part, by, message):
    """A setting that one of its models has not, too."""
    path = tmp_path / "models.toml"
    path.write_text(MODELS.replace(part, by))
    with pytest.raises(SettingError) as error:
        published.load(str(path))
    assert message in str(error.value)
    assert f"table '{path}'" in str(error.value)


def test_a_third_table_is_a_file(tmp_path, monkeypatch):
    """By its path, from a home folder too; a row may publish nothing, a setting be a value."""
    (tmp_path / "mine.toml").write_text(MINE)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (str(tmp_path / "mine.toml"), "~/mine.toml"):
        table = published.load(path)
        assert table == PublishedTable(
            "mine",
            "Handwritten digits",
            "A notebook.",
            ["It says <nothing> & no more."],
            {"dataset": "digits", "hidden": [30, 20], "epochs": 2, "nesterov": False},
            [
                PublishedRow("first", "he:mode=fan_out", "relu", [(15, 0.879), (30, 0.9739)]),
                PublishedRow("second", "he", "tanh", []),
            ],
        )
    network = table.network(table.rows[1], 5, ReproduceConfig(data_dir="d"))
    assert network == TrainConfig(
        init="he",
        activation="tanh",
        dataset="digits",
        data_dir="d",
        hidden="30,20",
        epochs=2,
        nesterov=False,
        seed=5,
    )


def test_published_numbers_are_put_in_order(tmp_path):
    """The last one is that of the last iteration, wherever it stands in the file."""
    path = tmp_path / "mine.toml"
    path.write_text(MINE.replace("15 = 87.9, 30 = 97.39", "30 = 97.39, 4 = 50, 15 = 87.9"))
    found = published.load(str(path)).rows[0]
    assert [iteration for iteration, _ in found.published] == [4, 15, 30]


def test_a_published_number_is_the_fraction_of_the_images():
    """As ours are, to the last bit, or an equal number would lie outside of no spread."""
    for right in range(10_001):
        assert published._fraction(float(f"{right / 100:.2f}")) == right / 10_000


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "nonsense",
            "assignment, normalized-cnn, tutorial, a path that ends with .toml, not 'nonsense'",
        ),
        ("tutorail", "(did you mean 'tutorial'?)"),
        ("none/here.toml", "table 'none/here.toml' cannot be read: [Errno 2] No such file"),
        (".", "a path that ends with .toml, not '.'"),
        ("~no-such-user/mine.toml", "table '~no-such-user/mine.toml' cannot be read"),
    ],
)
def test_an_unknown_table_is_named_with_what_there_is(tmp_path, monkeypatch, table, message):
    """In one line."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError) as error:
        published.load(table)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


SECOND = '"second"\ninit = "he"\nactivation = "tanh"'
DAMAGED = [
    (MINE, "title = = 1", "at line 1"),
    ("title =", "titel =", "'title' is missing"),
    ("source =", "origin =", "'source' is missing"),
    ("notes =", "note =", "'notes' is missing"),
    ("[settings]", "[setting]", "'settings' is missing"),
    ("[[rows]]", "[[row]]", "'rows' is missing"),
    ('name = "second"', "", "'name' is missing"),
    ('init = "he"\n', "", "'init' is missing"),
    ('activation = "tanh"', "", "'activation' is missing"),
    ("epochs = 2", "epoch = 2", "'epoch'"),
    ("epochs = 2", "seed = 2", "'seed'"),
    ("epochs = 2", 'data_dir = "d"', "'data_dir'"),
    ("epochs = 2", 'device = "cpu"', "'device'"),
    ("epochs = 2", "probe = 2", "'probe'"),
    ("epochs = 2", 'init = "he"', "'init'"),
    ("epochs = 2", 'lr = "abc"', "lr must be a number above 0 and at most 1e30, not 'abc'"),
    ("epochs = 2", "epochs = 0", "epochs must be a whole number, at least 1 and"),
    ("epochs = 2", "epochs = nan", "epochs must be a whole number, at least 1 and"),
    ("epochs = 2", "hidden.a = 1", "Cannot mutate"),
    ("[30, 20]", "[30, [20]]", "hidden must be widths such as"),
    ('"digits"', '"digit"', "(did you mean 'digits'?)"),
    ('activation = "tanh"', 'activation = "tahn"', "not 'tahn' (did you mean 'tanh'?)"),
    ('init = "he"\n', 'init = " "\n', "init must be a name, not ' '"),
    (
        SECOND,
        '"b"\ninit = "he:mode=fan_out"\nactivation = "relu"',
        "same model, init and activation",
    ),
    ('name = "second"', 'name = "first"', "'first'"),
    ("97.39", "100.1", "from 0 to 100 percent, not 100.1"),
    ("97.39", "-1", "from 0 to 100 percent, not -1"),
    ("97.39", "nan", "from 0 to 100 percent, not nan"),
    ("97.39", "true", "from 0 to 100 percent, not True"),
    ("97.39", '"97"', "from 0 to 100 percent, not '97'"),
    ("30 =", "last =", "'last'"),
    ("{ 15 = 87.9, 30 = 97.39 }", "[87.9, 97.39]", "published"),
    ('["It says <nothing> & no more."]', '"one note"', "notes"),
]


@pytest.mark.parametrize(("part", "by", "message"), DAMAGED, ids=lambda text: str(text)[:40])
def test_a_damaged_table_is_told_with_its_file_and_value(tmp_path, part, by, message):
    """One line, whatever is wrong in it."""
    assert part in MINE
    path = tmp_path / "mine.toml"
    path.write_text(MINE.replace(part, by))
    with pytest.raises(SettingError) as error:
        published.load(str(path))
    assert message in str(error.value)
    assert f"table '{path}'" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rows", ["rows = []", "rows = 5", 'rows = "ab"', "rows = [5]"])
def test_a_table_without_rows_is_none(tmp_path, rows):
    """Nor one whose rows are something else."""
    head, _, _ = MINE.partition("[[rows]]")
    path = tmp_path / "mine.toml"
    path.write_text(f"{rows}\n{head}")
    with pytest.raises(SettingError, match=r"mine\.toml"):
        published.load(str(path))


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(max_examples=100)
def test_no_file_makes_reading_fail_otherwise(tmp_path_factory, content):
    """Bytes that are no text, and text that is no table."""
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content)
    with pytest.raises(SettingError):
        published.load(str(path))


# A published number beside ours


def test_a_check_is_worked_out_by_hand():
    """Of four seeds, with t of 3 degrees of freedom from any table: 3.18245."""
    (check,) = checks(row(at500=0.99), outcomes([0.96, 0.97, 0.97, 0.98]))
    s = math.sqrt(2 * 0.01**2 / 3)
    assert (check.iteration, check.published, check.n) == (500, 0.99, 4)
    assert check.mean == pytest.approx(0.97)
    assert check.low == pytest.approx(0.97 - 3.18245 * s / 2, abs=1e-7)
    assert check.high == pytest.approx(0.97 + 3.18245 * s / 2, abs=1e-7)
    assert check.seed_low == pytest.approx(0.97 - 3.18245 * s * math.sqrt(1.25), abs=1e-7)
    assert check.seed_high == pytest.approx(0.97 + 3.18245 * s * math.sqrt(1.25), abs=1e-7)
    assert check.explained is True  # though it lies outside of the interval of the mean
    assert check.published > check.high


accuracies = st.integers(0, 10_000).map(lambda right: right / 10_000)


@given(st.lists(accuracies, min_size=2, max_size=12).filter(lambda ends: len(set(ends)) > 1))
@settings(max_examples=50)
def test_the_intervals_are_scipys(ends):
    """That of the mean as scipy inverts its t-test, that of one more seed by Student's t."""
    (check,) = checks(row(at500=0.5), outcomes(ends))
    low, high = stats.ttest_1samp(ends, 0.5).confidence_interval(0.95)
    assert (check.low, check.high) == pytest.approx((low, high), rel=1e-9, abs=1e-12)
    n, scale = len(ends), math.sqrt(np.var(ends, ddof=1) * (1 + 1 / len(ends)))
    one = stats.t(n - 1, np.mean(ends), scale).interval(0.95)
    assert (check.seed_low, check.seed_high) == pytest.approx(one, rel=1e-9, abs=1e-12)
    assert check.explained == (one[0] <= 0.5 <= one[1])


@pytest.mark.parametrize("n", [2, 5])
def test_one_more_seed_is_explained_in_95_of_100(n):
    """Where accuracies are normally distributed; of twice the spread clearly fewer are."""
    drawn = np.random.default_rng(n).normal(0.9, 0.01, (3_000, n + 1)).tolist()
    found = [checks(row(at500=more), outcomes(ends))[0].explained for more, *ends in drawn]
    assert sum(found) / len(found) == pytest.approx(0.95, abs=0.012)
    wide = [
        checks(row(at500=0.9 + 2 * (more - 0.9)), outcomes(ends))[0].explained
        for more, *ends in drawn
    ]
    assert sum(wide) / len(wide) < 0.93


def test_one_seed_claims_nothing():
    """Its accuracy is the mean; there is no interval and no verdict."""
    (check,) = checks(row(at500=0.95), outcomes([0.96]))
    assert check == Check(500, 0.95, 1, 0.96, None, None, None, None)
    assert check.explained is None
    assert explained(check) == "one seed cannot say"


def test_what_we_did_not_measure_is_left_out():
    """Iterations between ours, or after the end."""
    published_row = row(at250=0.5, at500=0.9, at1000=0.95, at5000=0.99)
    seeds = [Outcome(seed, curve_of([0.1, 0.9, 0.95 + seed / 100])) for seed in range(3)]
    assert [check.iteration for check in checks(published_row, seeds)] == [500, 1000]
    assert checks(row(), seeds) == []


def test_seeds_that_diverged_are_left_out():
    """Of those that finished the numbers are; without any there are none."""
    lost = Outcome(9, curve_of([0.1, 0.2]), 700)
    (check,) = checks(row(at500=0.9), [lost, *outcomes([0.9, 0.92])])
    assert (check.n, check.mean) == (2, pytest.approx(0.91))
    (check,) = checks(row(at500=0.9), [lost, *outcomes([0.9])])
    assert (check.n, check.explained) == (1, None)
    assert checks(row(at500=0.9), [lost]) == []


def test_seeds_that_all_agree_explain_their_own_number_alone():
    """As a network that stays symmetric does, always at the share of one class."""
    same, other = checks(row(at500=1135 / 10_000, at501=0.1136), outcomes([0.1135] * 3)), None
    assert [check.explained for check in same] == [True]
    (other,) = checks(row(at500=0.1136), outcomes([0.1135] * 3))
    assert other.explained is False


# In words


def table_of(**found):
    rows = [row(at500=0.9) for _ in found]
    return PublishedTable("mine", "Mine", "a notebook", [], {}, rows)


def test_a_sentence_counts_what_is_explained():
    """At the end, and along the curves."""
    seeds = [Outcome(seed, curve_of([0.1, 0.9, 0.95 + seed / 100])) for seed in range(3)]
    found = {
        "all": checks(row(at0=0.1, at500=0.9, at1000=0.96), seeds),
        "end not": checks(row(at500=0.9, at1000=0.5), seeds),
        "nothing": [],
    }
    text = sentence(table_of(**found), found, 3)
    assert "2 published final accuracies" in text
    first, _, along = text.partition(";")
    assert numbers_in(first)[:2] == [2, 1]
    assert "3 seeds" in first
    assert numbers_in(along) == [5, 4]


def numbers_in(text):
    return [int(number) for number in re.findall(r"\b\d+\b", text)]


def test_a_sentence_says_when_nothing_can_be_said():
    """Nothing published, or one seed."""
    assert sentence(table_of(a=[]), {"a": []}, 5) == (
        "Mine publishes no accuracy to hold ours against."
    )
    one = {"a": checks(row(at500=0.9), outcomes([0.9]))}
    text = sentence(table_of(**one), one, 1)
    assert "one seed" in text.lower()
    assert "no interval" in text


def test_a_check_in_a_word():
    """Yes or no."""
    (inside,) = checks(row(at500=0.91), outcomes([0.9, 0.92]))
    (outside,) = checks(row(at500=0.1), outcomes([0.9, 0.92, 0.91]))
    assert [explained(inside), explained(outside)] == ["yes", "no"]

"""Settings: defaults, reading, writing and refusing."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from initflow.config import TrainConfig, format_widths, parse_widths
from initflow.errors import SettingError


def test_defaults_are_the_contracts():
    """The defaults users hold on to, as text."""
    assert TrainConfig().as_text() == {
        "init": "he",
        "plugins_dir": "none",
        "activation": "relu",
        "dataset": "mnist",
        "data_dir": "none",
        "hidden": "100",
        "epochs": "5",
        "batch_size": "100",
        "lr": "0.1",
        "gamma": "0.96",
        "momentum": "0.9",
        "nesterov": "true",
        "bias_init": "pytorch",
        "normalize": "unit",
        "validation": "0",
        "eval_every": "500",
        "probe": "1000",
        "seed": "0",
        "device": "auto",
        "threads": "auto",
        "log_model": "true",
    }


def test_text_and_values_mean_the_same():
    """What the command line gives as text is what Python gives as values."""
    by_text = TrainConfig(lr="1e-1", hidden="100x2", nesterov="False", threads="2", data_dir="d")
    by_value = TrainConfig(lr=0.1, hidden=(100, 100), nesterov=False, threads=2, data_dir=Path("d"))
    assert by_text == by_value


def test_a_home_folder_is_found_and_an_unknown_one_left_as_it_is():
    """As a shell does."""
    assert TrainConfig(data_dir="~/data").data_dir == Path.home() / "data"
    assert TrainConfig(data_dir="~no-such-user/x").data_dir == Path("~no-such-user/x")


def test_settings_cannot_be_changed():
    """A configuration is a value."""
    with pytest.raises(AttributeError):
        TrainConfig().lr = 1.0


@given(
    config=st.builds(
        TrainConfig,
        init=st.sampled_from(["he", "normal:std=0.05"]),
        hidden=st.lists(st.integers(1, 6_000), max_size=8).map(tuple),
        lr=st.floats(1e-300, 1e30),
        gamma=st.floats(1e-6, 1),
        momentum=st.floats(0, 0.999),
        nesterov=st.booleans(),
        threads=st.none() | st.integers(1, 1024),
        seed=st.integers(0, 2**63 - 1),
        device=st.sampled_from(["auto", "cpu", "cuda", "cuda:3"]),
    )
)
def test_text_gives_every_configuration_back(config):
    """as_text loses nothing, not even the last bit of a number."""
    assert TrainConfig(**config.as_text()) == config


WRONG = [
    ("lr", "abc", "lr must be a number above 0 and at most 1e30, not 'abc'"),
    ("lr", "0", "lr must be a number above 0 and at most 1e30, not '0'"),
    ("lr", "nan", "lr must be a number above 0 and at most 1e30, not 'nan'"),
    ("lr", "inf", "lr must be a number above 0 and at most 1e30, not 'inf'"),
    ("lr", True, "lr must be a number above 0 and at most 1e30, not 'True'"),
    ("lr", "1e31", "lr must be a number above 0 and at most 1e30, not '1e31'"),
    ("batch_size", 10**30, "at least 1 and at most 1000000000, not '1"),
    ("epochs", "1000001", "at least 1 and at most 1000000, not '1000001'"),
    ("hidden", "65536x2", "268435456 weights between them"),
    ("gamma", "1.5", "gamma must be a number above 0 and at most 1, not '1.5'"),
    ("momentum", "1", "momentum must be a number from 0 up to, not including, 1, not '1'"),
    ("epochs", "0", "epochs must be a whole number, at least 1 and at most 1000000, not '0'"),
    ("epochs", "2.5", "epochs must be a whole number, at least 1 and at most 1000000, not '2.5'"),
    ("batch_size", "-1", "batch_size must be a whole number, at least 1 and at most"),
    ("eval_every", "0", "eval_every must be a whole number, at least 1, not '0'"),
    ("validation", "-1", "validation must be a whole number, at least 0, not '-1'"),
    ("seed", "-1", "at least 0 and at most 9223372036854775807, not '-1'"),
    ("threads", "0", "threads must be 'auto' or a whole number, at least 1"),
    ("nesterov", "yes", "nesterov must be true or false, not 'yes'"),
    ("hidden", "100,", "hidden must be widths such as 100, 300,100 or 100x20"),
    ("hidden", "0", "hidden must be widths"),
    ("hidden", "100x0", "hidden must be widths"),
    ("hidden", "5x1001", "at most 1000 layers"),
    ("hidden", "99999", "of at most 65536"),
    ("device", "gpu", "device must be auto, cpu, cuda or cuda:N, not 'gpu'"),
    ("dataset", "minst", "kmnist, digits, not 'minst' (did you mean 'mnist'?)"),
    ("dataset", "MNIST", "digits, not 'MNIST' (did you mean 'mnist'?)"),
    ("activation", "rleu", "linear, not 'rleu' (did you mean 'relu'?)"),
    ("normalize", "none", "normalize must be one of unit, half, standard, not 'none'"),
    ("bias_init", "ones", "bias_init must be one of pytorch, zeros, not 'ones'"),
    ("init", " ", "init must be a name, not ' '"),
    ("init", "he\udcff", "init must be a name, not 'he"),
    ("data_dir", "d\udcff", "data_dir must be 'none' or a folder, not 'd"),
    ("data_dir", "", "data_dir must be 'none' or a folder, not ''"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_wrong_values_are_named_with_what_would_be_right(name, value, message):
    """One line, the bad value, and what is valid; for any kind of setting."""
    with pytest.raises(SettingError) as error:
        TrainConfig(**{name: value})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", fields(TrainConfig), ids=lambda setting: setting.name)
def test_every_setting_refuses_nonsense_but_free_text(setting):
    """No setting takes whatever it is given, but names, which others check."""
    if setting.name in ("init", "data_dir", "plugins_dir"):
        return
    with pytest.raises(SettingError, match=setting.name):
        replace(TrainConfig(), **{setting.name: "%&!"})


@pytest.mark.parametrize(
    ("text", "widths"),
    [
        ("none", ()),
        ("100", (100,)),
        ("300,100", (300, 100)),
        ("100x20", (100,) * 20),
        ("300, 100x2", (300, 100, 100)),
    ],
)
def test_widths(text, widths):
    """Each form of the contract."""
    assert parse_widths(text) == widths
    assert parse_widths(format_widths(widths)) == widths


@given(st.text(alphabet="0123456789x, none-", max_size=30))
def test_widths_are_read_or_refused(text):
    """No text makes reading fail otherwise, or makes a huge network."""
    try:
        widths = parse_widths(text)
    except ValueError:
        return
    assert len(widths) <= 1_000

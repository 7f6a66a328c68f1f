"""Settings: defaults, reading, writing and refusing."""

import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as examples_of
from hypothesis import strategies as st

from initflow.cli import commands
from initflow.core.configurations import (
    ACTIVATION_NAMES,
    VERDICTS,
    CompareConfig,
    DiagnoseConfig,
    NetworkConfig,
    PluginsConfig,
    RatesConfig,
    ReproduceConfig,
    TrainConfig,
    TuneConfig,
    VerifyConfig,
    short_name,
)
from initflow.core.kinds import format_widths, parse_widths
from initflow.errors import SettingError

NETWORK = {
    "model": "mlp",
    "channels": "6,16",
    "kernel": "5",
    "pool": "max",
    "dataset": "mnist",
    "hidden": "100",
    "epochs": "5",
    "updates": "all",
    "batch_size": "100",
    "lr": "0.1",
    "gamma": "0.96",
    "momentum": "0.9",
    "nesterov": "true",
    "optimizer": "sgd",
    "betas": "0.9,0.999",
    "eps": "1e-08",
    "weight_decay": "auto",
    "schedule": "step",
    "clip": "none",
    "parametrization": "standard",
    "base_width": "100",
    "bias_init": "pytorch",
    "normalize": "unit",
    "validation": "0",
    "eval_every": "500",
}  # what trains a network, alone or in a comparison
TRAINED = {
    "plugins_dir": "none",
    "data_dir": "none",
    "probe": "1000",
    "seed": "0",
    "device": "auto",
    "tf32": "false",
    "threads": "auto",
    "log_model": "true",
}  # what all that train share, whatever sets the rest


def test_defaults_are_the_contracts():
    """The defaults users hold on to, as text."""
    assert TrainConfig().as_text() == {"init": "he", "activation": "relu", **NETWORK, **TRAINED}


def test_a_run_is_verified_as_it_was_by_default():
    """What may be another is what another machine lacks."""
    names = ("init", "model", "dataset", "plugins_dir", "data_dir", "device")
    assert VerifyConfig().as_text() == dict.fromkeys(names, "recorded")
    assert VerifyConfig(data_dir="recorded").data_dir is None


def test_defaults_of_a_comparison_are_the_contracts():
    """Its own parameters, and those shared by all that train."""
    assert CompareConfig().as_text() == {
        "inits": "normal,lecun,xavier,he",
        "activations": "tanh,relu",
        "seeds": "5",
        "stack": "auto",
        "workers": "auto",
        "backend": "local",
        "run_figures": "false",
        **NETWORK,
        **TRAINED,
    }
    trained = TrainConfig().as_text()
    shared = CompareConfig().as_text().keys() & trained.keys()
    assert trained.keys() - shared == {"init", "activation"}  # which it has several of
    assert {name: CompareConfig().as_text()[name] for name in shared} == {
        name: trained[name] for name in shared
    }


def test_defaults_of_a_tuning_are_the_contracts():
    """Its own parameters, and those shared by all that train."""
    trained = TrainConfig().as_text()
    assert TuneConfig().as_text() == {
        "inits": "normal,lecun,xavier,he",
        "trials": "30",
        "lr_low": "0.001",
        "lr_high": "1.0",
        "gamma_low": "0.5",
        "gamma_high": "1.0",
        "study": "auto",
        "storage": "auto",
        "workers": "auto",
        "backend": "local",
        "sampler": "tpe",
        "pruner": "median",
        "batch": "5",
        "register": "none",
        "seeds": "5",
        "stack": "auto",
        **{name: text for name, text in trained.items() if name != "init"},
        "validation": "auto",
    }


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"model": "cnn", "channels": "8x3,16", "kernel": 3, "pool": "average"}, None),
        ({"model": "rnn", "activation": "tanh", "hidden": "20x2"}, None),
        ({"model": "lstm", "hidden": 20}, None),
        ({"model": "net.py:build", "lr": 1}, None),
        ({"kernel": 3}, "kernel=3 is for model=cnn, not for 'mlp'"),
        (
            {"model": "gru", "activation": "tanh"},
            "activation=tanh is for model=mlp, cnn or rnn, not",
        ),
        (
            {"model": "net.py:build", "hidden": 9},
            "hidden=9 is for model=mlp, cnn, rnn, lstm or gru",
        ),
        ({"model": "cnn", "kernel": 4}, "kernel must be an odd whole number from 1 to 99, not '4'"),
        ({"model": "cnn", "pool": "mean"}, "pool must be one of max, average, none, not 'mean'"),
        ({"model": "a b"}, "model must be a model's name, or the function that builds one: path/"),
        ({"model": ""}, "model must be a model's name"),
    ],
)
def test_a_setting_belongs_to_some_models(own, said):
    """With another model it must stay as it is by default, as it would change nothing."""
    if said is None:
        TrainConfig(**own)
        return
    with pytest.raises(SettingError) as caught:
        TrainConfig(**own)
    assert said in str(caught.value)


def test_a_comparison_of_a_model_with_its_own_activations():
    """Has one network a scheme; others one for each activation function."""
    assert CompareConfig(model="cnn").own_activations == ("tanh", "relu")
    config = CompareConfig(model="lstm")
    assert [config.network("he", a, 0).kind for a in config.own_activations] == ["lstm"]
    with pytest.raises(
        SettingError, match="activations=relu is for model=mlp, cnn or rnn, not for 'lstm'"
    ):
        CompareConfig(model="lstm", activations="relu")


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"lr_low": 1}, None),
        ({"gamma_low": "0.9", "gamma_high": "0.9"}, None),
        ({"lr_low": 1, "lr_high": "0.1"}, "lr_low must be at most lr_high, not '1' with"),
        ({"gamma_low": 1, "gamma_high": 0.5}, "gamma_low must be at most gamma_high, not '1' with"),
        ({"gamma_high": 1.01}, "gamma_high must be a number above 0 and at most 1, not '1.01'"),
        ({"trials": 0}, "trials must be a whole number, at least 1 and at most 1000000, not '0'"),
        ({"sampler": "tp"}, "sampler must be one of tpe, gp, random, cmaes, not 'tp' (did you"),
        ({"backend": "dask"}, "backend must be one of local, ray, not 'dask'"),
        ({"pruner": "all"}, "pruner must be one of median, hyperband, none, not 'all'"),
        ({"validation": 0}, "validation must be 'auto' or a whole number, at least 1, not '0'"),
        ({"study": "a/b"}, "study must be 'auto' or a name of up to 100 letters, digits"),
        ({"register": "it's"}, "register must be 'none' or a name of up to 100 letters, digits"),
        ({"batch": 0}, "batch must be a whole number, at least 1"),
        ({"workers": 0}, "workers must be 'auto' or a whole number, at least 1"),
        ({"schedule": "cosine"}, None),
        ({"schedule": "cosine", "gamma_low": 0.9}, "gamma_low=0.9 is for schedule=step, not for"),
    ],
)
def test_what_a_tuning_is_told_wrong_is_one_line(own, said):
    """That names the value and what would be right."""
    if not said:
        TuneConfig(**own)
        return
    with pytest.raises(SettingError) as error:
        TuneConfig(**own)
    assert str(error.value).startswith(said)


def test_defaults_of_a_reproduction_are_the_contracts():
    """Its own parameters; the table's file has the others."""
    assert ReproduceConfig().as_text() == {
        "table": "tutorial",
        "seeds": "5",
        "stack": "auto",
        "workers": "auto",
        "backend": "local",
        "run_figures": "false",
        **TRAINED,
    }


def test_a_network_of_a_comparison_has_its_settings():
    """All that a training has too, with a scheme, an activation and a seed of its own."""
    config = CompareConfig(lr=0.5, hidden="7x2", dataset="digits", seed=3, probe=0, threads=2)
    assert config.network("he:mode=fan_out", "elu", 9) == TrainConfig(
        init="he:mode=fan_out",
        activation="elu",
        seed=9,
        lr=0.5,
        hidden=(7, 7),
        dataset="digits",
        probe=0,
        threads=2,
    )


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


# Names as odd as a file's may be; commas, which part schemes, only before an argument.
names = (
    st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=12)
    .map(str.strip)
    .filter(bool)
    .filter(lambda name: name not in ("none", "~") and not name.startswith("~"))
)
schemes = st.sampled_from(
    ["he", "xavier", "normal:std=0.05", "mine:a=1,b=x y", "my file.py:f", 'it\'s "odd" $HOME;.py:f']
) | names.filter(lambda name: "," not in name and ("=" not in name or ":" in name))
folders = st.none() | names.map(Path)
several = {
    "inits": st.lists(schemes, min_size=1, max_size=4, unique=True),
    "activations": st.lists(st.sampled_from(ACTIVATION_NAMES), min_size=1, unique=True),
}
common = {
    "plugins_dir": folders,
    "data_dir": folders,
    "seed": st.integers(0, 2**62),
    "threads": st.none() | st.integers(1, 1024),
    "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:3"]),
}
trained = common | {
    "hidden": st.lists(st.integers(1, 6_000), max_size=8).map(tuple),
    "lr": st.floats(1e-300, 1e30),
    "gamma": st.floats(1e-6, 1),
    "momentum": st.floats(0, 0.999),
    "nesterov": st.booleans(),
    "weight_decay": st.none() | st.floats(0, 1e30),
    "clip": st.none() | st.floats(1e-300, 1e30),
}
adaptive = {
    name: trained[name] for name in trained if name not in ("momentum", "nesterov", "gamma")
}
adaptive |= {
    "optimizer": st.sampled_from(["adam", "adamw"]),
    "betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    "eps": st.floats(1e-30, 1e30),
    "schedule": st.just("cosine"),
}
populations = {
    "seeds": st.integers(1, 10_000),
    "stack": st.none() | st.integers(1, 100_000),
    "run_figures": st.booleans(),
}
CONFIGS = {
    "train": st.builds(TrainConfig, init=schemes, **trained)
    | st.builds(TrainConfig, init=schemes, **adaptive),
    "diagnose": st.builds(
        DiagnoseConfig,
        fail_on=st.none() | st.lists(st.sampled_from(VERDICTS), min_size=1, unique=True),
        depth=st.integers(1, 1_000),
        **several,
        **common,
    ),
    "compare": st.builds(CompareConfig, **several, **populations, **trained),
    "rates": st.builds(
        RatesConfig,
        inits=several["inits"],
        rates=st.integers(2, 1_000),
        updates=st.integers(1, 1_000_000),
        lr_low=st.floats(1e-300, 1e-3),
        lr_high=st.floats(1, 1e30),
        parametrizations=st.lists(st.sampled_from(["standard", "mup"]), min_size=1, unique=True),
        **common,
    )
    | st.builds(
        RatesConfig,
        over=st.just("depth"),
        depths=st.lists(st.integers(1, 1_000), min_size=2, unique=True),
        **common,
    ),
    "reproduce": st.builds(ReproduceConfig, table=names, **populations, **common),
    "schemes": st.builds(
        NetworkConfig, hidden=trained["hidden"], plugins_dir=folders, data_dir=folders
    ),
    "plugins list": st.builds(PluginsConfig, plugins_dir=folders),
    "verify": st.builds(
        VerifyConfig,
        init=st.none() | schemes,
        plugins_dir=folders,
        data_dir=folders,
        device=st.none() | common["device"],
    ),
}
ARGUMENTS = {"verify": ["0" * 32]}  # that a command takes beside its settings

each_command = pytest.mark.parametrize("name", CONFIGS)


@each_command
@given(data=st.data())
@examples_of(max_examples=40)
def test_text_gives_every_configuration_back(name, data):
    """as_text loses nothing, not even the last bit of a number."""
    config = data.draw(CONFIGS[name])
    assert type(config)(**config.as_text()) == config


@each_command
@given(data=st.data())
@examples_of(max_examples=40)
def test_a_command_line_gives_every_configuration_back(name, data):
    """As a shell and the command read it, whatever spaces, quotes and signs it has."""
    config = data.draw(CONFIGS[name])
    program, *words = shlex.split(config.command(name))
    group, command = commands.cli, None
    while words and isinstance(group, type(commands.cli)):
        command = words.pop(0)
        group = group.commands[command]
    assert program == "initflow"
    given_options = group.make_context(command, words + ARGUMENTS.get(name, [])).params
    settings = {key: value for key, value in given_options.items() if key in config.as_text()}
    assert type(config)(**settings) == config


@pytest.mark.parametrize("name", ["train", "diagnose", "compare", "rates", "reproduce"])
@given(data=st.data())
@examples_of(max_examples=20)
def test_an_mlflow_run_gives_every_configuration_back(name, data):
    """As a shell and MLflow read it: name=value after each -P, all else as it was launched."""
    config = data.draw(CONFIGS[name])
    launcher = ("https://git/a b", "--env-manager", "local", "--experiment-name", "my 'own'")
    words = shlex.split(config.command(name, (), launcher))
    project, *options = launcher
    head = ["mlflow", "run", project, *([] if name == "train" else ["-e", name]), *options]
    assert words[: len(head)] == head
    options, parameters = words[len(head) :: 2], words[len(head) + 1 :: 2]
    assert set(options) <= {"-P"}
    assert len(options) == len(parameters)
    settings = dict(parameter.split("=", 1) for parameter in parameters)
    assert type(config)(**settings) == config


def test_a_command_line_tells_what_is_not_the_default():
    """And what is to be told always, in the order of the settings."""
    assert CompareConfig().command("compare") == "initflow compare"
    config = CompareConfig(inits="he,my file.py:f", seeds=3, hidden="10x2", run_figures=True)
    assert config.command("compare", ("dataset",)) == (
        "initflow compare --inits 'he,my file.py:f' --seeds 3 --dataset mnist --hidden 10x2 "
        "--run-figures true"
    )
    launcher = (".", "--env-manager", "local", "--experiment-name", "my own")
    assert ReproduceConfig(table="it's.toml").command("reproduce", (), launcher) == (
        "mlflow run . -e reproduce --env-manager local --experiment-name 'my own' "
        """-P table='it'"'"'s.toml'"""
    )


@pytest.mark.parametrize("config", [TrainConfig, CompareConfig, TuneConfig])
@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            {"optimizer": "adam", "momentum": 0.5},
            "momentum=0.5 is for optimizer=sgd, not for 'adam'",
        ),
        (
            {"optimizer": "adamw", "nesterov": False},
            "nesterov=false is for optimizer=sgd, not for 'adamw'",
        ),
        ({"betas": "0.9,0.99"}, "betas=0.9,0.99 is for optimizer=adam or adamw, not for 'sgd'"),
        ({"eps": 1e-7}, "eps=1e-07 is for optimizer=adam or adamw, not for 'sgd'"),
        ({"schedule": "cosine", "gamma": 1}, "gamma=1.0 is for schedule=step, not for 'cosine'"),
    ],
    ids=str,
)
def test_a_setting_that_would_do_nothing_is_refused(config, own, said):
    """It belongs to another choice; at its default it is nobody's wish."""
    with pytest.raises(SettingError) as error:
        config(**own)
    assert str(error.value) == said


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
    ("optimizer", "adamm", "optimizer must be one of sgd, adam, adamw, not 'adamm' (did you mean"),
    ("betas", "0.9", "betas must be two numbers from 0 up to, not including, 1, such as 0.9,0.999"),
    ("betas", "0.9,1", "such as 0.9,0.999, not '0.9,1'"),
    ("betas", (0.9, 0.99, 0.999), "such as 0.9,0.999, not '(0.9, 0.99, 0.999)'"),
    ("betas", 0.9, "such as 0.9,0.999, not '0.9'"),
    ("eps", "0", "eps must be a number from 1e-30 to 1e30, not '0'"),
    ("weight_decay", "-1", "weight_decay must be 'auto' or a number from 0 to 1e30, not '-1'"),
    ("schedule", "cos", "schedule must be one of step, cosine, not 'cos'"),
    ("clip", "0", "clip must be 'none' or a number above 0 and at most 1e30, not '0'"),
    ("parametrization", "mu", "must be one of standard, mup, not 'mu' (did you mean 'mup'?)"),
    ("base_width", "0", "base_width must be a whole number, at least 1 and at most 65536, not '0'"),
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
    ("dataset", "minst", "FILE.npz, FILE.py:FUNCTION, not 'minst' (did you mean 'mnist'?)"),
    ("dataset", "MNIST", "digits, FILE.npz, FILE.py:FUNCTION, not 'MNIST' (did you mean 'mnist'?)"),
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


WRONG_POPULATIONS = [
    (CompareConfig, "seeds", "0", "seeds must be a whole number, at least 1 and at most 10000"),
    (CompareConfig, "seeds", "10001", "at most 10000, not '10001'"),
    (CompareConfig, "seed", str(2**63 - 1), f"not '{2**63 - 1}'"),
    (CompareConfig, "inits", "he,he", "schemes between commas, none twice, not 'he,he'"),
    (CompareConfig, "inits", "", "schemes between commas, none twice, not ''"),
    (CompareConfig, "inits", "he,,xavier", "not 'he,,xavier'"),
    (CompareConfig, "activations", "swish", ", linear, not 'swish'"),
    (CompareConfig, "activations", "relu,relu", "none twice"),
    (CompareConfig, "stack", "0", "stack must be 'auto' or a whole number, at least 1"),
    (CompareConfig, "run_figures", "yes", "run_figures must be true or false, not 'yes'"),
    (CompareConfig, "lr", "abc", "lr must be a number above 0 and at most 1e30, not 'abc'"),
    (ReproduceConfig, "table", " ", "table must be a name, not ' '"),
    (ReproduceConfig, "seeds", "2.5", "seeds must be a whole number"),
    (ReproduceConfig, "stack", "all", "stack must be 'auto' or a whole number"),
]


@pytest.mark.parametrize(("settings", "name", "value", "message"), WRONG_POPULATIONS)
def test_wrong_settings_of_many_networks_are_named(settings, name, value, message):
    """As those of one are."""
    with pytest.raises(SettingError) as error:
        settings(**{name: value})
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


@pytest.mark.parametrize(
    ("storage", "shown"),
    [
        ("some/path:2@x.journal", "some/path:2@x.journal"),
        ("/~/x", "/~/x"),
        ("postgresql://me@host/name", "postgresql://me@host/name"),
        ("postgresql+psycopg://me:secr:et@host:1/name", "postgresql+psycopg://me:***@host:1/name"),
        ("postgresql://me:x@secr/et@host/name", "postgresql://me:***@host/name"),
        ("postgresql://h/n?sslpassword=secret", "postgresql://h/n?sslpassword=***"),
        (
            "postgresql://h/n?user=me&password=secret&x=1",
            "postgresql://h/n?user=me&password=***&x=1",
        ),
    ],
)
def test_a_databases_password_is_no_text_of_the_settings(storage, shown):
    """Which is logged, and told in commands."""
    config = TuneConfig(storage=storage)
    assert config.storage == storage
    assert config.as_text()["storage"] == shown
    assert "secr" not in config.command("tune")


@pytest.mark.parametrize(
    ("model", "short"),
    [
        ("mlp", "mlp"),
        ("path/to/net.py:build", "net.py:build"),
        ("C:\\nets\\net.v2.py:build", "net.v2.py:build"),
        ("package.nets:build", "nets:build"),
        ("my.plugin", "my.plugin"),
    ],
)
def test_a_model_is_called_by_the_last_part_of_its_place(model, short):
    """In names of runs and in titles."""
    assert short_name(model) == short

"""The settings of a training run: their names, defaults, meaning and valid values.

:class:`TrainConfig` is the only home of the defaults. Every value may be given as
text, as the command line and MLflow give it, or as the Python value itself.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from initflow.core import paths
from initflow.errors import SettingError, unknown, without_named_secrets

SCHEME_NAMES = (
    "zero",
    "constant",
    "normal",
    "random",
    "uniform",
    "truncated_normal",
    "lecun",
    "lecun_uniform",
    "xavier",
    "xavier_uniform",
    "he",
    "he_uniform",
    "pytorch",
    "orthogonal",
    "sparse",
    "identity",
)  # the built-in ones
ACTIVATION_NAMES = (
    "sigmoid",
    "tanh",
    "relu",
    "leaky_relu",
    "gelu",
    "silu",
    "selu",
    "elu",
    "softplus",
    "linear",
)
# The built-in scheme made for an activation function, by its authors' claim; he for all others.
RECOMMENDED = {"tanh": "xavier", "sigmoid": "xavier", "selu": "lecun", "linear": "lecun"}
DATASET_NAMES = ("mnist", "fashion-mnist", "kmnist", "digits")
VERDICTS = ("stable", "vanishing", "exploding", "saturated", "dead", "symmetric")
BIAS_INITS = ("pytorch", "zeros")
NORMALIZATIONS = ("unit", "half", "standard")
SAMPLERS = ("tpe", "gp", "random", "cmaes")
PRUNERS = ("median", "hyperband", "none")
BACKENDS = ("local", "ray")

MAX_LAYERS = 1_000
MAX_WIDTH = 65_536
MAX_WEIGHTS = 2**28  # between the hidden layers; training holds three copies in memory


@dataclass(frozen=True)
class Kind:
    """What values a setting takes: how to read them, write them, and describe them."""

    metavar: str
    expected: str
    parse: Callable[[object], Any]  # raises ValueError or TypeError for anything unexpected
    format: Callable[[Any], str] = str
    choices: tuple[str, ...] = ()


def _number(expected: str, is_valid: Callable[[float], bool]) -> Kind:
    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError
        number = float(value)
        if not (math.isfinite(number) and is_valid(number)):
            raise ValueError
        return number

    return Kind("NUMBER", expected, parse)


def _integer(minimum: int, maximum: int | None = None) -> Kind:
    top = "" if maximum is None else f" and at most {maximum}"

    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise TypeError
        number = int(value)
        if number < minimum or (maximum is not None and number > maximum):
            raise ValueError
        return number

    return Kind("INTEGER", f"a whole number, at least {minimum}{top}", parse)


def _choice(valid: tuple[str, ...]) -> Kind:
    def parse(value: object) -> str:
        if value not in valid:
            raise ValueError
        return str(value)

    return Kind(f"[{'|'.join(valid)}]", f"one of {', '.join(valid)}", parse, choices=valid)


def _or_word(word: str, kind: Kind) -> Kind:
    """``kind``, or ``word``, which stands for None."""

    def parse(value: object) -> object:
        return None if value is None or value == word else kind.parse(value)

    def write(value: object) -> str:
        return word if value is None else kind.format(value)

    return Kind(f"{word}|{kind.metavar}", f"'{word}' or {kind.expected}", parse, write)


def _list(item: Kind, expected: str) -> Kind:
    """Several of ``item``, none twice, between commas; ``inits`` may have commas of their own."""

    def parse(value: object) -> tuple[Any, ...]:
        parts = value.split(",") if isinstance(value, str) else list(value)  # type: ignore[call-overload]
        items: list[Any] = []
        for part in parts:
            if items and "=" in part and ":" not in part:  # a further argument of the last one
                items[-1] = f"{items[-1]},{part.strip()}"
            else:
                items.append(item.parse(part.strip()))
        if not items or len(set(items)) < len(items):
            raise ValueError
        return tuple(items)

    def write(values: tuple[Any, ...]) -> str:
        return ",".join(map(item.format, values))

    return Kind(f"{item.metavar},…", expected, parse, write)


def _parse_boolean(value: object) -> bool:
    return {"true": True, "false": False}[str(value).lower()]


def _parse_text(value: object) -> str:
    text = str(value).strip()
    text.encode()  # a ValueError for what is no Unicode
    if not text or "\0" in text:  # which no file's name may have
        raise ValueError
    return text


def _parse_path(value: object) -> Path:
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise TypeError
    str(value).encode()  # a ValueError for what is no Unicode, which MLflow could not log
    return paths.own(value)


def _parse_device(value: object) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", str(value)):
        raise ValueError
    return str(value)


def parse_widths(value: object) -> tuple[int, ...]:
    """Hidden widths from ``100``, ``300,100``, ``100x20`` (20 layers of 100) or ``none``."""
    if isinstance(value, str) and value.strip() == "none":
        return ()
    if isinstance(value, (list, tuple)):
        widths = [_integer(1).parse(width) for width in value]
    else:
        widths = []
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*(\d{1,6})(?:x(\d{1,6}))?\s*", part)
            if not match:
                raise ValueError
            width, count = int(match[1]), int(match[2] or 1)
            if count < 1 or len(widths) + count > MAX_LAYERS:
                raise ValueError
            widths += [width] * count
    weights = sum(fan_in * fan_out for fan_in, fan_out in pairwise(widths))
    if len(widths) > MAX_LAYERS or weights > MAX_WEIGHTS:
        raise ValueError
    if any(not 1 <= width <= MAX_WIDTH for width in widths):
        raise ValueError
    return tuple(widths)


def format_shape(widths: tuple[int, ...]) -> str:
    """``784-100-10``; of deep networks ``784-100x20-10``."""
    pixels, *hidden, classes = widths
    parts = format_widths(tuple(hidden)).split(",") if hidden else []
    return "-".join([str(pixels), *parts, str(classes)])


def format_widths(widths: tuple[int, ...]) -> str:
    """The text that :func:`parse_widths` reads back: ``300,100x3``."""
    runs = ((width, len(list(run))) for width, run in groupby(widths))
    return ",".join(f"{width}x{n}" if n > 1 else f"{width}" for width, n in runs) or "none"


def _parse_name(value: object) -> str:
    """Of a study or a registered model: it becomes a part of files' names and of searches."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", str(value), re.ASCII):
        raise ValueError
    return str(value)


def _parse_storage(value: object) -> str:
    """A database's URL as it is, or a file's path."""
    text = _parse_text(value)
    return text if "://" in text else str(paths.own(text))


def without_password(text: str) -> str:
    """A database's URL as it may be shown."""
    text = without_named_secrets(text, ends="&")
    if not text.startswith("sqlite"):
        # Up to the last @, as a password may hold one; of the web, a user alone may be a token.
        text = re.sub(r"(?s)(://[^:/?#@]*)(?::|[/?#@].*:).*@", r"\1:***@", text)
        text = re.sub(r"(?s)(https?://).*@", r"\1***@", text)
        # Without one, what is no port is a password whose host was forgotten.
        text = re.sub(r"(://[^:/?#@[]*):(?!\d*(?:[/?#]|$))[^@/?]*(?=[/?]|$)", r"\1:***", text)
    return text


_BOOLEAN = Kind("true|false", "true or false", _parse_boolean, lambda value: str(value).lower())
_TEXT = Kind("TEXT", "a name", _parse_text)
_STORAGE = Kind(
    "PATH|URL", "a journal's path or a database's URL", _parse_storage, without_password
)
_NAME = Kind("NAME", "a name of up to 100 letters, digits, - _ and .", _parse_name)
_FOLDER = Kind("FOLDER", "a folder", _parse_path)
_DEVICE = Kind("auto|cpu|cuda|cuda:N", "auto, cpu, cuda or cuda:N", _parse_device)
_WIDTHS = Kind(
    "WIDTHS",
    "widths such as 100, 300,100 or 100x20 (20 layers of 100), or none"
    f" (at most {MAX_LAYERS} layers of at most {MAX_WIDTH}, {MAX_WEIGHTS} weights between them)",
    parse_widths,
    format_widths,
)


def _parse_probe(value: object) -> int:
    images = _integer(0, 1_000_000_000).parse(value)
    if images == 1:  # nothing varies from image to image
        raise ValueError
    return int(images)


_PROBE = Kind("INTEGER", "0, or a whole number from 2 to 1000000000", _parse_probe)
_RATE = _number("a number above 0 and at most 1e30", lambda x: 0 < x <= 1e30)
_DECAY = _number("a number above 0 and at most 1", lambda x: 0 < x <= 1)
_MOMENTUM = _number("a number from 0 up to, not including, 1", lambda x: 0 <= x < 1)


def _setting(default: object, kind: Kind, meaning: str) -> Any:
    return field(default=default, metadata={"kind": kind, "meaning": meaning})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Named settings, each read and checked by its kind; invalid ones are a `SettingError`."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            kind: Kind = setting.metadata["kind"]
            value = getattr(self, setting.name)
            try:
                parsed = kind.parse(value)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                raise _invalid(setting.name, kind, value) from None
            object.__setattr__(self, setting.name, parsed)

    def as_text(self) -> dict[str, str]:
        """Every setting by name, as the text that gives it back, but for a password."""
        return {
            setting.name: setting.metadata["kind"].format(getattr(self, setting.name))
            for setting in fields(self)
        }

    def command(self, name: str, always: tuple[str, ...] = (), launcher: Sequence[str] = ()) -> str:
        """The command line of the command ``name`` with these settings; defaults are left out.

        Those named in ``always`` are told too. It is an ``initflow name``, or an ``mlflow run``
        where ``launcher`` has the project and its options.
        """
        defaults = type(self)().as_text()
        chosen = {
            setting: shlex.quote(text)
            for setting, text in self.as_text().items()
            if text != defaults[setting] or setting in always
        }
        if launcher:
            parameters = (f"-P {setting}={text}" for setting, text in chosen.items())
            entry_point = [] if name == "train" else ["-e", name]
            project, *others = map(shlex.quote, launcher)
            words = ["mlflow run", project, *entry_point, *others, *parameters]
        else:
            options = (f"--{key.replace('_', '-')} {text}" for key, text in chosen.items())
            words = ["initflow", name, *options]
        return " ".join(words)

    def shared_with_training(self) -> dict[str, Any]:
        """Those that a training has too, by name."""
        names = {setting.name for setting in fields(TrainConfig)}
        mine = [setting.name for setting in fields(self) if setting.name in names]
        return {name: getattr(self, name) for name in mine}


def _invalid(name: str, kind: Kind, value: object) -> SettingError:
    if kind.choices:
        return unknown(name, value, kind.choices)
    return SettingError(f"{name} must be {kind.expected}, not '{value}'")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """The settings of one training run.

    ``init`` is only known to be text here: which schemes there are is for
    :mod:`initflow.initializers.plugins` to say.
    """

    init: str = _setting("he", _TEXT, "initialization scheme, with arguments after a colon")
    plugins_dir: Path | None = _setting(
        None,
        _or_word("none", _FOLDER),
        "folder of plugins to use in place (none: INITFLOW_PLUGINS_DIR, else plugins)",
    )
    activation: str = _setting(
        "relu", _choice(ACTIVATION_NAMES), "activation of every hidden layer"
    )
    dataset: str = _setting("mnist", _choice(DATASET_NAMES), "images to learn")
    data_dir: Path | None = _setting(
        None,
        _or_word("none", _FOLDER),
        "data folder (none: INITFLOW_DATA_DIR, else the user's cache)",
    )
    hidden: tuple[int, ...] = _setting(
        (100,), _WIDTHS, "hidden widths: 100, 300,100, 100x20 for 20 layers of 100, or none"
    )
    epochs: int = _setting(5, _integer(1, 1_000_000), "passes over the training images")
    batch_size: int = _setting(100, _integer(1, 1_000_000_000), "images per update")
    lr: float = _setting(0.1, _RATE, "learning rate of the first epoch")
    gamma: float = _setting(0.96, _DECAY, "factor on the learning rate after each epoch")
    momentum: float = _setting(0.9, _MOMENTUM, "momentum of SGD (0: plain SGD)")
    nesterov: bool = _setting(True, _BOOLEAN, "Nesterov's form of the momentum")
    bias_init: str = _setting(
        "pytorch", _choice(BIAS_INITS), "biases: U(±1/√fan_in) as in PyTorch, or zeros"
    )
    normalize: str = _setting(
        "unit",
        _choice(NORMALIZATIONS),
        "pixels: unit = [0, 1], half = [-1, 1], standard = mean 0 and std 1 over the data set",
    )
    validation: int = _setting(0, _integer(0), "training images held out for validation")
    eval_every: int = _setting(500, _integer(1), "iterations between evaluations")
    probe: int = _setting(
        1_000,
        _PROBE,
        "training images on which the layers' signals are measured (0: do not measure)",
    )
    seed: int = _setting(0, _integer(0, 2**63 - 1), "seed of the weights and the batch order")
    device: str = _setting("auto", _DEVICE, "where to train (auto: CUDA when there is one)")
    threads: int | None = _setting(
        None, _or_word("auto", _integer(1, 1024)), "CPU threads (auto: as many as PyTorch takes)"
    )
    log_model: bool = _setting(True, _BOOLEAN, "log the trained model")


def _shared(name: str, owner: type[Settings] | None = None) -> Any:
    """A setting that is the same as its ``owner``'s, by default as in training."""
    setting = (owner or TrainConfig).__dataclass_fields__[name]
    return field(default=setting.default, metadata=setting.metadata)


@dataclass(frozen=True, kw_only=True)
class PluginsConfig(Settings):
    """Where plugins are looked for."""

    plugins_dir: Path | None = _shared("plugins_dir")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Settings):
    """What of a run is to be another when it is trained again: by default nothing."""

    init: str | None = _setting(
        None,
        _or_word("recorded", _TEXT),
        "its scheme by another name or place (recorded: as it was)",
    )
    plugins_dir: Path | None = _setting(
        None,
        _or_word("recorded", _FOLDER),
        "folder of plugins (recorded: the run's, where it is there)",
    )
    data_dir: Path | None = _setting(
        None,
        _or_word("recorded", _FOLDER),
        "data folder (recorded: the run's, where it is there)",
    )
    device: str | None = _setting(
        None, _or_word("recorded", _DEVICE), "where to train (recorded: where it was)"
    )


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(PluginsConfig):
    """The untrained network on which a scheme is shown."""

    activation: str = _shared("activation")
    dataset: str = _shared("dataset")
    data_dir: Path | None = _shared("data_dir")
    hidden: tuple[int, ...] = _shared("hidden")
    bias_init: str = _shared("bias_init")
    normalize: str = _shared("normalize")
    seed: int = _shared("seed")

    def training(self, init: str) -> TrainConfig:
        """The settings that a training of the network under ``init`` would have."""
        return TrainConfig(init=init, **self.shared_with_training())


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(Settings):
    """The settings of one diagnosis: every scheme with every activation, untrained."""

    inits: tuple[str, ...] = _setting(
        ("normal", "lecun", "xavier", "he"),
        _list(_TEXT, "schemes between commas, none twice"),
        "initialization schemes, between commas",
    )
    activations: tuple[str, ...] = _setting(
        ("tanh", "relu"),
        _list(
            _choice(ACTIVATION_NAMES),
            f"names between commas, none twice, of {', '.join(ACTIVATION_NAMES)}",
        ),
        "activations, between commas",
    )
    depth: int = _setting(20, _integer(1, MAX_LAYERS), "hidden layers")
    width: int = _setting(100, _integer(1, MAX_WIDTH), "units of each hidden layer")
    fail_on: tuple[str, ...] | None = _setting(
        None,
        _or_word(
            "none",
            _list(_choice(VERDICTS), f"verdicts between commas, of {', '.join(VERDICTS)}"),
        ),
        "verdicts, between commas, that make the exit code 1",
    )
    plugins_dir: Path | None = _shared("plugins_dir")
    dataset: str = _shared("dataset")
    data_dir: Path | None = _shared("data_dir")
    bias_init: str = _shared("bias_init")
    normalize: str = _shared("normalize")
    probe: int = _setting(1_000, _integer(2, 1_000_000_000), "training images to measure on")
    seed: int = _shared("seed")
    device: str = _shared("device")
    threads: int | None = _shared("threads")

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            parse_widths(self.hidden)
        except ValueError:
            raise _invalid("width x depth", _WIDTHS, format_widths(self.hidden)) from None

    @property
    def hidden(self) -> tuple[int, ...]:
        return (self.width,) * self.depth

    def network(self, init: str, activation: str) -> TrainConfig:
        """The settings that a training of one of the networks would have."""
        shared = self.shared_with_training()
        return TrainConfig(init=init, activation=activation, hidden=self.hidden, **shared)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Settings):
    """The settings of one comparison: every scheme with every activation under every seed."""

    inits: tuple[str, ...] = _shared("inits", DiagnoseConfig)
    activations: tuple[str, ...] = _shared("activations", DiagnoseConfig)
    seeds: int = _setting(5, _integer(1, 10_000), "networks of each kind, each from another seed")
    plugins_dir: Path | None = _shared("plugins_dir")
    dataset: str = _shared("dataset")
    data_dir: Path | None = _shared("data_dir")
    hidden: tuple[int, ...] = _shared("hidden")
    epochs: int = _shared("epochs")
    batch_size: int = _shared("batch_size")
    lr: float = _shared("lr")
    gamma: float = _shared("gamma")
    momentum: float = _shared("momentum")
    nesterov: bool = _shared("nesterov")
    bias_init: str = _shared("bias_init")
    normalize: str = _shared("normalize")
    validation: int = _shared("validation")
    eval_every: int = _shared("eval_every")
    probe: int = _shared("probe")
    seed: int = _setting(0, _integer(0, 2**63 - 1 - 10_000), "the first seed; the others follow it")
    device: str = _shared("device")
    threads: int | None = _shared("threads")
    stack: int | None = _setting(
        None,
        _or_word("auto", _integer(1, 100_000)),
        "networks trained at once (auto: what the cache has room for; on CUDA, the memory)",
    )
    workers: int = _setting(1, _integer(1, 1_000), "processes that share the work, and the threads")
    backend: str = _setting(
        "local", _choice(BACKENDS), "where they work: on this machine, or on a Ray cluster"
    )
    log_model: bool = _shared("log_model")
    run_figures: bool = _setting(
        False, _BOOLEAN, "draw each network's own figures too, longer work than training it"
    )

    def network(self, init: str, activation: str, seed: int) -> TrainConfig:
        """The settings of one of the networks."""
        shared = self.shared_with_training() | {"seed": seed}
        return TrainConfig(init=init, activation=activation, **shared)


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig(Settings):
    """The settings of reproducing a published table, whose file has all others."""

    table: str = _setting("tutorial", _TEXT, "tutorial, assignment, or the path of a table's file")
    seeds: int = _shared("seeds", CompareConfig)
    plugins_dir: Path | None = _shared("plugins_dir")
    data_dir: Path | None = _shared("data_dir")
    probe: int = _shared("probe")
    seed: int = _shared("seed", CompareConfig)
    device: str = _shared("device")
    threads: int | None = _shared("threads")
    stack: int | None = _shared("stack", CompareConfig)
    workers: int = _shared("workers", CompareConfig)
    backend: str = _shared("backend", CompareConfig)
    log_model: bool = _shared("log_model")
    run_figures: bool = _shared("run_figures", CompareConfig)


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Settings):
    """The settings of tuning: a study of the learning rate and gamma for every scheme.

    ``lr`` and ``gamma`` are those of the untuned network, with which each study begins.
    """

    inits: tuple[str, ...] = _shared("inits", DiagnoseConfig)
    trials: int = _setting(30, _integer(1, 1_000_000), "settings tried for each scheme")
    lr_low: float = _setting(1e-3, _RATE, "the lowest learning rate to try")
    lr_high: float = _setting(1.0, _RATE, "the highest")
    gamma_low: float = _setting(0.5, _DECAY, "the lowest gamma to try")
    gamma_high: float = _setting(1.0, _DECAY, "the highest")
    study: str | None = _setting(
        None,
        _or_word("auto", _NAME),
        "name to go on under (auto: one that follows from the settings)",
    )
    storage: str | None = _setting(
        None,
        _or_word("auto", _STORAGE),
        "where studies are kept: a journal's path or a database's URL (auto: beside MLflow's)",
    )
    workers: int = _shared("workers", CompareConfig)
    backend: str = _shared("backend", CompareConfig)
    sampler: str = _setting("tpe", _choice(SAMPLERS), "how the next setting is chosen")
    pruner: str = _setting("median", _choice(PRUNERS), "what ends hopeless trials early")
    batch: int = _setting(
        5, _integer(1, 10_000), "trials chosen and trained at once (1: each knows all before it)"
    )
    register: str | None = _setting(
        None, _or_word("none", _NAME), "name in MLflow's model registry for the best models"
    )
    seeds: int = _setting(5, _integer(1, 10_000), "fresh seeds under which the best is tested")
    plugins_dir: Path | None = _shared("plugins_dir")
    activation: str = _shared("activation")
    dataset: str = _shared("dataset")
    data_dir: Path | None = _shared("data_dir")
    hidden: tuple[int, ...] = _shared("hidden")
    epochs: int = _shared("epochs")
    batch_size: int = _shared("batch_size")
    lr: float = _setting(0.1, _RATE, "learning rate of the untuned network, tried first")
    gamma: float = _setting(0.96, _DECAY, "gamma of the untuned network, tried first")
    momentum: float = _shared("momentum")
    nesterov: bool = _shared("nesterov")
    bias_init: str = _shared("bias_init")
    normalize: str = _shared("normalize")
    validation: int | None = _setting(
        None,
        _or_word("auto", _integer(1)),
        "training images held out to choose by (auto: a sixth, 10,000 of MNIST's)",
    )
    eval_every: int = _shared("eval_every")
    probe: int = _shared("probe")
    seed: int = _setting(
        0, _integer(0, 2**63 - 1 - 10_000), "seed of the studies and trials; fresh ones follow it"
    )
    device: str = _shared("device")
    threads: int | None = _shared("threads")
    stack: int | None = _shared("stack", CompareConfig)
    log_model: bool = _shared("log_model")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "gamma"):
            low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            if low > high:
                raise SettingError(
                    f"{name}_low must be at most {name}_high, not '{low:g}' with "
                    f"{name}_high={high:g}"
                )

    def trial(self, init: str, lr: float, gamma: float, validation: int) -> TrainConfig:
        """The settings of a trial's network, which is not logged as a model."""
        shared = self.shared_with_training()
        chosen = {"lr": lr, "gamma": gamma, "validation": validation, "log_model": False}
        return TrainConfig(init=init, **shared | chosen)

    def final(
        self, init: str, lr: float, gamma: float, seed: int, *, log: bool = False
    ) -> TrainConfig:
        """The settings of a network that is tested, trained on all images."""
        shared = self.shared_with_training() | {"lr": lr, "gamma": gamma, "validation": 0}
        return TrainConfig(init=init, **shared | {"seed": seed, "log_model": log})

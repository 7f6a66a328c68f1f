"""The settings of each command: their names, defaults, meaning and valid values.

What several commands share is declared once, in the classes that they inherit from; the order of
the bases is that of the settings, from the last one to the first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from initflow.core.kinds import (
    BETAS,
    BOOLEAN,
    DECAY,
    DEVICE,
    EPSILON,
    FIRST_SEED,
    FOLDER,
    KERNEL,
    MAX_LAYERS,
    MAX_WIDTH,
    MODEL,
    MOMENTUM,
    NAME,
    PROBE,
    RATE,
    SEEDS,
    STORAGE,
    TEXT,
    VARIANCE,
    WEIGHT_DECAY,
    WIDTHS,
    choice,
    data,
    elementwise,
    format_widths,
    integer,
    listed,
    or_word,
    parse_widths,
    several_whole,
    true_false_or,
)
from initflow.core.settings import Settings, check_range, invalid, setting, shared
from initflow.errors import SettingError

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
    "mean_field",
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
MLP, CNN, RNN, LSTM, GRU = MODEL_NAMES = ("mlp", "cnn", "rnn", "lstm", "gru")  # the built-in ones
# What settings are for that do nothing elsewhere.
ACTIVATED = ("model", (MLP, CNN, RNN))
BUILT_IN = ("model", MODEL_NAMES)
FEED_FORWARD = ("model", (MLP,))
CONVOLUTIONAL = ("model", (CNN,))
ACTIVATION = "relu"  # the default one
POOLS = ("max", "average", "none")
DATASET_NAMES = ("mnist", "fashion-mnist", "kmnist", "emnist", "cifar10", "digits")
DATASET = data(DATASET_NAMES)
VERDICTS = ("stable", "vanishing", "exploding", "ordered", "saturated", "dead", "symmetric")
SAMPLERS = ("tpe", "gp", "random", "cmaes")
PRUNERS = ("median", "hyperband", "none")
BACKENDS = ("local", "ray")
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("step", "cosine")
PARAMETRIZATIONS = ("standard", "mup")
SGD = ("optimizer", ("sgd",))
ADAM = ("optimizer", ("adam", "adamw"))
STEPS = ("schedule", ("step",))
MAXIMAL = ("parametrization", ("mup",))
OVER = ("none", "depth", "width")
BEST = "best"  # of the networks of a scheme with an activation
# Settings that files and studies of earlier versions do not have: theirs had these values.
ADDED = {
    "model": MLP,
    "channels": "6,16",
    "kernel": "5",
    "pool": "max",
    "optimizer": "sgd",
    "betas": "0.9,0.999",
    "eps": "1e-08",
    "weight_decay": "auto",
    "schedule": "step",
    "clip": "none",
    "updates": "all",
    "parametrization": "standard",
    "base_width": "100",
    "tf32": "false",
}


class PluginsConfig(Settings):
    """Where plugins are looked for."""

    plugins_dir: Path | None = setting(
        None,
        or_word("none", FOLDER),
        "folder of plugins to use in place (none: INITFLOW_PLUGINS_DIR, else plugins)",
    )


class Architecture(Settings):
    """Which network it is, beside its widths and its activation function."""

    model: str = setting(
        MLP,
        MODEL,
        f"{', '.join(MODEL_NAMES)}, a plugin's, or the function that builds one: FILE.py:FUNCTION",
    )
    channels: tuple[int, ...] = setting(
        (6, 16),
        WIDTHS,
        "of a cnn: channels of its convolutions; pooled after the last of each width: 16x2,32x2",
        only=CONVOLUTIONAL,
    )
    kernel: int = setting(
        5, KERNEL, "of a cnn: height and width of its kernels, odd", only=CONVOLUTIONAL
    )
    pool: str = setting(
        "max", choice(POOLS), "of a cnn: how it is pooled, 2 by 2", only=CONVOLUTIONAL
    )

    def kind_with(self, activation: str) -> str:
        """What tells networks of one scheme apart: ``activation`` or, without it, the model."""
        return activation if self.model in ACTIVATED[1] else short_name(self.model)


class _Untrained(PluginsConfig):
    """What an untrained network and its images depend on, beside its shape and scheme."""

    dataset: str = setting(
        "mnist", DATASET, "what to learn: a known set, a file of arrays, or a function giving them"
    )
    data_dir: Path | None = setting(
        None,
        or_word("none", FOLDER),
        "data folder (none: INITFLOW_DATA_DIR, else the user's cache)",
    )
    bias_init: str = setting(
        "pytorch", choice(("pytorch", "zeros")), "biases: U(±1/√fan_in) as in PyTorch, or zeros"
    )
    normalize: str = setting(
        "unit",
        choice(("unit", "half", "standard")),
        "pixels: unit = [0, 1], half = [-1, 1], standard = mean 0 and std 1 over the data set"
        " (other features: as they are, (x - 0.5)/0.5, each to mean 0 and std 1)",
    )
    seed: int = setting(0, integer(0, 2**63 - 1), "seed of the weights and the batch order")


class _Machine(Settings):
    """On what machine networks are trained."""

    device: str = setting("auto", DEVICE, "where to train (auto: CUDA when there is one)")
    tf32: bool = setting(
        False, BOOLEAN, "on CUDA: products round their factors to TF32's 10 bits, which is faster"
    )
    threads: int | None = setting(
        None,
        or_word("auto", integer(1, 1024)),
        "CPU threads (auto: as many as PyTorch takes, or a single one where it is faster)",
    )


class _Measured(_Machine):
    """How networks are measured, too."""

    probe: int = setting(
        1_000,
        PROBE,
        "training images on which the layers' signals are measured (0: do not measure)",
    )


class _Loop(_Untrained):
    """How networks are trained."""

    hidden: tuple[int, ...] = setting(
        (100,),
        WIDTHS,
        "hidden widths: 100, 300,100, 100x20 for 20 layers of 100, or none",
        only=BUILT_IN,
    )
    epochs: int = setting(5, integer(1, 1_000_000), "passes over the training images")
    updates: int | None = setting(
        None, or_word("all", integer(1)), "at most so many updates (all: those of all epochs)"
    )
    batch_size: int = setting(100, integer(1, 1_000_000_000), "images per update")
    lr: float = setting(0.1, RATE, "learning rate of the first epoch")
    gamma: float = setting(0.96, DECAY, "factor on the learning rate after each epoch", only=STEPS)
    momentum: float = setting(0.9, MOMENTUM, "momentum of SGD (0: plain SGD)", only=SGD)
    nesterov: bool = setting(True, BOOLEAN, "Nesterov's form of the momentum", only=SGD)
    optimizer: str = setting(
        "sgd", choice(OPTIMIZERS), "how weights follow from gradients (Adam's usual lr is 0.001)"
    )
    betas: tuple[float, float] = setting(
        (0.9, 0.999), BETAS, "decay of the two moments of adam and adamw", only=ADAM
    )
    eps: float = setting(1e-8, EPSILON, "added to the denominator of adam and adamw", only=ADAM)
    weight_decay: float | None = setting(
        None,
        or_word("auto", WEIGHT_DECAY),
        "weight decay, decoupled for adamw, else L2 (auto: PyTorch's, 0.01 for adamw, else 0)",
    )
    schedule: str = setting(
        "step", choice(SCHEDULES), "learning rate by epoch: times gamma, or along a cosine to 0"
    )
    clip: float | None = setting(
        None, or_word("none", RATE), "largest norm of a network's gradient, as clip_grad_norm_"
    )
    parametrization: str = setting(
        "standard",
        choice(PARAMETRIZATIONS),
        "how rates and the output's weights go with the width: standard, or by maximal updates",
        only=FEED_FORWARD,
    )
    base_width: int = setting(
        100, integer(1, MAX_WIDTH), "of mup: the width at which it is the standard", only=MAXIMAL
    )
    eval_every: int = setting(500, integer(1), "iterations between evaluations")


class _Training(_Loop):
    """The same, and whether a network is logged as a model."""

    log_model: bool = setting(True, BOOLEAN, "log the trained model")


class _Models(Settings):
    """Which of many networks are logged as models."""

    log_model: str = setting(
        "true",
        true_false_or(BEST),
        "log the trained models; best: of each scheme with each activation that of the highest"
        " accuracy at the end, on images held out or, without any, on the test images",
    )


class _One(Settings):
    """A scheme with an activation function.

    ``init`` is only known to be text here: which schemes there are is for
    :mod:`initflow.initializers.plugins` to say.
    """

    init: str = setting("he", TEXT, "initialization scheme, with arguments after a colon")
    activation: str = setting(
        ACTIVATION, choice(ACTIVATION_NAMES), "activation of every hidden layer", only=ACTIVATED
    )


class _Grid(Settings):
    """Every scheme with every activation function."""

    inits: tuple[str, ...] = setting(
        ("normal", "lecun", "xavier", "he"),
        listed(TEXT, "schemes between commas, none twice"),
        "initialization schemes, between commas",
    )
    activations: tuple[str, ...] = setting(
        ("tanh", "relu"),
        listed(
            choice(ACTIVATION_NAMES),
            f"names between commas, none twice, of {', '.join(ACTIVATION_NAMES)}",
        ),
        "activations, between commas",
        only=ACTIVATED,
    )


class _ModelGrid(Architecture, _Grid):
    """Every scheme with every activation function, in one kind of model."""

    @property
    def own_activations(self) -> tuple[str, ...]:
        """The activations; of a model that has its own, a single one that says nothing."""
        return self.activations if self.has("activations") else (ACTIVATION,)


class _Seeds(Settings):
    """Networks under several seeds."""

    seeds: int = setting(5, SEEDS, "networks of each kind, each from another seed")


class Many(_Machine):
    """Many networks, trained as stacks, by several workers."""

    seed: int = setting(0, FIRST_SEED, "the first seed; the others follow it")
    stack: int | None = setting(
        None,
        or_word("auto", integer(1, 100_000)),
        "networks trained at once (auto: what the cache has room for; on CUDA, the memory)",
    )
    workers: int | None = setting(
        None,
        or_word("auto", integer(1, 1_000)),
        "processes that share the work, and the threads (auto: as many as are fastest)",
    )
    backend: str = setting(
        "local", choice(BACKENDS), "where they work: on this machine, or on a Ray cluster"
    )


class TrainConfig(_Measured, _Training, Architecture, _One):
    """The settings of one training run."""

    validation: int = setting(0, integer(0), "training images held out for validation")

    @property
    def kind(self) -> str:
        return self.kind_with(self.activation)


def kind_word(kinds: Iterable[str]) -> str:
    """What networks are told apart by: their activation functions or, of some, their models."""
    return "activation" if set(kinds) <= set(ACTIVATION_NAMES) else "model"


def short_name(model: str) -> str:
    """A model's name, or the last part of a function's place: ``net.py:build``, ``net:build``."""
    module, colon, function = model.replace("\\", "/").rpartition("/")[2].rpartition(":")
    if not module.endswith(".py"):
        module = module.rpartition(".")[2]
    return f"{module}{colon}{function}"


def training(settings: Settings, **chosen: Any) -> TrainConfig:
    """The settings of a training: what is ``chosen``, else those that ``settings`` have too."""
    mine = {one.name for one in fields(settings)} & {one.name for one in fields(TrainConfig)}
    return TrainConfig(**{name: getattr(settings, name) for name in mine} | chosen)


class NetworkConfig(_Untrained):
    """The untrained network on which a scheme is shown."""

    activation: str = shared(_One, "activation")
    hidden: tuple[int, ...] = shared(_Training, "hidden")


class _Deep(_ModelGrid):
    """Every scheme with every activation function, in networks of many layers, or in a model."""

    draws: int = setting(
        20, integer(2, 1_000), "of all models but mlp: seeds from which bands are drawn"
    )
    hidden: tuple[int, ...] | None = setting(
        None,
        or_word("auto", WIDTHS),
        "hidden widths (auto: of an mlp depth × width, else 100)",
        only=BUILT_IN,
    )
    depth: int = setting(20, integer(1, MAX_LAYERS), "hidden layers of an mlp", only=FEED_FORWARD)
    width: int = setting(
        100, integer(1, MAX_WIDTH), "units of each of its hidden layers", only=FEED_FORWARD
    )
    fail_on: tuple[str, ...] | None = setting(
        None,
        or_word(
            "none",
            listed(choice(VERDICTS), f"verdicts between commas, of {', '.join(VERDICTS)}"),
        ),
        "verdicts, between commas, that make the exit code 1",
    )


class DiagnoseConfig(_Measured, _Untrained, _Deep):
    """The settings of one diagnosis: every scheme with every activation, untrained."""

    probe: int = setting(1_000, integer(2, 1_000_000_000), "training images to measure on")
    spectrum: bool = setting(
        False,
        BOOLEAN,
        "of an mlp: measure the singular values of its Jacobian too, beside theory",
        only=FEED_FORWARD,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            parse_widths(self.widths)
        except ValueError:
            raise invalid("width x depth", WIDTHS, format_widths(self.widths)) from None

    @property
    def widths(self) -> tuple[int, ...]:
        """Those of the hidden layers."""
        if self.hidden is not None:
            return self.hidden
        return (self.width,) * self.depth if self.model == MLP else TrainConfig().hidden

    def network(self, init: str, activation: str) -> TrainConfig:
        """The settings that a training of one of the networks would have."""
        return training(self, init=init, activation=activation, hidden=self.widths)


class PhaseConfig(PluginsConfig):
    """The settings of a plane of σ_w² and σ_b²: of which activation, and which part of it."""

    activation: str = setting(
        "tanh",
        elementwise(ACTIVATION_NAMES),
        "a built-in activation, or any function of a tensor: torch:erf, FILE.py:FUNCTION",
    )
    inits: tuple[str, ...] = setting(
        ("lecun", "xavier", "he", "pytorch"),
        _Grid.__dataclass_fields__["inits"].metadata["kind"],
        "schemes to mark, between commas",
    )
    sigma_w2_low: float = setting(0.05, VARIANCE, "the lowest σ_w² = fan_in · Var(W)")
    sigma_w2_high: float = setting(4.0, VARIANCE, "the highest")
    sigma_b2_low: float = setting(0.0, VARIANCE, "the lowest σ_b² = Var(b)")
    sigma_b2_high: float = setting(0.5, VARIANCE, "the highest")
    points: int = setting(81, integer(2, 1_000), "networks along each side of the plane")
    width: int = setting(
        100, integer(1, MAX_WIDTH), "inputs and units of the layer whose schemes are marked"
    )
    bias_init: str = shared(_Untrained, "bias_init")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sigma_w2", "sigma_b2"):
            check_range(self, name)


class CompareConfig(Many, _Measured, _Models, _Loop, _Seeds, _ModelGrid):
    """The settings of one comparison: every scheme with every activation under every seed."""

    validation: int = shared(TrainConfig, "validation")
    run_figures: bool = setting(
        False, BOOLEAN, "draw each network's own figures too, longer work than training it"
    )

    def network(self, init: str, activation: str, seed: int) -> TrainConfig:
        """The settings of one of the networks."""
        log = self.log_model == "true"
        return training(self, init=init, activation=activation, seed=seed, log_model=log)


class _Table(Settings):
    """A published table."""

    table: str = setting(
        "tutorial", TEXT, "tutorial, assignment, normalized-cnn, or the path of a table's file"
    )


class ReproduceConfig(Many, _Measured, PluginsConfig, _Seeds, _Table):
    """The settings of reproducing a published table, whose file has all others."""

    data_dir: Path | None = shared(_Untrained, "data_dir")
    log_model: bool = shared(_Training, "log_model")
    run_figures: bool = shared(CompareConfig, "run_figures")


class _ConstantRate(Settings):
    """How networks are trained at a rate that stays as it is."""

    batch_size: int = shared(_Training, "batch_size")
    momentum: float = shared(_Training, "momentum")
    nesterov: bool = shared(_Training, "nesterov")
    optimizer: str = shared(_Training, "optimizer")
    betas: tuple[float, float] = shared(_Training, "betas")
    eps: float = shared(_Training, "eps")
    weight_decay: float | None = shared(_Training, "weight_decay")
    clip: float | None = shared(_Training, "clip")


class _Plane(Settings):
    """Which networks the trainable ones are looked for among: their variances and depths."""

    activation: str = setting("tanh", choice(ACTIVATION_NAMES), "activation of every hidden layer")
    sigma_w2_low: float = setting(
        1.0, RATE, "the lowest σ_w² = fan_in · Var(W) that weights are drawn with"
    )
    sigma_w2_high: float = setting(4.0, RATE, "the highest")
    points: int = setting(16, integer(2, 1_000), "values of σ_w², evenly from lowest to highest")
    sigma_b2: float = setting(0.05, VARIANCE, "biases are drawn with the variance σ_b² = Var(b)")
    depths: tuple[int, ...] = setting(
        (5, 15, 30, 55, 100),
        several_whole(MAX_LAYERS),
        "hidden layers of the networks, between commas",
    )
    width: int = setting(100, integer(1, MAX_WIDTH), "units of each hidden layer")
    lrs: tuple[float, ...] = setting(
        (0.001,),
        listed(RATE, "learning rates between commas, none twice"),
        "learning rates, between commas: a picture for each",
    )
    updates: int = setting(300, integer(1, 1_000_000_000), "updates that each network has")


class TrainabilityConfig(_ConstantRate, Many, _Plane):
    """The settings of the trainable depth: networks of every σ_w² and depth under every seed.

    The learning rate stays as it is during the training.
    """

    seeds: int = setting(3, SEEDS, "networks of each σ_w², depth and rate, from other seeds")
    dataset: str = shared(_Untrained, "dataset")
    data_dir: Path | None = shared(_Untrained, "data_dir")
    normalize: str = shared(_Untrained, "normalize")
    eval_every: int = setting(100, integer(1), "iterations between looks at the accuracy")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "sigma_w2")
        if len(set(self.sigma_w2s)) < self.points:
            low, high = self.sigma_w2_low, self.sigma_w2_high
            raise SettingError(
                f"points must be so few that values of σ_w² from {low:g} to {high:g} differ in "
                f"their first 6 digits, not '{self.points}'"
            )
        try:
            parse_widths((self.width,) * max(self.depths))
        except ValueError:
            shape = format_widths((self.width,) * max(self.depths))
            raise invalid("width x depths", WIDTHS, shape) from None

    @property
    def sigma_w2s(self) -> tuple[float, ...]:
        """The values of σ_w², to 6 digits as they stand in the scheme's name."""
        low, step = self.sigma_w2_low, (self.sigma_w2_high - self.sigma_w2_low) / (self.points - 1)
        return tuple(float(f"{low + step * at:.6g}") for at in range(self.points))

    def init(self, sigma_w2: float) -> str:
        """The scheme of that place in the plane of the two variances."""
        return f"mean_field:sigma_w2={sigma_w2:g},sigma_b2={self.sigma_b2:g}"

    def network(
        self, sigma_w2: float, depth: int, lr: float, seed: int, *, epochs: int
    ) -> TrainConfig:
        """The settings of one of the networks; its updates are those of so many ``epochs``."""
        return training(
            self,
            init=self.init(sigma_w2),
            hidden=(self.width,) * depth,
            epochs=epochs,
            lr=lr,
            gamma=1.0,
            seed=seed,
            probe=0,
            log_model=False,
        )


class _Search(Settings):
    """What is searched for every scheme, and how."""

    inits: tuple[str, ...] = shared(_Grid, "inits")
    activation: str = shared(_One, "activation")
    trials: int = setting(30, integer(1, 1_000_000), "settings tried for each scheme")
    lr_low: float = setting(1e-3, RATE, "the lowest learning rate to try")
    lr_high: float = setting(1.0, RATE, "the highest")
    gamma_low: float = setting(0.5, DECAY, "the lowest gamma to try", only=STEPS)
    gamma_high: float = setting(1.0, DECAY, "the highest", only=STEPS)
    seeds: int = setting(5, SEEDS, "fresh seeds under which the best is tested")
    study: str | None = setting(
        None,
        or_word("auto", NAME),
        "name to go on under (auto: one that follows from the settings)",
    )
    storage: str | None = setting(
        None,
        or_word("auto", STORAGE),
        "where studies are kept: a journal's path or a database's URL (auto: beside MLflow's)",
    )
    sampler: str = setting("tpe", choice(SAMPLERS), "how the next setting is chosen")
    pruner: str = setting("median", choice(PRUNERS), "what ends hopeless trials early")
    batch: int = setting(
        5, integer(1, 10_000), "trials chosen and trained at once (1: each knows all before it)"
    )
    register: str | None = setting(
        None, or_word("none", NAME), "name in MLflow's model registry for the best models"
    )


class TuneConfig(Many, _Measured, _Training, Architecture, _Search):
    """The settings of tuning: a study of the learning rate and gamma for every scheme.

    ``lr`` and ``gamma`` are those of the untuned network, with which each study begins. With
    ``schedule=cosine`` there is no gamma to search.
    """

    lr: float = setting(0.1, RATE, "learning rate of the untuned network, tried first")
    gamma: float = setting(0.96, DECAY, "gamma of the untuned network, tried first", only=STEPS)
    validation: int | None = setting(
        None,
        or_word("auto", integer(1)),
        "training images held out to choose by (auto: a sixth, 10,000 of MNIST's)",
    )
    seed: int = setting(0, FIRST_SEED, "seed of the studies and trials; fresh ones follow it")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "gamma"):
            low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            if low > high:
                raise SettingError(
                    f"{name}_low must be at most {name}_high, not '{low:g}' with "
                    f"{name}_high={high:g}"
                )

    @property
    def kind(self) -> str:
        return self.kind_with(self.activation)

    def trial(self, init: str, lr: float, gamma: float | None, validation: int) -> TrainConfig:
        """The settings of a trial's network, which is not logged as a model."""
        chosen = {"lr": lr, "gamma": self.gamma if gamma is None else gamma}
        return training(self, init=init, validation=validation, log_model=False, **chosen)

    def final(
        self, init: str, lr: float, gamma: float | None, seed: int, *, log: bool = False
    ) -> TrainConfig:
        """The settings of a network that is tested, trained on all images."""
        chosen = {"lr": lr, "gamma": self.gamma if gamma is None else gamma, "seed": seed}
        return training(self, init=init, validation=0, log_model=log, **chosen)


class _Range(Settings):
    """A range of learning rates, for which schemes, in networks of which sizes."""

    inits: tuple[str, ...] = shared(_Grid, "inits")
    activation: str = shared(_One, "activation")
    lr_low: float = shared(_Search, "lr_low")
    lr_high: float = setting(10.0, RATE, "the highest")
    rates: int = setting(17, integer(2, 1_000), "rates in this range, at equal factors")
    updates: int = setting(300, integer(1, 1_000_000), "updates that each network is trained for")
    seeds: int = setting(3, SEEDS, "networks at each rate, each from another seed")
    over: str = setting(
        "none", choice(OVER), "sizes of networks to go over: none, or their depth or width"
    )
    depths: tuple[int, ...] = setting(
        (1, 2, 4, 8, 16),
        several_whole(MAX_LAYERS),
        "numbers of hidden layers of hidden's width, between commas",
        only=("over", ("depth",)),
    )
    widths: tuple[int, ...] = setting(
        (32, 64, 128, 256, 512),
        several_whole(MAX_WIDTH),
        "widths of as many hidden layers as hidden has, between commas",
        only=("over", ("width",)),
    )
    parametrizations: tuple[str, ...] = setting(
        ("standard",),
        listed(
            choice(PARAMETRIZATIONS),
            f"names between commas, none twice, of {', '.join(PARAMETRIZATIONS)}",
        ),
        "how rates and the output's weights go with the width, between commas",
    )


class RatesConfig(_ConstantRate, Many, _Untrained, _Range):
    """The settings of a range of learning rates: every rate for every scheme under every seed.

    At each the rate stays as it is throughout the training.
    """

    hidden: tuple[int, ...] = shared(_Training, "hidden")
    base_width: int = shared(_Training, "base_width")
    validation: int | None = shared(TuneConfig, "validation")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "lr")
        if self.over != "none" and len(set(self.hidden)) != 1:
            raise SettingError(
                f"hidden must be layers of one width with over={self.over}, such as 100 or 100x3, "
                f"not '{format_widths(self.hidden)}'"
            )
        if "mup" not in self.parametrizations and self.base_width != TrainConfig().base_width:
            raise SettingError(
                f"base_width={self.base_width} is for parametrizations=mup, not for "
                f"'{','.join(self.parametrizations)}'"
            )

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """The depths or widths that are gone over; None where it is none."""
        return {"depth": self.depths, "width": self.widths}.get(self.over, (None,))

    def hidden_of(self, size: int | None) -> tuple[int, ...]:
        """The hidden widths of the networks of this size."""
        if size is None:
            return self.hidden
        if self.over == "depth":
            return (self.hidden[0],) * size
        return (size,) * len(self.hidden)

    @property
    def range(self) -> tuple[float, ...]:
        """The rates, from the lowest to the highest, to six digits."""
        step = (self.lr_high / self.lr_low) ** (1 / (self.rates - 1))
        exact = [self.lr_low * step**at for at in range(self.rates - 1)]
        return tuple(dict.fromkeys(float(f"{lr:.6g}") for lr in [*exact, self.lr_high]))

    def network(
        self,
        init: str,
        parametrization: str,
        size: int | None,
        *,
        lr: float,
        seed: int,
        validation: int,
    ) -> TrainConfig:
        """The settings of one of the networks, whose signals and model are not kept."""
        base = self.base_width if parametrization == "mup" else TrainConfig().base_width
        return training(
            self,
            init=init,
            parametrization=parametrization,
            base_width=base,
            hidden=self.hidden_of(size),
            lr=lr,
            seed=seed,
            validation=validation,
            gamma=1.0,
            epochs=self.updates,  # as many as it may take
            eval_every=self.updates,
            probe=0,
            log_model=False,
        )


class VerifyConfig(Settings):
    """What of a run is to be another when it is trained again: by default nothing."""

    init: str | None = setting(
        None,
        or_word("recorded", TEXT),
        "its scheme by another name or place (recorded: as it was)",
    )
    dataset: str | None = setting(
        None,
        or_word("recorded", DATASET),
        "its data set by another name or place (recorded: as it was)",
    )
    model: str | None = setting(
        None,
        or_word("recorded", MODEL),
        "its model by another name or place (recorded: as it was)",
    )
    plugins_dir: Path | None = setting(
        None,
        or_word("recorded", FOLDER),
        "folder of plugins (recorded: the run's, where it is there)",
    )
    data_dir: Path | None = setting(
        None,
        or_word("recorded", FOLDER),
        "data folder (recorded: the run's, where it is there)",
    )
    device: str | None = setting(
        None, or_word("recorded", DEVICE), "where to train (recorded: where it was)"
    )

"""The reference experiments' claims, each measured and drawn: ``python docs/claims.py``.

Every claim is a function that measures it on real networks and the images it is given, and one
that draws what was measured. The figures go to ``docs/images/claims``; a line for each claim
says what was found. ``docs/claims.md`` is the page about them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)
from torch import Tensor

from initflow.core import machine
from initflow.core.configurations import TrainConfig
from initflow.diagnostics import measure
from initflow.diagnostics.signals import Signals
from initflow.initializers import plugins
from initflow.initializers.activations import ACTIVATIONS
from initflow.reporting.drawing import CYCLE, MARKS, log_scale, tidy
from initflow.training import datasets, model, trainer
from initflow.training.splits import Splits

FIGURES = Path(__file__).parent / "images" / "claims"
CHANCE = math.log(10)  # of ten classes
DPI = 110
SMOOTHED = 20  # iterations, in the curves of losses
STDS = tuple(10 ** (exponent / 4) for exponent in range(-14, 5))  # of weights, 0.0003 to 10
NAMES = {"tanh": "tanh", "sigmoid": "sigmoid", "relu": "ReLU", "leaky_relu": "leaky ReLU"}


# What is measured.


@dataclass(frozen=True)
class Course:
    """A training: each batch's loss, in nats, and at each of ``steps`` what it has come to.

    ``accuracies``: on the test images. ``signals``: on the probe. ``apart``: how far the first
    layer's units are from their mean unit, as a share of their size (0 where all are copies).
    ``negative``: the share of the first layer's units that receive nothing above 0 of any image.
    """

    losses: list[float]
    steps: list[int]
    accuracies: list[float]
    signals: list[Signals]
    apart: list[float]
    negative: list[float]

    @property
    def final_loss(self) -> float:
        """The mean over the last batches."""
        return float(np.mean(self.losses[-SMOOTHED:]))


@dataclass(frozen=True)
class Schemes:
    """Deep untrained networks and shallower trained ones, by scheme."""

    untrained: dict[str, Signals]
    trained: dict[str, Course]


@dataclass(frozen=True)
class Response:
    """What an activation function makes of pre-activations of standard deviation ``received``.

    ``saturated``: the share of the activations where its slope is below 5 % of its steepest.
    ``passed``: its mean square slope, as a share of the steepest one's: what is left of the
    gradient. ``bend``: the share of the activations' variance that no straight line explains.
    ``largest``: the largest activation.
    """

    received: float
    saturated: float
    passed: float
    bend: float
    largest: float


def network(config: TrainConfig, images: Splits) -> model.Parameters:
    """The untrained network of ``config``."""
    widths = datasets.widths(images.pixels, config.hidden, images.classes)
    scheme = plugins.find(config.init)
    return model.initialize(
        widths, scheme, ACTIVATIONS[config.activation], bias_init=config.bias_init, seed=config.seed
    )


def observe(
    config: TrainConfig, images: Splits, parameters: model.Parameters | None = None
) -> measure.Observation:
    """What passes through ``parameters``, by default the untrained network, on the probe."""
    probe = measure.probe(images.train, config.probe)
    parameters = parameters or network(config, images)
    (seen,) = measure.observe(parameters, [ACTIVATIONS[config.activation]], probe, keeping=True)
    return seen


def course(config: TrainConfig, images: Splits, steps: int) -> Course:
    """Train the network of ``config`` for ``steps`` iterations, as many epochs as they take."""
    parameters = network(config, images)
    epochs = math.ceil(steps / trainer.iterations(replace(config, epochs=1), len(images.train)))
    found = Course([], [], [], [], [], [])
    recipe = trainer.Recipe.of(replace(config, epochs=epochs))
    population = trainer.Trainer(parameters, [recipe], images.train)
    for checkpoint in population.train(batch_size=config.batch_size, eval_every=config.eval_every):
        seen = observe(config, images, parameters)
        (tested,) = measure.evaluate(parameters, [ACTIVATIONS[config.activation]], images.test)
        found.losses.extend(checkpoint.losses[0])
        found.steps.append(checkpoint.step)
        found.accuracies.append(tested.accuracy)
        found.signals.append(seen.signals)
        found.apart.append(_apart(parameters.weights[0][0]))
        found.negative.append((seen.preactivations[0] <= 0).all(0).double().mean().item())
        if checkpoint.step >= steps:
            break
    return found


def _apart(units: Tensor) -> float:
    """How far ``units`` (units, inputs) are from their mean, as a share of their size."""
    units = units.double()
    size = units.norm().item()
    return (units - units.mean(0)).norm().item() / size if size else 0.0


def symmetry(images: Splits, steps: int = 300) -> dict[str, Course]:
    """Equal weights with zero biases, with PyTorch's biases, and random weights."""
    networks = {
        "zero, zero biases": ("zero", "relu", "zeros"),
        "constant, zero biases": ("constant:value=0.01", "sigmoid", "zeros"),
        "zero, PyTorch's biases": ("zero", "relu", "pytorch"),
        "He, zero biases": ("he", "relu", "zeros"),
    }
    return {
        name: course(
            TrainConfig(init=init, activation=activation, bias_init=biases, eval_every=50),
            images,
            steps,
        )
        for name, (init, activation, biases) in networks.items()
    }


def growth(
    images: Splits, fans: Sequence[int] = (10, 30, 100, 300, 1_000)
) -> dict[str, dict[int, float]]:
    """Variance of the second layer's pre-activations, by scheme and the layer's fan-in."""

    def variance(init: str, fan_in: int) -> float:
        config = TrainConfig(init=init, activation="tanh", hidden=(fan_in, 300), bias_init="zeros")
        return observe(config, images).signals.layers["fc2"]["preactivation_variance"]

    schemes = {"unit normal": "normal", "LeCun": "lecun"}
    return {name: {n: variance(init, n) for n in fans} for name, init in schemes.items()}


def lecun(images: Splits) -> dict[str, Signals]:
    """LeCun's scheme through 20 layers, beside He's and PyTorch's default."""
    networks = {
        "LeCun, linear": ("lecun", "linear"),
        "LeCun, tanh": ("lecun", "tanh"),
        "LeCun, ReLU": ("lecun", "relu"),
        "PyTorch's default, linear": ("pytorch", "linear"),
        "He, linear": ("he", "linear"),
    }
    return _untrained(networks, images, depth=20, width=300)


def _untrained(
    networks: Mapping[str, tuple[str, str]], images: Splits, *, depth: int, width: int
) -> dict[str, Signals]:
    """Networks of zero biases, by name; each given as its scheme and activation."""
    return {
        name: observe(
            TrainConfig(
                init=init, activation=activation, hidden=(width,) * depth, bias_init="zeros"
            ),
            images,
        ).signals
        for name, (init, activation) in networks.items()
    }


def xavier(images: Splits, activation: str, steps: int = 600) -> Schemes:
    """20 untrained layers of 100 units; 3 of them trained as the tutorial trains its one."""
    schemes = {
        "Xavier": "xavier",
        "small normal, std 0.01": "random",
        "unit normal": "normal",
    }
    if activation == "sigmoid":
        schemes["Xavier, gain 4"] = "xavier:gain=4"
    named = {name: (init, activation) for name, init in schemes.items()}
    trained = {
        name: TrainConfig(init=init, activation=activation, hidden=(100,) * 3, eval_every=100)
        for name, init in schemes.items()
    }
    return Schemes(
        _untrained(named, images, depth=20, width=100),
        {name: course(config, images, steps) for name, config in trained.items()},
    )


def he(images: Splits) -> dict[str, Signals]:
    """30 layers of ReLU and of leaky ReLU under He, beside Xavier."""
    networks = {
        "He, ReLU": ("he", "relu"),
        "He, leaky ReLU": ("he:negative_slope=0.01", "leaky_relu"),
        "Xavier, ReLU": ("xavier", "relu"),
        "Xavier, leaky ReLU": ("xavier", "leaky_relu"),
    }
    return _untrained(networks, images, depth=30, width=300)


def responses(images: Splits, activations: Sequence[str]) -> dict[str, list[Response]]:
    """What activation functions make of one hidden layer's pre-activations, at growing weights."""
    return {
        NAMES[activation]: [_response(f"normal:std={std:.3g}", activation, images) for std in STDS]
        for activation in activations
    }


def _response(init: str, name: str, images: Splits) -> Response:
    activation = ACTIVATIONS[name]
    seen = observe(TrainConfig(init=init, activation=name, bias_init="zeros"), images)
    layer = seen.signals.layers["fc1"]
    received = seen.preactivations[0].double().flatten()
    made = activation.function(received)
    correlation = torch.corrcoef(torch.stack([received, made]))[0, 1].item()
    return Response(
        received=math.sqrt(layer["preactivation_variance"]),
        saturated=layer["saturated_fraction"],
        passed=activation.derivative(received).square().mean().item() / activation.steepest**2,
        bend=1 - correlation**2,
        largest=made.max().item(),
    )


def dying(
    images: Splits, rates: Sequence[float] = (0.1, 0.7), steps: int = 600
) -> dict[str, Course]:
    """ReLU and leaky ReLU under He, at a usual and at a large learning rate."""
    return {
        f"{NAMES[activation]}, learning rate {lr:g}": course(
            TrainConfig(init="he", activation=activation, lr=lr, eval_every=50), images, steps
        )
        for lr, activation in itertools.product(rates, ("relu", "leaky_relu"))
    }


def extremes(images: Splits) -> dict[str, Signals]:
    """20 layers of ReLU under normal weights, from far too small to far too large."""
    stds = {"0.01": "random", "0.05": "normal:std=0.05", "√(2/fan-in), He": "he"}
    stds |= {"0.4": "normal:std=0.4", "1": "normal"}
    networks = {f"std {std}": (init, "relu") for std, init in stds.items()}
    return _untrained(networks, images, depth=20, width=100)


def depth(
    images: Splits,
    he_rates: Sequence[float] = (0.003, 0.001, 0.01),
    xavier_rates: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1),
    steps: int = 600,
) -> dict[str, Course]:
    """30 layers of ReLU under He and under Xavier, each at several learning rates."""
    networks = [("He", "he", lr) for lr in he_rates]
    networks += [("Xavier", "xavier", lr) for lr in xavier_rates]
    return {
        f"{name}, learning rate {lr:g}": course(
            TrainConfig(init=init, lr=lr, hidden=(100,) * 30, eval_every=100), images, steps
        )
        for name, init, lr in networks
    }


def convergence(images: Splits, steps: int = 1_876) -> dict[str, Course]:
    """The assignment's four schemes, by its own settings, for two epochs of MNIST."""
    schemes = {
        "He": "he_uniform",
        "Xavier": "xavier_uniform",
        "small normal, std 0.01": "random",
        "zero": "zero",
    }
    assignment: dict[str, Any] = {
        "hidden": (128,),
        "batch_size": 64,
        "lr": 0.01,
        "momentum": 0.0,
        "gamma": 1.0,
        "bias_init": "zeros",
        "eval_every": 134,
    }
    return {
        name: course(TrainConfig(init=init, **assignment), images, steps)
        for name, init in schemes.items()
    }


# How it is drawn.


def blank(width: float, title: str) -> Figure:
    figure = Figure(figsize=(width, 3.9), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure


def line(axes: Axes, at: int, x: Sequence[float], y: Sequence[float], name: str) -> None:
    """Every second one is dashed and marked elsewhere, so that both are seen where two are one."""
    every = max(1, len(x) // 10)
    axes.plot(
        x,
        y,
        MARKS[at % len(MARKS)],
        linestyle="--" if at % 2 else "-",
        color=CYCLE[at % len(CYCLE)],
        markersize=4.5,
        linewidth=1.4,
        markevery=(every // 2 if at % 2 else 0, every),
        label=name,
    )


def _losses(axes: Axes, courses: Mapping[str, Course]) -> None:
    axes.axhline(CHANCE, color="black", linestyle=":", linewidth=1)
    right = axes.get_yaxis_transform()
    axes.text(1, CHANCE + 0.05, "chance: ln 10", transform=right, ha="right", fontsize=8)
    for at, (name, found) in enumerate(courses.items()):
        smooth = np.convolve(found.losses, np.full(SMOOTHED, 1 / SMOOTHED), "valid").tolist()
        line(axes, at, range(SMOOTHED, SMOOTHED + len(smooth)), smooth, name)
    axes.set(xlabel="iteration", ylabel=f"training loss (nats),\nmean of {SMOOTHED} batches")
    axes.set_ylim(0, min(max(axes.get_ylim()[1], 2.7), 4))
    tidy(axes)


def _over_steps(axes: Axes, courses: Mapping[str, Course], quantity: str, label: str) -> None:
    for at, (name, found) in enumerate(courses.items()):
        line(axes, at, found.steps, getattr(found, quantity), name)
    axes.set(xlabel="iteration", ylabel=label, ylim=(-0.03, 1.05))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    tidy(axes)


def through(axes: Axes, layers: Mapping[str, Signals], quantity: str, label: str) -> None:
    for at, (name, signals) in enumerate(layers.items()):
        hidden = signals.by_layer(quantity)[:-1]
        values = [math.nan if value is None else value for value in hidden]
        line(axes, at, range(1, len(values) + 1), values, name)
    axes.set(xlabel="hidden layer", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    log_scale(axes)
    tidy(axes)


def key(figure: Figure, columns: int = 4) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


SIGNAL = ("preactivation_second_moment", "mean square pre-activation")
GRADIENT = ("gradient_second_moment", "mean square gradient\nby the pre-activations")


def draw_layers(found: Mapping[str, Signals], title: str) -> Figure:
    """Signal on the left, gradient on the right, layer by layer."""
    figure = blank(10, title)
    forward, backward = figure.subplots(1, 2)
    through(forward, found, *SIGNAL)
    through(backward, found, *GRADIENT)
    key(figure, 5)
    return figure


def draw_schemes(found: Schemes, title: str) -> Figure:
    """The untrained gradient on the left, the training on the right."""
    figure = blank(10, title)
    untrained, trained = figure.subplots(1, 2)
    through(untrained, found.untrained, *GRADIENT)
    untrained.set_title("20 hidden layers, untrained", fontsize=10)
    _losses(trained, found.trained)
    trained.set_title("3 hidden layers, training", fontsize=10)
    key(figure)
    return figure


def draw_courses(found: Mapping[str, Course], title: str, quantity: str, label: str) -> Figure:
    """One quantity over the iterations on the left, the loss on the right."""
    figure = blank(10, title)
    left, right = figure.subplots(1, 2)
    _over_steps(left, found, quantity, label)
    _losses(right, found)
    key(figure, 3 if len(found) > 4 else 4)
    return figure


def draw_growth(found: Mapping[str, Mapping[int, float]], title: str) -> Figure:
    figure = blank(6.5, title)
    axes = figure.subplots()
    for at, (name, variances) in enumerate(found.items()):
        line(axes, at, list(variances), list(variances.values()), name)
    axes.set(xlabel="fan-in of the layer (inputs of a unit)", ylabel="variance of pre-activations")
    log_scale(axes)
    _plain_log(axes)
    tidy(axes)
    key(figure)
    return figure


def _plain_log(axes: Axes) -> None:
    """A logarithmic x axis that is labelled with plain numbers."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_responses(
    found: Mapping[str, Sequence[Response]], title: str, labels: Mapping[str, str]
) -> Figure:
    """Quantities of :class:`Response`, each with its label, by the size of what is received."""
    figure = blank(5 * max(len(labels), 1.3), title)
    for axes, (quantity, label) in zip(
        figure.subplots(1, len(labels), squeeze=False)[0], labels.items(), strict=True
    ):
        for at, (name, points) in enumerate(found.items()):
            received = [point.received for point in points]
            line(axes, at, received, [getattr(point, quantity) for point in points], name)
        axes.set(xlabel="standard deviation of the pre-activations", ylabel=label)
        _plain_log(axes)
        if quantity == "largest":
            log_scale(axes)
        else:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        tidy(axes)
    key(figure)
    return figure


# How it is said, in a line.


def say_layers(found: Mapping[str, Signals]) -> str:
    """What the mean squares are multiplied by, between the first and the last hidden layer."""
    said = []
    for name, signals in found.items():
        signal, gradient = (signals.by_layer(quantity)[:-1] for quantity, _ in (SIGNAL, GRADIENT))
        forward, backward = _ratio(signal[-1], signal[0]), _ratio(gradient[0], gradient[-1])
        said.append(f"{name}: signal ×{forward} forward, gradient ×{backward} backward")
    return "; ".join(said)


def _ratio(after: float | None, before: float | None) -> str:
    return f"{after / before:.2g}" if after is not None and before else "?"


def say_courses(found: Mapping[str, Course], quantity: str = "accuracies") -> str:
    """The final loss and test accuracy, and one more quantity."""
    return "; ".join(
        f"{name}: loss {course.final_loss:.3f}, test accuracy {course.accuracies[-1]:.1%}"
        + ("" if quantity == "accuracies" else f", {quantity} {getattr(course, quantity)[-1]:.2g}")
        for name, course in found.items()
    )


def say_schemes(found: Schemes) -> str:
    return f"{say_layers(found.untrained)}; trained, {say_courses(found.trained)}"


def say_growth(found: Mapping[str, Mapping[int, float]]) -> str:
    return "; ".join(
        f"{name}: " + ", ".join(f"{value:.3g} at {n}" for n, value in variances.items())
        for name, variances in found.items()
    )


def say_responses(found: Mapping[str, Sequence[Response]], quantities: Sequence[str]) -> str:
    """At pre-activations of a size near 0.1, 1, 10 and 100."""
    said = []
    for name, points in found.items():
        for size in (0.1, 1, 10, 100):
            at = min(points, key=lambda point: abs(math.log(point.received / size)))
            values = ", ".join(f"{quantity} {getattr(at, quantity):.3g}" for quantity in quantities)
            said.append(f"{name} at {at.received:.2g}: {values}")
    return "; ".join(said)


# The claims.

T = TypeVar("T")


@dataclass(frozen=True)
class Claim(Generic[T]):
    """A claim's ``title``, and how it is measured, drawn and said; the pixels it is shown on."""

    title: str
    measure: Callable[[Splits], T]
    draw: Callable[[T, str], Figure]
    say: Callable[[T], str]
    normalize: str = "unit"


draw_accuracy = functools.partial(draw_courses, quantity="accuracies", label="test accuracy")

CLAIMS: dict[str, Claim[Any]] = {
    "symmetry": Claim(
        "Units that start equal stay equal",
        symmetry,
        functools.partial(
            draw_courses,
            quantity="apart",
            label="distance of the units from their mean,\nas a share of their size",
        ),
        functools.partial(say_courses, quantity="apart"),
    ),
    "growth": Claim(
        "Under unit normal weights the variance grows with fan-in",
        growth,
        draw_growth,
        say_growth,
        "standard",
    ),
    "lecun": Claim(
        "LeCun keeps the variance of a linear layer constant",
        lecun,
        draw_layers,
        say_layers,
        "standard",
    ),
    "xavier_tanh": Claim(
        "Xavier suits tanh",
        functools.partial(xavier, activation="tanh"),
        draw_schemes,
        say_schemes,
    ),
    "xavier_sigmoid": Claim(
        "Xavier suits sigmoid, in shallow networks",
        functools.partial(xavier, activation="sigmoid"),
        draw_schemes,
        say_schemes,
    ),
    "he": Claim(
        "He keeps signal and gradient through ReLU and leaky ReLU",
        he,
        draw_layers,
        say_layers,
        "standard",
    ),
    "saturation": Claim(
        "Sigmoid and tanh saturate when the input variance is too large",
        functools.partial(responses, activations=("tanh", "sigmoid")),
        functools.partial(
            draw_responses,
            labels={
                "saturated": "saturated activations",
                "passed": "mean square slope,\nas a share of the steepest",
            },
        ),
        functools.partial(say_responses, quantities=("saturated", "passed")),
        "standard",
    ),
    "linearity": Claim(
        "Sigmoid and tanh are linear when the input variance is too small",
        functools.partial(responses, activations=("tanh", "sigmoid", "relu")),
        functools.partial(
            draw_responses,
            labels={"bend": "variance of the activations\nthat no straight line explains"},
        ),
        functools.partial(say_responses, quantities=("bend",)),
        "standard",
    ),
    "unbounded": Claim(
        "ReLU's outputs are unbounded",
        functools.partial(responses, activations=("tanh", "sigmoid", "relu", "leaky_relu")),
        functools.partial(draw_responses, labels={"largest": "largest activation"}),
        functools.partial(say_responses, quantities=("largest",)),
        "standard",
    ),
    "dying": Claim(
        "ReLU units die; leaky ReLU repairs that",
        dying,
        functools.partial(
            draw_courses, quantity="negative", label="units that are negative for every image"
        ),
        functools.partial(say_courses, quantity="negative"),
    ),
    "extremes": Claim(
        "Too-small weights make gradients vanish, too-large ones explode",
        extremes,
        draw_layers,
        say_layers,
        "standard",
    ),
    "convergence": Claim(
        "A proper scale converges faster",
        convergence,
        draw_accuracy,
        say_courses,
        "half",
    ),
    "depth": Claim(
        "At 30 layers of ReLU, He trains where Xavier stalls",
        depth,
        draw_accuracy,
        say_courses,
    ),
}


def main() -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    load = functools.cache(lambda normalize: datasets.load(TrainConfig(normalize=normalize)))
    with machine.threads(1):
        for name, claim in CLAIMS.items():
            found = claim.measure(load(claim.normalize))
            claim.draw(found, claim.title).savefig(FIGURES / f"{name}.png")
            print(f"{claim.title}: {claim.say(found)}.")


if __name__ == "__main__":
    main()

"""Claims about recurrent, convolutional and SELU networks: ``python -m docs.model_claims``.

Every claim is measured over ten seeds and, where it is about training, at each learning rate of a
grid that all schemes share, on all cores, which takes two of them an hour. The networks, and so
the numbers, are those of the commands in ``docs/claims.md``. The figures go to
``docs/images/claims``; some lines for each claim say what was found.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import mlflow
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

import initflow as inf
from docs import claims
from initflow.core import machine, workers
from initflow.core.configurations import CompareConfig, TrainConfig
from initflow.diagnostics import measure, networks, record
from initflow.diagnostics.signals import Signals
from initflow.experiments.populations.stacking import cell_of
from initflow.reporting import seed_statistics
from initflow.reporting.drawing import CYCLE, MARKS, log_scale, tidy
from initflow.reporting.formats import interval, percent
from initflow.reporting.seed_statistics import Cell, Outcome, Row
from initflow.reporting.sentences import comparison_sentences
from initflow.training import cache
from initflow.training.modules import ModuleNetwork

PIXELS = Path(__file__).with_name("pixels.py")
SEEDS = 10
CHANCE = 0.1  # of ten classes
BACK = 98  # time steps, half of those of the permuted pixels
APART = 1.05  # the factor between the marks of two schemes at one learning rate

Outcomes = dict[Cell, list[Outcome]]
Train = Callable[[Sequence[TrainConfig]], list[Outcome]]
ByRate = dict[float, Outcomes]


# What is measured.


def here(configs: Sequence[TrainConfig]) -> list[Outcome]:
    """What networks come to that are trained one after the other, each with one thread."""
    with machine.threads(1):
        return [_trained(config) for config in configs]


def by_workers(configs: Sequence[TrainConfig]) -> list[Outcome]:
    """The same, a process for each core."""
    left = list(enumerate(configs))[::-1]
    done: dict[int, Outcome] = {}
    with workers.worker_pool("local", os.cpu_count() or 1, 1) as pool:
        for (at, _), outcome in workers.results(
            pool, _trained_of, lambda: left.pop() if left else None
        ):
            if isinstance(outcome, workers.WorkerLostError):
                raise outcome
            done[at] = outcome
    return [done[at] for at in range(len(configs))]


def _trained_of(task: tuple[int, TrainConfig]) -> Outcome:
    return _trained(task[1])


def _trained(config: TrainConfig) -> Outcome:
    splits = cache.splits(config)
    scheme = cache.scheme(config.init, config.plugins_dir)
    one = record.start(replace(config, probe=0), scheme, splits)
    record.train_together([one], splits)
    curve = one.history.get("accuracy/test", [])
    return Outcome(config.seed, curve, one.diverged_at, len(splits.test))


def by_rate(rates: Sequence[float], train: Train, **settings: Any) -> ByRate:
    """What the networks of a comparison come to, at each learning rate."""
    return {rate: _outcomes(CompareConfig.of({"lr": rate, **settings}), train) for rate in rates}


def _outcomes(config: CompareConfig, train: Train) -> Outcomes:
    configs = [
        config.network(init, activation, seed)
        for seed in range(config.seed, config.seed + config.seeds)
        for activation in config.own_activations
        for init in config.inits
    ]
    found: Outcomes = {}
    for one, outcome in zip(configs, train(configs), strict=True):
        found.setdefault(cell_of(one), []).append(outcome)
    return found


ThroughTime = dict[str, dict[str, list[list[float]]]]


def through_time(
    train: Train,  # noqa: ARG001 - of all claims
    inits: Sequence[str] = ("orthogonal", "xavier", "he", "default"),
    seeds: int = SEEDS,
    **settings: Any,
) -> ThroughTime:
    """Mean square gradients by the hidden state at each time step, by network, scheme and seed."""
    given = {"hidden": "50", "dataset": f"{PIXELS}:permuted", "probe": 100, **settings}
    rnn = {"model": "rnn", "activation": "tanh"}
    of_networks: Mapping[str, Mapping[str, Any]] = {
        "RNN, tanh": rnn,
        "RNN, tanh, zero biases": {**rnn, "bias_init": "zeros"},
        "LSTM": {"model": "lstm"},
    }
    return {
        name: {
            init: [
                _gradients(TrainConfig.of({"init": init, "seed": seed, **given, **own}))
                for seed in range(seeds)
            ]
            for init in inits
        }
        for name, own in of_networks.items()
    }


def _gradients(config: TrainConfig) -> list[float]:
    splits = cache.splits(config)
    scheme = cache.scheme(config.init, config.plugins_dir)
    start = networks.initialize(config, scheme, splits)
    assert isinstance(start, ModuleNetwork)
    probe = measure.probe(splits.train, config.probe)
    signals = networks.Module(start, config, scheme).observe(probe).signals
    (by_time,) = signals.by_time.values()
    return [value or 0.0 for value in by_time["hidden_gradient_second_moment"]]


def a_step_back(gradients: Sequence[Sequence[float]]) -> float:
    """What a time step back multiplies the gradient's mean square by: the geometric mean.

    Over seeds, and over the later half of the steps, where it is never too small for a float.
    """
    logs = [
        math.log(series[len(series) // 2] / series[-1]) / (len(series) - 1 - len(series) // 2)
        for series in gradients
    ]
    return math.exp(sum(logs) / len(logs))


@dataclass(frozen=True)
class Panel:
    """Networks that differ by ``own`` settings from those of others, and their learning rates."""

    own: Mapping[str, Any]
    rates: Sequence[float]


RNN = {"model": "rnn", "activations": "tanh", "inits": "orthogonal,xavier,lecun,default"}
LSTM = {"model": "lstm", "inits": "orthogonal,xavier,default"}
RECURRENT = {
    "RNN, 28 rows": Panel(RNN, (0.003, 0.01, 0.03, 0.1)),
    "LSTM, 28 rows": Panel(LSTM, (0.1, 0.3)),
}


def recurrent(
    train: Train, panels: Mapping[str, Panel] = RECURRENT, **settings: Any
) -> dict[str, ByRate]:
    """Networks that read the rows of an image, or its pixels."""
    given = {"hidden": "50", "epochs": 1, "eval_every": 600, "seeds": SEEDS}
    return {
        name: by_rate(panel.rates, train, **given | dict(panel.own) | settings)
        for name, panel in panels.items()
    }


def convolutional(
    train: Train,
    depths: Sequence[int] = (4, 12, 24),
    rates: Sequence[float] = (0.01, 0.03),
    **settings: Any,
) -> dict[str, ByRate]:
    """Convolutional networks of so many layers, the last of them fully connected."""
    given = {
        "model": "cnn",
        "kernel": 3,
        "hidden": "none",
        "inits": "he,xavier,default",
        "activations": "relu",
        "dataset": f"{PIXELS}:small",
        "epochs": 3,
        "eval_every": 300,
        "seeds": SEEDS,
        **settings,
    }
    return {
        f"{depth} layers": by_rate(rates, train, channels=f"4,8x{depth - 2}", **given)
        for depth in depths
    }


@dataclass(frozen=True)
class Selu:
    """Untrained networks of one seed, and trained ones of several, by learning rate."""

    untrained: dict[str, Signals]
    trained: ByRate


def selu(
    train: Train,
    rates: Sequence[float] = (0.001, 0.003, 0.01),
    **settings: Any,
) -> Selu:
    """30 layers of SELU."""
    given = {
        "hidden": "100x30",
        "inits": "lecun,xavier,he",
        "activations": "selu",
        "normalize": "standard",
        "epochs": 1,
        "eval_every": 600,
        "seeds": SEEDS,
        **settings,
    }
    config = CompareConfig.of(given)
    untrained = {}
    for init in config.inits:
        network = replace(config.network(init, "selu", 0), bias_init="zeros")
        untrained[init] = claims.observe(network, cache.splits(network)).signals
    return Selu(untrained, by_rate(rates, train, **given))


@dataclass(frozen=True)
class Tuned:
    """Test accuracies of each scheme, untuned and with what its study found best, and in words."""

    untuned: list[Row]
    tuned: list[Row]
    rates: dict[str, float | None]
    sentences: list[str]


def tuned(
    train: Train,  # noqa: ARG001 - of all claims
    of_networks: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> dict[str, Tuned]:
    """A study of the learning rate for each scheme, in recurrent networks."""
    return {name: _tuned({**settings, **own}) for name, own in (of_networks or TUNED).items()}


TUNED: dict[str, dict[str, Any]] = {
    "28 rows": {"dataset": "mnist", "epochs": 1},
    "49 permuted pixels": {"dataset": f"{PIXELS}:coarse", "epochs": 4},
}


def _tuned(settings: Mapping[str, Any]) -> Tuned:
    given = {
        "model": "rnn",
        "activation": "tanh",
        "inits": "orthogonal,xavier,default",
        "hidden": "50",
        "eval_every": 100,
        "trials": 12,
        "lr": 0.01,
        "lr_low": 0.001,
        "lr_high": 0.1,
        "gamma": 1,
        "gamma_low": 1,
        "seeds": SEEDS,
        "probe": 0,
        "log_model": False,
        "workers": 2,
        **settings,
    }
    before = mlflow.get_tracking_uri()
    with tempfile.TemporaryDirectory() as folder:
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        try:
            found = inf.tune(storage=f"{folder}/studies", progress=False, **given)
        finally:
            mlflow.set_tracking_uri(before)
    return Tuned(
        [row.untuned for row in found.rows],
        [row.tested for row in found.rows],
        {row.cell.init: row.lr for row in found.rows},
        list(found.sentences),
    )


# How it is drawn.


def _marks(axes: Axes, at: int, x: Sequence[float], rows: Sequence[Row], label: str) -> None:
    """Means with their intervals."""
    means = [math.nan if row.mean is None else row.mean for row in rows]
    reach = [
        0.0 if row.high is None or row.mean is None else row.high - row.mean for row in rows
    ]  # as far down as up
    axes.errorbar(
        x,
        means,
        yerr=reach,
        marker=MARKS[at],
        color=CYCLE[at],
        markersize=5,
        linewidth=1.2,
        capsize=2.5,
        label=label,
    )


def _accuracies(axes: Axes, found: ByRate, inits: Sequence[str]) -> None:
    """By learning rate, the schemes side by side, each in the look of its place in ``inits``."""
    cells = list(dict.fromkeys(cell for outcomes in found.values() for cell in outcomes))
    for at, cell in enumerate(cells):
        (*rows,) = (_row(outcomes[cell], cell) for outcomes in found.values() if cell in outcomes)
        x = [rate for rate, outcomes in found.items() if cell in outcomes]
        moved = [rate * APART ** (at - (len(cells) - 1) / 2) for rate in x]
        _marks(axes, inits.index(cell.init), moved, rows, cell.init)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(found)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    _percent(axes)
    axes.set(xlabel="learning rate", ylabel="test accuracy")


def _schemes(found: Iterable[ByRate]) -> list[str]:
    """Those of the network that has most."""
    by_network = [
        list(dict.fromkeys(cell.init for outcomes in one.values() for cell in outcomes))
        for one in found
    ]
    return max(by_network, key=len)


def _row(outcomes: Sequence[Outcome], cell: Cell) -> Row:
    (row,) = seed_statistics.rows({cell: outcomes})
    return row


def _percent(axes: Axes) -> None:
    axes.axhline(CHANCE, color="black", linestyle=":", linewidth=1)
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    tidy(axes)


def draw_panels(found: Mapping[str, ByRate], title: str) -> Figure:
    """One for each network."""
    figure = claims.blank(2 + 3.2 * len(found), title)
    for axes, (name, of_network) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        _accuracies(axes, of_network, _schemes(found.values()))
        axes.set_title(name, fontsize=10)
    claims.key(figure)
    return figure


def draw_through_time(found: ThroughTime, title: str) -> Figure:
    """By the steps that the gradient has come back; the band is from the least to the largest."""
    figure = claims.blank(3.6 * len(found), title)
    for axes, (network, by_scheme) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        for at, (name, gradients) in enumerate(by_scheme.items()):
            back = [series[::-1] for series in gradients]
            steps = range(len(back[0]))
            shown = [[value / series[0] or math.nan for value in series] for series in back]
            middle = [sorted(values)[len(values) // 2] for values in zip(*shown, strict=True)]
            claims.line(axes, at, steps, middle, name)
            least, most = (
                [end(values) for values in zip(*shown, strict=True)] for end in (min, max)
            )
            axes.fill_between(steps, least, most, color=CYCLE[at], alpha=0.15, linewidth=0)
        axes.set(xlabel="time steps back")
        axes.set_title(network, fontsize=10)
        log_scale(axes)
        axes.set_ylim(1e-60, 1e6)
        tidy(axes)
    figure.axes[0].set_ylabel("mean square gradient by the hidden\nstate, beside the last step's")
    claims.key(figure)
    return figure


def draw_selu(found: Selu, title: str) -> Figure:
    """The untrained gradient on the left, accuracies on the right."""
    figure = claims.blank(10, title)
    untrained, trained = figure.subplots(1, 2)
    claims.through(untrained, found.untrained, *claims.GRADIENT)
    _accuracies(trained, found.trained, _schemes([found.trained]))
    claims.key(figure)
    return figure


def draw_tuned(found: Mapping[str, Tuned], title: str) -> Figure:
    """Two places for each network, before and after."""
    figure = claims.blank(3.2 * len(found) + 1, title)
    for axes, (name, of_network) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        rows = list(zip(of_network.untuned, of_network.tuned, strict=True))
        for at, (before, after) in enumerate(rows):
            apart = 0.06 * (at - (len(rows) - 1) / 2)
            _marks(axes, at, [apart, 1 + apart], [before, after], before.cell.init)
        axes.set(xlim=(-0.4, 1.4), xticks=[0, 1], xticklabels=["learning rate 0.01", "tuned"])
        axes.set_title(name, fontsize=10)
        _percent(axes)
    figure.axes[0].set_ylabel("test accuracy")
    claims.key(figure)
    return figure


# How it is said.


def say_by_rate(found: ByRate) -> str:
    said = []
    for rate, outcomes in found.items():
        rows = ", ".join(f"{row.cell.init} {_said(row)}" for row in seed_statistics.rows(outcomes))
        said.append(f"at {rate:g}: {rows}. {' '.join(comparison_sentences(outcomes))}")
    return "\n  ".join(said)


def say_panels(found: Mapping[str, ByRate]) -> str:
    return "\n".join(f"{name}\n  {say_by_rate(of)}" for name, of in found.items())


def say_through_time(found: ThroughTime) -> str:
    said = []
    for network, by_scheme in found.items():
        for name, gradients in by_scheme.items():
            left = [series[-1 - BACK] / series[-1] for series in gradients if len(series) > BACK]
            spread = f", {BACK} back {min(left):.1e} to {max(left):.1e}" if left else ""
            said.append(f"{network}, {name}: ×{a_step_back(gradients):.2g} a step back{spread}")
    return "\n  ".join(said)


def say_selu(found: Selu) -> str:
    return f"{claims.say_layers(found.untrained)}\n  {say_by_rate(found.trained)}"


def say_tuned(found: Mapping[str, Tuned]) -> str:
    said = []
    for name, of_network in found.items():
        rows = "; ".join(
            f"{before.cell.init} {_said(before)} untuned, {_said(after)} at "
            f"{of_network.rates[after.cell.init]:.3g}"
            for before, after in zip(of_network.untuned, of_network.tuned, strict=True)
        )
        said.append(f"{name}: {rows}. {' '.join(of_network.sentences)}")
    return "\n  ".join(said)


def _said(row: Row) -> str:
    return f"{percent(row.mean)} ({interval(row.low, row.high)})"


# The claims.

T = TypeVar("T")


@dataclass(frozen=True)
class Claim(Generic[T]):
    """A claim's ``title``, and how it is measured, drawn and said."""

    title: str
    measure: Callable[[Train], T]
    draw: Callable[[T, str], Figure]
    say: Callable[[T], str]


CLAIMS: dict[str, Claim[Any]] = {
    "through_time": Claim(
        "Orthogonal weights keep the gradient through time",
        through_time,
        draw_through_time,
        say_through_time,
    ),
    "recurrent": Claim(
        "Orthogonal initialization works better for RNN and LSTM",
        recurrent,
        draw_panels,
        say_panels,
    ),
    "tuned": Claim("A tuned learning rate takes the difference away", tuned, draw_tuned, say_tuned),
    "convolutional": Claim(
        "He suits deep convolutional networks with ReLU",
        convolutional,
        draw_panels,
        say_panels,
    ),
    "selu": Claim("LeCun suits SELU", selu, draw_selu, say_selu),
}


def main() -> None:
    claims.FIGURES.mkdir(parents=True, exist_ok=True)
    for name, claim in CLAIMS.items():
        found = claim.measure(by_workers)
        claim.draw(found, claim.title).savefig(claims.FIGURES / f"{name}.png")
        print(f"{claim.title}: {claim.say(found)}", flush=True)


if __name__ == "__main__":
    main()

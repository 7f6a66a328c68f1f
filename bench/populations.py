"""Many trainings at once: the tutorial's five networks under ten seeds, as stacks."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from bench import training
from initflow.core.configurations import TrainConfig
from initflow.diagnostics import measure
from initflow.experiments.populations import stacking
from initflow.training import datasets, model, trainer
from initflow.training.splits import Splits

TUTORIAL = (
    ("normal", "tanh"),
    ("pytorch", "tanh"),
    ("xavier", "tanh"),
    ("xavier", "relu"),
    ("he", "relu"),
)
SEEDS = 10
COMPARED = "normal,pytorch,lecun,xavier,he"  # with relu: as many networks, by the command


def configs(seeds: Sequence[int]) -> list[TrainConfig]:
    cells = itertools.product(seeds, TUTORIAL)
    return [
        replace(training.CONFIG, init=init, activation=activation, seed=seed)
        for seed, (init, activation) in cells
    ]


def trained(seeds: Sequence[int], splits: Splits) -> float:
    """Seconds for each of the tutorial's networks under ``seeds``, tested as often as the usual."""
    together = configs(seeds)
    started = time.perf_counter()
    for of_stack in stacking.stacks(together, splits.pixels, splits.classes, "cpu", None):
        recipes = [trainer.Recipe.of(config) for config in of_stack]
        starts = [training.start_of(splits, config) for config in of_stack]
        stack = model.Parameters.stack(starts, "cpu")
        stack_training = trainer.Trainer(stack, recipes, splits.train)
        checkpoints = stack_training.train(
            batch_size=training.CONFIG.batch_size, eval_every=training.CONFIG.eval_every
        )
        for checkpoint in checkpoints:
            for member in checkpoint.rates:
                activation = recipes[member].activation
                measure.evaluate(stack.member(member), [activation], splits.test)
    return (time.perf_counter() - started) / len(together)


class Round(NamedTuple):
    """Seconds of one training, the usual way, alone and in a stack."""

    usual: float
    alone: float
    stacked: float


def rounds() -> list[Round]:
    """The three in turn; the stacks of all rounds are the ten seeds."""
    splits = datasets.load(training.CONFIG)
    initial = training.start_of(splits)
    orders = [trainer.batch_order(len(splits.train), 0, e) for e in range(training.CONFIG.epochs)]
    found = []
    for seeds in (range(4), range(4, 7), range(7, SEEDS)):
        usual, _ = training.usual(initial.state(), orders)
        alone, _ = training.ours(initial, splits)
        found.append(Round(usual, alone, trained(seeds, splits)))
    return found


class Whole(NamedTuple):
    """Seconds of the command, of which training and logging; and of the usual script, each."""

    command: float
    training: float
    logging: float
    scripts: list[float]
    networks: int


def whole(environment: Mapping[str, str]) -> Whole:
    """`initflow compare` with fifty networks, between runs of the usual script."""
    scripts = [_seconds([sys.executable, "-m", "bench.script"], environment)[0]]
    found = command(environment, SEEDS)
    scripts += [_seconds([sys.executable, "-m", "bench.script"], environment)[0] for _ in range(2)]
    return found._replace(scripts=scripts)


def command(environment: Mapping[str, str], seeds: int, *options: str) -> Whole:
    """`initflow compare` of :data:`COMPARED` under so many ``seeds``, in a store of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["initflow", "compare", "--inits", COMPARED, "--activations", "relu"]
        store = {"MLFLOW_TRACKING_URI": f"sqlite:///{Path(folder)}/mlflow.db"}
        words = [*command, "--seeds", str(seeds), *options]
        seconds, said = _seconds(words, {**environment, **store}, folder)
    found = re.search(r"Trained (\d+) networks in ([\d.e+]+) s,.* took ([\d.e+]+) s", said)
    assert found, said
    return Whole(seconds, float(found[2]), float(found[3]), [], int(found[1]))


def _seconds(
    command: Sequence[str], environment: Mapping[str, str], folder: str | None = None
) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=dict(environment), check=True, capture_output=True, text=True
    )
    return time.perf_counter() - started, done.stdout

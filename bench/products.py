"""Our loop against its matrix products alone, in one fresh process: ``python -m bench.products``.

The products of one network, with their results in buffers, as PyTorch's own calls form them; and
the loop of the same updates, of one network alone and of ten in a stack, each with a seed and so
with batches of its own. In turn, so that all meet the same machine. Prints the seconds of each as
JSON, for 3,000 updates of a network.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from bench.training import CONFIG, start_of
from initflow.core import machine
from initflow.training import datasets, model, trainer
from initflow.training.splits import Splits

MEMBERS = 10
UPDATES, ALL = 200, 3_000  # timed in each turn, and of the tutorial's training
TURNS = 5


def products(widths: tuple[int, ...], batch: int) -> Callable[[], float]:
    """Seconds of the matrix products of the updates of one network, at each call."""
    cpu = torch.device("cpu")

    def drawn(*shape: int) -> torch.Tensor:
        return model.aligned(1, shape, cpu)[0].normal_()

    outputs = [drawn(batch, units) for units in widths]
    gradients = [drawn(batch, units) for units in widths]
    parameters, found = model.Parameters(widths), model.Parameters(widths)
    parameters.flat.normal_()

    def update() -> None:
        for layer in range(parameters.depth):
            weight, bias = parameters.weights[layer][0], parameters.biases[layer][0]
            torch.addmm(bias, outputs[layer], weight.T, out=outputs[layer + 1])
        for layer in reversed(range(parameters.depth)):
            gradient = gradients[layer + 1]
            torch.mm(gradient.T, outputs[layer], out=found.weights[layer][0])
            if layer:
                torch.mm(gradient, parameters.weights[layer][0], out=gradients[layer])

    def timed() -> float:
        outputs[0].normal_()
        for gradient in gradients:  # or they would grow from call to call
            gradient.normal_()
        for _ in range(UPDATES):  # until caches and clocks are as they stay
            update()
        started = time.perf_counter()
        for _ in range(UPDATES):
            update()
        return time.perf_counter() - started

    return timed


def loop(splits: Splits, members: int) -> Callable[[], float]:
    """Seconds of the updates of ``members`` networks, for each of them, at each call."""
    configs = [replace(CONFIG, seed=seed) for seed in range(members)]
    starts = [start_of(splits, config) for config in configs]
    recipes = [trainer.Recipe.of(config) for config in configs]

    def timed() -> float:
        stack = model.Parameters.stack(starts, "cpu")
        checkpoints = trainer.Trainer(stack, recipes, splits.train).train(
            batch_size=CONFIG.batch_size, eval_every=UPDATES, updates=2 * UPDATES
        )
        for _ in range(2):  # to the half: what is done once is behind it
            next(checkpoints)
        started = time.perf_counter()
        for _ in checkpoints:
            pass
        return (time.perf_counter() - started) / members

    return timed


def main() -> None:
    splits = datasets.load(CONFIG)
    widths = datasets.widths(splits.pixels, CONFIG.hidden, splits.classes)
    with machine.threads(int(sys.argv[1])):
        sides = {
            "products": products(widths, CONFIG.batch_size),
            "alone": loop(splits, 1),
            "stacked": loop(splits, MEMBERS),
        }
        turns = [{name: timed() for name, timed in sides.items()} for _ in range(TURNS)]
    scale = ALL / UPDATES
    seconds = {name: scale * statistics.median(turn[name] for turn in turns) for name in sides}
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()

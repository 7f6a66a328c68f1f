"""Training the tutorial's network: the DataLoader loop of the experiment against initflow's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from bench import reference
from initflow.core.configurations import TrainConfig
from initflow.diagnostics import measure
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.training import datasets, model, trainer
from initflow.training.splits import Splits

CONFIG = TrainConfig()  # the defaults are the tutorial's he: relu


def usual(state: dict[str, torch.Tensor], orders: list[torch.Tensor]) -> tuple[float, list[float]]:
    """Seconds and losses of torchvision's data set in a DataLoader, tested every 500 updates."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import MNIST
    from torchvision.transforms import ToTensor

    folder = datasets.data_dir(CONFIG.data_dir)
    images = MNIST(folder, train=True, transform=ToTensor())
    tested = DataLoader(MNIST(folder, train=False, transform=ToTensor()), CONFIG.batch_size)

    def test(network: nn.Module, iteration: int) -> None:
        if iteration % CONFIG.eval_every == 0:
            with torch.no_grad():
                for x, y in tested:
                    (network(x).argmax(1) == y).sum().item()

    started = time.perf_counter()
    losses, _ = reference.train(state, CONFIG.activation, images, orders, after_iteration=test)
    return time.perf_counter() - started, losses


def checkpoints(parameters: model.Parameters, splits: Splits) -> Iterator[trainer.Checkpoint]:
    """initflow's training, stopping where it is evaluated."""
    training = trainer.Trainer(parameters, [trainer.Recipe.of(CONFIG)], splits.train)
    return training.train(batch_size=CONFIG.batch_size, eval_every=CONFIG.eval_every)


def ours(initial: model.Parameters, splits: Splits) -> tuple[float, list[float]]:
    """Seconds and losses of initflow's loop on the same weights and batches, tested as often."""
    parameters = initial.copy_to("cpu")
    activation = ACTIVATIONS[CONFIG.activation]
    losses: list[float] = []
    started = time.perf_counter()
    for checkpoint in checkpoints(parameters, splits):
        measure.evaluate(parameters, [activation], splits.test)
        losses += checkpoint.losses[0]
    return time.perf_counter() - started, losses


def measured(initial: model.Parameters, splits: Splits) -> tuple[float, float, list[float]]:
    """Seconds of training, seconds of measuring the layers' signals meanwhile, and losses."""
    parameters = initial.copy_to("cpu")
    activation = ACTIVATIONS[CONFIG.activation]
    probe = measure.probe(splits.train, CONFIG.probe)
    losses: list[float] = []
    measuring = 0.0
    started = time.perf_counter()
    for checkpoint in checkpoints(parameters, splits):
        measure.evaluate(parameters, [activation], splits.test)
        losses += checkpoint.losses[0]
        paused = time.perf_counter()
        measure.observe(parameters, [activation], probe)
        measuring += time.perf_counter() - paused
    return time.perf_counter() - started - measuring, measuring, losses


def start_of(splits: Splits, config: TrainConfig = CONFIG) -> model.Parameters:
    """The network that both sides start from."""
    return model.initialize(
        datasets.widths(splits.pixels, config.hidden, splits.classes),
        find(config.init),
        ACTIVATIONS[config.activation],
        bias_init=config.bias_init,
        seed=config.seed,
    )


class Round(NamedTuple):
    """Seconds each way, what measuring the signals adds, and whether all losses agree."""

    usual: float
    ours: float
    measuring: float
    agree: bool


def rounds(n: int) -> list[Round]:
    splits = datasets.load(CONFIG)
    initial = start_of(splits)
    orders = [trainer.batch_order(len(splits.train), CONFIG.seed, e) for e in range(CONFIG.epochs)]
    results = []
    for _ in range(n):
        usual_seconds, expected = usual(initial.state(), orders)
        our_seconds, losses = ours(initial, splits)
        training, measuring, with_signals = measured(initial, splits)
        agree = losses == expected == with_signals
        results.append(Round(usual_seconds, our_seconds, measuring / training, agree))
    return results

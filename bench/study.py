"""A study of learning rate and gamma: as it is usually written, against `initflow tune`."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bench import reference, training
from initflow.training import datasets, trainer

TRIALS = 30
USUAL_TRIALS = 3  # of as many, by which the others are reckoned
OF_WORKERS = 40  # trials, for the workers' start not to weigh too much
HELD_OUT = 10_000


def usual() -> float:
    """Seconds a trial: Optuna, a DataLoader, a nested MLflow run each, metrics one by one."""
    import mlflow
    import optuna
    from torch.utils.data import DataLoader, Subset
    from torchvision.datasets import MNIST
    from torchvision.transforms import ToTensor

    config = training.CONFIG
    images = MNIST(datasets.data_dir(config.data_dir), train=True, transform=ToTensor())
    kept = Subset(images, range(len(images) - HELD_OUT))
    held_out = Subset(images, range(len(images) - HELD_OUT, len(images)))
    validation = DataLoader(held_out, config.batch_size)
    orders = [trainer.batch_order(len(kept), config.seed, epoch) for epoch in range(config.epochs)]
    state = training.start_of(datasets.load(config)).state()

    def objective(trial: Any) -> float:
        lr = trial.suggest_float("lr", 1e-3, 1, log=True)
        gamma = trial.suggest_float("gamma", 0.5, 1)
        accuracies = []

        def test(network: nn.Module, iteration: int) -> None:
            if iteration % config.eval_every:
                return
            right, loss = 0, 0.0
            with torch.no_grad():
                for x, y in validation:
                    logits = network(x)
                    loss += nn.functional.cross_entropy(logits, y, reduction="sum").item()
                    right += int((logits.argmax(1) == y).sum().item())
            accuracies.append(right / HELD_OUT)
            mlflow.log_metric("accuracy/validation", accuracies[-1], step=iteration)
            mlflow.log_metric("loss/validation", loss / HELD_OUT, step=iteration)
            trial.report(accuracies[-1], iteration)

        with mlflow.start_run(run_name=f"trial {trial.number}", nested=True):
            mlflow.log_params({"lr": lr, "gamma": gamma})
            losses, _ = reference.train(
                state, config.activation, kept, orders, lr=lr, gamma=gamma, after_iteration=test
            )
            mlflow.log_metric("loss/train", losses[-1])
        return max(accuracies)

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        with mlflow.start_run():
            study = optuna.create_study(
                direction="maximize", sampler=optuna.samplers.TPESampler(seed=0)
            )
            started = time.perf_counter()
            study.optimize(objective, n_trials=USUAL_TRIALS)
            return (time.perf_counter() - started) / USUAL_TRIALS


class Study(NamedTuple):
    """Seconds of all trials, and of all workers' time by what it went into."""

    trials: int
    seconds: float
    training: float
    studying: float
    logging: float


def ours(environment: Mapping[str, str], trials: int, *options: str) -> Study:
    """The command, whose trials are all trained to the end as the usual ones are."""
    with tempfile.TemporaryDirectory() as folder:
        store = {"MLFLOW_TRACKING_URI": f"sqlite:///{Path(folder)}/mlflow.db"}
        command = ["initflow", "tune", "--inits", "he", "--trials", str(trials)]
        command += ["--pruner", "none", "--seeds", "1", "--log-model", "false", *options]
        done = subprocess.run(
            command,
            cwd=folder,
            env={**environment, **store},
            check=True,
            capture_output=True,
            text=True,
        )
    number = r"([\d.e+]+) s"
    said = rf"The trials took {number};.* {number} went into training, {number} into Optuna and "
    found = re.search(rf"{said}{number} into MLflow", done.stdout)
    assert found, done.stdout
    return Study(trials, *map(float, found.groups()))

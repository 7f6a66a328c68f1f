"""Comparing and tuning convolutional networks: against scripts, and against the kernels alone.

``python -m bench.cnn script`` trains one as a user's script would, and prints the seconds of that
without the imports; ``python -m bench.cnn kernels`` those that its forwards, backwards and updates
take by themselves, on images that are there already.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench import study
from initflow.core.configurations import TrainConfig
from initflow.training import datasets, trainer

CONFIG = TrainConfig(model="cnn", lr=0.02)
SEEDS = 10
WORKERS = 2
IMAGES = 60_000
TESTED = 10_000
CHUNK = 1_000  # images tested at once
TRIALS = 6
TUNED = f"--model cnn --lr {CONFIG.lr} --workers {WORKERS} --batch {TRIALS // WORKERS}"
COMMAND = f"--model cnn --lr {CONFIG.lr} --inits he --activations relu --seeds {SEEDS}"


def network() -> nn.Sequential:
    """The command's, as plain PyTorch: LeNet's convolutions, and two layers."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(784, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def script() -> float:
    """Seconds of a training from a DataLoader by torch.optim, tested every 500 updates."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import MNIST
    from torchvision.transforms import ToTensor

    folder = datasets.data_dir(None)
    loader = DataLoader(MNIST(folder, train=True, transform=ToTensor()), 100, shuffle=True)
    tested = DataLoader(MNIST(folder, train=False, transform=ToTensor()), 100)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=CONFIG.lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, CONFIG.gamma)
    step, started = 0, time.perf_counter()
    for _ in range(CONFIG.epochs):
        for images, labels in loader:
            loss = functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            if step % CONFIG.eval_every == 0:
                with torch.no_grad():
                    sum((model(x).argmax(1) == y).sum().item() for x, y in tested)
        schedule.step()
    return time.perf_counter() - started


def kernels() -> float:
    """Seconds of as many forwards, backwards, updates and tests, on tensors that stay."""
    model = network()
    parameters = list(model.parameters())
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    images, labels = torch.rand(100, 1, 28, 28), torch.randint(10, (100,))
    tested = torch.rand(CHUNK, 1, 28, 28)
    updates = trainer.iterations(CONFIG, IMAGES)
    for n in (20, updates):  # the first ones set the kernels up
        started = time.perf_counter()
        for _ in range(n):
            _update(model, parameters, velocities, images, labels)
        with torch.no_grad():
            for _ in range((n // CONFIG.eval_every + 1) * TESTED // CHUNK):
                model(tested)
    return time.perf_counter() - started


def _update(
    model: nn.Module,
    parameters: list[nn.Parameter],
    velocities: list[Tensor],
    images: Tensor,
    labels: Tensor,
) -> None:
    loss = functional.cross_entropy(model(images), labels)
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, velocity, gradient in zip(parameters, velocities, gradients, strict=True):
            velocity.mul_(0.9).add_(gradient)
            parameter.add_(gradient.add_(velocity, alpha=0.9), alpha=-0.01)


class Round(NamedTuple):
    """Seconds of the whole command, and for a network of a script and of the kernels alone.

    ``loop`` are those of the script without its imports. The kernels are those of two processes at
    once, of one thread each, as the command has them. ``trial`` are those for a trial of a tuning.
    """

    command: float
    script: float
    loop: float
    kernels: float
    trial: float


def measured(environment: Mapping[str, str]) -> Round:
    scripts = [_script(environment)]
    with tempfile.TemporaryDirectory() as folder:
        store = {"MLFLOW_TRACKING_URI": f"sqlite:///{Path(folder)}/mlflow.db"}
        command = ["initflow", "compare", *COMMAND.split(), "--workers", str(WORKERS)]
        whole = _seconds(command, {**environment, **store}, folder)
    alone = {**environment, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.cnn", "kernels"],
            env=alone,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(WORKERS)
    ]
    took = [float(one.communicate()[0]) for one in running]
    trial = study.ours(environment, TRIALS, *TUNED.split()).seconds / TRIALS
    scripts.append(_script(environment))
    both, loops = zip(*scripts, strict=True)
    kernel = statistics.mean(took) / WORKERS
    return Round(whole, statistics.mean(both), statistics.mean(loops), kernel, trial)


def _script(environment: Mapping[str, str]) -> tuple[float, float]:
    """Seconds of a script, and of its loop."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "bench.cnn", "script"],
        env=dict(environment),
        check=True,
        capture_output=True,
        text=True,
    )
    return time.perf_counter() - started, float(done.stdout)


def _seconds(
    command: list[str], environment: Mapping[str, str], folder: str | None = None
) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env=dict(environment), check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    print({"script": script, "kernels": kernels}[sys.argv[1]]())

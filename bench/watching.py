"""Watching a training: what ``initflow.watch`` costs, and what histograms at every step cost."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import mlflow
import torch
from torch import Tensor, nn

import initflow

EVERY = 100  # steps
BINS = 64


def cnn() -> tuple[nn.Module, Tensor]:
    """A small CNN, and random images of MNIST's shape."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9216, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    return model, torch.randn(64, 1, 28, 28)


class Classifier(nn.Module):
    """A transformer encoder whose mean over the sequence is classified."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(128, 4, dim_feedforward=256, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, num_layers=2)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(x).mean(dim=1))
        return logits


def encoder() -> tuple[nn.Module, Tensor]:
    return Classifier(), torch.randn(32, 32, 128)


class Reader(nn.Module):
    """An LSTM whose last hidden state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(28, 256, num_layers=2, batch_first=True)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits


def lstm() -> tuple[nn.Module, Tensor]:
    """Images of MNIST's shape, row by row."""
    return Reader(), torch.randn(64, 28, 28)


MODELS = {"CNN": cnn, "transformer encoder": encoder, "LSTM": lstm}


@contextlib.contextmanager
def histograms(model: nn.Module) -> Iterator[None]:
    """Of every layer's output and every parameter's gradient, at every step, by plain hooks."""

    def of_output(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            torch.histc(output.detach(), BINS).tolist()

    def of_gradient(gradient: Tensor) -> None:
        torch.histc(gradient.detach(), BINS).tolist()

    leaves = [module for module in model.modules() if not list(module.children())]
    with contextlib.ExitStack() as hooks:
        for module in leaves:
            hooks.enter_context(module.register_forward_hook(of_output))
        for parameter in model.parameters():
            hooks.enter_context(parameter.register_hook(of_gradient))  # type: ignore[no-untyped-call]
        yield


class Block(NamedTuple):
    """Seconds of the same steps on each side."""

    bare: float
    watched: float
    histograms: float


class Training:
    """A training of its own, a step at a time."""

    def __init__(self, build: Callable[[], tuple[nn.Module, Tensor]]) -> None:
        torch.manual_seed(0)
        self.model, self._x = build()
        self._labels = torch.arange(len(self._x)) % 10
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def step(self) -> float:
        """Its seconds."""
        started = time.perf_counter()
        self._optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self._x), self._labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return time.perf_counter() - started


def blocks(build: Callable[[], tuple[nn.Module, Tensor]], n: int) -> list[Block]:
    """``n`` times: the seconds of as many steps as have one that is watched.

    The three train in turn, step by step, so that the machine's other work hits them alike.
    A first block is left out, in which torch and MLflow load what they need.
    """
    sides = [Training(build) for _ in range(3)]
    _, watched, hooked = sides
    found = []
    with (
        mlflow.start_run(),
        initflow.watch(watched.model, every=EVERY),
        histograms(hooked.model),
    ):
        for _ in range(n + 1):
            seconds = [0.0] * 3
            for step in range(EVERY):
                for side in (0, 1, 2) if step % 2 else (2, 1, 0):  # none is always first
                    seconds[side] += sides[side].step()
            found.append(Block(*seconds))
    return found[1:]


def rounds(n: int) -> dict[str, list[Block]]:
    """By model, ``n`` blocks of steps; MLflow writes into a new SQLite store."""
    before = mlflow.get_tracking_uri()
    with tempfile.TemporaryDirectory() as folder:
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        try:
            return {name: blocks(build, n) for name, build in MODELS.items()}
        finally:
            mlflow.set_tracking_uri(before)

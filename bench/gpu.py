"""Thousands of trainings on a GPU, against bounds in seconds: they are of one kind of machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from bench import populations
from initflow.core import machine
from initflow.diagnostics import record
from initflow.experiments.populations.stacking import stacks
from initflow.initializers.plugins import find
from initflow.training.splits import Splits

OF_LOOP = {1_000: 10.0, 4_000: 40.0}  # networks, and the seconds in which they are to be trained
COMPARED, OF_COMMAND = 1_000, 90.0  # networks of one command, and its seconds


class Trained(NamedTuple):
    """So many networks: seconds of training with the evaluations, and of making their weights."""

    networks: int
    training: float
    making: float


def device() -> str | None:
    """The GPU to measure on, if one is at hand."""
    return "cuda:0" if torch.cuda.is_available() else None


def trained(splits: Splits, where: str, seeds: Sequence[int]) -> Trained:
    """The tutorial's five networks under ``seeds``, evaluated every 500 updates."""
    configs = [replace(config, probe=0) for config in populations.configs(seeds)]
    there = splits.to(torch.device(where))
    training = making = 0.0
    for of_stack in stacks(configs, splits.pixels, splits.classes, where, None):
        began = time.perf_counter()
        records = [record.start(config, find(config.init), splits) for config in of_stack]
        started = time.perf_counter()
        record.train_together(records, there)  # ends with the weights on the CPU: nothing is left
        training, making = training + time.perf_counter() - started, making + started - began
    return Trained(len(configs), training, making)


def rounds(splits: Splits, where: str) -> Iterator[Trained]:
    """After a few networks, with which the device sets itself up."""
    with machine.threads(None):
        trained(splits, where, range(1))
        for networks in OF_LOOP:
            yield trained(splits, where, range(networks // len(populations.TUTORIAL)))


def compared(environment: Mapping[str, str]) -> populations.Whole:
    """`initflow compare` of :data:`COMPARED` networks, a run each."""
    schemes = populations.COMPARED.count(",") + 1
    return populations.command(environment, COMPARED // schemes, "--log-model", "best")

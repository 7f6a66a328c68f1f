"""What the terminal shows of a result; nothing here prints."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from rich.table import Table
from rich.text import Text

from initflow.config import TrainConfig
from initflow.experiment import Result


def closing_table(result: Result) -> Table:
    """Scheme, accuracy, time and run id of one training."""
    table = Table()
    table.add_column("scheme", overflow="fold")
    for column in ("test accuracy", "time", "run id"):
        table.add_column(column, no_wrap=True)
    accuracy = result.last("accuracy/test")
    shown = "not measured" if accuracy is None else f"{accuracy:.2%}"
    if result.diverged_at is not None:
        shown = f"diverged at {result.diverged_at:,}"
    seconds = f"{result.seconds:.2g} s" if result.seconds < 10 else f"{result.seconds:.0f} s"
    table.add_row(Text(result.scheme.spec), shown, seconds, result.run_id)
    return table


def next_command(config: TrainConfig, launcher: Sequence[str] = ()) -> str:
    """The same training under a scheme worth holding this one against."""
    other = "he" if config.activation not in ("tanh", "sigmoid") else "xavier"
    if config.init == other:
        other = "normal"
    return train_command(replace(config, init=other), launcher)


def train_command(config: TrainConfig, launcher: Sequence[str] = ()) -> str:
    """The command line that trains as ``config`` says; defaults are left out.

    It is an ``initflow train``, or an ``mlflow run`` where ``launcher`` has its options.
    """
    defaults = TrainConfig().as_text()
    chosen = {
        name: shlex.quote(text)
        for name, text in config.as_text().items()
        if text != defaults[name] or name == "init"
    }
    if launcher:
        parameters = (f"-P {name}={text}" for name, text in chosen.items())
        return " ".join(["mlflow run .", *map(shlex.quote, launcher), *parameters])
    options = (f"--{name.replace('_', '-')} {text}" for name, text in chosen.items())
    return " ".join(["initflow train", *options])

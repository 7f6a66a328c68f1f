"""The terminal: a console, a progress bar, and lines that are safe to print."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from initflow.core.progress import LOUD, Progress, bar

if TYPE_CHECKING:
    from rich.console import Console


WIDE = 140  # columns that tables may take where no terminal limits them


def widen(console: Console) -> None:
    """Give tables room where no terminal limits them."""
    if not console.is_terminal:
        console.width = max(console.width, WIDE)


@contextlib.contextmanager
def running(loading: str) -> Iterator[tuple[Console, Progress]]:
    """A console, and a bar on it that tells how far things are: first, that it is ``loading``."""
    from rich.console import Console

    quieten_libraries()
    console = Console()
    with bar(console, f"loading {loading}") as progress:
        yield console, progress


def say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(printable(line), highlight=False, markup=False, soft_wrap=True)


def quieten_libraries() -> None:
    """MLflow tells of every step of making its database, of what we tell, and of git's absence."""
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    ours = [] if click.get_current_context().find_root().meta.get("debug") else ["initflow"]
    for name in (*LOUD, "optuna", *ours):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def printable(line: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)

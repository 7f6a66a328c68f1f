"""What a command prints: its result, remarks on it, and a bar while it works.

The result goes to standard output, in words or, with ``--json``, as one JSON object and nothing
else. ``--quiet`` leaves out the bar and the remarks. Colours are for terminals: NO_COLOR turns them
off there, FORCE_COLOR on elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import click

from initflow.core.progress import LOUD, Progress, bar, is_warning, silent

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


Table = Callable[[int], "RenderableType"]  # how one is made, for a number of columns
WIDE = 140  # columns that tables may take where no terminal limits them


def asked(flag: str) -> bool:
    """Whether the command line has ``--debug``, ``--json`` or ``--quiet``."""
    return bool(click.get_current_context().find_root().meta.get(flag))


def for_people() -> bool:
    """Whether remarks are read: with ``--json`` a program reads, with ``--quiet`` nobody does."""
    return not (asked("json") or asked("quiet"))


def terminal() -> Console:
    """The terminal, or what stands in for it: standard error where standard output is JSON."""
    from rich.console import Console

    is_terminal = (sys.stderr if asked("json") else sys.stdout).isatty()
    colors: Literal["auto", "standard"] | None = None
    if not os.environ.get("NO_COLOR"):
        colors = "standard" if os.environ.get("FORCE_COLOR") and not is_terminal else "auto"
    # Said outright: rich takes FORCE_COLOR for a terminal, and would draw bars into files.
    shown = Console(stderr=asked("json"), force_terminal=is_terminal, color_system=colors)
    if not is_terminal:  # which would limit tables
        shown.width = max(shown.width, WIDE)
    return shown


@contextlib.contextmanager
def running(loading: str) -> Iterator[tuple[Console, Progress]]:
    """A console, and a bar on it that tells how far things are: first, that it is ``loading``."""
    quieten_libraries()
    shown = terminal()
    if asked("quiet"):
        yield shown, silent
        return
    with bar(shown, f"loading {loading}") as progress:
        yield shown, progress


def show(console: Console | None, as_json: Callable[[], object], *parts: str | Table) -> None:
    """Print a result: as JSON, or its ``parts`` in their order, sentences and tables.

    Only tables need a ``console``.
    """
    if asked("json"):
        from initflow.reporting.results import plain

        click.echo(json.dumps(plain(as_json()), indent=2, allow_nan=False))
        return
    for part in parts:
        if isinstance(part, str):
            say(part)
        elif console:
            console.print(part(console.width))


def remark(*lines: str) -> None:
    """Print what is no result, where somebody reads it: how to go on, where to look."""
    if for_people():
        say(*lines)


def say(*lines: str) -> None:
    for line in lines:
        click.echo(printable(line))


def quieten_libraries() -> None:
    """MLflow tells of every step of making its database, of what we tell, and of git's absence."""
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    ours = [] if asked("debug") else ["initflow"]
    for name in LOUD:
        logging.getLogger(name).addFilter(is_warning)
    for name in (*LOUD, "optuna", *ours):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def printable(line: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)

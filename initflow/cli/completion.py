"""Completion in a shell: of commands and options by click, and of values by what is valid here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import Field
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class
from click.shell_completion import shell_complete as click_answers

import initflow
from initflow.core.configurations import MODEL_NAMES, SCHEME_NAMES
from initflow.core.kinds import FOLDER, STORAGE, Kind
from initflow.errors import InitflowError, unknown
from initflow.initializers import finder

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_INITFLOW_COMPLETE"  # by which a shell's function asks
TABLES = Path(initflow.__file__).parent / "reporting" / "tables"
Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def script(shell: str) -> str:
    """The code that switches completion on in a ``shell``; an unknown one is a `SettingError`."""
    kind = get_completion_class(shell) if shell in SHELLS else None
    if kind is None:
        raise unknown("shell", shell, SHELLS)
    # Not its own source(), which starts a bash to look at its version.
    return ShellComplete.source(kind(click.Command("initflow"), {}, "initflow", VARIABLE))


def answer(cli: click.Command, instruction: str) -> int:
    """Print what a shell's function asks for by :data:`VARIABLE`; the exit code."""
    return click_answers(cli, {}, "initflow", VARIABLE, instruction)


def of_setting(setting: Field[Any]) -> Complete:
    """How the values of a ``setting`` are completed: of a list its last one."""
    kind: Kind = setting.metadata["kind"]

    def complete(
        context: click.Context, _: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",") if kind.is_list else ("", "", incomplete)
        chosen = before.split(",")
        names = [name for name in _names(setting.name, kind, context) if name not in chosen]
        found = [name for name in names if name.startswith(last)]
        if found:
            return [CompletionItem(f"{before}{comma}{name}") for name in found]
        if FOLDER.metavar in kind.metavar:
            return [CompletionItem(incomplete, type="dir")]
        of_files = "FILE" in kind.metavar or STORAGE.metavar in kind.metavar
        return [CompletionItem(incomplete, type="file")] if of_files else []

    return complete


def scheme(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Of an argument that is a scheme's name."""
    names = _offered(SCHEME_NAMES, finder.INITIALIZERS, context)
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def shell(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Of an argument that is a shell's name."""
    return [CompletionItem(name) for name in SHELLS if name.startswith(incomplete)]


def _names(setting: str, kind: Kind, context: click.Context) -> Iterable[str]:
    """Those that are valid here, among others."""
    if setting in ("init", "inits"):
        return _offered(SCHEME_NAMES, finder.INITIALIZERS, context)
    if setting == "model":
        return _offered(MODEL_NAMES, finder.MODELS, context)
    if setting == "table":
        return sorted(file.stem for file in TABLES.glob("*.toml"))
    return kind.names


def _offered(built_in: tuple[str, ...], group: finder.Group, context: click.Context) -> list[str]:
    """The built-in ones, and those of plugins that can be used."""
    given = context.params.get("plugins_dir")
    folder = None if given in (None, "none") else Path(str(given))
    with contextlib.suppress(InitflowError):  # a folder that is none
        plugins = finder.found(folder, group).values()
        return [*built_in, *(plugin.name for plugin in plugins if not plugin.problem)]
    return list(built_in)

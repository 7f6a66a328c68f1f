"""Options of the commands, made from their settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from initflow.cli import completion
from initflow.core.settings import Settings
from initflow.errors import did_you_mean

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Group(click.Group):
    """One that says of an unknown command which is nearest."""

    group_class = type

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not (name in self.commands or name.startswith("-") or ctx.resilient_parsing):
            hint = did_you_mean(name, self.commands)
            raise click.UsageError(f"No such command '{name}'{hint}", ctx)
        return super().resolve_command(ctx, args)


def _flag(name: str, help_text: str, *more: str) -> Callable[[Any], Any]:
    """An option that is the same everywhere: :func:`initflow.cli.console.asked` tells of it."""

    def remember(context: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            context.find_root().meta[name] = True

    return click.option(
        f"--{name}",
        *more,
        name,
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=remember,
        help=help_text,
    )


debug = _flag("debug", "Show the traceback of an error.")
quiet = _flag("quiet", "Print the result and errors alone.", "-q")
as_json = _flag("json", "Print the result as JSON, for programs.")


def options(settings: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """One option for each of the ``settings``, which read and check the text themselves."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for setting in reversed(fields(settings)):
            kind = setting.metadata["kind"]
            command = click.option(
                f"--{setting.name.replace('_', '-')}",
                setting.name,
                metavar=kind.metavar,
                default=kind.format(setting.default),
                show_default=True,
                shell_complete=completion.of_setting(setting),
                help=setting.metadata["meaning"][0].upper() + setting.metadata["meaning"][1:] + ".",
            )(command)
        return command

    return decorate


in_experiment = click.option(
    "--experiment",
    metavar="NAME",
    help="MLflow experiment.  [default: MLFLOW_EXPERIMENT_NAME or _ID, else initflow]",
)


def command(
    group: click.Group,
    *parts: Callable[[Any], Any],
    name: str | None = None,
    has_json: bool = True,
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function a command of ``group``, by the same name, with its arguments and options.

    ``has_json`` where its result is one that programs read.
    """
    flags = [*([as_json] if has_json else []), quiet, debug]

    def decorate(function: Callable[..., None]) -> click.Command:
        for part in reversed([*parts, *flags]):
            function = part(function)
        return group.command(name, context_settings=CONTEXT)(function)

    return decorate

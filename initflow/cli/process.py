"""The process of a command: its start, its signals, its line for an error, and its exit code."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import sys
import traceback
from io import TextIOWrapper
from types import FrameType
from typing import Any, NoReturn

import click

from initflow.cli import completion
from initflow.cli.commands import cli
from initflow.cli.console import for_people, printable
from initflow.errors import InitflowError, did_you_mean, naming_extras

# Who gives no arguments is shown the help, which before click 8.2 is no error.
NO_ARGUMENTS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())
# Signals that end the command, with the run closed on the way out.
STOPS = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}
if hasattr(signal, "SIGHUP"):  # not on Windows
    STOPS[signal.SIGHUP] = "Hung up"

TELLING = ("doctor", "sync")  # commands that tell themselves what waits for MLflow


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    A user's mistake ends with one line on standard error, and no traceback.
    """
    meta: dict[str, Any] = {}
    code = 0
    try:
        with cli.make_context(
            "initflow", list(sys.argv[1:] if arguments is None else arguments)
        ) as context:
            meta = context.meta
            with naming_extras("the command initflow"):
                _invoke(context)
    except click.exceptions.Exit as done:
        code = done.exit_code
    except NO_ARGUMENTS as error:
        error.show()
        code = error.exit_code
    except click.ClickException as error:
        code = _failed(_reason(error), error.exit_code)
    except InitflowError as error:
        if meta.get("debug"):
            traceback.print_exc()
        code = _failed(str(error), error.exit_code)
    except _Stopped as stop:
        code = _stopped(stop.number, stop)
    except (KeyboardInterrupt, click.Abort) as interruption:
        code = _stopped(signal.SIGINT, interruption)
    except BrokenPipeError:  # who read the output has gone
        code = 1
    except OSError as error:  # the output cannot be written
        code = _failed(str(error), 1)
    return code


def _invoke(context: click.Context) -> None:
    """Run the command, and tell what it could not send; to have lost some is an error."""
    try:
        cli.invoke(context)
    except BaseException:
        _tell_what_waits(send=False)
        raise
    _tell_what_waits(send=True)
    unsent = sys.modules.get("initflow.tracking.unsent")
    if unsent:
        unsent.check_kept()


def _tell_what_waits(*, send: bool) -> None:
    """What the command could not send to MLflow; ``send`` what others have left."""
    unsent = sys.modules.get("initflow.tracking.unsent")
    if unsent and click.get_current_context().invoked_subcommand not in TELLING:
        with contextlib.suppress(InitflowError):  # the command's own error is the one to tell
            for line in unsent.waiting_lines(send=send):
                click.echo(printable(line), err=not for_people())


def _reason(error: click.ClickException) -> str:
    """What was wrong on the command line; of an unknown option with the nearest one."""
    if isinstance(error, click.NoSuchOption) and error.ctx:
        options = [name for one in error.ctx.command.params for name in one.opts]
        hint = did_you_mean(error.option_name, options)
        return f"No such option '{error.option_name}'{hint}"
    return error.format_message()


def _failed(reason: str, code: int) -> int:
    """Say ``reason`` in one line, whatever characters a user's value brought into it."""
    click.echo(f"Error: {printable(reason)}", err=True)
    return code


class _Stopped(KeyboardInterrupt):
    """A signal other than Ctrl-C's arrived."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


def _stopped(number: signal.Signals, cause: BaseException) -> int:
    click.echo("; ".join([STOPS[number], *getattr(cause, "__notes__", [])]), err=True)
    return 128 + number


def _stop(number: int, _: FrameType | None) -> NoReturn:
    for stop in STOPS:  # a second one would cut off the closing of the run
        signal.signal(stop, signal.SIG_IGN)
    raise KeyboardInterrupt if number == signal.SIGINT else _Stopped(number)


def entry() -> NoReturn:
    """The process's entry point: ``main``, with a quick start and a quick end.

    Importing torch and mlflow makes a million objects and no garbage, which Python's
    collector would look through again and again, and once more on the way out: together
    some 3 of 13 s of a training of MNIST.
    """
    for stop in STOPS:
        signal.signal(stop, _stop)
    gc.set_threshold(100_000, 50, 100)
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, TextIOWrapper)]
    for stream in streams:  # a terminal may lack a letter of a name
        stream.reconfigure(errors="backslashreplace")
    asked = os.environ.get(completion.VARIABLE)
    code = completion.answer(cli, asked) if asked else main()
    atexit._run_exitfuncs()  # noqa: SLF001 - os._exit would leave them out
    for stream in streams:
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)

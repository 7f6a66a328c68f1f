"""The ``initflow`` command: the only module that prints or exits.

What is heavy (torch, mlflow, matplotlib) is imported by a command when it runs, so that
``--help`` and a wrong argument answer at once.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import logging
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from initflow import __version__
from initflow.core.config import (
    CompareConfig,
    DiagnoseConfig,
    NetworkConfig,
    PluginsConfig,
    ReproduceConfig,
    Settings,
    TrainConfig,
    TuneConfig,
    VerifyConfig,
)
from initflow.errors import (
    InitflowError,
    PluginError,
    ReplayError,
    TrackingError,
    VerdictError,
)

if TYPE_CHECKING:
    from rich.console import Console

    from initflow.experiments.failures import Failures

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
WIDE = 140  # columns that tables may take where no terminal limits them

# Signals that end the command, with the run closed on the way out.
STOPS = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}
if hasattr(signal, "SIGHUP"):  # not on Windows
    STOPS[signal.SIGHUP] = "Hung up"


def _remember_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().meta["debug"] = True


_debug = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_remember_debug,
    help="Show the traceback of an error.",
)


def _options(settings: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
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
                help=setting.metadata["meaning"][0].upper() + setting.metadata["meaning"][1:] + ".",
            )(command)
        return command

    return decorate


_experiment = click.option(
    "--experiment",
    metavar="NAME",
    help="MLflow experiment.  [default: MLFLOW_EXPERIMENT_NAME or _ID, else initflow]",
)


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="initflow", message="%(prog)s %(version)s")
@_debug
def cli() -> None:
    """How a network's weights start: train under any initialization scheme, tracked by MLflow.

    \b
    Example:
      initflow train --init he --dataset digits
    """


@cli.command(context_settings=CONTEXT)
@_options(TrainConfig)
@_experiment
@_debug
def train(experiment: str | None, **settings: str) -> None:
    """Train one network under one scheme, as one MLflow run.

    \b
    Examples:
      initflow train --init he
      initflow train --init normal:std=0.05 --activation tanh --hidden 300,100
    """
    config = TrainConfig(**settings)  # type: ignore[arg-type]  # it reads text

    with _progress("PyTorch and MLflow") as (console, progress):
        from initflow.cli import report
        from initflow.experiments import experiment as experiments

        _quieten_libraries()
        result = experiments.train_one(config, experiment=experiment, progress=progress)
    console.print(report.closing_table(result))
    following = report.next_command(config, result.run.launcher)
    if experiment:
        following += f" --experiment {shlex.quote(experiment)}"
    _say(console, experiments.outcome_sentence(result))
    if result.reading:
        _say(console, experiments.verdict_sentence(result.reading))
    _say(console, *filter(None, [result.remark]))
    _say(console, f"Next, hold it against: {following}")
    _finish(console, result.failures)


@cli.command(context_settings=CONTEXT)
@_options(DiagnoseConfig)
@_experiment
@_debug
def diagnose(experiment: str | None, **settings: str) -> None:
    """How signal and gradient travel through untrained networks, measured beside predicted.

    Every scheme with every activation, as one MLflow run with a nested run for each.

    \b
    Examples:
      initflow diagnose --depth 50
      initflow diagnose --inits xavier,he --activations relu --depth 30 --fail-on vanishing
    """
    config = DiagnoseConfig(**settings)  # type: ignore[arg-type]  # it reads text
    with _progress("PyTorch and MLflow") as (console, progress):
        from initflow.cli import report
        from initflow.experiments import diagnose as diagnoses

        _quieten_libraries()
        diagnosis = diagnoses.diagnose(config, experiment=experiment, progress=progress)
    _widen(console)
    console.print(report.diagnosis_table(diagnosis, console.width))
    _say(console, *report.advice_lines(diagnosis.readings), *filter(None, [diagnosis.remark]))
    _say(console, f"The figure and all numbers are in MLflow's run {diagnosis.run_id}.")
    error = None
    if diagnosis.failed:
        cells = "; ".join(
            f"{' '.join(cell)} is {reading.verdict}" for cell, reading in diagnosis.failed.items()
        )
        error = VerdictError(f"fail_on={','.join(config.fail_on or ())}: {cells}")
    _finish(console, diagnosis.failures, error)


@cli.command(context_settings=CONTEXT)
@_options(CompareConfig)
@_experiment
@_debug
def compare(experiment: str | None, **settings: str) -> None:
    """Train every scheme with every activation under several seeds, and say what differs.

    One MLflow run, with a nested run for each network; a report.html among its artifacts.

    \b
    Examples:
      initflow compare --inits normal,xavier,he --activations relu --seeds 10
      initflow compare --inits he,orthogonal --activations relu --hidden 100x10 --dataset digits
    """
    config = CompareConfig(**settings)  # type: ignore[arg-type]  # it reads text
    with _progress("PyTorch and MLflow") as (console, progress):
        from initflow.cli import report
        from initflow.experiments import compare as comparing
        from initflow.experiments import overview

        _quieten_libraries()
        _warn_of_one_seed(console, config.seeds)
        result = comparing.compare(config, experiment=experiment, progress=progress)
    _widen(console)
    console.print(report.comparison_table(result.rows, console.width))
    _say(console, *result.sentences)
    _say(console, *overview.closing_lines(result.population))
    _finish(console, result.population.failures, _of_networks(result.population.failed))


@cli.command(context_settings=CONTEXT)
@_options(TuneConfig)
@_experiment
@_debug
def tune(experiment: str | None, **settings: str) -> None:
    """Search learning rate and gamma for every scheme by equal budgets, and test the best once.

    A study of Optuna for each scheme, chosen by validation images; the same command goes on where
    it stopped. One MLflow run, with a nested run for each scheme and below it one for each trial.

    \b
    Examples:
      initflow tune --inits normal,xavier,he --activation relu --trials 30
      initflow tune --inits he,lecun --trials 100 --workers 4 --storage postgresql://me@host/optuna
    """
    config = TuneConfig(**settings)  # type: ignore[arg-type]  # it reads text
    with _progress("PyTorch, MLflow and Optuna") as (console, progress):
        from initflow.cli import report
        from initflow.experiments.tuning import tune as tuning

        _quieten_libraries()
        _warn_of_one_seed(console, config.seeds)
        result = tuning.tune(config, experiment=experiment, progress=progress)
    _widen(console)
    console.print(report.tuning_table(result.rows, console.width))
    _say(console, *result.sentences)
    _say(console, *tuning.closing_lines(result))
    _finish(console, result.failures, _of_networks(result.failed))


@cli.command(context_settings=CONTEXT)
@_options(ReproduceConfig)
@_experiment
@_debug
def reproduce(experiment: str | None, **settings: str) -> None:
    """Run a published table again under several seeds, and hold its numbers beside ours.

    \b
    Examples:
      initflow reproduce --table tutorial
      initflow reproduce --table assignment --seeds 3
    """
    config = ReproduceConfig(**settings)  # type: ignore[arg-type]  # it reads text
    with _progress("PyTorch and MLflow") as (console, progress):
        from initflow.cli import report
        from initflow.experiments import overview
        from initflow.experiments import reproduce as reproducing

        _quieten_libraries()
        _warn_of_one_seed(console, config.seeds)
        result = reproducing.reproduce(config, experiment=experiment, progress=progress)
    _widen(console)
    console.print(report.reproduction_table(result, console.width))
    _say(console, *result.sentences, *result.table.notes)
    _say(console, *overview.closing_lines(result.population))
    _finish(console, result.population.failures, _of_networks(result.population.failed))


@cli.command(context_settings=CONTEXT)
@click.argument("run_id", metavar="RUN_OR_FOLDER")
@_options(VerifyConfig)
@_debug
@click.pass_context
def verify(context: click.Context, /, run_id: str, **settings: str) -> None:
    """Train a run again from what it recorded alone, and compare it bit for bit.

    RUN_OR_FOLDER is the id of one network's run, or a folder that export wrote. The exit code is 0
    where it is identical, 3 where it is not but as near as rounding allows, and 1 where it differs.

    \b
    Examples:
      initflow verify 0123456789abcdef0123456789abcdef
      initflow verify he-on-mnist --data-dir /path/to/data
    """
    config = VerifyConfig(**settings)  # type: ignore[arg-type]  # it reads text
    with _progress("PyTorch and MLflow") as (console, progress):
        from initflow.cli import report
        from initflow.experiments import verify as verifying
        from initflow.experiments.replay import replay

        _quieten_libraries()
        result = verifying.verify(run_id, config, progress=progress)
    found = result.replay
    _widen(console)
    if found.differences:
        console.print(report.environment_table(found.differences, console.width))
        _say(console, *report.further_differences(found.differences))
    console.print(report.replay_table(found, console.width))
    said = replay.sentence(found, result.what)
    if found.verdict == replay.DIFFERENT:
        raise ReplayError(said)
    _say(console, said)
    context.exit(replay.EXIT_CODES[found.verdict])


@cli.command(context_settings=CONTEXT)
@click.argument("run_id", metavar="RUN")
@click.option(
    "--to",
    "folder",
    metavar="DIR",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to make; it must be empty or not there.",
)
@_debug
def export(run_id: str, folder: Path) -> None:
    """Write what it takes to verify a run, without access to MLflow, into a folder.

    \b
    Example:
      initflow export 0123456789abcdef0123456789abcdef --to he-on-mnist
    """
    with _progress("PyTorch and MLflow") as (console, _):
        from initflow.experiments import verify as verifying

        _quieten_libraries()
        following = verifying.export(run_id, folder)
    _say(console, f"Written: {folder}")
    _say(console, f"Next, try it: {following}")


def _finish(console: Console, failed: Failures, error: InitflowError | None = None) -> None:
    """Say where things are that nobody would look for in a clone, and raise what went wrong.

    In one line: ``error`` if there is one, and what ``failed`` besides.
    """
    from initflow.core import paths
    from initflow.experiments import failures
    from initflow.tracking import track

    if paths.in_clone():
        _say(
            console,
            f"This ran in a clone that MLflow made. Runs are kept in {track.shown()}; studies, "
            f"plugins of your own and files by relative paths are in {paths.home().resolve()}.",
        )
    if error:
        raise type(error)("; ".join([str(error), *failures.lines(failed)]))
    failures.check(failed)


def _warn_of_one_seed(console: Console, seeds: int) -> None:
    if seeds == 1:
        _say(console, "seeds=1: one seed shows no spread, so no interval is claimed.")


def _of_networks(failed: Mapping[str, str]) -> PluginError | None:
    """The error where some could not be trained."""
    if not failed:
        return None
    return PluginError(f"{len(failed)} of the networks failed: {', '.join(failed)}")


@cli.command(context_settings=CONTEXT)
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535))
@_debug
@click.pass_context
def ui(context: click.Context, port: int) -> None:
    """Serve MLflow's page of the runs, on this machine only, opened at the last comparison.

    \b
    Example:
      initflow ui --port 5001
    """
    with _progress("MLflow") as (console, _):
        from initflow.tracking import track

        _quieten_libraries()
        address = track.page(port)
    _say(console, f"MLflow's page: {address}")
    sys.stdout.flush()
    if track.is_served():
        return
    if console.is_terminal:
        threading.Thread(target=_open_when_up, args=[address], daemon=True).start()
    context.exit(track.serve(port))


def _open_when_up(address: str) -> None:
    """Open ``address`` in the user's browser, where there is a screen, when the page answers."""
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        return
    import urllib.request
    import webbrowser

    for _ in range(60):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address.partition("#")[0]).close()  # noqa: S310 - ours
            webbrowser.open(address)
            return
        time.sleep(1)


@cli.command(context_settings=CONTEXT)
@_debug
def sync() -> None:
    """Send to MLflow what it could not be sent when it was measured, as no server answered.

    In its order, from the outboxes of this machine, each to where it belongs; exit 1 if something
    is left.

    \b
    Example:
      initflow sync
    """
    with _progress("MLflow") as (console, progress):
        from initflow.tracking import track, unsent

        _quieten_libraries()
        done = unsent.sync(lambda sent, of: progress("sending", sent, of))
        track.close_left_open(everywhere=True)  # some of them may just have been made
    _say(console, "1 entry was sent." if done.sent == 1 else f"{done.sent:,} entries were sent.")
    if done.left:
        *lines, last = [line for left in done.left for line in unsent.left_lines(left)]
        _say(console, *lines)
        raise TrackingError(last)


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@cli.command(context_settings=CONTEXT)
@click.argument("name", required=False)
@_json
@_options(NetworkConfig)
@_debug
def schemes(name: str | None, as_json: bool, **settings: str) -> None:
    """What schemes there are, built in and from plugins; or one of them, on a network.

    \b
    Examples:
      initflow schemes
      initflow schemes he:mode=fan_out --hidden 300,100
    """
    config = NetworkConfig(**settings)  # type: ignore[arg-type]  # it reads text
    with _progress("PyTorch") as (console, _):
        from initflow.cli import report
        from initflow.diagnostics import catalogue

        found = [catalogue.filled(name, config)] if name else catalogue.entries(config)
    if as_json:
        values = [entry.as_json() for entry in found]
        click.echo(json.dumps(values[0] if name else values, indent=2))
        return
    _widen(console)
    if name:
        _say(console, *report.scheme_lines(found[0]))
        console.print(report.layers_table(found[0]))
    else:
        console.print(report.schemes_table(found))
        _say(console, *report.broken_lines(found))


@cli.group(context_settings=CONTEXT)
@_debug
def plugins() -> None:
    """Initializers of your own: list, check and start one.

    \b
    Example:
      initflow plugins list
    """


@plugins.command("list", context_settings=CONTEXT)
@_json
@_options(PluginsConfig)
@_debug
def list_plugins(as_json: bool, **settings: str) -> None:
    """What is found, from where; nothing is imported.

    \b
    Example:
      initflow plugins list --plugins-dir my-plugins
    """
    from initflow.initializers import finder

    plugins_dir = PluginsConfig(**settings).plugins_dir  # type: ignore[arg-type]  # it reads text
    found = list(finder.found(plugins_dir).values())
    if as_json:
        click.echo(json.dumps([plugin.as_json() for plugin in found], indent=2))
        return
    if not found:
        click.echo(f"No plugin is installed, and none is in '{finder.folder(plugins_dir)}'.")
        return
    titles = ("scheme", "distribution", "where")
    rows = [titles, *((plugin.name, plugin.provider, plugin.place) for plugin in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # without rich, which takes longer than finding them
        cells = map(str.ljust, map(_printable, row), widths)
        click.echo("  ".join(cells).rstrip())
    for plugin in found:
        if plugin.problem:
            click.echo(f"Broken: {_printable(plugin.problem)}")


@plugins.command(context_settings=CONTEXT)
@click.argument("name")
@_json
@_options(PluginsConfig)
@_debug
def check(name: str, as_json: bool, **settings: str) -> None:
    """Try an initializer against its contract; exit 1 if it breaks a rule.

    NAME is what init would be: a scheme's name, or file.py:function.

    \b
    Example:
      initflow plugins check he
    """
    plugins_dir = PluginsConfig(**settings).plugins_dir  # type: ignore[arg-type]  # it reads text
    with _progress("PyTorch") as (console, progress):
        from initflow import testing
        from initflow.cli import report

        rows = []
        for row in testing.check(name, plugins_dir):
            rows.append(row)
            progress(f"checked: {row.rule}", len(rows), len(testing.ALL_RULES))
    if as_json:
        click.echo(json.dumps([row.as_json() for row in rows], indent=2))
    else:
        _widen(console)
        console.print(report.check_table(rows))
        _say(console, *report.failure_lines(rows))
    broken = [row.rule for row in rows if not row.passed]
    if broken:
        raise PluginError(f"'{name}' breaks its contract: {', '.join(broken)}")
    if not as_json:
        _say(console, f"'{name}' keeps its contract.")


@plugins.command(context_settings=CONTEXT)
@click.argument("name")
@_options(PluginsConfig)
@_debug
def new(name: str, **settings: str) -> None:
    """Write a complete plugin that offers a scheme called NAME, to change into your own.

    \b
    Example:
      initflow plugins new mine
    """
    from initflow.initializers.finder import folder
    from initflow.initializers.scaffold import new as write

    plugins_dir = PluginsConfig(**settings).plugins_dir  # type: ignore[arg-type]  # it reads text
    place = write(name, folder(plugins_dir))
    click.echo(f"Written: {place}")
    option = f" --plugins-dir {shlex.quote(str(plugins_dir))}" if plugins_dir else ""
    click.echo(f"Next, try it: initflow plugins check {name}{option}")


def _widen(console: Console) -> None:
    """Give tables room where no terminal limits them."""
    if not console.is_terminal:
        console.width = max(console.width, WIDE)


@contextlib.contextmanager
def _progress(loading: str) -> Iterator[tuple[Console, Callable[[str, int, int], None]]]:
    """A console, and a bar on it that can be told how far things are."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(f"loading {loading}", total=None)
        yield (
            console,
            lambda what, done, of: bar.update(task, description=what, completed=done, total=of),
        )


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(_printable(line), highlight=False, markup=False, soft_wrap=True)


def _quieten_libraries() -> None:
    """MLflow tells of every step of making its database, and of what we tell: errors, addresses."""
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    ours = [] if click.get_current_context().find_root().meta.get("debug") else ["initflow"]
    for name in ("alembic", "mlflow.store.db.utils", "optuna", *ours):
        logging.getLogger(name).setLevel(logging.CRITICAL)


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
            _invoke(context)
    except click.exceptions.Exit as done:
        code = done.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except click.ClickException as error:
        code = _failed(error.format_message(), error.exit_code)
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
    if unsent and click.get_current_context().invoked_subcommand != "sync":
        with contextlib.suppress(InitflowError):  # the command's own error is the one to tell
            for line in unsent.waiting_lines(send=send):
                click.echo(_printable(line))


def _failed(reason: str, code: int) -> int:
    """Say ``reason`` in one line, whatever characters a user's value brought into it."""
    click.echo(f"Error: {_printable(reason)}", err=True)
    return code


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


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
    code = main()
    atexit._run_exitfuncs()  # noqa: SLF001 - os._exit would leave them out
    for stream in streams:
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)

"""The commands: each reads its options, calls the function of its name, and prints the result.

What is heavy (torch, mlflow, matplotlib) is imported by a command when it runs, so that
``--help`` and a wrong argument answer at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

import initflow
from initflow.cli.console import printable, running, say, widen
from initflow.cli.options import CONTEXT, as_json_option, command, debug, in_experiment, options
from initflow.core.configurations import (
    CompareConfig,
    DiagnoseConfig,
    NetworkConfig,
    PhaseConfig,
    PluginsConfig,
    RatesConfig,
    ReproduceConfig,
    TrainabilityConfig,
    TrainConfig,
    TuneConfig,
    VerifyConfig,
)
from initflow.errors import InitflowError, PluginError, ReplayError, TrackingError, VerdictError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from initflow.experiments.failures import Failures
    from initflow.experiments.results import TrackedResult


@click.group(context_settings=CONTEXT)
@click.version_option(initflow.__version__, prog_name="initflow", message="%(prog)s %(version)s")
@debug
def cli() -> None:
    """How a network's weights start: train under any initialization scheme, tracked by MLflow.

    \b
    Example:
      initflow train --init he --dataset digits
    """


@command(cli, options(TrainConfig), in_experiment)
def train(experiment: str | None, **settings: str) -> None:
    """Train one network under one scheme, as one MLflow run.

    \b
    Examples:
      initflow train --init he
      initflow train --init normal:std=0.05 --activation tanh --hidden 300,100
    """
    config = TrainConfig.of(settings)
    with running("PyTorch and MLflow") as (console, progress):
        from initflow.cli import tables

        result = initflow.train(config, experiment=experiment, progress=progress)
    console.print(tables.closing_table(result))
    following = tables.next_command(config, result.run.launcher)
    if experiment:
        following += f" --experiment {shlex.quote(experiment)}"
    say(console, *result.conclusions, f"Next, hold it against: {following}")
    _finish(console, result.failures)


@command(cli, options(DiagnoseConfig), in_experiment)
def diagnose(experiment: str | None, **settings: str) -> None:
    """How signal and gradient travel through untrained networks, measured beside predicted.

    Every scheme with every activation, as one MLflow run with a nested run for each.

    \b
    Examples:
      initflow diagnose --depth 50
      initflow diagnose --inits xavier,he --activations relu --depth 30 --fail-on vanishing
    """
    config = DiagnoseConfig.of(settings)
    with running("PyTorch and MLflow") as (console, progress):
        from initflow.cli import tables

        result = initflow.diagnose(config, experiment=experiment, progress=progress)
    widen(console)
    console.print(tables.diagnosis_table(result, console.width))
    say(console, *result.conclusions)
    say(console, f"The figure and all numbers are in MLflow's run {result.run_id}.")
    error = None
    if result.failed:
        cells = "; ".join(f"{cell} is {its.verdict}" for cell, its in result.failed.items())
        error = VerdictError(f"fail_on={','.join(config.fail_on or ())}: {cells}")
    _finish(console, result.failures, error)


@command(cli, options(PhaseConfig), as_json_option, in_experiment)
def phase(experiment: str | None, as_json: bool, **settings: str) -> None:
    """Where deep networks are stable: the plane of weight and bias variances of an activation.

    By theory alone, in seconds, as one MLflow run: the critical line, and schemes where they lie.

    \b
    Examples:
      initflow phase --activation tanh
      initflow phase --activation torch:erf --inits lecun,he --points 41
    """
    config = PhaseConfig.of(settings)
    with running("PyTorch and MLflow") as (console, progress):
        from initflow.cli import tables

        result = initflow.phase(config, experiment=experiment, progress=progress)
    closing = f"The figure and all numbers are in MLflow's run {result.run_id}."
    _show(
        console,
        result,
        lambda _: tables.phase_table(result.marks),
        as_json=as_json,
        closing=[closing],
    )


@command(cli, options(CompareConfig), in_experiment)
def compare(experiment: str | None, **settings: str) -> None:
    """Train every scheme with every activation under several seeds, and say what differs.

    One MLflow run, with a nested run for each network; a report.html among its artifacts.

    \b
    Examples:
      initflow compare --inits normal,xavier,he --activations relu --seeds 10
      initflow compare --inits he,orthogonal --activations relu --hidden 100x10 --dataset digits
    """
    _run_many("compare", CompareConfig.of(settings), experiment)


@command(cli, options(TuneConfig), in_experiment)
def tune(experiment: str | None, **settings: str) -> None:
    """Search learning rate and gamma for every scheme by equal budgets, and test the best once.

    A study of Optuna for each scheme, chosen by validation images; the same command goes on where
    it stopped. One MLflow run, with a nested run for each scheme and below it one for each trial.

    \b
    Examples:
      initflow tune --inits normal,xavier,he --activation relu --trials 30
      initflow tune --inits he,lecun --trials 100 --workers 4 --storage postgresql://me@host/optuna
    """
    _run_many("tune", TuneConfig.of(settings), experiment)


@command(cli, options(ReproduceConfig), in_experiment)
def reproduce(experiment: str | None, **settings: str) -> None:
    """Run a published table again under several seeds, and hold its numbers beside ours.

    \b
    Examples:
      initflow reproduce --table tutorial
      initflow reproduce --table assignment --seeds 3
    """
    _run_many("reproduce", ReproduceConfig.of(settings), experiment)


@command(cli, as_json_option, options(TrainabilityConfig), in_experiment)
def trainability(experiment: str | None, *, as_json: bool, **settings: str) -> None:
    """Up to which depth networks train, for each variance of their weights, beside theory.

    Networks of every σ_w² and depth, each with so many updates: one MLflow run, with a nested run
    for each network. The same command goes on where it was stopped.

    \b
    Examples:
      initflow trainability --workers 2
      initflow trainability --activation relu --lrs 0.01,0.001 --depths 5,10,20,40 --seeds 2
    """
    _run_many("trainability", TrainabilityConfig.of(settings), experiment, as_json=as_json)


@command(cli, as_json_option, options(RatesConfig), in_experiment)
def rates(experiment: str | None, as_json: bool, **settings: str) -> None:
    """Train every scheme at every learning rate of a range: what it bears, and what is best.

    Beside it is what theory says that it bears. Each rate is a network of its own, all trained at
    once; over=depth and over=width go over networks of several sizes. One MLflow run, with a nested
    run for each network.

    \b
    Examples:
      initflow rates --inits normal,xavier,he
      initflow rates --inits he --over width --hidden 100x3 --parametrizations standard,mup
    """
    _run_many("rates", RatesConfig.of(settings), experiment, as_json=as_json)


def _run_many(
    command: str,
    config: CompareConfig | TuneConfig | ReproduceConfig | TrainabilityConfig | RatesConfig,
    experiment: str | None,
    *,
    as_json: bool = False,
) -> None:
    """Run a ``command`` that trains many networks, and print what came of it."""
    with running("PyTorch, MLflow and Optuna" if command == "tune" else "PyTorch and MLflow") as (
        console,
        progress,
    ):
        from initflow.cli import tables

        if config.seeds == 1 and not as_json:
            say(console, "seeds=1: one seed shows no spread, so no interval is claimed.")
        from initflow.core import workers

        with workers.startable():
            result = getattr(initflow, command)(config, experiment=experiment, progress=progress)
    error = None
    if result.failed:
        names = ", ".join(result.failed)
        error = PluginError(f"{len(result.failed)} of the networks failed: {names}")
    _show(
        console,
        result,
        lambda columns: tables.TABLES[command](result, columns),
        as_json=as_json,
        closing=[] if as_json else result.closing_lines(),
        error=error,
    )


@command(cli, click.argument("run_id", metavar="RUN_OR_FOLDER"), options(VerifyConfig))
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
    config = VerifyConfig.of(settings)
    with running("PyTorch and MLflow") as (console, progress):
        from initflow.cli import tables
        from initflow.experiments.replay.retraining import DIFFERENT, EXIT_CODES

        result = initflow.verify(run_id, config, progress=progress)
    found = result.replay
    widen(console)
    if found.differences:
        console.print(tables.environment_table(found.differences, console.width))
        say(console, *tables.further_differences(found.differences))
    console.print(tables.replay_table(found, console.width))
    if result.verdict == DIFFERENT:
        raise ReplayError(" ".join(result.conclusions))
    say(console, *result.conclusions)
    context.exit(EXIT_CODES[result.verdict])


@command(
    cli,
    click.argument("run_id", metavar="RUN"),
    click.option(
        "--to",
        "folder",
        metavar="DIR",
        required=True,
        type=click.Path(path_type=Path),
        help="Folder to make; it must be empty or not there.",
    ),
)
def export(run_id: str, folder: Path) -> None:
    """Write what it takes to verify a run, without access to MLflow, into a folder.

    \b
    Example:
      initflow export 0123456789abcdef0123456789abcdef --to he-on-mnist
    """
    with running("PyTorch and MLflow") as (console, _):
        following = initflow.export(run_id, folder)
    say(console, f"Written: {folder}")
    say(console, f"Next, try it: {following}")


def _show(
    console: Console,
    result: TrackedResult,
    table: Callable[[int], Table],
    *,
    as_json: bool,
    closing: Sequence[str] = (),
    error: InitflowError | None = None,
) -> None:
    """Print a result: as JSON alone or else its table, which is given the columns, and sentences.

    ``closing`` are sentences behind its conclusions. What of it could not be made is an error, as
    is what went wrong besides.
    """
    if as_json:
        click.echo(json.dumps(result.as_json(), indent=2))
    else:
        widen(console)
        console.print(table(console.width))
        say(console, *result.conclusions, *closing)
    _finish(console, result.failures, error, quiet=as_json)


def _finish(
    console: Console,
    failed: Failures,
    error: InitflowError | None = None,
    *,
    quiet: bool = False,
) -> None:
    """Say where things are that nobody would look for in a clone, and raise what went wrong.

    In one line: ``error`` if there is one, and what ``failed`` besides. Nothing is said where it
    is ``quiet``.
    """
    from initflow.core import paths
    from initflow.experiments import failures
    from initflow.tracking import connection

    if paths.in_clone() and not quiet:
        say(
            console,
            f"This ran in a clone that MLflow made. Runs are kept in {connection.shown()}; "
            "studies, plugins of your own and files by relative paths are in "
            f"{paths.home().resolve()}.",
        )
    if error:
        raise type(error)("; ".join([str(error), *failures.lines(failed)]))
    failures.check(failed)


@command(
    cli, click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535))
)
@click.pass_context
def ui(context: click.Context, port: int) -> None:
    """Serve MLflow's page of the runs, on this machine only, opened at the last comparison.

    \b
    Example:
      initflow ui --port 5001
    """
    with running("MLflow") as (console, _):
        from initflow.tracking import connection, ui

        address = ui.page(port)
    say(console, f"MLflow's page: {address}")
    sys.stdout.flush()
    if connection.is_served():
        return
    if console.is_terminal:
        threading.Thread(target=_open_when_up, args=[address], daemon=True).start()
    context.exit(ui.serve(port))


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


@command(cli)
def sync() -> None:
    """Send to MLflow what it could not be sent when it was measured, as no server answered.

    In its order, from the outboxes of this machine, each to where it belongs; exit 1 if something
    is left.

    \b
    Example:
      initflow sync
    """
    with running("MLflow") as (console, progress):
        from initflow.tracking import runs, unsent

        done = unsent.sync(lambda sent, of: progress("sending", sent, of))
        runs.close_left_open(everywhere=True)  # some of them may just have been made
    say(console, "1 entry was sent." if done.sent == 1 else f"{done.sent:,} entries were sent.")
    if done.left:
        *lines, last = [line for left in done.left for line in unsent.left_lines(left)]
        say(console, *lines)
        raise TrackingError(last)


@command(cli, click.argument("name", required=False), as_json_option, options(NetworkConfig))
def schemes(name: str | None, as_json: bool, **settings: str) -> None:
    """What schemes there are, built in and from plugins; or one of them, on a network.

    \b
    Examples:
      initflow schemes
      initflow schemes he:mode=fan_out --hidden 300,100
    """
    config = NetworkConfig.of(settings)
    with running("PyTorch") as (console, _):
        from initflow.cli import tables
        from initflow.diagnostics import catalogue

        found = [catalogue.filled(name, config)] if name else catalogue.entries(config)
    if as_json:
        values = [entry.as_json() for entry in found]
        click.echo(json.dumps(values[0] if name else values, indent=2))
        return
    widen(console)
    if name:
        say(console, *tables.scheme_lines(found[0]))
        console.print(tables.layers_table(found[0]))
    else:
        console.print(tables.schemes_table(found))
        say(console, *tables.broken_lines(found))


@cli.group(context_settings=CONTEXT)
@debug
def plugins() -> None:
    """Initializers of your own: list, check and start one.

    \b
    Example:
      initflow plugins list
    """


@command(plugins, as_json_option, options(PluginsConfig), name="list")
def list_plugins(as_json: bool, **settings: str) -> None:
    """What is found, from where; nothing is imported.

    \b
    Example:
      initflow plugins list --plugins-dir my-plugins
    """
    from initflow.initializers import finder

    plugins_dir = PluginsConfig.of(settings).plugins_dir
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
        cells = map(str.ljust, map(printable, row), widths)
        click.echo("  ".join(cells).rstrip())
    for plugin in found:
        if plugin.problem:
            click.echo(f"Broken: {printable(plugin.problem)}")


@command(plugins, click.argument("name"), as_json_option, options(PluginsConfig))
def check(name: str, as_json: bool, **settings: str) -> None:
    """Try an initializer against its contract; exit 1 if it breaks a rule.

    NAME is what init would be: a scheme's name, or file.py:function.

    \b
    Example:
      initflow plugins check he
    """
    plugins_dir = PluginsConfig.of(settings).plugins_dir
    with running("PyTorch") as (console, progress):
        from initflow import testing
        from initflow.cli import tables

        rows = []
        for row in testing.check(name, plugins_dir):
            rows.append(row)
            progress(f"checked: {row.rule}", len(rows), len(testing.ALL_RULES))
    if as_json:
        click.echo(json.dumps([row.as_json() for row in rows], indent=2))
    else:
        widen(console)
        console.print(tables.check_table(rows))
        say(console, *tables.failure_lines(rows))
    broken = [row.rule for row in rows if not row.passed]
    if broken:
        raise PluginError(f"'{name}' breaks its contract: {', '.join(broken)}")
    if not as_json:
        say(console, f"'{name}' keeps its contract.")


@command(plugins, click.argument("name"), options(PluginsConfig))
def new(name: str, **settings: str) -> None:
    """Write a complete plugin that offers a scheme called NAME, to change into your own.

    \b
    Example:
      initflow plugins new mine
    """
    from initflow.initializers.finder import folder
    from initflow.initializers.scaffold import new as write

    plugins_dir = PluginsConfig.of(settings).plugins_dir
    place = write(name, folder(plugins_dir))
    click.echo(f"Written: {place}")
    option = f" --plugins-dir {shlex.quote(str(plugins_dir))}" if plugins_dir else ""
    click.echo(f"Next, try it: initflow plugins check {name}{option}")

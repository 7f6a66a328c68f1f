"""The commands: each reads its options, calls the function of its name, and prints the result.

What is heavy (torch, mlflow, matplotlib) is imported by a command when it runs, so that
``--help`` and a wrong argument answer at once.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

import initflow
from initflow.cli import completion
from initflow.cli.console import (
    Table,
    for_people,
    printable,
    quieten_libraries,
    remark,
    running,
    say,
    show,
)
from initflow.cli.options import (
    CONTEXT,
    Group,
    command,
    debug,
    in_experiment,
    options,
    quiet,
)
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
    from initflow.experiments.failures import Failures


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(initflow.__version__, prog_name="initflow", message="%(prog)s %(version)s")
@quiet
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
    show(console, result.as_json, lambda _: tables.closing_table(result), *result.conclusions)
    following = tables.next_command(config, result.run.launcher)
    if experiment:
        following += f" --experiment {shlex.quote(experiment)}"
    remark(f"Next, hold it against: {following}")
    _finish(result.failures)


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
    show(
        console,
        result.as_json,
        lambda columns: tables.diagnosis_table(result, columns),
        *result.conclusions,
    )
    remark(f"The figure and all numbers are in MLflow's run {result.run_id}.")
    error = None
    if result.failed:
        cells = "; ".join(f"{cell} is {its.verdict}" for cell, its in result.failed.items())
        error = VerdictError(f"fail_on={','.join(config.fail_on or ())}: {cells}")
    _finish(result.failures, error)


@command(cli, options(PhaseConfig), in_experiment)
def phase(experiment: str | None, **settings: str) -> None:
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
    show(console, result.as_json, lambda _: tables.phase_table(result.marks), *result.conclusions)
    remark(f"The figure and all numbers are in MLflow's run {result.run_id}.")
    _finish(result.failures)


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


@command(cli, options(TrainabilityConfig), in_experiment)
def trainability(experiment: str | None, **settings: str) -> None:
    """Up to which depth networks train, for each variance of their weights, beside theory.

    Networks of every σ_w² and depth, each with so many updates: one MLflow run, with a nested run
    for each network. The same command goes on where it was stopped.

    \b
    Examples:
      initflow trainability --workers 2
      initflow trainability --activation relu --lrs 0.01,0.001 --depths 5,10,20,40 --seeds 2
    """
    _run_many("trainability", TrainabilityConfig.of(settings), experiment)


@command(cli, options(RatesConfig), in_experiment)
def rates(experiment: str | None, **settings: str) -> None:
    """Train every scheme at every learning rate of a range: what it bears, and what is best.

    Beside it is what theory says that it bears. Each rate is a network of its own, all trained at
    once; over=depth and over=width go over networks of several sizes. One MLflow run, with a nested
    run for each network.

    \b
    Examples:
      initflow rates --inits normal,xavier,he
      initflow rates --inits he --over width --hidden 100x3 --parametrizations standard,mup
    """
    _run_many("rates", RatesConfig.of(settings), experiment)


def _run_many(
    command: str,
    config: CompareConfig | TuneConfig | ReproduceConfig | TrainabilityConfig | RatesConfig,
    experiment: str | None,
) -> None:
    """Run a ``command`` that trains many networks, and print what came of it."""
    with running("PyTorch, MLflow and Optuna" if command == "tune" else "PyTorch and MLflow") as (
        console,
        progress,
    ):
        from initflow.cli import tables

        if config.seeds == 1:
            remark("seeds=1: one seed shows no spread, so no interval is claimed.")
        from initflow.core import workers

        with workers.startable():
            result = getattr(initflow, command)(config, experiment=experiment, progress=progress)
    error = None
    if result.failed:
        names = ", ".join(result.failed)
        error = PluginError(f"{len(result.failed)} of the networks failed: {names}")
    show(
        console,
        result.as_json,
        lambda columns: tables.TABLES[command](result, columns),
        *result.conclusions,
    )
    if for_people():
        say(*result.closing_lines())
    _finish(result.failures, error)


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
    found, is_different = result.replay, result.verdict == DIFFERENT
    changed: list[str | Table] = [
        lambda columns: tables.environment_table(found.differences, columns),
        *tables.further_differences(found.differences),
    ]
    show(
        console,
        result.as_json,
        *(changed if found.differences else []),
        lambda columns: tables.replay_table(found, columns),
        *([] if is_different else result.conclusions),
    )
    if is_different:
        raise ReplayError(" ".join(result.conclusions))
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
    written = {"folder": str(folder), "verify": following}
    show(console, lambda: written, f"Written: {folder}")
    remark(f"Next, try it: {following}")


def _finish(failed: Failures, error: InitflowError | None = None) -> None:
    """Say where things are that nobody would look for in a clone, and raise what went wrong.

    In one line: ``error`` if there is one, and what ``failed`` besides.
    """
    from initflow.core import paths
    from initflow.experiments import failures
    from initflow.tracking import connection

    if paths.in_clone():
        remark(
            f"This ran in a clone that MLflow made. Runs are kept in {connection.shown()}; "
            "studies, plugins of your own and files by relative paths are in "
            f"{paths.home().resolve()}.",
        )
    if error:
        raise type(error)("; ".join([str(error), *failures.lines(failed)]))
    failures.check(failed)


@command(
    cli,
    click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535)),
    has_json=False,
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
    say(f"MLflow's page: {address}")
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
    sent = "1 entry was sent." if done.sent == 1 else f"{done.sent:,} entries were sent."
    *lines, last = [line for left in done.left for line in unsent.left_lines(left)] or [""]
    show(console, done.as_json, sent, *lines)
    if last:
        raise TrackingError(last)


@command(cli)
@click.pass_context
def doctor(context: click.Context) -> None:
    """What is there, what waits, what is missing and what is broken, to read and to report.

    Versions, devices, MLflow's server or store, plugins, data sets, folders; without passwords.
    Nothing is sent, and no store is made. Exit 1 if something is broken.

    \b
    Example:
      initflow doctor
    """
    from initflow.checkup import examination
    from initflow.cli import checklist

    quieten_libraries()
    found = examination.look()
    show(None, found.as_json, *checklist.lines(found))
    context.exit(1 if found.problems else 0)


@command(cli, click.argument("folder", metavar="DIR", type=click.Path(path_type=Path)))
def project(folder: Path) -> None:
    """Make DIR an MLflow Project of your own, which mlflow run takes like initflow's.

    It holds MLproject, conda.yaml with the pinned packages, and a folder of plugins.

    \b
    Example:
      initflow project my-project
    """
    from initflow.experiments import project

    itself = project.new(folder)
    place = shlex.quote(str(folder))
    command = f"mlflow run {place} --env-manager local --experiment-name initflow"
    command += f" -P init={project.PLUGIN} -P dataset=digits"
    show(None, lambda: {"folder": str(folder), "run": command}, f"Written: {folder}")
    if "file://" in itself:
        remark(
            f"Its environment takes initflow from {itself.partition(' @ ')[2]}: elsewhere, change "
            f"that in {folder / project.ENVIRONMENT}."
        )
    remark(f"Next, try it: {command}")


@command(
    cli,
    click.argument("name", required=False, shell_complete=completion.scheme),
    options(NetworkConfig),
)
def schemes(name: str | None, **settings: str) -> None:
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
    if name:
        (one,) = found
        show(
            console,
            one.as_json,
            *tables.scheme_lines(one),
            lambda _: tables.layers_table(one),
        )
    else:
        show(
            console,
            lambda: {"schemes": [entry.as_json() for entry in found]},
            lambda _: tables.schemes_table(found),
            *tables.broken_lines(found),
        )


@command(
    cli,
    click.argument("shell", shell_complete=completion.shell),
    has_json=False,
    name="completion",
)
def print_completion(shell: str) -> None:
    """Print the code that completes commands, options and their values in a shell.

    SHELL is bash, zsh or fish. In bash, it is switched on for good by a line in ~/.bashrc:
    eval "$(initflow completion bash)".

    \b
    Example:
      initflow completion zsh
    """
    click.echo(completion.script(shell))


@cli.group(context_settings=CONTEXT)
@quiet
@debug
def plugins() -> None:
    """Initializers of your own: list, check and start one.

    \b
    Example:
      initflow plugins list
    """


@command(plugins, options(PluginsConfig), name="list")
def list_plugins(**settings: str) -> None:
    """What is found, from where; nothing is imported.

    \b
    Example:
      initflow plugins list --plugins-dir my-plugins
    """
    from initflow.initializers import finder

    plugins_dir = PluginsConfig.of(settings).plugins_dir
    found = list(finder.found(plugins_dir).values())
    shown = ((plugin.name, plugin.provider, plugin.place) for plugin in found)
    rows = [("scheme", "distribution", "where"), *(tuple(map(printable, row)) for row in shown)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # Without rich, which takes longer than finding them.
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines += [f"Broken: {plugin.problem}" for plugin in found if plugin.problem]
    show(None, lambda: {"plugins": [plugin.as_json() for plugin in found]}, *lines)


@command(
    plugins,
    click.argument("name", shell_complete=completion.scheme),
    options(PluginsConfig),
)
def check(name: str, **settings: str) -> None:
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
    broken = [row.rule for row in rows if not row.passed]
    kept = [] if broken else [f"'{name}' keeps its contract."]
    show(
        console,
        lambda: {"name": name, "passed": not broken, "rules": [row.as_json() for row in rows]},
        lambda _: tables.check_table(rows),
        *tables.failure_lines(rows),
        *kept,
    )
    if broken:
        raise PluginError(f"'{name}' breaks its contract: {', '.join(broken)}")


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
    option = f" --plugins-dir {shlex.quote(str(plugins_dir))}" if plugins_dir else ""
    following = f"initflow plugins check {name}{option}"
    show(None, lambda: {"folder": str(place), "check": following}, f"Written: {place}")
    remark(f"Next, try it: {following}")

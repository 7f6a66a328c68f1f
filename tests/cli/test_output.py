"""What commands print, all of them alike: in words, quietly, as JSON, in colours or without."""

import functools
import json
import re
import shlex
import sys

import click
import mlflow
import pytest
from rich.table import Table

import initflow
from initflow.checkup import examination
from initflow.cli import console, process
from initflow.cli.commands import cli
from initflow.core import progress
from initflow.tracking import outbox, unsent
from tests.commands import WITH_A_RUN
from tests.conftest import ROOT, SMALL_TABLE

SMALL = "--dataset digits --probe 0 --log-model false --hidden 8 --epochs 1 --threads 1"
RANGE = "--dataset digits --updates 10 --seeds 1 --threads 1"
SMALL_WORK = {
    "train": SMALL,
    "diagnose": "--dataset digits --inits he --activations relu --depth 3 --width 8 --probe 50",
    "phase": "--points 3 --inits he",
    "compare": f"{SMALL} --inits he --activations relu --seeds 2",
    "trainability": f"{RANGE} --points 2 --depths 1,2 --width 8",
    "rates": f"{RANGE} --inits he --rates 2 --hidden 8",
    "tune": f"{SMALL} --inits he --trials 2 --batch 2 --seeds 2",
    "reproduce": "--table small.toml --seeds 2 --probe 0 --log-model false --threads 1",
    "verify": "RUN_ID",
    "export": "RUN_ID --to exported",
    "schemes": "--dataset digits",
    "schemes NAME": "he --dataset digits",
    "plugins list": "",
    "plugins check": "he",
    "plugins new": "mine",
    "project": "mine",
    "sync": "",
    "doctor": "",
}
# What each says besides its result, to those who read it.
REMARKS = {
    "train": "Next, hold it against: ",
    "diagnose": "The figure and all numbers are in ",
    "phase": "The figure and all numbers are in ",
    "compare": "Mean curves with bands: ",
    "trainability": "seeds=1: one seed shows no spread",
    "rates": "seeds=1: one seed shows no spread",
    "tune": "The run of this tuning: ",
    "reproduce": "Mean curves with bands: ",
    "export": "Next, try it: ",
    "plugins new": "Next, try it: ",
    "project": "Next, try it: ",
}
WITHOUT_JSON = {"ui", "completion"}


def documented():
    """The fields of each command's JSON, by the table of the page."""
    page = (ROOT / "docs" / "terminal.md").read_text()
    table = page.partition("| command | fields |\n")[2].partition("\n\n")[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()[1:]]
    return {
        command: re.findall(r"`(.+?)`", fields)
        for commands, fields in rows
        for command in re.findall(r"`(.+?)`", commands)
    }


@pytest.fixture(scope="module")
def ask(tracked):
    """Runs a command with more options; what takes time is done once for all tests."""
    done = {}
    (tracked / "small.toml").write_text(SMALL_TABLE)
    with pytest.MonkeyPatch.context() as patch:

        def once(name, function):
            def kept(*arguments, **options):
                if name not in done:
                    done[name] = function(*arguments, **options)
                return done[name]

            patch.setattr(initflow, name, kept)

        for name in (*WITH_A_RUN, "export"):
            once(name, getattr(initflow, name))
        patch.setattr(examination, "look", functools.cache(examination.look))
        patch.setattr("initflow.initializers.scaffold.new", lambda name, folder: folder / name)
        patch.setattr("initflow.experiments.project.new", lambda _: "initflow==1.0")
        rules = list(initflow.testing.check("he", None))
        patch.setattr(initflow.testing, "check", lambda *_: rules)

        def run(capsys, name, *options):
            if "train" not in done and "RUN_ID" in SMALL_WORK[name]:
                process.main(["train", "--quiet", *shlex.split(SMALL)])
                capsys.readouterr()
            words = SMALL_WORK[name].replace("RUN_ID", done["train"].run_id if done else "")
            code = process.main(
                [*name.removesuffix(" NAME").split(), *shlex.split(words), *options]
            )
            return code, *capsys.readouterr()

        yield run


def no_number(text):
    raise AssertionError(f"{text} is no JSON")


def all_commands(group, *above):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from all_commands(command, *above, name)
        else:
            yield " ".join((*above, name)), command


def test_every_command_is_tried_here_and_has_the_same_options():
    """Those that programs read print JSON."""
    names = {name for name, _ in all_commands(cli)}
    assert {name.removesuffix(" NAME") for name in SMALL_WORK} | WITHOUT_JSON >= names
    for name, command in all_commands(cli):
        options = {option for one in command.params for option in one.opts}
        assert {"--quiet", "-q", "--debug"} <= options
        assert ("--json" in options) == (name not in WITHOUT_JSON)


@pytest.mark.parametrize("name", SMALL_WORK)
def test_a_command_prints_one_json_object_and_nothing_else(capsys, ask, name):
    """With the fields that are documented; what is in a run is there."""
    code, out, err = ask(capsys, name, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out, parse_constant=no_number)
    assert list(told) == documented()[name]
    if "run_id" in told:
        assert mlflow.get_run(told["run_id"]).info.status == "FINISHED"
        assert (
            told["settings"].items() >= {"inits": "he"}.items() or "inits" not in told["settings"]
        )
    if "numbers" in told:
        assert told["numbers"]


@pytest.mark.parametrize("name", SMALL_WORK)
def test_a_quiet_command_prints_its_result_alone(capsys, ask, name):
    """The same words without the remarks, which are there by default."""
    code, out, err = ask(capsys, name)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    quiet = ask(capsys, name, "-q")
    assert (quiet[0], quiet[2]) == (0, "")
    assert quiet[1].strip()
    remark = REMARKS.get(name)
    if remark:
        assert remark in out
        assert remark not in quiet[1]
    assert set(quiet[1].splitlines()) <= set(out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["train", "--lr", "abc"], 2),
        (["schemes", "hee"], 2),
        (["tarin"], 2),
        (["schemes", "json:no_such_function"], 1),
        (["plugins", "list", "--plugins-dir", "nowhere"], 2),
    ],
)
def test_an_error_is_one_line_on_standard_error_with_json_too(capsys, tracked, arguments, code):
    """Nothing is printed that a program could take for a result."""
    assert process.main([*arguments, "--json"]) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("Error: ")


def test_what_is_no_success_has_its_object_too(capsys, ask, monkeypatch):
    """And an exit code that tells it."""
    ask(capsys, "compare", "-q")
    result = initflow.compare()
    monkeypatch.setattr(result, "failed", {"he relu seed 1": "no [reason]"})
    code, out, err = ask(capsys, "compare", "--json")
    assert (code, json.loads(out)["failed"]) == (1, {"he relu seed 1": "no [reason]"})
    assert err == "Error: 1 of the networks failed: he relu seed 1\n"


def test_what_waits_for_mlflow_is_beside_the_object(capsys, ask, monkeypatch):
    """On standard error, as it is no part of the result."""
    monkeypatch.setattr(unsent, "waiting_lines", lambda **_: iter(["2 entries wait."]))
    for option, told in ((), 0), (("--json",), 1), (("-q",), 1):
        _, *printed = ask(capsys, "plugins list", *option)
        assert printed[told].endswith("2 entries wait.\n")


def test_what_is_left_to_send_is_told(capsys, tracked, monkeypatch):
    """In words and as JSON, with exit code 1."""
    left = outbox.Left(tracked / "a.outbox", "http://127.0.0.1:1", 2, 0, "away")
    monkeypatch.setattr(unsent, "sync", lambda *_, **__: unsent.Synced(3, [left]))
    assert process.main(["sync", "--json"]) == 1
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["sent"], told["left"][0]["waiting"]) == (3, 2)
    assert told["left"][0]["path"] == str(tracked / "a.outbox")
    assert err.startswith("Error: 2 entries wait in ")


STYLE = re.compile(r"\x1b\[[\d;]*m")


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize(
    ("variables", "colored"),
    [
        ({}, None),  # as it is a terminal
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, None),
        ({"FORCE_COLOR": "1"}, True),
        ({"FORCE_COLOR": ""}, None),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
    ids=str,
)
def test_colours_are_for_terminals_or_as_variables_say(
    capsys, monkeypatch, is_terminal, variables, colored
):
    """Only a terminal gets a bar, and has a width of its own."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", "COLUMNS": "70", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    with click.Context(cli), console.running("it") as (shown, _):
        assert shown.width == (70 if is_terminal else console.WIDE)
        table = Table("[red]a heading[/red]")
        console.show(shown, dict, lambda _: table)
    out = capsys.readouterr().out
    heading = next(line for line in out.splitlines() if "a heading" in line)
    assert bool(STYLE.search(heading)) == (is_terminal if colored is None else colored)
    assert bool(re.search(r"\x1b\[\?25l", out)) == is_terminal  # a bar hides the cursor


def test_a_bar_is_beside_json_and_not_there_quietly(capsys, monkeypatch):
    """It is on standard error, if that is a terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    context = click.Context(cli)
    context.meta["json"] = True
    with context, console.running("it") as (shown, _):
        console.show(shown, lambda: {"a": 1})
    out, err = capsys.readouterr()
    assert (json.loads(out), "loading it" in err) == ({"a": 1}, True)
    context = click.Context(cli)
    context.meta["quiet"] = True
    with context, console.running("it") as (_, told):
        assert told is progress.silent
    assert capsys.readouterr() == ("", "")

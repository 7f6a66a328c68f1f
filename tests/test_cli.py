"""The command line: options, errors, exit codes, and what is printed."""

import io
import re
import shlex
from dataclasses import fields

import pytest

from initflow import __version__, cli
from initflow.config import DiagnoseConfig, TrainConfig
from initflow.report import next_command, train_command

QUICK = ["--dataset", "digits", "--log-model", "false", "--probe", "0"]
DIGITS = ["--dataset", "digits"]


def run(capsys, *arguments):
    """Exit code, standard output and standard error of ``initflow ARGUMENTS``."""
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_version(capsys):
    """The package's own."""
    assert run(capsys, "--version") == (0, f"initflow {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["train", "-h"], ["diagnose", "-h"]], ids=str
)
def test_help_has_examples(capsys, arguments):
    """For the group and for each command."""
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    assert "Example" in out
    assert re.search(r"  initflow (train|diagnose) --", out)


@pytest.mark.parametrize(
    ("command", "settings"),
    [(cli.train, TrainConfig), (cli.diagnose, DiagnoseConfig)],
    ids=["train", "diagnose"],
)
def test_every_setting_is_an_option_with_its_default_and_meaning(command, settings):
    """The options come from the configuration."""
    options = {option.name: option for option in command.params}
    defaults = settings().as_text()
    for setting in fields(settings):
        option = options.pop(setting.name)
        assert option.opts == [f"--{setting.name.replace('_', '-')}"]
        assert option.default == defaults[setting.name]
        assert setting.metadata["meaning"].lower() in option.help.lower()
    assert set(options) == {"experiment", "debug"}


def test_help_examples_are_valid(capsys):
    """Every example in a help text is a command line that would run."""
    for arguments in (["--help"], ["train", "--help"], ["diagnose", "--help"]):
        _, out, _ = run(capsys, *arguments)
        examples = re.findall(r"^ +initflow (train|diagnose) (.*)$", out, re.MULTILINE)
        assert examples
        for name, example in examples:
            context = cli.cli.commands[name].make_context(name, shlex.split(example))
            context.params.pop("experiment")
            {"train": TrainConfig, "diagnose": DiagnoseConfig}[name](**context.params)


ERRORS = [
    (["train", "--lr", "abc"], 2, "Error: lr must be a number above 0 and at most 1e30, not 'abc'"),
    (["train", "--init", "hee", *QUICK], 2, "not 'hee' (did you mean 'he'?)"),
    (["train", "--init", "normal:std=x", *QUICK], 2, "normal:std must be a finite number"),
    (["train", "--activation", "rleu"], 2, "(did you mean 'relu'?)"),
    (["train", "--device", "cuda:99", *QUICK], 2, "device must be auto or cpu, not 'cuda:99'"),
    (["train", "--nonsense"], 2, "Error: No such option '--nonsense'"),
    (["train", "extra"], 2, "Error: Got unexpected extra argument (extra)"),
    (["train", "--lr"], 2, "Error: Option '--lr' requires an argument."),
    (["train", "--init", "foo\nbar\x1b[31m", *QUICK], 2, "not 'foo\\nbar\\x1b[31m'"),
    (["train", "--experiment", " ", *QUICK], 2, "Error: experiment must be a name, not ' '"),
    (["tarin"], 2, "Error: No such command 'tarin'"),
    (["train", "--validation", "1430", *QUICK], 2, "not '1430'"),
    (["train", "--probe", "1"], 2, "Error: probe must be 0, or a whole number from 2 to"),
    (["diagnose", "--inits", "he,hee", *DIGITS], 2, "not 'hee' (did you mean 'he'?)"),
    (
        ["diagnose", "--inits", "he,he"],
        2,
        "Error: inits must be schemes between commas, none twice",
    ),
    (["diagnose", "--inits", "he,he:gain=1", *DIGITS], 2, "argument of scheme 'he' must be one of"),
    (
        ["diagnose", "--inits", "normal:std=1,normal:std=1.0", *DIGITS],
        2,
        "Error: inits must be schemes that differ, not 'normal:std=1,normal:std=1.0'",
    ),
    (["diagnose", "--activations", "relu,rleu"], 2, "names between commas, none twice, of sigmoid"),
    (["diagnose", "--depth", "0"], 2, "Error: depth must be a whole number, at least 1"),
    (["diagnose", "--fail-on", "vanish"], 2, "Error: fail_on must be 'none' or verdicts between"),
    (["diagnose", "--depth", "1000", "--width", "60000"], 2, "not '60000x1000'"),
    (["diagnose", "--probe", "1"], 2, "Error: probe must be a whole number, at least 2"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), ERRORS, ids=str)
def test_mistakes_end_with_one_line(capsys, store, arguments, code, message):
    """On standard error, naming the value and what would be right, without a traceback."""
    actual, out, err = run(capsys, *arguments)
    assert actual == code
    assert message in err
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert out == ""


def test_what_goes_wrong_later_exits_1(capsys, store, tmp_path, monkeypatch):
    """A data set that is not there is no argument's fault."""
    from torchvision import datasets

    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:1/"])
    code, out, err = run(capsys, "train", "--data-dir", tmp_path / "none")
    assert (code, out) == (1, "")
    assert err.startswith("Error: mnist is not in ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--debug", "train", "--lr", "x"], ["train", "--lr", "x", "--debug"]], ids=str
)
def test_debug_shows_the_traceback(capsys, arguments):
    """Wherever the option stands, before the same line and with the same exit code."""
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("Traceback")
    assert err.endswith("\nError: lr must be a number above 0 and at most 1e30, not 'x'\n")


def test_training_prints_a_table_a_sentence_and_the_next_command(capsys, store):
    """And no progress bar, because this is no terminal."""
    code, out, err = run(capsys, "train", *QUICK[:-1], "100", "--init", "lecun")
    assert (code, err) == (0, "")
    table, _, _ = out.rpartition("It ended at ")
    sentence, signal, following = out.splitlines()[-3:]
    assert re.search(r"lecun .*\d\d\.\d\d% .*\d s .*[0-9a-f]{32}", table)
    assert re.fullmatch(r"It ended at \d\d\.\d\d% test accuracy after 75 iterations\.", sentence)
    assert signal == "Untrained, its signal is stable forward, stable backward."
    assert following == (
        "Next, hold it against: initflow train --init he --dataset digits --probe 100 "
        "--log-model false"
    )
    assert "\x1b" not in out


def test_a_diverged_training_says_so(capsys, store):
    """In the table and in the sentence; it is a result, not an error."""
    code, out, _ = run(
        capsys, "train", *QUICK, "--init", "normal", "--lr", "1e6", "--activation", "linear"
    )
    assert code == 0
    assert re.search(r"diverged at \d+", out)
    assert re.search(r"It diverged: the loss was not finite at iteration \d+\.", out)


def test_the_next_command_is_another_scheme_with_the_same_settings():
    """By the command that the user came with; reading it back gives the settings."""
    config = TrainConfig(init="he:mode=fan_out", hidden="100x3", lr=0.05, data_dir="a b")
    assert next_command(config) == (
        "initflow train --init he --data-dir 'a b' --hidden 100x3 --lr 0.05"
    )
    launcher = ("--env-manager", "local", "--experiment-name", "my own")
    assert next_command(TrainConfig(activation="tanh"), launcher) == (
        "mlflow run . --env-manager local --experiment-name 'my own' "
        "-P init=xavier -P activation=tanh"
    )
    context = cli.train.make_context("train", shlex.split(train_command(config))[2:])
    context.params.pop("experiment")
    assert TrainConfig(**context.params) == config


@pytest.mark.parametrize("name", ["with [/old] brackets", "plain"])
def test_what_is_printed_is_never_taken_for_markup(capsys, store, name):
    """The experiment is met again by the next command, whatever its name."""
    code, out, err = run(capsys, "train", *QUICK, "--experiment", name)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].endswith(f" --experiment {shlex.quote(name)}")


def test_without_a_command_there_is_help(capsys):
    """The whole of it, and the exit code of a wrong command line."""
    code, out, err = run(capsys)
    assert code == 2
    assert "Example" in out + err
    assert "Error" not in out + err


def test_an_interruption_is_told_with_the_run(capsys, store, monkeypatch):
    """Exit 130, and where the measurements are."""
    from initflow import experiment

    def interrupted(*_, **__):
        error = KeyboardInterrupt()
        error.add_note("what was measured so far is in run abc")
        raise error

    monkeypatch.setattr(experiment, "train_one", interrupted)
    assert run(capsys, "train", *QUICK) == (
        130,
        "",
        "Interrupted; what was measured so far is in run abc\n",
    )


def test_a_diagnosis_prints_verdicts_theory_and_advice(capsys, store):
    """A row for each network, one line of advice for those that need the same."""
    code, out, err = run(
        capsys, "diagnose", *DIGITS, "--inits", "xavier,he", "--activations", "relu,tanh",
        "--depth", "30", "--width", "40",
    )  # fmt: skip
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if re.match(r" +(xavier|he) ", line)]
    assert [row[:4] for row in rows] == [
        ["xavier", "relu", "vanishing", "vanishing"],
        ["xavier", "tanh", "stable", "stable"],
        ["he", "relu", "stable", "stable"],
        ["he", "tanh", "stable", "stable"],
    ]
    assert rows[0][-2] == "0.5"  # χ₁
    assert rows[3][-1] == "18.6"  # ξ_c of tanh under He with these biases
    assert rows[0][4].partition("e")[2] == rows[0][5].strip("()").partition("e")[2]
    assert "xavier relu: Signal or gradient shrink" in out
    assert re.search(r"in MLflow's run [0-9a-f]{32}\.\n$", out)
    assert "\x1b" not in out


@pytest.mark.parametrize(("fail_on", "code"), [("vanishing,exploding", 1), ("symmetric", 0)])
def test_a_diagnosis_fails_on_what_it_is_told_to(capsys, store, fail_on, code):
    """So that a CI job can guard an architecture; the run is whole all the same."""
    import mlflow

    actual, out, err = run(
        capsys, "diagnose", *DIGITS, "--inits", "lecun", "--activations", "relu,tanh",
        "--width", "30", "--fail-on", fail_on,
    )  # fmt: skip
    assert actual == code
    assert "lecun" in out
    if code:
        assert err == (
            "Error: fail_on=vanishing,exploding: lecun relu is vanishing forward, "
            "vanishing backward\n"
        )
    statuses = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert [run.info.status for run in statuses] == ["FINISHED"] * 3


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_of_a_diagnosis_fits_the_terminal(store, columns):
    """No column is lost at 80; predictions stand in brackets where there is room."""
    from rich.console import Console

    from initflow.diagnose import diagnose
    from initflow.report import diagnosis_table

    config = DiagnoseConfig(
        inits="normal,he_uniform", activations="leaky_relu", depth=30, dataset="digits", probe=50
    )
    shown = io.StringIO()
    Console(width=columns, file=shown).print(diagnosis_table(diagnose(config), columns))
    shown = shown.getvalue()
    assert "…" not in shown
    for word in ("he_uniform", "leaky_relu", "exploding", "signal", "gradient", "χ₁", "ξ_c"):
        assert word in shown
    assert ("(" in shown) == (columns >= 100)

"""What `initflow doctor` shows: one screen, and what is broken in a line each."""

import json
import re

import pytest

from initflow.checkup import examination
from initflow.checkup.examination import Examination
from initflow.cli import checklist, process
from initflow.tracking import unsent
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def found(tracked):
    """What there is, looked at once."""
    return examination.look()


@pytest.fixture
def shown(found, monkeypatch, capsys):
    """Runs the command on what was found, with some of it changed: its exit code and output."""

    def run(*options, problems=(), **changes):
        parts = {name: {**facts, **changes.get(name, {})} for name, facts in found.parts.items()}
        changed = Examination(list(problems), parts)
        monkeypatch.setattr(examination, "look", lambda: changed)
        return process.main(["doctor", *options]), *capsys.readouterr()

    return run


def labels(lines):
    return [line.split()[0] for line in lines if re.match(r"\w", line)]


def test_it_fits_on_one_screen_and_is_what_the_page_shows(shown):
    """80 columns, but for a path that is longer."""
    code, out, err = shown()
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[-1] == "Nothing is broken."
    assert len(lines) <= 35
    assert all(len(line) <= 80 or "/" in line for line in lines)
    page = (ROOT / "docs" / "terminal.md").read_text()
    (example,) = re.findall(r"\$ initflow doctor\n(.*?)```", page, re.DOTALL)
    assert labels(example.splitlines()) == labels(lines)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {
                "versions": {
                    "packages": {"torch": "2.9.0", "numpy": "2.4.6"},
                    "pinned": 9,
                    "others_than_pinned": {
                        "alembic": {"installed": None, "pinned": "1.0"},
                        "torch": {"installed": "2.9.0", "pinned": "2.15.0"},
                    },
                    "promise": {"bits": "not promised", "sentence": "Not with torch 2.9.0."},
                    "missing_of_extras": {"tune": [], "ray": ["ray"], "two": ["a", "b"]},
                }
            },
            (
                "packages  torch 2.9.0, numpy 2.4.6 pinned    not 2 of 9 packages; pinned are "
                "torch 2.15.0, and 1 more that these need. Not with torch 2.9.0. "
                "extras    tune; not installed: ray (ray), two (a, b)"
            ),
        ),
        (
            {"machine": {"device": "cuda:0", "cuda": [{"name": "A GPU", "gib": 80.0}]}},
            "devices   cuda:0 A GPU, 80 GiB; device=auto is cuda:0",
        ),
        (
            {"machine": {"has_nvidia_driver": True, "cuda_of_torch": None}},
            "devices   an NVIDIA driver is there, but this PyTorch is built without CUDA; device=",
        ),
        (
            {"store": {"address": "http://host", "answers": False}},
            "MLflow    http://host: not usable, see below",
        ),
        (
            {"outboxes": {"left": [{"tracking": "http://host", "waiting": 1, "refused": 0}]}},
            "waiting   1 entry for MLflow at http://host: 'initflow sync' sends what waits",
        ),
        (
            {"outboxes": {"left": [{"tracking": "http://host", "waiting": 1999, "refused": 1}]}},
            "waiting   2,000 entries for MLflow at http://host, of which 1 were refused: 'initflow",
        ),
        (
            {
                "plugins": {
                    "schemes": [],
                    "models": [{"name": n, "from": "", "where": "installed"} for n in "ab"],
                }
            },
            "schemes   of plugins: none models    of plugins: a, b (installed)",
        ),
        (
            {"folders": {"git": {"is_there": False, "commit": "none", "tree": "none"}}},
            "git       is not installed, so runs have no commit",
        ),
        (
            {"folders": {"git": {"is_there": True, "commit": "0123456789ab", "tree": "dirty 99"}}},
            "git       commit 0123456789, dirty",
        ),
    ],
)
def test_what_was_found_is_told(shown, changes, line):
    """In words, whatever it is."""
    code, out, _ = shown(**changes)
    assert code == 0
    assert line in re.sub(r"\n *", " ", out)


def test_what_is_broken_is_told_and_is_the_exit_code(shown):
    """As JSON, too."""
    problems = ["one: do this", "two: do that"]
    code, out, err = shown(problems=problems)
    assert (code, err) == (1, "")
    assert out.endswith("\n\nBroken: one: do this\nBroken: two: do that\n")
    code, out, err = shown("--json", problems=problems)
    assert (code, err) == (1, "")
    assert json.loads(out)["problems"] == problems


def test_what_could_not_be_looked_at_is_left_out(found, monkeypatch):
    """Its problem says so."""
    parts = {**found.parts, "machine": {}, "store": {}}
    told = labels(checklist.lines(Examination(["machine: cannot be looked at"], parts)))
    assert not {"devices", "cpu", "MLflow"} & set(told)


def test_nothing_is_sent(shown, monkeypatch):
    """Nor is what waits told once more."""

    def waiting_lines(**_):
        raise AssertionError

    monkeypatch.setattr(unsent, "waiting_lines", waiting_lines)
    assert shown()[0] == 0

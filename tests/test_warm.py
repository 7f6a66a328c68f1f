"""Warm commands give what cold ones give."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from tests import warm
from tests.conftest import ROOT
from tests.test_end_to_end import BIN, environment, run, warm_environment

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(sys.platform != "linux", reason="commands start warm on Linux only"),
]

TIMEOUT_S = 60
SELF = """
import os, sys
print(sys.argv, sys.path[0], os.getcwd(), __name__, sys.stdin.read(), os.environ["MARK"])
print(sorted(os.environ), [os.isatty(stream) for stream in range(3)], os.getpgrp() == os.getpid())
print("to standard error", file=sys.stderr)
"""


def both(folder, *command, **more):
    """What a command gives, cold and warm: its code, output and errors."""
    found = []
    for path in (BIN, warm.folder()):
        shell = environment(folder, MARK="ö", **more)
        del shell["PATH"]
        done = subprocess.run(
            [path / command[0], *command[1:]],
            cwd=folder,
            env=shell,
            input="given",
            check=False,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            start_new_session=True,
        )
        found.append((done.returncode, done.stdout, done.stderr))
    return found


@pytest.mark.parametrize(
    "command",
    [
        ("python", "-c", SELF, "a b", "--option=ö"),
        ("python", "-c", "import sys; print(1); sys.exit(3)"),
        ("python", "-c", "import sys; sys.exit('a word')"),
        ("python", "-c", "import sys; sys.exit()"),
        ("python", "-c", "import atexit; atexit.register(print, 'at its end'); print('first')"),
        ("python", "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"),
        ("python", "-c", "import pickle\ndef work(): pass\nprint(pickle.dumps(work))"),
        ("python", "-m", "initflow", "--version"),
        ("python", "-m", "initflow", "train", "--help"),
        ("python", "-m", "initflow", "nonsense"),
        ("initflow", "schemes", "he", "--json"),
        ("initflow", "train", "--init", "hee"),
    ],
)
def test_a_warm_command_gives_what_a_cold_one_gives(tmp_path, command):
    """Exit code, output, errors; it has the same arguments, folder, environment and streams."""
    cold, hot = both(tmp_path, *command)
    assert hot == cold


def test_an_error_is_told_as_python_does(tmp_path):
    """Only that more calls lead to it."""
    cold, hot = both(tmp_path, "python", "-c", "1 / 0")
    assert hot[:2] == cold[:2] == (1, "")
    for _, _, told in (cold, hot):
        assert told.startswith("Traceback (most recent call last):\n")
        assert told.endswith("\nZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("command", [("python", "-c", "import sys; print('torch' in sys.modules)")])
def test_it_is_warm_unless_it_is_to_import_from_elsewhere(tmp_path, command):
    """Then the command is the real one."""
    assert both(tmp_path, *command) == [(0, "False\n", ""), (0, "True\n", "")]
    assert both(tmp_path, *command, PYTHONPATH=str(tmp_path)) == [(0, "False\n", "")] * 2


def test_chance_is_each_ones_own(tmp_path):
    """As new processes have it, not a copy of the server's."""
    program = "import numpy, random, torch\n" + "".join(
        f"print({draw})\n" for draw in ("random.random()", "numpy.random.rand()", "torch.rand(1)")
    )
    first, second = (run(tmp_path, "python", "-c", program).stdout.split() for _ in range(2))
    assert len({*first, *second}) == 2 * 3


def end_by(signal_number):
    """What a worker does."""
    if signal_number:
        os.kill(os.getpid(), signal_number)
    sys.exit(7 if "torch" in sys.modules and os.environ["MARK"] == "ö" else 1)


@pytest.mark.parametrize("ended", [0, signal.SIGTERM, signal.SIGKILL])
def test_workers_are_warm(monkeypatch, ended):
    """They have this process's environment and pipes, and their ends are told as they are."""
    monkeypatch.setenv("MARK", "ö")
    context = multiprocessing.get_context("spawn")
    with warm.start_workers():
        worker = context.Process(target=end_by, args=(ended,))
        worker.start()
    worker.join(TIMEOUT_S)
    assert worker.exitcode == (-ended or 7)


def test_a_commands_workers_are_warm(tmp_path):
    """As it is itself."""
    program = "from multiprocessing import spawn; print(spawn.get_executable())"
    told = run(tmp_path, "python", "-c", program).stdout
    assert told == f"{os.fsencode(warm.folder() / 'python')}\n"


WAITS = """
import os, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print(os.getpid(), flush=True)
while True:
    time.sleep(0.01)
"""


@pytest.fixture
def waiting(tmp_path):
    """A warm program that waits for signals, and its process's id."""
    with subprocess.Popen(
        ["python", "-c", WAITS],
        cwd=tmp_path,
        env=warm_environment(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        yield program, int(program.stdout.readline())
        program.kill()


def test_signals_are_passed_on(waiting):
    """To a process of its own, until it ends."""
    program, pid = waiting
    assert pid != program.pid
    program.send_signal(signal.SIGINT)
    assert program.stdout.readline() == "interrupted\n"
    program.send_signal(signal.SIGTERM)
    assert program.wait(TIMEOUT_S) == 7


def test_a_killed_command_is_gone(waiting):
    """Though its process was not the one that was killed."""
    program, pid = waiting
    program.kill()
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail("it is still there")


def test_the_server_ends_with_its_process(tmp_path):
    """Whatever ends that; nothing of it is left."""
    place = tmp_path / "commands"
    place.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", f"from tests import warm; warm.serve('{place}')"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout.readline() == "warm\n"
        assert list(place.iterdir())
        server.stdin.close()
        assert server.wait(TIMEOUT_S) == 0
    assert not place.exists()

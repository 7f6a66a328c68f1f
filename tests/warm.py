"""Commands that start warm: as forks of one process, which has imported what takes them seconds.

:func:`folder` holds ``initflow``, ``mlflow``, ``python`` and ``uvicorn`` (which MLflow starts to
serve a model), to be first on a command's PATH. Each is a small client: it hands its arguments,
folder, environment and streams to the server, which forks a child for it, passes signals on to that
child, and ends as it ended. The child is a process and a session of its own, and ends with its
client. What the server could not do as a new process does, such as to import from another place,
the client becomes: the real command.

:func:`start_workers` has multiprocessing start its workers by it, too; the commands' do anyway.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import json
import multiprocessing
import os
import select
import shutil
import signal
import socket
import sys
import threading
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
IMPORTED = (
    *("initflow.cli.process", "initflow.cli.tables", "initflow.experiments.untrained.diagnose"),
    *(
        "initflow.experiments.comparisons.rates",
        "initflow.experiments.comparisons.reproduce",
        "initflow.experiments.tuning.tune",
        "git",
        "matplotlib.pyplot",
        "mlflow.cli",
        "mlflow.pytorch",
        "networkx",
    ),
    *("sklearn.datasets", "sklearn.ensemble", "torch._dynamo", "torch.export"),
    "torchvision.datasets",
)
SOCKET, STREAMS = "socket", b"streams"
MOST_STREAMS = 64
A_WORKER, A_TRACKER = "--multiprocessing-fork", "multiprocessing.resource_tracker"
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


CLIENT = f"""#!{sys.executable} -IS
import sys
sys.path.append("{Path(__file__).parent}")
import warm
sys.exit(warm.client(*sys.argv))
"""


@functools.cache
def folder():
    """Of the commands of a server that lives as long as this process; the real ones off Linux."""
    import subprocess
    import tempfile

    if sys.platform != "linux":
        return BIN
    place = Path(tempfile.mkdtemp(prefix="warm-"))
    for name in ("initflow", "mlflow", "python", "uvicorn"):
        (place / name).write_text(CLIENT)
        (place / name).chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, __file__, place],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(server.communicate)
    assert server.stdout.readline() == "warm\n", server.stderr.read()
    return place


@contextlib.contextmanager
def start_workers():
    """The processes that multiprocessing spawns here are forks of the server for so long."""
    from multiprocessing import spawn

    real = spawn.get_executable
    spawn.get_executable = lambda: os.fsencode(folder() / "python")  # started only where used
    try:
        yield
    finally:
        spawn.get_executable = real


def inherited():
    """The streams that this process, just started, was given."""
    found = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - light
        with contextlib.suppress(OSError):  # that of the folder itself
            os.fstat(int(name))
            found.add(int(name))
    return sorted(found)


def client(command, *arguments):
    """Be ``command``, which lies in the server's folder; returns its exit code."""
    place, name = os.path.split(command)
    elsewhere = name in ("initflow", "python") and os.environ.get("PYTHONPATH") != str(ROOT)
    streams = [0, 1, 2]
    if arguments[-1:] == (A_WORKER,):
        streams, arguments = inherited(), arguments[-3:]  # it is told where to import from
    elif elsewhere or (
        name == "python" and (arguments[:1] not in (("-m",), ("-c",)) or A_TRACKER in arguments[1])
    ):
        os.execv(BIN / name, [BIN / name, *arguments])  # noqa: S606 - the real command
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"{place}/{SOCKET}")
        told = json.dumps(
            [streams, name, arguments, os.getcwd(), dict(os.environ)]  # noqa: PTH109 - light
        )
        socket.send_fds(connection, [STREAMS], streams)
        connection.sendall(told.encode() + b"\n")
        answers = connection.makefile()
        child = int(answers.readline())

        def pass_on(sent, _):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, sent)

        for each in PASSED_ON:
            signal.signal(each, pass_on)
        code = int(answers.readline())
    if code < 0:  # by this signal
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def serve(place):
    """Answer clients until standard input ends; returns, in a child, what it is told to be."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{place}/{SOCKET}")
        listening.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
        # Interrupts are blocked in threads that start workers, one of which may have started this.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        print("warm", flush=True)  # noqa: T201 - to folder()
        while listening in select.select([listening, sys.stdin], [], [])[0]:
            connection, _ = listening.accept()
            with connection:
                if not os.fork():
                    listening.close()
                    return keep(connection)
    shutil.rmtree(place)
    os._exit(0)


def keep(connection):
    """Look after a child of a client's; returns in the child."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, given, _, _ = socket.recv_fds(connection, len(STREAMS), MOST_STREAMS)
    with connection.makefile() as line:
        streams, *told = json.loads(line.readline())
    child = os.fork()
    if not child:
        os.setsid()
        connection.close()
        given = [fcntl.fcntl(one, fcntl.F_DUPFD, max(*streams, *given) + 1) for one in given]
        for stream, one in zip(streams, given, strict=True):
            os.dup2(one, stream)
    for one in given:
        os.close(one)
    if not child:
        return told
    connection.sendall(f"{child}\n".encode())
    if connection in select.select([connection, os.pidfd_open(child)], [], [])[0]:
        os.kill(child, signal.SIGKILL)  # as its client was killed
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(name, arguments, place, environment):
    """Do what the command ``name`` does in a new process."""
    import runpy

    import numpy as np
    import torch

    np.random.seed()  # noqa: NPY002 - all forks have the same, as Python's own does not
    torch.default_generator.seed()
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    if name != "python":
        sys.argv, sys.path[0] = [str(BIN / name), *arguments], str(BIN)
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    how, what, *more = arguments
    sys.argv, sys.path[0] = [how, *more], place if how == "-m" else ""
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(what, vars(sys.modules["__main__"]))  # noqa: S102 - it is the test's


def ended(work, *arguments):
    """The exit code that a process has by ``work``."""
    try:
        work(*arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)  # noqa: T201 - as Python does
        return 1 if isinstance(end.code, str) else end.code or 0
    except BaseException:  # noqa: BLE001 - as Python does
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def main():
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()
    multiprocessing.set_executable(f"{sys.argv[1]}/python")
    code = ended(become, *serve(sys.argv[1]))
    # An end of Python's own looks through all that was imported, and takes seconds.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()

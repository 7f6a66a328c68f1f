"""Where work is carried out: in this process, in processes of this machine, on a Ray cluster.

Functions, arguments and results are pickled on their way: a worker imports the function by its
name. A worker process has this process's environment variables, a Ray node only MLflow's and
ours; in each, PyTorch is set to the number of threads of the pool.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import pickle
import platform
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeVar

import initflow
from initflow.core import capacity
from initflow.core.configurations import BACKENDS
from initflow.errors import LONGEST, SettingError, cause, first_line, naming_extras, unknown

# The run that `mlflow run` made is this process's own; a worker has other runs.
OWN = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID")
PATIENCE_S = 5  # how long a Ray cluster's answer is waited for
_STARTABLE = ContextVar("startable", default=False)
Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerLostError(Exception):
    """A task's worker ended before the task: it was killed, out of memory, or its node is gone.

    It is no error of the user's or the task's: the caller decides whether to submit it again.
    """


@dataclass(frozen=True)
class WorkerPool:
    """Carries out tasks, ``size`` of them at once, each with ``threads`` CPU threads.

    ``submit(function, *args)`` returns a future of the result, the function's own error, or a
    :class:`WorkerLostError`. ``stop`` ends at once the tasks that other processes are running.
    ``is_here``: the tasks run in this process; ``is_local``: on this machine.
    """

    size: int
    threads: int
    submit: Callable[..., Future[Any]]
    stop: Callable[[], None] = lambda: None
    is_here: bool = False
    is_local: bool = False


def worker_pool(
    backend: str, size: int | None, threads: int | None
) -> AbstractContextManager[WorkerPool]:
    """A pool of ``size`` workers, each with ``threads`` CPU threads, for as long as the ``with``.

    ``local`` is this process itself where ``size`` is 1, whose threads None leaves as they are;
    else as many processes, which by default share the CPUs. ``ray`` is the cluster at RAY_ADDRESS
    or the one last started here, with a thread per task and as many tasks as it has CPUs by
    default. Leaving the ``with`` waits for the running tasks; leaving it by an error ends them at
    once.
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if backend == "ray":
        return _cluster(size, threads or 1)
    if not size or size == 1:
        return _here(threads)
    return _processes(size, threads or max(1, capacity.cpus() // size))


@contextlib.contextmanager
def startable() -> Iterator[None]:
    """Where the process is one of ours, which a worker can import again without doing its work."""
    token = _STARTABLE.set(True)
    try:
        yield
    finally:
        _STARTABLE.reset(token)


def are_startable() -> bool:
    """Whether worker processes may be started where nobody asked for them: see `startable`."""
    return _STARTABLE.get()


def results(
    pool: WorkerPool, work: Callable[[Task], Result], next_task: Callable[[], Task | None]
) -> Iterator[tuple[Task, Result | WorkerLostError]]:
    """Each task with the result of ``work``, as soon as it is done.

    Whenever a worker is free, ``next_task`` is called for a task. It returns None where there is
    none for the moment; where no task is running either, that is the end. An error of ``work``
    itself is raised; the running tasks then go on until the pool is left.
    """
    running: dict[Future[Result], Task] = {}
    while True:
        while len(running) < pool.size and (task := next_task()) is not None:
            running[pool.submit(work, task)] = task
        if not running:
            return
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        first = next(future for future in running if future in done)
        task, lost = running.pop(first), first.exception()
        yield task, lost if isinstance(lost, WorkerLostError) else first.result()


@contextlib.contextmanager
def _here(threads: int | None) -> Iterator[WorkerPool]:
    from initflow.core import machine  # noqa: PLC0415 - imports torch, which a worker may not need

    def submit(function: Callable[..., Any], *args: object) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the future's
            future.set_exception(error)
        return future

    with machine.threads(threads) as set_threads:
        yield WorkerPool(1, set_threads, submit, is_here=True, is_local=True)


@contextlib.contextmanager
def _processes(size: int, threads: int) -> Iterator[WorkerPool]:
    """A thread here for each worker process, which sends it a task and waits for the result.

    A worker ends as soon as our end of ``lifeline`` is closed, by us or because we ended.
    (A ProcessPoolExecutor loses all running tasks with one worker, and may not notice that.)
    """
    _check_not_in_worker()
    context = multiprocessing.get_context("spawn")
    lifeline, ours = context.Pipe(duplex=False)
    idle: list[tuple[SpawnProcess, Connection]] = []

    def start() -> tuple[SpawnProcess, Connection]:
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, lifeline, threads))
        process.start()
        there.close()
        return process, here

    def end(process: SpawnProcess, connection: Connection) -> int | None:
        connection.close()
        process.join()
        return process.exitcode

    def carry_out(packed: bytes) -> Any:
        try:
            process, connection = idle.pop()
        except IndexError:
            process, connection = start()
        try:
            connection.send_bytes(packed)
            outcome = connection.recv_bytes()
        except (EOFError, OSError) as error:
            code = end(process, connection)
            raise WorkerLostError(f"a worker process ended with exit code {code}") from error
        idle.append((process, connection))
        return _opened(outcome)

    def submit(function: Callable[..., Any], *args: object) -> Future[Any]:
        return senders.submit(carry_out, pickle.dumps((function, args)))

    def stop() -> None:
        ours.close()
        senders.shutdown(cancel_futures=True)
        while idle:
            end(*idle.pop())

    senders = ThreadPoolExecutor(size, "workers", initializer=_block_interrupts)
    try:
        yield WorkerPool(size, threads, submit, stop, is_local=True)
        senders.shutdown()
        while idle:
            end(*idle.pop())
    finally:
        stop()
        lifeline.close()


def _check_not_in_worker() -> None:
    """A worker runs the script that it comes from anew, and must not start workers there."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SettingError(
            "with workers, what a script does must stand below if __name__ == '__main__':"
        )


def _block_interrupts() -> None:
    """In this thread and the processes that it starts: a terminal sends Ctrl-C to all of them."""
    if sys.platform != "win32":
        resource_tracker.ensure_running()  # starting it later would unblock the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _serve(connection: Connection, lifeline: Connection, threads: int) -> None:
    """A worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    os.environ.update(_thread_settings(threads))
    for name in OWN:
        os.environ.pop(name, None)
    with contextlib.suppress(EOFError):  # the pool has no more tasks
        while True:
            connection.send_bytes(_carry_out(connection.recv_bytes(), threads))


def _end_with(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()  # nothing is ever sent: it is closed
    signal.raise_signal(signal.SIGTERM)


def _carry_out(packed: bytes, threads: int) -> bytes:
    """In a worker: the result, or the error with its traceback.

    By plain pickle, because multiprocessing's would leave a tensor's memory with the worker.
    """
    try:
        function, args = pickle.loads(packed)  # noqa: S301 - our own; imports what it needs
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        return pickle.dumps((function(*args), None, ""))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is sent
        return pickle.dumps((None, _portable(error), traceback.format_exc()))


def _portable(error: Exception) -> Exception:
    """``error`` or, where it cannot be pickled and read again, a RuntimeError with its text."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    except Exception:  # noqa: BLE001 - it may fail in any way
        return RuntimeError(cause(error))
    return error


def _opened(outcome: bytes) -> Any:
    result, error, text = pickle.loads(outcome)  # noqa: S301 - our own worker's
    if error is not None:
        raise error from RuntimeError(f"in the worker:\n{text}")
    return result


@contextlib.contextmanager
def _cluster(size: int | None, threads: int) -> Iterator[WorkerPool]:
    ray = _ray()
    is_ours = not ray.is_initialized()
    if is_ours:
        _connect(ray)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("MLFLOW_", "INITFLOW_")) and name not in OWN
    }
    carry_out = ray.remote(_carry_out_on_node).options(num_cpus=threads, max_retries=0)
    running: dict[Future[Any], Any] = {}

    def submit(function: Callable[..., Any], *args: object) -> Future[Any]:
        packed = pickle.dumps((function, args))
        reference = carry_out.remote(packed, threads, environment, initflow.__version__)
        future = _opened_later(reference.future())
        running[future] = reference
        future.add_done_callback(running.pop)
        return future

    def stop() -> None:
        for reference in list(running.values()):
            ray.cancel(reference, force=True)
        wait(list(running), PATIENCE_S)

    try:
        nodes = _nodes(ray, threads)
        at_once = size or sum(int(cpus) // threads for cpus in nodes)
        yield WorkerPool(at_once, threads, submit, stop)
        wait(list(running))
    finally:
        stop()
        if is_ours:
            ray.shutdown()


def _ray() -> Any:
    """Ray, an optional package."""
    with naming_extras("backend=ray"):
        # Ray prints pages about each lost worker to standard output. At its import it reads which
        # lines to leave out: all.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
        return importlib.import_module("ray")


def _connect(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS") or _last_started() or "auto"
    on_termination = signal.getsignal(signal.SIGTERM)
    try:
        host, _, port = address.rpartition(":")
        if host and "/" not in host:  # Ray itself would wait for minutes, deaf to Ctrl-C
            socket.create_connection((host.strip("[]"), int(port)), PATIENCE_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:LONGEST]
        raise SettingError(
            f"no Ray cluster at '{address}' ({reason}): start one with 'ray start --head', or set "
            "RAY_ADDRESS to a running one's, and RAY_AUTH_MODE=token where it wants a token"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray takes it over
            signal.signal(signal.SIGTERM, on_termination)


def _last_started() -> str:
    """The address of the cluster last started on this machine, as Ray notes it; or ``""``."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    try:
        return (Path(folder) / "ray" / "ray_current_cluster").read_text().strip()
    except OSError:
        return ""


def _nodes(ray: Any, threads: int) -> list[float]:
    """The CPUs of each node, or a :class:`SettingError` where none is large enough for a task.

    Ray would wait for one for ever, and in silence.
    """
    cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    largest = max(cpus, default=0)
    if largest < threads:
        raise SettingError(
            f"threads={threads} is more than the {largest:g} CPUs of the Ray cluster's largest node"
        )
    return cpus


def _carry_out_on_node(
    packed: bytes, threads: int, environment: Mapping[str, str], version: str
) -> bytes:
    if initflow.__version__ != version:
        raise SettingError(
            f"the Ray node {platform.node()} has initflow {initflow.__version__}, not {version} as "
            "here: install the same everywhere"
        )
    os.environ.update({**environment, **_thread_settings(threads)})
    return _carry_out(packed, threads)


def _opened_later(reply: Future[bytes]) -> Future[Any]:
    """A future of the result in ``reply``, with Ray's errors replaced by ours."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def open_it(reply: Future[bytes]) -> None:
        try:
            future.set_result(_opened(reply.result()))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the future's
            future.set_exception(_translated(error))

    reply.add_done_callback(open_it)
    return future


def _translated(error: Exception) -> Exception:
    errors = importlib.import_module("ray.exceptions")
    losses = (
        errors.WorkerCrashedError,
        errors.NodeDiedError,
        errors.LocalRayletDiedError,
        errors.OutOfMemoryError,
        errors.ObjectLostError,
    )
    if isinstance(error, losses):
        return WorkerLostError(first_line(error))
    if isinstance(error, errors.RayTaskError):
        return error.cause  # type: ignore[no-any-return]
    return error


def _thread_settings(threads: int) -> dict[str, str]:
    """What PyTorch's libraries read when they are loaded."""
    # Threads that wait actively would take the cores of the other workers.
    numbers = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return numbers | {"OMP_WAIT_POLICY": "PASSIVE"}

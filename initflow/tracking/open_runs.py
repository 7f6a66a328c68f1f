"""The runs that processes of this machine have open, so that those of one that died are closed.

A process notes its runs in a file of its own, and holds a lock on it while it lives. A run goes by
its key from before it is made until its id is known, and is tagged with the file's name: one that
another process has opened again meanwhile, perhaps on another machine, is that one's. What cannot
be noted ends no training.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from initflow.tracking.outbox import folder, lock, remove

SUFFIX = ".runs"
LARGEST = 1 << 24  # bytes of such a file


class LeftOpen(NamedTuple):
    """The ``runs``, ids or keys, that a process which died had open in ``tracking``.

    They are tagged with ``opener``, unless another process has opened them since.
    """

    path: Path
    tracking: str
    runs: tuple[str, ...]
    opener: str

    def forget(self, run: str) -> None:
        """Note that it is closed, as far as the disk has room."""
        with contextlib.suppress(OSError):
            _write(self.path, self.tracking, run, is_open=False)


class _Notes(NamedTuple):
    """Those of a process, while it has a run open."""

    path: Path
    lock: FileLock
    open: set[str]


# By process: what is open in a parent is open there. Those of parents are kept, as letting go of
# them would let go of their locks.
_notes: dict[int, _Notes] = {}
_turn = threading.RLock()


def opened(tracking: str, run: str) -> str:
    """Note that this process has the run open, in ``tracking``, an address without credentials.

    What the run is to be tagged with; nothing where it could not be noted.
    """
    process = os.getpid()
    with _turn, contextlib.suppress(OSError, NotImplementedError, Timeout):
        if process not in _notes:
            path = folder() / f"{uuid.uuid4().hex}{SUFFIX}"
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            held = lock(path)
            held.acquire()
            _notes[process] = _Notes(path, held, set())
        own = _notes[process]
        _write(own.path, tracking, run, is_open=True)
        own.open.add(run)
        return own.path.stem
    return ""


def closed(tracking: str, run: str) -> None:
    """Note that it is open no more; with none that is, nothing is left to be seen."""
    with _turn, contextlib.suppress(OSError):
        own = _notes.get(os.getpid())
        if not own or run not in own.open:
            return
        own.open.remove(run)
        if own.open:
            _write(own.path, tracking, run, is_open=False)
        else:
            del _notes[os.getpid()]
            remove(own.path, own.lock)


def left_open() -> Iterator[LeftOpen]:
    """What dead processes of this machine left open, each locked until the next is requested."""
    for path in sorted(folder().glob(f"*{SUFFIX}")):
        held = lock(path)
        try:
            held.acquire()
        except (Timeout, OSError, NotImplementedError):
            continue  # of a process that lives
        try:
            found = _read(path)
            for tracking in dict.fromkeys(where for where, _ in found):
                runs = tuple(run for at, run in found if at == tracking)
                yield LeftOpen(path, tracking, runs, opener=path.stem)
            if not _read(path) and (_is_of_here(path) or not path.exists()):
                remove(path, held)
        finally:
            held.release()


def _write(path: Path, tracking: str, run: str, *, is_open: bool) -> None:
    line = {"host": platform.node(), "tracking": tracking, "run": run, "open": is_open}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _read(path: Path) -> list[tuple[str, str]]:
    """(tracking, run) of all that is open still; nothing of what is another machine's."""
    found: dict[tuple[str, str], bool] = {}
    for line in _lines(path):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off as it was written
            values = json.loads(line)
            if values["host"] == platform.node():
                found[str(values["tracking"]), str(values["run"])] = values["open"] is True
    return [both for both, is_open in found.items() if is_open]


def _is_of_here(path: Path) -> bool:
    return f'"host": {json.dumps(platform.node())}' in next(iter(_lines(path)), "")


def _lines(path: Path) -> list[str]:
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return []
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []

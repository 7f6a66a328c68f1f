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
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from initflow.tracking.outbox import folder

SUFFIX = ".runs"
LARGEST = 1 << 24  # bytes of such a file


@dataclass(frozen=True)
class LeftOpen:
    """The ``runs``, ids or keys, that a process which died had open in ``tracking``."""

    path: Path
    tracking: str
    runs: tuple[str, ...]

    @property
    def opener(self) -> str:
        """What the runs are tagged with that no other process has opened since."""
        return self.path.stem

    def forget(self, run: str) -> None:
        """Note that it is closed, as far as the disk has room; with nothing open, the file goes."""
        with contextlib.suppress(OSError):
            _write(self.path, self.tracking, run, is_open=False)
        if not _read(self.path):
            _remove(self.path)


class _Notes:
    """Those of this process, while it has a run open."""

    def __init__(self) -> None:
        self.path = folder() / f"{uuid.uuid4().hex}{SUFFIX}"
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.lock = _lock(self.path)
        self.lock.acquire(blocking=False)
        self.open: set[str] = set()


_own: _Notes | None = None
_of_parents: list[_Notes] = []  # kept, as letting go of them would let go of their locks
_turn = threading.RLock()


def _forked() -> None:
    """What is open is open in the parent process."""
    global _own  # noqa: PLW0603 - of which a process has one
    if _own:
        _of_parents.append(_own)
    _own = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def opened(tracking: str, run: str) -> str:
    """Note that this process has the run open, in ``tracking``, an address without credentials.

    What the run is to be tagged with; nothing where it could not be noted.
    """
    global _own  # noqa: PLW0603 - as above
    with _turn, contextlib.suppress(OSError, NotImplementedError, Timeout):
        _own = _own or _Notes()
        _write(_own.path, tracking, run, is_open=True)
        _own.open.add(run)
        return _own.path.stem
    return ""


def closed(tracking: str, run: str) -> None:
    """Note that it is open no more; with none that is, nothing is left to be seen."""
    global _own
    with _turn, contextlib.suppress(OSError):
        if not _own or run not in _own.open:
            return
        _own.open.remove(run)
        if _own.open:
            _write(_own.path, tracking, run, is_open=False)
            return
        notes, _own = _own, None
        _remove(notes.path)
        notes.lock.release()


def left_open() -> Iterator[LeftOpen]:
    """What processes of this machine left open that died, each held until the next is asked for."""
    for path in sorted(folder().glob(f"*{SUFFIX}")):
        lock = _lock(path)
        try:
            lock.acquire(blocking=False)
        except (Timeout, OSError, NotImplementedError):
            continue  # of a process that lives
        try:
            found = _read(path)
            for tracking in dict.fromkeys(where for where, _ in found):
                yield LeftOpen(path, tracking, tuple(run for at, run in found if at == tracking))
            if not found and (_is_of_here(path) or not path.exists()):
                _remove(path)
        finally:
            lock.release()


def _lock(path: Path) -> FileLock:
    return FileLock(f"{path}.lock", thread_local=False)


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


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        Path(f"{path}.lock").unlink(missing_ok=True)

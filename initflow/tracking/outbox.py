"""What could not be sent: kept on disk in its order, and sent later, nothing lost, nothing twice.

An outbox is a file that is only added to, and flushed to disk each time: a line that says where
its entries belong, a line for each entry, and one for each that was sent or refused. An entry's
bytes lie in a file of their own beside it, whole before its line is there. So whenever the process
is killed, what is there is whole, and at worst an entry that has just been sent is sent again:
whoever sends it makes that harmless.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from initflow.core.paths import own
from initflow.errors import OutboxError

FORMAT = 1
SUFFIX = ".outbox"
LIMIT = 1 << 30  # bytes of an outbox
HEADER = 1 << 20  # bytes that what is said of nothing may take
MAKING = "create"  # the kind of entry that makes what a key stands for
KEY = "waiting-"  # begins what stands for an id that only the server can give
MODEL_KEY = f"{KEY}model-"
KEYS = re.compile(rf"{KEY}(?:model-)?[0-9a-f]{{32}}(?:-experiment)?")
DAMAGED = (ValueError, KeyError, TypeError, AttributeError)

Known = dict[str, str]  # the ids that keys stand for; "" for a key that will never have one


def new_key() -> str:
    """What stands for a run's id until the server has given it, in entries and all their texts."""
    return f"{KEY}{uuid.uuid4().hex}"


def new_model_key() -> str:
    return f"{MODEL_KEY}{uuid.uuid4().hex}"


def experiment_key(run: str) -> str:
    """What stands for the id of the experiment of a run with this key."""
    return f"{run}-experiment"


def folder() -> Path:
    """Where outboxes lie: INITFLOW_OUTBOX, else in the user's folder for such things."""
    given = os.environ.get("INITFLOW_OUTBOX")
    if given:
        return own(given)
    return platformdirs.user_state_path("initflow") / "outbox"


@dataclass(frozen=True)
class Entry:
    """One thing to be written: ``kind`` says what, ``run`` is the id or key of whose it is.

    ``values`` are plain ones, as JSON has them. ``is_again`` where it may have been sent before.
    """

    kind: str
    run: str
    values: Mapping[str, Any] = field(default_factory=dict)
    content: bytes = b""
    is_again: bool = False


class RefusedError(Exception):
    """An entry cannot be sent: the server does not take it."""


class NeverMadeError(RefusedError):
    """An entry is of a run that was never made."""


class UnknownKeyError(Exception):
    """An entry is of a run that is not there yet: the one that makes it waits elsewhere."""


class Outbox:
    """The file ``path`` with the entries for ``tracking``, held by this process alone."""

    def __init__(self, path: Path, tracking: str) -> None:
        """A new one."""
        self.path, self.tracking = path, tracking
        self.known: Known = {}
        self.refused: dict[int, str] = {}
        self.waiting: deque[int] = deque()
        self._lines: dict[int, dict[str, Any]] = {}
        self._last = 0
        self._lock = _lock(path)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock.acquire(blocking=False)
        header = _line({"format": FORMAT, "tracking": tracking})
        self.size = len(header)
        arriving = Path(f"{path}.new")
        try:
            _write_through(arriving, header)
            arriving.replace(path)
            _flush_folder(path.parent)
        except OSError:
            arriving.unlink(missing_ok=True)
            self.discard()
            raise

    @classmethod
    def reopened(cls, path: Path) -> Outbox:
        """The one that another process has left.

        Raises :class:`filelock.Timeout` where a process holds it, :class:`OutboxError` for a file
        that is none.
        """
        self = object.__new__(cls)
        self.path, self._lock = path, _lock(path)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise
        except OSError as error:
            raise OutboxError(f"outbox '{path}' cannot be held: {error.strerror}") from error
        try:
            content = _read(path)
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):  # its process died as it wrote the last line
                os.truncate(path, len(whole))
            self._recall(whole)
        except BaseException:
            self._lock.release()
            raise
        return self

    def _recall(self, whole: bytes) -> None:
        header, *lines = _parsed(self.path, whole)
        self.tracking = header["tracking"]
        self.known, self.refused = {}, {}
        self._lines, self._last = {}, 0
        for line in lines:
            if "entry" in line:
                self._last = line["entry"]
                self._lines[self._last] = line
            elif "sent" in line:
                self._lines.pop(line["sent"], None)
                self.known |= line["known"]
            else:
                self.refused[line["refused"]] = line["reason"]
                self.known |= _without_id(self._lines.get(line["refused"], {}))
        self.waiting = deque(n for n in self._lines if n not in self.refused)
        self.size = len(whole) + sum(line["bytes"] for line in self._lines.values())

    def add(self, entry: Entry) -> int:
        """Keep ``entry``, on disk before this returns; its number. An OSError where it is full."""
        number = self._last + 1
        line = {
            "entry": number,
            "kind": entry.kind,
            "run": entry.run,
            "values": entry.values,
            "bytes": len(entry.content),
        }
        if self.size + len(entry.content) > LIMIT:
            raise OSError(0, f"it holds {LIMIT:,} bytes, the most that it may")
        if entry.content:
            line["sha256"] = hashlib.sha256(entry.content).hexdigest()
            file = self._file(number)
            try:
                file.parent.mkdir(exist_ok=True, mode=0o700)
                _write_through(file, entry.content)
            except OSError:
                file.unlink(missing_ok=True)
                raise
        self._write(line)
        self._last = number
        self._lines[number] = line
        self.waiting.append(number)
        self.size += len(entry.content)
        return number

    def entry(self, number: int) -> Entry:
        """One that waits."""
        line = self._lines[number]
        content = b""
        if line["bytes"]:
            try:
                content = self._file(number).read_bytes()
            except OSError as error:
                raise RefusedError(f"its bytes cannot be read: {error.strerror}") from error
            if hashlib.sha256(content).hexdigest() != line["sha256"]:
                raise RefusedError("its bytes are damaged")
        return Entry(line["kind"], line["run"], line["values"], content, is_again=True)

    def sent(self, number: int, known: Known) -> None:
        """Note that it was, and what was learned by it."""
        self.known |= known
        with contextlib.suppress(OSError):  # else it is sent again, which is harmless
            self._write({"sent": number, "known": known})
        self.waiting.remove(number)
        self.refused.pop(number, None)
        self.size -= self._lines.pop(number)["bytes"]
        with contextlib.suppress(OSError):
            self._file(number).unlink(missing_ok=True)

    def refuse(self, number: int, reason: str) -> None:
        """Note that it cannot be sent: it stays, and does not hold up the others."""
        with contextlib.suppress(OSError):
            self._write({"refused": number, "reason": reason})
        self.waiting.remove(number)
        self.refused[number] = reason
        self.known |= _without_id(self._lines[number])

    def ask_again(self) -> None:
        """Let what was refused wait once more, in its place."""
        for number in self.refused:
            self.known.pop(self._lines[number]["run"], None)
        self.waiting = deque(sorted({*self.waiting, *self.refused}))

    def close(self) -> None:
        """Let others have it; without anything in it, it is gone."""
        if self._lines:
            self._lock.release()
        else:
            self.discard()

    def discard(self) -> None:
        shutil.rmtree(self._file(0).parent, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        self._lock.release()
        with contextlib.suppress(OSError):
            Path(self._lock.lock_file).unlink(missing_ok=True)

    def _file(self, number: int) -> Path:
        return Path(f"{self.path}.d") / str(number)

    def _write(self, line: Mapping[str, Any]) -> None:
        """Add a line, flushed to disk, whole or not at all."""
        text = _line(line)
        with _opened(self.path) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                _write_all(file, text)
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise
        self.size += len(text)


def _without_id(line: Mapping[str, Any]) -> Known:
    """Of the line of an entry that was refused: a run that was not made will never have an id."""
    return {line["run"]: "", experiment_key(line["run"]): ""} if line.get("kind") == MAKING else {}


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


def _opened(path: Path) -> Any:
    """To be added to; for its owner's eyes, and without a buffer, which could be written later."""
    return open(  # Path.open takes no opener
        path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600)
    )


def _write_all(file: Any, content: bytes) -> None:
    """What has no buffer may take a part of it at a time, and be full only at the next."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def _write_through(file: Path, content: bytes) -> None:
    with _opened(file) as opened:
        opened.truncate(0)
        _write_all(opened, content)
        os.fsync(opened.fileno())
    _flush_folder(file.parent)


def _flush_folder(path: Path) -> None:
    """So that a new file is found in it, whatever happens to the machine."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _lock(path: Path) -> FileLock:
    return FileLock(f"{path}.lock", thread_local=False)  # taken in one thread, let go in another


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():  # but a device, perhaps without an end
            raise OutboxError(f"outbox '{path}' is no file")
        if path.stat().st_size > 2 * LIMIT + HEADER:
            raise OutboxError(f"outbox '{path}' is larger than any")
        return path.read_bytes()
    except OSError as error:
        raise OutboxError(f"outbox '{path}' cannot be read: {error.strerror}") from error


def _parsed(path: Path, whole: bytes) -> list[dict[str, Any]]:
    """The lines of an outbox, each with all that its kind has."""
    lines = []
    for at, text in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(text)
            if at == 1:
                sound = line["format"] == FORMAT and isinstance(line["tracking"], str)
            elif "entry" in line:
                kinds = {"entry": int, "kind": str, "run": str, "values": dict, "bytes": int}
                kinds |= {"sha256": str} if line["bytes"] else {}
                sound = all(type(line[name]) is kind for name, kind in kinds.items())
            elif "sent" in line:
                known = line["known"].items()
                sound = type(line["sent"]) is int and all(type(v) is str for _, v in known)
            else:
                sound = type(line["refused"]) is int and type(line["reason"]) is str
        except (*DAMAGED, RecursionError):
            sound = False
        if not sound:
            raise OutboxError(f"outbox '{path}' is damaged at line {at}")
        lines.append(line)
    if not lines:
        raise OutboxError(f"outbox '{path}' is empty")
    return lines


@dataclass(frozen=True)
class Left:
    """What an outbox still holds: how many entries wait and how many were refused, each with why.

    ``is_held`` by a process that is sending them; ``is_away``: the server does not answer. Just
    ``sent`` were so many.
    """

    path: Path
    tracking: str
    waiting: int
    refused: int
    reason: str = ""
    refusal: str = ""
    is_held: bool = False
    is_away: bool = False
    sent: int = 0


def paths() -> list[Path]:
    """All outboxes, the oldest first."""
    return sorted(folder().glob(f"*{SUFFIX}"))


def left(path: Path) -> Left | None:
    """What it holds, looked at without holding it; None where it is gone meanwhile."""
    if not path.exists():
        return None
    content = _read(path)
    header, *lines = _parsed(path, content[: content.rfind(b"\n") + 1])
    through = {line["sent"] for line in lines if "sent" in line}
    refused = {line["refused"]: line["reason"] for line in lines if "refused" in line}
    entries = {line["entry"] for line in lines if "entry" in line} - through
    refused = {number: refused[number] for number in refused if number in entries}
    waiting = len(entries) - len(refused)
    return Left(path, header["tracking"], waiting, len(refused), refusal=refusal_of(refused))


def refusal_of(refused: Mapping[int, str]) -> str:
    """Why one of those was refused; nothing where none was."""
    return next(iter(refused.values()), "")

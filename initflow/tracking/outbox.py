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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from initflow.core.paths import of_user, own
from initflow.errors import OutboxError

FORMAT = 1
SUFFIX = ".outbox"
LIMIT = 1 << 30  # bytes of an outbox
HEADER = 1 << 20  # bytes that what is said of nothing may take
KEY = "waiting-"  # begins what stands for an id that only the server can give
MODEL_KEY = f"{KEY}model-"
KEYS = re.compile(rf"{KEY}(?:model-)?[0-9a-f]{{32}}(?:-experiment)?")
KEYS_IN_BYTES = re.compile(KEYS.pattern.encode())
RUN = "run"  # the kind of an entry that is all of a run: see as_one

Known = dict[str, str]  # the ids that keys stand for; "" for a key that will never have one


def new_key(begin: str = KEY) -> str:
    """What stands for a run's id, or for a model's, in all texts until the server has given it."""
    return begin + uuid.uuid4().hex


def experiment_key(run: str) -> str:
    """What stands for the id of the experiment of a run with this key."""
    return f"{run}-experiment"


def folder() -> Path:
    """Where outboxes lie: INITFLOW_OUTBOX, else in the user's folder for such things."""
    given = os.environ.get("INITFLOW_OUTBOX")
    return own(given) if given else of_user("state") / "outbox"


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


def as_one(run: str, entries: Sequence[Entry]) -> Entry:
    """All ``entries`` of a run, the first of which makes it, as a single one."""
    parts = [{"kind": one.kind, "values": one.values, "bytes": len(one.content)} for one in entries]
    return Entry(RUN, run, {"parts": parts}, b"".join(one.content for one in entries))


def parts_of(entry: Entry) -> list[Entry]:
    """The entries that :func:`as_one` made one of."""
    parts, at = [], 0
    for part in entry.values["parts"]:
        content = entry.content[at : at + part["bytes"]]
        parts.append(Entry(part["kind"], entry.run, part["values"], content, entry.is_again))
        at += part["bytes"]
    return parts


class RefusedError(Exception):
    """An entry cannot be sent: the server does not take it."""


class NoModelError(Exception):
    """All of an entry of a run was sent but for its model; ``known`` is what was learned by it."""

    def __init__(self, reason: str, known: Known) -> None:
        super().__init__(reason)
        self.known = known


class NeverMadeError(RefusedError):
    """An entry is of a run that was never made."""


class UnknownKeyError(Exception):
    """An entry is of a run that is not there yet: the one that makes it waits elsewhere."""


class Outbox:
    """The file ``path`` with the entries for ``tracking``, held by this process alone."""

    def __init__(self, path: Path, tracking: str) -> None:
        """A new one."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = lock(path)
        self._lock.acquire()
        header = _line({"format": FORMAT, "tracking": tracking})
        self._recall(path, header)
        try:
            _write_whole(path, header)
        except OSError:
            self.discard()
            raise

    @classmethod
    def reopened(cls, path: Path) -> Outbox:
        """The one that another process has left.

        Raises :class:`filelock.Timeout` where a process holds it, :class:`OutboxError` for a file
        that is none.
        """
        self = object.__new__(cls)
        self._lock = lock(path)
        try:
            self._lock.acquire()
        except OSError as error:
            if isinstance(error, Timeout):
                raise
            raise OutboxError(f"outbox '{path}' cannot be held: {error.strerror}") from error
        try:
            whole = _whole_lines(path)
            if len(whole) < path.stat().st_size:  # its process died as it wrote the last line
                os.truncate(path, len(whole))
            self._recall(path, whole)
        except BaseException:
            self._lock.release()
            raise
        return self

    def _recall(self, path: Path, whole: bytes) -> None:
        """Set the state to what the lines of the file ``path`` say."""
        self.path = path
        self.known: Known = {}
        self.refused: dict[int, str] = {}
        self._lines: dict[int, dict[str, Any]] = {}
        self._last = 0
        if not whole:
            raise OutboxError(f"outbox '{path}' is empty")
        for at, text in enumerate(whole.splitlines(), start=1):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            match at == 1, line:
                case True, {"format": version, "tracking": str(tracking)} if version == FORMAT:
                    self.tracking = tracking
                case False, {
                    "entry": int(number),
                    "kind": str(),
                    "run": str(),
                    "values": dict(),
                    "bytes": int(size),
                } if not size or isinstance(line.get("sha256"), str):
                    self._last = number
                    self._lines[number] = line
                case False, {"sent": int(number), "known": dict(known)} if all(
                    isinstance(id_, str) for id_ in known.values()
                ):
                    self._lines.pop(number, None)
                    self.refused.pop(number, None)
                    self.known |= known
                case False, {"refused": int(number), "reason": str(reason)}:
                    if number in self._lines:
                        self._set_aside(number, reason)
                case _:
                    raise OutboxError(f"outbox '{path}' is damaged at line {at}")
        self.waiting = deque(n for n in self._lines if n not in self.refused)
        self.size = len(whole) + sum(line["bytes"] for line in self._lines.values())

    def left(self) -> Left:
        """How much it holds."""
        refusal = next(iter(self.refused.values()), "")
        return Left(self.path, self.tracking, len(self.waiting), len(self.refused), refusal=refusal)

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
            file.parent.mkdir(exist_ok=True, mode=0o700)
            _write_whole(file, entry.content)
        self._note(line)
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
            self._note({"sent": number, "known": known})
        self.waiting.remove(number)
        self.refused.pop(number, None)
        self.size -= self._lines.pop(number)["bytes"]
        with contextlib.suppress(OSError):
            self._file(number).unlink(missing_ok=True)

    def refuse(self, number: int, reason: str) -> None:
        """Note that it cannot be sent: it stays, and does not hold up the others."""
        with contextlib.suppress(OSError):
            self._note({"refused": number, "reason": reason})
        self.waiting.remove(number)
        self._set_aside(number, reason)

    def _set_aside(self, number: int, reason: str) -> None:
        self.refused[number] = reason
        line = self._lines[number]
        self.known |= without_id(line["kind"], line["run"])

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
        remove(self.path, self._lock)

    def _file(self, number: int) -> Path:
        return Path(f"{self.path}.d") / str(number)

    def _note(self, values: Mapping[str, Any]) -> None:
        line = _line(values)
        _write(self.path, line)
        self.size += len(line)


def without_id(kind: str, run: str) -> Known:
    """Of an entry that will not be sent: a run that it was to make will never have an id."""
    return {run: "", experiment_key(run): ""} if kind in ("create", RUN) else {}


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


def _write_whole(path: Path, content: bytes) -> None:
    """A new file, which is there when it is whole, whatever happens to the machine."""
    arriving = Path(f"{path}.new")
    try:
        arriving.unlink(missing_ok=True)
        _write(arriving, content)
        arriving.replace(path)
    except OSError:
        arriving.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write(path: Path, content: bytes) -> None:
    """Add to a file, for its owner's eyes: flushed to disk, whole or not at all."""
    with open(  # Path.open takes no opener; and what a buffer holds could be written later
        path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600)
    ) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(content)
            while rest:  # a disk may take a part of it, and be full only at the next
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def lock(path: Path) -> FileLock:
    """By which a process holds ``path``; it may be taken in one thread and let go in another."""
    return FileLock(f"{path}.lock", timeout=0, thread_local=False)


def remove(path: Path, held: FileLock) -> None:
    """Remove a file that this process holds, and its lock, as far as the system lets it."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    held.release()
    with contextlib.suppress(OSError):
        Path(held.lock_file).unlink(missing_ok=True)


def _whole_lines(path: Path) -> bytes:
    """All but a last line that was cut off as it was written."""
    try:
        if not path.is_file():  # but a device, perhaps without an end
            raise OutboxError(f"outbox '{path}' is no file")
        if path.stat().st_size > 2 * LIMIT + HEADER:
            raise OutboxError(f"outbox '{path}' is larger than any")
        content = path.read_bytes()
    except OSError as error:
        raise OutboxError(f"outbox '{path}' cannot be read: {error.strerror}") from error
    return content[: content.rfind(b"\n") + 1]


@dataclass(frozen=True)
class Left:
    """What an outbox still holds: how many entries wait and how many were refused, each with why.

    ``is_held`` by a process that is sending them; ``is_away``: the server does not answer.
    """

    path: Path
    tracking: str
    waiting: int
    refused: int
    reason: str = ""
    refusal: str = ""
    is_held: bool = False
    is_away: bool = False

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"path": str(self.path)}


def paths() -> list[Path]:
    """All outboxes, the oldest first."""
    return sorted(folder().glob(f"*{SUFFIX}"))


def left(path: Path) -> Left | None:
    """What it holds, looked at without holding it; None where it is gone meanwhile."""
    if not path.exists():
        return None
    looked_at = object.__new__(Outbox)
    looked_at._recall(path, _whole_lines(path))
    return looked_at.left()

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
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from initflow.errors import OutboxError, cause

FORMAT = 1
SUFFIX = ".outbox"
LIMIT = 1 << 30  # bytes of an outbox
IN_MEMORY = 64 << 20  # bytes that wait in memory where the disk takes no more
SLOW_S = 1.0  # a server that takes longer for an entry is not waited for,
SLOW_FOR_S = 10.0  # for so long
PATIENCE_S = 10.0  # for an id, of a server that is only slow
PAUSES_S = (0.5, 30.0)  # between attempts: the first, and the longest
KEY = "waiting-"  # begins what stands for an id that only the server can give
MODEL_KEY = f"{KEY}model-"
KEYS = re.compile(rf"{KEY}(?:model-)?[0-9a-f]{{32}}(?:-experiment)?")
DAMAGED = (ValueError, KeyError, TypeError, AttributeError)

Known = dict[str, str]  # the ids that keys stand for


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
        return Path(os.path.expanduser(given))  # noqa: PTH111 - leaves an unknown ~user as it is
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
    """An entry can never be sent: the server does not take it."""


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
        self._lock.acquire(blocking=False)
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
        self.size -= self._lines.pop(number)["bytes"]
        self._file(number).unlink(missing_ok=True)

    def refuse(self, number: int, reason: str) -> None:
        """Note that it cannot be sent: it stays, and does not hold up the others."""
        with contextlib.suppress(OSError):
            self._write({"refused": number, "reason": reason})
        self.waiting.remove(number)
        self.refused[number] = reason

    def close(self) -> None:
        """Let others have it; without anything in it, it is gone."""
        if self._lines:
            self._lock.release()
        else:
            self.discard()

    def discard(self) -> None:
        shutil.rmtree(self._file(0).parent, ignore_errors=True)
        self.path.unlink(missing_ok=True)
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def _file(self, number: int) -> Path:
        return Path(f"{self.path}.d") / str(number)

    def _write(self, line: Mapping[str, Any]) -> None:
        """Add a line, flushed to disk, whole or not at all."""
        text = _line(line)
        with _opened(self.path) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                file.write(text)
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise
        self.size += len(text)


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


def _opened(path: Path) -> Any:
    """To be added to; for its owner's eyes, and without a buffer, which could be written later."""
    return open(  # Path.open takes no opener
        path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600)
    )


def _write_through(file: Path, content: bytes) -> None:
    with _opened(file) as opened:
        opened.truncate(0)
        view = memoryview(content)
        while view:
            view = view[opened.write(view) :]
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
        if path.stat().st_size > 2 * LIMIT:
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
    """What an outbox still holds: how many entries wait, and how many were refused, and why.

    ``is_held`` by a process that is sending them.
    """

    path: Path
    tracking: str
    waiting: int
    refused: int
    reason: str = ""
    is_held: bool = False


def paths() -> list[Path]:
    """All outboxes, the oldest first."""
    return sorted(folder().glob(f"*{SUFFIX}"))


def left(path: Path) -> Left | None:
    """What it holds, looked at without holding it; None where it is gone meanwhile."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    header, *lines = _parsed(path, content[: content.rfind(b"\n") + 1])
    through = {line["sent"] for line in lines if "sent" in line}
    refused = {line["refused"]: line["reason"] for line in lines if "refused" in line}
    entries = {line["entry"] for line in lines if "entry" in line} - through
    reason = next(iter(refused.values()), "")
    return Left(path, header["tracking"], len(entries - set(refused)), len(refused), reason)


CarryOut = Callable[[Entry, Known], Known]  # sends an entry; what it learned: ids by key


class Sender:
    """Sends entries to ``tracking`` in their order: at once, or when it can be reached again.

    ``carry_out`` sends one; ``is_outage`` says of its error that it may work later. While
    something waits, a thread tries again and again, and all that comes is put behind it.
    """

    def __init__(
        self,
        tracking: str,
        carry_out: CarryOut,
        is_outage: Callable[[BaseException], bool],
        reason_of: Callable[[BaseException], str] = cause,
        slow_s: float = SLOW_S,
    ) -> None:
        self.tracking = tracking
        self.known: Known = {}
        self.reason = ""  # of the last failure
        self.lost = 0  # entries that neither disk nor memory had room for
        self._carry_out, self._is_outage = carry_out, is_outage
        self._reason_of, self._slow_s = reason_of, slow_s
        self._is_away = False
        self._lock = threading.RLock()
        self._queue: deque[tuple[int | None, Entry | None]] = deque()  # the number, if on disk
        self._box: Outbox | None = None
        self._thread: threading.Thread | None = None
        self._direct_from = 0.0  # of the monotonic clock
        self._hurry = threading.Event()
        self._empty = threading.Event()
        self._empty.set()

    def send(self, entry: Entry, *, is_asking: bool = False) -> None:
        """Send ``entry`` now, if nothing waits before it and it can be; else keep it.

        One that ``is_asking`` for an id is put off only while the server is away. Raises what
        ``carry_out`` raises, unless that is an outage.
        """
        if is_asking and not self._is_away:
            self._empty.wait(PATIENCE_S)
        with self._lock:
            started = time.monotonic()
            if not self._queue and (is_asking or started >= self._direct_from):
                try:
                    self.known |= self._carry_out(entry, self.known)
                except BaseException as error:
                    if not self._is_outage(error):
                        raise
                    self._failed(error)
                else:
                    if time.monotonic() - started > self._slow_s:
                        self.reason = "it is slow"
                        self._direct_from = time.monotonic() + SLOW_FOR_S
                    return
            self._keep(entry)
            self._begin()

    def _failed(self, error: BaseException) -> None:
        self.reason, self._is_away = self._reason_of(error), True

    def waiting(self) -> int:
        """How many entries are not sent yet."""
        with self._lock:
            return len(self._queue)

    def unsaved(self) -> int:
        """How many of them are in memory only."""
        with self._lock:
            return sum(number is None for number, _ in self._queue)

    def settle(self, patience_s: float) -> bool:
        """Whether everything was sent, tried for so long."""
        self._hurry.set()
        return self._empty.wait(patience_s)

    def place(self) -> Path:
        """Where what waits is kept."""
        return self._box.path if self._box else folder()

    def _keep(self, entry: Entry) -> None:
        self._queue.append((None, entry))
        self._save()
        unsaved = sum(_size(kept) for number, kept in self._queue if number is None and kept)
        if unsaved > IN_MEMORY:
            self._queue.pop()
            self.lost += 1

    def _save(self) -> None:
        """Bring to disk what is not there yet, in its order, as far as it has room."""
        for at, (number, entry) in enumerate(self._queue):
            if number is None and entry is not None:
                try:
                    self._box = self._box or self._new_box()
                    self._queue[at] = (self._box.add(entry), None)
                except OSError as error:
                    self.reason = f"'{self.place()}': {error.strerror or error}"
                    return

    def _new_box(self) -> Outbox:
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}{SUFFIX}"
        return Outbox(folder() / name, self.tracking)

    def _begin(self) -> None:
        self._empty.clear()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        """Until nothing waits."""
        pause, longest = PAUSES_S
        while True:
            with self._lock:
                if not self._queue:
                    if self._box:
                        self._box.close()
                    self._box = self._thread = None
                    self._empty.set()
                    return
            if self._try_first():
                pause = PAUSES_S[0]
                continue
            self._hurry.wait(pause)
            self._hurry.clear()
            pause = min(2 * pause, longest)

    def _try_first(self) -> bool:
        """Send what waits first; whether that is done with."""
        with self._lock:
            number, entry = self._queue[0]
            known = self.known | (self._box.known if self._box else {})
        try:
            if entry is None:
                assert self._box
                assert number
                entry = self._box.entry(number)
            learned = self._carry_out(entry, known)
        except BaseException as error:  # noqa: BLE001 - a thread has nobody to raise it to
            if self._is_outage(error):
                with self._lock:
                    self._failed(error)
                    self._save()
                return False
            refused: str | None = self._reason_of(error)
            learned = {}
        else:
            refused = None
        with self._lock:
            self._is_away = False
            self.known |= learned
            self._save()  # a refusal is remembered with its entry, and what follows may know of it
            number, _ = self._queue.popleft()
            if number is None or self._box is None:
                self.lost += refused is not None
            elif refused is None:
                self._box.sent(number, learned)
            else:
                self._box.refuse(number, refused)
        return True


def _size(entry: Entry) -> int:
    return len(entry.content) + len(json.dumps(entry.values))


def drained(
    path: Path,
    carry_out: CarryOut,
    is_outage: Callable[[BaseException], bool],
    reason_of: Callable[[BaseException], str] = cause,
    told: Callable[[int, int], None] = lambda *_: None,
) -> tuple[int, Left | None]:
    """Send what another process has left in ``path``: how many were sent, and what is still there.

    Raises :class:`OutboxError` for a file that is none.
    """
    try:
        box = Outbox.reopened(path)
    except Timeout:
        at_hand = left(path)
        return 0, at_hand and Left(
            path, at_hand.tracking, at_hand.waiting, at_hand.refused, is_held=True
        )
    except OutboxError:
        if not path.exists():  # another one was first
            return 0, None
        raise
    sent, all_of_them, reason = 0, len(box.waiting), ""
    with _closing(box):
        while box.waiting:
            number = box.waiting[0]
            try:
                learned = carry_out(box.entry(number), box.known)
            except Exception as error:  # noqa: BLE001 - whatever refuses it
                reason = reason_of(error)
                if is_outage(error):
                    break
                box.refuse(number, reason)
            else:
                box.sent(number, learned)
                sent += 1
                told(sent, all_of_them)
        reason = reason or next(iter(box.refused.values()), "")
        there = Left(path, box.tracking, len(box.waiting), len(box.refused), reason)
    return sent, there if there.waiting or there.refused else None


@contextlib.contextmanager
def _closing(box: Outbox) -> Iterator[None]:
    try:
        yield
    finally:
        box.close()

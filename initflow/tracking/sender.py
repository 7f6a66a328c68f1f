"""Entries sent in their order: at once, or when the server can be reached again.

While something waits, all that comes is put behind it, in an outbox or, where the disk has no room,
in memory.
"""

from __future__ import annotations

import json
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from filelock import Timeout

from initflow.errors import OutboxError, cause
from initflow.tracking.outbox import (
    MAKING,
    SUFFIX,
    Entry,
    Known,
    Left,
    NeverMadeError,
    Outbox,
    UnknownKeyError,
    experiment_key,
    folder,
    left,
    refusal_of,
)

IN_MEMORY = 64 << 20  # bytes that wait in memory where the disk takes no more
SLOW_S = 1.0  # a server that takes longer for an entry is not waited for,
SLOW_FOR_S = 10.0  # for so long
PATIENCE_S = 10.0  # for an id, of a server that is only slow
PAUSES_S = (0.5, 30.0)  # between attempts: the first, and the longest
TRIES = 8  # of an entry that fails though the server answers: a minute; then others come first

CarryOut = Callable[[Entry, Known], Known]  # sends an entry; what it learned: ids by key


@dataclass(frozen=True)
class Way:
    """How entries get to ``tracking``, an address without credentials.

    ``carry_out`` sends one; it may raise :class:`RefusedError` and :class:`UnknownKeyError`.
    ``is_outage`` says of its error that it may work later, ``is_refusal`` of an entry that waits
    that it never will, ``answers`` whether the server does, and ``reason_of`` is an error in a few
    words. What takes longer than ``slow_s`` is slow.
    """

    tracking: str
    carry_out: CarryOut
    is_outage: Callable[[BaseException], bool]
    is_refusal: Callable[[BaseException], bool]
    answers: Callable[[], bool] = lambda: False
    reason_of: Callable[[BaseException], str] = cause
    slow_s: float = SLOW_S

    def is_hopeless(self, error: BaseException, tries: int) -> bool:
        """Whether an entry that waits is to be set aside after ``error``, the last of ``tries``."""
        if self.is_refusal(error):
            return True
        is_stuck = tries >= TRIES and not isinstance(error, UnknownKeyError)
        return is_stuck and self.answers()


class Sender:
    """Sends entries in their order: at once, or when the server can be reached again.

    While something waits, a thread tries again and again, and all that comes is put behind it.
    """

    def __init__(self, way: Way) -> None:
        self.tracking = way.tracking
        self.known: Known = {}
        self.reason = ""  # of the last failure
        self.lost = 0  # entries that neither disk nor memory had room for
        self.is_away = False
        self._way = way
        self._lock = threading.RLock()
        self._queue: deque[_Kept] = deque()
        self._in_memory = 0  # bytes
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
        size = len(entry.content) + len(json.dumps(entry.values))
        if is_asking and not self.is_away:
            self._empty.wait(PATIENCE_S)
        with self._lock:
            started = time.monotonic()
            if not self._queue and (is_asking or started >= self._direct_from):
                try:
                    self.known |= self._way.carry_out(entry, self.known)
                except NeverMadeError:
                    self._lose(entry)
                    return
                except BaseException as error:
                    if not self._way.is_outage(error):
                        raise
                    self._failed(error)
                    entry = replace(entry, is_again=True)  # only the answer may be lost
                else:
                    # What asks may also take a while to be made.
                    if not is_asking and time.monotonic() - started > self._way.slow_s:
                        self.reason = "it is slow"
                        self._direct_from = time.monotonic() + SLOW_FOR_S
                    return
            self._keep(entry, size)
            self._begin()

    def _failed(self, error: BaseException) -> None:
        self.reason, self.is_away = self._way.reason_of(error), True

    def waiting(self) -> int:
        """How many entries are not sent yet."""
        with self._lock:
            return len(self._queue)

    def unsaved(self) -> int:
        """How many of them are in memory only."""
        with self._lock:
            return sum(kept.number is None for kept in self._queue)

    def flush(self, patience_s: float, *, as_it_goes: bool = False) -> bool:
        """Whether everything was sent, tried for so long; ``as_it_goes``: longer while it goes on.

        A server that is away is not waited for any longer than that either way.
        """
        while True:
            before = self.waiting()
            self._hurry.set()
            if self._empty.wait(patience_s):
                return True
            if not as_it_goes or self.is_away or self.waiting() >= before:
                return False

    def place(self) -> Path:
        """Where what waits is kept."""
        return self._box.path if self._box else folder()

    def _keep(self, entry: Entry, size: int) -> None:
        self._queue.append(_Kept(None, entry, size))
        self._in_memory += size
        self._save()
        if self._in_memory > IN_MEMORY:
            self._queue.pop()
            self._in_memory -= size
            self._lose(entry)

    def _lose(self, entry: Entry) -> None:
        self.lost += 1
        if entry.kind == MAKING:
            self.known |= {entry.run: "", experiment_key(entry.run): ""}

    def _save(self) -> None:
        """Bring to disk what is not there yet, in its order, as far as it has room."""
        if not self._in_memory:
            return
        for at, kept in enumerate(self._queue):
            if kept.number is None and kept.entry is not None:
                try:
                    self._box = self._box or self._new_box()
                    self._queue[at] = _Kept(self._box.add(kept.entry), None, 0)
                    self._in_memory -= kept.size
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
        (pause, longest), tries = PAUSES_S, 0
        try:
            while not self._is_through():
                if self._try_first(tries):
                    pause, tries = PAUSES_S[0], 0
                    continue
                tries += 1
                self._hurry.wait(pause)
                self._hurry.clear()
                pause = min(2 * pause, longest)
        finally:  # after an error that is none of sending, the next entry begins again
            with self._lock:
                if self._thread is threading.current_thread():
                    self._thread = None

    def _is_through(self) -> bool:
        with self._lock:
            if self._queue:
                return False
            if self._box:
                self._box.close()
            self._box = self._thread = None
            self._empty.set()
            return True

    def _try_first(self, tries: int) -> bool:
        """Send what waits first, which was tried before; whether that is done with."""
        with self._lock:
            first, box = self._queue[0], self._box
            known = self.known | (box.known if box else {})
        refused, learned = None, {}
        try:
            if first.entry is not None:
                entry = replace(first.entry, is_again=True)
            else:
                assert box
                assert first.number
                entry = box.entry(first.number)
            learned = self._way.carry_out(entry, known)
        except BaseException as error:  # noqa: BLE001 - a thread has nobody to raise it to
            if not self._way.is_hopeless(error, tries):
                with self._lock:
                    self._failed(error)
                    self._save()
                return False
            refused = self._way.reason_of(error)
        with self._lock:
            self.is_away = False
            self.known |= learned
            self._save()  # a refusal is remembered with its entry, and what follows may know of it
            first = self._queue.popleft()
            self._in_memory -= first.size
            if first.number is None or self._box is None:
                if refused is not None and first.entry:
                    self._lose(first.entry)
            elif refused is None:
                self._box.sent(first.number, learned)
            else:
                self._box.refuse(first.number, refused)
        return True


class _Kept(NamedTuple):
    """What waits: its number on disk or, where that has no room, itself, and its size."""

    number: int | None
    entry: Entry | None
    size: int


def drained(
    path: Path,
    way: Way,
    told: Callable[[int, int], None] = lambda *_: None,
    *,
    patience_s: float = math.inf,
    again: bool = False,
) -> tuple[int, Left | None]:
    """Send what another process has left in ``path``: how many were sent, and what is still there.

    ``again`` what was refused, too. No entry is begun after ``patience_s``. Raises
    :class:`OutboxError` for a file that is none.
    """
    try:
        box = Outbox.reopened(path)
    except Timeout:
        there = left(path)
        return 0, there and replace(there, is_held=True)
    except OutboxError:
        if not path.exists():  # another one was first
            return 0, None
        raise
    try:
        if again:
            box.ask_again()
        there = _drain(box, way, told, time.monotonic() + patience_s)
    finally:
        box.close()
    return there.sent, there if there.waiting or there.refused else None


def _drain(box: Outbox, way: Way, told: Callable[[int, int], None], until: float) -> Left:
    sent, tries, reason, is_away = 0, 0, "", False
    all_of_them = len(box.waiting)
    while box.waiting and time.monotonic() < until:
        number = box.waiting[0]
        try:
            learned = way.carry_out(box.entry(number), box.known)
        except Exception as error:  # noqa: BLE001 - whatever refuses it
            reason, tries = way.reason_of(error), tries + 1
            if way.is_hopeless(error, tries):
                box.refuse(number, reason)
                tries = 0
            elif isinstance(error, UnknownKeyError) or not way.answers():
                is_away = not isinstance(error, UnknownKeyError)
                break
        else:
            box.sent(number, learned)
            sent, tries = sent + 1, 0
            told(sent, all_of_them)
    return Left(
        box.path,
        box.tracking,
        len(box.waiting),
        len(box.refused),
        reason if box.waiting else "",
        refusal_of(box.refused),
        is_away=is_away,
        sent=sent,
    )

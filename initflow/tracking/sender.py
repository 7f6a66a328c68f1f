"""Entries sent in their order: at once, or when the server can be reached again.

While something waits, all that comes is put behind it, in an outbox or, where the disk has no room,
in memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import Timeout

from initflow.errors import OutboxError, cause
from initflow.tracking.outbox import (
    SUFFIX,
    Entry,
    Known,
    Left,
    NeverMadeError,
    NoModelError,
    Outbox,
    UnknownKeyError,
    folder,
    left,
    without_id,
)

IN_MEMORY = 64 << 20  # bytes that wait in memory where the disk takes no more
SLOW_S = 1.0  # a server that takes longer for an entry is not waited for,
SLOW_FOR_S = 10.0  # for so long
PATIENCE_S = 10.0  # for an id, of a server that is only slow
PAUSES_S = (0.5, 30.0)  # between attempts: the first, and the longest
TRIES = 8  # of an entry that fails though the server answers: a minute; then others come first


@dataclass(frozen=True)
class Way:
    """How entries get to ``tracking``, an address without credentials.

    ``carry_out`` sends one, and returns the ids that it learned, by key; it may raise
    :class:`RefusedError` and :class:`UnknownKeyError`. ``is_outage`` says of its error that it may
    work later, ``is_refusal`` of an entry that waits that it never will, ``answers`` whether the
    server does; ``reason_of`` is an error in a few words. What takes over ``slow_s`` is slow.
    """

    tracking: str
    carry_out: Callable[[Entry, Known], Known]
    is_outage: Callable[[BaseException], bool]
    is_refusal: Callable[[BaseException], bool]
    answers: Callable[[], bool] = lambda: False
    reason_of: Callable[[BaseException], str] = cause
    slow_s: float = SLOW_S

    def is_last(self, tries: int) -> bool:
        """Whether an entry is not to be tried again after ``tries``, and one now.

        To be asked before: a server that was away may be back just after a try that failed.
        """
        return tries >= TRIES and self.answers()

    def is_hopeless(self, error: BaseException, *, is_last: bool) -> bool:
        """Whether an entry that waits is to be set aside after ``error``."""
        is_stuck = is_last and not isinstance(error, UnknownKeyError)
        return self.is_refusal(error) or is_stuck


class Sender:
    """Sends to one server or store; while something waits, a thread tries again and again."""

    def __init__(self, way: Way) -> None:
        self.tracking = way.tracking
        self.known: Known = {}
        self.reason = ""  # of the last failure
        self.lost = 0  # entries that neither disk nor memory had room for
        self.is_away = False
        self._way = way
        self._lock = threading.RLock()
        self._queue: deque[int | Entry] = deque()  # by its number, what is on disk
        self._in_memory = 0  # bytes
        self._box: Outbox | None = None
        self._thread: threading.Thread | None = None
        self._direct_from = 0.0  # of the monotonic clock
        self._hurry = threading.Event()
        self._empty = threading.Event()
        self._empty.set()

    def send(self, entry: Entry, *, needs_id: bool = False) -> None:
        """Send ``entry`` now, if nothing waits before it and it can be; else keep it.

        One that ``needs_id`` back is put off only while the server is away. Raises what
        ``carry_out`` raises, unless that is an outage.
        """
        if needs_id and not self.is_away:
            self._empty.wait(PATIENCE_S)
        with self._lock:
            started = time.monotonic()
            if not self._queue and (needs_id or started >= self._direct_from):
                try:
                    self.known |= self._way.carry_out(entry, self.known)
                except NeverMadeError:
                    self._lose(entry)
                    return
                except BaseException as error:
                    if not self._way.is_outage(error):
                        self.known |= error.known if isinstance(error, NoModelError) else {}
                        raise
                    self.reason, self.is_away = self._way.reason_of(error), True
                    entry = replace(entry, is_again=True)  # only the answer may be lost
                else:
                    # A run or a model may also take a while to be made.
                    if not needs_id and time.monotonic() - started > self._way.slow_s:
                        self.reason = "it is slow"
                        self._direct_from = time.monotonic() + SLOW_FOR_S
                    return
            size = _size(entry)  # first, as it fails for what cannot be kept
            self._queue.append(entry)
            self._in_memory += size
            self._save()
            if self._in_memory > IN_MEMORY:
                self._queue.pop()
                self._in_memory -= size
                self._lose(entry)
            self._empty.clear()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
                self._thread.start()

    def waiting(self) -> int:
        """How many entries are not sent yet."""
        with self._lock:
            return len(self._queue)

    def unsaved(self) -> int:
        """How many of them are in memory only."""
        with self._lock:
            return sum(isinstance(kept, Entry) for kept in self._queue)

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

    def _lose(self, entry: Entry) -> None:
        self.lost += 1
        self.known |= without_id(entry.kind, entry.run)

    def _save(self) -> None:
        """Bring to disk what is not there yet, in its order, as far as it has room."""
        if not self._in_memory:
            return
        for at, kept in enumerate(self._queue):
            if isinstance(kept, Entry):
                try:
                    if not self._box:
                        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}{SUFFIX}"
                        self._box = Outbox(folder() / name, self.tracking)
                    self._queue[at] = self._box.add(kept)
                    self._in_memory -= _size(kept)
                except OSError as error:
                    self.reason = f"'{self.place()}': {error.strerror or error}"
                    return

    def _work(self) -> None:
        """Until nothing waits."""
        (pause, longest), tries = PAUSES_S, 0
        try:
            while not self._close_if_empty():
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

    def _close_if_empty(self) -> bool:
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
        refused, learned, is_last = None, {}, self._way.is_last(tries)
        try:
            if isinstance(first, Entry):
                entry = replace(first, is_again=True)
            else:
                assert box
                entry = box.entry(first)
            learned = self._way.carry_out(entry, known)
        except BaseException as error:  # noqa: BLE001 - a thread has nobody to raise it to
            if not self._way.is_hopeless(error, is_last=is_last):
                with self._lock:
                    self.reason, self.is_away = self._way.reason_of(error), True
                    self._save()
                return False
            refused = self._way.reason_of(error)
        with self._lock:
            self.is_away = False
            self.known |= learned
            self._save()  # a refusal is remembered with its entry, and what follows may know of it
            first, box = self._queue.popleft(), self._box
            if isinstance(first, Entry):
                self._in_memory -= _size(first)
                if refused is not None:
                    self._lose(first)
            elif box and refused is None:
                box.sent(first, learned)
            elif box:
                box.refuse(first, str(refused))
        return True


def _size(entry: Entry) -> int:
    return len(entry.content) + len(json.dumps(entry.values))


def drained(
    path: Path,
    way: Way,
    progress: Callable[[int, int], None] = lambda *_: None,
    *,
    patience_s: float = math.inf,
    again: bool = False,
) -> tuple[int, Left | None]:
    """Send what another process has left in ``path``: how many were sent, and what is still there.

    ``progress`` is called with how many were sent, and of how many. ``again`` what was refused,
    too. No entry is begun after ``patience_s``. Raises :class:`OutboxError` for a file that is
    none.
    """
    until = time.monotonic() + patience_s
    sent, tries, reason, is_away = 0, 0, "", False
    try:
        with contextlib.closing(Outbox.reopened(path)) as box:
            if again:
                box.ask_again()
            all_of_them = len(box.waiting)
            while box.waiting and time.monotonic() < until:
                number, is_last = box.waiting[0], way.is_last(tries + 1)
                try:
                    learned = way.carry_out(box.entry(number), box.known)
                except Exception as error:  # noqa: BLE001 - whatever refuses it
                    reason, tries = way.reason_of(error), tries + 1
                    if way.is_hopeless(error, is_last=is_last):
                        box.refuse(number, reason)
                        tries = 0
                    elif isinstance(error, UnknownKeyError) or not way.answers():
                        is_away = not isinstance(error, UnknownKeyError)
                        break
                else:
                    box.sent(number, learned)
                    sent, tries = sent + 1, 0
                    progress(sent, all_of_them)
            there = replace(box.left(), reason=reason if box.waiting else "", is_away=is_away)
            return sent, there if there.waiting or there.refused else None
    except Timeout:
        held = left(path)
        return 0, held and replace(held, is_held=True)
    except OutboxError:
        if not path.exists():  # another one was first
            return 0, None
        raise

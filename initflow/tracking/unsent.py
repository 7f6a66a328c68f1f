"""What could not be sent to MLflow: reported, waited for, and sent later."""

from __future__ import annotations

import functools
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from initflow.core import workers
from initflow.core.progress import warn
from initflow.errors import OutboxError, TrackingError
from initflow.tracking import delivery, outbox
from initflow.tracking.connection import with_credentials
from initflow.tracking.outbox import Left
from initflow.tracking.sender import drained

CLOSING_PATIENCE_S = 5.0  # for what waits when a run has ended
Task = TypeVar("Task")
Result = TypeVar("Result")


class Synced(NamedTuple):
    """How many entries were sent, and what outboxes still hold."""

    sent: int
    left: Sequence[Left]

    def as_json(self) -> dict[str, object]:
        return {"sent": self.sent, "left": [left.as_json() for left in self.left]}


def sync(
    progress: Callable[[int, int], None] = lambda *_: None,
    *,
    only: str | None = None,
    patience_s: float = math.inf,
) -> Synced:
    """Send what waits in the outboxes of processes that have ended, in its order.

    Each goes where it belongs, and what was refused is tried again; or, with ``only``, an address
    without credentials, those alone that wait for it. Of a server that does not answer one is
    tried, and none is begun after ``patience_s``. ``progress`` is called with how many were sent,
    and of how many in one outbox.
    """
    sent, there, away = 0, [], set()
    until = time.monotonic() + patience_s
    for path in outbox.paths():
        try:
            left = outbox.left(path)
            if left and only in (None, left.tracking) and left.tracking not in away:
                way = delivery.way(with_credentials(left.tracking))
                rest_s = until - time.monotonic()
                some, left = drained(path, way, progress, patience_s=rest_s, again=only is None)
                sent += some
        except OutboxError as error:
            left = Left(path, "", 0, 0, str(error))
        if left:
            there.append(left)
            away |= {left.tracking} if left.is_away else set()
    return Synced(sent, there)


def waiting_lines(*, send: bool = True) -> Iterator[str]:
    """What is still to be sent where we are writing to, and why; nothing, where all is there.

    What others have left on this machine is sent now, but for ``send``, as far as that takes no
    longer than a moment.
    """
    own = delivery.sender()
    only = own.tracking if send and not own.waiting() else ""
    for left in sync(only=only, patience_s=CLOSING_PATIENCE_S).left:
        if left.tracking in ("", own.tracking):
            yield from left_lines(left)
    for rest in _of_workers.values():
        if rest.waiting and rest.host != platform.node():
            yield (
                f"{_entries(rest.waiting)} on {rest.host} in '{rest.place}' for MLflow at "
                f"'{rest.tracking}' ({rest.reason}): 'initflow sync' there sends them."
            )
    if own.unsaved():
        yield (
            f"{_entries(own.unsaved())} only in memory, as the outbox takes no more "
            f"({own.reason}), and will be gone with this process."
        )


def left_lines(left: Left) -> Iterator[str]:
    """What an outbox still holds, in words."""
    own = delivery.sender()
    is_own = own.place() == left.path
    if left.waiting:
        reason = own.reason if is_own else left.reason
        because = f" ({reason})" if reason else ""
        then = (
            "another process is sending them."
            if left.is_held and not is_own
            else "'initflow sync' sends them, or remove the file to forget them."
        )
        yield (
            f"{_entries(left.waiting)} in '{left.path}' for MLflow at "
            f"'{left.tracking}'{because}: {then}"
        )
    if left.refused:
        yield (
            f"{left.refused:,} of '{left.path}' were refused by MLflow at '{left.tracking}' "
            f"({left.refusal}): 'initflow sync' tries again, or remove the file to forget them."
        )
    if not left.tracking:
        yield f"{left.reason}: remove the file to forget it."


def _entries(n: int) -> str:
    return "1 entry waits" if n == 1 else f"{n:,} entries wait"


def flush() -> None:
    """Give what waits a moment to be sent, and report what is left in the log.

    The command line reports it by itself.
    """
    own = delivery.sender()
    if own.waiting() and not own.flush(CLOSING_PATIENCE_S):
        for line in waiting_lines(send=False):
            warn(line)


def check_kept() -> None:
    """Raise :class:`TrackingError` where some of what was measured could be kept nowhere."""
    here = _of_here()
    losers = [one for one in (here, *_of_workers.values()) if one.lost]
    if losers:
        raise TrackingError(
            f"{sum(one.lost for one in losers):,} entries for MLflow at '{here.tracking}' are "
            f"lost, as neither it nor the outbox takes them: {losers[0].reason}; give "
            "INITFLOW_OUTBOX a folder with room"
        )


@dataclass(frozen=True)
class Rest:
    """What a process has not sent: ``waiting`` on disk at ``place``, and ``lost`` at its end."""

    host: str
    process: int
    tracking: str
    place: str
    waiting: int
    lost: int
    reason: str


_of_workers: dict[tuple[str, int], Rest] = {}  # what each reported last, by host and process


def _of_here() -> Rest:
    own = delivery.sender()
    unsaved, here = own.unsaved(), (platform.node(), os.getpid())
    waiting, lost = own.waiting() - unsaved, own.lost + unsaved
    return Rest(*here, own.tracking, str(own.place()), waiting, lost, own.reason)


def results(
    pool: workers.WorkerPool, work: Callable[[Task], Result], next_task: Callable[[], Task | None]
) -> Iterator[tuple[Task, Result | workers.WorkerLostError]]:
    """As :func:`initflow.core.workers.results`; what workers could not send is kept for the end."""
    if pool.is_here:
        yield from workers.results(pool, work, next_task)
        return
    carry_out = functools.partial(_carried_out, work)
    for task, outcome in workers.results(pool, carry_out, next_task):
        if isinstance(outcome, workers.WorkerLostError):
            yield task, outcome
        else:
            result, rest = outcome
            _of_workers[rest.host, rest.process] = rest
            yield task, result


def _carried_out(work: Callable[[Task], Result], task: Task) -> tuple[Result, Rest]:
    """In a worker, whose process may end with the task."""
    result = work(task)
    flush()
    return result, _of_here()

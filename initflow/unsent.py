"""What could not be sent to MLflow: told, waited for, and sent later."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from initflow import delivery, outbox
from initflow.delivery import uri
from initflow.errors import OutboxError, TrackingError, without_credentials
from initflow.outbox import Left
from initflow.sender import drained

CLOSING_PATIENCE_S = 5.0  # for what waits when a run is through
_logger = logging.getLogger("initflow")


def send_earlier() -> None:
    """What other processes could not send to where we are going comes first."""
    if outbox.paths():
        sync(only=without_credentials(uri()), patience_s=CLOSING_PATIENCE_S)


@dataclass(frozen=True)
class Synced:
    """How many entries were sent, and what outboxes still hold."""

    sent: int
    left: Sequence[Left]


def sync(
    told: Callable[[int, int], None] = lambda *_: None,
    *,
    only: str | None = None,
    patience_s: float = math.inf,
) -> Synced:
    """Send what waits in the outboxes of processes that have ended, in its order.

    Each goes where it belongs, and what was refused is tried again; or, with ``only``, an address
    without credentials, those alone that wait for it. Of a server that does not answer one is
    tried, and none is begun after ``patience_s``.
    """
    sent, there, away = 0, [], set()
    until = time.monotonic() + patience_s
    for path in outbox.paths():
        try:
            left = outbox.left(path)
            if left and only in (None, left.tracking) and left.tracking not in away:
                where = uri() if without_credentials(uri()) == left.tracking else left.tracking
                some, left = drained(
                    path,
                    delivery.way(where),
                    told,
                    patience_s=until - time.monotonic(),
                    again=only is None,
                )
                sent += some
        except OutboxError as error:
            left = Left(path, "", 0, 0, str(error))
        if left:
            there.append(left)
            away |= {left.tracking} if left.is_away else set()
    return Synced(sent, there)


def waiting_lines(*, send: bool = True) -> list[str]:
    """What is still to be sent where we are writing to, and why; nothing, where all is there.

    What others have left is sent now, but for ``send``, as far as that takes no longer than a
    moment.
    """
    own = delivery.sender(uri())
    lines: list[str] = []
    if outbox.paths():
        only = own.tracking if send and not own.waiting() else ""
        there = sync(only=only, patience_s=CLOSING_PATIENCE_S).left
        lines = [
            line
            for left in there
            if left.tracking in ("", own.tracking)
            for line in left_lines(left)
        ]
    if own.unsaved():
        lines.append(
            f"{_entries(own.unsaved())} only in memory, as the outbox takes no more "
            f"({own.reason}), and will be gone with this process."
        )
    return lines


def left_lines(left: Left) -> Iterator[str]:
    """What an outbox still holds, in words."""
    own = delivery.sender(uri())
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


def settle() -> None:
    """Give what waits a moment to be sent, and tell of what is left in the log.

    The command line tells of it by itself.
    """
    own = delivery.sender(uri())
    if own.waiting() and not own.settle(CLOSING_PATIENCE_S):
        for line in waiting_lines(send=False):
            _logger.warning(line)


def check_kept() -> None:
    """Raise :class:`TrackingError` where some of what was measured could be kept nowhere."""
    own = delivery.sender(uri())
    lost = own.lost + own.unsaved()
    if lost:
        raise TrackingError(
            f"{lost:,} entries for MLflow at '{own.tracking}' are lost, as neither it nor the "
            f"outbox takes them: {own.reason}; give INITFLOW_OUTBOX a folder with room"
        )

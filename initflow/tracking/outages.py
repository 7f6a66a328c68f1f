"""What MLflow's errors mean: whether it is away for now, refuses, or has failed for good."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from urllib.parse import urlsplit

from mlflow.exceptions import InvalidUrlException, MlflowException, RestException
from sqlalchemy.exc import SQLAlchemyError

from initflow.core.secrets import without_credentials
from initflow.errors import OutageError, TrackingError, cause
from initflow.tracking import connection
from initflow.tracking.connection import is_served
from initflow.tracking.outbox import RefusedError, UnknownKeyError

LATER = (429, 500, 502, 503, 504)  # HTTP's words for: not now
RIGHTS = (401, 403)
NEVER = ("INVALID_STATE", "DATA_LOSS")  # two errors that MLflow calls 500 all the same
# Of a full disk, in SQLite's words and in others'; of a request sent twice, and of two at once.
FOR_NOW = re.compile(
    "database or disk is full|No space left on device|database is locked|IntegrityError"
)
# A driver may be missing, an address malformed.
FAILURES = (
    MlflowException,
    SQLAlchemyError,
    OSError,
    ImportError,
    ValueError,
    RefusedError,
    UnknownKeyError,
)
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
PATIENCE_S = 3.0  # after which a second signal ends a request that the first one waits for
SERVER_PATIENCE_S = 10.0


def is_refusal(where: str, error: BaseException) -> bool:
    """Whether an entry that waits is not to be tried again by itself: MLflow has understood it.

    What is between us and a server (a proxy, a lack of rights) may be gone the next time.
    """
    if is_outage(where, error):
        return False
    if not isinstance(error, MlflowException):
        return True
    is_answer = isinstance(error, RestException) or not is_served(where)
    return is_answer and _http_status(error) not in RIGHTS


def is_outage(where: str, error: BaseException) -> bool:
    """Whether what failed may work later: a server that is away, a disk that is full."""
    if isinstance(error, UnknownKeyError) or FOR_NOW.search(str(error)):
        return True
    if not is_served(where) or not _is_address(where) or isinstance(error, InvalidUrlException):
        return False
    if isinstance(error, MlflowException):
        return _http_status(error) in LATER and error.error_code not in NEVER
    # Those of requests, which files go by.
    answer = getattr(error, "response", None)
    of_network = isinstance(error, (ConnectionError, TimeoutError)) or (
        type(error).__module__.partition(".")[0] in ("requests", "urllib3")
    )
    return of_network and (answer is None or answer.status_code in LATER)


def reason(error: BaseException) -> str:
    """What is at the bottom of it: requests' errors come in many wrappings."""
    said = str(error) if isinstance(error, (RefusedError, UnknownKeyError)) else cause(error)
    _, wrapped, within = said.rpartition("Caused by ")
    timeout = re.search(r"[Rr]ead timed out|[Cc]onnect(ion)? .{0,40}timed out", said)
    if timeout:
        return timeout[0]
    if not wrapped:
        return without_credentials(said)
    quoted = re.findall(r"'([^']+)'", within)
    bottom = within.rpartition(": ")[2] if ": " in within else (quoted or [within])[-1]
    return bottom.strip("\"')(. ")


def _http_status(error: MlflowException) -> int:
    return int(error.get_http_status_code())  # type: ignore[no-untyped-call]


def _is_address(where: str) -> bool:
    try:
        parts = urlsplit(where)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold a signal back until what is being written is written; a late second one cuts it off.

    A request that is cut off may have made a run whose id nobody knows, and locks SQLite.
    """
    held: list[tuple[int, float]] = []
    is_main = threading.current_thread() is threading.main_thread()
    before = {n: set_ for n in STOPS if is_main and callable(set_ := signal.getsignal(n))}

    def hold(number: int, frame: FrameType | None) -> None:
        held.append((number, time.monotonic()))
        if held[-1][1] - held[0][1] > PATIENCE_S:
            before[number](number, frame)

    for number in before:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            number, _ = held[0]
            before[number](number, None)


@contextlib.contextmanager
def translated(where: str = "") -> Iterator[None]:
    """Raise what MLflow or its store, by default ours, refuses as :class:`TrackingError`.

    That it does not answer is an :class:`OutageError`.
    """
    where = where or connection.uri()
    try:
        with _uninterrupted(), connection.impatient():
            yield
    except FAILURES as error:
        is_away = is_outage(where, error)
        lines = [line for line in str(error).splitlines() if not line.startswith("(raised as")]
        said = lines[0] if lines else type(error).__name__
        if is_away:
            said = reason(error)
        elif "Response body: '<" in said:
            said = "what answers there is no MLflow server, but a page of HTML"
        message = without_credentials(f"MLflow at '{where}' failed: {said}")
        raise (OutageError if is_away else TrackingError)(message) from error


def check_reachable() -> None:
    """Raise :class:`TrackingError` where a tracking server does not answer for a while.

    For work that also reads from the server; what only writes goes on without it.
    """
    started = time.monotonic()
    while is_served():
        try:
            with translated():
                connection.client().search_experiments(max_results=1)
        except OutageError as error:
            tried = time.monotonic() - started
            if tried >= SERVER_PATIENCE_S:
                raise TrackingError(f"{error} (tried for {tried:.0f} s)") from error
            time.sleep(1)
        else:
            return

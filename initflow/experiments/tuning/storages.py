"""Where studies are kept: a journal or a database of Optuna's, opened, mended and held."""

from __future__ import annotations

import contextlib
import functools
import os
import time
import warnings
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from initflow.core.secrets import without_credentials, without_password
from initflow.errors import SettingError, StudyError, cause, first_line
from initflow.experiments.tuning.searches import Search

PATIENCE_S = 10.0  # for a database that does not answer
HEARTBEAT_S = 5
STALE_S = 20  # without a heartbeat, after which whoever had a trial is taken for dead
MOST_OPEN = 100  # studies that a worker keeps
JOURNAL = b'{"op_code":'  # what one begins with: nothing is taken off another file
Value = TypeVar("Value")
_studies: dict[Search, optuna.Study] = {}


def is_database(storage: str) -> bool:
    return "://" in storage


def is_shared(storage: str) -> bool:
    """Whether several machines can use it at once."""
    return is_database(storage) and not storage.startswith("sqlite")


def shown(storage: str) -> str:
    """Without a password."""
    return without_password(storage) if is_database(storage) else storage


def is_same_database(one: str, other: str) -> bool:
    """Whether two URLs lead to one database."""
    try:
        of_one, of_other = (
            (url.get_backend_name(), url.host, url.port, url.database)
            if url.get_backend_name() != "sqlite"
            else ("sqlite", os.path.realpath(url.database or ""))
            for url in map(make_url, (one, other))
        )
    except (ArgumentError, ValueError):  # the latter of a port
        return False
    return of_one == of_other


@contextlib.contextmanager
def locked(storage: str, study: str) -> Iterator[None]:
    """Hold the studies called ``study``, where their storage is this machine's.

    Raises :class:`StudyError` where another process holds them. In a database of several machines
    nothing is held: there the heartbeats tell.
    """
    if is_shared(storage):
        with _forgotten(storage):
            yield
        return
    try:
        file = make_url(storage).database if is_database(storage) else storage
    except (ArgumentError, ValueError) as error:
        raise _no_storage(storage, error) from error
    if not file or file == ":memory:":
        raise SettingError(f"storage must outlive its process, not '{storage}', which is in memory")
    if os.path.isdir(file):  # noqa: PTH112 - never raises
        name = f"{study}.db" if is_database(storage) else f"{study}.journal"
        example = os.path.join(storage, name)  # noqa: PTH118 - of a URL, too
        raise SettingError(
            f"storage must be a file, such as '{example}', not '{storage}', which is a folder"
        )
    lock = FileLock(f"{file}.{study}.lock")
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise taken(study) from None
    except OSError as error:
        raise StudyError(_unwritable(storage, error)) from error
    try:
        with _forgotten(storage):
            yield
    finally:
        lock.release()


@contextlib.contextmanager
def _forgotten(storage: str) -> Iterator[None]:
    """Close what a process has opened, which may be another thing of the same name later."""
    try:
        yield
    finally:
        there = open_storage(storage) if open_storage.cache_info().currsize else None
        if isinstance(there, RDBStorage):
            there.engine.dispose()
        forget()


def forget() -> None:
    """Open everything anew when it is next asked for."""
    open_storage.cache_clear()
    _studies.clear()


def kept_open(search: Search, load: Callable[[Search], optuna.Study]) -> optuna.Study:
    """The study of ``search``, loaded once: anew, each batch would read all its trials again."""
    if search not in _studies:
        if len(_studies) == MOST_OPEN:  # all of them, as a worker goes from study to study
            _studies.clear()
        _studies[search] = load(search)
    return _studies[search]


def taken(study: str) -> StudyError:
    return StudyError(
        f"study '{study}' is being tuned by another process; wait for its end, or give study "
        "another name"
    )


def _no_storage(storage: str, error: Exception) -> SettingError:
    # Of a URL without a host, what is taken for the port may be the password.
    of_port = type(error) is ValueError
    reason = "its port is no number" if of_port else without_credentials(first_line(error))
    return SettingError(
        f"storage must be a journal's path or a database's URL whose driver is there (for "
        f"PostgreSQL: pip install 'initflow[postgresql]'), not '{shown(storage)}': {reason}"
    )


def _unwritable(storage: str, error: OSError) -> str:
    return f"storage '{shown(storage)}' cannot be written: {error.strerror or error}"


def _journal_lock(storage: str) -> FileLock:
    """Which the system frees when its holder dies; Optuna's own waits 30 s then."""
    return FileLock(f"{storage}.lock")


@functools.lru_cache(maxsize=1)
def open_storage(storage: str) -> BaseStorage:
    """Opened once in a process."""
    if not is_database(storage):
        try:
            Path(storage).parent.mkdir(
                parents=True, exist_ok=True
            )  # older versions of Optuna do not
            _mend(Path(storage))
            lock: Any = _journal_lock(storage)  # it has what Optuna asks of one
            return JournalStorage(JournalFileBackend(storage, lock_obj=lock))
        except OSError as error:
            raise StudyError(_unwritable(storage, error)) from error
        except (ValueError, LookupError, TypeError, AssertionError) as error:
            reason = cause(error)
            raise StudyError(f"storage '{storage}' is no journal of Optuna: {reason}") from error
    options: dict[str, Any] = {}
    if storage.startswith(("postgresql", "mysql")):
        options["connect_args"] = {"connect_timeout": int(PATIENCE_S)}
    with quiet():
        database = functools.partial(
            RDBStorage,
            storage,
            engine_kwargs=options,
            heartbeat_interval=HEARTBEAT_S,
            grace_period=STALE_S,
        )
        held: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if storage.startswith("sqlite"):  # several that make it at once would fail
            held = FileLock(f"{make_url(storage).database}.lock")
        try:
            with held:
                return _patiently(database, storage)
        except OSError as error:
            raise StudyError(_unwritable(storage, error)) from error


def _mend(journal: Path) -> None:
    """Take off a last line that was not written to its end, which would spoil the next one."""
    with (
        _journal_lock(str(journal)),
        contextlib.suppress(FileNotFoundError),
        journal.open("rb+") as file,
    ):
        if not journal.is_file():  # but a device, perhaps without an end
            raise StudyError(f"storage '{journal}' is no file")
        begin = file.read(len(JOURNAL))
        if not JOURNAL.startswith(begin):
            raise StudyError(
                f"storage '{journal}' is no journal of Optuna: it begins with {begin!r}"
            )
        content = begin + file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def _patiently(connect: Callable[[], Value], storage: str) -> Value:
    """What ``connect`` returns, tried for a while: a server may be about to start."""
    started = time.monotonic()
    while True:
        try:
            return connect()
        except (ArgumentError, NoSuchModuleError, ImportError, ValueError) as error:
            raise _no_storage(storage, error) from error
        except RuntimeError as error:  # Optuna's, of a database whose tables are not its own
            raise StudyError(
                f"storage '{shown(storage)}' has tables of another program or version, and Optuna "
                f"needs a database of its own: {first_line(error)}"
            ) from error
        except (SQLAlchemyError, StorageInternalError) as error:
            tried = time.monotonic() - started
            if tried >= PATIENCE_S:
                raise StudyError(
                    f"storage '{shown(storage)}' cannot be used, tried for {tried:.0f} s: "
                    f"{_reason(error)}"
                ) from error
            time.sleep(1)


def _reason(error: BaseException) -> str:
    """What the database itself says, beneath Optuna's and SQLAlchemy's words."""
    if isinstance(error, StorageInternalError) and error.__cause__:
        error = error.__cause__
    return without_credentials(first_line(getattr(error, "orig", None) or error))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's word on heartbeats, which are ours to send, on experiments, on its work."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Heartbeat of storage")
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


@contextlib.contextmanager
def failing(storage: str) -> Iterator[None]:
    """Raise what the storage refuses as :class:`StudyError`."""
    try:
        with quiet():
            yield
    except (SQLAlchemyError, StorageInternalError, OSError, JSONDecodeError) as error:
        raise StudyError(f"storage '{shown(storage)}' failed: {_reason(error)}") from error


def journal(folder: Path, study: str) -> str:
    """The path of a study's journal in ``folder``."""
    return os.fspath(folder / f"{study}.journal")

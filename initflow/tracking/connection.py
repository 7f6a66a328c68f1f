"""Where the runs are kept, MLflow's server or store: its address, its client, and its patience."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import mlflow
from filelock import FileLock
from mlflow.environment_variables import (
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR,
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_HTTP_REQUEST_TIMEOUT,
)
from mlflow.tracking.request_header.databricks_request_header_provider import (
    DatabricksRequestHeaderProvider,
)

from initflow.core.paths import STORE, home, store_file
from initflow.core.secrets import without_credentials
from initflow.errors import SettingError

STORE_TIMEOUT_S = 120
TIMEOUT_S = 10


_elsewhere = contextvars.ContextVar("elsewhere", default="")  # as at() has it


@contextlib.contextmanager
def at(where: str | None) -> Iterator[None]:
    """Take the runs to be kept ``where``, in this thread; None is where MLflow has them."""
    if where is not None and not (isinstance(where, str) and where.strip()):
        raise SettingError(f"tracking_uri must be the address of a server or store, not {where!r}")
    token = _elsewhere.set(where or "")
    try:
        yield
    finally:
        _elsewhere.reset(token)


def uri() -> str:
    """Where the runs are kept: a tracking server or a store, whose path is whole."""
    where = _elsewhere.get() or str(mlflow.get_tracking_uri())
    file = where.removeprefix(STORE)
    is_relative = file != where and not os.path.isabs(file)  # noqa: PTH117 - text as it is
    return f"{STORE}{Path(file).absolute()}" if is_relative else where


def shown() -> str:
    """The same without a password."""
    return without_credentials(uri())


def with_credentials(where: str) -> str:
    """The address that was :func:`shown` as ``where``, as far as it is that of this process."""
    return uri() if where == shown() else where


def set_uri(where: str) -> None:
    """Keep this process's runs ``where`` those of another are kept."""
    if mlflow.get_tracking_uri() != where:
        mlflow.set_tracking_uri(where)


def is_served(where: str = "") -> bool:
    """Whether ``where`` the runs are kept is a tracking server, which serves the page too."""
    return (where or uri()).startswith(("http://", "https://"))


def is_there(where: str = "") -> bool:
    """False for a store whose file or folder is missing, which asking would make."""
    where = where or uri()
    folder = where.startswith("file:") or ("/" in where and "://" not in where)
    store = Path(unquote(where.removeprefix("file://"))) if folder else store_file(where)
    return not store or os.path.exists(store)  # noqa: PTH110 - never raises


def folder() -> Path:
    """Where files belong that go with the runs: beside a store that is one, else the user's."""
    where = mlflow.get_tracking_uri()
    store = store_file(where)
    if store:
        return store.parent
    return home() if "://" in where else Path(where).parent


def check_backend(backend: str) -> None:
    """Raise :class:`SettingError` for a store that the workers of ``backend`` could not reach."""
    if backend == "ray" and not is_served():
        raise SettingError(
            "backend=ray needs MLflow's tracking server, for the runs that other machines "
            f"write: set MLFLOW_TRACKING_URI to its address, not '{shown()}'"
        )


def client(where: str = "") -> mlflow.MlflowClient:
    """That of the server or store ``where``, by default where the runs are kept."""
    return _client(where or uri())


@functools.cache
def _client(where: str) -> mlflow.MlflowClient:
    """The client makes a store that is not there, which several at once would fail at."""
    with store_lock(where):
        return mlflow.MlflowClient(where)


def store_lock(where: str) -> contextlib.AbstractContextManager[object]:
    """Held while a store that is a file is made; of a folder MLflow would ask for minutes."""
    store = store_file(where)
    if not store:
        return contextlib.nullcontext()
    if store.is_dir():
        raise SettingError(
            "MLFLOW_TRACKING_URI must be a server or a file, such as "
            f"{STORE}{store / 'mlflow.db'}, not '{without_credentials(where)}', which is a folder"
        )
    store.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{store}.lock", timeout=STORE_TIMEOUT_S)


def answers(where: str) -> bool:
    """Whether a server does, to a small question; a store of this machine is none."""
    with contextlib.suppress(Exception):  # whatever keeps it
        if is_served(where):
            with impatient():
                client(where).search_experiments(max_results=1)
            return True
    return False


_own = threading.local()  # the values that MLflow's variables have in a thread of ours


def _heed(variable: Any) -> None:
    """Let MLflow's ``variable`` have a thread's own value, unless the user has set one.

    The environment is everybody's: a user's own requests, made meanwhile, keep their patience.
    """
    usual = variable.get

    def get() -> Any:
        own = getattr(_own, "values", {}).get(variable.name)
        return usual() if own is None or variable.is_set() else own

    variable.get = get


for _variable in (
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR,
    MLFLOW_HTTP_REQUEST_TIMEOUT,
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
):
    _heed(_variable)


def _ask_once(provider: Any) -> None:
    """Let a ``provider`` of headers say only once, for requests of ours, whether it has any.

    MLflow's for Databricks looks for modules that are nowhere at each request, for a third of what
    the request takes this process.
    """
    usual = provider.in_context
    once = functools.cache(usual)

    def in_context(self: Any) -> bool:
        return bool((once if getattr(_own, "values", {}) else usual)(self))

    provider.in_context = in_context


_ask_once(DatabricksRequestHeaderProvider)


@contextlib.contextmanager
def impatient(retries: int = 1) -> Iterator[None]:
    """Let MLflow give up soon, in this thread, where the user has not said how long it is to try.

    What it waits for by default are minutes, without a word; our own outbox tries again. Nor does
    it show bars of its own for small files.
    """
    before = getattr(_own, "values", {})
    _own.values = {
        MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.name: False,
        MLFLOW_HTTP_REQUEST_TIMEOUT.name: TIMEOUT_S,
        MLFLOW_HTTP_REQUEST_MAX_RETRIES.name: retries,
    }
    try:
        yield
    finally:
        _own.values = before

"""Several requests to a database of MLflow's as one transaction, made by MLflow's own code.

Each by itself costs a session, and a flush to disk.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import mlflow
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking._tracking_service.client import TrackingServiceClient


class _Session:
    """One of SQLAlchemy's that is committed by who opened it, whoever else asks for it."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def commit(self) -> None:
        self._session.flush()


class _OfStore(TrackingServiceClient):
    """MLflow's client of this store, instead of that of an address."""

    store: Any = None

    def __init__(self, of: TrackingServiceClient, store: Any) -> None:
        self.__dict__ |= of.__dict__
        self.store = store


def store_of(client: mlflow.MlflowClient) -> Any:
    """The one that ``client`` asks."""
    return client._tracking_client.store  # noqa: SLF001 - no other way to it


def is_possible(client: mlflow.MlflowClient) -> bool:
    """Whether ``client`` writes to a database itself."""
    return isinstance(store_of(client), SqlAlchemyStore)


def _session_of(store: Any) -> contextlib.AbstractContextManager[Any]:
    """One that may write."""
    try:
        return store.ManagedSessionMaker(read_only=False)  # type: ignore[no-any-return]
    except TypeError:  # in older versions of MLflow all may
        return store.ManagedSessionMaker()  # type: ignore[no-any-return]


@contextlib.contextmanager
def together(client: mlflow.MlflowClient) -> Iterator[mlflow.MlflowClient]:
    """The same client, of which all requests are one transaction: all of it is there, or nothing.

    It is for one thread. An error within undoes what was requested, and is raised.
    """
    store = store_of(client)
    with _session_of(store) as session:
        shared = _Session(session)

        @contextlib.contextmanager
        def of_transaction(read_only: bool = True) -> Iterator[_Session]:  # noqa: ARG001, FBT002
            yield shared
            session.flush()

        bound, asking = copy.copy(store), copy.copy(client)
        bound.ManagedSessionMaker = of_transaction
        asking._tracking_client = _OfStore(client._tracking_client, bound)  # noqa: SLF001
        yield asking

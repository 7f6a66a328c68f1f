"""The trials that a worker is running: what it measures of them is reported to their study."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from initflow.errors import GivenUpError
from initflow.experiments.tuning import storages
from initflow.experiments.tuning.searches import DIVERGED, ERROR, PendingTrial, Search
from initflow.experiments.tuning.studies import load

# Raised by what has ended already; older versions of Optuna have only what it derives from.
FINISHED = getattr(optuna.exceptions, "UpdateFinishedTrialError", RuntimeError)
WORST = 0.0  # the accuracy that a diverged trial is told as, so that the sampler learns from it


class RunningTrials:
    """The trials that a worker is running, by their numbers.

    Raises :class:`StudyError` where the storage fails, and :class:`GivenUpError` where the trial
    is not running any more.
    """

    def __init__(self, search: Search, pending: Sequence[PendingTrial]) -> None:
        self.seconds = 0.0  # that reporting to the study took
        self._search = search
        with storages.failing(search.storage):
            self._study = storages.kept_open(search, load)
            self._trials = {one.number: optuna.Trial(self._study, one.key) for one in pending}

    @contextlib.contextmanager
    def _writing(self, number: int) -> Iterator[None]:
        started = time.perf_counter()
        try:
            with storages.failing(self._search.storage):
                yield
        except (FINISHED, ValueError) as error:  # the latter by Optuna's tell
            raise GivenUpError(
                f"trial {number} of study '{self._search.name}' was given up meanwhile by another "
                "process, which took its worker for dead"
            ) from error
        finally:
            self.seconds += time.perf_counter() - started

    def report(self, number: int, step: int, accuracy: float) -> None:
        """What was measured on the validation images."""
        with self._writing(number):
            self._trials[number].report(accuracy, step)

    def should_prune(self, number: int) -> bool:
        """Whether the trial is to be given up, by what was seen of it."""
        with self._writing(number):
            return self._trials[number].should_prune()

    def finished(self, number: int, accuracy: float) -> None:
        self._tell(number, accuracy)

    def diverged(self, number: int) -> None:
        self._tell(number, WORST, {DIVERGED: True})

    def pruned(self, number: int) -> None:
        self._tell(number, None, state=TrialState.PRUNED)

    def failed(self, number: int, reason: str) -> None:
        self._tell(number, None, {ERROR: reason}, TrialState.FAIL)

    def _tell(
        self,
        number: int,
        value: float | None,
        attributes: Mapping[str, object] | None = None,
        state: TrialState = TrialState.COMPLETE,
    ) -> None:
        trial = self._trials[number]
        with self._writing(number):
            for key, attribute in (attributes or {}).items():
                trial.set_user_attr(key, attribute)
            self._study.tell(trial, value, state)


@contextlib.contextmanager
def heartbeats(storage: str, running: Callable[[], Sequence[PendingTrial]]) -> Iterator[None]:
    """While it lasts, tell a database of several machines which trials are being worked on.

    A failure to do so is no failure of the work: trials are then taken for cut off, at worst.
    """
    database = storages.open_storage(storage)
    if not isinstance(database, RDBStorage):
        yield
        return
    over = threading.Event()

    def beat() -> None:
        while True:
            with contextlib.suppress(SQLAlchemyError, StorageInternalError):
                for trial in running():
                    database.record_heartbeat(trial.key)
            if over.wait(storages.HEARTBEAT_S):
                return

    thread = threading.Thread(target=beat, name="heartbeats", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()

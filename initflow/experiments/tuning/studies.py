"""Optuna: the only module that imports it. What was tried is kept, and what to try next is asked.

One study for each scheme. The sampler is made anew for each trial, seeded by the trial's place in
the study: so a study that is resumed goes on as it would have without the interruption, and never
repeats itself. A trial that was cut off, with the worker or the whole process, becomes a failed one
without a reason, and its setting is tried again; it does not count.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import math
import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar, cast

import optuna
from filelock import FileLock, Timeout
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import (
    DuplicatedStudyError,
    ExperimentalWarning,
    StorageInternalError,
    UpdateFinishedTrialError,
)
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as plots
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from initflow.core.config import without_password
from initflow.core.seeds import stream_seed
from initflow.errors import (
    GivenUpError,
    SettingError,
    StudyError,
    cause,
    first_line,
    without_credentials,
)
from initflow.experiments.tuning import sampler_state
from initflow.reporting.drawing import png_by_pyplot
from initflow.reporting.trials import Trial

PATIENCE_S = 10.0  # for a database that does not answer
HEARTBEAT_S = 5
STALE_S = 20  # without a heartbeat, after which whoever had a trial is taken for dead
SETTINGS = "initflow.settings"  # the study's attribute that says what it is a study of
ID = "initflow.id"
ERROR = "initflow.error"  # a failed trial's reason; one without was cut off
DIVERGED = "initflow.diverged"
INSTEAD_OF = "initflow.instead_of"  # the number of the trial that was cut off
PLACE = "initflow.place"  # of a trial among those that count, and where its batch begins
WORST = 0.0  # the accuracy that a diverged trial is told as, so that the sampler learns from it
JOURNAL = b'{"op_code":'  # what one begins with: nothing is taken off another file
STARTUP = 5  # finished trials before any is pruned
Value = TypeVar("Value")


@dataclass(frozen=True)
class Search:
    """What is searched in a study, and how: all that a worker needs to find it again.

    ``storage`` is a database's URL or a journal's path. ``lr`` and ``gamma`` are the bounds.
    ``updates`` are those of a whole training, which is evaluated every ``eval_every``.
    """

    storage: str
    name: str
    lr: tuple[float, float]
    gamma: tuple[float, float]
    sampler: str
    pruner: str
    seed: int
    updates: int
    eval_every: int


@dataclass(frozen=True)
class Asked:
    """A setting to try: ``key`` is the trial's in the storage, ``number`` the one in its study."""

    key: int
    number: int
    lr: float
    gamma: float


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


def check_sampler(sampler: str) -> None:
    """Raise :class:`SettingError` where its package is not there."""
    if sampler == "cmaes" and not importlib.util.find_spec("cmaes"):
        raise SettingError("sampler=cmaes needs the package cmaes: pip install cmaes")


@contextlib.contextmanager
def alone(storage: str, study: str) -> Iterator[None]:
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
    lock = FileLock(f"{file}.{study}.lock")
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise _taken(study) from None
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
        opened = _storage(storage) if _storage.cache_info().currsize else None
        if isinstance(opened, RDBStorage):
            opened.engine.dispose()
        forget()


def forget() -> None:
    """Open everything anew when it is next asked for."""
    _storage.cache_clear()
    _kept_open.cache_clear()


def _taken(study: str) -> StudyError:
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
def _storage(storage: str) -> BaseStorage:
    """Opened once in a process."""
    if not is_database(storage):
        try:
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
    with _quiet():
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
def _quiet() -> Iterator[None]:
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
def _failing(storage: str) -> Iterator[None]:
    """Raise what the storage refuses as :class:`StudyError`."""
    try:
        with _quiet():
            yield
    except (SQLAlchemyError, StorageInternalError, OSError, JSONDecodeError) as error:
        raise StudyError(f"storage '{shown(storage)}' failed: {_reason(error)}") from error


def check(search: Search, settings: Mapping[str, str]) -> None:
    """Raise :class:`SettingError` where the study is there and is one of other ``settings``."""
    storage = _storage(search.storage)
    with _failing(search.storage):
        if search.name not in optuna.get_all_study_names(storage):
            return
        study = _opened(search)
        kept = study.user_attrs.get(SETTINGS)
        if kept is None and not study.get_trials(deepcopy=False):  # its maker was killed
            return
    kept = kept if isinstance(kept, dict) else {}
    other = [name for name, value in settings.items() if kept.get(name) != value]
    if other:
        had = ", ".join(f"{name}={kept.get(name, '?')}" for name in other)
        has = ", ".join(f"{name}={settings[name]}" for name in other)
        raise SettingError(
            f"study '{search.name}' is there already, with {had}, not {has}; give study "
            "another name"
        )


class Study:
    """One study, made where it is not there.

    ``settings`` say what it is a study of: one of the same name with others is a
    :class:`SettingError`. Its first trial has ``first``, (lr, gamma), where the bounds allow.
    """

    def __init__(
        self, search: Search, settings: Mapping[str, str], first: tuple[float, float]
    ) -> None:
        self.search = search
        check(search, settings)
        with _failing(search.storage):
            self._study = _opened(search, make=True)
            for name, value in ((SETTINGS, dict(settings)), (ID, uuid.uuid4().hex)):
                if name not in self._study.user_attrs:
                    self._study.set_user_attr(name, value)
            # Its runs are found by it: another study may have this one's name elsewhere.
            self.id = str(self._study.user_attrs[ID])
            for trial in self._all():
                if not _is_ours(trial):
                    raise StudyError(
                        f"trial {trial.number} of study '{search.name}' is not by initflow: give "
                        "study another name"
                    )
            bounds = (search.lr, search.gamma)
            within = (low <= x <= high for x, (low, high) in zip(first, bounds, strict=True))
            params = dict(zip(("lr", "gamma"), first, strict=True))
            if all(within) and not self._all():
                self._enqueue(params)

    def trials(self, budget: float = math.inf) -> list[Trial]:
        """Of the first ``budget`` that count those that are through, in their order."""
        found = (_trial(one) for one in self._all() if _place(one) < budget)
        return [trial for trial in found if trial]

    def _all(self, *states: TrialState) -> list[FrozenTrial]:
        with _failing(self.search.storage):
            return self._study.get_trials(deepcopy=False, states=states or None)

    def begun(self) -> int:
        """How many trials count, those that are running included."""
        return sum(
            trial.state != TrialState.WAITING and not _was_cut_off(trial) for trial in self._all()
        )

    def ask(self, n: int) -> list[Asked]:
        """The next ``n`` settings to try, those first that were cut off before.

        They are a batch, or the rest of the one that the first of them was in.
        """
        search, asked = self.search, []
        begun, storage = self.begun(), _storage(search.storage)
        waiting = self._all(TrialState.WAITING)
        places = (trial.user_attrs[PLACE] for trial in waiting if PLACE in trial.user_attrs)
        _, batch = next(places, (begun, begun))
        with _failing(search.storage):
            for place in range(begun, begun + n):
                # The same for all schemes: they begin with the same settings, drawn at random.
                seed = stream_seed(search.seed, f"trial/{place}") % 2**32
                known = place - begun < len(waiting)
                self._study.sampler = _sampler("random" if known else search.sampler, seed, place)
                trial = self._study.ask(_distributions(search))
                if PLACE not in trial.user_attrs:
                    trial.set_user_attr(PLACE, (place, batch))
                if isinstance(storage, RDBStorage):
                    storage.record_heartbeat(trial._trial_id)  # noqa: SLF001 - its id has no name
                asked.append(Asked(trial._trial_id, trial.number, **trial.params))  # noqa: SLF001 - as above
        return asked

    def settle(self) -> None:
        """Give up what an earlier process has left unfinished, to be tried again.

        On one machine it is dead, as its lock is ours. With a database of several it may be alive
        as long as its heartbeats come: a :class:`StudyError` where they do not end.
        """
        if not is_shared(self.search.storage):
            self.cut_off([trial.number for trial in self._all(TrialState.RUNNING)])
            return
        started = time.monotonic()
        while self._all(TrialState.RUNNING):
            self._cut_off_stale()
            if time.monotonic() - started > STALE_S + 2 * HEARTBEAT_S:
                raise _taken(self.search.name)
            time.sleep(1)
        self._try_again()

    def cut_off(self, numbers: Sequence[int]) -> None:
        """Give up those of the trials ``numbers`` that are not through, to be tried again."""
        with _failing(self.search.storage):
            for number in numbers:
                with contextlib.suppress(ValueError):  # it is through
                    self._study.tell(number, state=TrialState.FAIL)
        self._try_again()

    def _cut_off_stale(self) -> None:
        """Give up the trials whose holder has sent no heartbeat for a while, or never one."""
        storage, running = _storage(self.search.storage), self._all(TrialState.RUNNING)
        assert isinstance(storage, RDBStorage)
        with _failing(self.search.storage):
            optuna.storages.fail_stale_trials(self._study)
            with storage.engine.connect() as connection:
                alive = set(connection.scalars(text("SELECT trial_id FROM trial_heartbeats")))
            for trial in running:
                begun = trial.datetime_start
                if trial._trial_id not in alive and begun:  # noqa: SLF001 - its id has no name
                    silent = (datetime.now() - begun).total_seconds()  # noqa: DTZ005 - as Optuna
                    if silent > STALE_S:
                        with contextlib.suppress(ValueError):  # it is through by now
                            self._study.tell(trial.number, state=TrialState.FAIL)

    def _try_again(self) -> None:
        """Each setting that was cut off, once: what is to do follows from what is kept."""
        everything = self._all()
        again = {trial.user_attrs.get(INSTEAD_OF) for trial in everything}
        lost = [t for t in everything if _was_cut_off(t) and t.number not in again and _is_set(t)]
        with _failing(self.search.storage):
            if lost:  # those that wait already may come after them: all anew, in their order
                for trial in everything:
                    if trial.state == TrialState.WAITING and INSTEAD_OF in trial.user_attrs:
                        key = trial._trial_id  # noqa: SLF001 - its id has no name
                        _storage(self.search.storage).set_trial_state_values(key, TrialState.FAIL)
                        lost.append(trial)
            for trial in sorted(lost, key=lambda trial: trial.user_attrs.get(PLACE, [math.inf])[0]):
                self._enqueue(trial.params, trial)

    def _enqueue(self, params: Mapping[str, float], instead_of: FrozenTrial | None = None) -> None:
        """As Optuna's own, but the setting is a trial's from its begin, which may be cut off."""
        attributes: dict[str, object] = {}
        of_sampler: dict[str, object] = {}
        if instead_of:
            attributes = {INSTEAD_OF: instead_of.number}
            kept = instead_of.user_attrs
            attributes |= {PLACE: kept[PLACE]} if PLACE in kept else {}
            kept = instead_of.system_attrs
            of_sampler = {key: value for key, value in kept.items() if key.startswith("cma:")}
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.WAITING,
                params=dict(params),
                distributions=_distributions(self.search),
                user_attrs=attributes,
                system_attrs=of_sampler,
            )
        )

    def were_cut_off(self) -> list[int]:
        """The numbers of the trials that do not count."""
        return [trial.number for trial in self._all(TrialState.FAIL) if _was_cut_off(trial)]

    def remember(self, key: str, value: object) -> None:
        """Keep ``value``, of plain types, with the study."""
        with _failing(self.search.storage):
            self._study.set_user_attr(key, value)

    def remembered(self, key: str) -> Any:
        with _failing(self.search.storage):
            return self._study.user_attrs.get(key)

    def figures(self) -> dict[str, bytes]:
        """Optuna's own figures as PNG files' contents, those that these trials are enough for."""
        finished = [t for t in self._all(TrialState.COMPLETE) if not t.user_attrs.get(DIVERGED)]
        drawn: dict[str, Callable[[], Any]] = {
            "history": lambda: plots.plot_optimization_history(self._study)
        }
        if all(len({trial.params[name] for trial in finished}) > 2 for name in ("lr", "gamma")):
            drawn["slice"] = lambda: plots.plot_slice(self._study, ["lr", "gamma"])
            drawn["contour"] = lambda: plots.plot_contour(self._study, ["lr", "gamma"])
            if len({trial.value for trial in finished}) > 1:
                evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
                drawn["importances"] = lambda: plots.plot_param_importances(
                    self._study, evaluator=evaluator
                )
        with _quiet():
            return {name: png_by_pyplot(draw) for name, draw in drawn.items()} if finished else {}


def _is_ours(trial: FrozenTrial) -> bool:
    """Whether what is noted of it is as it is noted here: anybody may write to a database."""
    place = trial.user_attrs.get(PLACE, [0, 0])
    numbers = [*(place if isinstance(place, list) else [""]), trial.user_attrs.get(INSTEAD_OF, 0)]
    return (
        len(numbers) == 3
        and all(type(number) is int for number in numbers)
        and trial.params.keys() <= {"lr", "gamma"}
    )


def _was_cut_off(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and ERROR not in trial.user_attrs


def _place(trial: FrozenTrial) -> float:
    place: float = trial.user_attrs.get(PLACE, (math.inf, None))[0]
    return place


def _is_set(trial: FrozenTrial) -> bool:
    """Whether all that is searched has a value: a trial may have been cut off before."""
    return len(trial.params) == 2


def _trial(kept: FrozenTrial) -> Trial | None:
    """As a value; None for one that is not through, or was cut off."""
    if not kept.state.is_finished() or _was_cut_off(kept) or not _is_set(kept):
        return None
    outcome = {TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}.get(kept.state, "finished")
    if kept.user_attrs.get(DIVERGED):
        outcome = "diverged"
    seen = max(kept.intermediate_values.values(), default=None)
    return Trial(kept.number, kept.params["lr"], kept.params["gamma"], outcome, seen)


def _opened(search: Search, *, make: bool = False) -> optuna.Study:
    storage = _storage(search.storage)
    if make:
        with contextlib.suppress(DuplicatedStudyError):
            optuna.create_study(storage=storage, study_name=search.name, direction="maximize")
    return optuna.load_study(
        storage=storage,
        study_name=search.name,
        sampler=optuna.samplers.RandomSampler(),  # ask sets its own
        pruner=_pruner(search),
    )


@functools.lru_cache(maxsize=100)
def _kept_open(search: Search) -> optuna.Study:
    """A worker's: opened anew, each batch would read all trials of a database again."""
    return _opened(search)


def _distributions(search: Search) -> dict[str, BaseDistribution]:
    return {
        "lr": FloatDistribution(*search.lr, log=True),
        "gamma": FloatDistribution(*search.gamma),
    }


class _CmaEsSampler(optuna.samplers.CmaEsSampler):
    """Goes by a trial's place where Optuna's goes by its number, which cut off ones move.

    What it had learned is read by :mod:`initflow.experiments.tuning.sampler_state`: Optuna's runs
    what it finds.
    """

    def __init__(self, seed: int, place: int) -> None:
        super().__init__(seed=seed, warn_independent_sampling=False)
        self._place = place

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        placed = copy.copy(trial)
        placed.number = self._place
        self._space, self._direction = search_space, study.direction
        return super().sample_relative(study, placed, search_space)

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        key = self._attr_key_optimizer
        for trial in reversed(completed_trials):
            parts = {k: v for k, v in trial.system_attrs.items() if k.startswith(key)}
            if not parts:
                continue
            space = _SearchSpaceTransform(self._space, transform_step=True, transform_0_1=True)
            new = optuna.samplers.CmaEsSampler(seed=0)  # this one's random state is left alone
            optimizer = new._init_optimizer(space, self._direction)  # noqa: SLF001 - as here
            try:
                packed = bytes.fromhex(self._concat_optimizer_attrs(parts))
                state = sampler_state.learned(packed, optimizer.__getstate__())
            except (ValueError, LookupError, TypeError) as error:
                raise StudyError(
                    f"what sampler=cmaes learned until trial {trial.number} cannot be read: "
                    f"{first_line(error)}; give study another name"
                ) from error
            optimizer.__setstate__(state)
            return optimizer
        return None


def _sampler(kind: str, seed: int, place: int) -> optuna.samplers.BaseSampler:
    with _quiet():
        if kind == "cmaes":
            return _CmaEsSampler(seed, place)
        made: optuna.samplers.BaseSampler = {
            "tpe": optuna.samplers.TPESampler,
            "gp": optuna.samplers.GPSampler,
            "random": optuna.samplers.RandomSampler,
        }[kind](seed=seed)
    return made


@dataclass(frozen=True)
class _Earlier:
    """A study without the batch of a trial: what became of that depends on how it is stacked."""

    study: optuna.Study
    trial: FrozenTrial

    @property
    def direction(self) -> StudyDirection:
        return self.study.direction

    def get_trials(
        self, *, deepcopy: bool, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        _, batch = self.trial.user_attrs[PLACE]
        found = self.study.get_trials(deepcopy=deepcopy, states=states)
        return [one for one in found if one.user_attrs.get(PLACE, (0, None))[1] != batch]


class _MedianPruner(optuna.pruners.MedianPruner):
    """Goes by the batches before, so that it says the same of a trial that is tried again."""

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return super().prune(cast("optuna.Study", _Earlier(study, trial)), trial)


class _HyperbandPruner(optuna.pruners.HyperbandPruner):
    """Goes by a trial's place where Optuna's goes by its number; one cut off has no bracket."""

    def _get_bracket_id(self, study: optuna.Study, trial: FrozenTrial) -> int:
        if _was_cut_off(trial):
            return -1
        placed = copy.copy(trial)
        placed.number, _ = trial.user_attrs.get(PLACE, (trial.number, None))
        return super()._get_bracket_id(study, placed)


def _pruner(search: Search) -> optuna.pruners.BasePruner:
    """Over iterations; the median's waits a quarter of a training, as low rates start slowly."""
    if search.pruner == "median":
        return _MedianPruner(STARTUP, n_warmup_steps=search.updates // 4)
    if search.pruner == "hyperband":
        return _HyperbandPruner(min(search.eval_every, search.updates), search.updates, 3)
    return optuna.pruners.NopPruner()


class Trying:
    """The trials that a worker has at hand: what it sees of them is told the study.

    Raises :class:`StudyError` where the storage fails, and :class:`GivenUpError` where the trial
    is not at hand any more.
    """

    def __init__(self, search: Search, asked: Sequence[Asked]) -> None:
        self._search = search
        with _failing(search.storage):
            self._study = _kept_open(search)
            self._trials = {one.number: optuna.Trial(self._study, one.key) for one in asked}

    @contextlib.contextmanager
    def _writing(self, number: int) -> Iterator[None]:
        try:
            with _failing(self._search.storage):
                yield
        except (UpdateFinishedTrialError, ValueError) as error:  # the latter by Optuna's tell
            raise GivenUpError(
                f"trial {number} of study '{self._search.name}' was given up meanwhile by another "
                "process, which took its worker for dead"
            ) from error

    def seen(self, number: int, step: int, accuracy: float) -> None:
        """What was measured on the validation images."""
        with self._writing(number):
            self._trials[number].report(accuracy, step)

    def is_hopeless(self, number: int) -> bool:
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
def heartbeats(storage: str, at_hand: Callable[[], Sequence[Asked]]) -> Iterator[None]:
    """While it lasts, tell a database of several machines which trials are being worked on.

    A failure to do so is no failure of the work: trials are then taken for cut off, at worst.
    """
    database = _storage(storage)
    if not isinstance(database, RDBStorage):
        yield
        return
    over = threading.Event()

    def beat() -> None:
        while True:
            with contextlib.suppress(SQLAlchemyError, StorageInternalError):
                for asked in at_hand():
                    database.record_heartbeat(asked.key)
            if over.wait(HEARTBEAT_S):
                return

    thread = threading.Thread(target=beat, name="heartbeats", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def journal(folder: Path, study: str) -> str:
    """The path of a study's journal in ``folder``."""
    return os.fspath(folder / f"{study}.journal")

"""Studies of Optuna: their trials are kept, and the next settings to try are asked for.

There is one for each scheme. The sampler is made anew for each trial, seeded by the trial's place
in the study: so a study that is resumed goes on as it would have without the interruption, and
never repeats itself. A trial that was interrupted, with the worker or the whole process, becomes a
failed one without a reason, and its setting is tried again; it does not count.
"""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text

from initflow.core.configurations import ADDED
from initflow.core.seeds import stream_seed
from initflow.errors import SettingError, StudyError
from initflow.experiments.tuning import storages
from initflow.experiments.tuning.samplers import pruner, sampler
from initflow.experiments.tuning.searches import (
    DIVERGED,
    ID,
    INSTEAD_OF,
    PLACE,
    SETTINGS,
    PendingTrial,
    Search,
    distributions,
    was_interrupted,
)
from initflow.reporting.drawing import png_by_pyplot
from initflow.reporting.trials import Trial


def check(search: Search, settings: Mapping[str, str]) -> None:
    """Raise :class:`SettingError` where the study is there and is one of other ``settings``."""
    storage = storages.open_storage(search.storage)
    with storages.failing(search.storage):
        if search.name not in optuna.get_all_study_names(storage):
            return
        study = load(search)
        kept = study.user_attrs.get(SETTINGS)
        if kept is None and not study.get_trials(deepcopy=False):  # its maker was killed
            return
    kept = ADDED | kept if isinstance(kept, dict) else {}
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
        self,
        search: Search,
        settings: Mapping[str, str],
        first: tuple[float, float | None],
    ) -> None:
        self.search = search
        check(search, settings)
        with storages.failing(search.storage):
            self._study = load(search, make=True)
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
            of_first = zip(("lr", "gamma"), first, strict=True)
            params = {name: value for name, value in of_first if value is not None}
            bounds = distributions(search)
            within = (bounds[name].low <= x <= bounds[name].high for name, x in params.items())
            if all(within) and not self._all():
                self._enqueue(params)

    def trials(self, budget: float = math.inf) -> list[Trial]:
        """Of the first ``budget`` that count those that have ended, in their order."""
        found = (self._trial(one) for one in self._all() if _place(one) < budget)
        return [trial for trial in found if trial]

    def _all(self, *states: TrialState) -> list[FrozenTrial]:
        with storages.failing(self.search.storage):
            return self._study.get_trials(deepcopy=False, states=states or None)

    def begun(self) -> int:
        """How many trials count, those that are running included."""
        return sum(
            trial.state != TrialState.WAITING and not was_interrupted(trial)
            for trial in self._all()
        )

    def ask(self, n: int) -> list[PendingTrial]:
        """The next ``n`` settings to try, those first that were cut off before.

        They are a batch, or the rest of the one that the first of them was in.
        """
        search, pending = self.search, []
        begun, storage = self.begun(), storages.open_storage(search.storage)
        waiting = self._all(TrialState.WAITING)
        places = (trial.user_attrs[PLACE] for trial in waiting if PLACE in trial.user_attrs)
        _, batch = next(places, (begun, begun))
        with storages.failing(search.storage):
            for place in range(begun, begun + n):
                # The same for all schemes: they begin with the same settings, drawn at random.
                seed = stream_seed(search.seed, f"trial/{place}") % 2**32
                known = place - begun < len(waiting)
                self._study.sampler = sampler("random" if known else search.sampler, seed, place)
                trial = self._study.ask({**distributions(search)})
                if PLACE not in trial.user_attrs:
                    trial.set_user_attr(PLACE, (place, batch))
                if isinstance(storage, RDBStorage):
                    storage.record_heartbeat(trial._trial_id)  # noqa: SLF001 - its id has no name
                pending.append(PendingTrial(trial._trial_id, trial.number, **trial.params))  # noqa: SLF001 - as above
        return pending

    def recover(self) -> None:
        """Give up what an earlier process has left unfinished, to be tried again.

        On one machine it is dead, as its lock is ours. With a database of several it may be alive
        as long as its heartbeats come: a :class:`StudyError` where they do not end.
        """
        if not storages.is_shared(self.search.storage):
            self.interrupt([trial.number for trial in self._all(TrialState.RUNNING)])
            return
        started = time.monotonic()
        while self._all(TrialState.RUNNING):
            self._interrupt_stale()
            if time.monotonic() - started > storages.STALE_S + 2 * storages.HEARTBEAT_S:
                raise storages.taken(self.search.name)
            time.sleep(1)
        self._try_again()

    def interrupt(self, numbers: Sequence[int]) -> None:
        """Give up those of the trials ``numbers`` that have not ended, to be tried again."""
        with storages.failing(self.search.storage):
            for number in numbers:
                with contextlib.suppress(ValueError):  # it has ended
                    self._study.tell(number, state=TrialState.FAIL)
        self._try_again()

    def _interrupt_stale(self) -> None:
        """Give up the trials whose holder has sent no heartbeat for a while, or never one."""
        storage, running = storages.open_storage(self.search.storage), self._all(TrialState.RUNNING)
        assert isinstance(storage, RDBStorage)
        with storages.failing(self.search.storage):
            optuna.storages.fail_stale_trials(self._study)
            with storage.engine.connect() as connection:
                alive = set(connection.scalars(text("SELECT trial_id FROM trial_heartbeats")))
            for trial in running:
                begun = trial.datetime_start
                if trial._trial_id not in alive and begun:  # noqa: SLF001 - its id has no name
                    silent = (datetime.now() - begun).total_seconds()  # noqa: DTZ005 - as Optuna
                    if silent > storages.STALE_S:
                        with contextlib.suppress(ValueError):  # it has ended by now
                            self._study.tell(trial.number, state=TrialState.FAIL)

    def _try_again(self) -> None:
        """Each setting that was cut off, once: what is to do follows from what is kept."""
        everything = self._all()
        again = {trial.user_attrs.get(INSTEAD_OF) for trial in everything}
        lost = [
            t
            for t in everything
            if was_interrupted(t) and t.number not in again and self._is_set(t)
        ]
        with storages.failing(self.search.storage):
            if lost:  # those that wait already may come after them: all anew, in their order
                for trial in everything:
                    if trial.state == TrialState.WAITING and INSTEAD_OF in trial.user_attrs:
                        key = trial._trial_id  # noqa: SLF001 - its id has no name
                        storages.open_storage(self.search.storage).set_trial_state_values(
                            key, TrialState.FAIL
                        )
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
                distributions={**distributions(self.search)},
                user_attrs=attributes,
                system_attrs=of_sampler,
            )
        )

    def _is_set(self, trial: FrozenTrial) -> bool:
        """Whether all that is searched has a value: a trial may have been cut off before."""
        return trial.params.keys() == distributions(self.search).keys()

    def _trial(self, kept: FrozenTrial) -> Trial | None:
        """As a value; None for one that has not ended, or was interrupted."""
        if not kept.state.is_finished() or was_interrupted(kept) or not self._is_set(kept):
            return None
        outcome = {TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
        how = "diverged" if kept.user_attrs.get(DIVERGED) else outcome.get(kept.state, "finished")
        seen = max(kept.intermediate_values.values(), default=None)
        return Trial(kept.number, kept.params["lr"], kept.params.get("gamma"), how, seen)

    def interrupted(self) -> list[int]:
        """The numbers of the trials that do not count."""
        return [trial.number for trial in self._all(TrialState.FAIL) if was_interrupted(trial)]

    def set_user_attr(self, key: str, value: object) -> None:
        """Keep ``value``, of plain types, with the study."""
        with storages.failing(self.search.storage):
            self._study.set_user_attr(key, value)

    def user_attr(self, key: str) -> Any:
        with storages.failing(self.search.storage):
            return self._study.user_attrs.get(key)

    def figures(self) -> dict[str, bytes]:
        """Optuna's own figures as PNG files' contents, those that these trials are enough for."""
        from optuna.visualization import matplotlib as plots  # noqa: PLC0415 - slow

        finished = [t for t in self._all(TrialState.COMPLETE) if not t.user_attrs.get(DIVERGED)]
        drawn: dict[str, Callable[[], Any]] = {
            "history": lambda: plots.plot_optimization_history(self._study)
        }
        names = list(distributions(self.search))
        if all(len({trial.params[name] for trial in finished}) > 2 for name in names):
            drawn["slice"] = lambda: plots.plot_slice(self._study, names)
            if len(names) > 1:
                drawn["contour"] = lambda: plots.plot_contour(self._study, names)
            if len(names) > 1 and len({trial.value for trial in finished}) > 1:
                evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
                drawn["importances"] = lambda: plots.plot_param_importances(
                    self._study, evaluator=evaluator
                )
        with storages.quiet():
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


def _place(trial: FrozenTrial) -> float:
    place: float = trial.user_attrs.get(PLACE, (math.inf, None))[0]
    return place


def load(search: Search, *, make: bool = False) -> optuna.Study:
    storage = storages.open_storage(search.storage)
    if make:
        with contextlib.suppress(DuplicatedStudyError):
            optuna.create_study(storage=storage, study_name=search.name, direction="maximize")
    return optuna.load_study(
        storage=storage,
        study_name=search.name,
        sampler=optuna.samplers.RandomSampler(),  # ask sets its own
        pruner=pruner(search),
    )

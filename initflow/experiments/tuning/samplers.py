"""Optuna's samplers and pruners, by a trial's place in its study instead of its number."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, cast

import optuna
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from initflow.errors import SettingError, StudyError, first_line
from initflow.experiments.tuning import sampler_state, storages
from initflow.experiments.tuning.searches import PLACE, Search, was_interrupted

STARTUP = 5  # finished trials before any is pruned


def check_sampler(sampler: str) -> None:
    """Raise :class:`SettingError` where its package is not there."""
    if sampler == "cmaes" and not importlib.util.find_spec("cmaes"):
        raise SettingError("sampler=cmaes needs the package cmaes: pip install cmaes")


OPTIMIZER = "cma:optimizer"  # of a trial's attributes, those that hold what CMA-ES has learned


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

    def _restore_optimizer(self, completed_trials: list[FrozenTrial], *_: int) -> Any:
        """Older versions of Optuna say how often the optimizer was restarted, which it never is."""
        key = OPTIMIZER
        for trial in reversed(completed_trials):
            parts = {k: v for k, v in trial.system_attrs.items() if k.startswith(key)}
            if not parts:
                continue
            space = _SearchSpaceTransform(self._space, transform_step=True, transform_0_1=True)
            new = optuna.samplers.CmaEsSampler(seed=0)  # this one's random state is left alone
            optimizer = new._init_optimizer(space, self._direction)  # noqa: SLF001 - as here
            try:
                packed = bytes.fromhex("".join(parts[f"{key}:{at}"] for at in range(len(parts))))
                state = sampler_state.learned(packed, optimizer.__getstate__())
            except (ValueError, LookupError, TypeError) as error:
                raise StudyError(
                    f"what sampler=cmaes learned until trial {trial.number} cannot be read: "
                    f"{first_line(error)}; give study another name"
                ) from error
            optimizer.__setstate__(state)
            return optimizer
        return None


def sampler(kind: str, seed: int, place: int) -> optuna.samplers.BaseSampler:
    with storages.quiet():
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
        if was_interrupted(trial):
            return -1
        placed = copy.copy(trial)
        placed.number, _ = trial.user_attrs.get(PLACE, (trial.number, None))
        return super()._get_bracket_id(study, placed)


def pruner(search: Search) -> optuna.pruners.BasePruner:
    """Over iterations; the median's waits a quarter of a training, as low rates start slowly."""
    if search.pruner == "median":
        return _MedianPruner(STARTUP, n_warmup_steps=search.updates // 4)
    if search.pruner == "hyperband":
        return _HyperbandPruner(min(search.eval_every, search.updates), search.updates, 3)
    return optuna.pruners.NopPruner()

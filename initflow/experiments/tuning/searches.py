"""What is searched in a study, and what is noted of its trials in Optuna's storage."""

from __future__ import annotations

from dataclasses import dataclass

from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

SETTINGS = "initflow.settings"  # the study's attribute that says what it is a study of
ID = "initflow.id"
ERROR = "initflow.error"  # a failed trial's reason; one without was interrupted
DIVERGED = "initflow.diverged"
INSTEAD_OF = "initflow.instead_of"  # the number of the trial that was interrupted
PLACE = "initflow.place"  # of a trial among those that count, and where its batch begins


@dataclass(frozen=True)
class Search:
    """What is searched in a study, and how: all that a worker needs to find it again.

    ``storage`` is a database's URL or a journal's path. ``lr`` and ``gamma`` are the bounds;
    ``gamma`` is None where it is not searched.
    ``updates`` are those of a whole training, which is evaluated every ``eval_every``.
    """

    storage: str
    name: str
    lr: tuple[float, float]
    gamma: tuple[float, float] | None
    sampler: str
    pruner: str
    seed: int
    updates: int
    eval_every: int


@dataclass(frozen=True)
class PendingTrial:
    """A setting to try: ``key`` is the trial's in the storage, ``number`` the one in its study."""

    key: int
    number: int
    lr: float
    gamma: float | None = None


def distributions(search: Search) -> dict[str, FloatDistribution]:
    """Of all that is searched, as Optuna takes them."""
    found = {"lr": FloatDistribution(*search.lr, log=True)}
    if search.gamma:
        found["gamma"] = FloatDistribution(*search.gamma)
    return found


def was_interrupted(trial: FrozenTrial) -> bool:
    """Whether it ended with its worker: its setting is tried again, and it does not count."""
    return trial.state == TrialState.FAIL and ERROR not in trial.user_attrs

"""The settings that were chosen, trained on all images under fresh seeds, and tested once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from initflow.core import workers
from initflow.core.configurations import TrainConfig
from initflow.core.progress import Progress
from initflow.errors import OutageError
from initflow.experiments.populations import stacking
from initflow.experiments.populations.members import Member, Trained
from initflow.experiments.populations.stacking import Stack
from initflow.experiments.tuning.plan import Plan
from initflow.experiments.tuning.scheme_study import SchemeStudy
from initflow.experiments.tuning.studies import Study
from initflow.reporting import trials
from initflow.reporting.seed_statistics import Outcome
from initflow.tracking import connection

TESTED = "initflow.tested"  # under which a study remembers its networks that were tested
Known = Mapping[str, Mapping[str, Any]]  # what it remembers of each, by its setting and seed


@dataclass(frozen=True)
class Tests:
    """What the test images said of a scheme's networks, one for each fresh seed.

    ``model`` has the ids of the run and of the model of the tuned network of the first seed: it is
    not chosen by its test. None where it is not logged, or diverged.
    """

    tuned: Sequence[Outcome]
    untuned: Sequence[Outcome]
    model: tuple[str, str] | None


def evaluate(
    plan: Plan, studied: Sequence[SchemeStudy], pool: workers.WorkerPool, progress: Progress
) -> tuple[list[Tests], Trained]:
    """The best setting of each scheme and the untuned one; and what had to be trained for it.

    What a study remembers, and MLflow still has, is not trained and tested again.
    """
    stacks: list[Stack] = []
    of_run = {scheme.run.id: scheme for scheme in studied}
    for scheme in studied:
        known, there = _known(scheme.study), _runs_below(scheme)
        for part, networks in _networks(plan, scheme).items():
            missing = [one for one in networks if not _is_there(known.get(_key(one)), one, there)]
            tags = {scheme.cell: plan.tags(part, scheme.study)}
            stacks += [
                Stack(scheme.run, connection.uri(), some, plan.device, tags, label=f"{part} ")
                for some in stacking.stacks(
                    missing, plan.pixels, plan.classes, plan.device, plan.config.stack
                )
            ]

    def remember(stack: Stack, trained: Trained) -> None:
        scheme = of_run[stack.run.id]
        members = {member.outcome.seed: member for member in trained.members}
        new = {_key(c): _values(members[c.seed]) for c in stack.configs if c.seed in members}
        scheme.study.set_user_attr(TESTED, {**_known(scheme.study), **new})

    trained = Trained()
    if stacks:
        stacking.train_all(trained, stacks, pool, progress, remember)
    return [_tests(plan, scheme) for scheme in studied], trained


def _runs_below(scheme: SchemeStudy) -> set[str]:
    """The names of the runs there; where MLflow does not answer, of all that it remembers."""
    try:
        found = scheme.run.below()
    except OutageError:
        return tested_runs(scheme.study)
    return set().union(*(one.names for one in found))


def _networks(plan: Plan, scheme: SchemeStudy) -> dict[str, list[TrainConfig]]:
    """Those to be tested, ``tuned`` and ``untuned``; none twice where the two are the same."""
    config = plan.config
    seeds = range(config.seed + 1, config.seed + 1 + config.seeds)
    log = config.log_model or config.register is not None
    found = {"untuned": plan.untuned_setting}
    best = trials.best(scheme.study.trials(config.trials))
    if best and (best.lr, best.gamma) == found["untuned"]:
        found = {}
    if best:
        found["tuned"] = (best.lr, best.gamma)
    return {
        part: [
            config.final(
                scheme.init, *setting, seed, log=log and part == "tuned" and seed == seeds[0]
            )
            for seed in seeds
        ]
        for part, setting in found.items()
    }


def _known(study: Study) -> Known:
    return study.user_attr(TESTED) or {}


def tested_runs(study: Study) -> set[str]:
    """The ids of those of all its networks that are tested."""
    return {kept["run_id"] for kept in _known(study).values()}


def _key(config: TrainConfig) -> str:
    return f"lr {config.lr!r} gamma {config.gamma!r} seed {config.seed}"


def _values(member: Member) -> dict[str, Any]:
    return {
        "run_id": member.run_id,
        "model_id": member.model_id,
        "curve": list(member.outcome.curve),
        "diverged_at": member.outcome.diverged_at,
        "images": member.outcome.images,
    }


def _is_there(kept: Mapping[str, Any] | None, config: TrainConfig, runs: set[str]) -> bool:
    """Whether a network is known, with a run, and with a model where one is wanted."""
    if not kept or kept["run_id"] not in runs:
        return False
    return not config.log_model or bool(kept["model_id"]) or kept["diverged_at"] is not None


def _tests(plan: Plan, scheme: SchemeStudy) -> Tests:
    known, networks = _known(scheme.study), _networks(plan, scheme)
    tuned = networks.get("tuned", [])

    def outcomes(configs: Sequence[TrainConfig]) -> list[Outcome]:
        kept = ((config.seed, known.get(_key(config))) for config in configs)
        return [
            Outcome(seed, [(i, a) for i, a in one["curve"]], one["diverged_at"], one["images"])
            for seed, one in kept
            if one
        ]

    first = known.get(_key(tuned[0])) if tuned else None
    model = (first["run_id"], first["model_id"]) if first and first["model_id"] else None
    return Tests(outcomes(tuned), outcomes(networks.get("untuned", tuned)), model)

"""The best models of a tuning in MLflow's registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from initflow.errors import OutageError
from initflow.experiments.tuning import evaluation
from initflow.experiments.tuning.plan import Plan
from initflow.experiments.tuning.scheme_study import SchemeStudy
from initflow.reporting import trials
from initflow.reporting.seed_statistics import Cell
from initflow.reporting.trials import Trial
from initflow.tracking import registry

REGISTERED = "initflow.registered"  # under which a study remembers the versions of its models
BEST = "best"  # the alias of the version that did best on the validation images


def registered(
    plan: Plan,
    studied: Sequence[SchemeStudy],
    tests: Mapping[Cell, evaluation.Tests],
    of_trials: Mapping[Cell, Sequence[Trial]],
) -> tuple[dict[Cell, str], str]:
    """The version of each scheme's model in the registry, made where it is not there.

    None, and why, where MLflow does not answer.
    """
    try:
        return _versions(plan, studied, tests, of_trials), ""
    except OutageError as error:
        return {}, str(error)


def _versions(
    plan: Plan,
    studied: Sequence[SchemeStudy],
    tests: Mapping[Cell, evaluation.Tests],
    of_trials: Mapping[Cell, Sequence[Trial]],
) -> dict[Cell, str]:
    name = plan.config.register
    versions: dict[Cell, str] = {}
    accuracies: dict[Cell, float] = {}
    for scheme in studied if name else ():
        best, model = trials.best(of_trials[scheme.cell]), tests[scheme.cell].model
        if not name or not best or not model:
            continue
        run_id, model_id = registry.there(*model)
        known = scheme.study.user_attr(REGISTERED) or {}
        key = f"{name} {model_id}"
        if key not in known or not registry.has_version(name, known[key]):
            made = registry.register(
                name,
                model_id,
                run_id,
                {**plan.tags("tuned", scheme.study), **scheme.cell._asdict()},
                f"{scheme.cell} at {trials.in_words(best.lr, best.gamma)}, the best of its trials.",
            )
            known = {**known, key: made}
            scheme.study.set_user_attr(REGISTERED, known)
        versions[scheme.cell] = known[key]
        accuracies[scheme.cell] = best.accuracy or 0.0
    if name and versions:
        registry.set_alias(name, BEST, versions[max(accuracies, key=accuracies.__getitem__)])
    return versions

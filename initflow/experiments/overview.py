"""What the run above those of many networks carries: means, a saved view, where to look."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from initflow.experiments.failures import noted
from initflow.experiments.populations import BY_LAYER, Population, by_layer
from initflow.tracking import mlflow_page, runs, ui

_BY_LAYER = tuple(f"by_layer/{quantity}" for quantity in BY_LAYER)
SECTIONS = (
    mlflow_page.ChartSection(
        "accuracy", (mlflow_page.ACCURACY, "loss/test"), logarithmic={"loss/test"}
    ),
    mlflow_page.ChartSection("by_layer", _BY_LAYER, logarithmic=_BY_LAYER),
)  # of the saved view
# The parent's metrics by layer: the mean over the seeds of what is measured.
MEAN_BY_LAYER = {"signal_by_layer": BY_LAYER[0], "relative_gradient_by_layer": BY_LAYER[1]}
READABLE = 300  # characters of an address; a longer one is for clicking, not for reading


def log_overview(population: Population, name: str, paragraphs: Sequence[str]) -> None:
    """The means, the description, and the view of MLflow's page called ``name``."""
    failed = population.failures
    with noted(failed, "the mean curves"):
        _log_means(population)
    with noted(failed, "the description"):
        _describe(population, paragraphs)
    with noted(failed, "the view of MLflow's page"):
        _log_view(population, name)


def _log_means(population: Population) -> None:
    """The parent's own metrics: over iterations, and by layer instead of step.

    MLflow's page draws a chart of each, and would show nothing of a parent without any.
    """
    outcomes, signals = population.outcomes(), population.signals()
    names = runs.key_names(map(str, outcomes))
    history: dict[str, list[tuple[int, float]]] = {}
    for cell, of_seeds in outcomes.items():
        curves = [dict(o.curve) for o in of_seeds if o.diverged_at is None]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        history[f"accuracy_by_iteration/{names[str(cell)]}"] = [
            (step, statistics.fmean(curve[step] for curve in curves)) for step in steps
        ]
    for section, quantity in MEAN_BY_LAYER.items():
        for cell, measured in signals.items():
            layers = zip(*(by_layer(one)[quantity] for one in measured), strict=True)
            means = [
                (layer, statistics.fmean(value for value in values if value is not None))
                for layer, values in enumerate(layers, start=1)
                if None not in values
            ]
            history[f"{section}/{names[str(cell)]}"] = means
    population.run.log_history(history)


def _log_view(population: Population, name: str) -> None:
    """The saved view of MLflow's page in which the networks' runs are compared."""
    run = population.run
    groups = mlflow_page.group_names(population.cells)
    key, value = mlflow_page.saved_view(
        parent_id=run.id,
        name=name,
        group_tag=mlflow_page.group_tag(groups),
        groups=groups,
        sections=SECTIONS,
        metrics=set().union(*(member.metrics for member in population.members)),
        runs=len(population.members),
        now_ms=int(time.time() * 1000),
    )
    run.set_experiment_tag(key, value)


def addresses(population: Population) -> dict[str, str]:
    """Where MLflow's page shows what, complete."""
    run = population.run
    ids = [member.run_id for member in population.members]
    found = {
        "Mean curves with bands": mlflow_page.runs_address(
            run.experiment_id, mlflow_page.view_key(run.id)
        ),
        "Charts of this comparison": mlflow_page.run_address(
            run.experiment_id, run.id, charts=True
        ),
    }
    if 1 < len(ids) <= mlflow_page.LINKED:
        found["Run by run"] = mlflow_page.comparison_address(run.experiment_id, ids)
    server = ui.server()
    return {
        what: runs.with_ids(mlflow_page.absolute(server, address))
        for what, address in found.items()
    }


def warnings(population: Population) -> list[str]:
    """What failed and why, and what else is not as one would expect."""
    lines = [population.remark] if population.remark else []
    lines += [f"{name} failed: {reason}" for name, reason in population.failed.items()]
    if not all(member.is_exact for member in population.members):
        lines.append(
            "Here networks that train together are not bit-identical to each one alone: the "
            "kernels of this device or machine round differently in a stack."
        )
    return lines


def _describe(population: Population, paragraphs: Sequence[str]) -> None:
    """The links first: MLflow's page lays a veil over what is further down."""
    run = population.run
    ids = [member.run_id for member in population.members]
    links = mlflow_page.links(run.experiment_id, run.id, ids)
    run.describe("\n\n".join([*paragraphs, *warnings(population)]), links)


def closing_lines(population: Population) -> list[str]:
    """What went wrong, what it took, and where to look."""
    n = len(population.members)
    each = population.training_s / n
    took = (
        f"Trained {n} networks in {population.training_s:.3g} s, {each:.2g} s each; logging them "
        f"took {population.logging_s:.2g} s."
    )
    there = [
        f"{what}: {address}"
        for what, address in addresses(population).items()
        if len(address) <= READABLE
    ]
    description = "The description of its run links these, and all networks one by one."
    return [*warnings(population), took, *there, description]

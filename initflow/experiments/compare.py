"""Schemes with activations under several seeds, side by side: one run, a run below it for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from initflow.core import environment
from initflow.core.configurations import CompareConfig
from initflow.core.kinds import format_shape
from initflow.core.progress import Progress
from initflow.experiments import failures
from initflow.experiments.failures import noted
from initflow.experiments.overview import addresses, log_overview, warnings
from initflow.experiments.populations import Population, seeds_of, trained_population
from initflow.reporting import comparison_figures, seed_statistics, sentences, webpage
from initflow.reporting.seed_statistics import Difference, Row
from initflow.training import cache, datasets


@dataclass(frozen=True)
class Comparison:
    """What came of the networks: ``rows`` and ``differences`` of their accuracies, in words."""

    config: CompareConfig
    population: Population
    rows: Sequence[Row]
    differences: Sequence[Difference]
    sentences: Sequence[str]


@cache.cleared_after()
def compare(
    config: CompareConfig,
    *,
    experiment: str | None = None,
    progress: Progress = lambda *_: None,
) -> Comparison:
    """Train every scheme with every activation under every seed, and compare them.

    A wrong setting or missing data is an error of :mod:`initflow.errors`, before a run is made.
    """
    schemes = cache.distinct(config.inits, config.plugins_dir)
    configs = [
        config.network(init, activation, seed)
        for seed in range(config.seed, config.seed + config.seeds)
        for activation in config.activations
        for init in config.inits
    ]
    shape = format_shape((datasets.pixels(config.dataset), *config.hidden, datasets.CLASSES))
    names = ", ".join(scheme.spec for scheme in schemes.values())
    title = f"{shape} networks on {config.dataset}, {seeds_of(config.seeds)}"
    epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
    summary = (
        f"{len(configs)} {shape} networks on {config.dataset}: {names} with "
        f"{', '.join(config.activations)}, {seeds_of(config.seeds)}, {epochs}."
    )
    name = (
        f"compare {','.join(config.activations)} {config.dataset} {len(schemes)} schemes "
        f"{seeds_of(config.seeds)}"
    )
    with trained_population(
        config,
        configs,
        name=name,
        summary=summary,
        experiment=experiment,
        progress=progress,
    ) as population:
        outcomes = population.outcomes()
        result = Comparison(
            config,
            population,
            seed_statistics.rows(outcomes),
            seed_statistics.differences(outcomes),
            sentences.comparison_sentences(outcomes),
        )
        _log_table(result)
        log_overview(population, name, [*result.sentences, summary])
        pictures = _log_pictures(result, title)
        with noted(population.failures, "report.html"):
            _log_report(result, title, pictures)
    return result


def _log_table(result: Comparison) -> None:
    run, failed = result.population.run, result.population.failures
    with noted(failed, "comparison.csv"):
        run.log_text("comparison.csv", seed_statistics.as_csv(result.rows))
    with noted(failed, "comparison.json"):
        table = seed_statistics.as_json(result.rows, result.differences, result.sentences)
        run.log_json("comparison", {**table, "failed": dict(result.population.failed)})


def _log_pictures(result: Comparison, title: str) -> dict[str, bytes]:
    population = result.population
    outcomes, signals = population.outcomes(), population.signals()
    drawn = {
        "accuracies": partial(
            comparison_figures.comparison_accuracies, outcomes, result.rows, title
        ),
        "learning_curves": partial(comparison_figures.comparison_curves, outcomes, title),
    }
    if signals:
        drawn["signals_by_layer"] = partial(comparison_figures.signals_by_layer, signals, title)
    return failures.log_figures(population.run, drawn, population.failures)


def _log_report(result: Comparison, title: str, pictures: Mapping[str, bytes]) -> None:
    population, config = result.population, result.config
    run = population.run
    html = webpage.comparison_page(
        title=title,
        sentences=result.sentences,
        rows=result.rows,
        differences=result.differences,
        accuracies=pictures.get("accuracies"),
        curves=pictures.get("learning_curves"),
        signals=pictures.get("signals_by_layer"),
        configuration=config.as_text(),
        environment=environment.shown(population.device),
        command=config.command("compare", ("inits",), run.launcher),
        warnings=[*warnings(population), *failures.lines(population.failures)],
        links=list(addresses(population).items()),
    )
    run.log_text("report.html", html)

"""Schemes with activations under several seeds, side by side: one run, a run below it for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from initflow.core.configurations import BEST, CompareConfig
from initflow.core.progress import Progress
from initflow.experiments.comparisons import best_models
from initflow.experiments.comparisons.overview import PopulationResult
from initflow.experiments.failures import noted
from initflow.experiments.populations.stacking import trained_population
from initflow.experiments.public import public
from initflow.reporting import comparison_figures, seed_statistics, webpage
from initflow.reporting.formats import counted, training_length
from initflow.reporting.results import Drawings
from initflow.reporting.seed_statistics import Difference, Row
from initflow.reporting.sentences import comparison_sentences
from initflow.training import cache, datasets


@dataclass(kw_only=True, repr=False)
class Comparison(PopulationResult):
    """What came of :func:`initflow.compare`: networks of one ``shape``.

    - ``rows``: of each scheme with each activation the final test accuracy over the seeds, as
      fractions: ``mean``, ``std`` (of a sample) and the 95 % interval of the mean, ``low`` to
      ``high``.
    - ``differences``: of each two schemes the ``effect``, a difference of mean accuracies, with its
      95 % interval (paired t, seed by seed) and p-value, also by Holm.
    - ``members``: the networks, each with its ``config``, ``run_id`` and ``outcome``; ``failed``
      says by name why others are not there.
    """

    command: ClassVar = "compare"
    always: ClassVar = ("inits",)
    config: CompareConfig
    shape: str
    rows: Sequence[Row]
    differences: Sequence[Difference]

    @property
    def title(self) -> str:
        config, seeds = self.config, counted(self.config.seeds, "seed")
        return f"{self.shape} networks on {datasets.title(config.dataset)}, {seeds}"

    def numbers(self) -> Iterable[Mapping[str, object]]:
        """A row for each scheme with each activation."""
        return map(seed_statistics.values, self.rows)

    def drawings(self) -> Drawings:
        outcomes, signals = self.outcomes(), self.signals()
        draw, title = partial, self.title
        drawn = {
            "accuracies": draw(
                comparison_figures.comparison_accuracies, outcomes, self.rows, title
            ),
            "learning_curves": draw(comparison_figures.comparison_curves, outcomes, title),
        }
        if signals:
            drawn["signals_by_layer"] = draw(
                comparison_figures.signals_by_layer, signals, title, self.rows
            )
        return drawn

    def sections(self, pictures: Mapping[str, bytes]) -> list[webpage.Section]:
        return webpage.comparison_sections(self.rows, self.differences, pictures)


@public(CompareConfig)
@cache.cleared_after()
def compare(
    config: CompareConfig, *, experiment: str | None = None, progress: Progress
) -> Comparison:
    """Train every scheme with every activation under every seed, and say what the seeds bear out.

    Each network has an MLflow run of its own below that of the comparison; what an interrupted
    one of the same settings has trained is not trained again.

    Returns a :class:`Comparison`. A network that fails is in its ``failed``, and ends no other.

    Raises, before a run is made, :class:`SettingError` for a wrong setting, :class:`PluginError`
    for a scheme or model that fails or breaks its contract, and :class:`DataError` for data that is
    missing or damaged; :class:`TrackingError` where MLflow refuses the run; and :class:`WorkError`
    where memory does not suffice, or the workers die.
    """
    schemes = cache.distinct(config.inits, config.plugins_dir)
    configs = [
        config.network(init, activation, seed)
        for seed in range(config.seed, config.seed + config.seeds)
        for activation in config.own_activations
        for init in config.inits
    ]
    progress("loading the data, downloaded at its first use", 0, 1)
    shape, on = cache.title(configs[0]), datasets.title(config.dataset)
    names = ", ".join(scheme.spec for scheme in schemes.values())
    kinds = list(dict.fromkeys(one.kind for one in configs))
    seeds = counted(config.seeds, "seed")
    summary = (
        f"{len(configs)} {shape} networks on {on}: {names} with "
        f"{', '.join(kinds)}, {seeds}, {training_length(configs[0])}."
    )
    name = f"compare {','.join(kinds)} {on} {len(schemes)} schemes {seeds}"
    with trained_population(
        config,
        configs,
        name=name,
        summary=summary,
        experiment=experiment,
        progress=progress,
        run_figures=config.run_figures,
        resumable="compare",
        keeps_best=config.log_model == BEST,
    ) as population:
        if config.log_model == BEST:
            best_models.log(population, progress)
        outcomes = population.outcomes()
        result = Comparison(
            **vars(population),
            config=config,
            shape=shape,
            rows=seed_statistics.rows(outcomes),
            differences=seed_statistics.differences(outcomes),
            sentences=comparison_sentences(outcomes),
        )
        _log_table(result)
        result.log_overview(name, [summary])
        result.log_report()
    return result


def _log_table(result: Comparison) -> None:
    run, failed = result.run, result.failures
    with noted(failed, "comparison.csv"):
        run.log_text("comparison.csv", seed_statistics.as_csv(result.rows))
    with noted(failed, "comparison.json"):
        table = seed_statistics.as_json(result.rows, result.differences, result.sentences)
        run.log_json("comparison", {**table, "failed": dict(result.failed)})

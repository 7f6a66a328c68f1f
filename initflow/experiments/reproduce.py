"""A published table run again: its numbers beside ours, over several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from initflow.core import environment
from initflow.core.configurations import ReproduceConfig
from initflow.core.progress import Progress
from initflow.errors import SettingError
from initflow.experiments import failures
from initflow.experiments.failures import noted
from initflow.experiments.overview import addresses, log_overview, warnings
from initflow.experiments.populations import Population, seeds_of, trained_population
from initflow.reporting import comparison_figures, published, seed_statistics, webpage
from initflow.reporting.formats import NONE, interval, percent, whole
from initflow.reporting.published import Check, PublishedTable, explained
from initflow.reporting.seed_statistics import Cell, Outcome, Row
from initflow.training import cache

NUMBERS = (
    webpage.Column("published, %", number=True),
    webpage.Column("ours, %", number=True),
    webpage.Column("95 % interval", number=True),
    webpage.Column("95 % of single seeds", number=True),
    webpage.Column("explained by the seed"),
)


@dataclass(frozen=True)
class Reproduction:
    """What came of a table: by a row's name, ``checks`` of its published numbers, and ``rows``."""

    config: ReproduceConfig
    table: PublishedTable
    population: Population
    outcomes: Mapping[str, Sequence[Outcome]]
    rows: Mapping[str, Row]
    checks: Mapping[str, Sequence[Check]]
    sentences: Sequence[str]


@cache.cleared_after()
def reproduce(
    config: ReproduceConfig,
    *,
    experiment: str | None = None,
    progress: Progress = lambda *_: None,
) -> Reproduction:
    """Train the networks of a published table under several seeds, and hold them against it.

    A wrong setting or missing data is an error of :mod:`initflow.errors`, before a run is made.
    """
    table = published.load(config.table)
    try:
        schemes = {row.init: cache.scheme(row.init, config.plugins_dir) for row in table.rows}
    except SettingError as error:
        raise SettingError(f"table '{config.table}': {error}") from error
    cells = [f"{schemes[row.init].spec} {row.activation}" for row in table.rows]
    for cell in cells:
        if cells.count(cell) > 1:
            raise SettingError(f"table '{config.table}' has two rows of the same network, {cell}")
    configs = [
        table.network(row, seed, config)
        for seed in range(config.seed, config.seed + config.seeds)
        for row in table.rows
    ]
    name = f"reproduce {table.name} {seeds_of(config.seeds)}"
    with trained_population(
        config,
        configs,
        name=name,
        summary=f"{table.title}, {seeds_of(config.seeds)}.",
        experiment=experiment,
        progress=progress,
    ) as population:
        of_cells = population.outcomes()
        outcomes = {
            row.name: of_cells.get(Cell(schemes[row.init].spec, row.activation), [])
            for row in table.rows
        }
        rows = seed_statistics.rows({Cell(row, ""): seeds for row, seeds in outcomes.items()})
        checks = {row.name: published.checks(row, outcomes[row.name]) for row in table.rows}
        result = Reproduction(
            config,
            table,
            population,
            outcomes,
            {row.cell.init: row for row in rows},
            checks,
            [published.sentence(table, checks, config.seeds)],
        )
        with noted(population.failures, "reproduction.json"):
            population.run.log_json("reproduction", as_json(result))
        log_overview(population, name, [*result.sentences, f"{table.title}. {table.source}"])
        curves = _log_curves(result)
        with noted(population.failures, "report.html"):
            _log_report(result, curves)
    return result


def as_json(result: Reproduction) -> dict[str, Any]:
    """All of it as plain values."""
    return {
        "table": result.table.name,
        "title": result.table.title,
        "source": result.table.source,
        "notes": list(result.table.notes),
        "sentences": list(result.sentences),
        "rows": [
            {
                "name": row.name,
                "init": row.init,
                "activation": row.activation,
                "n": result.rows[row.name].n,
                "accuracy_mean": result.rows[row.name].mean,
                "accuracy_low": result.rows[row.name].low,
                "accuracy_high": result.rows[row.name].high,
                "diverged": result.rows[row.name].diverged,
                "checks": [
                    asdict(check) | {"explained": check.explained}
                    for check in result.checks[row.name]
                ],
            }
            for row in result.table.rows
        ],
        "failed": dict(result.population.failed),
    }


def _title(result: Reproduction) -> str:
    return f"{result.table.title}, {seeds_of(result.config.seeds)}"


def _log_curves(result: Reproduction) -> bytes | None:
    population = result.population
    lines = {
        row.name: (row.published, result.outcomes[row.name])
        for row in result.table.rows
        if result.outcomes[row.name]
    }
    name = "published_and_ours"
    drawn = {name: partial(comparison_figures.published_curves, lines, _title(result))}
    return failures.log_figures(population.run, drawn, population.failures).get(name)


def _log_report(result: Reproduction, curves: bytes | None) -> None:
    population, table, config = result.population, result.table, result.config
    run = population.run
    picture = webpage.pictured(
        curves,
        "For each row of the table the test accuracy over the iterations: published numbers as "
        "marks, ours as the mean over the seeds within a band from the lowest to the highest.",
    )
    sections = [
        webpage.Section("Final accuracies", [_final_table(result)]),
        webpage.Section("Learning curves", [*picture, *_curve_tables(result)]),
        webpage.Section("The table", [webpage.Text(table.source), webpage.Listing(table.notes)]),
        *webpage.colophon(
            configuration=config.as_text() | {k: str(v) for k, v in table.settings.items()},
            environment=environment.shown(population.device),
            command=config.command("reproduce", ("table",), run.launcher),
            links=list(addresses(population).items()),
        ),
    ]
    html = webpage.page(
        title=_title(result),
        lead=result.sentences,
        sections=sections,
        warnings=[*warnings(population), *failures.lines(population.failures)],
    )
    run.log_text("report.html", html)


def _final_table(result: Reproduction) -> webpage.Table:
    columns = [webpage.Column("row"), webpage.Column("scheme"), *NUMBERS]
    rows = []
    for row in result.table.rows:
        at, theirs = row.published[-1] if row.published else (None, None)
        last = next((check for check in result.checks[row.name] if check.iteration == at), None)
        ours = last or result.rows[row.name]  # at the same iteration, or at the end
        rows.append(
            [
                row.name,
                f"{row.init} {row.activation}",
                percent(theirs),
                percent(ours.mean),
                interval(ours.low, ours.high),
                interval(last.seed_low, last.seed_high) if last else NONE,
                explained(last),
            ]
        )
    return webpage.Table("The published and our final test accuracy", columns, rows)


def _curve_tables(result: Reproduction) -> list[webpage.Table]:
    columns = [webpage.Column("row"), webpage.Column("iteration", number=True), *NUMBERS]
    rows = [
        [
            name,
            whole(check.iteration),
            percent(check.published),
            percent(check.mean),
            interval(check.low, check.high),
            interval(check.seed_low, check.seed_high),
            explained(check),
        ]
        for name, checks in result.checks.items()
        for check in checks
    ]
    return [webpage.Table("Iteration by iteration", columns, rows)] if rows else []

"""A published table run again: its numbers beside ours, over several seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

from initflow.core.configurations import ReproduceConfig
from initflow.core.progress import Progress
from initflow.errors import SettingError
from initflow.experiments.comparisons.overview import PopulationResult
from initflow.experiments.failures import noted
from initflow.experiments.populations.stacking import cells_of, trained_population
from initflow.experiments.public import public
from initflow.reporting import comparison_figures, published, seed_statistics, webpage
from initflow.reporting.formats import NONE, counted, interval, percent, whole
from initflow.reporting.published import Check, PublishedTable, explained
from initflow.reporting.results import Drawings
from initflow.reporting.seed_statistics import Cell, Outcome, Row
from initflow.training import cache

NUMBERS = ("published, %", "ours, %", "95 % interval", "95 % of single seeds")
EXPLAINED = webpage.Column("explained by the seed")


@dataclass(kw_only=True, repr=False)
class Reproduction(PopulationResult):
    """What came of :func:`initflow.reproduce`.

    - ``table``: the published table, with its ``source`` and ``notes``.
    - ``rows``: ours, by the name of a row: the final test accuracy over the seeds, a fraction, with
      the 95 % interval of its mean.
    - ``checks``: by the name of a row, each of its published accuracies beside ours at the same
      iteration, and whether the chance of the seed explains the difference (``explained``).
    """

    command: ClassVar = "reproduce"
    always: ClassVar = ("table",)
    config: ReproduceConfig
    table: PublishedTable
    cell_by_row: Mapping[str, Cell]
    by_row: Mapping[str, Sequence[Outcome]]
    rows: Mapping[str, Row]
    checks: Mapping[str, Sequence[Check]]

    @property
    def title(self) -> str:
        return f"{self.table.title}, {counted(self.config.seeds, 'seed')}"

    def configuration(self) -> dict[str, str]:
        return self.config.as_text() | {k: str(v) for k, v in self.table.settings.items()}

    def numbers(self) -> Iterable[Mapping[str, object]]:
        """A row for each published number, beside ours at the same iteration.

        Of a row of the table without any, ours at the end.
        """
        ends = ("n", "mean", "low", "high")
        for name, checks in self.checks.items():
            for check in checks:
                yield {"row": name, **asdict(check), "explained": check.explained}
            if not checks:
                yield {"row": name, **{end: getattr(self.rows[name], end) for end in ends}}

    def drawings(self) -> Drawings:
        lines = {
            row.name: (row.published, self.by_row[row.name])
            for row in self.table.rows
            if self.by_row[row.name]
        }
        draw = partial(comparison_figures.published_curves, lines, self.title)
        return {"published_and_ours": draw}

    def closing_lines(self) -> list[str]:
        return [*self.table.notes, *super().closing_lines()]

    def sections(self, pictures: Mapping[str, bytes]) -> list[webpage.Section]:
        curves = webpage.pictured(
            pictures.get("published_and_ours"),
            "For each row of the table the test accuracy over the iterations: published numbers as "
            "marks, ours as the mean over the seeds within a band from the lowest to the highest.",
        )
        table = self.table
        return [
            webpage.Section("Final accuracies", [_final_table(self)]),
            webpage.Section("Learning curves", [*curves, *_curve_tables(self)]),
            webpage.Section(
                "The table", [webpage.Text(table.source), webpage.Listing(table.notes)]
            ),
        ]


@public(ReproduceConfig)
@cache.cleared_after()
def reproduce(
    config: ReproduceConfig, *, experiment: str | None = None, progress: Progress
) -> Reproduction:
    """Train the networks of a published table under several seeds, and compare with it.

    ``table`` is ``"tutorial"``, ``"assignment"``, ``"normalized-cnn"``, or the path of a table's
    file, which ends with ``.toml``. Each says what it was published in.

    Returns a :class:`Reproduction`. Raises what :func:`initflow.compare` does.
    """
    table = published.load(config.table)
    first = [table.network(row, config.seed, config) for row in table.rows]
    try:
        cells = dict(zip((row.name for row in table.rows), cells_of(first), strict=True))
    except SettingError as error:
        raise SettingError(f"table '{config.table}': {error}") from error
    for cell in cells.values():
        if list(cells.values()).count(cell) > 1:
            raise SettingError(f"table '{config.table}' has two rows of the same network, {cell}")
    configs = [
        table.network(row, seed, config)
        for seed in range(config.seed, config.seed + config.seeds)
        for row in table.rows
    ]
    name = f"reproduce {table.name} {counted(config.seeds, 'seed')}"
    summary = f"{table.title}, {counted(config.seeds, 'seed')}."
    with trained_population(
        config,
        configs,
        name=name,
        summary=summary,
        experiment=experiment,
        progress=progress,
        run_figures=config.run_figures,
        resumable="reproduce",
    ) as population:
        of_cells = population.outcomes()
        by_row = {row: of_cells.get(cell, []) for row, cell in cells.items()}
        rows = seed_statistics.rows({Cell(row, ""): seeds for row, seeds in by_row.items()})
        checks = {row.name: published.checks(row, by_row[row.name]) for row in table.rows}
        result = Reproduction(
            **vars(population),
            config=config,
            table=table,
            cell_by_row=cells,
            by_row=by_row,
            rows={row.cell.init: row for row in rows},
            checks=checks,
            sentences=[published.sentence(table, checks, config.seeds)],
        )
        with noted(result.failures, "reproduction.json"):
            result.run.log_json("reproduction", as_json(result))
        result.log_overview(name, [f"{table.title}. {table.source}"])
        result.log_report()
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
                "model": row.model,
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
        "failed": dict(result.failed),
    }


def _final_table(result: Reproduction) -> webpage.Table:
    columns = [*webpage.columns("row", "scheme", numbers=NUMBERS), EXPLAINED]
    rows = []
    for row in result.table.rows:
        at, theirs = row.published[-1] if row.published else (None, None)
        last = next((check for check in result.checks[row.name] if check.iteration == at), None)
        ours = last or result.rows[row.name]  # at the same iteration, or at the end
        rows.append(
            [
                row.name,
                f"{row.init} {result.cell_by_row[row.name].activation}",
                percent(theirs),
                percent(ours.mean),
                interval(ours.low, ours.high),
                interval(last.seed_low, last.seed_high) if last else NONE,
                explained(last),
            ]
        )
    return webpage.Table("The published and our final test accuracy", columns, rows)


def _curve_tables(result: Reproduction) -> list[webpage.Table]:
    columns = [*webpage.columns("row", numbers=("iteration", *NUMBERS)), EXPLAINED]
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

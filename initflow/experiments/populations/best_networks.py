"""The best network of each cell so far, with the weights that a model of it takes.

Of many networks no more weights are kept than one network's of each cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from initflow.core.configurations import TrainConfig
from initflow.diagnostics.record import Record
from initflow.reporting.seed_statistics import Cell

Rank = tuple[float, int]


@dataclass(frozen=True)
class Best:
    """A network by its ``rank``, with its weights by name after ``step`` updates."""

    rank: Rank
    step: int
    state: Mapping[str, Tensor]


def chosen_by(config: TrainConfig) -> str:
    """The metric by which the best is chosen: of images held out, or else of the test images."""
    return "accuracy/validation" if config.validation else "accuracy/test"


def rank(config: TrainConfig, last: Callable[[str], float | None]) -> Rank | None:
    """The larger, the better: the last accuracy and, of the same one, the first seed.

    ``last`` gives a metric's last value. None where it has no accuracy.
    """
    accuracy = last(chosen_by(config))
    return None if accuracy is None else (accuracy, -config.seed)


def keep(best: dict[Cell, Best], cell: Cell, record: Record) -> None:
    """Let ``record`` be the best of its cell, where it is better and has finished."""
    its = rank(record.config, record.last)
    if its is not None and record.outcome == "finished":
        _keep_better(best, cell, Best(its, record.step, record.trained))


def take(best: dict[Cell, Best], others: dict[Cell, Best]) -> None:
    """Let those of ``others`` that are better be in ``best``; the rest are let go of."""
    while others:
        _keep_better(best, *others.popitem())


def _keep_better(best: dict[Cell, Best], cell: Cell, one: Best) -> None:
    if cell not in best or best[cell].rank < one.rank:
        best[cell] = one

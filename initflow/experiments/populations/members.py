"""Networks among many after their training: what is kept of them beside their runs.

There may be thousands, so that what nobody looks at again is left to the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from initflow.core.configurations import TrainConfig
from initflow.diagnostics.signals import Signals
from initflow.experiments.failures import Failures
from initflow.experiments.populations import best_networks
from initflow.reporting.seed_statistics import Cell, Outcome

TOLD = ("accuracy/", "loss/")  # metrics of which each network's last value is kept
# Of the untrained signals, what the figures and means of many networks show.
KEPT = ("preactivation_variance", "gradient_variance")


@dataclass(frozen=True)
class Member:
    """One network.

    ``signals`` are those of the untrained network, as :func:`kept_signals` leaves them, and
    ``last`` has the last values that :func:`told_metrics` leaves. ``is_exact`` says whether its
    numbers are those of the network alone.
    """

    config: TrainConfig
    cell: Cell
    run_id: str
    model_id: str | None
    outcome: Outcome
    signals: Signals | None
    last: Mapping[str, float]
    is_exact: bool


@dataclass
class Trained:
    """What came of networks: those that are there, and why others failed, by their runs' names.

    ``failures`` is what could not be made of those that are there, such as a figure.
    ``metrics`` are the keys of all metrics that some network has. ``best`` has the best one of
    each cell, where that is asked for. ``training_s`` and ``logging_s``: seconds, of all workers
    together.
    """

    members: list[Member] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    failures: Failures = field(default_factory=dict)
    metrics: set[str] = field(default_factory=set)
    best: dict[Cell, best_networks.Best] = field(default_factory=dict)
    training_s: float = 0.0
    logging_s: float = 0.0

    def add(self, other: Trained) -> None:
        self.members += other.members
        self.failed |= other.failed
        self.failures |= other.failures
        self.metrics |= other.metrics
        best_networks.take(self.best, other.best)
        self.training_s += other.training_s
        self.logging_s += other.logging_s


def told_metrics(last: Mapping[str, float]) -> dict[str, float]:
    """Of the last values of all metrics those that are accuracies or losses."""
    return {key: value for key, value in last.items() if key.startswith(TOLD)}


def kept_signals(signals: Signals) -> Signals:
    """The quantities of :data:`KEPT` alone."""
    layers = {
        layer: {quantity: values[quantity] for quantity in KEPT if quantity in values}
        for layer, values in signals.layers.items()
    }
    return Signals(layers, {})

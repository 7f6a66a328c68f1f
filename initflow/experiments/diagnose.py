"""Schemes with activations, untrained: a tracked run with one nested run for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from initflow.core import machine
from initflow.core.configurations import DiagnoseConfig
from initflow.core.kinds import format_shape
from initflow.core.progress import Progress
from initflow.diagnostics import measure
from initflow.diagnostics.reading import Reading, as_json, read
from initflow.diagnostics.record import start
from initflow.experiments import command_run, failures
from initflow.experiments.failures import Failures, noted
from initflow.experiments.network_run import start_tags, verdict_sentence, verdict_tags
from initflow.experiments.public import public
from initflow.experiments.results import TrackedResult
from initflow.initializers.activations import ACTIVATIONS
from initflow.reporting import figures
from initflow.reporting.results import Drawings
from initflow.reporting.seed_statistics import Cell
from initflow.tracking import runs
from initflow.training import cache, datasets, model


@dataclass(frozen=True, repr=False)
class Diagnosis(TrackedResult):
    """What was read of each network, by scheme and activation, in the order of the settings.

    ``shape`` is that of all, as ``784-100x20-10``.
    """

    config: DiagnoseConfig
    run: runs.Run
    shape: str
    readings: dict[Cell, Reading]
    remark: str = ""
    failures: Failures = field(default_factory=dict)

    @property
    def failed(self) -> dict[Cell, Reading]:
        """The networks whose verdict, forward or backward, is one to fail on."""
        unwanted = set(self.config.fail_on or ())
        return {
            cell: reading
            for cell, reading in self.readings.items()
            if unwanted & {reading.verdict.forward, reading.verdict.backward}
        }

    @property
    def title(self) -> str:
        return f"untrained {self.shape} networks on {self.config.dataset}"

    @property
    def conclusions(self) -> Sequence[str]:
        """What to try instead, once for all networks that it is said of; and the remark."""
        said: dict[str, list[str]] = {}
        for cell, reading in self.readings.items():
            if reading.advice:
                said.setdefault(reading.advice, []).append(str(cell))
        advice = [f"{', '.join(cells)}: {advice}" for advice, cells in said.items()]
        return [*advice, *filter(None, [self.remark])]

    def drawings(self) -> Drawings:
        networks = {cell: (its.predicted, its.signals) for cell, its in self.readings.items()}
        return {"schemes_by_layer": partial(figures.schemes_by_layer, networks, self.title)}

    def numbers(self) -> Iterable[Mapping[str, object]]:
        """A row for each network: its verdicts, and the theory of its middle hidden layer."""
        for cell, its in self.readings.items():
            yield cell._asdict() | vars(its.verdict) | vars(its.mean_field)


@public(DiagnoseConfig)
@cache.cleared_after()
def diagnose(
    config: DiagnoseConfig, *, experiment: str | None = None, progress: Progress
) -> Diagnosis:
    """Measure every scheme with every activation at initialization, beside the prediction.

    A wrong setting or missing data is an error of :mod:`initflow.errors`, before a run is made.
    """
    found = cache.distinct(config.inits, config.plugins_dir).values()
    schemes = {scheme.spec: scheme for scheme in found}
    device = machine.device(config.device)
    cells = [Cell(init, activation) for init in schemes for activation in config.activations]
    progress("loading the data, downloaded at its first use", 0, 1)
    splits = datasets.load(config.network(*cells[0]))
    shape = format_shape(datasets.widths(splits.pixels, config.hidden))
    probe = measure.probe(splits.train, config.probe).to(torch.device(device))
    summary = (
        f"{len(cells)} untrained {shape} networks, {', '.join(schemes)} with "
        f"{', '.join(config.activations)}, on {len(probe):,} images of {config.dataset}; "
        f"seed {config.seed}."
    )

    def initialized(cell: Cell) -> model.Parameters:
        return start(config.network(*cell), schemes[cell.init], splits).initial

    for cell in cells:  # a scheme that fails, does so before a run is made
        initialized(cell)
    with machine.threads(config.threads) as threads:
        resolved = machine.Resolved(device, threads)
        name = f"diagnose {shape} {config.dataset} seed {config.seed}"
        with command_run.opened(
            config, splits, resolved.as_text(), name=name, summary=summary, experiment=experiment
        ) as run:
            result = Diagnosis(config, run, shape, {}, splits.remark)
            for done, cell in enumerate(cells):
                progress(f"{cell.init} with {cell.activation}", done, len(cells))
                scheme, initial = schemes[cell.init], initialized(cell)
                reading = read(
                    initial.copy_to(device),
                    scheme,
                    ACTIVATIONS[cell.activation],
                    config.bias_init,
                    probe,
                )
                # What the layers received is for drawing one training; of a grid it is gigabytes.
                result.readings[cell] = replace(reading, preactivations=())
                title = f"{cell.init}, {cell.activation}, {shape}, {config.dataset}"
                with run.nested(
                    name=f"{cell} {shape}",
                    description=f"{title}. {verdict_sentence(reading)}",
                    params=config.network(*cell).as_text(),
                    tags=start_tags(scheme, initial, splits) | verdict_tags(reading.verdict),
                ) as nested:
                    _log_network(nested, reading, title, result.failures)
            progress("drawing and logging", len(cells), len(cells))
            with noted(result.failures, "the numbers by layer"):
                _log_numbers(run, result.readings)
            result.log_figures()
    return result


def _log_network(run: runs.Run, reading: Reading, title: str, failed: Failures) -> None:
    run.log_metrics(0, reading.signals.metrics() | reading.metrics())
    run.log_json("signals", as_json(reading, [(0, reading.signals)]))
    name, of_network = "predicted_and_measured", Failures()
    draw = partial(figures.predicted_and_measured, reading.predicted, reading.signals, title)
    failures.log_figures(run, {name: draw}, of_network)
    failed |= failures.of(title, of_network)


def _log_numbers(run: runs.Run, readings: Mapping[Cell, Reading]) -> None:
    """The parent's own: by layer instead of step, so that MLflow's page draws lines of them."""
    names = runs.key_names(init for init, _ in readings)
    run.log_history(
        {
            f"{quantity}/{names[init]} {activation}": [
                (layer, value)
                for layer, value in enumerate(reading.signals.by_layer(quantity), start=1)
                if value is not None
            ]
            for quantity in ("preactivation_second_moment", "gradient_second_moment")
            for (init, activation), reading in readings.items()
        }
    )
    networks = [
        {**cell._asdict(), **as_json(reading, [(0, reading.signals)])}
        for cell, reading in readings.items()
    ]
    run.log_json("diagnosis", {"networks": networks})

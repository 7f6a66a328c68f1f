"""Schemes with activations, untrained: a tracked run with one nested run for each of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

import initflow
from initflow.core import machine
from initflow.core.configurations import DiagnoseConfig
from initflow.core.kinds import format_shape
from initflow.core.progress import Progress
from initflow.diagnostics import measure
from initflow.diagnostics.reading import Reading, as_json, read
from initflow.errors import SettingError
from initflow.experiments import failures
from initflow.experiments.command_run import log_setting, resolved_params
from initflow.experiments.failures import Failures, noted
from initflow.experiments.network_run import verdict_sentence, verdict_tags
from initflow.initializers import plugins
from initflow.initializers.activations import ACTIVATIONS
from initflow.reporting import figures
from initflow.tracking import runs
from initflow.training import datasets, model

Cell = tuple[str, str]  # a scheme and an activation function


@dataclass(frozen=True)
class Diagnosis:
    """What was read of each network, by scheme and activation, in the order asked for.

    ``remark`` is a sentence on the data, where there is something odd to say of it; ``failures`` is
    what could not be made.
    """

    config: DiagnoseConfig
    run: runs.Run
    readings: dict[Cell, Reading]
    remark: str = ""
    failures: Failures = field(default_factory=dict)

    @property
    def run_id(self) -> str:
        return runs.with_ids(self.run.id)

    @property
    def failed(self) -> dict[Cell, Reading]:
        """The networks whose verdict, forward or backward, is one to fail on."""
        unwanted = set(self.config.fail_on or ())
        return {
            cell: reading
            for cell, reading in self.readings.items()
            if unwanted & {reading.verdict.forward, reading.verdict.backward}
        }


def diagnose(
    config: DiagnoseConfig,
    *,
    experiment: str | None = None,
    progress: Progress = lambda *_: None,
) -> Diagnosis:
    """Measure every scheme with every activation at initialization, beside the prediction.

    A wrong setting or missing data is an error of :mod:`initflow.errors`, before a run is made.
    """
    found = [plugins.find(init, config.plugins_dir) for init in config.inits]
    schemes = {scheme.spec: scheme for scheme in found}
    if len(schemes) < len(config.inits):
        raise SettingError(f"inits must be schemes that differ, not '{','.join(config.inits)}'")
    device = machine.device(config.device)
    cells = list(itertools.product(schemes, config.activations))
    progress("loading the data, downloaded at its first use", 0, 1)
    splits = datasets.load(config.network(*cells[0]))
    widths = (splits.pixels, *config.hidden, datasets.CLASSES)
    probe = measure.probe(splits.train, config.probe).to(torch.device(device))
    summary = (
        f"{len(cells)} untrained {format_shape(widths)} networks, "
        f"{', '.join(schemes)} with {', '.join(config.activations)}, on {len(probe):,} "
        f"images of {config.dataset}; seed {config.seed}."
    )

    def initialized(init: str, activation: str) -> model.Parameters:
        return model.initialize(
            widths,
            schemes[init],
            ACTIVATIONS[activation],
            bias_init=config.bias_init,
            seed=config.seed,
            data=splits.train,
        )

    for cell in cells:  # a scheme that fails, does so before a run is made
        initialized(*cell)
    readings: dict[Cell, Reading] = {}
    failed: Failures = {}
    with machine.threads(config.threads) as threads:
        resolved = resolved_params(device, threads)
        with runs.start(
            name=f"diagnose {format_shape(widths)} {config.dataset} seed {config.seed}",
            description=splits.described(summary),
            params=config.as_text() | resolved,
            tags={"initflow.version": initflow.__version__, **splits.tags},
            experiment=experiment,
        ) as run:
            log_setting(run, config, splits, resolved)
            for done, (init, activation) in enumerate(cells):
                progress(f"{init} with {activation}", done, len(cells))
                scheme, initial = schemes[init], initialized(init, activation)
                reading = read(
                    initial.copy_to(device),
                    scheme,
                    ACTIVATIONS[activation],
                    config.bias_init,
                    probe,
                )
                # What the layers received is for drawing one training; of a grid it is gigabytes.
                readings[init, activation] = replace(reading, preactivations=())
                title = f"{init}, {activation}, {format_shape(widths)}, {config.dataset}"
                with run.nested(
                    name=f"{init} {activation} {format_shape(widths)}",
                    description=f"{title}. {verdict_sentence(reading)}",
                    params=config.network(init, activation).as_text(),
                    tags={
                        "initflow.version": initflow.__version__,
                        "initflow.scheme": init,
                        "initflow.provider": scheme.provider,
                        **splits.tags,
                        "initflow.initial_weights_sha256": model.weights_sha256(initial.state()),
                        **verdict_tags(reading.verdict),
                    },
                ) as nested:
                    _log_network(nested, reading, title, failed)
            progress("drawing and logging", len(cells), len(cells))
            title = f"untrained {format_shape(widths)} networks on {config.dataset}"
            with noted(failed, "the numbers by layer"):
                _log_numbers(run, readings)
            networks = {cell: (its.predicted, its.signals) for cell, its in readings.items()}
            draw = partial(figures.schemes_by_layer, networks, title)
            failures.log_figures(run, {"schemes_by_layer": draw}, failed)
    return Diagnosis(config, run, readings, splits.remark, failed)


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
    for quantity in ("preactivation_second_moment", "gradient_second_moment"):
        lines = {
            f"{quantity}/{names[init]} {activation}": reading.signals.by_layer(quantity)
            for (init, activation), reading in readings.items()
        }
        for layer, values in enumerate(zip(*lines.values(), strict=True), start=1):
            at = {key: v for key, v in zip(lines, values, strict=True) if v is not None}
            run.log_metrics(layer, at)
    run.log_json("diagnosis", {"networks": [_row(*item) for item in readings.items()]})


def _row(cell: Cell, reading: Reading) -> dict[str, Any]:
    init, activation = cell
    named = {"init": init, "activation": activation}
    return named | as_json(reading, [(0, reading.signals)])

"""Schemes with activations, untrained: a tracked run with one nested run for each of them."""

from __future__ import annotations

import torch

from initflow.core import machine
from initflow.core.configurations import MLP, DiagnoseConfig
from initflow.core.kinds import format_shape
from initflow.core.progress import Progress
from initflow.diagnostics import measure, spectrum
from initflow.diagnostics.reading import Given, read
from initflow.experiments.network_run import start_tags
from initflow.experiments.public import public
from initflow.experiments.untrained import own_model
from initflow.experiments.untrained.diagnosis import Diagnosis, Network, Subject, diagnosed
from initflow.initializers.activations import ACTIVATIONS
from initflow.reporting.seed_statistics import Cell
from initflow.training import cache, datasets, model


@public(DiagnoseConfig)
@cache.cleared_after()
def diagnose(
    config: DiagnoseConfig, *, experiment: str | None = None, progress: Progress
) -> Diagnosis:
    """Measure every scheme with every activation at initialization, beside what theory predicts.

    In feed-forward networks or, where ``model`` names the function that builds one, in a model of
    your own. Nothing is trained. Measured of each layer are variances and mean squares over all
    images and units, of pre-activations, activations and gradients, and shares of its units. Theory
    predicts the mean squares, with bands in which 95 % of networks lie.

    Returns a :class:`Diagnosis`. Raises, before a run is made, :class:`SettingError` for a wrong
    setting, :class:`PluginError` for a scheme or model that fails or breaks its contract, and
    :class:`DataError` for data that is missing or damaged; and :class:`TrackingError` where MLflow
    refuses the run.
    """
    device = machine.device(config.device)
    machine.check_tf32(device, tf32=config.tf32)
    progress("loading the data, downloaded at its first use", 0, 1)
    with (
        machine.threads(config.threads) as threads,
        machine.tf32(device, allowed=config.tf32),
    ):
        of = _feed_forward if config.model == MLP else own_model.subject
        subject, resolved = of(config, device), machine.Resolved(device, threads)
        return diagnosed(config, subject, resolved, experiment=experiment, progress=progress)


def _feed_forward(config: DiagnoseConfig, device: str) -> Subject:
    found = cache.distinct(config.inits, config.plugins_dir).values()
    schemes = {scheme.spec: scheme for scheme in found}
    cells = [Cell(init, activation) for init in schemes for activation in config.activations]
    splits = datasets.load(config.network(*cells[0]))
    shape = format_shape(datasets.widths(splits.pixels, config.widths, splits.classes))
    on_cpu = measure.probe(splits.train, config.probe)
    probe, given = on_cpu.to(torch.device(device)), Given.of(on_cpu.images)

    def initialized(cell: Cell) -> model.Parameters:
        return model.initialize(
            datasets.widths(splits.pixels, config.widths, splits.classes),
            schemes[cell.init],
            ACTIVATIONS[cell.activation],
            bias_init=config.bias_init,
            seed=config.seed,
            data=splits.train,
        )

    def network(cell: Cell) -> Network:
        scheme, initial = schemes[cell.init], initialized(cell)
        activation = ACTIVATIONS[cell.activation]
        (seen,) = measure.observe(initial.copy_to(device), [activation], probe)
        reading = read(initial, scheme, activation, config.bias_init, seen=seen, given=given)
        params = config.network(*cell).as_text()
        of_jacobian = None
        if config.spectrum:
            of_jacobian = spectrum.read(initial, scheme, activation, config.bias_init, probe.images)
        return Network(reading, params, start_tags(scheme, initial, splits), of_jacobian)

    for cell in cells:  # a scheme that fails, does so before a run is made
        initialized(cell)
    summary = (
        f"{len(cells)} untrained {shape} networks, {', '.join(schemes)} with "
        f"{', '.join(config.activations)}, on {len(probe):,} {splits.are} of {splits.name}; "
        f"seed {config.seed}."
    )
    title = f"untrained {shape} networks on {splits.name}"
    return Subject(title, shape, splits.name, summary, cells, network, splits)

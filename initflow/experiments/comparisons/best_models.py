"""The models of the best network of each cell, logged once all networks are trained."""

from __future__ import annotations

from dataclasses import replace

import torch

from initflow.core import machine
from initflow.core.configurations import TrainConfig
from initflow.core.progress import Progress
from initflow.diagnostics.record import Record, start, train_together
from initflow.errors import WorkError
from initflow.experiments import network_run
from initflow.experiments.failures import noted
from initflow.experiments.populations import best_networks
from initflow.experiments.populations.stacking import Population
from initflow.tracking import runs
from initflow.training import cache, model

TAG = "initflow.best"  # of a network whose model is logged as the best of its cell, by which metric


def log(population: Population, progress: Progress) -> None:
    """Log the model of the best network of each cell that has one, into the network's own run.

    One that an interrupted command has trained is trained once more: its weights were not kept.
    Why a model could not be made is in the ``failures`` of ``population``.
    """
    ranks = {
        at: best_networks.rank(member.config, member.last.get)
        for at, member in enumerate(population.members)
        if member.outcome.diverged_at is None
    }
    for done, cell in enumerate(population.cells):
        of_cell = [
            (its, at) for at, its in ranks.items() if its and population.members[at].cell == cell
        ]
        if not of_cell:
            continue
        progress("logging the best models", done, len(population.cells))
        its, at = max(of_cell)
        member, kept = population.members[at], population.best.get(cell)
        with noted(population.failures, f"model of {network_run.name(cell.init, member.config)}"):
            if kept and kept.rank == its:
                record = _untrained(member.config)
                record.trained, record.step = dict(kept.state), kept.step
            else:
                found = runs.read_run(member.run_id)
                if found and TAG in found.tags:  # by the command that was interrupted
                    continue
                record = _again(member.config, found, population.device)
            run = population.run.same_experiment(member.run_id)
            model_id = network_run.log_model(run, record, cache.splits(member.config))
            run.set_tags({TAG: best_networks.chosen_by(member.config)})
            population.members[at] = replace(member, model_id=model_id)


def _untrained(config: TrainConfig) -> Record:
    return start(config, cache.scheme(config.init, config.plugins_dir), cache.splits(config))


def _again(config: TrainConfig, found: runs.Found | None, device: str) -> Record:
    """It is trained once more, to the weights that the run ``found`` tells of."""
    params = found.params if found else {}
    threads = params.get("resolved.threads", "")
    with machine.threads(int(threads) if threads.isdigit() else None):
        record = _untrained(replace(config, probe=0))
        train_together([record], cache.splits(config).to(torch.device(device)))
    if not found or found.tags.get(network_run.WEIGHTS) != model.weights_sha256(record.trained):
        raise WorkError(
            f"an interrupted command trained it, and trained again on {device} it has other bits"
        )
    return record

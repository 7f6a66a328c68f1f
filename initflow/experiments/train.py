"""One network under one scheme: from the settings to the closed run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from initflow.core import machine
from initflow.core.configurations import TrainConfig
from initflow.core.progress import Progress
from initflow.experiments.command_run import log_setting, log_uncommitted, resolved_params
from initflow.experiments.failures import Failures
from initflow.experiments.network_run import (
    description,
    log_figures,
    log_trained,
    result_tags,
    start_tags,
    summary,
)
from initflow.experiments.record import Record, start, train_together
from initflow.initializers import plugins
from initflow.tracking import runs
from initflow.training import datasets


@dataclass(kw_only=True)
class Result(Record):
    """What came of a training, the run that it is in, and what could not be made of it.

    ``remark`` is a sentence on the data, where there is something odd to say of it.
    """

    run: runs.Run
    remark: str = ""
    failures: Failures = field(default_factory=dict)

    @property
    def run_id(self) -> str:
        return runs.with_ids(self.run.id)


def train(
    config: TrainConfig,
    *,
    experiment: str | None = None,
    progress: Progress = lambda *_: None,
) -> Result:
    """Train one network as ``config`` says, as one MLflow run, and log all that a run carries.

    A wrong setting or missing data is an error of :mod:`initflow.errors`, before a run is
    made. Whatever is raised later, the run is closed with what was measured.
    """
    scheme = plugins.find(config.init, config.plugins_dir)
    device = machine.device(config.device)
    progress("loading the data, downloaded at its first use", 0, 1)
    splits = datasets.load(config)

    with machine.threads(config.threads) as threads:  # around the drawing too: QR depends on them
        record = start(config, scheme, splits)
        resolved = resolved_params(device, threads)
        with runs.start(
            name=f"{scheme.spec} {config.activation} {config.dataset} seed {config.seed}",
            description=summary(record, splits),
            params=config.as_text() | resolved,
            tags=start_tags(record, splits),
            experiment=experiment,
        ) as run:
            result = Result(run=run, remark=splits.remark, **vars(record))
            log_setting(run, config, splits, resolved)
            log_uncommitted(run)
            train_together(
                [result],
                splits.to(torch.device(device)),
                measured=lambda _, step, values: run.log_metrics(step, values),
                progress=progress,
            )
            progress("drawing and logging", 0, 1)
            run.set_tags(result_tags(result))
            run.describe(description(result, splits))
            log_trained(run, result, splits, resolved, result.failures)
            log_figures(run, result, result.failures)
    return result

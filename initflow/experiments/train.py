"""One network under one scheme: from the settings to the closed run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from initflow.core import machine
from initflow.core.configurations import TrainConfig
from initflow.core.progress import Progress
from initflow.diagnostics.record import Record, start, train_together
from initflow.experiments import command_run, network_run
from initflow.experiments.failures import Failures
from initflow.experiments.populations import arrangement
from initflow.experiments.public import public
from initflow.experiments.results import TrackedResult
from initflow.reporting.results import Drawings, by_step
from initflow.tracking import runs
from initflow.training import cache, datasets


@dataclass(kw_only=True, repr=False)
class Training(TrackedResult, Record):
    """What came of :func:`initflow.train`: a network, and all that was measured of it.

    - ``run_id``: that of its run in MLflow.
    - ``config``: its settings, a :class:`TrainConfig`, and ``scheme``, a :class:`Scheme`.
    - ``history``: (step, value) pairs of each metric, by its key; accuracies are fractions, losses
      means in nats, and step 0 is before the first update. ``last(metric)`` is the last value, or
      None.
    - ``losses``: that of each training batch, in nats.
    - ``outcome``: ``finished`` or ``diverged``, at the step ``diverged_at``.
    - ``signals``: (step, quantities by layer) pairs; ``reading`` has those of the untrained network
      beside theory. Without a probe there are none.
    - ``trained``: the weights at the end, by name; ``initial`` is the network as it began.
    - ``seconds``: what training and measuring took.
    """

    config: TrainConfig
    run: runs.Run
    remark: str = ""
    failures: Failures = field(default_factory=dict)

    @property
    def title(self) -> str:
        return network_run.title(self)

    @property
    def conclusions(self) -> Sequence[str]:
        """How it ended, how its signal travelled at the start, and what is odd about the data."""
        verdict = network_run.verdict_sentence(self.reading) if self.reading else ""
        return list(filter(None, [network_run.outcome_sentence(self), verdict, self.remark]))

    def drawings(self) -> Drawings:
        return network_run.drawings(self)

    def numbers(self) -> Iterable[Mapping[str, object]]:
        """A row for each step at which something was logged, with its metrics by key."""
        return by_step(self.history)


@public(TrainConfig)
@cache.cleared_after()
def train(config: TrainConfig, *, experiment: str | None = None, progress: Progress) -> Training:
    """Train one network, as one MLflow run, and log its metrics, figures, hashes and model.

    Returns a :class:`Training`. A training that diverges is a result, too.

    Raises, before a run is made, :class:`SettingError` for a wrong setting, :class:`PluginError`
    for a scheme or model that fails or breaks its contract, and :class:`DataError` for data that is
    missing or damaged; and :class:`TrackingError` where MLflow refuses the run. Whatever is raised
    later, the run is closed with what was measured. A server that does not answer is no error: what
    it should have waits on this machine.
    """
    scheme = cache.scheme(config.init, config.plugins_dir)
    device = machine.device(config.device)
    machine.check_tf32(device, tf32=config.tf32)
    progress("loading the data, downloaded at its first use", 0, 1)
    splits = datasets.load(config)

    chosen = arrangement.threads(config, splits, device)
    with machine.threads(chosen) as threads:  # around the drawing too: QR depends on them
        record = start(config, scheme, splits)
        resolved = machine.Resolved(device, threads)
        with command_run.opened(
            config,
            splits,
            resolved.as_text(),
            name=f"{scheme.spec} {config.kind} {splits.name} seed {config.seed}",
            summary=network_run.summary(record, splits),
            experiment=experiment,
            tags=network_run.start_tags(scheme, record.initial, splits),
        ) as run:
            remark = network_run.remark(record.initial, splits)
            result = Training(run=run, remark=remark, **vars(record))
            train_together(
                [result],
                splits.to(torch.device(device)),
                on_measured=lambda _, step, values: run.log_metrics(step, values),
                progress=progress,
            )
            progress("drawing and logging", 0, 1)
            run.set_tags(network_run.result_tags(result))
            run.describe(network_run.description(result, splits))
            network_run.log_trained(run, result, splits, resolved, result.failures)
            result.log_figures()
    return result

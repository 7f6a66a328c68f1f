"""An interrupted command gone on with: networks that are trained and logged are not trained again.

A run of many networks is tagged with a digest of all that their numbers follow from. The next one
with the same digest takes over, as its own, those networks' runs below one that did not finish.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

import initflow
from initflow.core import environment
from initflow.core.configurations import TrainConfig
from initflow.core.settings import Settings
from initflow.diagnostics.reading import untrained_signals
from initflow.diagnostics.signals import Signals
from initflow.errors import TrackingError
from initflow.experiments.replay.provenance import source_sha256
from initflow.tracking import runs
from initflow.tracking.runs import Found
from initflow.training import cache
from initflow.training.splits import Splits

CURVE = "accuracy/test"
LARGEST = 1 << 26  # bytes of a table of signals
RESUMED_BY = "initflow.resumed_by"  # a tag: the digest, or the run that has taken over
# How the work is shared out: of another number of threads only the last bits are others.
BESIDE = ("workers", "backend", "stack", "threads", "device")


def tag(
    command: str,
    settings: Settings,
    configs: Sequence[TrainConfig],
    splits: Splits,
    device: str,
) -> dict[str, object]:
    """The tag of a run of ``command`` on ``device``, by which an interrupted one is found."""
    schemes = [cache.scheme(config.init, config.plugins_dir) for config in configs]
    values = {
        "command": command,
        "settings": {k: v for k, v in settings.as_text().items() if k not in BESIDE},
        "data": splits.digest,
        "schemes": sorted({(s.spec, s.provider, source_sha256(s.signature)) for s in schemes}),
        "initflow": [initflow.__version__, environment.source_sha256()],
        "torch": [torch.__version__, device],
    }
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return {RESUMED_BY: digest}


@dataclass(frozen=True)
class Left:
    """A network that an earlier command has trained: its run, and what a comparison shows of it.

    ``curve`` is its accuracy on the test images, as (step, value); ``signals`` are those of the
    untrained network, None where none were measured.
    """

    run: Found
    curve: Sequence[tuple[int, float]]
    signals: Signals | None


def taken_over(
    run: runs.Run, tags: Mapping[str, object], configs: Sequence[TrainConfig]
) -> dict[TrainConfig, Left]:
    """The finished networks of ``configs`` that earlier runs with these ``tags`` left.

    From now on they are below ``run``. Nothing where MLflow does not answer; a network whose run
    is not whole is left where it is.
    """
    by_params = {_told(config.as_text()): config for config in configs}
    found: dict[TrainConfig, Left] = {}
    with contextlib.suppress(TrackingError):
        for earlier in run.found(tags):
            if earlier.status not in ("KILLED", "FAILED"):
                continue  # whole, or of a process that lives
            for network in run.found({runs.PARENT: earlier.id}):
                config = by_params.get(_told(network.params))
                if not config or config in found or network.status != "FINISHED":
                    continue
                if left := _read(network, config):
                    run.take_over(network)
                    found[config] = left
            run.same_experiment(earlier.id).set_tags({RESUMED_BY: runs.with_ids(run.id)})
    return found


def _read(network: Found, config: TrainConfig) -> Left | None:
    """What is to be known of it; None where that is not all there."""
    curve = runs.read_history(network.id, [CURVE]).get(CURVE, [])
    if not config.probe:
        return Left(network, curve, None)
    content = runs.read_artifact(network.id, "signals.json", LARGEST)
    try:
        return Left(network, curve, untrained_signals(content)) if content else None
    except ValueError:
        return None


def _told(params: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    """All that a network's configuration was given as, but for how the work is shared out."""
    return frozenset(
        (name, value)
        for name, value in params.items()
        if name not in BESIDE and not name.startswith("resolved.")
    )

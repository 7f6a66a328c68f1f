"""An interrupted command gone on with: networks that are trained and logged are not trained again.

A run of many networks is tagged with a digest of all that their numbers follow from. The next one
with the same digest takes over, as its own, those networks' runs below one that did not finish.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence

import torch

import initflow
from initflow.core import environment
from initflow.core.configurations import TrainConfig
from initflow.core.settings import Settings
from initflow.diagnostics.reading import untrained_signals
from initflow.diagnostics.signals import Signals
from initflow.errors import OutageError, TrackingError
from initflow.experiments import network_run
from initflow.experiments.populations.members import Member, Trained, kept_signals, told_metrics
from initflow.experiments.replay.provenance import source_sha256
from initflow.reporting.seed_statistics import Cell, Outcome
from initflow.tracking import runs
from initflow.tracking.runs import Found
from initflow.training import cache
from initflow.training.splits import Splits

CURVE = "accuracy/test"
LARGEST = 1 << 26  # bytes of a table of signals
AT_ONCE = 100  # runs that are asked for at once, with all their metrics
OUTAGES = 3  # in which MLflow does not answer, after which it is asked no more
RESUMED_BY = "initflow.resumed_by"  # a tag: the digest, or the run that has taken over
CLAIM = "initflow.claimed_by."  # a tag: of a run whose networks are being taken over, by whom
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


def taken_over(
    run: runs.Run, tags: Mapping[str, object], cells: Mapping[TrainConfig, Cell], tested: int
) -> Trained:
    """The finished networks of these configurations that earlier runs with the ``tags`` left.

    Each belongs to its cell and was ``tested`` on so many images; from now on it is below ``run``.
    Nothing where MLflow does not answer; a network whose run is not whole, or cannot be read, is
    left where it is, and so is what another command is taking over.
    """
    taken = Trained()
    with contextlib.suppress(TrackingError):
        for earlier in run.found(tags):
            # Else it is whole, or of a process that lives.
            if earlier.status in ("KILLED", "FAILED") and _claims(run, earlier):
                there = {member.config for member in taken.members}
                rest = {config: cell for config, cell in cells.items() if config not in there}
                its = _Reading(rest, tested)
                its.read(run, earlier)
                taken.members += _moved(run, its.whole.members)
                taken.metrics |= its.whole.metrics
                if not its.is_cut_short:
                    run.same_experiment(earlier.id).set_tags({RESUMED_BY: runs.with_ids(run.id)})
    return taken


def _claims(run: runs.Run, earlier: Found) -> bool:
    """Whether ``run`` is the only one that is taking over what is below an ``earlier`` one.

    Who comes second sees the tag of who came first. Of two at the same moment each sees the
    other's, and both train anew what they could have had.
    """
    own = runs.with_ids(run.id)
    run.same_experiment(earlier.id).set_tags({CLAIM + own: "true"})
    seen = runs.read_run(earlier.id)
    claims = [key.removeprefix(CLAIM) for key in (seen.tags if seen else ()) if CLAIM in key]
    others = [runs.read_run(claim) for claim in claims if claim != own]
    return not any(other and other.status == "RUNNING" for other in others)


def _moved(run: runs.Run, members: Sequence[Member]) -> list[Member]:
    """Those whose runs are below ``run`` from now on: all but what is gone by now."""
    moved: list[Member] = []
    for at in range(0, len(members), AT_ONCE):
        together = members[at : at + AT_ONCE]
        for some in (together, *([one] for one in together)):
            try:
                run.take_over([member.run_id for member in some])
            except OutageError:
                raise
            except TrackingError:  # of one of them
                continue
            moved += some
            if some is together:
                break
    return moved


class _Reading:
    """What is ``whole`` below an earlier run, of the networks in ``cells``.

    It ``is_cut_short`` where MLflow did not answer in between.
    """

    def __init__(self, cells: Mapping[TrainConfig, Cell], tested: int) -> None:
        self.whole = Trained()
        self.is_cut_short = False
        self._cells = cells
        self._tested = tested

    def read(self, run: runs.Run, earlier: Found) -> None:
        by_params = {_told(config.as_text()): config for config in self._cells}
        there: dict[TrainConfig, Found] = {}
        for network in run.each_found({runs.PARENT: earlier.id}, at_once=AT_ONCE):
            config = by_params.get(_told(network.params))
            if config and network.status == "FINISHED":
                self.whole.metrics |= network.metrics.keys()
                there.setdefault(config, _slim(network))
        curves = runs.read_histories([network.id for network in there.values()], CURVE)
        outages = 0
        for config, network in there.items():
            try:
                signals = _signals(network) if config.probe else None
            except OutageError:
                outages += 1
                self.is_cut_short = True
                if outages == OUTAGES:
                    return
                continue
            is_read = network.id in curves or CURVE not in network.metrics
            if is_read and (signals or not config.probe):
                curve = curves.get(network.id, [])
                with contextlib.suppress(ValueError):  # of a tag that is no number
                    self.whole.members.append(self._member(config, network, curve, signals))

    def _member(
        self,
        config: TrainConfig,
        network: Found,
        curve: Sequence[tuple[int, float]],
        signals: Signals | None,
    ) -> Member:
        diverged_at = network.tags.get(network_run.DIVERGED_AT)
        outcome = Outcome(
            config.seed, curve, None if diverged_at is None else int(diverged_at), self._tested
        )
        return Member(
            config,
            self._cells[config],
            network.id,
            None,
            outcome,
            signals and kept_signals(signals),
            network.metrics,
            network.tags.get(network_run.IS_EXACT) == "true",
        )


def _slim(network: Found) -> Found:
    """What is needed of it, as there may be thousands."""
    return network._replace(
        tags={
            key: network.tags[key]
            for key in (network_run.DIVERGED_AT, network_run.IS_EXACT)
            if key in network.tags
        },
        params={},
        metrics=told_metrics(network.metrics),
    )


def _signals(network: Found) -> Signals | None:
    """Those of the untrained network; None where they cannot be read, for good."""
    try:
        content = runs.read_file(network, "signals.json", LARGEST)
        return untrained_signals(content) if content else None
    except OutageError:
        raise
    except (TrackingError, ValueError):
        return None


def _told(params: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    """All that a network's configuration was given as, but for how the work is shared out."""
    return frozenset(
        (name, value)
        for name, value in params.items()
        if name not in BESIDE and not name.startswith("resolved.")
    )

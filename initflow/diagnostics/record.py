"""Networks while they train, and all that is measured of each; MLflow is not known here."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from initflow.core import machine
from initflow.core.configurations import MLP, TrainConfig
from initflow.core.progress import Progress, silent
from initflow.diagnostics import measure, networks
from initflow.diagnostics.measure import Evaluation
from initflow.diagnostics.networks import Networks, Untrained
from initflow.diagnostics.reading import Reading
from initflow.diagnostics.signals import Signals
from initflow.initializers.activations import ACTIVATIONS, Activation
from initflow.initializers.scheme import Scheme
from initflow.training import model, trainer
from initflow.training.modules import ModuleNetwork
from initflow.training.splits import Split, Splits

PEAK = 5  # successive updates, whose mean loss is compared with that of others
TRAIN = "train"
TRAINED = 1_000  # training images, at most, on which the accuracy is measured
History = dict[str, list[tuple[int, float]]]
OnMeasured = Callable[["Record", int, Mapping[str, float]], None]
ShouldStop = Callable[["Record", int, Mapping[str, float]], bool]


@dataclass(kw_only=True)
class Record:
    """One network: how it starts, and what came of its training, which fills in the rest.

    ``history`` maps metric keys to (step, value) pairs. ``losses`` are those of every training
    batch, in nats; ``step`` counts the updates made. ``diverged_at`` is the step whose loss was
    not finite, None for a finished training; ``stopped_at`` the step at which it was given up,
    None where it was not. ``seconds`` is the time that training and measuring
    took, of a stack its share. ``signals`` are those of each step at which the network was
    evaluated, and ``received`` is what each hidden layer's activation function received at the
    last, (n, units); ``reading`` is that of the untrained network. Without a probe there are
    none. ``is_exact`` says whether the numbers are, bit for bit, those of the network alone.
    """

    config: TrainConfig
    scheme: Scheme
    initial: Untrained
    history: History = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    step: int = 0
    diverged_at: int | None = None
    stopped_at: int | None = None
    seconds: float = 0.0
    signals: list[tuple[int, Signals]] = field(default_factory=list)
    received: Sequence[torch.Tensor] = ()
    reading: Reading | None = None
    trained: dict[str, torch.Tensor] = field(default_factory=dict)
    is_exact: bool = True

    @property
    def activation(self) -> Activation:
        return ACTIVATIONS[self.config.activation]

    @property
    def outcome(self) -> str:
        """What became of the training: finished, diverged or pruned."""
        if self.diverged_at is not None:
            return "diverged"
        return "finished" if self.stopped_at is None else "pruned"

    def last(self, metric: str) -> float | None:
        """The metric's last value, or None where none was measured."""
        points = self.history.get(metric)
        return points[-1][1] if points else None

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.history.setdefault(key, []).append((step, value))


def start(config: TrainConfig, scheme: Scheme, splits: Splits) -> Record:
    """The untrained network of ``config``, initialized by ``scheme``."""
    initial = networks.initialize(config, scheme, splits)
    return Record(config=config, scheme=scheme, initial=initial)


def train_together(
    records: Sequence[Record],
    splits: Splits,
    *,
    on_measured: OnMeasured = lambda *_: None,
    should_stop: ShouldStop = lambda *_: False,
    progress: Progress = silent,
) -> None:
    """Train the networks of ``records`` to the end, on the device of ``splits``.

    Feed-forward networks train as one stack: they differ in scheme, seed, learning rate, gamma,
    momentum or activation only, and neighbours of one seed share their batches. Others train one
    after the other. What is measured of one at a step is in its record before ``on_measured`` is
    called; a network that is still running and that ``should_stop`` says true of then trains no
    further. Whatever is raised, the records hold what was measured until then. On CUDA, TF32 is
    used where the setting says so and nowhere else, whatever the process has set.
    """
    config = records[0].config
    together = [_in_order(records, splits)] if config.model == MLP else [[one] for one in records]
    updates = trainer.iterations(config, len(splits.train))

    def told() -> None:
        done = sum(record.step for record in records)
        progress("training", done, updates * len(records))

    with machine.tf32(str(splits.train.images.device), allowed=config.tf32):
        for some in together:
            _train(some, splits, on_measured, should_stop, told)


def _in_order(records: Sequence[Record], splits: Splits) -> list[Record]:
    """As they come; where launches count, those of one activation function side by side."""
    if machine.is_launch_bound(splits.train.images.device):
        return sorted(records, key=lambda record: record.config.activation)
    return list(records)


def _train(
    records: Sequence[Record],
    splits: Splits,
    on_measured: OnMeasured,
    should_stop: ShouldStop,
    told: Callable[[], None],
) -> None:
    config = records[0].config
    probe = measure.probe(splits.train, config.probe) if config.probe else None
    training = _networks(records, splits.train)
    running = training.trainer.running
    exact = training.trainer.exact(config.batch_size)
    for member, record in enumerate(records):
        record.is_exact = exact[member]
    for member, reading in training.read(probe) if probe else ():
        record = records[member]
        record.reading, predicted = reading, reading.metrics()
        record.add(0, predicted)
        on_measured(record, 0, predicted)
    over = _evaluated_over(splits)
    updates = trainer.iterations(config, len(splits.train))
    lap = time.perf_counter()
    first_losses = training.first_losses()
    for checkpoint in training.trainer.train(
        batch_size=config.batch_size, eval_every=config.eval_every, updates=config.updates
    ):
        logging = 0.0
        for member, seen in _seen(records, training, checkpoint, over, probe):
            record = records[member]
            values = _measure(record, checkpoint, member, seen, first_losses[member])
            if record.diverged_at is not None and member in running:
                training.trainer.stop(member)
            record.add(checkpoint.step, values)
            paused = time.perf_counter()
            on_measured(record, checkpoint.step, values)
            undecided = member in running and checkpoint.step < updates
            if undecided and should_stop(record, checkpoint.step, values):
                training.trainer.stop(member)
                record.stopped_at = checkpoint.step
            logging += time.perf_counter() - paused
        told()
        now = time.perf_counter()
        for record in records:
            record.seconds += (now - lap - logging) / len(records)
        lap = now
    for record, state in zip(records, training.states(), strict=True):
        record.trained = dict(state)


def _networks(records: Sequence[Record], data: Split) -> Networks:
    configs, schemes = [r.config for r in records], [r.scheme for r in records]
    starts = [record.initial for record in records]
    first = starts[0]
    if isinstance(first, ModuleNetwork):
        return networks.OneModule(first, configs[0], schemes[0], data)
    stack = [start for start in starts if isinstance(start, model.Parameters)]
    return networks.Stack(stack, configs, schemes, data)


@dataclass(frozen=True)
class _Seen:
    """One network at a checkpoint: its ``evaluations`` by the names of :func:`_evaluated_over`.

    Without a probe there are no ``signals``.
    """

    evaluations: Mapping[str, Evaluation]
    signals: Signals | None
    preactivations: Sequence[torch.Tensor]


def _seen(
    records: Sequence[Record],
    training: Networks,
    checkpoint: trainer.Checkpoint,
    over: Mapping[str, Split],
    probe: Split | None,
) -> Iterator[tuple[int, _Seen]]:
    """Those of ``checkpoint`` by their place, each with its signals measured when it is asked for.

    They are evaluated ``over`` what is given by name. ``probe`` are the images for the signals;
    an untrained network has been read on them.
    """
    members = list(checkpoint.rates)
    observed = training.observe(members, probe) if probe and checkpoint.step else None
    evaluated = training.evaluate(members, {} if checkpoint.diverged else over)
    for member, evaluations in evaluated.items():
        found = next(observed) if observed else records[member].reading
        signals, received = (found.signals, found.preactivations) if found else (None, ())
        yield member, _Seen(evaluations, signals, received)


def _measure(
    record: Record, checkpoint: trainer.Checkpoint, member: int, seen: _Seen, first_loss: float
) -> dict[str, float]:
    """What there is to say of one network at a checkpoint, finite values only.

    ``first_loss`` is that of the untrained network over its first batch.
    """
    record.step = step = checkpoint.step
    values = {} if checkpoint.diverged else {"lr": checkpoint.rates[member]}
    for name, found in seen.evaluations.items():
        if name == TRAIN:  # of its loss, that over the batches is told
            values[f"accuracy/{name}"] = found.accuracy if math.isfinite(found.loss) else math.nan
        else:
            values |= {f"loss/{name}": found.loss, f"accuracy/{name}": found.accuracy}
    recent = checkpoint.losses[member]
    if recent:
        values["loss/train"] = statistics.fmean(recent)
        values["loss/peak"] = _peak(record, recent)
        record.losses += recent
    elif step == 0:  # no batch was trained on yet
        values["loss/train"] = values["loss/peak"] = first_loss
    if seen.signals:
        if not record.signals or record.signals[-1][0] != step:  # it may diverge where it was seen
            record.signals.append((step, seen.signals))
        record.received = seen.preactivations[:-1]
        values |= seen.signals.metrics()
    # An accuracy beside a loss that is not finite means nothing.
    lost = {key.partition("/")[2] for key, value in values.items() if not math.isfinite(value)}
    if checkpoint.diverged or lost:
        record.diverged_at = step
    meaningless = {f"accuracy/{split}" for split in lost}
    return {k: v for k, v in values.items() if math.isfinite(v) and k not in meaningless}


def _peak(record: Record, recent: Sequence[float]) -> float:
    """The highest mean over :data:`PEAK` successive updates so far; of fewer, their mean.

    ``recent`` are the losses since those of ``record``.
    """
    latest = [*record.losses[-PEAK + 1 :], *recent]
    means = [statistics.fmean(latest[at : at + PEAK]) for at in range(len(latest) - PEAK + 1)]
    before = record.last("loss/peak") if len(record.losses) >= PEAK else None
    return max([*means, *([] if before is None else [before])], default=statistics.fmean(latest))


def _evaluated_over(splits: Splits) -> dict[str, Split]:
    """The images that are not trained on and, as ``train``, a sample of those that are."""
    sample = measure.probe(splits.train, TRAINED)
    over = {"validation": splits.validation, "test": splits.test, TRAIN: sample}
    return {name: split for name, split in over.items() if split}

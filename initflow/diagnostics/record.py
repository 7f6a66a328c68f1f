"""Networks while they train, and all that is measured of each; MLflow is not known here."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from initflow.core.configurations import TrainConfig
from initflow.core.progress import Progress, silent
from initflow.diagnostics import measure
from initflow.diagnostics.reading import Reading, read
from initflow.diagnostics.signals import Signals
from initflow.initializers.activations import ACTIVATIONS, Activation
from initflow.initializers.scheme import Scheme
from initflow.training import datasets, model, trainer
from initflow.training.splits import Split, Splits

History = dict[str, list[tuple[int, float]]]


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
    initial: model.Parameters
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
    initial = model.initialize(
        datasets.widths(splits.pixels, config.hidden, splits.classes),
        scheme,
        ACTIVATIONS[config.activation],
        bias_init=config.bias_init,
        seed=config.seed,
        data=splits.train,
    )
    return Record(config=config, scheme=scheme, initial=initial)


def train_together(
    records: Sequence[Record],
    splits: Splits,
    *,
    on_measured: Callable[[Record, int, Mapping[str, float]], None] = lambda *_: None,
    should_stop: Callable[[Record, int, Mapping[str, float]], bool] = lambda *_: False,
    progress: Progress = silent,
) -> None:
    """Train the networks of ``records`` to the end as one stack, on the device of ``splits``.

    They differ in scheme, seed, learning rate, gamma, momentum or activation only; neighbours of
    one seed share their batches. What is measured of one at a step is in its record before
    ``on_measured`` is called; a network that is still running and that ``should_stop`` says true of
    then trains no further. Whatever is raised, the records hold what was measured until then.
    """
    config = records[0].config
    device = splits.train.images.device
    stack = model.Parameters.stack([record.initial for record in records], str(device))
    probe = measure.probe(splits.train, config.probe) if config.probe else None
    training = trainer.Trainer(
        stack, [trainer.Recipe.of(record.config) for record in records], splits.train
    )
    exact = training.exact(config.batch_size)
    for member, record in enumerate(records):
        record.is_exact = exact[member]
        if probe:
            one, activation = stack.member(member), record.activation
            record.reading = read(one, record.scheme, activation, config.bias_init, probe)
            predicted = record.reading.metrics()
            record.add(0, predicted)
            on_measured(record, 0, predicted)
    updates = trainer.iterations(len(splits.train), config.batch_size, config.epochs)
    lap = time.perf_counter()
    for checkpoint in training.train(batch_size=config.batch_size, eval_every=config.eval_every):
        logging = 0.0
        for member in checkpoint.rates:
            record = records[member]
            values = _measure(
                record, stack.member(member), checkpoint, member, splits=splits, probe=probe
            )
            if record.diverged_at is not None and member in training.running:
                training.stop(member)
            record.add(checkpoint.step, values)
            paused = time.perf_counter()
            on_measured(record, checkpoint.step, values)
            undecided = member in training.running and checkpoint.step < updates
            if undecided and should_stop(record, checkpoint.step, values):
                training.stop(member)
                record.stopped_at = checkpoint.step
            logging += time.perf_counter() - paused
        done = sum(record.step for record in records)
        progress("training", done, updates * len(records))
        now = time.perf_counter()
        for record in records:
            record.seconds += (now - lap - logging) / len(records)
        lap = now
    for member, record in enumerate(records):
        record.trained = stack.member(member).copy_to("cpu").state()


def _measure(
    record: Record,
    parameters: model.Parameters,
    checkpoint: trainer.Checkpoint,
    member: int,
    *,
    splits: Splits,
    probe: Split | None,
) -> dict[str, float]:
    """What there is to say of one network at a checkpoint, finite values only."""
    activation, step = record.activation, checkpoint.step
    record.step = step
    values: dict[str, float] = {}
    if not checkpoint.diverged:
        values = {"lr": checkpoint.rates[member], **_evaluations(parameters, activation, splits)}
    recent = checkpoint.losses[member]
    if recent:
        values["loss/train"] = statistics.fmean(recent)
        record.losses += recent
    elif step == 0:  # no batch was trained on yet: the first one, untrained
        order = trainer.batch_order(len(splits.train), record.config.seed, 0)
        first = splits.train.take(order[: record.config.batch_size])
        values["loss/train"] = measure.evaluate(parameters, activation, first)[0].loss
    if probe:
        untrained = record.reading if step == 0 else None  # which has been observed
        seen = untrained or measure.observe(parameters, activation, probe)[0]
        if not record.signals or record.signals[-1][0] != step:  # it may diverge where it was seen
            record.signals.append((step, seen.signals))
        record.received = seen.preactivations[:-1]
        values |= seen.signals.metrics()
    # An accuracy beside a loss that is not finite means nothing.
    lost = {key.partition("/")[2] for key, value in values.items() if not math.isfinite(value)}
    if checkpoint.diverged or lost:
        record.diverged_at = step
    return {key: v for key, v in values.items() if key.partition("/")[2] not in lost}


def _evaluations(
    parameters: model.Parameters, activation: Activation, splits: Splits
) -> dict[str, float]:
    """Loss and accuracy over the images that are not trained on, by metric key."""
    values = {}
    for name, split in (("validation", splits.validation), ("test", splits.test)):
        if split:
            evaluation = measure.evaluate(parameters, activation, split)[0]
            values[f"loss/{name}"] = evaluation.loss
            values[f"accuracy/{name}"] = evaluation.accuracy
    return values

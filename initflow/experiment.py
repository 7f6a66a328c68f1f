"""One network, one scheme, one tracked run: everything from the settings to the closed run."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

import initflow
from initflow import data, figures, machine, measure, model, plugins, track, train
from initflow.activations import ACTIVATIONS, Activation
from initflow.config import TrainConfig, format_shape
from initflow.reading import Reading, as_json, read
from initflow.scheme import Scheme
from initflow.signals import Signals
from initflow.verdict import Verdict

# Told what is being done, and how much of it: (what, done, of).
Progress = Callable[[str, int, int], None]
History = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Result:
    """What came of a run; ``history`` maps metric keys to (step, value) pairs.

    ``losses`` are those of every training batch, in nats; ``step`` counts the updates made.
    ``diverged_at`` is the step whose loss was not finite, None for a finished training.
    ``seconds`` is the time that training and evaluating took, without what MLflow took to log
    it. ``signals`` are those of each step at which the network was evaluated, and ``received``
    is what each hidden layer's activation function received at the last, (n, units);
    ``reading`` is that of the untrained network. Without a probe there are none.
    """

    config: TrainConfig
    scheme: Scheme
    run: track.Run
    history: History
    losses: list[float]
    step: int
    diverged_at: int | None
    seconds: float
    signals: Sequence[tuple[int, Signals]]
    received: Sequence[torch.Tensor]
    reading: Reading | None = None

    @property
    def run_id(self) -> str:
        return self.run.id

    def last(self, metric: str) -> float | None:
        """The metric's last value, or None where none was measured."""
        points = self.history.get(metric)
        return points[-1][1] if points else None


def train_one(
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
    activation = ACTIVATIONS[config.activation]
    device = machine.device(config.device)
    progress("loading the data, downloaded at its first use", 0, 1)
    splits = data.load(config)
    widths = (splits.pixels, *config.hidden, data.CLASSES)
    summary = _summary(config, scheme, widths, len(splits.train))

    with machine.threads(config.threads) as threads:  # around the drawing too: QR depends on them
        initial = model.initialize(
            widths,
            scheme,
            activation,
            bias_init=config.bias_init,
            seed=config.seed,
            data=splits.train,
        )
        resolved = {"resolved.device": device, "resolved.threads": str(threads)}
        tracked = track.start(
            name=f"{scheme.spec} {config.activation} {config.dataset} seed {config.seed}",
            description=summary,
            params=config.as_text() | resolved,
            tags={
                "initflow.version": initflow.__version__,
                "initflow.scheme": scheme.spec,
                "initflow.provider": scheme.provider,
                "initflow.initial_weights_sha256": model.weights_sha256(initial.state()),
            },
            experiment=experiment,
        )
        with tracked as run:
            # Params may hold MLflow's own spelling of what it was given; this is ours.
            run.log_json("config", config.as_text() | resolved)
            run.log_data(splits)
            parameters = initial.copy_to(device)
            on_device = splits.to(torch.device(device))
            probe = measure.probe(on_device.train, config.probe) if config.probe else None
            reading = None
            if probe:
                reading = read(parameters, scheme, activation, config.bias_init, probe)
                run.log_metrics(0, reading.metrics())
                run.set_tags(verdict_tags(reading.verdict))
                summary = f"{summary} {verdict_sentence(reading)}"
            result = _train_and_measure(
                config, scheme, parameters, on_device, probe=probe, run=run, progress=progress
            )
            progress("drawing and logging", 0, 1)
            trained = parameters.copy_to("cpu").state()
            run.set_tags(
                {
                    "initflow.weights_sha256": model.weights_sha256(trained),
                    **_outcome_tags(result),
                }
            )
            run.describe(f"{summary} {outcome_sentence(result)}")
            if config.log_model and result.diverged_at is None:
                module = model.to_module(trained, activation, mean=splits.mean, std=splits.std)
                run.log_model(module, splits.pixels)
            title = f"{scheme.spec}, {config.activation}, {format_shape(widths)}, {config.dataset}"
            curves = figures.learning_curves(result.history, result.losses, title)
            histograms = figures.weight_histograms(initial.state(), trained, title)
            run.log_figure("learning_curves", curves)
            run.log_figure("weight_histograms", histograms)
            if reading:
                _log_signals(run, reading, result, title)
    return replace(result, reading=reading)


def _train_and_measure(
    config: TrainConfig,
    scheme: Scheme,
    parameters: model.Parameters,
    splits: data.Splits,
    *,
    probe: data.Split | None,
    run: track.Run,
    progress: Progress,
) -> Result:
    """Train ``parameters`` to the end, logging one batch of metrics at each checkpoint."""
    activation = ACTIVATIONS[config.activation]
    total = train.iterations(len(splits.train), config.batch_size, config.epochs)
    history: History = defaultdict(list)
    losses: list[float] = []
    signals: list[tuple[int, Signals]] = []
    received: Sequence[torch.Tensor] = ()
    step, diverged_at, seconds = 0, None, 0.0
    started = time.perf_counter()

    def order(epoch: int) -> torch.Tensor:
        return train.batch_order(len(splits.train), config.seed, epoch)

    for checkpoint in train.train(
        parameters,
        activation,
        splits.train,
        order=order,
        rates=train.learning_rates(config.lr, config.gamma, config.epochs),
        batch_size=config.batch_size,
        momentum=config.momentum,
        nesterov=config.nesterov,
        eval_every=config.eval_every,
    ):
        step = checkpoint.step
        values = {}
        if not checkpoint.diverged:
            values = {"lr": checkpoint.lr, **_evaluations(parameters, activation, splits)}
        if checkpoint.losses:
            recent = [loss for (loss,) in checkpoint.losses]
            values["loss/train"] = statistics.fmean(recent)
            losses += recent
        elif step == 0:  # no batch was trained on yet: the first one, untrained
            first = splits.train.take(order(0)[: config.batch_size])
            values["loss/train"] = measure.evaluate(parameters, activation, first)[0].loss
        if probe:
            (seen,) = measure.observe(parameters, activation, probe)
            signals.append((step, seen.signals))
            received = seen.preactivations[:-1]
            values |= seen.signals.metrics()
        # An accuracy beside a loss that is not finite means nothing.
        lost = {key.partition("/")[2] for key, value in values.items() if not math.isfinite(value)}
        values = {key: v for key, v in values.items() if key.partition("/")[2] not in lost}
        if checkpoint.diverged or lost:
            diverged_at = step
        for key, value in values.items():
            history[key].append((step, value))
        seconds += time.perf_counter() - started
        run.log_metrics(step, values)
        progress("training", step, total)
        if diverged_at is not None:
            break
        started = time.perf_counter()
    return Result(
        config,
        scheme,
        run,
        dict(history),
        losses,
        step,
        diverged_at,
        seconds,
        signals,
        received,
    )


def _log_signals(run: track.Run, reading: Reading, result: Result, title: str) -> None:
    activation = ACTIVATIONS[result.config.activation]
    run.log_json("signals", as_json(reading, result.signals))
    run.log_figure(
        "predicted_and_measured",
        figures.predicted_and_measured(reading.predicted, reading.signals, title),
    )
    run.log_figure("signals", figures.signals_over_training(result.signals, title))
    if result.config.hidden:
        before = reading.preactivations[:-1]
        run.log_figure("received", figures.received(activation, before, result.received, title))


def _evaluations(
    parameters: model.Parameters, activation: Activation, splits: data.Splits
) -> dict[str, float]:
    """Loss and accuracy over the images that are not trained on, by metric key."""
    values = {}
    for name, split in (("validation", splits.validation), ("test", splits.test)):
        if split is not None:
            evaluation = measure.evaluate(parameters, activation, split)[0]
            values[f"loss/{name}"] = evaluation.loss
            values[f"accuracy/{name}"] = evaluation.accuracy
    return values


def _summary(config: TrainConfig, scheme: Scheme, widths: tuple[int, ...], images: int) -> str:
    """The settings as a sentence."""
    momentum = f", {'Nesterov ' if config.nesterov else ''}momentum {config.momentum:g}"
    return (
        f"A {format_shape(widths)} network with {config.activation}, initialized by "
        f"**{scheme.spec}**, on {images:,} images of {config.dataset}: {config.epochs} epochs of "
        f"batches of "
        f"{config.batch_size}, SGD with lr {config.lr:g}, gamma {config.gamma:g}"
        f"{momentum if config.momentum else ''}; seed {config.seed}."
    )


def verdict_tags(verdict: Verdict) -> dict[str, object]:
    return {
        "initflow.verdict.forward": verdict.forward,
        "initflow.verdict.backward": verdict.backward,
    }


def verdict_sentence(reading: Reading) -> str:
    """How the signal travels through the untrained network, and what to try instead."""
    return f"Untrained, its signal is {reading.verdict}. {reading.advice}".rstrip()


def _outcome_tags(result: Result) -> dict[str, object]:
    if result.diverged_at is None:
        return {"initflow.outcome": "finished"}
    return {"initflow.outcome": "diverged", "initflow.diverged_at_step": result.diverged_at}


def outcome_sentence(result: Result) -> str:
    """What came of the run, in a sentence."""
    if result.diverged_at is not None:
        return f"It diverged: the loss was not finite at iteration {result.diverged_at:,}."
    accuracy = f"{result.last('accuracy/test'):.2%}"  # measured, since no loss diverged
    return f"It ended at {accuracy} test accuracy after {result.step:,} iterations."

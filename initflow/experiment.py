"""One network, one scheme, one tracked run: everything from the settings to the closed run."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import initflow
from initflow import data, figures, initializers, measure, model, track, train
from initflow.activations import ACTIVATIONS
from initflow.config import TrainConfig, format_widths
from initflow.errors import SettingError
from initflow.scheme import Scheme

# Told what is being done, and how much of it: (what, done, of).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Result:
    """What came of a run; ``history`` maps metric keys to (step, value) pairs.

    ``diverged_at`` is the step whose loss was not finite, None for a finished training.
    ``seconds`` is the time that training and evaluating took.
    """

    config: TrainConfig
    scheme: Scheme
    run_id: str
    experiment_id: str
    step: int
    diverged_at: int | None
    seconds: float
    history: dict[str, list[tuple[int, float]]]

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

    A wrong setting or missing data is an error before a run is made. Raises the errors of
    :mod:`initflow.errors`; whatever is raised, the run is closed with what was measured.
    """
    scheme = initializers.find(config.init)
    activation = ACTIVATIONS[config.activation]
    device = _device(config.device)
    progress("loading the data, downloaded at its first use", 0, 1)
    splits = data.load(config)
    widths = (splits.pixels, *config.hidden, data.CLASSES)
    initial = model.initialize(widths, scheme, bias_init=config.bias_init, seed=config.seed)
    total = train.iterations(len(splits.train), config.batch_size, config.epochs)
    summary = _summary(config, scheme, widths, len(splits.train))

    with _threads(config.threads) as threads:
        run_context = track.start(
            name=f"{scheme.spec} {config.activation} {config.dataset} seed {config.seed}",
            description=summary,
            params=config.as_text() | {"resolved.device": device, "resolved.threads": str(threads)},
            tags={
                "initflow.version": initflow.__version__,
                "initflow.scheme": scheme.spec,
                "initflow.provider": scheme.provider,
                "initflow.initial_weights_sha256": model.weights_sha256(initial.state()),
            },
            experiment=experiment,
        )
        with run_context as run:
            run.log_data(splits)
            parameters = initial.copy_to(device)
            history, step, diverged_at, seconds = _train_and_measure(
                run=run,
                config=config,
                parameters=parameters,
                splits=splits.to(torch.device(device)),
                total=total,
                progress=progress,
            )
            progress("drawing and logging", 0, 1)
            trained = parameters.copy_to("cpu").state()
            title = f"{scheme.spec}, {config.activation}, {_shape(widths)}, {config.dataset}"
            run.log_figure("learning_curves", figures.learning_curves(history, title))
            run.log_figure(
                "weight_histograms", figures.weight_histograms(initial.state(), trained, title)
            )
            run.set_tags({"initflow.weights_sha256": model.weights_sha256(trained)})
            if diverged_at is None:
                run.set_tags({"initflow.outcome": "finished"})
                if config.log_model:
                    module = model.to_module(trained, activation, mean=splits.mean, std=splits.std)
                    run.log_model(module, splits.pixels)
            else:
                run.set_tags(
                    {"initflow.outcome": "diverged", "initflow.diverged_at_step": diverged_at}
                )
            result = Result(
                config,
                scheme,
                run.id,
                run.experiment_id,
                step,
                diverged_at,
                seconds,
                history,
            )
            run.describe(f"{summary} {outcome_sentence(result)}")
    return result


def _train_and_measure(
    *,
    run: track.Run,
    config: TrainConfig,
    parameters: model.Parameters,
    splits: data.Splits,
    total: int,
    progress: Progress,
) -> tuple[dict[str, list[tuple[int, float]]], int, int | None, float]:
    """Train to the end, logging one batch of metrics at each checkpoint."""
    activation = ACTIVATIONS[config.activation]
    history: dict[str, list[tuple[int, float]]] = defaultdict(list)
    diverged_at = None
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
        values = {"lr": checkpoint.lr}
        if checkpoint.losses:
            values["loss/train"] = statistics.fmean(losses[0] for losses in checkpoint.losses)
        if checkpoint.diverged:
            diverged_at = checkpoint.step
        else:
            if checkpoint.step == 0:  # no batch was trained on yet: the first one, untrained
                first = order(0)[: config.batch_size].to(splits.train.labels.device)
                batch = data.Split(splits.train.images[first], splits.train.labels[first])
                values["loss/train"] = measure.evaluate(parameters, activation, batch)[0].loss
            for name, split in (("validation", splits.validation), ("test", splits.test)):
                if split is not None:
                    evaluation = measure.evaluate(parameters, activation, split)[0]
                    if math.isfinite(evaluation.loss):  # else it predicts nothing
                        values[f"loss/{name}"] = evaluation.loss
                        values[f"accuracy/{name}"] = evaluation.accuracy
        values = {key: value for key, value in values.items() if math.isfinite(value)}
        for key, value in values.items():
            history[key].append((checkpoint.step, value))
        run.log_metrics(checkpoint.step, values)
        progress("training", checkpoint.step, total)
    return dict(history), checkpoint.step, diverged_at, time.perf_counter() - started


def _device(asked: str) -> str:
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        return "cuda:0" if available else "cpu"
    if asked == "cpu":
        return asked
    index = int(asked.partition(":")[2] or 0)
    if index >= available:
        raise SettingError(
            f"device must be auto or cpu, not '{asked}': PyTorch sees {available} CUDA devices here"
        )
    return f"cuda:{index}"


@contextlib.contextmanager
def _threads(asked: int | None) -> Iterator[int]:
    """Give PyTorch this many CPU threads for a while; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(asked or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _summary(config: TrainConfig, scheme: Scheme, widths: tuple[int, ...], images: int) -> str:
    """The settings as a sentence."""
    momentum = f", {'Nesterov ' if config.nesterov else ''}momentum {config.momentum:g}"
    return (
        f"A {_shape(widths)} network with {config.activation}, initialized by **{scheme.spec}**, "
        f"on {images:,} images of {config.dataset}: {config.epochs} epochs of batches of "
        f"{config.batch_size}, SGD with lr {config.lr:g}, gamma {config.gamma:g}"
        f"{momentum if config.momentum else ''}; seed {config.seed}."
    )


def _shape(widths: tuple[int, ...]) -> str:
    """``784-100-10``; of deep networks ``784-100x20-10``."""
    pixels, *hidden, classes = widths
    parts = format_widths(tuple(hidden)).split(",") if hidden else []
    return "-".join([str(pixels), *parts, str(classes)])


def outcome_sentence(result: Result) -> str:
    """What came of the run, in a sentence."""
    if result.diverged_at is not None:
        return f"It diverged: the loss was not finite at iteration {result.diverged_at:,}."
    return (
        f"It ended at {result.last('accuracy/test') or 0:.2%} test accuracy "
        f"after {result.step:,} iterations."
    )

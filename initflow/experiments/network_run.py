"""What the run of one network carries: tags, files, figures, its model, and sentences on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import initflow
from initflow.core.configurations import MLP, TrainConfig
from initflow.core.machine import Resolved
from initflow.core.progress import warn
from initflow.diagnostics.networks import Untrained
from initflow.diagnostics.reading import Reading, as_json
from initflow.diagnostics.record import History, Record
from initflow.diagnostics.verdict import Verdict
from initflow.errors import InitflowError, cause
from initflow.experiments import failures
from initflow.experiments.command_run import log_settings
from initflow.experiments.failures import Failures, noted
from initflow.experiments.replay import provenance
from initflow.initializers.scheme import Scheme
from initflow.reporting import figures
from initflow.reporting.formats import training_length
from initflow.reporting.results import Drawings
from initflow.tracking import runs
from initflow.tracking.outbox import NoModelError
from initflow.training import datasets, model, modules, optimizers
from initflow.training.modules import ModuleNetwork
from initflow.training.splits import Splits

if TYPE_CHECKING:
    from initflow.reporting.drawing import Figure

OPENED = {"test": "test", "validation": "validation", "train": "training"}  # the first is told
# Tags by which what was trained is known again.
DIVERGED_AT = "initflow.diverged_at_step"
IS_EXACT = "initflow.bit_identical_to_alone"
WEIGHTS = "initflow.weights_sha256"
LONGEST_NAME = 200  # characters of a spec in a run's name, of which some stores take 250


@dataclass(frozen=True)
class Logged:
    """Where a network is found: its run, and its model where that was logged.

    ``failures`` is what could not be made of it.
    """

    run_id: str
    model_id: str | None
    failures: Failures


def name(spec: str, config: TrainConfig, kind: str | None = None) -> str:
    """What tells a network's run from others: ``he relu seed 0``; ``spec`` is its scheme's."""
    return f"{spec[-LONGEST_NAME:]} {kind or config.kind} seed {config.seed}"


def start_tags(scheme: Scheme, initial: Untrained, splits: Splits) -> dict[str, object]:
    """The tags of a network before its training."""
    builder = initial.builder if isinstance(initial, ModuleNetwork) else None
    of_model = {"initflow.model_provider": builder.provider} if builder else {}
    return {
        "initflow.version": initflow.__version__,
        "initflow.scheme": scheme.spec,
        "initflow.provider": scheme.provider,
        **of_model,
        **splits.tags,
        "initflow.initial_weights_sha256": model.weights_sha256(initial.state()),
    }


def log_network(
    parent: runs.Run,
    record: Record,
    splits: Splits,
    *,
    name: str,
    resolved: Resolved,
    tags: Mapping[str, object],
    history: History | None = None,
    run_figures: bool = False,
) -> Logged:
    """All that is known of a trained network, as a run below ``parent``.

    It is KILLED where the network was pruned. ``tags`` are its further ones, and ``history`` has
    further metrics.
    """
    failed: Failures = {}
    exact = {IS_EXACT: str(record.is_exact).lower()}
    model_id = None
    with (
        _without_model(failed),
        parent.nested_at_once(
            name=name,
            description=description(record, splits),
            params=record.config.as_text() | resolved.as_text(),
            tags=start_tags(record.scheme, record.initial, splits)
            | result_tags(record)
            | exact
            | dict(tags),
            ends_as="KILLED" if record.outcome == "pruned" else "FINISHED",
        ) as run,
    ):
        try:
            log_settings(run, record.config, splits, resolved.as_text())
            model_id = log_trained(run, record, splits, resolved, failed)
        finally:  # also of what fails here, or is interrupted; the metrics are the model's too
            run.log_history(record.history | (history or {}), model_id)
        if run_figures:
            failures.log_figures(run, drawings(record), failed)
    known_model = None if model_id is None or "model" in failed else runs.with_ids(model_id)
    return Logged(runs.with_ids(run.id), known_model, failures.of(name, failed))


@contextlib.contextmanager
def _without_model(failed: Failures) -> Iterator[None]:
    """Note that a run was written but for its model, and why."""
    try:
        yield
    except NoModelError as error:
        warn("model could not be made", error=True)
        failed["model"] = str(error)


def log_failed(
    parent: runs.Run,
    config: TrainConfig,
    error: InitflowError,
    *,
    name: str,
    resolved: Resolved,
    tags: Mapping[str, object],
) -> None:
    """A network that never came to be, as a failed run below ``parent``."""
    with (
        contextlib.suppress(InitflowError),
        parent.nested_at_once(
            name=name,
            description=f"Not trained: {cause(error)}",
            params=config.as_text() | resolved.as_text(),
            tags={"initflow.outcome": "failed", **tags},
        ),
    ):
        raise error


def log_cut_off(
    parent: runs.Run,
    record: Record,
    splits: Splits,
    error: BaseException,
    *,
    name: str,
    resolved: Resolved,
    tags: Mapping[str, object],
) -> None:
    """What was measured of a network until ``error`` ended its training, as a run that says so."""
    with (
        contextlib.suppress(type(error), InitflowError),
        parent.nested_at_once(
            name=name,
            description=splits.described(summary(record, splits)),
            params=record.config.as_text() | resolved.as_text(),
            tags=start_tags(record.scheme, record.initial, splits) | dict(tags),
        ) as run,
    ):
        run.log_history(record.history)
        log_settings(run, record.config, splits, resolved.as_text())
        raise error


def log_trained(
    run: runs.Run,
    record: Record,
    splits: Splits,
    resolved: Resolved,
    failed: Failures,
) -> str | None:
    """What it takes to train it again and compare, and the table of the signals.

    And, unless the training diverged, the model, whose id is returned; why it could not be made
    is in ``failed``.
    """
    evidence = provenance.of(record, splits, resolved)
    for name, content in provenance.files(evidence).items():
        run.log_bytes(name, content)
    if record.reading:
        run.log_json("signals", as_json(record.reading, record.signals))
    if record.config.log_model and record.outcome == "finished":
        with noted(failed, "model"):
            return log_model(run, record, splits)
    return None


def log_model(run: runs.Run, record: Record, splits: Splits) -> str:
    """The id of a trained network as a model."""
    if isinstance(record.initial, ModuleNetwork):
        module = modules.to_module(record.initial, record.trained, mean=splits.mean, std=splits.std)
        content = modules.program(module, splits.pixels)
        return run.log_program(content, pixels=splits.pixels, step=record.step, takes=splits.takes)
    return run.log_model(
        record.trained,
        record.config.activation,
        mean=splits.mean,
        std=splits.std,
        pixels=splits.pixels,
        takes=splits.takes,
        step=record.step,
    )


def result_tags(record: Record) -> dict[str, object]:
    """The tags of a network after its training."""
    tags: dict[str, object] = {
        WEIGHTS: model.weights_sha256(record.trained),
        "initflow.losses_sha256": provenance.losses_sha256(record.losses),
        "initflow.outcome": record.outcome,
    }
    if record.diverged_at is not None:
        tags[DIVERGED_AT] = record.diverged_at
    elif record.stopped_at is not None:
        tags["initflow.pruned_at_step"] = record.stopped_at
    return tags | (verdict_tags(record.reading.verdict) if record.reading else {})


def title(record: Record) -> str:
    """Its scheme, activation, shape and data set: ``he, relu, 784-100-10, mnist``."""
    config = record.config
    activation = [config.activation] if config.has("activation") else []
    on = datasets.title(config.dataset)
    return ", ".join([record.scheme.spec, *activation, record.initial.title, on])


def drawings(record: Record) -> Drawings:
    """How each figure of one network's training is drawn, by its name."""
    head, reading = title(record), record.reading
    drawn: dict[str, Callable[[], Figure]] = {
        "learning_curves": partial(figures.learning_curves, record.history, record.losses, head),
        "weight_histograms": partial(
            figures.weight_histograms, record.initial.state(), record.trained, head
        ),
    }
    if reading:
        drawn |= figures.beside_theory(
            record.scheme.spec,
            reading.signals,
            reading.predicted,
            reading.by_time,
            head,
            is_mlp=record.config.model == MLP,
        )
        drawn["signals"] = partial(figures.signals_over_training, record.signals, head)
        if record.received:
            before, after = reading.preactivations[:-1], record.received
            drawn["received"] = partial(figures.received, record.activation, before, after, head)
    return drawn


def summary(record: Record, splits: Splits) -> str:
    """The settings as a sentence."""
    config = record.config
    return (
        f"{modules.in_words(config, record.initial.title)}, initialized by {record.scheme.spec}, "
        f"on {len(splits.train):,} {splits.are} of {splits.name}: "
        f"{training_length(config)} of batches of {config.batch_size}, "
        f"{optimizers.described(config)}; seed {config.seed}."
    )


def remark(initial: Untrained, splits: Splits) -> str:
    """Sentences on what is odd about the data and the model; else nothing."""
    of_model = initial.remark if isinstance(initial, ModuleNetwork) else ""
    return f"{splits.remark} {of_model}".strip()


def description(record: Record, splits: Splits) -> str:
    """The settings, how the untrained network was, and what came of it."""
    untrained = verdict_sentence(record.reading) if record.reading else ""
    settings, odd = summary(record, splits), remark(record.initial, splits)
    return " ".join(filter(None, (settings, odd, untrained, outcome_sentence(record))))


def verdict_tags(verdict: Verdict) -> dict[str, object]:
    return {
        "initflow.verdict.forward": verdict.forward,
        "initflow.verdict.backward": verdict.backward,
    }


def verdict_sentence(reading: Reading) -> str:
    """How the signal travels through the untrained network, and what to try instead."""
    return f"Untrained, its signal is {reading.verdict}. {reading.advice}".rstrip()


def outcome_sentence(record: Record) -> str:
    """What came of a training, in a sentence."""
    if record.diverged_at is not None:
        return f"It diverged: the loss was not finite at iteration {record.diverged_at:,}."
    measured = (of for of in OPENED if f"accuracy/{of}" in record.history)
    images = next(measured)  # there are some, since no loss diverged
    accuracy = record.last(f"accuracy/{images}")
    ended = "It ended" if record.stopped_at is None else "It was pruned"
    return f"{ended} at {accuracy:.2%} {OPENED[images]} accuracy after {record.step:,} iterations."

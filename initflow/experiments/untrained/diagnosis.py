"""A diagnosis: networks that are not trained, each read and logged below the run of them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from initflow.core.configurations import MLP, DiagnoseConfig
from initflow.core.machine import Resolved
from initflow.core.progress import Progress
from initflow.diagnostics.reading import Reading, as_json
from initflow.diagnostics.signals import Signals
from initflow.diagnostics.spectrum import SpectrumReading
from initflow.experiments import command_run, failures
from initflow.experiments.failures import Failures, noted
from initflow.experiments.network_run import verdict_sentence, verdict_tags
from initflow.experiments.results import TrackedResult
from initflow.reporting import figures, model_figures
from initflow.reporting.pictures import spectrum_figures
from initflow.reporting.results import Drawings
from initflow.reporting.seed_statistics import Cell
from initflow.theory.prediction import Prediction
from initflow.tracking import runs
from initflow.training.splits import Splits

if TYPE_CHECKING:
    from initflow.reporting.drawing import Figure

T = TypeVar("T")


@dataclass(frozen=True)
class Network:
    """One of the networks: what is read of it, and the params and tags of its run."""

    reading: Reading
    params: Mapping[str, str]
    tags: Mapping[str, object]
    spectrum: SpectrumReading | None = None


@dataclass(frozen=True)
class Subject:
    """The networks that a diagnosis is of, one for each of ``cells``.

    Each is read when it is its turn. They are of one ``shape``, such as ``784-100x20-10``, and see
    ``data``, of ``splits`` where that is a data set. ``title`` says what they are, ``summary`` is a
    sentence on them, and ``remarks`` are for the end.
    """

    title: str
    shape: str
    data: str
    summary: str
    cells: Sequence[Cell]
    read: Callable[[Cell], Network]
    splits: Splits | None = None
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True, repr=False)
class Diagnosis(TrackedResult):
    """What came of :func:`initflow.diagnose`.

    - ``readings``: by (scheme, activation), in the order of the settings, the ``signals`` that were
      measured by layer, what is ``predicted`` of them, the ``mean_field`` of the middle hidden
      layer, and the ``verdict``, ``forward`` and ``backward``.
    - ``spectra``: likewise the singular values of the Jacobians, where they were asked for.
    - ``subject``: what the networks are.
    - ``failed``: the readings with a verdict of ``fail_on``.
    """

    config: DiagnoseConfig
    run: runs.Run
    subject: Subject
    readings: dict[Cell, Reading]
    remark: str = ""
    failures: Failures = field(default_factory=dict)
    spectra: dict[Cell, SpectrumReading] = field(default_factory=dict)

    @property
    def failed(self) -> dict[Cell, Reading]:
        """The networks whose verdict, forward or backward, is one to fail on."""
        unwanted = set(self.config.fail_on or ())
        return {
            cell: reading
            for cell, reading in self.readings.items()
            if unwanted & {reading.verdict.forward, reading.verdict.backward}
        }

    @property
    def title(self) -> str:
        return self.subject.title

    @property
    def conclusions(self) -> Sequence[str]:
        """What to try instead, once for all networks that it is said of; and the remark."""
        said: dict[str, list[str]] = {}
        for cell, reading in self.readings.items():
            if reading.advice:
                said.setdefault(reading.advice, []).append(str(cell))
        advice = [f"{', '.join(cells)}: {advice}" for advice, cells in said.items()]
        spectra = [f"{cell}: {its.sentence()}" for cell, its in self.spectra.items()]
        return [*advice, *spectra, *self.subject.remarks, *filter(None, [self.remark])]

    def drawings(self) -> Drawings:
        networks = {cell: (its.predicted, its.signals) for cell, its in self.readings.items()}
        draw = figures.schemes_by_layer if self.config.model == MLP else _of_model
        drawn: dict[str, Callable[[], Figure]] = {
            "schemes_by_layer": partial(draw, networks, self.title)
        }
        if any(its.signals.by_time for its in self.readings.values()):
            by_time = {cell: (its.by_time, its.signals) for cell, its in self.readings.items()}
            drawn["through_time"] = partial(
                model_figures.through_time, _of_schemes(by_time), self.title
            )
        if self.spectra:
            title = f"Jacobians of {self.title}"
            drawn["spectrum"] = partial(spectrum_figures.spectra, self.spectra, title)
        return drawn

    def numbers(self) -> Iterable[Mapping[str, object]]:
        """A row for each network: its verdicts, and the theory of its middle hidden layer."""
        for cell, its in self.readings.items():
            theory = vars(its.mean_field) if its.mean_field else {}
            row = cell._asdict() | vars(its.verdict) | theory
            of_jacobian = self.spectra.get(cell)
            yield row | (of_jacobian.metrics() if of_jacobian else {})


def diagnosed(
    config: DiagnoseConfig,
    subject: Subject,
    resolved: Resolved,
    *,
    experiment: str | None,
    progress: Progress,
) -> Diagnosis:
    """Read each network, and log it as a run below that of the diagnosis."""
    cells, shape, data = subject.cells, subject.shape, subject.data
    with command_run.opened(
        config,
        subject.splits,
        resolved.as_text(),
        name=f"diagnose {shape} {data} seed {config.seed}",
        summary=subject.summary,
        experiment=experiment,
    ) as run:
        remark = subject.splits.remark if subject.splits else ""
        result = Diagnosis(config, run, subject, {}, remark)
        for done, cell in enumerate(cells):
            progress(f"{cell.init} with {cell.activation}", done, len(cells))
            network = subject.read(cell)
            # What the layers received is for drawing one training; of a grid it is gigabytes.
            result.readings[cell] = replace(network.reading, preactivations=())
            if network.spectrum:
                result.spectra[cell] = network.spectrum
            title = f"{cell.init}, {cell.activation}, {shape}, {data}"
            with run.nested(
                name=f"{cell} {shape}",
                description=f"{title}. {verdict_sentence(network.reading)}",
                params=network.params,
                tags={**network.tags, **verdict_tags(network.reading.verdict)},
            ) as nested:
                _log_network(nested, cell, network.reading, title, result)
                if network.spectrum:
                    _log_spectrum(nested, network.spectrum, title, result)
        progress("drawing and logging", len(cells), len(cells))
        with noted(result.failures, "the numbers by layer"):
            _log_numbers(run, result.readings)
        result.log_figures()
    return result


def _of_model(networks: Mapping[Cell, tuple[Prediction, Signals]], title: str) -> Figure:
    return model_figures.schemes_by_layer(_of_schemes(networks), title)


def _of_schemes(networks: Mapping[Cell, T]) -> dict[str, T]:
    """By the scheme's name alone, where it tells them apart."""
    kinds = {cell.activation for cell in networks}
    return {
        cell.init if len(kinds) == 1 else str(cell): network for cell, network in networks.items()
    }


def _log_network(
    run: runs.Run, cell: Cell, reading: Reading, title: str, result: Diagnosis
) -> None:
    values = reading.signals.metrics() | reading.metrics()
    parts = [(key.partition("/"), value) for key, value in values.items()]
    names = runs.key_names(layer for (_, _, layer), _ in parts)  # those of a model may be anything
    run.log_metrics(0, {f"{kind}/{names[layer]}": value for (kind, _, layer), value in parts})
    run.log_json("signals", as_json(reading, [(0, reading.signals)]))
    of_network = Failures()
    drawn = figures.beside_theory(
        cell.init,
        reading.signals,
        reading.predicted,
        reading.by_time,
        title,
        is_mlp=result.config.model == MLP,
    )
    failures.log_figures(run, drawn, of_network)
    result.failures.update(failures.of(title, of_network))


def _log_spectrum(run: runs.Run, spectrum: SpectrumReading, title: str, result: Diagnosis) -> None:
    run.log_metrics(0, spectrum.metrics())
    run.log_json("spectrum", spectrum.as_json())
    run.log_text("spectrum.csv", spectrum.as_csv())
    of_network = Failures()
    draw = partial(spectrum_figures.spectrum, spectrum, title)
    failures.log_figures(run, {"spectrum": draw}, of_network)
    result.failures.update(failures.of(title, of_network))


def _log_numbers(run: runs.Run, readings: Mapping[Cell, Reading]) -> None:
    """The parent's own: by layer instead of step, so that MLflow's page draws lines of them."""
    names = runs.key_names(init for init, _ in readings)
    run.log_history(
        {
            f"{quantity}/{names[init]} {activation}": [
                (layer, value)
                for layer, value in enumerate(reading.signals.by_layer(quantity), start=1)
                if value is not None
            ]
            for quantity in ("preactivation_second_moment", "gradient_second_moment")
            for (init, activation), reading in readings.items()
        }
    )
    networks = [
        {**cell._asdict(), **as_json(reading, [(0, reading.signals)])}
        for cell, reading in readings.items()
    ]
    run.log_json("diagnosis", {"networks": networks})

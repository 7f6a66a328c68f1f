"""The plane of σ_w² and σ_b² of one activation, by theory alone, as a tracked run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor

from initflow.core import importing, machine
from initflow.core.configurations import PhaseConfig
from initflow.core.kinds import is_place
from initflow.core.progress import Progress
from initflow.errors import SettingError
from initflow.experiments import command_run
from initflow.experiments.failures import Failures, noted
from initflow.experiments.public import public
from initflow.experiments.results import TrackedResult
from initflow.initializers.activations import ACTIVATIONS, Activation
from initflow.initializers.scheme import Place, Scheme
from initflow.reporting.formats import as_csv
from initflow.reporting.pictures import phase_figures, planes
from initflow.reporting.pictures.planes import Mark, Plane
from initflow.reporting.results import Drawings, plain
from initflow.theory.criticality import critical_line
from initflow.theory.gains import gain
from initflow.theory.infinite_width import mean_field, mean_fields
from initflow.tracking import runs
from initflow.training import cache
from initflow.training.model import bias_bound, initialize

ALONG = 201  # points of the critical line
DEPTH = 3  # layers of the network whose middle one a scheme is asked about
DRAWN = 100  # its width where the weights themselves are looked at
FAR = 6.0  # standard errors by which the mean of weights that are drawn with mean 0 is never off


@dataclass(frozen=True, repr=False)
class Phase(TrackedResult):
    """What came of :func:`initflow.phase`.

    - ``plane``: ``fields``, a :class:`MeanFields` of shape (n, m), at each of n values of
      ``sigma_w2`` and m of ``sigma_b2``, and the critical ``line``.
    - ``marks``: where each scheme lies, its mean field and phase: ordered, critical, chaotic or
      unbounded.
    - ``missing``: why other schemes have no mark, by name.
    """

    config: PhaseConfig
    run: runs.Run
    plane: Plane
    marks: Sequence[Mark]
    missing: Mapping[str, str]
    remark: str = ""
    failures: Failures = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"Deep networks with {self.plane.activation}, by their variances"

    @property
    def conclusions(self) -> Sequence[str]:
        return planes.sentences(self.plane, self.marks, self.missing)

    def numbers(self) -> Iterable[Mapping[str, object]]:
        """A row for each scheme that has a place; :meth:`Plane.cells` has those of the plane."""
        return (mark.row() for mark in self.marks)

    def drawings(self) -> Drawings:
        return {"phase": partial(phase_figures.plane, self.plane, self.marks, self.title)}


@public(PhaseConfig)
@cache.cleared_after()
def phase(config: PhaseConfig, *, experiment: str | None = None, progress: Progress) -> Phase:
    """Work out the plane of σ_w² and σ_b² of an activation, and where schemes lie on it.

    σ_w² is fan_in · Var(W), σ_b² the variance of the biases. By the theory of infinitely wide
    networks (Poole et al. 2016; Schoenholz et al. 2017; :func:`initflow.theory.mean_field`):
    nothing is trained or measured.

    Returns a :class:`Phase`. Raises, before a run is made, :class:`SettingError` for a wrong
    setting and :class:`PluginError` for a scheme that fails; and :class:`TrackingError` where
    MLflow refuses the run.
    """
    activation, provider = _activation(config.activation)
    schemes = cache.distinct(config.inits, config.plugins_dir)
    with machine.threads(1):  # theory is many small steps
        marks, missing = _marks(config, activation, schemes)
        progress("working out the plane", 0, 2)
        plane = _plane(config, activation)
    summary = (
        f"The plane of σ_w² and σ_b² of {activation.name}, {config.points} × {config.points} "
        f"networks, with {', '.join(config.inits)}."
    )
    with command_run.opened(
        config,
        None,
        {},
        name=f"phase {activation.name}",
        summary=summary,
        experiment=experiment,
        tags={"initflow.activation": provider} if provider else {},
    ) as run:
        progress("drawing and logging", 1, 2)
        result = Phase(config, run, plane, marks, missing)
        with noted(result.failures, "the numbers"):
            _log_numbers(result)
        result.log_figures()
        run.describe("\n\n".join([*result.conclusions, summary]))
    return result


def _activation(name: str) -> tuple[Activation, str | None]:
    """A built-in one, or that of the function at a place, and whose that is."""
    if not is_place(name):
        return ACTIVATIONS[name], None
    function, provider = importing.function_at(name, f"activation '{name}'")
    activation = Activation.of(cast("Callable[[Tensor], Tensor]", function))
    gain(activation)  # what is not finite, is 0 or grows too fast is an error
    return activation, provider


def _marks(
    config: PhaseConfig, activation: Activation, schemes: Mapping[str, Scheme]
) -> tuple[list[Mark], dict[str, str]]:
    """Those of the schemes that state a variance of a layer, and why others have none."""
    at = Place(config.width, config.width, activation, layer=1, depth=DEPTH)
    found, missing = [], {}
    for scheme in schemes.values():
        if scheme.kind == "network":
            missing[scheme.spec] = "it fills the network as a whole, by what it sees"
            continue
        try:
            variance, bias_variance = scheme.variance(at), scheme.bias_variance(at)
        except SettingError as error:  # made for other activation functions
            missing[scheme.spec] = str(error).rstrip(".")
            continue
        if variance is None:
            missing[scheme.spec] = "it states no variance"
            continue
        if not _has_mean_0(scheme, activation):
            missing[scheme.spec] = "its weights are not drawn with mean 0, as theory has them"
            continue
        if not scheme.fills_biases:
            bias_variance = bias_bound(config.bias_init, config.width) ** 2 / 3
        elif bias_variance is None:
            missing[scheme.spec] = "it states no variance of the biases that it fills"
            continue
        found.append((scheme.spec, config.width * variance, bias_variance))
    line = critical_line(activation, _double([b for _, _, b in found])).tolist() if found else []
    return [
        Mark(*one, mean_field(activation, *one[1:]), critical)
        for one, critical in zip(found, line, strict=True)
    ], missing


def _has_mean_0(scheme: Scheme, activation: Activation) -> bool:
    """Whether a layer's weights have it, within what chance does to their mean."""
    widths = (DRAWN,) * (DEPTH + 1)
    drawn = initialize(widths, scheme, activation, bias_init="zeros", seed=0).weights[1].double()
    return bool(drawn.mean().abs() <= FAR * drawn.std(correction=0) / DRAWN)


def _plane(config: PhaseConfig, activation: Activation) -> Plane:
    w, b = (
        torch.linspace(
            getattr(config, f"{name}_low"),
            getattr(config, f"{name}_high"),
            config.points,
            dtype=torch.float64,
        )
        for name in planes.AXES
    )
    fields = mean_fields(activation, w[:, None], b)
    # Denser at its beginning, where it bends most.
    along = b[0] + (b[-1] - b[0]) * torch.linspace(0, 1, ALONG, dtype=b.dtype).square()
    return Plane(activation.name, w, b, fields, (critical_line(activation, along), along))


def _log_numbers(result: Phase) -> None:
    run, plane = result.run, result.plane
    run.log_text("phase.csv", as_csv(list(plane.cells()), planes.COLUMNS))
    values = {
        "activation": plane.activation,
        **{name: getattr(plane, name).tolist() for name in planes.AXES},
        "critical_line": dict(zip(planes.AXES, map(Tensor.tolist, plane.line), strict=True)),
        "schemes": list(result.numbers()),
        "not_marked": dict(result.missing),
        "conclusions": list(result.conclusions),
    }
    run.log_json("phase", {name: plain(value) for name, value in values.items()})
    names = runs.key_names(mark.init for mark in result.marks)
    metrics = {
        f"{quantity}/{names[mark.init]}": value
        for mark in result.marks
        for quantity, value in mark.row().items()
        if isinstance(value, float) and math.isfinite(value)
    }
    run.log_metrics(0, metrics)


def _double(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)

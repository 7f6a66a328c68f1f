"""The plane of σ_w² and σ_b² as values: its cells, its critical line, where schemes lie on it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from initflow.reporting.formats import rounded
from initflow.theory.criticality import NEAR
from initflow.theory.infinite_width import MeanField, MeanFields

LAYERS = 1_000  # differences that last longer are said to last for ever
AXES = ("sigma_w2", "sigma_b2")
COLUMNS = (*AXES, *MeanField.__dataclass_fields__)


@dataclass(frozen=True)
class Plane:
    """``fields`` at each of ``sigma_w2`` (n,) and ``sigma_b2`` (m,): tensors (n, m).

    ``line`` is the critical line, σ_w² and σ_b² of its points, as many of both: σ_w² is NaN where
    there is none.
    """

    activation: str
    sigma_w2: Tensor
    sigma_b2: Tensor
    fields: MeanFields
    line: tuple[Tensor, Tensor]

    @property
    def range(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """From where to where it goes."""
        w, b = self.sigma_w2.tolist(), self.sigma_b2.tolist()
        return (w[0], w[-1]), (b[0], b[-1])

    def cells(self) -> Iterable[Mapping[str, float]]:
        """A row for each."""
        columns = {name: of.tolist() for name, of in vars(self.fields).items()}
        for i, sigma_w2 in enumerate(self.sigma_w2.tolist()):
            for j, sigma_b2 in enumerate(self.sigma_b2.tolist()):
                found = {name: of[i][j] for name, of in columns.items()}
                yield {"sigma_w2": sigma_w2, "sigma_b2": sigma_b2, **found}


@dataclass(frozen=True)
class Mark:
    """Where a scheme lies; ``critical`` is the critical σ_w² at its ``sigma_b2``, or NaN."""

    init: str
    sigma_w2: float
    sigma_b2: float
    field: MeanField
    critical: float

    @property
    def phase(self) -> str:
        """Critical where χ₁ is 1, unbounded where the variance is, else ordered or chaotic."""
        if abs(self.field.chi_1 - 1) < NEAR:
            return "critical"
        if math.isinf(self.field.q_star):
            return "unbounded"
        return "ordered" if self.field.chi_1 < 1 else "chaotic"

    def row(self) -> dict[str, object]:
        return {
            "init": self.init,
            "sigma_w2": self.sigma_w2,
            "sigma_b2": self.sigma_b2,
            **vars(self.field),
            "phase": self.phase,
            "critical_sigma_w2": self.critical,
        }

    def sentence(self) -> str:
        """On which side of the line it lies, and what that means."""
        parts = [f"{self._gradients()}, {self._differences()}"]
        if self.phase != "critical":
            parts.append(self._change())
        return f"{_at(self)} {self.phase}: {'; '.join(parts)}."

    def _gradients(self) -> str:
        chi_1, is_unbounded = self.field.chi_1, math.isinf(self.field.q_star)
        if self.phase == "critical":
            signal = ", though the signal grows" if is_unbounded else ""
            return f"gradients neither grow nor shrink (χ₁ = 1){signal}"
        change = f"{'grow' if chi_1 > 1 else 'shrink'}, × χ₁ = {rounded(chi_1)} a layer"
        return f"gradients {change}{', as the signal does without bound' if is_unbounded else ''}"

    def _differences(self) -> str:
        xi_c, c_star = self.field.xi_c, self.field.c_star
        if xi_c > LAYERS:
            return "and how alike two images are changes more slowly than exponentially, if at all"
        layers = f"{rounded(xi_c)} layers"
        if c_star < 1:
            return f"and two images part to a correlation of {rounded(c_star)}, e-fold in {layers}"
        return f"and what tells two images apart is lost, e-fold in {layers}"

    def _change(self) -> str:
        if math.isnan(self.critical):
            return "no σ_w² is critical at this σ_b²"
        if self.sigma_w2 == 0:
            return f"critical is σ_w² = {rounded(self.critical)}"
        factor = rounded(self.critical / self.sigma_w2)
        return f"critical is σ_w² = {rounded(self.critical)} (× {factor})"


def _at(mark: Mark) -> str:
    place = f"σ_w² = {rounded(mark.sigma_w2)}, σ_b² = {rounded(mark.sigma_b2)}"
    return f"{mark.init} ({place}) is"


def sentences(plane: Plane, marks: Sequence[Mark], missing: Mapping[str, str]) -> list[str]:
    """Of the line, of each scheme, and of those that have no place: ``missing`` says why."""
    lines = [_line(plane), *(mark.sentence() for mark in marks)]
    outside = [mark.init for mark in marks if not is_inside(plane, mark)]
    if outside:
        lines.append(f"Outside of this part of the plane: {', '.join(outside)}.")
    return [*lines, *(f"{init} is not marked: {why}." for init, why in missing.items())]


def is_inside(plane: Plane, mark: Mark) -> bool:
    places = zip(plane.range, (mark.sigma_w2, mark.sigma_b2), strict=True)
    return all(low <= at <= high for (low, high), at in places)


def _line(plane: Plane) -> str:
    there = [
        (b, w) for w, b in zip(*(of.tolist() for of in plane.line), strict=True) if math.isfinite(w)
    ]
    if not there:
        return (
            f"{plane.activation} has no critical line at these σ_b²: where χ₁ passes 1 the "
            "variance jumps to infinity."
        )
    (first_b, first), (last_b, last) = there[0], there[-1]
    if abs(last - first) < NEAR * first:
        return f"{plane.activation} is critical (χ₁ = 1) at σ_w² = {first:.5g}, at every σ_b²."
    return (
        f"{plane.activation} is critical (χ₁ = 1) from σ_w² = {first:.5g} at σ_b² = "
        f"{rounded(first_b)} to {last:.5g} at {rounded(last_b)}."
    )

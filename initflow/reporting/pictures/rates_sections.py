"""A range of learning rates as sections of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from initflow.reporting import webpage
from initflow.reporting.formats import NONE, percent, rounded
from initflow.reporting.pictures.rates_statistics import CoordinateSlope, Row, Slope, Spread
from initflow.reporting.webpage import Section, Table, columns, pictured


def sections(
    rows: Sequence[Row],
    slopes: Sequence[Slope],
    coordinates: Sequence[CoordinateSlope],
    pictures: Mapping[str, bytes],
) -> list[Section]:
    """The figures, where there are, as PNG files, each with the table of its numbers."""
    of_rates = pictured(
        pictures.get("rates"),
        "Validation accuracy and loss against the learning rate, a line for each scheme within a "
        "band over the seeds. The table below has the rates that each bears.",
    )
    found = [Section("Rates", [*of_rates, _rates(rows)])]
    if slopes:
        picture = pictured(
            pictures.get("stable_rates"),
            "For each scheme the largest stable learning rate against the size of the network, "
            "beside the one predicted from the curvature at the start.",
        )
        found.append(Section("How they go with the size", [*picture, _slopes(slopes)]))
    if coordinates:
        picture = pictured(
            pictures.get("coordinates"),
            "For each layer how much the first updates change its pre-activations, against the "
            "width of the network.",
        )
        found.append(Section("Coordinate check", [*picture, _coordinates(coordinates)]))
    return found


def _rates(rows: Sequence[Row]) -> Table:
    return Table(
        "Learning rates",
        columns(
            "scheme",
            "parametrization",
            numbers=(
                "size",
                "largest stable",
                "95 % interval",
                "predicted",
                "best",
                "accuracy, percent",
                "within a point",
            ),
        ),
        [
            (
                row.group.kind.init,
                row.group.kind.parametrization,
                NONE if row.group.size is None else str(row.group.size),
                stable(row),
                ends(row.stable),
                rounded(row.predicted.mean if row.predicted else None),
                rounded(row.best.mean if row.best else None),
                percent(row.accuracy.mean if row.accuracy else None),
                between(row.within),
            )
            for row in rows
        ],
        "Largest stable: all rates up to it are, over the seeds, whose logarithms the interval by "
        "Student's t is of. Predicted: what a quadratic bears that curves as the loss does at the "
        "start. Within a point: the rates around the best of the mean over the seeds.",
    )


def stable(row: Row) -> str:
    """The largest stable rate or, where it lies beyond the range, on which side."""
    if row.stable:
        return rounded(row.stable.mean)
    if row.unstable and not row.unbounded:
        return "none"
    return "all" if row.unbounded and not row.unstable else NONE


def ends(spread: Spread | None) -> str:
    if spread is None or spread.low is None or spread.high is None:
        return NONE
    return f"{rounded(spread.low)} to {rounded(spread.high)}"


def between(within: tuple[float, float] | None) -> str:
    return NONE if within is None else f"{rounded(within[0])} to {rounded(within[1])}"


def _slopes(slopes: Sequence[Slope]) -> Table:
    return Table(
        "Slopes: rate ∝ size^slope",
        columns(
            "scheme",
            "parametrization",
            numbers=("measured", "95 % interval", "predicted", "95 % interval", "theory"),
        ),
        [
            (
                *slope.kind,
                rounded(slope.measured.mean if slope.measured else None),
                ends(slope.measured),
                rounded(slope.predicted.mean if slope.predicted else None),
                ends(slope.predicted),
                verdict(slope.holds),
            )
            for slope in slopes
        ],
        "Over the seeds, each with a line of its own through the logarithms. Theory holds where "
        "the two intervals overlap.",
    )


def verdict(holds: bool | None) -> str:
    return NONE if holds is None else "holds" if holds else "does not hold"


def _coordinates(coordinates: Sequence[CoordinateSlope]) -> Table:
    return webpage.Table(
        "What the first updates change ∝ width^slope",
        columns(
            "scheme", "parametrization", "layer", numbers=("slope", "95 % interval", "verdict")
        ),
        [
            (
                *one.kind,
                one.layer,
                rounded(one.slope.mean),
                ends(one.slope),
                one.verdict,
            )
            for one in coordinates
        ],
        "The root mean square, over images and units, of how far the pre-activations are from "
        "those of the untrained network. Flat: a slope of at most 0.2 in size.",
    )

"""What a range of learning rates says, in words."""

from __future__ import annotations

from collections.abc import Sequence

from initflow.reporting.formats import counted
from initflow.reporting.pictures.rates_statistics import (
    CoordinateSlope,
    Group,
    Kind,
    Row,
    Slope,
    Spread,
)


def sentences(
    rows: Sequence[Row],
    slopes: Sequence[Slope],
    coordinates: Sequence[CoordinateSlope],
    over: str,
    ended_early: Sequence[Group] = (),
) -> list[str]:
    """One for each scheme; over depths or widths how its largest stable rate goes with them.

    ``ended_early`` are those of the coordinate check of which some networks diverged.
    """
    if over == "none":
        return [_of_row(row) for row in rows]
    said = [_of_slope(slope, over) for slope in slopes]
    kinds = dict.fromkeys(one.kind for one in coordinates)
    said += [
        _of_coordinates(kind, [one for one in coordinates if one.kind == kind]) for kind in kinds
    ]
    if ended_early:
        told = ", ".join(f"{kind} of width {size}" for kind, size in ended_early)
        said.append(f"In the first updates these diverged, and are left out of them: {told}.")
    return said


def _of_row(row: Row) -> str:
    """``he: stable up to lr 0.4, where theory says 0.28 (holds); best …``."""
    name, parts = str(row.group.kind), []
    if row.stable:
        parts.append(f"stable up to lr {_rate(row.stable)}{_predicted(row)}")
    if row.unstable:
        seeds = counted(row.unstable, "seed")
        parts.append(f"no rate of the range is stable with {seeds}{_told(row)}")
    if row.unbounded:
        parts.append(f"every rate of the range is stable with {counted(row.unbounded, 'seed')}")
    if row.best and row.accuracy:
        near = ""
        if row.within:
            low, high = row.within
            near = f", within a point of it from {low:.2g} to {high:.2g}"
        parts.append(
            f"best at lr {_rate(row.best)} with {100 * row.accuracy.mean:.1f} % on validation "
            f"images{near}"
        )
    else:
        parts.append("no training finished")
    return f"{name}: {'; '.join(parts)}."


def _predicted(row: Row) -> str:
    if row.predicted is None or row.ratio is None:
        return ""
    verdict = "holds" if row.holds else "does not hold"
    return (
        f", where the curvature at the start predicts {row.predicted.mean:.2g} (measured over "
        f"predicted {row.ratio:.2g}: theory {verdict})"
    )


def _told(row: Row) -> str:
    if row.predicted is None or row.stable:
        return ""
    return f", where the curvature at the start predicts {row.predicted.mean:.2g}"


def _rate(spread: Spread) -> str:
    """``0.4``, of several seeds with its interval: ``0.4 (0.32 to 0.5)``."""
    if spread.low is None or spread.high is None or f"{spread.low:.2g}" == f"{spread.high:.2g}":
        return f"{spread.mean:.2g}"
    return f"{spread.mean:.2g} ({spread.low:.2g} to {spread.high:.2g})"


def _of_slope(slope: Slope, over: str) -> str:
    """How the largest stable rate goes with the size: ``he: … goes as depth^(-0.9 ± 0.1)``."""
    name = str(slope.kind)
    if slope.measured is None:
        return f"{name}: too few stable rates lie within the range to say how they go with {over}."
    text = f"{name}: the largest stable rate goes as {over}^{_exponent(slope.measured)}"
    beyond = ""
    if slope.beyond:
        beyond = f" ({counted(slope.beyond, 'limit')} beyond the range left out of both)"
    if slope.predicted is None:
        return f"{text}{beyond}."
    verdict = {
        True: "theory holds",
        False: "theory does not hold",
        None: "one seed has no interval, so nothing is said of theory",
    }[slope.holds]
    return (
        f"{text}, the one predicted from the curvature at the start as "
        f"{over}^{_exponent(slope.predicted)}{beyond}: {verdict}."
    )


def _exponent(spread: Spread) -> str:
    told = _slope(spread)
    return f"({told})" if "±" in told else told


def _slope(spread: Spread) -> str:
    mean = f"{spread.mean:.2f}".replace("-", "−")
    if spread.low is None or spread.high is None:
        return mean
    return f"{mean} ± {(spread.high - spread.low) / 2:.2f}"


def _of_coordinates(kind: Kind, layers: Sequence[CoordinateSlope]) -> str:
    """The coordinate check of one scheme in one parametrization, layer by layer."""
    told = ", ".join(f"{one.layer} {one.verdict} ({_slope(one.slope)})" for one in layers)
    verdicts = {one.verdict for one in layers}
    whole = "flat" if verdicts == {"flat"} else "not flat"
    name = f"{kind.init} in the {kind.parametrization} parametrization"
    return f"{name}: what the first updates change is {whole} over widths, as width^slope: {told}."

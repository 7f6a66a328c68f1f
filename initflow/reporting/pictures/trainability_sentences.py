"""What the trained networks of a plane say of theory, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from initflow.reporting.formats import counted
from initflow.reporting.pictures.trainability_statistics import Fit, Plane


def sentences(planes: Sequence[Plane], critical: float | None) -> list[str]:
    """Of each learning rate whether theory holds, where networks train deepest, what went wrong.

    ``critical`` is the σ_w² at which theory expects the deepest ones, None where it has none in
    the range.
    """
    said = []
    for plane in planes:
        opening = f"At lr {plane.lr:g}, " if len(planes) > 1 else ""
        told = (_verdict(plane), *_deepest(plane, critical), *_lost(plane))
        said += [opening + one if opening else one[0].upper() + one[1:] for one in told]
    return [f"{sentence}." for sentence in said]


def multiple(fit: Fit) -> str:
    """``c = 5.9 ± 0.4``, or without an interval."""
    if fit.c is None:
        return "c is not known"
    half = None if fit.high is None else fit.high - fit.c
    if half is None:
        return f"c = {fit.c:.1f}"
    places = 1 if half >= 0.05 or not half else 1 - math.floor(math.log10(half))
    return f"c = {fit.c:.{places}f} ± {half:.{places}f}"


def _verdict(plane: Plane) -> str:
    fit = plane.fit
    if fit is None:
        return "no network learned anything, so there is no edge to hold theory against"
    if fit.c is None or fit.factor is None:
        return (
            "no edge lies between the shallowest and the deepest networks where theory has one, so "
            "c is not known: try other depths"
        )
    value = multiple(fit).removeprefix("c = ")
    off = f"in depth the edge is off by a factor {fit.factor:.2f} in the mean over σ_w²"
    alone = "" if fit.high is not None else " (one seed has no interval)"
    if fit.holds:
        return (
            f"theory holds: networks train up to {value}{alone} times its depth scale ξ; {off}, "
            f"that of a single depth for all σ_w² by {fit.level:.2f}"
        )
    why = "hardly nearer than" if fit.factor < fit.level else "no nearer than"
    return (
        f"theory does not hold: of the nearest line, {value}{alone} times its depth scale ξ, "
        f"{off}, {why} that of a single depth for all σ_w² with {fit.level:.2f}"
    )


def _deepest(plane: Plane, critical: float | None) -> list[str]:
    if plane.deepest is None:
        return []
    theory = "" if critical is None else f" (theory: {critical:.3g})"
    return [f"networks train deepest at σ_w² = {plane.deepest:.3g}{theory}"]


def _lost(plane: Plane) -> list[str]:
    counts = [
        f"{counted(plane.count(outcome), 'network')} {verb}"
        for outcome, verb in (("diverged", "diverged"), ("unstable", "ended unstable"))
        if plane.count(outcome)
    ]
    return [" and ".join(counts)] if counts else []

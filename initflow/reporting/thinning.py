"""Which of many schemes are drawn where more could not be told apart, and a sentence on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from initflow.reporting.seed_statistics import Row

MOST = 8  # schemes in one picture: as many as there are colours, so that none is there twice


def drawn(rows: Sequence[Row]) -> list[str]:
    """At most :data:`MOST` of the schemes of ``rows``, in their order.

    Of more, the best with each activation function, and of the others, ordered by their final
    accuracies in the mean over these functions, evenly chosen ones down to the last.
    """
    schemes = list(dict.fromkeys(row.cell.init for row in rows))
    if len(schemes) <= MOST:
        return schemes
    means: dict[str, list[float]] = {scheme: [] for scheme in schemes}
    best: dict[str, tuple[float, str]] = {}
    for row in rows:
        mean = -1.0 if row.mean is None else row.mean
        means[row.cell.init].append(mean)
        if row.cell.activation not in best or mean > best[row.cell.activation][0]:
            best[row.cell.activation] = mean, row.cell.init
    first = list(dict.fromkeys(init for _, init in best.values()))[: MOST - 1]
    rest = [scheme for scheme in schemes if scheme not in first]
    rest.sort(key=lambda scheme: -sum(means[scheme]) / len(means[scheme]))
    places = np.linspace(0, len(rest) - 1, MOST - len(first) + 1)[1:].round()
    chosen = {*first, *(rest[int(at)] for at in places)}
    return [scheme for scheme in schemes if scheme in chosen]


def sentence(rows: Sequence[Row]) -> str:
    """What :func:`drawn` leaves out, and why; nothing where that is nothing."""
    schemes, several = {row.cell.init for row in rows}, len({row.cell.activation for row in rows})
    shown = len(drawn(rows))
    if len(schemes) <= shown:
        return ""
    best = "the best" if several == 1 else "the best with each activation"
    return (
        f"{shown} of {len(schemes)} schemes, as more could not be told apart: {best}, and others "
        "evenly chosen by final accuracy down to the last."
    )

"""Which of many schemes are drawn where more could not be told apart, and a sentence on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from initflow.reporting.seed_statistics import Row

MOST = 8  # schemes in one picture: as many as there are colours, so that none is there twice


def drawn(rows: Sequence[Row]) -> list[str]:
    """At most :data:`MOST` of the schemes of ``rows``, in their order.

    Of more, the best with each activation function, and of the others that finished, ordered by
    their final accuracies in the mean over these functions, evenly chosen ones down to the last.
    Those that diverged throughout have no curve, and come after all of these.
    """
    schemes = list(dict.fromkeys(row.cell.init for row in rows))
    if len(schemes) <= MOST:
        return schemes
    known: dict[str, list[float]] = {scheme: [] for scheme in schemes}
    best: dict[str, tuple[float, str]] = {}
    for row in rows:
        if row.mean is not None:
            known[row.cell.init].append(row.mean)
            before = best.get(row.cell.activation)
            if before is None or row.mean > before[0]:
                best[row.cell.activation] = row.mean, row.cell.init
    first = list(dict.fromkeys(init for _, init in best.values()))[:MOST]
    rest = [scheme for scheme in schemes if scheme not in first]
    finished = sorted(
        (scheme for scheme in rest if known[scheme]),
        key=lambda scheme: -sum(known[scheme]) / len(known[scheme]),
    )
    lost = [scheme for scheme in rest if not known[scheme]]
    left = MOST - len(first)
    if len(finished) > left:
        places = np.linspace(0, len(finished) - 1, left + 1)[1:].round()
        finished = [finished[int(at)] for at in places]
    chosen = {*first, *[*finished, *lost][:left]}
    return [scheme for scheme in schemes if scheme in chosen]


def sentence(rows: Sequence[Row]) -> str:
    """What :func:`drawn` leaves out, and why; nothing where that is nothing."""
    schemes, several = {row.cell.init for row in rows}, len({row.cell.activation for row in rows})
    shown = len(drawn(rows))
    if len(schemes) <= shown:
        return ""
    some = "some activations" if several > MOST else "each activation"
    best = "the best" if several == 1 else f"the best with {some}"
    return (
        f"{shown} of {len(schemes)} schemes, as more could not be told apart: {best}, and others "
        "evenly chosen by final accuracy down to the last."
    )

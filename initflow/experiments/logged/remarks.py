"""What is to be known of groups of runs before their statistics are trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from initflow.experiments.logged.groups import Groups, value_of
from initflow.reporting.formats import counted
from initflow.reporting.seed_statistics import Difference, finished

NAMED = 8  # parameters that a sentence has
RESOLVED = "resolved."  # what initflow found out about the machine


def sentences(
    groups: Groups, differences: Sequence[Difference], told: Sequence[str | None]
) -> list[str]:
    """Runs that are left out, other parameters that differ, and what has no spread.

    ``told`` are the names of the parameters that runs are meant to differ in.
    """
    return [
        *(
            f"Left out: {counted(len(ids), 'run')} ({reason})."
            for reason, ids in groups.left_out.items()
        ),
        *_differing(groups, told),
        *_alike(groups),
        *_without_width(differences),
    ]


def _differing(groups: Groups, told: Sequence[str | None]) -> Iterator[str]:
    """Not what is one of the ``told`` in other words, as ``init`` is the scheme."""
    names = [name for name in told if name]
    keys = {key for member in groups.members for key in member.run.params}
    differing = [
        key
        for key in sorted(keys)
        if key not in told
        and not key.startswith(RESOLVED)
        and len({value_of(member.run, key) for member in groups.members}) > 1
        and not any(
            all(value_of(one.run, key) == value_of(one.run, name) for one in groups.members)
            for name in names
        )
    ]
    if differing:
        more = len(differing) - NAMED
        others = f" and {more} more" if more > 0 else ""
        yield f"The runs differ in other parameters, too: {', '.join(differing[:NAMED])}{others}."


def _alike(groups: Groups) -> Iterator[str]:
    for cell, outcomes in groups.outcomes().items():
        values = list(finished(outcomes).values())
        if len(values) > 1 and len(set(values)) == 1:
            yield (
                f"All {len(values)} runs of {str(cell).strip()} came to the same value: that says "
                "nothing of how much runs differ."
            )


def _without_width(differences: Sequence[Difference]) -> Iterator[str]:
    """As by chance few do, where values are counts of few examples."""
    for pair in differences:
        if pair.effect and pair.low == pair.high:
            within = f" with {pair.activation}" if pair.activation else ""
            yield (
                f"{pair.better} and {pair.worse}{within} differ by the same in all {pair.n} runs: "
                "an interval without a width is no proof."
            )

"""What several seeds say of schemes: a row for each, their differences, and both in words.

Numbers in, numbers and sentences out: nothing is trained, tracked or printed here.

Every interval is a two-sided 95 % Student t-interval, of a mean over seeds or of the mean
difference between two schemes seed by seed, each by itself. It takes the accuracies, or their
differences, for normally distributed. A difference is significant where its p-value, corrected
for all pairs of the comparison by Holm's step-down method (Scand. J. Statist. 6, 1979, 65-70),
is at most 5 %: where no schemes differ, one comparison in twenty or fewer finds a difference.

A seed whose training diverged has no final accuracy; it is counted, and never left unsaid. Means
and differences are of those that finished.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from itertools import chain, combinations, repeat
from typing import Any, NamedTuple

ALPHA = 0.05
CONFIDENCE = 0.95
NONE = "–"  # where there is no number
LEVELS = (0.90, 0.95)  # accuracies whose first iteration a row tells
EXACT = 12  # decimals: accuracies are counts over images, what differs beyond these is rounding
COLUMNS = (
    "init",
    "activation",
    "n",
    "accuracy_mean",
    "accuracy_std",
    "accuracy_low",
    "accuracy_high",
    "iterations_to_90",
    "iterations_to_95",
    "diverged",
)  # of a row, in the files made of it


class Cell(NamedTuple):
    """A scheme, by its spec, with an activation function."""

    init: str
    activation: str

    def __str__(self) -> str:
        return f"{self.init} {self.activation}"


@dataclass(frozen=True)
class Outcome:
    """What the training of one network under ``seed`` came to.

    ``curve``: (iteration, test accuracy as a fraction) pairs, from iteration 0 on.
    ``diverged_at``: the iteration whose loss was not finite, None for a finished training.
    ``images``: how many it was tested on, where that is known.
    """

    seed: int
    curve: Sequence[tuple[int, float]]
    diverged_at: int | None = None
    images: int | None = None

    @property
    def accuracy(self) -> float | None:
        """At the end; None where the training diverged."""
        return None if self.diverged_at is not None or not self.curve else self.curve[-1][1]


Outcomes = Mapping[Cell, Sequence[Outcome]]  # of each cell, one for each seed


@dataclass(frozen=True)
class Row:
    """One scheme with one activation function over ``n`` seeds that finished.

    ``mean``, ``std`` (of a sample, n - 1) and the 95 % t-interval from ``low`` to ``high`` are of
    the final test accuracy, as fractions; None without a seed that finished, and of all but the
    mean with only one. ``to_90`` and ``to_95``: iterations, in the median over all seeds (the
    lower one of an even number), after which 90 % and 95 % were first seen; None where more than
    half of them never got there. ``diverged`` counts the seeds that did.
    """

    cell: Cell
    n: int
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    to_90: int | None
    to_95: int | None
    diverged: int


@dataclass(frozen=True)
class Difference:
    """Of two schemes with one activation function, on the ``n`` seeds that both finished.

    ``effect`` is how much the mean test accuracy of ``better`` is above that of ``worse``, a
    fraction, with its 95 % interval from ``low`` to ``high`` (paired t); ``p`` is the two-sided
    p-value and ``p_holm`` the same corrected by Holm's method for all pairs of the comparison.
    """

    activation: str
    better: str
    worse: str
    n: int
    effect: float
    low: float
    high: float
    p: float
    p_holm: float

    @property
    def significant(self) -> bool:
        return self.p_holm <= ALPHA

    @property
    def largest(self) -> float:
        """The largest difference in size that the interval allows, a fraction."""
        return max(abs(self.low), abs(self.high))


def rows(outcomes: Outcomes) -> list[Row]:
    """One for each cell, in the order of ``outcomes``."""
    return [_row(cell, of_cell) for cell, of_cell in outcomes.items()]


def _row(cell: Cell, outcomes: Sequence[Outcome]) -> Row:
    accuracies = list(_finished(outcomes).values())
    mean = statistics.mean(accuracies) if accuracies else None
    std = half = None
    if len(accuracies) > 1:
        std = statistics.stdev(accuracies)
        half = _half_width(len(accuracies), std)
    to_90, to_95 = (_median_iteration(level, outcomes) for level in LEVELS)
    return Row(
        cell=cell,
        n=len(accuracies),
        mean=mean,
        std=std,
        low=None if mean is None or half is None else mean - half,
        high=None if mean is None or half is None else mean + half,
        to_90=to_90,
        to_95=to_95,
        diverged=sum(outcome.diverged_at is not None for outcome in outcomes),
    )


def _finished(outcomes: Sequence[Outcome]) -> dict[int, float]:
    """Final accuracy by seed, of those that have one."""
    found = ((outcome.seed, outcome.accuracy) for outcome in outcomes)
    return {seed: accuracy for seed, accuracy in found if accuracy is not None}


def _median_iteration(level: float, outcomes: Sequence[Outcome]) -> int | None:
    """After which ``level`` is first seen; a seed that never gets there takes for ever."""
    firsts = [
        next((iteration for iteration, accuracy in outcome.curve if accuracy >= level), math.inf)
        for outcome in outcomes
    ]
    median = statistics.median_low(firsts) if firsts else math.inf
    return None if math.isinf(median) else int(median)


def _half_width(n: int, std: float) -> float:
    """Of the t-interval of a mean over ``n`` values of standard deviation ``std``."""
    from scipy.special import stdtrit  # noqa: PLC0415 - scipy takes a second to import

    return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * std / math.sqrt(n)


def differences(outcomes: Outcomes) -> list[Difference]:
    """All pairs of schemes with the same activation that share two seeds or more.

    In the order of ``outcomes``, activation by activation; so are two that do equally well.
    """
    found: list[Difference] = []
    for activation, by_init in _by_activation(outcomes).items():
        accuracies = {init: _finished(of_cell) for init, of_cell in by_init.items()}
        for one, other in combinations(accuracies, 2):
            shared = accuracies[one].keys() & accuracies[other].keys()
            above = [accuracies[one][seed] - accuracies[other][seed] for seed in shared]
            if len(above) > 1:
                images = min((of.images for of in by_init[one] if of.images), default=None)
                found.append(_difference(activation, one, other, above, images))
    corrected = _holm([difference.p for difference in found])
    return [
        replace(difference, p_holm=p_holm)
        for difference, p_holm in zip(found, corrected, strict=True)
    ]


def _by_activation(outcomes: Outcomes) -> dict[str, dict[str, Sequence[Outcome]]]:
    """Of each activation, the outcomes by scheme."""
    found: dict[str, dict[str, Sequence[Outcome]]] = {}
    for cell, of_cell in outcomes.items():
        found.setdefault(cell.activation, {})[cell.init] = of_cell
    return found


def _difference(
    activation: str, one: str, other: str, above: Sequence[float], images: int | None
) -> Difference:
    """By a paired t-test on how far ``one`` is ``above`` the ``other``, seed by seed.

    Where all seeds agree to the image, their spread is at least what counting images rounds off:
    few seeds agree by chance.
    """
    above = [round(value, EXACT) for value in above]
    mean = statistics.mean(above)
    better, worse = (one, other) if mean >= 0 else (other, one)
    effect = abs(mean)
    n, std = len(above), statistics.stdev(above)
    if not std and effect and images:
        std = 1 / (images * math.sqrt(6))  # two counts, each uniform within one image
    half = _half_width(n, std)
    p = _p_value(n, effect, std)
    return Difference(activation, better, worse, n, effect, effect - half, effect + half, p, p)


def _p_value(n: int, effect: float, std: float) -> float:
    """Two-sided, of a mean as far from 0 as ``effect`` where 0 is the truth."""
    from scipy.special import stdtr  # noqa: PLC0415 - scipy takes a second to import

    if not std:  # no seed says anything else
        return 0.0 if effect else 1.0
    return 2 * float(stdtr(n - 1, -effect / (std / math.sqrt(n))))


def _holm(p_values: Sequence[float]) -> list[float]:
    """Each p-value times how many are not smaller, no smaller than those before it, at most 1."""
    corrected, floor = list(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = floor
    return corrected


def sentences(outcomes: Outcomes, opening: str = "") -> list[str]:
    """What the comparison says: for each activation a sentence, with what is most sure first.

    What comes before the sentences is their ``opening``.

    Each sets the scheme of the highest mean against every other one. The activations with the
    largest significant difference come first, and in the order of ``outcomes`` otherwise. Numbers
    are percentages, or differences between them in points; after "±" stands half the width of
    the 95 % interval, and no difference "larger than" a number is the largest that the interval
    allows.
    """
    found, pairs, by_activation = rows(outcomes), differences(outcomes), _by_activation(outcomes)

    def settled(activation: str) -> float:
        """The largest significant difference there."""
        sure = (pair.effect for pair in pairs if pair.significant and pair.activation == activation)
        return max(sure, default=0.0)

    said = []
    for activation in sorted(by_activation, key=settled, reverse=True):
        table = _Table(
            by_activation[activation],
            [row for row in found if row.cell.activation == activation],
            [pair for pair in pairs if pair.activation == activation],
        )
        text = "; ".join([*_standing(table), *_lost(table)])
        schemes = tuple(f"{init}{end}" for init in table.outcomes for end in " ,")
        if len(by_activation) > 1:
            text = f"With {activation}, {text}"
        elif not opening and not text.startswith(schemes):
            # A scheme is written as it is, a word with a capital.
            text = text[0].upper() + text[1:]
        said.append(f"{opening}{text}.")
    return said


@dataclass(frozen=True)
class _Table:
    """What is known with one activation: ``outcomes`` by scheme, and what was made of them."""

    outcomes: Mapping[str, Sequence[Outcome]]
    rows: Sequence[Row]
    pairs: Sequence[Difference]

    @property
    def asked(self) -> int:
        """The most seeds that any scheme was trained with."""
        return max(map(len, self.outcomes.values()))

    def shared(self, one: str, other: str) -> int:
        """How many seeds both finished."""
        return len(_finished(self.outcomes[one]).keys() & _finished(self.outcomes[other]).keys())

    def number(self, n: int) -> str:
        """``n`` seeds of a pair, called shared where the two did not finish all."""
        return f"{n} seeds" if n == self.asked else f"{n} shared seeds"


def _standing(table: _Table) -> list[str]:
    """How the scheme of the highest mean does, beside every other one that finished."""
    finished = [row for row in table.rows if row.n]
    if not finished:
        return ["no training finished"]
    # A single seed can be set against nothing, so several come first.
    first = max(finished, key=lambda row: (row.n > 1, row.mean, row.n))
    others = [row for row in finished if row is not first]
    if first.n == 1 and others:
        return [_leaders(table, finished)]
    pairs = [pair for pair in table.pairs if first.cell.init in (pair.better, pair.worse)]
    clauses = _compared(table, first.cell.init, pairs) if pairs else [_reached(table, first)]
    return clauses + _too_few(table, first.cell.init, others)


def _reached(table: _Table, row: Row) -> str:
    assert row.mean is not None
    if row.low is None or row.high is None:
        more = ": more seeds would say how sure that is" if table.asked == 1 else ""
        return f"{row.cell.init} reaches {100 * row.mean:.1f} % with one seed{more}"
    shown = plus_minus(row.mean, (row.high - row.low) / 2)
    return f"{row.cell.init} reaches {shown} % over {row.n} seeds"


def _leaders(table: _Table, finished: Sequence[Row]) -> str:
    """Who is first where each scheme has one seed at most."""
    top = max(row.mean or 0.0 for row in finished)
    names = [row.cell.init for row in finished if row.mean == top]
    more = ": use more seeds" if table.asked == 1 else ""
    return (
        f"{_listed(names)} {'is' if len(names) == 1 else 'are'} first with {100 * top:.1f} %, but "
        f"one seed shows no difference{more}"
    )


def _compared(table: _Table, first: str, pairs: Sequence[Difference]) -> list[str]:
    """What is settled, what seems so until all pairs are thought of, and what is not seen."""
    pairs = sorted(pairs, key=lambda pair: pair.effect, reverse=True)
    sure = [pair for pair in pairs if pair.significant]
    likely = [pair for pair in pairs if pair.p <= ALPHA and not pair.significant]
    level = sorted((pair for pair in pairs if pair.p > ALPHA), key=lambda pair: pair.largest)
    units = chain([" points"], repeat(""))  # said once
    said_below = bool(level) and len({pair.n for pair in sure + level}) == 1
    clauses = []
    for group, beats, after in (
        (sure, "beats", ""),
        (likely, "may beat", ", too few to settle it"),
    ):
        # Another may do better on shared seeds: its mean is lower by its others.
        for winner in dict.fromkeys([first, *(pair.better for pair in group)]):
            won = [pair for pair in group if pair.better == winner]
            if won:
                bare = group is sure and said_below
                over = _by(table, won, units, bare=bare)
                clauses.append(f"{winner} {beats} {over}{after}")
    return clauses + _level(table, first, level, units)


def _by(table: _Table, won: Sequence[Difference], units: Iterator[str], *, bare: bool) -> str:
    """By how much each is beaten, and over how many seeds unless that is said elsewhere."""
    same = len({pair.n for pair in won}) == 1
    text = _listed(
        [
            f"{pair.worse} by {plus_minus(pair.effect, pair.high - pair.effect)}{next(units)}"
            f"{'' if same else f' ({table.number(pair.n)})'}"
            for pair in won
        ]
    )
    return f"{text} over {table.number(won[0].n)}" if same and not bare else text


def _level(
    table: _Table, first: str, level: Sequence[Difference], units: Iterator[str]
) -> list[str]:
    """The pairs without a difference that could be told, those with the narrowest bound first."""
    bounded: list[str] = []
    unknown: list[str] = []
    before = None
    for pair in level:
        other = pair.worse if pair.better == first else pair.better
        seeds = table.number(pair.n)
        if pair.largest >= 1:  # any two schemes are within 100 points
            unknown.append(f"{seeds} are too few to tell {first} from {other}")
            continue
        show = "" if pair.n == before else f"{seeds} show "
        none = "none" if bounded else "no difference"
        bound = "at all"
        if pair.largest:
            bound = f"larger than {_upper(pair)}{next(units)}"
        bounded.append(f"between {first} and {other} {show}{none} {bound}")
        before = pair.n
    return ([_listed(bounded)] if bounded else []) + unknown


def _too_few(table: _Table, first: str, others: Sequence[Row]) -> list[str]:
    """The schemes that no interval of a difference is known for."""
    clauses = []
    for row in others:
        other = row.cell.init
        shared = table.shared(first, other)
        if shared < 2:
            seeds = "only one seed" if shared else "no seed"
            clauses.append(f"{first} and {other} finished {seeds} in common, too few to compare")
    return clauses


def _lost(table: _Table) -> list[str]:
    """Whose seeds diverged and how many, schemes with the same share together."""
    shares: dict[str, list[str]] = {}
    for row in table.rows:
        asked = len(table.outcomes[row.cell.init])
        share = f"{row.diverged} of {asked} seeds"
        if row.diverged == asked:
            share = {1: "the only seed", 2: "both seeds"}.get(asked, f"all {asked} seeds")
        if row.diverged:
            shares.setdefault(share, []).append(row.cell.init)
    verbs = chain(["diverged with"], repeat("with"))  # said once
    clauses = [f"{_listed(names)} {next(verbs)} {share}" for share, names in shares.items()]
    said = [_listed(clauses)] if clauses else []
    without = [row.cell.init for row in table.rows if not (row.n or row.diverged)]
    if without and len(without) < len(table.rows):
        said.append(f"{_listed(without)} finished no seed")
    return said


def _listed(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def plus_minus(value: float, half: float) -> str:
    """Of fractions, in points: ``4.9 ± 0.3``; with more decimals where fewer would mislead."""
    value, half = 100 * value, 100 * half
    decimals = _decimals(half)
    # A value that is above its half width is to look so.
    while decimals < EXACT and value > half and round(value, decimals) <= round(half, decimals):
        decimals += 1
    return f"{value:.{decimals}f} ± {half:.{decimals}f}"


def _upper(pair: Difference) -> str:
    """The largest difference that is possible, in points, rounded up so that it stays true."""
    unit = Decimal(1).scaleb(-_decimals(100 * (pair.high - pair.effect)))
    points = Decimal(f"{100 * pair.largest:.{EXACT}g}")  # without the rounding of the product
    return f"{points.quantize(unit, ROUND_CEILING):f}"


def _decimals(half: float) -> int:
    """One, or as many as show two digits of a half width, in points, that one would make 0.0."""
    return 1 if half == 0 or half >= 0.05 else 1 - math.floor(math.log10(half))


def as_json(
    rows: Sequence[Row], differences: Sequence[Difference], sentences: Sequence[str]
) -> dict[str, Any]:
    """``rows`` and ``differences``, each a list of objects, and ``sentences``; None is null."""
    return {
        "rows": [_values(row) for row in rows],
        "differences": [
            {
                "activation": pair.activation,
                "better": pair.better,
                "worse": pair.worse,
                "n": pair.n,
                "effect": pair.effect,
                "low": pair.low,
                "high": pair.high,
                "p": pair.p,
                "p_holm": pair.p_holm,
                "significant": pair.significant,
            }
            for pair in differences
        ],
        "sentences": list(sentences),
    }


def as_csv(rows: Sequence[Row]) -> str:
    """A line for each row below one of names; what is not known is empty.

    A scheme's spec may start like a formula of a spreadsheet, as that of ``=1.py:f`` does: such
    a cell gets an apostrophe in front, which keeps it text. Numbers stay as they are.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: harmless(value) for name, value in _values(row).items()})
    return text.getvalue()


def _values(row: Row) -> dict[str, str | float | None]:
    accuracy = (row.mean, row.std, row.low, row.high)
    values = (*row.cell, row.n, *accuracy, row.to_90, row.to_95, row.diverged)
    return dict(zip(COLUMNS, values, strict=True))


def harmless(value: str | float | None) -> str | float | None:
    return f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@\t\r")) else value


def percent(fraction: float | None) -> str:
    """Without its sign: 97.54."""
    return NONE if fraction is None else _signed(f"{100 * fraction:.2f}")


def interval(low: float | None, high: float | None) -> str:
    return NONE if low is None or high is None else f"{percent(low)} to {percent(high)}"


def whole(number: int | None) -> str:
    return NONE if number is None else f"{number:,}"


def p_value(p: float) -> str:
    """To three decimals, of larger ones to two."""
    if math.isnan(p):
        return NONE
    if p < 0.001:
        return "< 0.001"
    return f"{p:.2f}" if p >= 0.0995 else f"{p:.3f}"


def _signed(number: str) -> str:
    """With a minus as long as a plus; and none before 0.00."""
    bare = number.removeprefix("-")
    return bare if not bare.strip("0.") or bare == number else f"−{bare}"

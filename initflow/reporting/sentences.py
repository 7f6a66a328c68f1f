"""What the statistics of a comparison say, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from itertools import chain, repeat

from initflow.reporting.formats import EXACT, counted, decimals, plus_minus, short
from initflow.reporting.seed_statistics import (
    ACCURACY,
    ALPHA,
    Difference,
    Measure,
    Outcome,
    Outcomes,
    Row,
    by_activation,
    differences,
    finished,
    rows,
)

MANY = 8  # schemes that a clause names; of more those at its ends


def comparison_sentences(
    outcomes: Outcomes, opening: str = "", measure: Measure = ACCURACY
) -> list[str]:
    """What the comparison says: for each activation a sentence, with what is most sure first.

    What comes before the sentences is their ``opening``.

    Each sets the scheme of the best mean against every other one. The activations with the
    largest significant difference come first, and in the order of ``outcomes`` otherwise. Numbers
    are percentages, or differences between them in points; after "±" stands half the width of
    the 95 % interval, and no difference "larger than" a number is the largest that the interval
    allows. A ``measure`` that is no share is told by its plain numbers.
    """
    found, tables = rows(outcomes), by_activation(outcomes)
    pairs = differences(outcomes, measure)

    def settled(activation: str) -> float:
        """The largest significant difference there."""
        sure = (pair.effect for pair in pairs if pair.significant and pair.activation == activation)
        return max(sure, default=0.0)

    said = []
    for activation in sorted(tables, key=settled, reverse=True):
        table = _Table(
            {cell.init: outcomes[cell] for cell in tables[activation]},
            [row for row in found if row.cell.activation == activation],
            [pair for pair in pairs if pair.activation == activation],
            measure,
        )
        text = "; ".join([*_standing(table), *_lost(table)])
        schemes = tuple(f"{init}{end}" for init in table.outcomes for end in " ,")
        if len(tables) > 1:
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
    measure: Measure

    @property
    def requested(self) -> int:
        """The most seeds that any scheme was trained with."""
        return max(map(len, self.outcomes.values()))

    def shared(self, one: str, other: str) -> int:
        """How many seeds both finished."""
        return len(finished(self.outcomes[one]).keys() & finished(self.outcomes[other]).keys())

    def number(self, n: int) -> str:
        """``n`` seeds of a pair, called shared where the two did not finish all; or runs."""
        is_all = n == self.requested or not self.measure.is_paired
        return f"{n} {self.measure.unit}s" if is_all else f"{n} shared seeds"

    def plus_minus(self, value: float, half: float) -> str:
        return plus_minus(value, half, is_share=self.measure.is_share)

    def value(self, mean: float) -> str:
        return f"{100 * mean:.1f} %" if self.measure.is_share else short(mean)

    def points(self) -> Iterator[str]:
        """What stands behind the numbers of differences, said once."""
        return chain([" points" if self.measure.is_share else ""], repeat(""))


def _standing(table: _Table) -> list[str]:
    """How the scheme of the highest mean does, beside every other one that finished."""
    finished = [row for row in table.rows if row.n]
    if not finished:
        return ["no training finished"]
    # A single seed can be set against nothing, so several come first.
    sign = table.measure.sign
    first = max(finished, key=lambda row: (row.n > 1, sign * (row.mean or 0.0), row.n))
    others = [row for row in finished if row is not first]
    if first.n == 1 and others:
        return [_leaders(table, finished)]
    pairs = [pair for pair in table.pairs if first.cell.init in (pair.better, pair.worse)]
    clauses = _compared(table, first.cell.init, pairs) if pairs else [_reached(table, first)]
    return clauses + _too_few(table, first.cell.init, others)


def _reached(table: _Table, row: Row) -> str:
    assert row.mean is not None
    if row.low is None or row.high is None:
        unit = table.measure.unit
        more = f": more {unit}s would say how sure that is" if table.requested == 1 else ""
        return f"{row.cell.init} reaches {table.value(row.mean)} with one {unit}{more}"
    shown = table.plus_minus(row.mean, (row.high - row.low) / 2)
    percent = " %" if table.measure.is_share else ""
    return f"{row.cell.init} reaches {shown}{percent} over {row.n} {table.measure.unit}s"


def _leaders(table: _Table, finished: Sequence[Row]) -> str:
    """Who is first where each scheme has one seed at most."""
    unit, sign = table.measure.unit, table.measure.sign
    top = sign * max(sign * (row.mean or 0.0) for row in finished)
    names = [row.cell.init for row in finished if row.mean == top]
    more = f": use more {unit}s" if table.requested == 1 else ""
    return (
        f"{_listed(names)} {'is' if len(names) == 1 else 'are'} first with {table.value(top)}, "
        f"but one {unit} shows no difference{more}"
    )


def _compared(table: _Table, first: str, pairs: Sequence[Difference]) -> list[str]:
    """What is settled, what seems so until all pairs are thought of, and what is not seen."""
    pairs = sorted(pairs, key=lambda pair: pair.effect, reverse=True)
    sure = [pair for pair in pairs if pair.significant]
    likely = [pair for pair in pairs if pair.p <= ALPHA and not pair.significant]
    level = sorted((pair for pair in pairs if pair.p > ALPHA), key=lambda pair: pair.largest)
    units = table.points()
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

    def told(pairs: Sequence[Difference]) -> list[str]:
        return [
            f"{pair.worse} by {table.plus_minus(pair.effect, pair.high - pair.effect)}{next(units)}"
            f"{'' if same else f' ({table.number(pair.n)})'}"
            for pair in pairs
        ]

    if len(won) > MANY:
        end = MANY // 2 - 1
        largest, between, smallest = won[:end], won[end:-end], won[-end:]
        low, high = (
            table.value(pair.effect).removesuffix(" %") for pair in (between[-1], between[0])
        )
        others = f"{len(between)} others by {low} to {high}"
        text = _listed([*told(largest), others, *told(smallest)])
    else:
        text = _listed(told(won))
    return f"{text} over {table.number(won[0].n)}" if same and not bare else text


def _level(
    table: _Table, first: str, level: Sequence[Difference], units: Iterator[str]
) -> list[str]:
    """The pairs without a difference that could be told, those with the narrowest bound first."""
    bounded: list[str] = []
    before = None
    # Any two shares are within 100 points.
    is_share = table.measure.is_share
    unknown = [pair for pair in level if is_share and pair.largest >= 1]
    level = [pair for pair in level if pair not in unknown]
    shown = level[: MANY - 2] if len(level) > MANY else level
    rest = level[len(shown) :]
    for pair in shown:
        other = pair.worse if pair.better == first else pair.better
        show = "" if pair.n == before else f"{table.number(pair.n)} show "
        none = "none" if bounded else "no difference"
        bound = "at all"
        if pair.largest:
            bound = f"larger than {_upper(pair, is_share=is_share)}{next(units)}"
        bounded.append(f"between {first} and {other} {show}{none} {bound}")
        before = pair.n
    if rest:
        bounded.append(
            f"between {first} and {len(rest)} others none larger than "
            f"{_upper(rest[-1], is_share=is_share)}"
        )
    return ([_listed(bounded)] if bounded else []) + _unknown(table, first, unknown)


def _unknown(table: _Table, first: str, pairs: Sequence[Difference]) -> list[str]:
    """The pairs of which the seeds bound nothing."""
    if len(pairs) > MANY:
        fewest, most = min(pair.n for pair in pairs), max(pair.n for pair in pairs)
        n = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        return [f"{n} {table.measure.unit}s are too few to tell {first} from {len(pairs)} others"]
    others = (pair.worse if pair.better == first else pair.better for pair in pairs)
    return [
        f"{table.number(pair.n)} are too few to tell {first} from {other}"
        for pair, other in zip(pairs, others, strict=True)
    ]


def _too_few(table: _Table, first: str, others: Sequence[Row]) -> list[str]:
    """The schemes that no interval of a difference is known for."""
    clauses = []
    for row in others:
        other = row.cell.init
        shared = table.shared(first, other)
        if not table.measure.is_paired and row.n < 2:
            clauses.append(f"{other} has only one run, too few to compare")
        elif table.measure.is_paired and shared < 2:
            seeds = "only one seed" if shared else "no seed"
            clauses.append(f"{first} and {other} finished {seeds} in common, too few to compare")
    return clauses


def _lost(table: _Table) -> list[str]:
    """Whose seeds diverged and how many, schemes with the same share together."""
    shares: dict[str, list[str]] = {}
    unit = table.measure.unit
    for row in table.rows:
        requested = len(table.outcomes[row.cell.init])
        share = f"{row.diverged} of {counted(requested, unit)}"
        if row.diverged == requested:
            share = {1: f"the only {unit}", 2: f"both {unit}s"}.get(
                requested, f"all {requested} {unit}s"
            )
        if row.diverged:
            shares.setdefault(share, []).append(row.cell.init)
    verbs = chain(["diverged with"], repeat("with"))  # said once
    clauses = [f"{_listed(names)} {next(verbs)} {share}" for share, names in shares.items()]
    said = [_listed(clauses)] if clauses else []
    without = [row.cell.init for row in table.rows if not (row.n or row.diverged)]
    if without and len(without) < len(table.rows):
        said.append(f"{_listed(without)} finished no {unit}")
    return said


def _listed(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _upper(pair: Difference, *, is_share: bool) -> str:
    """The largest difference that is possible, of shares in points, rounded up to stay true."""
    scale = 100 if is_share else 1
    half = scale * (pair.high - pair.effect)
    unit = Decimal(1).scaleb(-decimals(half, is_share=is_share))
    points = Decimal(f"{scale * pair.largest:.{EXACT}g}")  # without the rounding of the product
    return f"{points.quantize(unit, ROUND_CEILING):f}"

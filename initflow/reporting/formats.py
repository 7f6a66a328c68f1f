"""How numbers are written: percentages, intervals, p-values, and what is safe in a CSV file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence

from initflow.core.configurations import TrainConfig

NONE = "–"  # where there is no number
EXACT = 12  # decimals: accuracies are counts over images, what differs beyond these is rounding


def plus_minus(value: float, half: float, *, is_share: bool = True) -> str:
    """Of shares, in points: ``4.9 ± 0.3``; with more decimals where fewer would mislead.

    Other numbers stand as they are, with two digits of the ``half`` width.
    """
    if is_share:
        value, half = 100 * value, 100 * half
    places = decimals(half, is_share=is_share)
    # A value that is above its half width is to look so.
    while places < EXACT and value > half and round(value, places) <= round(half, places):
        places += 1
    return f"{value:.{places}f} ± {half:.{places}f}"


def decimals(half: float, *, is_share: bool = True) -> int:
    """One, or as many as show two digits of a half width, in points, that one would make 0.0.

    Of what is no share always as many as show two digits, and four where there is no width.
    """
    if is_share and (half == 0 or half >= 0.05):
        return 1
    return max(0, 1 - math.floor(math.log10(half))) if half else 4


def as_csv(rows: Sequence[Mapping[str, str | float | None]], columns: Sequence[str]) -> str:
    """A line for each of ``rows`` below one of the ``columns``; what is not known is empty.

    A scheme's spec may start like a formula of a spreadsheet, as that of ``=1.py:f`` does: such
    a cell gets an apostrophe in front, which keeps it text. Numbers stay as they are.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _harmless(value) for name, value in row.items()})
    return text.getvalue()


def _harmless(value: str | float | None) -> str | float | None:
    return f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@\t\r")) else value


def percent(fraction: float | None) -> str:
    """Without its sign: 97.54."""
    return NONE if fraction is None else _signed(f"{100 * fraction:.2f}")


def interval(low: float | None, high: float | None) -> str:
    return NONE if low is None or high is None else f"{percent(low)} to {percent(high)}"


def whole(number: int | None) -> str:
    return NONE if number is None else f"{number:,}"


def training_length(config: TrainConfig) -> str:
    """``5 epochs``, ``at most 300 updates of 5 epochs``."""
    if config.updates is None:
        return counted(config.epochs, "epoch")
    return f"at most {counted(config.updates, 'update')} of {counted(config.epochs, 'epoch')}"


def counted(n: int, what: str) -> str:
    """``1 seed``, ``5 seeds``."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def rounded(number: float | None) -> str:
    """To three digits."""
    return NONE if number is None else f"{number:.3g}"


def short(number: float) -> str:
    """To four digits, whole numbers as they are: ``0.9764``, ``12000``, ``1.3e-07``."""
    return f"{number:.0f}" if number == round(number, 0) and abs(number) < 1e9 else f"{number:.4g}"


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

"""A result as one page of HTML that needs nothing else: values in, text out.

What a page holds is given as sections of blocks; all of it is escaped.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from initflow.core.configurations import kind_word
from initflow.reporting import thinning
from initflow.reporting.formats import NONE, interval, p_value, percent, whole
from initflow.reporting.seed_statistics import ALPHA, Difference, Row

DENSITY = 1.5  # pixels of a picture on one of the page, so that it is sharp on fine screens too
LONG = 16  # rows, from which on a table waits folded


class Column(NamedTuple):
    """``number``: aligned to the right, in digits of one width."""

    name: str
    number: bool = False


def columns(*names: str, numbers: Sequence[str] = ()) -> list[Column]:
    """Columns of text by ``names``, then of ``numbers``."""
    return [*map(Column, names), *(Column(name, number=True) for name in numbers)]


@dataclass(frozen=True)
class Table:
    """A row's first cell is its heading; the rows with these indices are ``faint``, that is grey.

    A table with columns of numbers scrolls sideways where it is too wide; others wrap.
    """

    kind: ClassVar = "table"
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    note: str = ""
    faint: Collection[int] = ()


@dataclass(frozen=True)
class Picture:
    """``png``: the file's content; ``alt``: what it shows, for who cannot see it."""

    kind: ClassVar = "picture"
    png: bytes
    alt: str
    caption: str = ""

    @property
    def source(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height on the page, so that nothing moves when it appears."""
        width, height = struct.unpack(">II", self.png[16:24])  # where every PNG states them
        return round(width / DENSITY), round(height / DENSITY)


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar = "text"
    text: str


@dataclass(frozen=True)
class Listing:
    """Items with a dot before each."""

    kind: ClassVar = "listing"
    items: Sequence[str]


@dataclass(frozen=True)
class Links:
    """(text, address) pairs; only what starts with http:// or https:// becomes a link."""

    kind: ClassVar = "links"
    links: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Command:
    """Lines for a terminal."""

    kind: ClassVar = "command"
    text: str


Block = Table | Picture | Text | Listing | Links | Command


@dataclass(frozen=True)
class Section:
    """``folded``: only the heading is seen, until it is clicked."""

    heading: str
    blocks: Sequence[Block]
    folded: bool = False


def page(
    *, title: str, lead: Sequence[str], sections: Sequence[Section], warnings: Sequence[str] = ()
) -> str:
    """The whole page: ``lead``, paragraphs in large letters, is what is seen first."""
    environment = Environment(
        loader=PackageLoader("initflow.reporting", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html")
    return template.render(title=title, lead=lead, sections=sections, warnings=warnings)


def comparison_sections(
    rows: Sequence[Row], differences: Sequence[Difference], pictures: Mapping[str, bytes]
) -> list[Section]:
    """Of schemes, activation functions and seeds; the figures, where there are, as PNG files."""
    thinned = f" Shown are {said}" if (said := thinning.sentence(rows)) else ""
    accuracies = pictured(
        pictures.get("accuracies"),
        "For each scheme the final test accuracy of every seed as a dot, and their mean with its "
        "95 % interval. The table below has the numbers.",
    )
    curves = pictured(
        pictures.get("learning_curves"),
        "Test accuracy over the iterations for each scheme, the mean over the seeds within a "
        "band from the lowest to the highest seed.",
        "Towards 100 % the axis is stretched: equal distances on it are equal factors of the "
        f"error.{thinned}",
    )
    signals = pictured(
        pictures.get("signals_by_layer"),
        "For each scheme the variances of the pre-activations and of the gradient, layer by "
        "layer, before training.",
        "Before training, on one and the same set of images: what reaches each layer on the "
        f"way forward, and on the way back. A level line is what most schemes aim at.{thinned}",
    )
    sections = [Section("Accuracy", [*accuracies, accuracy_table(rows)])]
    if differences:
        many = len(differences) > LONG
        heading = f"Differences, all {len(differences)} pairs" if many else "Differences"
        sections.append(Section(heading, [difference_table(differences)], folded=many))
    named = {"Learning curves": curves, "Signals at step 0": signals}
    return [*sections, *(Section(name, blocks) for name, blocks in named.items() if blocks)]


def colophon(
    *,
    configuration: Mapping[str, str],
    environment: Mapping[str, str],
    command: str,
    links: Sequence[tuple[str, str]] = (),
) -> list[Section]:
    """What a page ends with: how it came about, and how to make it again."""
    sections = [
        Section("Configuration", [settings_table("What was set", configuration)], folded=True),
        Section("Environment", [settings_table("What it ran on", environment)], folded=True),
        Section("Make it again", [Command(command)]),
    ]
    return [*sections, Section("Links", [Links(links)])] if links else sections


def pictured(png: bytes | None, says: str, caption: str = "") -> list[Picture]:
    """The figure with what it says in words, where there is one."""
    return [Picture(png, says, caption)] if png else []


def accuracy_table(rows: Sequence[Row]) -> Table:
    return Table(
        "Final test accuracy, in percent",
        columns(
            "scheme",
            kind_word(row.cell.activation for row in rows),
            numbers=("seeds", "mean", "95 % interval", "std", "to 90 %", "to 95 %", "diverged"),
        ),
        [
            (
                row.cell.init,
                row.cell.activation,
                str(row.n),
                percent(row.mean),
                interval(row.low, row.high),
                percent(row.std),
                whole(row.to_90),
                whole(row.to_95),
                str(row.diverged),
            )
            for row in rows
        ],
        "Mean over the seeds that finished, its 95 % interval by Student's t, and the standard "
        "deviation from seed to seed. To 90 % and to 95 %: iterations until so much was first "
        f"seen, in the median over all seeds; {NONE} where more than half of them never got there.",
    )


def difference_table(differences: Sequence[Difference]) -> Table:
    """What may be chance is grey."""
    return Table(
        "Differences, in percentage points",
        columns(
            "better",
            "than",
            kind_word(difference.activation for difference in differences),
            numbers=("seeds", "difference", "95 % interval", "p", "p, Holm"),
        ),
        [
            (
                difference.better,
                difference.worse,
                difference.activation,
                str(difference.n),
                percent(difference.effect),
                interval(difference.low, difference.high),
                p_value(difference.p),
                p_value(difference.p_holm),
            )
            for difference in differences
        ],
        "Of the mean test accuracies on the seeds that both finished, by the paired t-test; the "
        "last column is p corrected by Holm's method for the number of pairs, "
        f"{len(differences)}. Grey: there it is above {ALPHA}, so the difference may be chance.",
        faint={i for i, d in enumerate(differences) if not d.significant},
    )


def settings_table(caption: str, settings: Mapping[str, str]) -> Table:
    return Table(caption, columns("name", "value"), list(settings.items()))

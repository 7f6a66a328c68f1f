"""What the terminal shows of a result; nothing here prints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from initflow.core.configurations import RECOMMENDED, TrainConfig, kind_word
from initflow.reporting import trials
from initflow.reporting.formats import NONE, interval, percent, rounded, whole
from initflow.reporting.pictures import rates_sections
from initflow.reporting.pictures.trainability_statistics import edge_rows
from initflow.reporting.published import explained

if TYPE_CHECKING:
    from initflow.core.environment import Change
    from initflow.diagnostics.catalogue import SchemeEntry
    from initflow.diagnostics.reading import Growth, Reading
    from initflow.experiments.comparisons.rates import Rates
    from initflow.experiments.comparisons.reproduce import Reproduction
    from initflow.experiments.replay.retraining import Part, Replay
    from initflow.experiments.train import Training
    from initflow.experiments.untrained.diagnosis import Diagnosis
    from initflow.reporting.pictures.planes import Mark
    from initflow.reporting.pictures.rates_statistics import Row as RatesRow
    from initflow.reporting.pictures.trainability_statistics import Plane
    from initflow.reporting.seed_statistics import Row as ComparisonRow
    from initflow.reporting.trials import Tuned
    from initflow.testing import RuleResult

OF_MLP = (
    "Theory of such layers: q* the variance they lead to, χ₁ the gradient's factor per layer, ξ_c "
    "the number of layers over which the correlation of two images comes e-fold nearer to its "
    "limit."
)
OF_MODEL = "outside: layers that lie outside of their band, where 95 % of further draws lie."
OF_PLANE = (
    "q*: the variance that layers lead to; χ₁: the gradient's factor per layer; c*: the "
    "correlation that two images come to; ξ: layers over which the distances from q* and c* change "
    "e-fold."
)
FAILURES = 3  # of each rule, as many are told
WIDE = 100  # columns of a terminal, from which on predictions have room
NAME = 20  # letters of a name that are not folded for what stands beside it
UNLIMITED = 10_000  # columns
FACTS = 50  # beside packages, more than there are
PACKAGES = 5  # that have another version, as many are told
TOLD = 20  # letters, at least, of a value that stands beside another one
PACKAGE = "package "
FOLDED: Mapping[str, Any] = {"overflow": "fold"}
FIXED: Mapping[str, Any] = {"no_wrap": True}
NUMBER: Mapping[str, Any] = {"no_wrap": True, "justify": "right"}
VERDICT_STYLES = {"identical": "green", "tolerable": "yellow", "different": "red"}


def _table(columns: Mapping[str, Mapping[str, Any]], caption: str | None = None) -> Table:
    """Columns by name, each one of :data:`FOLDED`, :data:`FIXED` and :data:`NUMBER`."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    for name, kind in columns.items():
        table.add_column(name, **kind)
    return table


def closing_table(result: Training) -> Table:
    """Scheme, accuracy, time and run id of one training."""
    table = Table()
    table.add_column("scheme", overflow="fold")
    for column in ("test accuracy", "time", "run id"):
        table.add_column(column, no_wrap=True)
    accuracy = result.last("accuracy/test")
    shown = "not measured" if accuracy is None else f"{accuracy:.2%}"
    if result.diverged_at is not None:
        shown = f"diverged at {result.diverged_at:,}"
    seconds = f"{result.seconds:.2g} s" if result.seconds < 10 else f"{result.seconds:.0f} s"
    table.add_row(Text(result.scheme.spec), shown, seconds, result.run_id)
    return table


def diagnosis_table(diagnosis: Diagnosis, columns: int) -> Table:
    """The verdict and the numbers of each network, with what was predicted if there is room."""
    if columns < WIDE:
        return _diagnosis_table(diagnosis, None)
    table = _diagnosis_table(diagnosis, " ")
    folded = max((len(init) - NAME for init, _ in diagnosis.readings), default=0)
    room = Console(width=UNLIMITED).measure(table).maximum - max(0, folded)
    return table if room <= columns else _diagnosis_table(diagnosis, "\n")


def _diagnosis_table(diagnosis: Diagnosis, between: str | None) -> Table:
    bracketed = (
        ""
        if between is None
        else "; in brackets, what half of all such networks lie below, and where 95 % of them lie"
    )
    is_of_mlp = all(reading.mean_field for reading in diagnosis.readings.values())
    hidden, ending = (" hidden", OF_MLP) if is_of_mlp else ("", OF_MODEL)
    numbers = ["signal", "gradient", *(("q*", "χ₁", "ξ_c") if is_of_mlp else ("outside",))]
    caption = (
        f"signal: the mean square of the pre-activations at the last{hidden} layer, over the first "
        f"one's; gradient: at the first, over the last one's{bracketed}. {ending}"
    )
    kind = kind_word(cell.activation for cell in diagnosis.readings)
    words = dict.fromkeys((kind, "forward", "backward"), FIXED)
    table = _table({"scheme": FOLDED, **words, **dict.fromkeys(numbers, NUMBER)}, caption)
    for (init, activation), reading in diagnosis.readings.items():
        theory = reading.mean_field
        table.add_row(
            Text(init),
            activation,
            _coloured(reading.verdict.forward),
            _coloured(reading.verdict.backward),
            *(
                _changed(reading.changes.get(f"{what}_second_moment"), between)
                for what in ("preactivation", "gradient")
            ),
            *(map(_number, (theory.q_star, theory.chi_1, theory.xi_c)) if theory else ()),
            *([] if theory else [_outside(reading)]),
        )
    return table


def phase_table(marks: Sequence[Mark]) -> Table:
    """Where schemes lie on the plane of σ_w² and σ_b², and what a deep network is there."""
    caption = f"σ_w² = fan-in · Var(W), σ_b² = Var(b). {OF_PLANE}"
    numbers = ("σ_w²", "σ_b²", "q*", "χ₁", "c*", "ξ_q", "ξ_c")
    table = _table({"scheme": FOLDED, **dict.fromkeys(numbers, NUMBER), "phase": FIXED}, caption)
    for mark in marks:
        its = mark.field
        values = (mark.sigma_w2, mark.sigma_b2, *vars(its).values())
        table.add_row(Text(mark.init), *map(_number, values), mark.phase)
    return table


def _outside(reading: Reading) -> str:
    """How many layers are outside of the band of a quantity, of all that have one."""
    outside = {layer for layers in reading.outside().values() for layer in layers}
    return f"{len(outside)} of {len(reading.signals.layers)}"


def _coloured(verdict: str) -> Text:
    return Text(verdict, style="green" if verdict == "stable" else "red")


def _changed(change: Growth | None, between: str | None) -> str:
    """A measured factor and, where there is what stands ``between``, (its median: its band)."""
    if change is None:
        return NONE
    measured, of_one = _ratio(change.measured), change.predicted
    if between is None or math.isnan(of_one.low):
        return measured
    band = f"{_ratio(of_one.low)}–{_ratio(of_one.high)}"
    return f"{measured} ({_ratio(of_one.median)}:{between}{band})"


def _number(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    if value is None or math.isnan(value):
        return NONE
    return f"{value:.2g}" if math.isfinite(value) else "∞"


def schemes_table(entries: Sequence[SchemeEntry]) -> Table:
    """A row for each scheme that can be used, then one for each broken one with its cause."""
    usable = [entry for entry in entries if not entry.broken]
    first = usable[0].layers[0]
    caption = (
        f"variance: of the weights of the first layer, {first.fan_in} inputs to {first.fan_out} "
        "units, as the scheme states it; – where it states none. A scheme fills one layer after "
        "the other, some with its biases, or the whole network, seeing images."
    )
    longest = max((len(entry.name) for entry in usable if ":" not in entry.name), default=0)
    scheme = {**FOLDED, "min_width": longest}
    whose = {"scheme": scheme, "from": FOLDED, "fills": FIXED}
    table = _table({**whose, "variance": NUMBER, "arguments": FOLDED}, caption)
    for entry in usable:
        table.add_row(
            Text(entry.name),
            Text(entry.provider),
            _fills(entry),
            rounded(entry.layers[0].stated_variance),
            Text(", ".join(f"{name}={value}" for name, value in entry.arguments.items())),
        )
    return table


def broken_lines(entries: Sequence[SchemeEntry]) -> list[str]:
    """Why each of those that cannot be used cannot."""
    return [f"Broken: {entry.broken}" for entry in entries if entry.broken]


def layers_table(entry: SchemeEntry) -> Table:
    """What a scheme states of each layer's weights, and what it really gives."""
    numbers = ("inputs", "units", "stated std", "std", "std of biases")
    table = _table({"layer": {}, **dict.fromkeys(numbers, NUMBER)})
    for layer in entry.layers:
        stated = None if layer.stated_variance is None else math.sqrt(layer.stated_variance)
        cells = map(rounded, (stated, layer.weight_std, layer.bias_std))
        table.add_row(layer.name, str(layer.fan_in), str(layer.fan_out), *cells)
    return table


def scheme_lines(entry: SchemeEntry) -> list[str]:
    """What a scheme is, in the words of its own docstring."""
    arguments = ", ".join(f"{name}={value}" for name, value in entry.arguments.items())
    return [
        f"{entry.name}, from {entry.provider}; fills {_fills(entry)}",
        f"Arguments: {arguments or 'none'}",
        "",
        *(entry.description or "(its function has no docstring)").splitlines(),
    ]


def _fills(entry: SchemeEntry) -> str:
    return (
        f"{entry.fills}, bias" if entry.sets_biases and entry.fills == "layer" else str(entry.fills)
    )


def check_table(rows: Sequence[RuleResult]) -> Table:
    """The conformance table; what failed is told below it."""
    table = _table({"": FIXED, "rule": FIXED, "cases": NUMBER, "it …": FOLDED})
    for row in rows:
        mark = Text("✓", style="green") if row.passed else Text("✗", style="red")
        meaning = f"{row.meaning} ({row.note})" if row.note else row.meaning
        table.add_row(mark, row.rule, str(row.cases) if row.cases else NONE, Text(meaning))
    return table


def failure_lines(rows: Sequence[RuleResult]) -> list[str]:
    """The first failures of each rule."""
    lines = []
    for row in rows:
        lines += [f"{row.rule}: {failure}" for failure in row.failures[:FAILURES]]
        if len(row.failures) > FAILURES:
            lines.append(f"{row.rule}: and {len(row.failures) - FAILURES} more")
    return lines


def comparison_table(rows: Sequence[ComparisonRow], columns: int = WIDE) -> Table:
    """Of each scheme with each activation, the accuracies over the seeds.

    On few ``columns`` without the standard deviation and the iterations to 95 %.
    """
    wide = columns >= WIDE
    deviation, further = (", standard deviation", " and 95 % were") if wide else ("", " was")
    caption = (
        f"Test accuracy in percent: mean over the seeds that finished, 95 % t-interval{deviation}; "
        f"iterations until 90 %{further} first seen, in the median over all seeds."
    )
    shown: dict[str, Callable[[ComparisonRow], str]] = {
        "seeds": lambda row: str(row.n),
        "mean": lambda row: percent(row.mean),
        "95 % interval": lambda row: interval(row.low, row.high),
        "std": lambda row: percent(row.std),
        "to 90 %": lambda row: whole(row.to_90),
        "to 95 %": lambda row: whole(row.to_95),
    }
    if not wide:
        del shown["std"], shown["to 95 %"]
    numbers = dict.fromkeys((*shown, "diverged"), NUMBER)
    kind = kind_word(row.cell.activation for row in rows)
    table = _table({"scheme": FOLDED, kind: FIXED, **numbers}, caption)
    for row in rows:
        table.add_row(
            Text(row.cell.init),
            row.cell.activation,
            *(show(row) for show in shown.values()),
            Text(str(row.diverged), style="red" if row.diverged else ""),
        )
    return table


def reproduction_table(result: Reproduction, columns: int = WIDE) -> Table:
    """Each row's published accuracies beside ours, iteration by iteration; else its last one.

    On few ``columns`` without the interval of the mean.
    """
    wide = columns >= WIDE
    caption = (
        "Test accuracy in percent: the published one, and the mean of ours"
        f"{' with its 95 % t-interval' if wide else ''}. A published number is of one seed: it is "
        "explained where it lies within what 95 % of single seeds give, by the spread of ours."
    )
    intervals = ("95 % interval", "single seeds") if wide else ("single seeds",)
    numbers = dict.fromkeys(("iteration", "published", "ours", *intervals), NUMBER)
    explanation = {"explained": {"min_width": len("explained")}}
    table = _table({"row": FOLDED, **numbers, **explanation}, caption)
    for row in result.table.rows:
        found = {check.iteration: check for check in result.checks[row.name]}
        for iteration, theirs in row.published:
            check = found.get(iteration)
            table.add_row(
                Text(row.name if iteration == row.published[0][0] else ""),
                whole(iteration),
                percent(theirs),
                percent(check.mean if check else None),
                *([interval(check.low, check.high) if check else NONE] if wide else []),
                interval(check.seed_low, check.seed_high) if check else NONE,
                explained(check),
            )
        if not row.published:
            ours = result.rows[row.name]
            of_mean = [interval(ours.low, ours.high)] if wide else []
            table.add_row(Text(row.name), "last", NONE, percent(ours.mean), *of_mean, NONE, NONE)
        table.add_section()
    return table


def tuning_table(rows: Sequence[Tuned], columns: int = WIDE) -> Table:
    """Of each scheme its best setting, what it is worth, and how its trials ended.

    On fewer ``columns`` than all of that takes, without the interval and the tolerance.
    """
    table = _tuning_table(rows, wide=True)
    folded = max((len(row.cell.init) - NAME for row in rows), default=0)
    room = Console(width=UNLIMITED).measure(table).maximum - max(0, folded)
    return table if room <= columns else _tuning_table(rows, wide=False)


def _tuning_table(rows: Sequence[Tuned], *, wide: bool) -> Table:
    caption = (
        "Accuracy in percent: the best trial's on the validation images; on the test images the "
        "mean over fresh seeds at that setting and untuned. Within a point: the learning rates "
        "that came so near to the best."
        if wide
        else "Accuracy in percent: of the best trial on the validation images; over fresh seeds on "
        "the test images, at that setting and untuned."
    )
    shown: dict[str, Callable[[Tuned], str]] = {
        "lr": lambda row: rounded(row.lr),
        "gamma": lambda row: rounded(row.gamma),
        "validation": lambda row: percent(row.accuracy),
        "test": lambda row: percent(row.tested.mean),
        "95 % interval": lambda row: interval(row.tested.low, row.tested.high),
        "untuned": lambda row: percent(row.untuned.mean),
        "within a point": lambda row: trials.tolerated(row.tolerance),
        "finished": lambda row: str(row.counts["finished"]),
        "pruned": lambda row: str(row.counts["pruned"]),
        "diverged": lambda row: str(row.counts["diverged"]),
    }
    if not wide:
        del shown["95 % interval"], shown["within a point"]
    if not trials.is_gamma_searched(rows):
        del shown["gamma"]
    table = _table({"scheme": FOLDED, **dict.fromkeys(shown, NUMBER)}, caption)
    for row in rows:
        table.add_row(Text(row.cell.init), *(show(row) for show in shown.values()))
    return table


def environment_table(differences: Sequence[Change], columns: int = WIDE) -> Table:
    """What is not as it was when a network was trained; of long values, where they part."""
    table = _table(dict.fromkeys(("not as it was", "then", "now"), FOLDED))
    room = max(TOLD, (columns - 36) // 2)
    for what, then, now in _told(differences):
        table.add_row(*map(Text, (what, *_parted(then, now, room))))
    return table


def _told(differences: Sequence[Change]) -> list[Change]:
    """Those that a table shows: of packages the first, and of what a stranger wrote no more."""
    packages = [one for one in differences if one.what.startswith(PACKAGE)]
    others = [one for one in differences if not one.what.startswith(PACKAGE)]
    return [*others[:FACTS], *packages[:PACKAGES]]


def _parted(one: str, other: str, room: int) -> tuple[str, str]:
    """Of two long texts ``room`` letters each, from shortly before they part."""
    same = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        same += 1
    begin = max(0, same - room // 4) if max(len(one), len(other)) > room else 0

    def shown(text: str) -> str:
        cut = ("…" if begin else "") + text[begin:]
        return cut if len(cut) <= room else f"{cut[: room - 1]}…"

    return shown(one), shown(other)


def further_differences(differences: Sequence[Change]) -> list[str]:
    """How many the table leaves out, most of them packages."""
    more = len(differences) - len(_told(differences))
    of_packages = all(one.what.startswith(PACKAGE) for one in differences[FACTS:])
    unit = f" package{'s' if more > 1 else ''}" if of_packages else ""
    return [f"And {more} more{unit}."] if more else []


def replay_table(found: Replay, columns: int = WIDE) -> Table:
    """Of each part that was compared, whether it is the same, and else where and how far not.

    On few ``columns`` without the place of the largest difference.
    """
    named: dict[str, Mapping[str, Any]] = {"trained again": FIXED, "comes out": FIXED}
    if found.verdict != "identical":
        numbers = dict.fromkeys(("then", "now", "largest"), NUMBER)
        place = {"at": FOLDED} if columns >= WIDE else {}
        named |= {"first difference": FOLDED, **numbers, **place}
    table = _table(named)
    for part in found.parts:
        shown = Text(part.verdict, style=VERDICT_STYLES[part.verdict])
        if part.what == "outcome":
            cells = [] if part.verdict == "identical" else [" / ".join(found.outcomes)]
        else:
            cells = _gap(part)
        table.add_row(part.what, shown, *cells[: len(table.columns) - 2])
    return table


def _gap(part: Part) -> list[str]:
    gap = part.gap
    if gap is None:
        return [] if part.verdict == "identical" else ["not kept"]
    return [gap.first, *gap.shown, f"{gap.largest:.2g}", gap.at]


def next_command(config: TrainConfig, launcher: Sequence[str] = ()) -> str:
    """The same training under a scheme worth holding this one against."""
    other = RECOMMENDED.get(config.activation, "he")
    if config.init == other:
        other = "normal"
    return replace(config, init=other).command("train", ("init",), launcher)


def trainability_table(planes: Sequence[Plane]) -> Table:
    """The measured edge of each σ_w² beside theory's, at each learning rate."""
    several = len(planes) > 1
    caption = (
        "measured: the hidden layers up to which networks train, to half of the best accuracy; "
        "theory: c · ξ. ξ: the layers over which what training needs is lost e-fold."
    )
    numbers = ("σ_w²", "ξ", "theory", "measured", "diverged", "unstable")
    names = ("lr", *numbers) if several else numbers
    table = _table(dict.fromkeys(names, NUMBER), caption)
    for plane in planes:
        for row in edge_rows(plane):
            rate = [f"{plane.lr:g}"] if several else []
            lost = str(row.diverged), str(row.unstable)
            table.add_row(*rate, f"{row.sigma_w2:g}", *map(str, row.told), *lost)
    return table


def rates_table(result: Rates, columns: int = WIDE) -> Table:
    """Of each scheme the rates that it bears and those that are best.

    On few ``columns`` without the intervals.
    """
    wide = columns >= WIDE
    caption = (
        "Learning rates. Stable: the largest such that at it and all lower ones the loss never "
        f"rises, over the seeds{' with its 95 % t-interval' if wide else ''}; predicted: what a "
        "quadratic bears that curves as the loss does at the start; best: that of the highest "
        "accuracy on the validation images, in percent; within a point: the rates so near to it."
    )
    shown: dict[str, Callable[[RatesRow], str]] = {
        "stable": rates_sections.stable,
        "95 % interval": lambda row: rates_sections.ends(row.stable),
        "predicted": lambda row: rounded(row.predicted.mean if row.predicted else None),
        "best": lambda row: rounded(row.best.mean if row.best else None),
        "accuracy": lambda row: percent(row.accuracy.mean if row.accuracy else None),
        "within a point": lambda row: rates_sections.between(row.within),
    }
    if not wide:
        del shown["95 % interval"]
    has_sizes = any(row.group.size is not None for row in result.rows)
    size = {result.config.over: NUMBER} if has_sizes else {}
    table = _table({"scheme": FOLDED, **size, **dict.fromkeys(shown, NUMBER)}, caption)
    for row in result.rows:
        of_size = [str(row.group.size)] if has_sizes else []
        cells = (show(row) for show in shown.values())
        table.add_row(Text(str(row.group.kind)), *of_size, *cells)
    return table


TABLES: Mapping[str, Callable[[Any, int], Table]] = {
    "compare": lambda result, columns: comparison_table(result.rows, columns),
    "tune": lambda result, columns: tuning_table(result.rows, columns),
    "rates": rates_table,
    "reproduce": reproduction_table,
    "trainability": lambda result, _: trainability_table(result.planes),
}  # of the commands that train many networks

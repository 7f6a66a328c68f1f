"""What the trials of a study say: its best setting, how tolerant of the rate it is, in words.

Numbers in, numbers and sentences out: nothing is trained, stored or tracked here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from initflow.reporting import formats, seed_statistics, sentences
from initflow.reporting.formats import plus_minus
from initflow.reporting.seed_statistics import Cell, Difference, Outcome, Outcomes, Row

OUTCOMES = ("finished", "pruned", "diverged", "failed")
WITHIN = 0.01  # of the best accuracy: one point, in which a learning rate counts as good


@dataclass(frozen=True)
class Trial:
    """One setting tried: ``accuracy`` is the best that was seen on the validation images.

    ``gamma`` is None where it was not searched. ``outcome`` is one of ``OUTCOMES``; of a failed
    trial there is no accuracy.
    """

    number: int
    lr: float
    gamma: float | None
    outcome: str
    accuracy: float | None


def in_words(lr: float, gamma: float | None, digits: int = 6) -> str:
    """A setting: ``lr 0.1 and gamma 0.96``; without a gamma, ``lr 0.1``."""
    return f"lr {lr:.{digits}g}" + ("" if gamma is None else f" and gamma {gamma:.{digits}g}")


def best(trials: Sequence[Trial]) -> Trial | None:
    """The finished trial of the highest accuracy, the first of equals; None without any."""
    finished = [t for t in trials if t.outcome == "finished" and t.accuracy is not None]
    return max(finished, key=lambda trial: trial.accuracy or 0.0, default=None)


def best_so_far(trials: Sequence[Trial]) -> list[tuple[int, float]]:
    """(trials that have ended, the best accuracy of a finished one) from the first of them on."""
    best, course = 0.0, []
    for n, trial in enumerate(trials, start=1):
        if trial.outcome == "finished":
            best = max(best, trial.accuracy or 0.0)
        if best:
            course.append((n, best))
    return course


def tolerance(trials: Sequence[Trial]) -> tuple[float, float] | None:
    """The lowest and the highest learning rate tried that came within one point of the best.

    Of finished trials, so it is what was seen: the true range may be wider.
    """
    top = best(trials)
    if top is None or top.accuracy is None:
        return None
    near = [
        trial.lr
        for trial in trials
        if trial.outcome == "finished"
        and round(top.accuracy - (trial.accuracy or 0.0), formats.EXACT) <= WITHIN
    ]
    return min(near), max(near)


@dataclass(frozen=True)
class Tuned:
    """A scheme after its study: its best setting, and what that is worth on the test images.

    ``best`` is None where no trial finished. ``tested`` is of networks with its setting, and
    ``untuned`` of networks with the setting that none was chosen for, both over the same seeds.
    ``counts`` has the number of trials of each of ``OUTCOMES``.
    """

    cell: Cell
    best: Trial | None
    tolerance: tuple[float, float] | None
    counts: Mapping[str, int]
    tested: Row
    untuned: Row

    @property
    def lr(self) -> float | None:
        return self.best.lr if self.best else None

    @property
    def gamma(self) -> float | None:
        return self.best.gamma if self.best else None

    @property
    def accuracy(self) -> float | None:
        """The best on the validation images."""
        return self.best.accuracy if self.best else None


def is_gamma_searched(tuned: Sequence[Tuned]) -> bool:
    """Whether the settings tried have a gamma."""
    return not any(one.best and one.best.gamma is None for one in tuned)


def tuned(
    cell: Cell, trials: Sequence[Trial], tested: Sequence[Outcome], untuned: Sequence[Outcome]
) -> Tuned:
    """What the ``trials`` of a scheme came to, and its networks that were ``tested``."""
    counts = Counter(trial.outcome for trial in trials)
    (of_tuned,) = seed_statistics.rows({cell: tested})
    (of_untuned,) = seed_statistics.rows({cell: untuned})
    return Tuned(
        cell,
        best(trials),
        tolerance(trials),
        {outcome: counts[outcome] for outcome in OUTCOMES},
        of_tuned,
        of_untuned,
    )


def tuning_sentences(tuned: Outcomes, untuned: Outcomes, setting: str) -> list[str]:
    """What the test images say: each scheme at its best, all at one ``setting``, what changes.

    ``setting`` names the one that is not tuned, "lr 0.1 and gamma 0.96".
    """
    said = sentences.comparison_sentences(untuned, f"All at {setting}: ")
    if not any(tuned.values()):
        return ["Each at its best: no trial finished, so there is none.", *said]
    said = [*sentences.comparison_sentences(tuned, "Each at its best: "), *said]
    return [*said, *_changes(tuned, untuned)]


def _changes(tuned: Outcomes, untuned: Outcomes) -> list[str]:
    """Of each pair of schemes, what is said otherwise of them once they are tuned."""
    after = {_pair(difference): difference for difference in seed_statistics.differences(tuned)}
    before = {_pair(difference): difference for difference in seed_statistics.differences(untuned)}
    changed = []
    for pair in {**after, **before}:
        one, other = before.get(pair), after.get(pair)
        text = _change(one, other)
        if text:
            changed.append((-max(of.effect for of in (one, other) if of), text))
    if changed:
        told = [text for _, text in sorted(changed)]
        return [f"What tuning changes: {'; '.join(told)}."]
    both = [pair for pair in after if pair in before]
    if not both:
        return []
    lasting = [pair for pair in both if after[pair].significant]
    if not lasting:
        return ["Tuning changes no verdict: with it as without, no scheme is seen to beat another."]
    widest = max(lasting, key=lambda pair: before[pair].effect)
    one, other = before[widest], after[widest]
    text = f"{one.better} beats {one.worse} by {_effect(other)} points instead of {_effect(one)}"
    example = "for one, " if len(lasting) > 1 else ""
    return [f"Tuning changes no verdict: {example}{text}."]


def _change(one: Difference | None, other: Difference | None) -> str | None:
    """From ``one``, untuned, to the ``other``; either is None where too few seeds finished."""
    was, now = one and one.significant, other and other.significant
    if one and was and not now:
        too_few = "" if other else ": too few tuned trainings finished to compare them"
        return f"{one.better} no longer beats {one.worse}{too_few}"
    if other and now and not was:
        too_few = "" if one else ": too few untuned trainings finished to compare them"
        return f"{other.better} beats {other.worse}, by {_effect(other)} points{too_few}"
    if one and other and now and one.better != other.better:
        return f"{other.better} beats {other.worse}, which beat it untuned"
    return None


def _pair(difference: Difference) -> tuple[str, frozenset[str]]:
    return difference.activation, frozenset((difference.better, difference.worse))


def _effect(difference: Difference) -> str:
    return plus_minus(difference.effect, difference.high - difference.effect)


def as_json(
    tuned: Sequence[Tuned], trials: Mapping[Cell, Sequence[Trial]], sentences: Sequence[str]
) -> dict[str, Any]:
    """Plain values: a row for each scheme, with all its trials."""
    return {
        "rows": [
            _values(one) | {"trials": [asdict(trial) for trial in trials[one.cell]]}
            for one in tuned
        ],
        "sentences": list(sentences),
    }


def as_csv(tuned: Sequence[Tuned]) -> str:
    """A line for each scheme below one of names; what is not known is empty."""
    rows = list(map(_values, tuned))
    return formats.as_csv(rows, list(rows[0]))


def _values(tuned: Tuned) -> dict[str, Any]:
    low, high = tuned.tolerance or (None, None)
    return {
        "init": tuned.cell.init,
        "activation": tuned.cell.activation,
        "lr": tuned.lr,
        "gamma": tuned.gamma,
        "validation_accuracy": tuned.accuracy,
        "n": tuned.tested.n,
        "test_accuracy_mean": tuned.tested.mean,
        "test_accuracy_low": tuned.tested.low,
        "test_accuracy_high": tuned.tested.high,
        "untuned_accuracy_mean": tuned.untuned.mean,
        "untuned_accuracy_low": tuned.untuned.low,
        "untuned_accuracy_high": tuned.untuned.high,
        "lr_tolerated_low": low,
        "lr_tolerated_high": high,
        **tuned.counts,
    }


def tolerated(tolerance: tuple[float, float] | None) -> str:
    """``0.02 to 0.3 (×15)``."""
    if tolerance is None:
        return formats.NONE
    low, high = tolerance
    return f"{formats.rounded(low)} to {formats.rounded(high)} (×{float(f'{high / low:.2g}'):.15g})"

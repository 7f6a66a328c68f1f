"""A network trained again from what it recorded, and held against that bit by bit.

Where the bits differ, and something is different here that rounds differently, it is judged whether
rounding explains how far they are apart. How much rounding does to a network is found out on the
network itself: shadows of it, which start next to it, are trained beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from initflow.core import environment, machine
from initflow.core.environment import Change
from initflow.core.progress import Progress, silent
from initflow.core.seeds import generator
from initflow.diagnostics.record import Record, start, train_together
from initflow.errors import DataError, ReplayError
from initflow.experiments.replay import promise, provenance
from initflow.experiments.replay.promise import Promise
from initflow.experiments.replay.provenance import Evidence, Provenance, State
from initflow.initializers.scheme import BUILT_IN, Scheme
from initflow.training import model
from initflow.training.splits import Splits

VERDICTS = IDENTICAL, TOLERABLE, DIFFERENT = "identical", "tolerable", "different"
EXIT_CODES = {IDENTICAL: 0, DIFFERENT: 1, TOLERABLE: 3}
# What of the environment does not reach the numbers; packages do not either.
BESIDE = ("git_commit", "git_tree")
OF_MODEL = ("provider of the model", "source of the model")
OF_SCHEME = ("scheme", "provider of the scheme", "source of the scheme")
# Measured in docs/verifying.md.
SHADOWS = 4
# Of a shadow's initial weights from the network's, as a share of each. Some ten times what rounding
# does, so that a step of chance, as relu's are, comes to one of the shadows first.
DISTANCE = 1e-5
LEAST = 1e-6  # that a loss may be off anyway, as a share of it
SMALLEST = 0.01  # nats; of smaller losses, of which rounding is a larger share, it is one of this
LEAST_WEIGHT = 1e-5  # that a weight may be off anyway, as a share of the largest in its tensor
NAMED = 3  # causes of a difference that a sentence names
CHAOS = 0.1  # a shadow that is off by so much says that rounding alone decides what comes after


@dataclass(frozen=True)
class Gap:
    """How two rows of numbers differ: at the ``first`` place, ``then`` and ``now``, and most."""

    first: str
    then: float
    now: float
    largest: float
    at: str

    @property
    def shown(self) -> tuple[str, str]:
        """Then and now, with all the digits that float32 has."""
        return f"{self.then:.9g}", f"{self.now:.9g}"

    def as_json(self) -> dict[str, Any]:
        """As text what is not finite, which JSON has no numbers for."""
        return {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Part:
    """``what`` was compared, and what came of it; ``gap`` is None where no numbers were kept."""

    what: str
    verdict: str
    gap: Gap | None = None


@dataclass(frozen=True)
class Replay:
    """What came of training a network again.

    ``differences`` are those of the environment, and ``causes`` what of them, and else, may round
    differently. ``outcomes`` are then's and now's, in words. ``parts`` are the initial weights, the
    losses, the final weights and the outcome. From iteration ``chaos`` on, rounding alone decides;
    None where it never does, or nothing had to be judged. ``promise`` is that of the versions with
    which it was trained again.
    """

    provenance: Provenance
    differences: Sequence[Change]
    causes: Sequence[str]
    outcomes: tuple[str, str]
    parts: Sequence[Part]
    verdict: str
    chaos: int | None
    promise: Promise

    def as_json(self) -> dict[str, Any]:
        then, now = self.outcomes
        return {
            "verdict": self.verdict,
            "outcome": {"then": then, "now": now},
            "parts": {
                part.what: {"verdict": part.verdict, **(part.gap.as_json() if part.gap else {})}
                for part in self.parts
            },
            "rounding_decides_from": self.chaos,
            "environment": [difference._asdict() for difference in self.differences],
            "may_round_differently": list(self.causes),
            "promise": self.promise._asdict(),
        }


def replay(
    evidence: Evidence,
    scheme: Scheme,
    splits: Splits,
    device: str,
    progress: Progress = silent,
) -> Replay:
    """Train the network of ``evidence`` again, by ``scheme`` on ``splits``, and compare.

    Raises :class:`DataError` where the images are others, before anything is trained.
    """
    past = evidence.provenance
    _check_data(past, splits)
    if not past.tested:
        splits = splits.untested()
    splits = splits.to(torch.device(device))
    config = replace(past.config, probe=0, log_model=False, updates=_updates(past))
    with machine.threads(past.threads):
        record = start(config, scheme, splits)
        _train(record, past, splits, progress)
        with machine.tf32(device, allowed=config.tf32):  # as it trained
            found = environment.differences(past.environment, environment.current(device))
        causes = _causes(past, found)
        rounding = None
        if causes and not _is_identical(evidence, record):
            rounding = _rounding(record, past, splits, progress)
    others = [*_of_scheme(past, scheme), *_of_model(past, record)]
    return _judged(evidence, record, rounding, [*others, *found], causes)


def _check_data(past: Provenance, splits: Splits) -> None:
    if splits.digest != past.digest:
        raise DataError(
            f"dataset {past.config.dataset} in '{splits.source}' has the digest "
            f"{splits.digest[:12]}…, and the network was trained on one with {past.digest[:12]}…"
        )
    then, now = (past.images, past.pixels), (len(splits.train), splits.pixels)
    if (*then, past.classes) != (*now, splits.classes):
        raise ReplayError(
            f"the network was trained on {past.images} images of {past.pixels} pixels, and its "
            f"configuration gives {len(splits.train)} of {splits.pixels}: one was changed"
        )


def _updates(past: Provenance) -> int:
    """As many as it takes to see whether a training that was cut short ends where it did."""
    return past.whole if past.outcome == "finished" else min(past.whole, past.updates + 1)


def _train(record: Record, past: Provenance, splits: Splits, progress: Progress) -> None:
    """To where the training ended then: what was pruned is stopped at the same step."""
    was_pruned = past.outcome == "pruned"
    train_together(
        [record],
        splits,
        should_stop=lambda _record, step, _values: was_pruned and step >= past.updates,
        progress=progress,
    )


def _of_scheme(past: Provenance, scheme: Scheme) -> list[Change]:
    """What is different of a scheme that does not come with initflow, whose source is a fact."""
    if past.provider == scheme.provider == BUILT_IN and past.spec == scheme.spec:
        return []
    now = scheme.spec, scheme.provider, provenance.source_sha256(scheme.signature)
    then = past.spec, past.provider, past.source
    then_and_now = dict(zip(OF_SCHEME, zip(then, now, strict=True), strict=True))
    return [Change(what, *both) for what, both in then_and_now.items() if both[0] != both[1]]


def _of_model(past: Provenance, record: Record) -> list[Change]:
    """What is different of a model that does not come with initflow."""
    now = provenance.of_model(record.initial)
    if not (past.model and now) or past.model.provider == now.provider == BUILT_IN:
        return []
    both = zip(
        OF_MODEL, (past.model.provider, past.model.source), (now.provider, now.source), strict=True
    )
    return [Change(what, then, is_now) for what, then, is_now in both if then != is_now]


def _causes(past: Provenance, differences: Sequence[Change]) -> list[str]:
    """What makes other bits no wonder."""
    causes = [
        difference.what
        for difference in differences
        if difference.what not in BESIDE and not difference.what.startswith("package ")
    ]
    if not past.is_exact:
        causes.append("it was trained in a stack that rounds differently from it alone")
    if past.device != "cpu":
        causes.append(f"the kernels of {past.device} promise no bits")
    return causes


def _is_identical(evidence: Evidence, record: Record) -> bool:
    past = evidence.provenance
    return (
        _outcome(past.outcome, past.updates) == _outcome(record.outcome, record.step)
        and past.initial == model.weights_sha256(record.initial.state())
        and past.losses == provenance.losses_sha256(record.losses)
        and past.final == model.weights_sha256(record.trained)
    )


def _outcome(outcome: str, updates: int) -> str:
    return f"{outcome} after {updates:,} iterations"


class _Rounding(NamedTuple):
    """What rounding does to a network, by its shadows.

    ``reach``, (n + 1,), is how far the farthest of them has been from its losses until each
    iteration, infinitely far where one ended; ``spread`` how far their final weights are at most.
    """

    reach: Tensor
    spread: float


def _rounding(record: Record, past: Provenance, splits: Splits, progress: Progress) -> _Rounding:
    losses = torch.tensor(record.losses, dtype=torch.float32)
    reach = torch.zeros(len(losses) + 1, dtype=torch.float64)
    spread = 0.0
    for number in range(SHADOWS):  # one after the other, as there may be little memory
        shadow = _shadow(record, number)
        _train(shadow, past, splits, progress)
        spread = max(spread, _distance(shadow.trained, record.trained))
        its = torch.tensor(shadow.losses, dtype=torch.float32)
        both = min(len(losses), len(its))
        off = torch.full_like(reach, torch.inf)
        off[:both] = _off(its[:both], losses[:both])
        if len(its) == len(losses):
            off[both:] = 0.0
        reach = torch.maximum(reach, off)
    return _Rounding(reach.cummax(0).values, spread)


def _shadow(record: Record, number: int) -> Record:
    """A network whose every initial number is next to that of ``record``."""
    stream = generator(record.config.seed, f"shadow/{number}")
    initial = record.initial.copy()
    for tensor in initial.state().values():
        noise = torch.rand(tensor.shape, generator=stream).mul_(2).sub_(1)
        tensor.mul_(1 + DISTANCE * noise)
    return Record(config=record.config, scheme=record.scheme, initial=initial)


def _judged(
    evidence: Evidence,
    record: Record,
    rounding: _Rounding | None,
    differences: Sequence[Change],
    causes: Sequence[str],
) -> Replay:
    past = evidence.provenance
    losses = torch.tensor(record.losses, dtype=torch.float32)
    outcomes = _outcome(past.outcome, past.updates), _outcome(record.outcome, record.step)
    reach = rounding.reach if rounding else None
    chaos = _first(reach >= CHAOS) if reach is not None else None
    is_chaotic = chaos is not None and chaos <= min(len(losses), past.updates)
    spread = math.inf if is_chaotic else rounding.spread if rounding else 0.0

    first, last = record.initial.state(), record.trained
    trace = _losses(evidence.losses, losses, reach)
    ended = IDENTICAL if outcomes[0] == outcomes[1] else TOLERABLE if is_chaotic else DIFFERENT
    parts = [
        _weights("initial weights", evidence.initial, past.initial, first, LEAST_WEIGHT),
        trace,
        _weights("final weights", evidence.final, past.final, last, max(spread, LEAST_WEIGHT)),
        Part("outcome", ended),
    ]
    # Without a cause nothing is tolerated; nor is a mere hash, where what was computed is the same.
    unknown = [part.gap is None and trace.verdict == IDENTICAL for part in parts]
    parts = [
        replace(part, verdict=DIFFERENT)
        if part.verdict == TOLERABLE and (not causes or odd)
        else part
        for part, odd in zip(parts, unknown, strict=True)
    ]
    verdict = max((part.verdict for part in parts), key=VERDICTS.index)
    of_versions = promise.here()
    return Replay(past, differences, causes, outcomes, parts, verdict, chaos, of_versions)


def sentence(found: Replay, what: str) -> str:
    """What came of training ``what`` again."""
    if found.verdict == IDENTICAL:
        return (
            f"Identical: trained again, {what} has the same initial weights, the same loss at each "
            f"of {found.provenance.updates:,} iterations and the same final weights, bit for bit."
        )
    first = next(part for part in found.parts if part.verdict == found.verdict)
    differs = _difference(first, found.outcomes)
    if found.verdict == DIFFERENT:
        why = (
            "and rounding does not explain it"
            if found.causes
            else "though nothing that rounds differently has changed"
        )
        other = [d.what for d in found.differences if d.what in (*OF_SCHEME, *OF_MODEL)]
        if other:
            why += f"; not as it was: {', '.join(other)}"
        return f"Different: {what} does not come out as it was: {differs}, {why}."
    causes = ", ".join(found.causes[:NAMED]) + (", …" if len(found.causes) > NAMED else "")
    chaos = (
        f" From iteration {found.chaos:,} on, rounding alone decides what this network does: what "
        "differs there says nothing."
        if found.chaos is not None
        else ""
    )
    return (
        f"Within tolerance, but not identical: {differs}, which rounding explains (not as it was: "
        f"{causes}).{chaos}"
    )


def _difference(part: Part, outcomes: tuple[str, str]) -> str:
    if part.what == "outcome":
        return "it {} then and {} now".format(*outcomes)
    if part.gap is None and part.what == "losses":
        return "one training ended before the other"
    if part.gap is None:
        return f"the {part.what} have another hash, and none were kept to say how far they are"
    then, now = part.gap.shown
    return f"the {part.what} differ first at {part.gap.first}, {then} then and {now} now"


def _off(one: Tensor, other: Tensor) -> Tensor:
    """How far losses are apart, as a share of the other one."""
    return (one.double() - other.double()).abs() / other.double().abs().clamp(min=SMALLEST)


def _first(where: Tensor) -> int | None:
    """The first index at which it is true."""
    found = where.nonzero()
    return int(found[0]) if len(found) else None


def _losses(then: Tensor, now: Tensor, reach: Tensor | None) -> Part:
    what, both = "losses", min(len(then), len(now))
    differs = _first(then[:both] != now[:both])
    if differs is None:
        return Part(what, IDENTICAL if len(then) == len(now) else DIFFERENT)
    apart = (then[:both].double() - now[:both].double()).abs()
    most = int(apart.argmax())
    gap = Gap(
        f"iteration {differs:,}",
        then[differs].item(),
        now[differs].item(),
        apart[most].item(),
        f"iteration {most:,}",
    )
    if reach is None:
        return Part(what, DIFFERENT, gap)
    bound = reach[:both].clamp(min=LEAST)
    held = bool(((_off(then[:both], now[:both]) <= bound) | (bound >= CHAOS)).all())
    return Part(what, TOLERABLE if held else DIFFERENT, gap)


def _weights(what: str, then: State | None, digest: str, now: State, bound: float) -> Part:
    """Of the weights with this digest, which may be as far as ``bound`` from what they are now."""
    if digest == model.weights_sha256(now):
        return Part(what, IDENTICAL)
    if then is None:
        return Part(what, TOLERABLE)
    held = _distance(then, now) <= bound
    return Part(what, TOLERABLE if held else DIFFERENT, _gap(then, now))


def _distance(one: State, other: State) -> float:
    """The largest difference of two numbers, as a share of the largest number of their tensor."""
    shares = [0.0]
    for name, tensor in other.items():
        apart, size = _apart(one[name], tensor), tensor.double().abs().max()
        share = (apart.max() / size).item() if apart.any() else 0.0
        shares.append(math.inf if math.isnan(share) else share)
    return max(shares)


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """Of every two numbers how far they are apart: infinitely, where only one is finite."""
    apart = (one.double() - other.double()).abs().nan_to_num(nan=torch.inf)
    return apart.masked_fill((one == other) | (one.isnan() & other.isnan()), 0.0)


def _gap(then: State, now: State) -> Gap | None:
    """Of weights: the first number in their order that differs, and the one that does most."""
    apart = {name: _apart(then[name], now[name]) for name in now}
    differing = [name for name, of_tensor in apart.items() if of_tensor.any()]
    if not differing:
        return None  # but in the sign of a zero
    first = differing[0]
    place = tuple(apart[first].nonzero()[0].tolist())
    most = max(differing, key=lambda name: apart[name].max())
    at = torch.unravel_index(apart[most].argmax(), apart[most].shape)
    return Gap(
        _place(first, place),
        then[first][place].item(),
        now[first][place].item(),
        apart[most].max().item(),
        _place(most, [int(index) for index in at]),
    )


def _place(name: str, index: Sequence[int]) -> str:
    return f"{name}[{', '.join(map(str, index))}]"

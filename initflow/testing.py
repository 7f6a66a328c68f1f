"""For those who write initializers: the whole contract, tried on many networks.

:func:`assert_initializer_contract` is for a plugin's own tests; ``initflow plugins check`` shows
the same table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from initflow.core import importing
from initflow.errors import InitflowError, PluginError, SettingError, cause, first_line
from initflow.initializers import contract, plugins
from initflow.initializers.activations import ACTIVATIONS, Activation
from initflow.initializers.contract import RULES, Breach
from initflow.initializers.scheme import Place, Scheme, fans, parse, places
from initflow.training import model
from initflow.training.splits import Split

# Shapes of weights: wide, tall, square, tiny, and those of convolutions.
SHAPES = [
    *((100, 784), (784, 100), (64, 64)),
    *((1, 1), (1, 5), (5, 1), (3, 2)),
    *((16, 8, 3, 3), (5, 3, 7)),
]
# Widths of networks: the usual, without hidden layers, tiny, and deep.
NETWORKS = [(30, 20, 10), (30, 10), (5, 1, 3), (20, *[15] * 10, 10)]
DTYPES = [torch.float32, torch.float64]
DEPTH = 3  # of the networks that single layers are of: the first, one between, the last
SEEDS = 100
SAMPLED = [(100, 200), (1_000, 60)]  # shapes of which the variance is sampled
TOLERANCE = 0.01  # of the stated variance, beside as many standard errors of the sampled one
STANDARD_ERRORS = 5

MORE_RULES = {
    "loads": "is found and imported within the time limit, and is an initializer",
    "arguments": "takes every default also as text",
    "other seed": "gives other weights for another seed",
    "variance": f"draws weights of the variance it states, over {SEEDS} seeds",
    "bias variance": f"draws biases of the mean square it states, over {SEEDS} seeds",
}
ALL_RULES = RULES | MORE_RULES
# What is sampled of each layer's tensors: which, its moment, and what the scheme states of it.
SAMPLED_RULES: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "variance": ("weight", lambda weight: weight.var(correction=0), "variance"),
    "bias variance": ("bias", lambda bias: bias.square().mean(), "bias_variance"),
}


@dataclass(frozen=True)
class RuleResult:
    """How an initializer did by one rule of its contract.

    - ``rule``: its name; ``meaning`` is the rule in words.
    - ``cases``: in how many layers or networks it was tried.
    - ``failures``: a line for each case that broke it; ``passed`` is whether there are none.
    - ``note``: what was not tried, or refused, if anything.
    """

    rule: str
    cases: int
    failures: tuple[str, ...] = ()
    note: str = ""

    @property
    def meaning(self) -> str:
        return ALL_RULES[self.rule]

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_json(self) -> dict[str, object]:
        return dataclasses.asdict(self) | {"meaning": self.meaning, "passed": self.passed}


def assert_initializer_contract(
    initializer: Callable[..., object] | str, plugins_dir: Path | None = None
) -> None:
    """Raise an :class:`AssertionError` that lists what is wrong with an initializer, if anything.

    It is for a plugin's own tests.

    - ``initializer``: the function, or what ``init`` would be: ``name:gain=2`` or
      ``file.py:function``.
    - ``plugins_dir``: as in :func:`initflow.initializers.find`.

    Returns nothing. Raises a :class:`initflow.SettingError` for a name that is none at all, or for
    what is no function.
    """
    failed = [row for row in check(initializer, plugins_dir) if not row.passed]
    lines = [f"{row.rule} ({row.meaning}): {failure}" for row in failed for failure in row.failures]
    if lines:
        raise AssertionError("\n".join(["the initializer breaks its contract", *lines]))


def check(
    initializer: Callable[..., object] | str, plugins_dir: Path | None = None
) -> Iterator[RuleResult]:
    """Try an initializer on many layers or networks: how it did by each rule, row by row.

    ``initializer`` and ``plugins_dir`` are as in :func:`assert_initializer_contract`, which raises
    what this tells; the :class:`initflow.SettingError` comes with the first row.

    Returns an iterator of :class:`RuleResult`, which ends early where nothing further can be tried.
    """
    try:
        if isinstance(initializer, str):
            scheme = plugins.find(initializer, plugins_dir)
        else:
            name = getattr(initializer, "__name__", "initializer")
            scheme = Scheme.of(initializer, name, "a function")
    except PluginError as error:
        yield RuleResult("loads", 1, (str(error),))
        return
    yield RuleResult("loads", 1)
    yield _arguments(scheme)
    tally = _Tally()
    case = _layer if scheme.kind == "layer" else _network
    phis = ACTIVATIONS.values()
    usable = [phi for phi in phis if tally.fill(case(scheme, phi), refusable=True)]
    usual = next((phi for phi in usable if phi.name == "relu"), usable[0] if usable else None)
    for each in _variety(scheme, usual) if usual else ():
        tally.fill(each)
    sampled = list(_sampled(scheme, usual, usable, tally)) if usual and tally.sound else []
    yield from tally.rows()
    yield from sampled


def _arguments(scheme: Scheme) -> RuleResult:
    """A spec, which is text, can say whatever Python can."""
    failures = []
    for name, value in scheme.values.items():
        spec = replace(scheme, arguments={name: value}).spec
        try:
            read = scheme.bind(parse(spec, [scheme.name])[1]).arguments.get(name)
            if read != value:
                failures.append(f"'{name}' is {value!r} by default, but {read!r} by '{spec}'")
        except SettingError as error:
            failures.append(str(error))
    return RuleResult("arguments", len(scheme.values), tuple(failures))


@dataclass(frozen=True)
class _Case:
    """A layer or a network for ``scheme`` to fill: like ``tensors``, by name, at its ``places``.

    ``data`` are the images that a scheme sees which fills a network.
    """

    scheme: Scheme
    shape: str
    activation: Activation
    tensors: Mapping[str, Tensor]
    places: Mapping[str, Place]
    data: Split | None = None

    @property
    def what(self) -> str:
        arguments = self.scheme.spec.removeprefix(self.scheme.name).removeprefix(":")
        return ", ".join(filter(None, (self.shape, self.activation.name, arguments)))

    def filled(self, seed: int) -> Mapping[str, Tensor]:
        """New tensors, filled from ``seed``."""
        tensors = {name: torch.zeros_like(tensor) for name, tensor in self.tensors.items()}
        if self.data:
            fill = partial(model.fill_network, self.scheme, self.activation, self.data)
        else:
            fill = partial(model.fill_layer, self.scheme, self.places[""])
        contract.attempt(
            tensors,
            lambda *given: importing.within_limit(lambda: fill(*given)),
            torch.Generator().manual_seed(seed),
        )
        return tensors


def _layer(
    scheme: Scheme,
    activation: Activation,
    shape: tuple[int, ...] = (200, 60),
    dtype: torch.dtype = torch.float32,
    at: int = 1,
) -> _Case:
    place = Place(*fans(shape), activation, at, DEPTH)
    tensors = {
        "weight": torch.zeros(shape, dtype=dtype),
        "bias": torch.zeros(shape[0], dtype=dtype),
    }
    what = f"{'×'.join(map(str, shape))} {_name(dtype)}, layer {at} of {DEPTH}"
    return _Case(scheme, what, activation, tensors, {"": place})


def _network(
    scheme: Scheme,
    activation: Activation,
    widths: tuple[int, ...] = (30, 40, 10),
    dtype: torch.dtype = torch.float32,
    images: str = "images",
) -> _Case:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(100, widths[0], generator=generator, dtype=dtype)
    pixels = {"images": pixels, "black images": 0 * pixels, "one image": pixels[:1]}[images]
    data = Split(pixels, torch.arange(len(pixels)) % widths[-1])
    names = [f"{name}." for name in model.layer_names(len(widths) - 1)]
    layers = dict(zip(names, places(widths, activation), strict=True))
    state = model.Parameters(widths).state()
    tensors = {name: tensor.to(dtype) for name, tensor in state.items()}
    what = f"{'-'.join(map(str, widths))} {_name(dtype)}, {images}"
    return _Case(scheme, what, activation, tensors, layers, data)


def _variety(scheme: Scheme, activation: Activation) -> Iterator[_Case]:
    """Layers of every shape, or networks of every shape on images of every kind."""
    if scheme.kind == "layer":
        for shape, dtype, at in itertools.product(SHAPES, DTYPES, range(DEPTH)):
            yield _layer(scheme, activation, shape, dtype, at)
    else:
        kinds = ("images", "black images", "one image")
        for widths, dtype, images in itertools.product(NETWORKS, DTYPES, kinds):
            yield _network(scheme, activation, widths, dtype, images)


class _Tally:
    """What was tried, and what failed by which rule."""

    def __init__(self) -> None:
        self._cases = 0
        self._failures: dict[str, list[str]] = {rule: [] for rule in RULES}
        self._refused: dict[str, str] = {}
        self._hangs = False

    @property
    def sound(self) -> bool:
        """Whether nothing has failed."""
        return not any(self._failures.values())

    def fill(
        self, case: _Case, seed: int = 0, *, refusable: bool = False
    ) -> Mapping[str, Tensor] | None:
        """The tensors of ``case``, filled, or None; a ``refusable`` activation may be refused."""
        if self._hangs:
            return None
        self._cases += seed == 0
        rule = "runs"
        try:
            return case.filled(seed)
        except Breach as breach:
            rule, detail = breach.rule, str(breach)
        except TimeoutError as error:
            self._hangs, detail = True, first_line(error)
        except Exception as error:  # noqa: BLE001 - an initializer may fail in any way
            refused = contract.is_refusal(error, case.scheme.fill)
            if refused and refusable:
                self._refused[case.activation.name] = first_line(error)
                return None
            detail = first_line(error) if refused else cause(error)
        self._failures[rule].append(f"{case.what}: {detail}")
        return None

    def rows(self) -> Iterator[RuleResult]:
        if len(self._refused) == len(ACTIVATIONS):
            name, reason = next(iter(self._refused.items()))
            self._failures["runs"].append(f"refuses every activation; {name}: {reason}")
        for rule, failures in self._failures.items():
            note = f"refuses {', '.join(self._refused)}" if rule == "runs" and self._refused else ""
            yield RuleResult(rule, self._cases, tuple(failures), note)


def _sampled(
    scheme: Scheme, usual: Activation, usable: Sequence[Activation], tally: _Tally
) -> Iterator[RuleResult]:
    """What takes several seeds to see."""
    case = _layer if scheme.kind == "layer" else _network
    cases = [case(scheme, usual)]
    if scheme.asks_for("generator"):
        first, second = tally.fill(cases[0]), tally.fill(cases[0], 1)
        failures = []
        if first and second and all(torch.equal(first[name], second[name]) for name in first):
            failures = [f"{cases[0].what}: seeds 0 and 1 give the same, although it asks for one"]
        yield RuleResult("other seed", 1, tuple(failures))
    if scheme.kind == "layer":
        cases = [_layer(scheme, usual, s, at=at) for s in SAMPLED for at in range(DEPTH)]
    if scheme.asks_for("activation"):
        cases += [case(scheme, activation) for activation in usable]
    cases += [case(other, usual) for other in _other_arguments(scheme, case(scheme, usual))]
    yield _variance("variance", cases, tally)
    if scheme.fills_biases:
        yield _variance("bias variance", cases, tally)


def _other_arguments(scheme: Scheme, case: _Case) -> Iterator[Scheme]:
    """The scheme with each of its numbers half as large again, where it does not refuse that."""
    for name, value in scheme.values.items():
        if isinstance(value, float):
            other = replace(scheme, arguments={name: 1.5 * value or 0.5})
            with contextlib.suppress(ValueError, InitflowError):
                replace(case, scheme=other).filled(0)
                yield other


def _variance(rule: str, cases: Sequence[_Case], tally: _Tally) -> RuleResult:
    """What is stated of each layer's weights, or biases, against what many seeds give."""
    part, moment, statement = SAMPLED_RULES[rule]
    if getattr(cases[0].scheme, f"stated_{statement}") is None:
        return RuleResult(rule, 0, note="states none: theory takes the one it finds")
    failures = []
    for case in cases:
        drawn = [tensors for seed in range(SEEDS) if (tensors := tally.fill(case, seed))]
        for name, place in case.places.items():
            values = [moment(tensors[name + part].double()).item() for tensors in drawn]
            if len(values) < SEEDS:
                continue  # a failure that the tally tells of
            error = statistics.stdev(values) / math.sqrt(SEEDS)
            mean = statistics.fmean(values)
            try:
                claim = getattr(case.scheme, statement)(place) or 0.0
            except InitflowError as wrong:
                failures.append(f"{name}{case.what}: {wrong}")
                continue
            if abs(mean - claim) > STANDARD_ERRORS * error + TOLERANCE * claim:
                failures.append(
                    f"{name}{case.what}: states {claim:.4g}, the seeds give {mean:.4g} "
                    f"± {error:.2g}"
                )
    return RuleResult(rule, sum(len(case.places) for case in cases), tuple(failures))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

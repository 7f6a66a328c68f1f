"""For those who write initializers: the whole contract, tried on many networks.

:func:`assert_initializer_contract` is for a plugin's own tests; ``initflow plugins check`` shows
the same table.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from initflow import contract, model, plugins
from initflow.activations import ACTIVATIONS, Activation
from initflow.contract import RULES, Breach
from initflow.data import Split
from initflow.errors import InitflowError, PluginError, SettingError, cause, first_line
from initflow.scheme import Place, Scheme, fans, write

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
SAMPLED = [(60, 200), (200, 60)]  # shapes of which the variance is sampled
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


@dataclass(frozen=True)
class Row:
    """How an initializer did by one rule: in ``cases`` cases, with these ``failures``."""

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
    """Raise an :class:`AssertionError` that lists what the contract finds wrong.

    ``initializer`` is the function, or what ``init`` would be: ``name:gain=2`` or
    ``file.py:function``. A name that is none at all is a :class:`SettingError`.
    """
    failed = [row for row in check(initializer, plugins_dir) if not row.passed]
    lines = [f"{row.rule} ({row.meaning}): {failure}" for row in failed for failure in row.failures]
    if lines:
        raise AssertionError("\n".join(["the initializer breaks its contract", *lines]))


def check(
    initializer: Callable[..., object] | str, plugins_dir: Path | None = None
) -> Iterator[Row]:
    """The conformance table, row by row; it ends early where nothing further can be tried."""
    try:
        if isinstance(initializer, str):
            scheme = plugins.find(initializer, plugins_dir)
        else:
            name = getattr(initializer, "__name__", "initializer")
            scheme = Scheme.of(initializer, name, "a function")
    except PluginError as error:
        yield Row("loads", 1, (str(error),))
        return
    yield Row("loads", 1)
    yield _arguments(scheme)
    tally = _Tally()
    case = _layer if scheme.kind == "layer" else _network
    usable = [name for name, phi in ACTIVATIONS.items() if tally.holds(case(scheme, phi))]
    activation = ACTIVATIONS["relu" if "relu" in usable or not usable else usable[0]]
    for each in (
        _layers(scheme, activation) if scheme.kind == "layer" else _networks(scheme, activation)
    ):
        tally.holds(each, refusable=not usable)
    yield from tally.rows()
    if not tally.sound:
        return
    if scheme.draws:
        yield _other_seed(case(scheme, activation))
    sampled = [case(scheme, activation)]
    if scheme.kind == "layer":
        sampled = [_layer(scheme, activation, s, at=at) for s in SAMPLED for at in range(DEPTH)]
    yield _variance("variance", "weight", scheme.stated_variance, scheme.variance, sampled)
    if scheme.fills_biases:
        stated = scheme.stated_bias_variance
        yield _variance("bias variance", "bias", stated, scheme.bias_variance, sampled)


def _arguments(scheme: Scheme) -> Row:
    """A spec, which is text, can say whatever Python can."""
    failures = []
    for name, value in scheme.values.items():
        try:
            read = scheme.bind({name: write(value)}).arguments[name]
        except SettingError as error:
            failures.append(str(error))
            continue
        if read != value:
            failures.append(f"'{name}' is {value!r} by default, but {read!r} when given as text")
    return Row("arguments", len(scheme.values), tuple(failures))


@dataclass(frozen=True)
class _Case:
    """A layer or a network to fill: tensors by name, what fills such, and each layer's place."""

    what: str
    activation: Activation
    tensors: Mapping[str, Tensor]
    fill: Callable[[Mapping[str, Tensor], torch.Generator], object]
    places: Mapping[str, Place]

    def filled(self, seed: int) -> Mapping[str, Tensor]:
        """New tensors, filled from ``seed``."""
        tensors = {name: torch.zeros_like(tensor) for name, tensor in self.tensors.items()}
        contract.attempt(tensors, self.fill, torch.Generator().manual_seed(seed))
        return tensors


def _layer(
    scheme: Scheme,
    activation: Activation,
    shape: tuple[int, ...] = (20, 30),
    dtype: torch.dtype = torch.float32,
    at: int = 1,
) -> _Case:
    place = Place(*fans(shape), activation, at, DEPTH)
    tensors = {
        "weight": torch.zeros(shape, dtype=dtype),
        "bias": torch.zeros(shape[0], dtype=dtype),
    }
    what = f"{'×'.join(map(str, shape))} {_name(dtype)}, layer {at} of {DEPTH}, {activation.name}"
    fill = functools.partial(model.fill_layer, scheme, place)
    return _Case(what, activation, tensors, fill, {"": place})


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
    tensors, places = {}, {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
        name = f"fc{layer + 1}."
        tensors[f"{name}weight"] = torch.zeros(fan_out, fan_in, dtype=dtype)
        tensors[f"{name}bias"] = torch.zeros(fan_out, dtype=dtype)
        places[name] = Place(fan_in, fan_out, activation, layer, len(widths) - 1)
    what = f"{'-'.join(map(str, widths))} {_name(dtype)}, {images}, {activation.name}"
    fill = functools.partial(model.fill_network, scheme, activation, data)
    return _Case(what, activation, tensors, fill, places)


def _layers(scheme: Scheme, activation: Activation) -> Iterator[_Case]:
    for shape, dtype, at in itertools.product(SHAPES, DTYPES, range(DEPTH)):
        yield _layer(scheme, activation, shape, dtype, at)


def _networks(scheme: Scheme, activation: Activation) -> Iterator[_Case]:
    kinds = ("images", "black images", "one image")
    for widths, dtype, images in itertools.product(NETWORKS, DTYPES, kinds):
        yield _network(scheme, activation, widths, dtype, images)


class _Tally:
    """What was tried, and what failed by which rule."""

    def __init__(self) -> None:
        self._cases = 0
        self._failures: dict[str, list[str]] = {rule: [] for rule in RULES}
        self._refused: dict[str, str] = {}
        self.hangs = False

    @property
    def sound(self) -> bool:
        """Whether it may be used for more than to see where it fails."""
        return not any(self._failures.values())

    def holds(self, case: _Case, *, refusable: bool = True) -> bool:
        """Try ``case``; an activation function may be refused, by a ``ValueError``."""
        if self.hangs:
            return False
        self._cases += 1
        rule, detail = "runs", ""
        try:
            plugins.within(plugins.LIMIT_S, lambda: case.filled(0))
        except Breach as breach:
            rule, detail = breach.rule, breach.detail
        except ValueError as error:
            if refusable:
                self._refused[case.activation.name] = first_line(error)
                return False
            detail = first_line(error)
        except TimeoutError as error:
            self.hangs, detail = True, first_line(error)
        except Exception as error:  # noqa: BLE001 - an initializer may fail in any way
            detail = cause(error)
        else:
            return True
        self._failures[rule].append(f"{case.what}: {detail}")
        return False

    def rows(self) -> Iterator[Row]:
        if len(self._refused) == len(ACTIVATIONS):
            name, reason = next(iter(self._refused.items()))
            self._failures["runs"].append(f"refuses every activation; {name}: {reason}")
        for rule, failures in self._failures.items():
            note = f"refuses {', '.join(self._refused)}" if rule == "runs" and self._refused else ""
            yield Row(rule, self._cases, tuple(failures), note)


def _other_seed(case: _Case) -> Row:
    first, second = case.filled(0), case.filled(1)
    if any(not torch.equal(tensor, second[name]) for name, tensor in first.items()):
        return Row("other seed", 1)
    detail = "seeds 0 and 1 give the same, although it asks for a generator"
    return Row("other seed", 1, (f"{case.what}: {detail}",))


def _variance(
    rule: str,
    tensor: str,
    states: object,
    stated: Callable[[Place], float | None],
    cases: Sequence[_Case],
) -> Row:
    """What is stated of each layer's weights, or biases, against what many seeds give."""
    if states is None:
        return Row(rule, 0, note="states none: theory takes the one it finds")
    failures = []
    for case in cases:
        drawn = [case.filled(seed) for seed in range(SEEDS)]
        for name, place in case.places.items():
            values = [_moment(each[f"{name}{tensor}"], tensor) for each in drawn]
            error = statistics.stdev(values) / math.sqrt(SEEDS)
            mean = statistics.fmean(values)
            try:
                claim = stated(place) or 0.0
            except InitflowError as wrong:
                failures.append(f"{name}{case.what}: {wrong}")
                continue
            if abs(mean - claim) > STANDARD_ERRORS * error + TOLERANCE * claim:
                failures.append(
                    f"{name}{case.what}: states {claim:.4g}, the seeds give {mean:.4g} "
                    f"± {error:.2g}"
                )
    return Row(rule, sum(len(case.places) for case in cases), tuple(failures))


def _moment(values: Tensor, tensor: str) -> float:
    values = values.double()
    return (values.square().mean() if tensor == "bias" else values.var(correction=0)).item()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

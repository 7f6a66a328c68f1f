"""One untrained network read: what was measured beside what theory predicts, and the verdict."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from initflow.core import machine
from initflow.diagnostics.measure import Observation
from initflow.diagnostics.signals import BY_TIME, QUANTITIES, Signals, some_times
from initflow.diagnostics.verdict import Inputs, Verdict, advice, judge, margin
from initflow.initializers.activations import Activation
from initflow.initializers.scheme import Scheme, places
from initflow.theory.infinite_width import MeanField, mean_field
from initflow.theory.prediction import (
    Ends,
    Interval,
    LayerStatistics,
    PredictedByTime,
    Prediction,
    predicted,
)
from initflow.training.model import Parameters, bias_bound

T = TypeVar("T")
FORWARD, BACKWARD = "preactivation_second_moment", "gradient_second_moment"


@dataclass(frozen=True)
class Growth:
    """What becomes of a quantity on the way from layer ``start`` to ``end``: a factor.

    ``measured`` is None where it is no number, infinite where what was measured at one of them is
    too large to be one; ``predicted`` is that of single networks.
    """

    start: str
    end: str
    measured: float | None
    predicted: Interval

    @classmethod
    def of(
        cls, signals: Signals, quantity: str, way: tuple[str, str], predicted: Interval
    ) -> Growth:
        before, after = (signals.layers[layer].get(quantity) for layer in way)
        if before is None or after is None:  # only finite numbers are there
            return cls(*way, math.inf, predicted)
        return cls(*way, after / before if before else None, predicted)


@dataclass(frozen=True)
class Reading:
    """What was read of one network.

    ``mean_field`` is that of the middle hidden layer, where all are alike; ``preactivations`` are
    (n, units) a layer. ``by_time`` is what is predicted of the hidden states of recurrent layers,
    for each value of :attr:`Signals.by_time`, where there is a prediction or a band. ``changes``,
    by quantity, are those from one end of the network to the other.
    """

    signals: Signals
    predicted: Prediction
    mean_field: MeanField | None
    verdict: Verdict
    advice: str
    preactivations: Sequence[Tensor]
    by_time: PredictedByTime = field(default_factory=dict)
    changes: Mapping[str, Growth] = field(default_factory=dict)

    def by_layer(self) -> dict[str, dict[str, Interval]]:
        """What is predicted of each quantity, by the layer's name."""
        return {
            quantity: dict(zip(self.signals.layers, intervals, strict=False))
            for quantity, intervals in self.predicted.items()
        }

    def metrics(self) -> dict[str, float]:
        """The predicted values by metric key, ``predicted_quantity/layer``, where finite."""
        by_layer = {
            f"predicted_{quantity}/{layer}": interval.expected
            for quantity, intervals in self.by_layer().items()
            for layer, interval in intervals.items()
            if math.isfinite(interval.expected)
        }
        by_time = {
            layer: {quantity: _expected(intervals) for quantity, intervals in its.items()}
            for layer, its in self.by_time.items()
        }
        return by_layer | {
            f"predicted_{quantity}/{layer}": value
            for layer, values in some_times(by_time).items()
            for quantity, value in values.items()
        }

    def outside(self) -> dict[str, list[str]]:
        """The layers, by quantity, whose measured value is no number or outside the band."""
        return {
            quantity: [
                layer
                for layer, interval in intervals.items()
                if math.isfinite(interval.low)
                and not interval.holds(self.signals.layers[layer].get(quantity, math.nan))
            ]
            for quantity, intervals in self.by_layer().items()
        }


@dataclass(frozen=True)
class Given:
    """What is known of the images that networks are read on, whatever the networks are."""

    ends: Ends
    inputs: Inputs

    @classmethod
    def of(cls, images: Tensor) -> Given:
        """Of (n, pixels), on the CPU, where theory is worked out."""
        return cls(Ends.of_images(images), Inputs.of(images))


def read(
    parameters: Parameters,
    scheme: Scheme,
    activation: Activation,
    bias_init: str,
    *,
    seen: Observation,
    given: Given,
    output_scale: float = 1.0,
) -> Reading:
    """The network of ``parameters`` (a stack of one), drawn by ``scheme``, as it was ``seen``.

    That was on the images that ``given`` is of. The last layer's weights were multiplied by
    ``output_scale`` after they were drawn.
    """
    layers = layers_of(scheme, parameters, activation, bias_init, output_scale=output_scale)
    middle = layers[(len(layers) - 1) // 2]
    verdict = judge(seen.signals, given.inputs, seen.signals.layers if activation.saturates else ())
    with machine.threads(1):  # theory is many small steps, which only wait for a second one
        ends = given.ends.with_gradient(seen.gradient_moment, seen.gradient_alignment)
        theory = predicted(layers, activation, ends)
        sigma_w2 = middle.fan_in * middle.weight_variance
        field = _mean_field(activation, sigma_w2, middle.bias_variance)
    *hidden, _ = seen.signals.layers
    ways = {FORWARD: (hidden[0], hidden[-1]), BACKWARD: (hidden[-1], hidden[0])} if hidden else {}
    return Reading(
        seen.signals,
        theory.by_layer,
        field,
        verdict,
        advice(verdict, activation, scheme.name) or margin(verdict, seen.signals, given.inputs),
        seen.preactivations,
        changes={
            quantity: Growth.of(seen.signals, quantity, way, theory.changes[quantity])
            for quantity, way in ways.items()
        },
    )


@functools.lru_cache(maxsize=256)
def _mean_field(activation: Activation, sigma_w2: float, sigma_b2: float) -> MeanField:
    """Worked out once for all networks of a scheme."""
    return mean_field(activation, sigma_w2, sigma_b2)


def layers_of(
    scheme: Scheme,
    parameters: Parameters,
    activation: Activation,
    bias_init: str,
    *,
    output_scale: float = 1.0,
) -> list[LayerStatistics]:
    """The layers of ``parameters`` (a stack of one), drawn by ``scheme``.

    Their variances are those that the scheme states, the last one's scaled as its weights were, or,
    where it states none, the sample's; of biases that it does not set, those of ``bias_init``.
    """
    found = []
    layers_at = places(parameters.widths, activation)
    for at, weights, biases in zip(layers_at, parameters.weights, parameters.biases, strict=True):
        variance, bias_variance = scheme.variance(at), scheme.bias_variance(at)
        if variance is None:
            variance = weights[0].double().var(correction=0).item()
        elif at.layer == at.depth - 1:
            variance *= output_scale**2
        if not scheme.fills_biases:
            bias_variance = bias_bound(bias_init, at.fan_in) ** 2 / 3
        elif bias_variance is None:
            bias_variance = biases[0].double().square().mean().item()
        found.append(LayerStatistics(at.fan_in, at.fan_out, variance, bias_variance))
    return found


def as_json(reading: Reading, history: Sequence[tuple[int, Signals]]) -> dict[str, Any]:
    """All of it as plain values; what is not a finite number is text, or left out."""
    return {
        "quantities": QUANTITIES | (BY_TIME if reading.signals.by_time else {}),
        "verdict": dataclasses.asdict(reading.verdict) | {"advice": reading.advice},
        "mean_field": reading.mean_field and _finite(reading.mean_field),
        "predicted": {
            quantity: {layer: _finite(interval) for layer, interval in intervals.items()}
            for quantity, intervals in reading.by_layer().items()
        },
        "changes": {
            quantity: {
                "from": change.start,
                "to": change.end,
                "measured": change.measured and _plain(change.measured),
                "predicted": _finite(change.predicted),
            }
            for quantity, change in reading.changes.items()
        },
        **_by_time("predicted_by_time", reading.by_time, _finite),
        "outside_the_band": reading.outside(),
        "measured": [
            {
                "step": step,
                "layers": dict(signals.layers),
                "nonfinite": dict(signals.nonfinite),
                **_by_time("by_time", signals.by_time, lambda value: value),
            }
            for step, signals in history
        ],
    }


def _by_time(
    name: str, by_time: Mapping[str, Mapping[str, Sequence[T]]], plain: Callable[[T], object]
) -> dict[str, Any]:
    """Nothing where there are no recurrent layers."""
    series = {
        layer: {quantity: [plain(value) for value in values] for quantity, values in its.items()}
        for layer, its in by_time.items()
    }
    return {name: series} if series else {}


def _expected(intervals: Sequence[Interval]) -> list[float | None]:
    """Where it is a finite number."""
    return [i.expected if math.isfinite(i.expected) else None for i in intervals]


def _finite(numbers: MeanField | Interval) -> dict[str, float | str]:
    """By name; as text where it is not a finite number."""
    return {name: _plain(number) for name, number in dataclasses.asdict(numbers).items()}


def _plain(number: float) -> float | str:
    """As text where it is not a finite number."""
    return number if math.isfinite(number) else str(number)


@dataclass(frozen=True)
class Table:
    """What a file of :func:`as_json` says, or a run's metrics.

    ``history`` has what was measured, by step; ``predicted`` and ``by_time``, as in a
    :class:`Reading`, are of the first of them.
    """

    history: Sequence[tuple[int, Signals]]
    predicted: Prediction = field(default_factory=dict)
    by_time: PredictedByTime = field(default_factory=dict)

    def rows(self) -> list[dict[str, object]]:
        """One for each step, layer and quantity.

        ``measured`` is a number; ``median``, ``low`` and ``high`` are what is predicted of it at
        the first step, where that is known.
        """
        return [
            {"step": step, "layer": layer, "quantity": quantity, "measured": number}
            | (self._band(quantity, at) if signals is self.history[0][1] else {})
            for step, signals in self.history
            for at, (layer, quantities) in enumerate(signals.layers.items())
            for quantity, number in quantities.items()
        ]

    def _band(self, quantity: str, at: int) -> dict[str, float]:
        intervals = self.predicted.get(quantity, [])
        return {
            name: getattr(interval, name)
            for interval in intervals[at : at + 1]
            for name in ("median", "low", "high")
        }


def table(content: bytes) -> Table:
    """A file of :func:`as_json`; a ValueError where it is none."""
    with _told():
        values = json.loads(content)
        history = [(step["step"], _signals(step)) for step in values["measured"]]
        layers = history[0][1].layers
        predicted = {
            quantity: [_interval(its[layer]) for layer in layers if layer in its]
            for quantity, its in values["predicted"].items()
        }
        by_time = {
            layer: {quantity: [_interval(one) for one in of] for quantity, of in its.items()}
            for layer, its in values.get("predicted_by_time", {}).items()
        }
    return Table(history, predicted, by_time)


def untrained_signals(content: bytes) -> Signals:
    """Those at the first step in a file of :func:`as_json`; a ValueError where it is none."""
    with _told():
        return _signals(json.loads(content)["measured"][0])


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What is not there, or is of another kind, as a ValueError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no table of signals: {error!r}") from error


def _signals(step: Mapping[str, Any]) -> Signals:
    """Those at one step of a file; the sizes of the layers are not in it."""
    layers, nonfinite, by_time = (step.get(name, {}) for name in ("layers", "nonfinite", "by_time"))
    for values in [*layers.values(), nonfinite]:
        _check_numbers(values.values())
    for series in by_time.values():
        for its in series.values():
            _check_numbers(value for value in its if value is not None)
    if not layers:
        raise ValueError("no table of signals: it has no layers")
    return Signals(layers, nonfinite, by_time=by_time)


def _check_numbers(values: Iterable[object]) -> None:
    for value in values:
        if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
            raise ValueError(f"no table of signals: {value!r} is no finite number")


def _interval(numbers: Mapping[str, float | str]) -> Interval:
    """Numbers that are not finite stand in the file as text."""
    return Interval(**{name: float(number) for name, number in numbers.items()})

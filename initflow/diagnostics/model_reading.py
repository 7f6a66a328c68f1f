"""One untrained model of any architecture read: measured under several draws, beside theory.

What one draw of the scheme gives is measured, and the band is where it should lie with 95 % by what
further draws give, so that it is honest for any architecture. Theory says the mean over draws,
where there is a rule for all that the model does on the way.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from initflow.diagnostics import inspection
from initflow.diagnostics.reading import BACKWARD, FORWARD, Growth, Reading
from initflow.diagnostics.signals import Signals
from initflow.diagnostics.verdict import Inputs, advice_for_model, judge
from initflow.models import batches, places, weights
from initflow.models.building import Loss
from initflow.models.graph import Node
from initflow.models.moments import expectations
from initflow.models.moments.forward import own_moments
from initflow.models.moments.rules import ALL, NoRuleError
from initflow.models.weights import Matrix
from initflow.theory import recurrent
from initflow.theory.draws import band
from initflow.theory.prediction import Interval, Prediction

QUANTITIES = {"forward": FORWARD, "backward": BACKWARD}
HIDDEN, HIDDEN_GRADIENT = "hidden_second_moment", "hidden_gradient_second_moment"
SEQUENCES = 64  # of a batch, at most, where there are recurrent layers
TIME_STEPS = 2**11  # of all of these, where they are long


@dataclass(frozen=True)
class Draw:
    """A model filled once; ``stated`` are the variances of its matrices, None where not stated."""

    model: nn.Module
    stated: Mapping[str, float | None]


@dataclass(frozen=True)
class ModelReading:
    """What was read of ``model``, and why nothing is predicted of some layers.

    That is by their names, each way.
    """

    model: nn.Module
    reading: Reading
    unpredicted: Mapping[str, Mapping[str, str]]

    @property
    def gaps(self) -> str:
        """A sentence on the layers that nothing is predicted of; empty where there are none."""
        n = len(self.reading.signals.layers)
        ways = [
            f"{way} in {len(its)} of {n} layers" for way, its in self.unpredicted.items() if its
        ]
        reasons = dict.fromkeys(why for its in self.unpredicted.values() for why in its.values())
        more = f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        told = f"{next(iter(reasons), '')}{more}"
        return f"Not predicted {' and '.join(ways)}: {told}." if ways else ""


def read(
    drawn: Callable[[int], Draw], batch: object, loss: Loss, *, seed: int, draws: int, scheme: str
) -> ModelReading:
    """Measure the draw of ``seed``, with a band from the ``draws`` that follow.

    ``drawn`` gives the model filled from a seed, the same one or another each time; ``batch`` and
    ``loss`` are as :func:`initflow.inspect` takes them. ``scheme`` is the name of what fills it.
    Without further draws there is no band.
    """
    measured, sizes = [], []
    for nth in reversed(range(draws + 1)):  # that of the seed itself comes last, and stays
        draw = drawn(seed + nth)
        measured.append(inspection.inspect(draw.model, batch, loss))
        sizes.append(_mean_squares(draw))
    *further, signals = measured
    of_weights = {name: _mean(sizes, name) for name in sizes[0]}
    theory = _Theory(draw, batch, loss, of_weights, _sequences(signals))
    predicted: Prediction = {}
    unpredicted: dict[str, dict[str, str]] = {}
    for way, quantity in QUANTITIES.items():
        predicted[quantity], unpredicted[way] = [], {}
        for layer in signals.layers:
            try:
                expected = theory.expected(quantity, layer)
            except NoRuleError as error:
                unpredicted[way][layer] = str(error)
                expected = math.nan
            values = [one.layers.get(layer, {}).get(quantity, math.nan) for one in further]
            predicted[quantity].append(_interval(expected, values))
    verdict = judge(signals, _inputs(batch), theory.saturating())
    by_time = {
        layer: {
            quantity: _intervals(theory.by_time(quantity, layer), layer, quantity, measured)
            for quantity in series
        }
        for layer, series in signals.by_time.items()
    }
    # What the rules have computed is gigabytes, in objects that refer to each other.
    del theory
    gc.collect()
    said = advice_for_model(verdict, scheme)
    changes = _changes(signals, further)
    reading = Reading(signals, predicted, None, verdict, said, (), by_time, changes)
    return ModelReading(draw.model, reading, unpredicted)


def _interval(expected: float, values: Sequence[float]) -> Interval:
    of_draws = band(values) if values else Interval(math.nan, math.nan, math.nan, math.nan)
    return replace(of_draws, expected=expected)


def _changes(signals: Signals, further: Sequence[Signals]) -> dict[str, Growth]:
    """Between the first and the last layer, each way, with the band of ``further`` draws."""
    layers = list(signals.layers)
    first, last = layers[0], layers[-1]
    found = {}
    for quantity, way in {FORWARD: (first, last), BACKWARD: (last, first)}.items():
        unknown = _interval(math.nan, ())
        of_draws = [Growth.of(one, quantity, way, unknown).measured for one in further]
        values = [math.nan if value is None else value for value in of_draws]
        interval = band(values) if values else unknown
        found[quantity] = Growth.of(signals, quantity, way, interval)
    return found


def _intervals(
    expected: Sequence[float], layer: str, quantity: str, measured: Sequence[Signals]
) -> list[Interval]:
    """Of each time step; all but the last of what was ``measured`` are further draws."""
    *further, own = (signals.by_time.get(layer, {}).get(quantity, ()) for signals in measured)
    if len(expected) != len(own):  # of several calls, for one
        expected = [math.nan] * len(own)
    numbers = [[math.nan if x is None else x for x in values] for values in further]
    of_times = zip(*numbers, strict=True) if numbers else [()] * len(own)
    return [_interval(value, of_one) for value, of_one in zip(expected, of_times, strict=True)]


class _Theory:
    """What is expected of the layers of a model, by the names that they have when measured."""

    def __init__(
        self,
        draw: Draw,
        batch: object,
        loss: Loss,
        mean_squares: Mapping[str, float],
        images: int,
    ) -> None:
        model = weights.unwrapped(draw.model)
        found = weights.of(model)
        few = batches.given(model, expectations.first(batch, images))
        self._structure = places.Structure.of(model, found.every, few)
        self._stated, self._mean_squares = draw.stated, mean_squares
        self._root = type(model).__name__.lower()
        self._nodes: dict[str, list[tuple[Node, Matrix]]] = {}
        for node, matrices in self._structure.products.items():
            for matrix in matrices:
                self._nodes.setdefault(self._layer(matrix), []).append((node, matrix))
        traced = self._structure.known("a prediction")
        gradients = _output_gradients(model, batch, loss, traced.outputs)
        self._theory = expectations.theory(traced, gradients, self._weight_moments)

    def _layer(self, matrix: Matrix) -> str:
        """The name that what it gives has, when it is measured."""
        if not matrix.gate:
            return matrix.module or self._root
        return matrix.name.rpartition(".")[0] if matrix.activation != "linear" else matrix.name

    def expected(self, quantity: str, layer: str) -> float:
        """The mean over the calls of a layer, or a :class:`NoRuleError` that says why not."""
        if layer not in self._nodes:
            raise NoRuleError(f"no rule for {layer}")
        side = self._theory.forward if quantity == FORWARD else self._theory.backward
        assert side is not None
        values = []
        for node, matrix in self._nodes[layer]:
            if node.function in recurrent.GATES:
                values.append(self._of_gate(quantity, node, matrix))
                continue
            if node.shape is None:
                raise NoRuleError(f"no rule for {node.function} in {node.module}")
            moments = side.moment(node).expand(node.shape)
            if matrix.gate and moments.shape[-1] != matrix.fan_out:  # packed with others
                moments = moments[..., slice(*matrix.part)]
            values.append(float(moments.mean().item()))
        return sum(values) / len(values)

    def _of_gate(self, quantity: str, node: Node, matrix: Matrix) -> float:
        """The mean over all sequences and time steps."""
        theory = self._theory
        layers: Sequence[recurrent.Forward | recurrent.Backward] = (
            theory.forward_through_time(node)
            if quantity == FORWARD
            else theory.backward_through_time(node)
        )
        gates = layers[self._number(node, matrix)].preactivations
        return gates[matrix.part[0] // matrix.fan_out].mean().item()

    def _number(self, node: Node, matrix: Matrix) -> int:
        """Of a matrix's layer among those of a recurrent module."""
        layers = dict.fromkeys(each.layer for each in self._structure.products[node])
        return list(layers).index(matrix.layer)

    def by_time(self, quantity: str, layer: str) -> list[float]:
        """The mean over the sequences at each time step; empty where there is no rule."""
        found = next(
            ((node, matrix) for node, matrix in self._recurrent if matrix.layer == layer), None
        )
        if found is None or quantity not in (HIDDEN, HIDDEN_GRADIENT):
            return []
        node, matrix = found
        number = self._number(node, matrix)
        with contextlib.suppress(NoRuleError):
            if quantity == HIDDEN_GRADIENT:
                return self._theory.backward_through_time(node)[number].hidden.mean(0).tolist()
            hidden = self._theory.forward_through_time(node)[number].hidden
            return hidden.diagonal(dim1=1, dim2=2).mean(0).tolist()
        return []

    @property
    def _recurrent(self) -> Iterator[tuple[Node, Matrix]]:
        for its in self._nodes.values():
            yield from ((n, matrix) for n, matrix in its if n.function in recurrent.GATES)

    def _weight_moments(
        self, node: Node, weight: Tensor, bias: Tensor | None, rows: slice = ALL
    ) -> tuple[float, float]:
        """As the scheme states them or, where it does not, the mean over all draws."""
        own = own_moments(node, weight, bias, rows)
        matrices = self._structure.products.get(node, ())
        if rows != ALL:
            matrices = [
                m for m in matrices if m.slot.originals[0] is weight and slice(*m.part) == rows
            ]
        variances = [self._variance(matrix) for matrix in matrices]
        of_bias = [self._mean_squares.get(m.bias.name, own[1]) for m in matrices if m.bias]
        if bias is None or not of_bias:
            of_bias = [own[1]]
        return sum(variances) / len(variances) if variances else own[0], sum(of_bias) / len(of_bias)

    def _variance(self, matrix: Matrix) -> float:
        stated = self._stated.get(matrix.name)
        return self._mean_squares[matrix.name] if stated is None else stated

    def saturating(self) -> set[str]:
        """The layers whose activation function is flat on both sides."""
        followed = {
            layer: [self._structure.activation(matrix) for _, matrix in its]
            for layer, its in self._nodes.items()
        }
        return {
            layer
            for layer, functions in followed.items()
            if any(f and f.activation and f.activation.saturates for f in functions)
        }


def _sequences(signals: Signals) -> int:
    """How many of a batch are gone by: each sequence has other inputs at a time step."""
    lengths = [len(values) for its in signals.by_time.values() for values in its.values()]
    if not lengths:
        return expectations.IMAGES
    return max(expectations.IMAGES, min(SEQUENCES, TIME_STEPS // max(lengths)))


def _mean_squares(draw: Draw) -> dict[str, float]:
    """Of the entries of each matrix that nothing is stated of, and of each bias, by name."""
    found = {}
    for matrix in weights.of(draw.model).every:
        if draw.stated.get(matrix.name) is None:
            found[matrix.name] = matrix.rows().double().square().mean().item()
        if matrix.bias:
            found[matrix.bias.name] = matrix.bias.read().double().square().mean().item()
    return found


def _mean(draws: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(draw[name] for draw in draws) / len(draws)


def _output_gradients(
    model: nn.Module, batch: object, loss: Loss, outputs: Sequence[Node]
) -> dict[Node, Tensor]:
    """The gradient of the loss on all of ``batch`` by the outputs, of its first images.

    ``outputs`` are the nodes of a forward on these.
    """
    given = batches.given(model, batch)
    with batches.undisturbed(model), torch.enable_grad():
        made = model(*given.arguments, **given.by_name)
        value = loss(made, *given.targets, **given.targets_by_name)
        tensors = [x for x in batches.tensors(made) if x.requires_grad]
        gradients = torch.autograd.grad(value, tensors, allow_unused=True)
    found = {}
    for node, x, gradient in zip(outputs, tensors, gradients, strict=False):
        if gradient is not None and node.shape is not None and x.dim():
            found[node] = gradient[: node.shape[0]].detach()
    return found


def _inputs(batch: object) -> Inputs:
    """Of the first input, where that is of real numbers."""
    first = next(iter(batches.tensors(batch)), None)
    return Inputs.of(first) if first is not None and first.is_floating_point() else Inputs()

"""The rule of recurrent kernels: ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``, layer upon layer.

What becomes of a sequence in one layer is :mod:`initflow.theory.recurrent`'s; here it is found what
the kernel was called with, and what it gave becomes moments of entries. Sequences go through it
each on its own, from states of 0, in one direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from initflow.models.graph import Node
from initflow.models.moments import operations
from initflow.models.moments.offsets import Offset
from initflow.models.moments.rules import Backward, Forward, NoRuleError, Rule, said, shape_of
from initflow.theory import recurrent
from initflow.theory.recurrent import GATES, GRU, OF_RNN, Layer

OUTPUT, HIDDEN = 0, 1  # of what a kernel gives; an LSTM has its cell state at the end, too
CHANCE = 5.0  # standard deviations of a mean, beyond which it is not 0


@dataclass(frozen=True)
class Called:
    """A kernel's ``source`` and the ``weights`` of each layer, with its number of ``units``.

    ``time`` is the axis of its time steps, of ``axes``; the other one before the features is that
    of the sequences.
    """

    source: Node
    kind: str
    weights: Sequence[Sequence[Tensor]]
    units: int
    dropout: float
    has_biases: bool
    time: int

    @classmethod
    def of(cls, whole: Node) -> Called:
        """Raises :class:`NoRuleError` where there is no rule for how it is called."""
        arguments = whole.arguments
        if not isinstance(arguments[3], bool):
            raise NoRuleError(f"no rule for packed sequences, which {said(whole)} takes")
        source, state, weights, has_biases, layers, dropout, is_trained, is_two_way, turned = (
            arguments
        )
        if is_two_way:
            raise NoRuleError(f"no rule for both directions of {said(whole)}")
        of_one = len(weights) // layers
        if of_one > (4 if has_biases else 2):
            raise NoRuleError(f"no rule for the projections of {said(whole)}")
        states = state if isinstance(state, (tuple, list)) else (state,)
        if any(isinstance(one, Node) or bool(one.any()) for one in states):
            raise NoRuleError(f"no rule for first states other than 0 of {said(whole)}")
        kind, units = whole.function, weights[1].shape[1]
        of_layers = [weights[at : at + of_one] for at in range(0, len(weights), of_one)]
        dropped = float(dropout) if is_trained else 0.0
        return cls(source, kind, of_layers, units, dropped, has_biases, 1 if turned else 0)

    def kernel(self, moment: Callable[[Node, Offset], Tensor], node: Node) -> Tensor:
        """(sequences, times, times): of all pairs of time steps, summed over the features."""
        shape = shape_of(node)
        sequences, times = shape[1 - self.time], shape[self.time]
        found = torch.zeros(sequences, times, times, dtype=torch.double)
        for step in range(times):
            own = moment(node, (step, 0, 0) if self.time == 0 else (0, step, 0))
            own = own if own.shape[-1] == shape[-1] else own.expand(*own.shape[:-1], shape[-1])
            rows = own.sum(-1) if self.time else own.sum(-1).T
            line = rows.expand(sequences, times)[:, : times - step]
            found.diagonal(step, 1, 2).copy_(line)
            found.diagonal(-step, 1, 2).copy_(line)
        return found

    def line(self, kernel: Tensor, offset: Offset, node: Node) -> Tensor:
        """Pairs ``offset`` apart of what a ``kernel`` (sequences, times, times) is of, as a map."""
        step, times = offset[self.time], kernel.shape[-1]
        if offset[1 - self.time]:
            raise NoRuleError(f"no rule for pairs of sequences of {said(node)}")
        found = kernel.diagonal(step, 1, 2)
        blank = found.new_zeros(len(found), min(abs(step), times))
        found = torch.cat([found, blank] if step >= 0 else [blank, found], 1)
        return (found if self.time else found.T).unsqueeze(-1)


class Recurring(Rule):
    """``parts`` gives the tensors that a kernel gives, in their order."""

    def __init__(self, parts: Callable[[Node], Sequence[Node]]) -> None:
        self._parts = parts
        self._forward: dict[Node, list[recurrent.Forward]] = {}
        self._backward: dict[Node, list[recurrent.Backward]] = {}

    def forward(self, at: Forward, whole: Node) -> list[recurrent.Forward]:
        """What goes on in each layer of the kernel that gave ``whole``."""
        if whole not in self._forward:
            called = Called.of(whole)
            into = called.kernel(at.moment, called.source)
            found: list[recurrent.Forward] = []
            for number in range(len(called.weights)):
                if found:
                    into = called.units * _dropped(found[-1].hidden, called.dropout)
                found.append(recurrent.forward(_layer(at, whole, called, number), into))
            self._forward[whole] = found
        return self._forward[whole]

    def backward(self, back: Backward, whole: Node) -> list[recurrent.Backward]:
        """The same of the loss's gradient."""
        if whole not in self._backward:
            called, gone = Called.of(whole), self.forward(back.forward, whole)
            output, hidden, *others = self._parts(whole)
            for other in others:
                if bool(back.moment(other).any()):
                    raise NoRuleError(
                        f"no rule for the gradient of the cell state of {said(other)}"
                    )
            arriving = called.kernel(back.moment, output) / called.units
            at_end = back.moment(hidden)
            at_end = at_end.expand(shape_of(hidden)).mean(-1)
            found: list[recurrent.Backward] = []
            for number in reversed(range(len(gone))):
                arriving[:, -1, -1] += at_end[number]
                found.insert(0, recurrent.backward(gone[number], arriving))
                arriving = _dropped(found[0].inputs, called.dropout)
            self._backward[whole] = found
        return self._backward[whole]

    def moment(self, at: Forward, node: Node, offset: Offset) -> Tensor:
        whole, part = node.arguments
        called, layers = Called.of(whole), self.forward(at, whole)
        if part == OUTPUT:
            last = layers[-1]
            means = last.mean.unsqueeze(2) * last.mean.unsqueeze(1)
            return called.line(means if offset[-1] else last.hidden, offset, node)
        if offset[1]:
            raise NoRuleError(f"no rule for pairs of sequences of {said(node)}")
        if offset[0] or (part != HIDDEN and offset[-1]):
            return torch.zeros((1, 1, 1), dtype=torch.double)
        ends = []
        for layer in layers:
            cell = layer.hidden[:, -1, -1] if layer.cell is None else layer.cell[:, -1]
            state = layer.mean[:, -1].square() if offset[-1] else layer.hidden[:, -1, -1]
            ends.append(state if part == HIDDEN else cell)
        return torch.stack(ends).unsqueeze(-1)

    def mean(self, at: Forward, node: Node) -> Tensor:
        whole, part = node.arguments
        means = [layer.mean for layer in self.forward(at, whole)]
        if part == OUTPUT:
            return (means[-1] if Called.of(whole).time else means[-1].T).unsqueeze(-1)
        ends = torch.stack([mean[:, -1] for mean in means]).unsqueeze(-1)
        return ends if part == HIDDEN else ends * 0

    def gradient(self, back: Backward, node: Node, source: Node, offset: Offset) -> Tensor:
        """All of it by the output, nothing by the states at the end: both come by one way."""
        whole, part = node.arguments
        if part != OUTPUT or offset[-1]:
            return torch.zeros((1,) * len(offset), dtype=torch.double)
        inputs = self.backward(back, whole)[0].inputs
        return Called.of(whole).line(inputs, offset, source)


def is_recurrent(node: Node) -> bool:
    """Whether it is one of the tensors that a recurrent kernel gives."""
    return operations.is_part(node) and node.arguments[0].function in GATES


def _dropped(kernel: Tensor, probability: float) -> Tensor:
    """After dropout: each entry of each time step is dropped by itself."""
    if not probability:
        return kernel
    own = kernel.diagonal(dim1=1, dim2=2) * probability / (1 - probability)
    return kernel + torch.diag_embed(own)


def _layer(at: Forward, whole: Node, called: Called, number: int) -> Layer:
    """With the variances of its weights, and mean and variance of its own biases."""
    of_inputs, of_hidden, *biases = called.weights[number]
    n, units = GATES[called.kind], called.units
    rows = [slice(gate * units, (gate + 1) * units) for gate in range(n)]
    if any(_is_like_identity(of_hidden.detach()[part].double()) for part in rows):
        raise NoRuleError(f"no rule for recurrent weights like the identity in {said(whole)}")
    inputs, own = (
        [at.weight_moments(whole, weight, None, part)[0] for part in rows]
        for weight in (of_inputs, of_hidden)
    )
    parts: list[Any] = [[bias.detach().double()[part] for part in rows] for bias in biases]
    none = torch.zeros(units, dtype=torch.double)
    first, second = parts if biases else ([none] * n, [none] * n)
    if called.kind == GRU:
        sums = [first[0] + second[0], first[1] + second[1], first[2], second[2]]
        inputs, own = [*inputs, 0.0], [*own[:2], 0.0, own[2]]
    else:
        sums = [one + other for one, other in zip(first, second, strict=True)]
    means = [_mean(one) for one in sums]
    if called.kind in OF_RNN and any(means):
        raise NoRuleError(f"no rule for biases whose mean is not 0 in {said(whole)}")
    variances = [(one - mean).square().mean().item() for one, mean in zip(sums, means, strict=True)]
    return Layer(
        called.kind, units, *(torch.tensor(x).double() for x in (inputs, own, means, variances))
    )


def _is_like_identity(weight: Tensor) -> bool:
    """Whether its diagonal is of one sign, more than chance may give it."""
    chance = weight.square().mean().sqrt() / len(weight) ** 0.5
    return bool(weight.diagonal().mean().abs() > CHANCE * chance)


def _mean(biases: Tensor) -> float:
    """0 where chance may have given it, as that of a forget gate's that start at 1 is not."""
    mean, chance = biases.mean().item(), biases.std(correction=0).item() / len(biases) ** 0.5
    return mean if abs(mean) > CHANCE * chance else 0.0

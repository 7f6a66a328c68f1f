"""The mean field of a recurrent layer at initialization, time step by time step.

The weights are drawn once, and used at each time step. For a given sequence, what a unit sums up
at all its time steps is a normal vector, independent from unit to unit: the covariance of two
steps is the variance of an input weight times the product of the two inputs, that of a recurrent
weight times the product of the two hidden states before, and that of the bias. Hidden states are
functions of these sums. Backward, what a unit's hidden state receives through weights is such a
vector, too, and taken to be independent of all that came forward, as the weights' transposes are
in wide layers (Yang 2020, "Tensor Programs III").

Of a layer that forgets all at once (``rnn_tanh``, ``rnn_relu``) the moments are Gaussian integrals.
In an LSTM or a GRU a unit's state hangs together with its gates of all steps before, as these use
the same weights: it is a population of units here, each with normal sums of its own, whose
covariances follow, step by step, from the population's hidden states. Chen, Pennington and
Schoenholz 2018, "Dynamical Isometry and a Mean Field Theory of RNNs", and Gilboa et al. 2019,
"Dynamical Isometry and a Mean Field Theory of LSTMs and GRUs", draw the sums of each step anew; of
gates whose biases or inputs are the same at all steps that gives other cell states.

With orthogonal recurrent matrices, of variance 1/units, these second moments are the same as with
independent weights, up to terms that vanish with the width. What differs is how the sizes of
gradients vary about them: the singular values of products over many steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from initflow.initializers.activations import ACTIVATIONS, Activation
from initflow.theory.integrals import (
    product_moment,
    second_moment,
    slope_moment,
    slope_product_moment,
)
from initflow.theory.normal_samples import uncorrelated_samples, weighted_samples

LSTM, GRU = "lstm", "gru"
OF_RNN = {"rnn_tanh": ACTIVATIONS["tanh"], "rnn_relu": ACTIVATIONS["relu"]}
KINDS = (*OF_RNN, LSTM, GRU)
GATES = {**dict.fromkeys(OF_RNN, 1), LSTM: 4, GRU: 3}
FEWEST, MOST = 2**10, 2**14  # units of a population
ALL_STEPS = 2**21  # of all sequences' populations, with units between the fewest and the most
ENTRIES = 2**20  # of these at a time, some 100 bytes each
NODES = 32**2  # of an integral over two variables
ROUNDED = 1e-12  # of a variance: what is less is none


@dataclass(frozen=True)
class Layer:
    """One recurrent layer in one direction, of a kind of :data:`KINDS`.

    Each tensor is (sums,): the variances of an entry of the input and of the recurrent weights,
    and mean and variance of the bias. An RNN has one sum, an LSTM those of its gates as PyTorch
    has them (input, forget, cell, output). A GRU has four: reset, update, and for the new gate what
    comes of the inputs and, without input weights, what comes of the hidden state, which the reset
    gate scales; the third has no recurrent weights.
    """

    kind: str
    units: int
    inputs: Tensor
    recurrent: Tensor
    bias_mean: Tensor
    bias_variance: Tensor


@dataclass(frozen=True)
class Forward:
    """Mean squares of the gates' pre-activations, (gates, sequences, times), and of the states.

    ``hidden`` are the means of products of a unit's hidden states at two time steps, (sequences,
    times, times), ``mean`` those of the states themselves and ``cell`` the mean squares of an
    LSTM's cell state, (sequences, times).
    """

    layer: Layer
    preactivations: Tensor
    hidden: Tensor
    mean: Tensor
    cell: Tensor | None
    back: Callable[[Tensor], Backward]


@dataclass(frozen=True)
class Backward:
    """Mean squares of the loss's gradient by the pre-activations, and by the hidden states.

    ``preactivations``: (gates, sequences, times); ``hidden``: (sequences, times); ``inputs`` are
    the means of products of that by one entry of the inputs at two time steps, (sequences, times,
    times).
    """

    preactivations: Tensor
    hidden: Tensor
    inputs: Tensor


def forward(layer: Layer, inputs: Tensor) -> Forward:
    """What becomes of ``inputs``, (sequences, times, times), from hidden states of 0.

    They are the sums over the features of the products of the inputs at two time steps, in double
    precision. Raises :class:`ValueError` for a layer of another kind.
    """
    if layer.kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not '{layer.kind}'")
    return _of_rnn(layer, inputs) if layer.kind in OF_RNN else _of_gated(layer, inputs)


def backward(gone: Forward, arriving: Tensor) -> Backward:
    """What becomes of the gradients that ``gone``'s hidden states receive from outside the layer.

    ``arriving`` are the means of products of those by a unit's hidden state at two time steps,
    (sequences, times, times).
    """
    return gone.back(arriving)


def _of_rnn(layer: Layer, inputs: Tensor) -> Forward:
    activation, times = OF_RNN[layer.kind], inputs.shape[1]
    own, rest = (layer.recurrent * layer.units).item(), layer.bias_variance.item()
    shift = layer.bias_mean.item()
    if shift:
        raise ValueError("the biases of an RNN must have the mean 0")
    sums = layer.inputs.item() * inputs + rest
    hidden = torch.zeros_like(sums)
    slopes = torch.zeros_like(sums)
    for time in range(times):
        if time:
            row = sums[:, time, : time + 1]
            row[:, 1:] += own * hidden[:, time - 1, :time]
            sums[:, :time, time] = row[:, :time]
        row, until = sums[:, time, : time + 1], slice(time + 1)
        variances = sums.diagonal(dim1=1, dim2=2)[:, until]
        both = _pairs(activation, variances, row)
        for of_pairs, found in zip((hidden, slopes), both, strict=True):
            of_pairs[:, time, until] = of_pairs[:, until, time] = found

    def back(arriving: Tensor) -> Backward:
        by_hidden = arriving.clone()
        for time in reversed(range(1, times)):
            row = own * slopes[:, time, : time + 1] * by_hidden[:, time, : time + 1]
            before, until = time - 1, slice(time)
            by_hidden[:, before, until] += row[:, 1:]
            by_hidden[:, until, before] = by_hidden[:, before, until].clone()
        by_sums = slopes * by_hidden
        gates, states = (x.diagonal(dim1=1, dim2=2) for x in (by_sums, by_hidden))
        return Backward(gates.unsqueeze(0), states, layer.inputs.item() * layer.units * by_sums)

    variances = sums.diagonal(dim1=1, dim2=2)
    mean = _mean(activation, variances)
    return Forward(layer, variances.unsqueeze(0), hidden, mean, None, back)


def _pairs(activation: Activation, variances: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """E[φ(u)φ(v)] and E[φ′(u)φ′(v)] of the last time step's sum u with that of each until it.

    ``row`` are the covariances; both (sequences, times).
    """
    last = variances[:, -1:]
    size = (variances * last).sqrt()
    c = (row / size.clamp(min=torch.finfo(torch.double).tiny)).clamp(-1, 1)
    if activation.name in ("relu", "linear"):
        products = product_moment(activation, size, c)
        slopes = slope_product_moment(activation, size, c)
    else:
        z, weights = weighted_samples(NODES, 2)
        u = last.sqrt().unsqueeze(-1) * z[:, 0]
        across = c.unsqueeze(-1) * z[:, 0] + (1 - c.square()).sqrt().unsqueeze(-1) * z[:, 1]
        v = variances.sqrt().unsqueeze(-1) * across
        products = (activation.function(u) * activation.function(v)) @ weights
        slopes = (activation.derivative(u) * activation.derivative(v)) @ weights
    products[:, -1] = second_moment(activation, last[:, 0])
    slopes[:, -1] = slope_moment(activation, last[:, 0])
    return products, slopes


def _mean(activation: Activation, variances: Tensor) -> Tensor:
    """E[φ(u)], which only a rectifier has."""
    if activation.name == "relu":
        return (variances / (2 * math.pi)).sqrt()
    return torch.zeros_like(variances)


@dataclass
class _Normal:
    """Normal vectors of a population's units, drawn entry by entry from covariances.

    ``z``: (sums, sequences, times, units), independent and of variance 1. ``root``: (sums,
    sequences, times, times), lower triangular, of the covariances so far.
    """

    z: Tensor
    root: Tensor

    @classmethod
    def of(cls, z: Tensor) -> _Normal:
        return cls(z, z.new_zeros(*z.shape[:3], z.shape[2]))

    def next(self, row: Tensor) -> Tensor:
        """(sums, sequences, units): the entry whose covariances with those until it are ``row``."""
        at = row.shape[-1] - 1
        before = self.root[..., :at, :at]
        held = before.diagonal(dim1=-2, dim2=-1)
        solvable = before + torch.diag_embed((held == 0).to(before.dtype))
        shares = torch.linalg.solve_triangular(
            solvable, row[..., :at].unsqueeze(-1), upper=False
        ).squeeze(-1)
        shares = shares * (held > 0)
        left = row[..., at] - shares.square().sum(-1)
        left = left.where(left > ROUNDED * row[..., at], 0.0)
        self.root[..., at, : at + 1] = torch.cat([shares, left.sqrt().unsqueeze(-1)], -1)
        drawn = self.root[..., at : at + 1, : at + 1] @ self.z[:, :, : at + 1]
        return drawn.squeeze(-2)


@dataclass(frozen=True)
class _Step:
    """What a population does at one time step, (sequences, units) each, but for the ``gates``.

    ``gates`` are the pre-activations, (gates, sequences, units); ``back`` takes the gradients by
    the hidden state and by what is handed on, and gives those by the sums, by the gates and by what
    was handed on.
    """

    gates: Tensor
    hidden: Tensor
    cell: Tensor | None
    back: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _of_gated(layer: Layer, inputs: Tensor) -> Forward:
    """Some sequences at a time; backward, their populations come to be once more."""
    units = _units(*inputs.shape[:2])
    several = max(1, ENTRIES // (inputs.shape[1] * units))
    starts = range(0, len(inputs), several)

    def part(start: int) -> _Part:
        some = inputs[start : start + several]
        return _Part.of(layer, some, _population(layer, some, start, units))

    def back(arriving: Tensor) -> Backward:
        found = [_back(layer, part(start), arriving[start : start + several]) for start in starts]
        return Backward(
            torch.cat([one.preactivations for one in found], 1),
            torch.cat([one.hidden for one in found]),
            torch.cat([one.inputs for one in found]),
        )

    parts = [replace(part(start), steps=[]) for start in starts]
    cells = [one.cell for one in parts if one.cell is not None]
    return Forward(
        layer,
        torch.cat([one.preactivations for one in parts], 1),
        torch.cat([one.hidden for one in parts]),
        torch.cat([one.mean for one in parts]),
        torch.cat(cells) if cells else None,
        back,
    )


@dataclass(frozen=True)
class _Part:
    """Of some sequences, what :class:`Forward` is of all, and the ``steps`` of a population.

    ``received`` are normal variables of what its hidden states receive backward.
    """

    steps: list[_Step]
    received: Tensor
    preactivations: Tensor
    hidden: Tensor
    mean: Tensor
    cell: Tensor | None

    @classmethod
    def of(cls, layer: Layer, inputs: Tensor, z: Tensor) -> _Part:
        """In an LSTM the cell state is handed on past the weights, in a GRU the hidden one."""
        sequences, times, _ = inputs.shape
        units = z.shape[-1]
        drawn = _Normal.of(z[:-1])
        own, of_inputs = layer.recurrent * layer.units, layer.inputs[:, None, None]
        step = _lstm if layer.kind == LSTM else _gru
        state = inputs.new_zeros(sequences, units)
        steps: list[_Step] = []
        hidden = torch.zeros_like(inputs)
        states = inputs.new_zeros(sequences, times, units)
        for time in range(times):
            row = of_inputs * inputs[:, time, : time + 1] + layer.bias_variance[:, None, None]
            if time:
                row[..., 1:] += own[:, None, None] * hidden[:, time - 1, :time]
            sums = drawn.next(row) + layer.bias_mean[:, None, None]
            steps.append(step(sums, state))
            states[:, time] = steps[-1].hidden
            state = steps[-1].hidden if steps[-1].cell is None else steps[-1].cell
            until = slice(time + 1)
            found = (states[:, until] @ states[:, time].unsqueeze(-1)).squeeze(-1) / units
            hidden[:, time, until] = hidden[:, until, time] = found
        cells = [one.cell.square().mean(-1) for one in steps if one.cell is not None]
        return cls(
            steps,
            z[-1:],
            torch.stack([one.gates.square().mean(-1) for one in steps], -1),
            hidden,
            states.mean(-1),
            torch.stack(cells, -1) if cells else None,
        )


def _back(layer: Layer, part: _Part, arriving: Tensor) -> Backward:
    """From the last time step to the first."""
    z = part.received
    _, sequences, times, units = z.shape
    drawn = _Normal.of(z)
    own = layer.recurrent * layer.units
    turned = arriving.flip(1, 2)
    handed = z.new_zeros(sequences, units)
    by_sums = z.new_zeros(len(own), sequences, times, units)
    products = z.new_zeros(len(own), sequences, times, times)
    gates, states = [], []
    for time, step in enumerate(reversed(part.steps)):
        row = turned[:, time, : time + 1].clone()
        if time:
            row[:, 1:] += torch.einsum("p,pst->st", own, products[:, :, time - 1, :time])
        by_hidden = drawn.next(row.unsqueeze(0)).squeeze(0)
        if step.cell is None:
            by_hidden = by_hidden + handed
        by_sums[:, :, time], by_gates, handed = step.back(by_hidden, handed)
        gates.append(by_gates.square().mean(-1))
        states.append(by_hidden.square().mean(-1))
        until = slice(time + 1)
        found = (by_sums[:, :, until] @ by_sums[:, :, time].unsqueeze(-1)).squeeze(-1) / units
        products[:, :, time, until] = products[:, :, until, time] = found
    of_inputs = torch.einsum("p,pstu->stu", layer.inputs * layer.units, products)
    return Backward(
        torch.stack(gates[::-1], -1), torch.stack(states[::-1], -1), of_inputs.flip(1, 2)
    )


def _units(sequences: int, times: int) -> int:
    """Of a population; there is one for each sequence."""
    return max(FEWEST, min(MOST, ALL_STEPS // (sequences * times))) // 2 * 2


def _population(layer: Layer, inputs: Tensor, start: int, units: int) -> Tensor:
    """Normal (sums + 1, sequences, times, units), each sequence's own, the first's by ``start``.

    The last are of the gradients that are received. With each unit there is one whose cell or new
    gate has the opposite sums, so that the mean of the hidden state is 0 where that of its biases
    is.
    """
    sequences, times, _ = inputs.shape
    sums = len(layer.inputs)
    each = [
        uncorrelated_samples(units // 2, (sums + 1) * times, start + number).T
        for number in range(sequences)
    ]
    z = torch.stack([one.reshape(sums + 1, times, -1) for one in each], 1)
    signs = z.new_ones(sums + 1, 1, 1, 1)
    signs[2 : sums if layer.kind == GRU else 3] = -1
    return torch.cat([z, signs * z], -1)


def _lstm(sums: Tensor, state: Tensor) -> _Step:
    i, f, o = (sums[at].sigmoid() for at in (0, 1, 3))
    g = sums[2].tanh()
    cell = f * state + i * g
    squashed = cell.tanh()

    def back(by_hidden: Tensor, handed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        by_cell = handed + by_hidden * o * (1 - squashed.square())
        by_sums = torch.stack(
            [
                by_cell * g * i * (1 - i),
                by_cell * state * f * (1 - f),
                by_cell * i * (1 - g.square()),
                by_hidden * squashed * o * (1 - o),
            ]
        )
        return by_sums, by_sums, by_cell * f

    return _Step(sums, o * squashed, cell, back)


def _gru(sums: Tensor, state: Tensor) -> _Step:
    reset, update = sums[0].sigmoid(), sums[1].sigmoid()
    before = sums[2] + reset * sums[3]
    new = before.tanh()

    def back(by_hidden: Tensor, _handed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        by_new = by_hidden * (1 - update) * (1 - new.square())
        by_reset = by_new * sums[3] * reset * (1 - reset)
        by_update = by_hidden * (state - new) * update * (1 - update)
        by_sums = torch.stack([by_reset, by_update, by_new, by_new * reset])
        return by_sums, by_sums[:3], by_hidden * update

    gates = torch.cat([sums[:2], before.unsqueeze(0)])
    return _Step(gates, new + update * (state - new), None, back)

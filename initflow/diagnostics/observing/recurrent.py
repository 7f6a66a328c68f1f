"""Recurrent kernels looked into: what they compute once more, unrolled, apart from the training.

PyTorch's kernels give no gates. At a step that is recorded, the same is computed from the same
inputs and weights, time step by time step, with a graph of its own. What it gives is held against
what the kernel gave, and where they differ, nothing is measured of the module. The gradients that
the kernel's outputs receive then go back through this graph.

Tensors over several time steps have the sequences of the first as their first rows, then those of
the second, as a ``PackedSequence`` has them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from initflow.diagnostics.observing.calls import is_plain, own_graph


class Function(NamedTuple):
    """What is applied to a gate's pre-activations, with its slope by what it gives."""

    apply: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    steepest: float


SIGMOID = Function(torch.sigmoid, lambda a: a * (1 - a), 0.25)
TANH = Function(torch.tanh, lambda a: 1 - a.square(), 1.0)
RELU = Function(torch.relu, lambda a: (a > 0).to(a.dtype), 1.0)
# Those of each gate, by the kernel's name.
KERNELS = {
    "lstm": (SIGMOID, SIGMOID, TANH, SIGMOID),
    "gru": (SIGMOID, SIGMOID, TANH),
    "rnn_tanh": (TANH,),
    "rnn_relu": (RELU,),
}
CELL = "_cell"
# How far the kernel's outputs may lie from the unrolled ones, as a share of their size. On a GPU
# kernels use TF32, which has 10 bits, and half precision rounds each hidden state.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class NotMeasuredError(Exception):
    """Says why a module is not measured."""


def is_kernel(name: str) -> bool:
    return name.removesuffix(CELL) in KERNELS


@dataclass(frozen=True)
class Kernel:
    """What a kernel is given, in one form.

    ``x``: (numbers, inputs), ``sizes[t]`` of them at time step t. ``state``: the hidden state,
    and an LSTM's cell state, each (layers, sequences, units). ``weights`` are those of each layer,
    ``transposed`` says that outputs have the sequences along their first axis; ``is_split`` that
    the hidden state was computed from the cell state in a function of its own, so that this one's
    gradient has the part that comes through the hidden state.
    """

    name: str
    x: Tensor
    sizes: list[int]
    state: list[Tensor]
    weights: list[list[Tensor]]
    has_biases: bool = True
    dropout: float = 0.0
    ways: int = 1
    is_packed: bool = False
    is_cell: bool = False
    is_split: bool = False
    transposed: bool = False

    @classmethod
    def of(cls, name: str, args: tuple[Any, ...], outputs: Sequence[Tensor]) -> Kernel:
        """``args`` as ``nn.RNNBase`` and ``nn.RNNCellBase`` give them, and what came of them."""
        if name.endswith(CELL):
            x, state, *weights = args
            return cls(
                name.removesuffix(CELL),
                x.detach(),
                [len(x)],
                [one.detach().unsqueeze(0) for one in _several(state)],
                [[weight for weight in weights if weight is not None]],
                has_biases=weights[2] is not None,
                is_cell=True,
                is_split=outputs[0].grad_fn is not outputs[-1].grad_fn,
            )
        is_packed = not isinstance(args[3], bool)
        if is_packed:
            x, sizes, state, weights, has_biases, n, dropout, is_trained, is_two_way = args
            transposed, sizes = False, sizes.tolist()
        else:
            x, state, weights, has_biases, n, dropout, is_trained, is_two_way, transposed = args
            by_time = x.transpose(0, 1) if transposed else x
            x, sizes = by_time.flatten(0, 1), [by_time.shape[1]] * len(by_time)
        ways = 1 + is_two_way
        of_one = len(weights) // (n * ways)
        return cls(
            name,
            x.detach(),
            sizes,
            [one.detach() for one in _several(state)],
            [list(weights[at : at + of_one]) for at in range(0, len(weights), of_one)],
            has_biases=has_biases,
            dropout=dropout if is_trained and n > 1 else 0.0,
            ways=ways,
            is_packed=is_packed,
            transposed=transposed,
        )

    @property
    def times(self) -> Tensor:
        """The time step of each number."""
        sizes = torch.tensor(self.sizes, device=self.x.device)
        return torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)

    def observed(self, outputs: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
        """The tensors that receive the gradients by ``outputs``, the kernel's.

        And whether the first of them has the sequences along its first axis.
        """
        first, *others = outputs
        base = first._base  # noqa: SLF001 - of a view that is changed in place it keeps its place
        if self.transposed and base is not None and base.shape == first.transpose(0, 1).shape:
            return [base, *others], False
        return [first, *others], self.transposed

    def as_unrolled(
        self, by_output: Sequence[Tensor | None], *, turned: bool
    ) -> list[Tensor | None]:
        """The kernel's outputs, or the gradients by them, in the form of the unrolled ones.

        ``turned`` says that the first has the sequences along its first axis.
        """
        first, *states = [None if one is None else one.detach() for one in by_output]
        if self.is_cell:
            ends = [None if one is None else one.unsqueeze(0) for one in states]
            return [first, None, *ends]
        if first is not None and not self.is_packed:
            first = (first.transpose(0, 1) if turned else first).flatten(0, 1)
        return [first, *states]


@dataclass(frozen=True)
class Recurrence:
    """One layer in one direction: its pre-activations, (numbers, gates · units), and states.

    ``received`` is what is added to the pre-activations of the layer's inputs: the gradient by it
    is the gradient by them. ``hidden`` are the hidden states, (sequences, units) a time step.
    """

    received: Tensor
    preactivations: Tensor
    hidden: list[Tensor]


@dataclass(frozen=True)
class Unrolled:
    """A kernel's layers, and its outputs: by number, and each state at the end."""

    kernel: Kernel
    layers: list[Recurrence]
    outputs: list[Tensor]

    def gradients(self, received: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        """Of each layer, by its pre-activations and its hidden states, (numbers, …) each.

        ``received`` are the gradients by the outputs, of which some may have none.
        """
        pairs = [
            (output, gradient.to(output.dtype))
            for output, gradient in zip(self.outputs, received, strict=True)
            if gradient is not None
        ]
        if not pairs:
            return []
        ends, gradients = zip(*pairs, strict=True)
        inputs = [x for layer in self.layers for x in (layer.received, *layer.hidden)]
        found = torch.autograd.grad(
            ends, inputs, gradients, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        n = len(found) // len(self.layers)
        of_layers = [found[at : at + n] for at in range(0, len(found), n)]
        return [(by_gates, torch.cat(by_hidden)) for by_gates, *by_hidden in of_layers]


def unroll(kernel: Kernel, outputs: Sequence[Tensor], stream: Tensor | None) -> Unrolled:
    """``stream`` is the random state as it was at the call, where there is dropout."""
    if not all(map(is_plain, [kernel.x, *outputs])):
        raise NotMeasuredError("gives no plain tensors of real numbers")
    device = kernel.x.device.type
    if kernel.dropout and (stream is None or device != "cpu"):
        raise NotMeasuredError(f"the random numbers of its dropout on {device} are not known")
    with (
        own_graph(),
        torch.random.fork_rng([], enabled=kernel.dropout > 0),
        torch.autocast(device, enabled=False),
    ):
        if stream is not None:
            torch.set_rng_state(stream)
        unrolled = _unrolled(kernel)
    given = kernel.as_unrolled(outputs, turned=kernel.transposed)
    apart = max(map(_apart, unrolled.outputs, given))
    if apart > TOLERANCES[outputs[0].dtype]:
        raise NotMeasuredError(f"unrolled it gives other outputs, {apart:.1g} of their size apart")
    return unrolled


def _unrolled(kernel: Kernel) -> Unrolled:
    exact = torch.promote_types(kernel.x.dtype, torch.float32)
    x, layers = kernel.x.to(exact), []
    ends: list[list[Tensor]] = []  # of each layer, its states at the end
    state = [one.to(exact, copy=True) for one in kernel.state]
    for at in range(0, len(kernel.weights), kernel.ways):
        for way in range(kernel.ways):
            weights = [w.detach().to(exact, copy=True) for w in kernel.weights[at + way]]
            first = [one[at + way] for one in state]
            layer, end = _layer(kernel, x, weights, first, is_reverse=way == 1)
            layers.append(layer)
            ends.append(end)
        x = torch.cat([torch.cat(layer.hidden) for layer in layers[-kernel.ways :]], 1)
        if kernel.dropout and at + kernel.ways < len(kernel.weights):
            x = functional.dropout(x, kernel.dropout)
    return Unrolled(kernel, layers, [x, *map(torch.stack, zip(*ends, strict=True))])


def _layer(
    kernel: Kernel, x: Tensor, weights: list[Tensor], first: list[Tensor], *, is_reverse: bool
) -> tuple[Recurrence, list[Tensor]]:
    """From the states ``first``; with those at the end, of each sequence."""
    of_inputs, of_hidden, *others = weights
    biases, projection = (others[:2], others[2:]) if kernel.has_biases else ([], others)
    received = functional.linear(x, of_inputs, *biases[:1])
    received = received if received.requires_grad else received.requires_grad_()
    pieces = torch.split(received, kernel.sizes)
    times = range(len(pieces))[::-1] if is_reverse else range(len(pieces))
    gates, hidden = [x] * len(pieces), [x] * len(pieces)
    now = [one[: kernel.sizes[times[0]]] for one in first]
    ended: list[list[Tensor]] = []
    step = functools.partial(_lstm, is_split=True) if kernel.is_split else STEPS[kernel.name]
    turned, bias = of_hidden.t(), biases[1] if biases else None
    for time in times:
        n, before = kernel.sizes[time], len(now[0])
        if n < before:
            ended.append([one[n:] for one in now])
            now = [one[:n] for one in now]
        elif n > before:
            now = [torch.cat([one, its[before:n]]) for one, its in zip(now, first, strict=True)]
        recurrent = torch.mm(now[0], turned) if bias is None else torch.addmm(bias, now[0], turned)
        gates[time], now = step(pieces[time], recurrent, now)
        if projection:
            now[0] = functional.linear(now[0], projection[0])
        hidden[time] = now[0]
    ends = [torch.cat([one, *rest]) for one, *rest in zip(now, *reversed(ended), strict=True)]
    return Recurrence(received, torch.cat(gates).detach(), hidden), ends


def _lstm(
    x: Tensor, h: Tensor, state: list[Tensor], *, is_split: bool = False
) -> tuple[Tensor, list[Tensor]]:
    gates = x + h
    i, f, g, o = gates.chunk(4, 1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    inner = cell.detach() if is_split else cell
    return gates.detach(), [o.sigmoid() * inner.tanh(), cell]


def _gru(x: Tensor, h: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The new gate's pre-activation is what its tanh is applied to."""
    n = h.shape[1] // 3
    reset_and_update = x[:, : 2 * n] + h[:, : 2 * n]
    reset, update = reset_and_update.sigmoid().chunk(2, 1)
    new = x[:, 2 * n :] + reset * h[:, 2 * n :]
    candidate = new.tanh()
    gates = torch.cat([reset_and_update.detach(), new.detach()], 1)
    return gates, [candidate + update * (state[0] - candidate)]


def _rnn_tanh(x: Tensor, h: Tensor, _state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    gates = x + h
    return gates.detach(), [gates.tanh()]


def _rnn_relu(x: Tensor, h: Tensor, _state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    gates = x + h
    return gates.detach(), [gates.relu()]


STEPS = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _rnn_tanh, "rnn_relu": _rnn_relu}


def _apart(unrolled: Tensor, given: Tensor | None) -> float:
    """The size of what they differ by, over that of what was given, where this is finite."""
    if given is None:
        return 0.0
    given = given.to(unrolled.dtype)
    apart, size = (
        float(torch.linalg.vector_norm(x, dtype=torch.float64))
        for x in (unrolled.detach() - given, given)
    )
    if size == 0:
        return apart
    return apart / size if apart < torch.inf else 0.0


def _several(state: object) -> list[Tensor]:
    return list(state) if isinstance(state, (tuple, list)) else [state]  # type: ignore[list-item]

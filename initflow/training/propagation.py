"""The forward and the backward pass of a stack of networks, written out, buffers reused.

On the CPU the results are, bit for bit, those of ``torch.nn.Linear``, autograd and
``cross_entropy`` on each network alone. They follow from the very products and reductions that
autograd forms: ``addmm`` forward, ``mm`` for the gradients, a sum over the batch for the biases,
and PyTorch's own kernels for the activations and the softmax. An operation is done to several
networks at once only where that changes no bit on this machine with this number of threads,
which is found by trying it on random numbers of the same shapes: batched products round
differently for small layers. On CUDA, whose kernels promise no such thing, it always is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from initflow.core import machine
from initflow.initializers.activations import Activation
from initflow.training.model import Parameters, aligned

# Python's own names of kernels: a call by torch.ops takes a microsecond longer.
_log_softmax_backward = torch._log_softmax_backward_data  # noqa: SLF001
_nll_loss = torch._C._nn.nll_loss  # type: ignore[attr-defined] # noqa: SLF001

# Numbers in the largest operation of several networks that may be worth doing at once, and tried.
WORTH_TRYING = 2**24
ENOUGH = 2**14  # numbers of a result to try it on, some of its inputs 0: a few agree by chance

Plan = list[Callable[[], object]]  # calls with all their tensors bound


def run(plan: Iterable[Callable[[], object]]) -> None:
    for call in plan:
        call()


@dataclass(frozen=True)
class _Operation:
    """An operation on stacks of tensors, which writes into the last one.

    ``together`` takes the stacks, ``each`` one network's tensors. A stack of one goes with all.
    """

    each: Callable[..., object]
    together: Callable[..., object]
    tried: bool = True  # whether a trial could tell a rare difference from none
    undivided: bool = False  # whether each thread takes whole networks of several

    def plan(self, *stacks: Tensor) -> Plan:
        """The calls that do it to ``stacks``: one for all networks, or one for each.

        Or one for as many as keep all threads busy, and one for each that is left over.
        """
        members = len(stacks[-1])
        launch_bound = machine.is_launch_bound(stacks[-1].device)
        at_once = members if launch_bound else self._even(members)
        some = [stack[:at_once] if len(stack) > 1 else stack for stack in stacks]
        layout = tuple((stack.shape, stack.stride()) for stack in some)
        if at_once == 1 or not (launch_bound or self._is_exact(layout, torch.get_num_threads())):
            at_once = 0
        plan: Plan = [functools.partial(self.together, *some)] if at_once else []
        for member in range(at_once, members):
            one = (stack[member if len(stack) > 1 else 0] for stack in stacks)
            plan.append(functools.partial(self.each, *one))
        return plan

    def _even(self, members: int) -> int:
        """How many of ``members`` threads share evenly, where one has them undivided."""
        left_over = members % torch.get_num_threads()
        return members - left_over if self.undivided and left_over < members else members

    @functools.cache  # noqa: B019 - there are but a few, for ever
    def _is_exact(self, layout: tuple[tuple[torch.Size, tuple[int, ...]], ...], _: int) -> bool:
        """Whether doing it to all at once gives the bits of doing it one by one."""
        if not self.tried or max(shape.numel() for shape, _ in layout) > WORTH_TRYING:
            return False
        generator = torch.Generator().manual_seed(0)
        stacks = [torch.empty_strided(shape, stride) for shape, stride in layout]
        *given, result = stacks
        for _ in range(-(-ENOUGH // result.numel())):
            for stack in given:
                stack.normal_(generator=generator)
                stack.masked_fill_(torch.rand(stack.shape, generator=generator) < 0.1, 0.0)
            self.together(*stacks)
            at_once = result.clone()
            for member in range(len(result)):
                self.each(*(stack[member if len(stack) > 1 else 0] for stack in stacks))
            if not torch.equal(at_once.view(torch.int32), result.view(torch.int32)):
                return False
        return True


_linear = _Operation(
    lambda bias, x, weight, out: torch.addmm(bias, x, weight.T, out=out),
    lambda biases, x, weights, out: torch.baddbmm(
        biases.unsqueeze(1), x.expand(len(out), -1, -1), weights.mT, out=out
    ),
    undivided=True,
)
_weight_gradient = _Operation(
    lambda gradient, x, out: torch.mm(gradient.T, x, out=out),
    lambda gradients, x, out: torch.bmm(gradients.mT, x.expand(len(out), -1, -1), out=out),
    undivided=True,
)


def _one_input_gradient(gradient: Tensor, weight: Tensor, out: Tensor) -> object:
    if out.numel() == 1:  # which autograd takes for a matrix by columns, and forms transposed
        return torch.mm(weight.T, gradient.T, out=out)
    return torch.mm(gradient, weight, out=out)


_input_gradient = _Operation(
    _one_input_gradient,
    lambda gradients, weights, out: torch.bmm(gradients, weights, out=out),
    undivided=True,
)


@functools.cache
def _elementwise(kernel: Callable[..., object], *, rounds: bool) -> _Operation:
    """Where it ``rounds``, the single numbers at the end of vectorized loops may round otherwise.

    That is once in a while, so that a trial could not tell.
    """
    return _Operation(kernel, kernel, tried=not rounds)


def blocks(keys: Sequence[Hashable], members: Sequence[int]) -> list[slice]:
    """The runs of neighbours among ``members`` that share their key; ``keys`` are of the stack."""
    runs = groupby(enumerate(members), lambda at: (at[1] - at[0], keys[at[1]]))
    found = [[member for _, member in run] for _, run in runs]
    return [slice(run[0], run[-1] + 1) for run in found]


def _by_source(sources: Sequence[int], members: Sequence[int]) -> list[slice]:
    """The runs of neighbours that share their source, or of which each has the next one."""
    single = {at.start for at in blocks(sources, members) if at.stop - at.start == 1}
    keys = [
        ("next", source - member) if member in single else ("same", source)
        for member, source in enumerate(sources)
    ]
    return blocks(keys, members)


class Pass:
    """The buffers of one forward and backward pass over ``batch`` images for each network.

    Network n has ``activations[n]`` and goes over the batch ``sources[n]``, by default the only
    one; only ``members``, by default all, take part. Networks gain from being neighbours of
    others with the same activation function and the same batch.

    After :meth:`forward`, ``preactivations[l]`` and ``outputs[l]`` hold what layer l
    computed, each (members, batch, units); the last layer's pre-activations are the logits
    and it has no activation. After :meth:`backward`, ``gradients[l]`` holds each network's
    loss differentiated by its pre-activations.
    """

    def __init__(
        self,
        parameters: Parameters,
        activations: Sequence[Activation],
        batch: int,
        *,
        sources: Sequence[int] | None = None,
        members: Sequence[int] | None = None,
    ) -> None:
        self.parameters = parameters
        self.members = range(parameters.members) if members is None else members
        self._sources = [0] * parameters.members if sources is None else sources
        self._activations = activations
        self._by_source = _by_source(self._sources, self.members)
        self._together = blocks([0] * parameters.members, self.members)
        self._by_activation = blocks([activation.name for activation in activations], self.members)

        self._batch = batch
        _, *hidden, classes = parameters.widths
        self.preactivations, self.outputs = self._buffers(*hidden, classes), self._buffers(*hidden)
        self._log_probabilities, self._by_loss = (
            parameters.flat.new_empty(parameters.members, batch, classes) for _ in range(2)
        )
        # What the plans are for.
        self._images: Tensor | None = None
        self._labels: Tensor | None = None
        self._gradient: Parameters | None = None
        self._is_launch_bound = machine.is_launch_bound(parameters.flat.device)
        self._taking_part = torch.tensor(self.members, device=parameters.flat.device)
        self._source_of_each = torch.tensor(self._sources, device=parameters.flat.device)
        # The mean over the batch, divided in float32 as autograd does.
        self._minus_one_nth = (-torch.ones(()) / batch).item()

    def _buffers(self, *widths: int) -> list[Tensor]:
        members, device = self.parameters.members, self.parameters.flat.device
        return [aligned(members, (self._batch, units), device) for units in widths]

    @functools.cached_property
    def gradients(self) -> list[Tensor]:
        return self._buffers(*self.parameters.widths[1:])

    def _inputs(self, layer: int, images: Tensor) -> list[tuple[slice, Tensor]]:
        """What ``layer`` takes in, (k, batch, units), for neighbours; (1, …) if they share it."""
        if layer:
            return [(at, self.outputs[layer - 1][at]) for at in self._together]
        ends = [(self._sources[at.start], self._sources[at.stop - 1]) for at in self._by_source]
        given = [images[first : last + 1] for first, last in ends]
        return list(zip(self._by_source, given, strict=True))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (members, batch, classes) of ``images`` (sources, batch, pixels)."""
        if images is not self._images:
            self._images, self._gradient = images, None
            self._forward_plan = self._plan_forward(images)
        run(self._forward_plan)
        return self.preactivations[-1]

    def _plan_forward(self, images: Tensor) -> Plan:
        plan: Plan = []
        for layer, preactivations in enumerate(self.preactivations):
            weights, biases = self.parameters.weights[layer], self.parameters.biases[layer]
            for at, x in self._inputs(layer, images):
                plan += _linear.plan(biases[at], x, weights[at], preactivations[at])
            if layer < len(self.outputs):
                for at in self._by_activation:
                    activation = self._activations[at.start]
                    kernel = _elementwise(activation.forward, rounds=activation.rounds)
                    plan += kernel.plan(preactivations[at], self.outputs[layer][at])
        # The softmax's kernels write as if there were no gaps between the networks' parts.
        for at in self._together:
            logits, out = self.preactivations[-1][at], self._log_probabilities[at]
            plan.append(functools.partial(torch.log_softmax, logits, 2, out=out))
        return plan

    def losses(self, labels: Tensor) -> Tensor:
        """The mean cross-entropy (members that take part,) over ``labels`` (sources, batch).

        Written over by the next call.
        """
        if not self._is_launch_bound:
            self._plan_for(labels)
            run(self._loss_plan)
            return self._losses
        own_labels = labels.index_select(0, self._source_of_each).unsqueeze(2)
        of_all = -self._log_probabilities.gather(2, own_labels).squeeze(2).mean(1)
        return of_all.index_select(0, self._taking_part)

    def backward(self, labels: Tensor, gradient: Parameters) -> None:
        """Write the gradients of the losses by all parameters into ``gradient``.

        The losses are those over ``labels`` (sources, batch) of the last :meth:`forward`.
        """
        self._plan_for(labels)
        if gradient is not self._gradient:
            assert self._images is not None, "a forward comes first"
            self._gradient = gradient
            self._backward_plan = self._plan_backward(self._images, gradient)
        run(self._by_loss_plan)
        run(self._backward_plan)

    def _plan_for(self, labels: Tensor) -> None:
        """What is done with ``labels``: the losses, and their gradient by the log-probabilities."""
        if labels is self._labels:
            return
        self._labels = labels
        if not self._is_launch_bound:  # where they are one by one
            self._losses = self.parameters.flat.new_empty(len(self.members))
            self._loss_plan: Plan = [
                functools.partial(
                    _nll_loss, self._log_probabilities[m], labels[self._sources[m]], None, 1, out=x
                )
                for m, x in zip(self.members, self._losses.unbind(), strict=True)
            ]
        own = labels
        self._by_loss_plan: Plan = []
        if list(self._sources) != list(range(len(labels))):
            own = labels.new_empty(len(self._sources), self._batch)
            self._by_loss_plan.append(
                functools.partial(torch.index_select, labels, 0, self._source_of_each, out=own)
            )
        self._by_loss_plan += [
            self._by_loss.zero_,
            functools.partial(self._by_loss.scatter_, 2, own.unsqueeze(2), self._minus_one_nth),
        ]

    def _plan_backward(self, images: Tensor, gradient: Parameters) -> Plan:
        plan: Plan = []
        output_gradients = self._buffers(*self.parameters.widths[1:-1])
        for at in self._together:
            plan += self._plan_softmax(at)
        for layer in reversed(range(self.parameters.depth)):
            gradients = self.gradients[layer]
            for at in self._together:
                out = gradient.biases[layer][at]
                plan.append(functools.partial(torch.sum, gradients[at], 1, out=out))
            for at, x in self._inputs(layer, images):
                plan += _weight_gradient.plan(gradients[at], x, gradient.weights[layer][at])
            if layer:
                weights, passed = self.parameters.weights[layer], output_gradients[layer - 1]
                for at in self._together:
                    plan += _input_gradient.plan(gradients[at], weights[at], passed[at])
                for at in self._by_activation:
                    activation = self._activations[at.start]
                    kernel = _elementwise(activation.backward, rounds=activation.rounds)
                    plan += kernel.plan(
                        passed[at],
                        self.preactivations[layer - 1][at],
                        self.outputs[layer - 1][at],
                        self.gradients[layer - 1][at],
                    )
        return plan

    def _plan_softmax(self, at: slice) -> Plan:
        inputs = (self._by_loss[at], self._log_probabilities[at], 2, torch.float32)
        out = self.gradients[-1][at]
        if out.is_contiguous():
            return [functools.partial(_log_softmax_backward, *inputs, out=out)]
        whole = torch.empty_like(inputs[0])
        return [
            functools.partial(_log_softmax_backward, *inputs, out=whole),
            functools.partial(out.copy_, whole),
        ]

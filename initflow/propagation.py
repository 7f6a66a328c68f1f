"""The forward and the backward pass of a stack of networks, written out, buffers reused.

On the CPU the results are, bit for bit, those of ``torch.nn.Linear``, autograd and
``cross_entropy`` on each network alone, because every product and reduction is the very one
that they form, member by member: ``addmm`` forward, ``mm`` for the gradients, a sum over the
batch for the biases, and PyTorch's own kernels for the activations and the softmax. Batched
products would round differently for small layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from initflow.activations import Activation
from initflow.model import Parameters, padded_size, stack_of

_log_softmax_backward = torch.ops.aten._log_softmax_backward_data.out  # noqa: SLF001


class Pass:
    """The buffers of one forward and backward pass over ``batch`` images.

    After :meth:`forward`, ``preactivations[l]`` and ``activations[l]`` hold what layer l
    computed, each (members, batch, units); the last layer's pre-activations are the logits
    and it has no activation. After :meth:`backward`, ``gradients[l]`` holds each network's
    loss differentiated by its pre-activations.
    """

    def __init__(self, parameters: Parameters, activation: Activation, batch: int) -> None:
        self.parameters = parameters
        self.activation = activation

        def buffer(units: int) -> Tensor:
            shape = (batch, units)
            flat = parameters.flat.new_empty(parameters.members * padded_size(shape))
            return stack_of(flat, parameters.members, shape)

        *hidden, classes = parameters.widths[1:]
        self.preactivations = [buffer(units) for units in (*hidden, classes)]
        self.activations = [buffer(units) for units in hidden]
        self.gradients = [buffer(units) for units in (*hidden, classes)]
        self._log_probabilities = buffer(classes)
        self._loss_gradient = parameters.flat.new_empty(batch, classes)  # the same for all
        self._activation_gradients = [buffer(units) for units in hidden]
        # The mean over the batch, divided in float32 as autograd does.
        self._minus_one_nth = (-torch.ones(()) / batch).item()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (members, batch, classes) of ``images`` (batch, pixels), the same for all."""
        for layer, preactivation in enumerate(self.preactivations):
            for member, out in enumerate(preactivation):
                bias = self.parameters.biases[layer][member]
                weight = self.parameters.weights[layer][member]
                torch.addmm(bias, self._input(images, layer, member), weight.T, out=out)
            if layer < len(self.activations):
                self.activation.forward(preactivation, self.activations[layer])
        return self.preactivations[-1]

    def _input(self, images: Tensor, layer: int, member: int) -> Tensor:
        return self.activations[layer - 1][member] if layer else images

    def losses(self, labels: Tensor) -> Tensor:
        """Each network's mean cross-entropy (members,) over ``labels`` (batch,)."""
        losses = []
        for logits, log_probabilities in zip(
            self.preactivations[-1], self._log_probabilities, strict=True
        ):
            torch.log_softmax(logits, 1, out=log_probabilities)
            losses.append(torch.nn.functional.nll_loss(log_probabilities, labels))
        return torch.stack(losses)

    def backward(self, images: Tensor, labels: Tensor, gradient: Parameters) -> None:
        """Write the gradients of the losses by all parameters into ``gradient``.

        Goes by what :meth:`forward` and :meth:`losses` left for the same batch.
        """
        self._loss_gradient.zero_().scatter_(1, labels.unsqueeze(1), self._minus_one_nth)
        for log_probabilities, out in zip(self._log_probabilities, self.gradients[-1], strict=True):
            _log_softmax_backward(self._loss_gradient, log_probabilities, 1, torch.float32, out=out)
        for layer in reversed(range(self.parameters.depth)):
            grad = self.gradients[layer]
            for member, own in enumerate(grad):
                torch.sum(own, 0, out=gradient.biases[layer][member])
                x = self._input(images, layer, member)
                torch.mm(own.T, x, out=gradient.weights[layer][member])
                if layer:
                    weight = self.parameters.weights[layer][member]
                    torch.mm(own, weight, out=self._activation_gradients[layer - 1][member])
            if layer:
                self.activation.backward(
                    self._activation_gradients[layer - 1],
                    self.preactivations[layer - 1],
                    self.activations[layer - 1],
                    self.gradients[layer - 1],
                )

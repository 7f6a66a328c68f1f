"""The forward and the backward pass of a stack of networks, written out, buffers reused.

On the CPU the results are, bit for bit, those of ``torch.nn.Linear``, autograd and
``cross_entropy`` on each network alone, because every product and reduction is the one that
they form. That decides some choices here which look arbitrary: weight gradients are
``gradᵀ @ input`` by one ``mm`` a member, bias gradients are summed over a
(members, batch, units) layout, and the softmax gradient goes through PyTorch's own kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from initflow.activations import Activation
from initflow.model import Parameters

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
            return parameters.flat.new_empty(parameters.members, batch, units)

        *hidden, classes = parameters.widths[1:]
        self.preactivations = [buffer(units) for units in (*hidden, classes)]
        self.activations = [buffer(units) for units in hidden]
        self.gradients = [buffer(units) for units in (*hidden, classes)]
        self._log_probabilities = buffer(classes)
        self._loss_gradient = buffer(classes)
        self._activation_gradients = [buffer(units) for units in hidden]
        # The mean over the batch, divided in float32 as autograd does.
        self._minus_one_nth = (-torch.ones(()) / batch).item()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (members, batch, classes) of ``images`` (batch, pixels), the same for all."""
        x = images.expand(self.parameters.members, *images.shape)
        for layer, (weight, bias) in enumerate(
            zip(self.parameters.weights, self.parameters.biases, strict=True)
        ):
            preactivation = self.preactivations[layer]
            torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2), out=preactivation)
            if layer < len(self.activations):
                x = self.activation.forward(preactivation, self.activations[layer])
        return self.preactivations[-1]

    def losses(self, labels: Tensor) -> Tensor:
        """Each network's mean cross-entropy (members,) over ``labels`` (batch,)."""
        torch.log_softmax(self.preactivations[-1], 2, out=self._log_probabilities)
        return torch.stack(
            [
                torch.nn.functional.nll_loss(log_probabilities, labels)
                for log_probabilities in self._log_probabilities
            ]
        )

    def backward(self, images: Tensor, labels: Tensor, gradient: Parameters) -> None:
        """Write the gradients of the losses by all parameters into ``gradient``.

        Goes by what :meth:`forward` and :meth:`losses` left for the same batch.
        """
        target = labels.view(1, -1, 1).expand(len(self._loss_gradient), -1, 1)
        self._loss_gradient.zero_().scatter_(2, target, self._minus_one_nth)
        _log_softmax_backward(
            self._loss_gradient,
            self._log_probabilities,
            2,
            torch.float32,
            out=self.gradients[-1],
        )
        for layer in reversed(range(self.parameters.depth)):
            grad = self.gradients[layer]
            torch.sum(grad, 1, out=gradient.biases[layer])
            for member, weight_gradient in enumerate(gradient.weights[layer]):
                x = self.activations[layer - 1][member] if layer else images
                torch.mm(grad[member].T, x, out=weight_gradient)
            if layer:
                torch.bmm(
                    grad, self.parameters.weights[layer], out=self._activation_gradients[layer - 1]
                )
                self.activation.backward(
                    self._activation_gradients[layer - 1],
                    self.preactivations[layer - 1],
                    self.activations[layer - 1],
                    self.gradients[layer - 1],
                )

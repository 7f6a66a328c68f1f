"""The activations: one value each, for the network, its backward pass, theory and measuring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_aten = torch.ops.aten

LEAKY_RELU_SLOPE = 0.01
# Klambauer et al. 2017, "Self-Normalizing Neural Networks", to double precision.
SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946


@dataclass(frozen=True)
class Activation:
    """An elementwise function φ and its derivative.

    ``function(x)`` gives φ(x). ``forward(x, y)`` writes φ(x) into ``y``, and
    ``backward(grad, x, y, out)`` writes ``grad`` · φ′(x) into ``out``, given ``y`` = φ(x).
    Both are the kernels that autograd itself runs, so that a backward pass written out
    with them has autograd's bits.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def derivative(self, x: Tensor) -> Tensor:
        """φ′(x), elementwise; at a kink the value that autograd uses."""
        return self.backward(torch.ones_like(x), x, self.function(x), torch.empty_like(x))

    @cached_property
    def steepest(self) -> float:
        """The largest |φ′(x)| there is, good to 1e-6."""
        return self._slopes(torch.linspace(-20.0, 20.0, 40_001, dtype=torch.float64)).max().item()

    @cached_property
    def saturates(self) -> bool:
        """Whether φ is flat on both sides, as sigmoid and tanh are."""
        far = self._slopes(torch.tensor([-1e4, 1e4], dtype=torch.float64))
        return bool((far < 0.01 * self.steepest).all())

    def _slopes(self, x: Tensor) -> Tensor:
        return self.derivative(x).abs()


def _of_kernels(
    name: str, *arguments: float, more: tuple[bool, ...] = (), of_result: bool = False
) -> Activation:
    """The activation whose kernels PyTorch has by ``name``, called with ``arguments``.

    The backward kernel has ``more`` of them, and takes φ(x) in place of x where ``of_result``.
    """
    kernel, gradient = getattr(_aten, name), getattr(_aten, f"{name}_backward").grad_input
    return Activation(
        name,
        lambda x: kernel(x, *arguments),
        lambda x, y: kernel.out(x, *arguments, out=y),
        lambda grad, x, y, out: gradient(
            grad, y if of_result else x, *arguments, *more, grad_input=out
        ),
    )


def _elu(name: str, alpha: float, scale: float) -> Activation:
    return Activation(
        name,
        lambda x: _aten.elu(x, alpha, scale),
        lambda x, y: _aten.elu.out(x, alpha, scale, out=y),
        lambda grad, x, y, out: _aten.elu_backward.grad_input(
            grad, alpha, scale, 1, False, x, grad_input=out
        ),
    )


_ALL = (
    _of_kernels("sigmoid", of_result=True),
    _of_kernels("tanh", of_result=True),
    Activation(
        "relu",
        torch.relu,
        lambda x, y: torch.clamp_min(x, 0, out=y),
        lambda grad, x, y, out: _aten.threshold_backward.grad_input(grad, y, 0, grad_input=out),
    ),
    _of_kernels("leaky_relu", LEAKY_RELU_SLOPE, more=(False,)),
    _of_kernels("gelu"),
    _of_kernels("silu"),
    _elu("selu", SELU_ALPHA, SELU_SCALE),
    _elu("elu", 1.0, 1.0),
    _of_kernels("softplus", 1, 20),
    Activation(
        "linear",
        lambda x: x,
        lambda x, y: y.copy_(x),
        lambda grad, x, y, out: out.copy_(grad),
    ),
)
ACTIVATIONS = {activation.name: activation for activation in _ALL}

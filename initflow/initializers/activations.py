"""The activations: one value each, for the network, its backward pass, theory and measuring."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from initflow.errors import SettingError, cause

_aten = torch.ops.aten

LEAKY_RELU_SLOPE = 0.01
# Klambauer et al. 2017, "Self-Normalizing Neural Networks", to double precision.
SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946


@dataclass(frozen=True)
class Activation:
    """An elementwise function φ and its derivative; :meth:`of` makes one of any function.

    - ``name``: what it is called.
    - ``function``: ``function(x)`` gives φ(x), a tensor of the shape and dtype of ``x``.
    - ``forward``: ``forward(x, y)`` writes φ(x) into ``y``.
    - ``backward``: ``backward(grad, x, y, out)`` writes ``grad`` · φ′(x) into ``out``, given
      ``y`` = φ(x).
    - ``rounds``: False where both give an entry bits that depend on no other entry.

    Those of the built-in ones are the kernels that autograd itself runs, so that a backward pass
    written out with them has autograd's bits.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    rounds: bool = True

    @classmethod
    def of(cls, function: Callable[[Tensor], Tensor], name: str | None = None) -> Activation:
        """The activation of any elementwise ``function``, its derivative by autograd.

        ``name`` is what it is called (default None: as the function is). A module is taken as it is
        now, in a copy, so that it computes in double precision where the theory does. Where
        autograd has no derivative, as of a step, it is 0.

        Raises :class:`SettingError` for what raises on a tensor in double precision, or takes
        another number into account than an entry's own.
        """
        if not callable(function):
            raise SettingError(
                f"activation must be a function of a tensor, not {type(function).__name__}"
            )
        own = getattr(function, "__name__", type(function).__name__)
        name = name or str(function if isinstance(function, nn.Module) else own)
        plain = _plain(function)
        _check_elementwise(plain, name)
        return cls(
            name,
            plain,
            lambda x, y: y.copy_(plain(x)),
            lambda grad, x, y, out: out.copy_(_by_autograd(plain, grad, x)),
        )

    @property
    def is_built_in(self) -> bool:
        """Whether it is one of :data:`ACTIVATIONS`, which have no kinks but at 0."""
        return ACTIVATIONS.get(self.name) is self

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


def _plain(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``function`` without what it does to its argument, the random state or another type."""
    if isinstance(function, nn.Module):
        function = _typed(function)

    def plain(x: Tensor) -> Tensor:
        with torch.random.fork_rng([]):
            y = function(x.clone())  # some write into what they are given
        return y.to(x.dtype) if isinstance(y, Tensor) and not y.is_complex() else y

    return plain


def _typed(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """``module`` as it is now, with what it holds of the type that it is given."""
    kept = copy.deepcopy(module).requires_grad_(requires_grad=False)

    @functools.cache
    def of(dtype: torch.dtype, device: torch.device) -> nn.Module:
        return copy.deepcopy(kept).to(device, dtype)

    def function(x: Tensor) -> Tensor:
        y: Tensor = of(x.dtype, x.device)(x)
        return y

    return function


def _check_elementwise(function: Callable[[Tensor], Tensor], name: str) -> None:
    """Each entry's value may follow from that entry alone, and from nothing else."""
    x = torch.linspace(-2.5, 2.75, 22, dtype=torch.float64)
    try:
        y, *others = [function(given) for given in (x, x[5:12], x.flip(0), x.view(2, 11))]
    except Exception as error:  # whatever a function does not take a tensor for
        raise SettingError(
            f"activation must take a tensor in double precision; {name}: {cause(error)}"
        ) from error
    if not isinstance(y, Tensor) or y.is_complex():
        given = type(y).__name__ if not isinstance(y, Tensor) else str(y.dtype)
        raise SettingError(f"activation must give a tensor of real numbers; {name} gives {given}")
    if y.shape != x.shape:
        raise SettingError(
            f"activation must be elementwise; {name} gives shape {tuple(y.shape)} for "
            f"{tuple(x.shape)}"
        )
    # Kernels for long and short tensors may round differently.
    same = functools.partial(torch.allclose, rtol=1e-6, atol=1e-9, equal_nan=True)
    expected = (y[5:12], y.flip(0), y.view(2, 11))
    if not all(o.shape == e.shape and same(o, e) for o, e in zip(others, expected, strict=True)):
        raise SettingError(
            f"activation must be elementwise, without chance; {name} gives an entry another value "
            "among other entries"
        )


def _by_autograd(function: Callable[[Tensor], Tensor], grad: Tensor, x: Tensor) -> Tensor:
    """``grad`` · φ′(x)."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        y = function(leaf)
        if not y.requires_grad:
            return torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(y, leaf, grad.clone(), materialize_grads=True)
    return gradient


def _of_kernels(
    name: str,
    *arguments: float,
    more: tuple[bool, ...] = (),
    of_result: bool = False,
    rounds: bool = True,
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
        rounds,
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
        rounds=False,
    ),
    _of_kernels("leaky_relu", LEAKY_RELU_SLOPE, more=(False,), rounds=False),
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
        rounds=False,
    ),
)
ACTIVATIONS = {activation.name: activation for activation in _ALL}
"""The built-in activation functions by name, each an :class:`Activation`."""

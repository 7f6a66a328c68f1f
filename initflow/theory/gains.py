"""The gain that keeps a layer's second moment, of any activation function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from initflow.errors import SettingError, unknown
from initflow.initializers.activations import ACTIVATIONS, Activation
from initflow.theory.integrals import FAR, expectation, positive, second_moment

OUTLYING = 1e-6  # share of the mean square from beyond 11 standard deviations that is refused


def gain(activation: str | Activation | Callable[[Tensor], Tensor], q: float = 1.0) -> float:
    """The gain √(q / E[φ(√q z)²]), z ~ N(0, 1), by which weights make up for an activation φ.

    Weights of standard deviation gain/√fan_in, without biases, give pre-activations of variance
    ``q`` where those of the layer before have it.

    - ``activation``: the name of a built-in one, an :class:`Activation`, or any elementwise
      function of a tensor: of ``torch``, a module, a lambda.
    - ``q``: the variance of the pre-activations, a number above 0 (default 1).

    Returns a factor on a standard deviation, as ``torch.nn.init.calculate_gain`` does, whose
    numbers for some activations are approximations. It is integrated in double precision between
    the kinks and steps of φ, wherever they are: to 1e-9 of itself where there are some hundreds or
    fewer.

    Raises :class:`SettingError` for another ``q``, and for a function that is not elementwise,
    gives numbers that are not finite, gives 0 everywhere, or grows so fast that its mean square is
    not finite. For ReLU it is the √2 of He et al. 2015, "Delving Deep into Rectifiers".
    """
    phi = _activation(activation)
    q = positive("q", q)
    at = torch.tensor(q, dtype=torch.float64)
    _check_finite(phi, q)
    moment = second_moment(phi, at).item()
    if moment == 0:
        raise SettingError(f"activation must not be 0 everywhere, as {phi.name} is: no gain helps")
    beyond = expectation(
        lambda x: phi.function(x).square() * (x.abs() > (FAR - 1) * at.sqrt()), at, phi
    )
    if not beyond.item() <= OUTLYING * moment:
        raise SettingError(
            f"activation must have a finite mean square at q = {q:g}; {phi.name} grows too fast"
        )
    return float((q / moment) ** 0.5)


def _activation(given: object) -> Activation:
    if isinstance(given, Activation):
        return given
    if isinstance(given, str):
        if given not in ACTIVATIONS:
            raise unknown("activation", given, ACTIVATIONS)
        return ACTIVATIONS[given]
    if not callable(given):
        raise SettingError(
            "activation must be a built-in one's name or a function of a tensor, "
            f"not {type(given).__name__}"
        )
    return Activation.of(given)


def _check_finite(activation: Activation, q: float) -> None:
    """Where nearly all pre-activations are, and at 0."""
    x = torch.linspace(-8, 8, 1601, dtype=torch.float64) * q**0.5
    x[800] = 0.0
    y = activation.function(x)
    odd = (~y.isfinite()).nonzero().flatten()
    if len(odd):
        at = odd[(odd - 800).abs().argmin()]
        raise SettingError(
            f"activation must give finite numbers; {activation.name} gives {y[at].item()} at "
            f"{x[at].item():.3g}"
        )

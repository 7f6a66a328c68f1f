"""Means over Gaussian pre-activations: of an activation function, its slope, and of two images.

Closed forms where there is one, and else Gauss-Legendre quadrature, split where the activation
functions have their kinks, good to 1e-6 or better, in double precision. Those of the built-in
functions are at 0; any other's are looked for, by :mod:`initflow.theory.pieces`.

What is called with is checked here for all of the theory: a user may call any of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from initflow.errors import SettingError
from initflow.initializers.activations import LEAKY_RELU_SLOPE, Activation
from initflow.theory.pieces import NODES as OF_A_PIECE
from initflow.theory.pieces import legendre, octaves, pieces

FAR = 12.0  # standard deviations: what lies beyond weighs less than 1e-32
SHARP = 30.0  # where every activation function has gone over into its straight tail
NODES = 64
LIGHT = 1e-13  # weight of a node that counts for nothing
TINY, HUGE = 1e-75, 1e75  # variances whose fourth powers are still numbers
Function = Callable[[Tensor], Tensor]
Both = Callable[[Tensor, Tensor], Tensor]
# φ(x) = x for x > 0 and slope · x below, by name.
RECTIFIERS = {"relu": 0.0, "leaky_relu": LEAKY_RELU_SLOPE, "linear": 1.0}


def check(activation: object, **tensors: object) -> None:
    """Raise a :class:`SettingError` for another activation, or tensors of another precision."""
    if not isinstance(activation, Activation):
        raise SettingError(
            "activation must be an Activation, such as initializers.ACTIVATIONS['tanh'] or "
            f"initializers.Activation.of(torch.tanh), not {activation!r}"
        )
    _check_double(**tensors)


def positive(name: str, variance: object) -> float:
    """The ``variance`` as a float; a :class:`SettingError` where it is not a number above 0."""
    if isinstance(variance, bool) or not (
        isinstance(variance, Real) and TINY <= float(variance) <= HUGE
    ):
        raise SettingError(
            f"{name} must be a number above 0, the pre-activations' variance, not {variance!r}"
        )
    return float(variance)


def _check_double(**tensors: object) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.dtype != torch.float64:
            given = x.dtype if isinstance(x, Tensor) else repr(x)
            raise SettingError(
                f"{name} must be a tensor of double precision (dtype=torch.float64), not {given}"
            )


def expectation(function: Function, q: Tensor, kinks: Activation | None = None) -> Tensor:
    """E[f(√q z)], z ~ N(0, 1), for each of ``q``: the mean of f over normal pre-activations.

    - ``function``: f, elementwise, of a tensor; smooth but for a kink or step at 0.
    - ``q``: variances of at least 0, a ``torch.float64`` tensor of any shape.
    - ``kinks``: an :class:`Activation` where f has kinks or steps elsewhere, those of this function
      and its derivative (default None: none).

    Returns a ``torch.float64`` tensor of the shape of ``q``, good to 1e-6 or better, by
    Gauss-Legendre quadrature. Raises :class:`SettingError` for a ``q`` that is no such tensor.
    """
    _check_double(q=q)
    if kinks and not kinks.is_built_in:
        return _on_pieces(function, q, kinks)
    x, w = legendre(NODES)
    scale = q.clamp(TINY, HUGE).sqrt().unsqueeze(-1)
    near = (SHARP / scale).clamp(max=FAR / 2)  # where f bends most
    z = torch.cat([near * x, near + (FAR - near) * x], -1)
    weight = torch.cat([near * w, (FAR - near) * w], -1) * torch.exp(-z.square() / 2)
    values = function(scale * z) + function(-scale * z)
    return (weight * values).sum(-1) / math.sqrt(2 * math.pi)


def pair_expectation(
    function: Function, q: Tensor, c: Tensor, kinks: Activation | None = None
) -> Tensor:
    """E[f(u₁) f(u₂)], u₁ and u₂ normal, of mean 0, variance ``q`` and correlation ``c``.

    ``function`` (f) and ``kinks`` are as in :func:`expectation`. ``q``, of at least 0, and ``c``,
    from -1 to 1, are ``torch.float64`` tensors whose shapes broadcast; a ``c`` beyond that counts
    as -1 or 1.

    Returns a ``torch.float64`` tensor of the shape that they broadcast to, good to 1e-6 or better.
    Raises :class:`SettingError` for a ``q`` or ``c`` that is no such tensor.
    """
    _check_double(q=q, c=c)
    return _of_pairs(function, torch.mul, q, torch.arccos(c.clamp(-1, 1)), kinks)


def _of_pairs(
    function: Function, both: Both, q: Tensor, angle: Tensor, kinks: Activation | None
) -> Tensor:
    """E[both(f(u₁), f(u₂))], the correlation of u₁ and u₂ being the cosine of ``angle``."""
    # In polar coordinates a kink at 0 is four fixed angles.
    if kinks and not kinks.is_built_in:
        pairs = torch.stack([q + 0 * angle, angle + 0 * q], -1)
        flat = pairs.view(-1, 2).tolist()
        found = [_pair_on_pieces(function, both, of, at, kinks) for of, at in flat]
        return torch.stack(found).view(pairs.shape[:-1])
    x, w = legendre(NODES)
    scale = q.clamp(TINY, HUGE).sqrt()[..., None, None]
    angle = angle.unsqueeze(-1)
    start, theta, theta_weight = angle - math.pi / 2, [], []
    for length in (math.pi - angle, angle, math.pi - angle, angle):
        theta.append(start + length * x)
        theta_weight.append(length * w)
        start = start + length
    angles = torch.cat(theta, -1).unsqueeze(-2)
    near = (SHARP / scale).clamp(max=FAR / 2)
    r = torch.cat([near * x[:, None], near + (FAR - near) * x[:, None]], -2)
    r_weight = torch.cat([near * w[:, None], (FAR - near) * w[:, None]], -2)
    weight = r_weight * r * torch.exp(-r.square() / 2) * torch.cat(theta_weight, -1).unsqueeze(-2)
    first = function(scale * r * torch.cos(angles))
    second = function(scale * r * torch.cos(angles - angle.unsqueeze(-1)))
    return (weight * both(first, second)).sum((-1, -2)) / (2 * math.pi)


def distribution(
    function: Function, q: float, kinks: Activation | None = None
) -> tuple[Tensor, Tensor]:
    """Values of f(√q z), z ~ N(0, 1), (k,), and their weights, which sum to 1; nothing is drawn.

    f and ``kinks`` are as in :func:`expectation`.
    """
    scale = math.sqrt(min(max(q, TINY), HUGE))
    bends = 2.0 ** torch.arange(-4, math.log2(SHARP), dtype=torch.float64)
    places = [-bends, bends.new_zeros(1), bends]
    if kinks and not kinks.is_built_in:
        places.append(pieces(kinks, octaves(FAR * scale)).breaks)
    z, weight = (x.flatten() for x in _normal(torch.cat(places) / scale))
    kept = weight > LIGHT
    return function(scale * z[kept]), weight[kept] / weight[kept].sum()


def _on_pieces(function: Function, q: Tensor, activation: Activation) -> Tensor:
    """E[f(√q z)] for each of ``q`` (…), on the pieces of the activation."""
    if not q.numel():
        return q.clone()
    scale = q.clamp(TINY, HUGE).sqrt().unsqueeze(-1)
    found = pieces(activation, octaves(FAR * scale.max().item()))
    z, weight = _normal(found.edges / scale)
    return (weight * function(scale.unsqueeze(-1) * z)).sum((-1, -2))


def _pair_on_pieces(
    function: Function, both: Both, q: float, angle: float, kinks: Activation
) -> Tensor:
    """E[both(f(u₁), f(u₂))], u₂ = c·u₁ + √(1 − c²)·v, first over v for each u₁.

    The mean over v has no kink, but bends within √(1 − c²) of where u₂ has one.
    """
    scale = math.sqrt(min(max(q, TINY), HUGE))
    reach = octaves(FAR * scale)
    breaks = pieces(kinks, reach).breaks
    bends = 2.0 ** torch.arange(-4, reach + 1, dtype=torch.float64)
    places = torch.cat([-bends, breaks, bends]) / scale
    c, apart = math.cos(angle), math.sin(angle)
    if apart < 1e-7:
        z, weight = _normal(torch.cat([places, -places]))
        first, second = function(scale * z), function(math.copysign(scale, c) * z)
        return (weight * both(first, second)).sum()
    edges = [places]
    if abs(c) > 0.5:
        around = places.new_tensor([-6, -3, -1.5, -0.75, 0, 0.75, 1.5, 3, 6]) * apart
        edges.append(((breaks / scale)[:, None] + around).flatten() / c)
    z, weight = _normal(torch.cat(edges))
    first, first_weight = z.flatten(), weight.flatten()
    v, v_weight = _normal((places - c * first.unsqueeze(-1)) / apart)
    second = c * first[:, None, None] + apart * v
    at_first = function(scale * first)[:, None, None]
    inner = (v_weight * both(at_first, function(scale * second))).sum((-1, -2))
    return (first_weight * inner).sum()


def _normal(edges: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes of N(0, 1) on the pieces between ``edges`` (…, k), and their weights: (…, k + 24, n).

    No piece is wider than a standard deviation.
    """
    x, w = legendre(OF_A_PIECE)
    even = torch.linspace(-FAR, FAR, round(2 * FAR) + 1, dtype=torch.float64)
    edges = torch.cat([edges.clamp(-FAR, FAR), even.expand(*edges.shape[:-1], -1)], -1)
    edges = edges.sort(-1).values.unsqueeze(-1)
    low, width = edges[..., :-1, :], edges.diff(dim=-2)
    z = low + width * x
    return z, width * w * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


def second_moment(activation: Activation, q: Tensor) -> Tensor:
    """E[φ(√q z)²], z ~ N(0, 1): the activations' mean square where pre-activations have variance q.

    - ``activation``: φ, an :class:`Activation`.
    - ``q``: variances of at least 0, a ``torch.float64`` tensor of any shape.

    Returns a ``torch.float64`` tensor of the shape of ``q``. In closed form for relu, leaky_relu,
    linear and gelu, else as :func:`expectation`. Raises :class:`SettingError` for what is no
    activation or no such tensor.
    """
    check(activation, q=q)
    if _is_rectifier(activation):
        return q * (1 + RECTIFIERS[activation.name] ** 2) / 2
    if activation.is_built_in and activation.name == "gelu":
        cumulative, density = _normal_moments(q)  # x·Φ(x): Stein's lemma twice
        return q * (cumulative + 2 * q / (1 + q) * density)
    return expectation(lambda x: activation.function(x).square(), q, activation)


def slope_moment(activation: Activation, q: Tensor) -> Tensor:
    """E[φ′(√q z)²], z ~ N(0, 1): what φ multiplies the gradient's mean square by, on its way back.

    - ``activation``: φ, an :class:`Activation`.
    - ``q``: the pre-activations' variances, of at least 0, a ``torch.float64`` tensor of any shape.

    Returns a ``torch.float64`` tensor of the shape of ``q``; σ_w² times it, at q*, is χ₁. In closed
    form for relu, leaky_relu, linear and gelu, else as :func:`expectation`. Raises
    :class:`SettingError` for what is no activation or no such tensor.
    """
    check(activation, q=q)
    if _is_rectifier(activation):
        return torch.full_like(q, (1 + RECTIFIERS[activation.name] ** 2) / 2)
    if activation.is_built_in and activation.name == "gelu":
        cumulative, density = _normal_moments(q)
        return cumulative + density * (2 * q / (1 + q) + q / (1 + 2 * q))
    return expectation(lambda x: activation.derivative(x).square(), q, activation)


def _normal_moments(q: Tensor) -> tuple[Tensor, Tensor]:
    """E[Φ(√q z)²] and E[φ(√q z)²] of the standard normal distribution and its density."""
    cumulative = 1 / 4 + torch.arcsin(q / (1 + q)) / (2 * math.pi)
    return cumulative, 1 / (2 * math.pi * (1 + 2 * q).sqrt())


def product_moment(activation: Activation, q: Tensor, c: Tensor) -> Tensor:
    """E[φ(u₁) φ(u₂)], u₁ and u₂ normal, of mean 0, variance ``q`` and correlation ``c``.

    They are a unit's pre-activations for two inputs. ``activation`` (φ) is an :class:`Activation`;
    ``q``, ``c`` and what is returned are as in :func:`pair_expectation`. Raises
    :class:`SettingError` for what is no activation or no such tensor.

    In closed form for relu, leaky_relu and linear: Cho and Saul 2009, "Kernel Methods for Deep
    Learning" (arc-cosine kernels).
    """
    check(activation, q=q, c=c)
    if _is_rectifier(activation):  # φ(x) = even · |x| + odd · x
        odd, even = _odd_and_even(activation)
        c = c.clamp(-1, 1)
        absolute = 2 / math.pi * ((1 - c.square()).sqrt() + c * torch.arcsin(c))
        return q * (odd**2 * c + even**2 * absolute)
    return pair_expectation(activation.function, q, c, activation)


def difference_moment(activation: Activation, q: Tensor, angle: Tensor) -> Tensor:
    """E[(φ(u₁) − φ(u₂))²]/2, u₁ and u₂ Gaussian, of variance ``q``, by their ``angle``.

    Their correlation is its cosine, from 0 to 1. That is E[φ(u)²] − E[φ(u₁) φ(u₂)], as exact where
    the two are nearly equal. In closed form for rectifiers.
    """
    if _is_rectifier(activation):
        odd, even = _odd_and_even(activation)
        apart = 2 * (angle / 2).sin().square()
        bent = 2 / math.pi * (angle * angle.cos() - angle.sin())
        return q * (odd**2 * apart + even**2 * (apart + bent))
    return _of_pairs(activation.function, lambda a, b: (a - b).square() / 2, q, angle, activation)


def slope_product_moment(activation: Activation, q: Tensor, c: Tensor) -> Tensor:
    """E[φ′(u₁) φ′(u₂)]: as :func:`product_moment`, of the slopes of φ.

    ``activation``, ``q``, ``c``, what is returned and the :class:`SettingError` are as there. σ_w²
    times it is the slope of the correlation map at q* (Poole et al. 2016).
    """
    check(activation, q=q, c=c)
    if _is_rectifier(activation):
        odd, even = _odd_and_even(activation)
        return odd**2 + even**2 * 2 / math.pi * torch.arcsin(c.clamp(-1, 1)) + 0 * q
    return pair_expectation(activation.derivative, q, c, activation)


def _is_rectifier(activation: Activation) -> bool:
    return activation.is_built_in and activation.name in RECTIFIERS


def _odd_and_even(activation: Activation) -> tuple[float, float]:
    slope = RECTIFIERS[activation.name]
    return (1 + slope) / 2, (1 - slope) / 2


def log_slope(function: Function, q: Tensor) -> Tensor:
    """d log f / d log q."""
    step = 1e-4
    return (function(q * (1 + step)) / function(q * (1 - step))).log() / (2 * step)

"""Mean-field theory of signal propagation: what the variances should be, layer by layer.

In a wide network with independent weights of mean 0, the pre-activations of a layer are
Gaussian, and their variance q follows from that of the layer before (Poole et al. 2016,
"Exponential expressivity in deep neural networks through transient chaos"; Schoenholz et al.
2017, "Deep Information Propagation"):

    q' = σ_w² E[φ(√q z)²] + σ_b²,   z ~ N(0, 1),   σ_w² = fan_in · Var(W),   σ_b² = Var(b).

Everything is in double precision, depends on nothing but its arguments and draws nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from initflow.errors import SettingError
from initflow.initializers.activations import Activation
from initflow.theory.correlations import RIGHT, Correlations
from initflow.theory.integrals import (
    check,
    log_slope,
    positive,
    product_moment,
    second_moment,
    slope_moment,
)
from initflow.theory.roots import root

AT_ONCE = 512  # networks: of a function that is integrated on pieces, each takes 50 KB
STEP = 1.1  # from one variance to the next where the fixed point is looked for
STEPS = 48  # at once
MOST = 1e40  # a variance that is on its way to infinity
ROUNDING = 1e-12  # of a growth that is none


@dataclass(frozen=True)
class MeanField:
    """What :func:`mean_field` gives: an infinitely deep and wide network under one σ_w² and σ_b².

    - ``q_star``: the variance of its pre-activations that the variance map leads to, from 0 to
      infinity.
    - ``chi_1``: χ₁, what the gradient's mean square is multiplied by at each layer there, on its
      way back: stable where it is 1.
    - ``c_star``: the correlation that two inputs come to, from 0 to 1.
    - ``xi_q``, ``xi_c``: the layers over which the distances from ``q_star`` and ``c_star`` change
      by a factor of e; infinity where they do not, as on the critical line.
    """

    q_star: float
    chi_1: float
    c_star: float
    xi_q: float
    xi_c: float


@dataclass(frozen=True)
class MeanFields:
    """What :func:`mean_fields` gives: ``q_star``, ``chi_1``, ``c_star``, ``xi_q`` and ``xi_c``.

    They are as in :class:`MeanField`, of many networks: ``torch.float64`` tensors of one shape.
    """

    q_star: Tensor
    chi_1: Tensor
    c_star: Tensor
    xi_q: Tensor
    xi_c: Tensor


def variance_map(
    activation: Activation, q: Tensor, sigma_w2: float | Tensor, sigma_b2: float | Tensor
) -> Tensor:
    """The variance of the next layer's pre-activations: σ_w² E[φ(√q z)²] + σ_b², z ~ N(0, 1).

    - ``activation``: φ, an :class:`Activation`.
    - ``q``: the layer's own variances, of at least 0, a ``torch.float64`` tensor of any shape.
    - ``sigma_w2``: fan_in · Var(W) of the next layer, a number or a tensor that broadcasts.
    - ``sigma_b2``: the variance of its biases, likewise.

    Returns a ``torch.float64`` tensor of the shape that these broadcast to. Raises
    :class:`SettingError` for what is no activation or no such tensor. Source: Poole et al. 2016.
    """
    return sigma_w2 * second_moment(activation, q) + sigma_b2


def correlation_map(
    activation: Activation, c: Tensor, q: float, sigma_w2: float, sigma_b2: float
) -> Tensor:
    """The correlation of two inputs' pre-activations in the next layer.

    - ``activation``: φ, an :class:`Activation`.
    - ``c``: their correlations in this layer, from -1 to 1, a ``torch.float64`` tensor.
    - ``q``: the variance of both in this layer, a number above 0.
    - ``sigma_w2``, ``sigma_b2``: as in :func:`variance_map`, numbers; NaN comes of it where both
      are 0.

    Returns (σ_w² E[φ(u₁) φ(u₂)] + σ_b²) / (σ_w² E[φ(u₁)²] + σ_b²), a ``torch.float64`` tensor of
    the shape of ``c``. Raises :class:`SettingError` for what is no activation, no such tensor or no
    such ``q``. Source: Poole et al. 2016.
    """
    check(activation, c=c)
    at = torch.full_like(c, positive("q", q))
    shared = sigma_w2 * product_moment(activation, at, c) + sigma_b2
    return shared / variance_map(activation, at, sigma_w2, sigma_b2)


def fixed_points(
    activation: Activation, sigma_w2: Tensor, sigma_b2: Tensor, start: float = 1.0
) -> Tensor:
    """:func:`fixed_point` of many networks: q* for each of ``sigma_w2`` and ``sigma_b2``.

    These are tensors of numbers of at least 0 whose shapes broadcast; ``activation`` and ``start``
    are as there. Returns a ``torch.float64`` tensor of the shape of both. Raises
    :class:`SettingError` for what is none of these.
    """
    check(activation)
    start = positive("start", start)
    check_variances(sigma_w2=sigma_w2, sigma_b2=sigma_b2)
    shape = (sigma_w2 + sigma_b2).shape
    w, b = (x.double().expand(shape).flatten() for x in (sigma_w2, sigma_b2))
    first = variance_map(activation, _double("start", start), w, b) / start - 1
    found = torch.zeros_like(w).masked_fill(first > 0, math.inf)
    for sign, of in ((1, first > 0), (-1, first <= 0)):
        of_side = of.nonzero().flatten()
        found_of, beyond = _turned(activation, w[of_side], b[of_side], start, sign)
        at = of_side[found_of]
        for part, end in zip(_parts(at), _parts(beyond), strict=True):
            found[part] = _between(activation, w[part], b[part], end / STEP**sign, end)
    return torch.where(first.abs() < ROUNDING, start, found).view(shape)


def _turned(
    activation: Activation, w: Tensor, b: Tensor, start: float, sign: int
) -> tuple[Tensor, Tensor]:
    """Which of the networks (n,) have a fixed point on the way, and a variance just beyond it.

    The way leads from ``start`` to infinity where ``sign`` is 1, and to 0 where it is -1.
    """
    least = torch.where(b > 0, b / 2, 1e-9)  # no variance is below σ_b²
    of, q = torch.arange(len(w)), _double("start", start)
    at, beyond = [of[:0]], [w[:0]]
    while len(of) and (q <= MOST if sign > 0 else q >= least[of].min()):
        way = q * STEP ** (sign * torch.arange(STEPS, dtype=w.dtype))
        leads = (w[of, None] * second_moment(activation, way) + b[of, None]) / way - 1
        turned = sign * leads < -ROUNDING
        if sign < 0:
            turned &= way >= least[of, None]
        is_found = turned.any(-1)
        at.append(of[is_found])
        beyond.append(way[turned[is_found].int().argmax(-1)])
        of, q = of[~is_found], way[-1] * STEP**sign
    return torch.cat(at), torch.cat(beyond)


def _parts(of: Tensor) -> list[Tensor]:
    """``of`` (n,) in parts that fit into memory."""
    return [of[begin : begin + AT_ONCE] for begin in range(0, len(of), AT_ONCE)]


def _between(activation: Activation, w: Tensor, b: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The fixed points between ``low`` and ``high``, all (n,)."""
    return root(lambda q: variance_map(activation, q, w, b) / q - 1, low, high)


def fixed_point(
    activation: Activation, sigma_w2: float, sigma_b2: float, start: float = 1.0
) -> float:
    """q*: the variance of the pre-activations that :func:`variance_map` leads to, layer by layer.

    - ``activation``: φ, an :class:`Activation`.
    - ``sigma_w2``: fan_in · Var(W), a number of at least 0.
    - ``sigma_b2``: the variance of the biases, a number of at least 0.
    - ``start``: the variance that it begins from, a number above 0 (default 1).

    Returns a number: the solution of q* = σ_w² E[φ(√q* z)²] + σ_b² that is next on the way from
    ``start``, 0 or infinity where there is none, and ``start`` itself where the map leaves it as it
    is (every variance, for ReLU with σ_w² = 2 and no biases). Raises :class:`SettingError` for
    what is none of these. Poole et al. 2016.
    """
    w, b = _double("sigma_w2", sigma_w2), _double("sigma_b2", sigma_b2)
    return fixed_points(activation, w, b, start).item()


def mean_fields(activation: Activation, sigma_w2: Tensor, sigma_b2: Tensor) -> MeanFields:
    """:func:`mean_field` of many networks, for each of ``sigma_w2`` and ``sigma_b2``.

    These are tensors of numbers of at least 0 whose shapes broadcast, such as (n, 1) and (m,) for a
    plane of n × m networks; ``activation`` is as there. Returns a :class:`MeanFields` of tensors of
    the shape of both. Raises :class:`SettingError` for what is none of these.
    """
    q_star = fixed_points(activation, sigma_w2, sigma_b2)
    shape = q_star.shape
    w, b = (x.double().expand(shape).flatten() for x in (sigma_w2, sigma_b2))
    q = q_star.flatten().clamp(1e-20, 1e20)
    of_parts = zip(_parts(q), _parts(w), _parts(b), strict=True)
    parts = [_settled(activation, *of) for of in of_parts]
    growth, chi_1, slope_q = map(torch.cat, zip(*parts, strict=True))
    c_star, slope_c = torch.ones_like(q), chi_1 / torch.where(growth > 0, growth, 1.0)
    # Where all weights are 0, nothing is left to correlate.
    apart = chi_1 > growth * (1 + 1e-6)
    if apart.any():
        table = Correlations.of(activation, q[apart])
        t = table.settled(growth[apart] / w[apart])
        c_star[apart] = t.square().cos().where(RIGHT - t > ROUNDING, 0.0)
        slope_c[apart] = w[apart] * table.slope(t) / growth[apart]
    found = (q_star.flatten(), chi_1, c_star, _depth_scale(slope_q), _depth_scale(slope_c))
    return MeanFields(*(x.view(shape) for x in found))


def _settled(activation: Activation, q: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """At the variances ``q`` (n,): their growth, χ₁, and the slope of the variance map."""
    growth = variance_map(activation, q, w, b) / q  # 1, but at 0 and infinity
    slope = (
        w * second_moment(activation, q) / q * log_slope(lambda q: second_moment(activation, q), q)
    )
    return growth, w * slope_moment(activation, q), slope


def mean_field(activation: Activation, sigma_w2: float, sigma_b2: float) -> MeanField:
    """What many wide layers make of a signal and of a gradient, by mean-field theory.

    - ``activation``: φ, an :class:`Activation`: one of ``initializers.ACTIVATIONS``, or
      ``Activation.of(function)``.
    - ``sigma_w2``: fan_in · Var(W), a number of at least 0: 2 under He's scheme, 1 under LeCun's.
    - ``sigma_b2``: the variance of the biases, a number of at least 0.

    Returns a :class:`MeanField`. Raises :class:`SettingError` for what is none of these. Poole et
    al. 2016, "Exponential expressivity in deep neural networks through transient chaos"; Schoenholz
    et al. 2017, "Deep Information Propagation".
    """
    w, b = _double("sigma_w2", sigma_w2), _double("sigma_b2", sigma_b2)
    fields = mean_fields(activation, w, b)
    return MeanField(**{name: value.item() for name, value in vars(fields).items()})


def _depth_scale(slope: Tensor) -> Tensor:
    change = torch.where(slope > 0, slope, 0.0).log().abs()
    return torch.where(change > 1e-6, 1 / change, math.inf)


def check_variances(**given: object) -> None:
    """Raise a :class:`SettingError` for what are no tensors of variances that broadcast."""
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise SettingError(f"{name} must be a tensor of variances, not {x!r}")
        odd = x[~((x >= 0) & x.isfinite())]
        if len(odd):
            raise SettingError(f"{name} must be finite and at least 0, not {odd[0].item()}")
    shapes = {name: tuple(x.shape) for name, x in given.items() if isinstance(x, Tensor)}
    try:
        torch.broadcast_shapes(*shapes.values())  # type: ignore[no-untyped-call]
    except RuntimeError:
        told = " and ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise SettingError(f"shapes must broadcast, not as {told}") from None


def _double(name: str, value: object) -> Tensor:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise SettingError(f"{name} must be a number, not {value!r}")
    return torch.tensor(float(value), dtype=torch.float64)

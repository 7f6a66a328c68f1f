"""The built-in initialization schemes.

Most are a variance and a distribution: such a scheme *is* the function that gives the
variance of its weights from the fans, so that what it states and what it draws cannot
differ, and one core draws for all of them. "Normal" schemes here are not truncated, as in
PyTorch and unlike in JAX; ``truncated_normal`` is the one that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from initflow.initializers.scheme import Scheme
from initflow.initializers.signature import Value, ask

Distribution = Literal["normal", "uniform", "truncated_normal"]
Mode = Literal["fan_in", "fan_out", "fan_avg"]

# The standard deviation of a standard normal truncated at ±2:
# √(1 − 4·φ(2)/(2Φ(2) − 1)), with φ its density and Φ its distribution function.
TRUNCATED_STD = 0.87962566103423978

BUILT_IN: dict[str, Scheme] = {}
"""The built-in schemes by name, each a :class:`Scheme`, in the order in which they are defined."""


def draw(
    weight: Tensor, variance: float, distribution: Distribution, generator: torch.Generator
) -> None:
    """Fill ``weight`` in place with independent draws of mean 0 and the given ``variance``.

    ``uniform`` is U(±√(3·variance)). ``truncated_normal`` is a normal cut off at two of its
    own standard deviations, widened so that ``variance`` is that of what is left.
    """
    std = math.sqrt(variance)
    if distribution == "normal":
        weight.normal_(0.0, std, generator=generator)
    elif distribution == "uniform":
        bound = math.sqrt(3.0) * std
        weight.uniform_(-bound, bound, generator=generator)
    else:
        parent_std = std / TRUNCATED_STD
        tail = math.erf(math.sqrt(2.0))  # the parent's probability within ±2 of its std
        weight.uniform_(-tail, tail, generator=generator).erfinv_()
        weight.mul_(math.sqrt(2.0) * parent_std).clamp_(-2 * parent_std, 2 * parent_std)


def _add(scheme: Scheme) -> Scheme:
    BUILT_IN[scheme.name] = scheme
    return scheme


def _scaled(distribution: Distribution) -> Callable[[Callable[..., float]], Scheme]:
    """Make a scheme of a variance, a function of the fans and the scheme's arguments."""

    def scheme(variance: Callable[..., float]) -> Scheme:
        def fill(
            weight: Tensor,
            fan_in: int,
            fan_out: int,
            generator: torch.Generator,
            **arguments: Value,
        ) -> None:
            fans = {"fan_in": fan_in, "fan_out": fan_out}
            draw(weight, ask(variance, fans, arguments), distribution, generator)

        return _add(Scheme(variance.__name__, fill, variance, signature=variance))

    return scheme


def _filled(
    variance: Callable[..., float], bias_variance: Callable[..., float] | None = None
) -> Callable[[Callable[..., None]], Scheme]:
    """Make a scheme of a function that fills the tensors itself, and their variances."""

    def scheme(fill: Callable[..., None]) -> Scheme:
        return _add(
            Scheme(
                fill.__name__, fill, variance, signature=fill, stated_bias_variance=bias_variance
            )
        )

    return scheme


def _fan(mode: Mode, fan_in: int, fan_out: int) -> float:
    return {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]


def _at_least_zero(name: str, value: float) -> float:
    if value < 0:
        raise ValueError(f"{name} must be at least 0, not {value}")
    return value


@_filled(lambda: 0.0)
def zero(weight: Tensor) -> None:
    """All weights 0: variance 0, nothing is drawn.

    Every unit of a layer computes the same and gets the same gradient, so they stay
    copies of each other (the symmetry that random weights are there to break).
    """
    weight.zero_()


@_filled(lambda: 0.0)
def constant(weight: Tensor, *, value: float = 0.1) -> None:
    """All weights equal ``value``: variance 0, nothing is drawn. Symmetric, as ``zero`` is."""
    weight.fill_(value)


@_scaled("normal")
def normal(*, std: float = 1.0) -> float:
    """N(0, std²), not truncated: variance std², whatever the fans.

    With std 1 the variance of a unit's input grows with their number, fan_in.
    """
    return _at_least_zero("std", std) ** 2


@_scaled("normal")
def random(*, std: float = 0.01) -> float:
    """N(0, std²), not truncated: variance std², small by default (std 0.01).

    The small Gaussian of many courses (and of Krizhevsky et al. 2012); in deep networks
    the signal vanishes under it.
    """
    return _at_least_zero("std", std) ** 2


@_scaled("uniform")
def uniform(*, bound: float = 1.0) -> float:
    """U(−bound, bound): variance bound²/3, whatever the fans."""
    return _at_least_zero("bound", bound) ** 2 / 3


@_scaled("truncated_normal")
def truncated_normal(*, std: float = 1.0) -> float:
    """N(0, std²) truncated at ±2·std: variance (0.87962566103423978·std)².

    ``std`` is that of the normal before it is cut, as in ``torch.nn.init.trunc_normal_``.
    """
    return (TRUNCATED_STD * _at_least_zero("std", std)) ** 2


@_scaled("normal")
def lecun(fan_in: int) -> float:
    """N(0, 1/fan_in), not truncated: variance 1/fan_in.

    Keeps the variance of a linear (or, near 0, tanh) layer. LeCun, Bottou, Orr and Müller
    1998, "Efficient BackProp", section 4.6. PyTorch's default, sometimes called LeCun's,
    has a third of this variance: see ``pytorch``.
    """
    return 1 / fan_in


@_scaled("uniform")
def lecun_uniform(fan_in: int) -> float:
    """U(±√(3/fan_in)): variance 1/fan_in, as ``lecun``. LeCun et al. 1998."""
    return 1 / fan_in


@_scaled("normal")
def xavier(fan_in: int, fan_out: int, *, gain: float = 1.0) -> float:
    """N(0, gain²·2/(fan_in + fan_out)), not truncated: variance gain²·2/(fan_in + fan_out).

    A compromise between keeping the variance forward and backward, for tanh and sigmoid.
    Glorot and Bengio 2010, "Understanding the difficulty of training deep feedforward
    neural networks", equation 12.
    """
    return _at_least_zero("gain", gain) ** 2 / _fan("fan_avg", fan_in, fan_out)


@_scaled("uniform")
def xavier_uniform(fan_in: int, fan_out: int, *, gain: float = 1.0) -> float:
    """U(±gain·√(6/(fan_in + fan_out))): variance gain²·2/(fan_in + fan_out), as ``xavier``.

    Glorot and Bengio 2010, equation 16.
    """
    return _at_least_zero("gain", gain) ** 2 / _fan("fan_avg", fan_in, fan_out)


@_scaled("normal")
def he(fan_in: int, fan_out: int, *, mode: Mode = "fan_in", negative_slope: float = 0.0) -> float:
    """N(0, 2/((1 + a²)·fan)), not truncated: variance 2/((1 + a²)·fan).

    Keeps the second moment through ReLU layers (a = 0) and leaky ReLU of slope
    a = ``negative_slope``; ``mode`` says which fan, and so whether forward (fan_in) or
    backward (fan_out). He, Zhang, Ren and Sun 2015, "Delving Deep into Rectifiers",
    equations 10, 14 and 15.
    """
    return 2 / ((1 + negative_slope**2) * _fan(mode, fan_in, fan_out))


@_scaled("uniform")
def he_uniform(
    fan_in: int, fan_out: int, *, mode: Mode = "fan_in", negative_slope: float = 0.0
) -> float:
    """U(±√(6/((1 + a²)·fan))): variance 2/((1 + a²)·fan), as ``he``. He et al. 2015."""
    return 2 / ((1 + negative_slope**2) * _fan(mode, fan_in, fan_out))


@_scaled("uniform")
def pytorch(fan_in: int) -> float:
    """U(±1/√fan_in): variance 1/(3·fan_in), what ``torch.nn.Linear`` starts with.

    PyTorch writes it as ``kaiming_uniform_(a=√5)``. It is often called LeCun's, whose
    variance is three times as large.
    """
    return 1 / (3 * fan_in)


@_filled(lambda fan_in, fan_out, gain: gain**2 / max(fan_in, fan_out))
def orthogonal(weight: Tensor, generator: torch.Generator, *, gain: float = 1.0) -> None:
    """gain times a uniformly (Haar) drawn matrix of orthonormal rows or columns.

    Variance gain²/max(fan_in, fan_out) in a fully connected layer; a convolution's kernel
    is flattened into its inputs. Saxe, McClelland and Ganguli 2013, "Exact solutions to the
    nonlinear dynamics of learning in deep linear neural networks".
    """
    matrix = weight.flatten(start_dim=1)
    rows, columns = matrix.shape
    tall = torch.empty(
        max(rows, columns), min(rows, columns), dtype=weight.dtype, device=weight.device
    )
    q, r = torch.linalg.qr(tall.normal_(generator=generator))
    q *= torch.diagonal(r).sign()  # makes the draw uniform, as the signs of QR are not
    weight.copy_((q if rows >= columns else q.T).reshape(weight.shape)).mul_(gain)


@_filled(lambda fan_in, nonzero, std: std**2 * min(nonzero, fan_in) / fan_in)
def sparse(
    weight: Tensor, fan_in: int, generator: torch.Generator, *, nonzero: int = 15, std: float = 1.0
) -> None:
    """``nonzero`` of each unit's incoming weights N(0, std²), not truncated; the others 0.

    Variance std²·nonzero/fan_in (nonzero is fan_in where there are fewer inputs). Which
    inputs, is drawn for each unit. Martens 2010, "Deep learning via Hessian-free
    optimization", section 5 (15 connections a unit). ``torch.nn.init.sparse_`` differs: it
    zeroes a fraction of each input's outgoing weights.
    """
    if nonzero < 1:
        raise ValueError(f"nonzero must be at least 1, not {nonzero}")
    weight.normal_(0.0, _at_least_zero("std", std), generator=generator)
    if nonzero < fan_in:
        units = weight.flatten(start_dim=1)
        order = torch.rand(units.shape, generator=generator, device=weight.device).argsort(dim=1)
        units.scatter_(1, order[:, nonzero:], 0.0)
        weight.copy_(units.reshape(weight.shape))


def _identity_variance(fan_in: int, fan_out: int, gain: float) -> float:
    share = min(fan_in, fan_out) / (fan_in * fan_out)
    return gain**2 * share * (1 - share)


@_filled(_identity_variance)
def identity(weight: Tensor, *, gain: float = 1.0) -> None:
    """gain where a unit meets the input of its own number, 0 elsewhere; nothing is drawn.

    The entries' variance is gain²·s·(1 − s), s = min(fan_in, fan_out)/(fan_in·fan_out) being
    the share of ones (for a convolution, of its flattened kernel). A square linear layer
    passes on its input. Le, Jaitly and Hinton 2015, "A Simple Way to Initialize Recurrent
    Networks of Rectified Linear Units".
    """
    matrix = torch.eye(len(weight), weight[0].numel(), dtype=weight.dtype, device=weight.device)
    weight.copy_(matrix.reshape(weight.shape)).mul_(gain)


@_filled(
    lambda fan_in, sigma_w2: _at_least_zero("sigma_w2", sigma_w2) / fan_in,
    lambda sigma_b2: _at_least_zero("sigma_b2", sigma_b2),
)
def mean_field(
    weight: Tensor,
    bias: Tensor,
    fan_in: int,
    generator: torch.Generator,
    *,
    sigma_w2: float = 1.0,
    sigma_b2: float = 0.0,
) -> None:
    """Weights N(0, σ_w²/fan_in) and biases N(0, σ_b²), not truncated: variance sigma_w2/fan_in.

    Any place in the plane of mean-field theory: Poole et al. 2016, "Exponential expressivity in
    deep neural networks through transient chaos"; Schoenholz et al. 2017, "Deep Information
    Propagation".
    """
    draw(weight, _at_least_zero("sigma_w2", sigma_w2) / fan_in, "normal", generator)
    draw(bias, _at_least_zero("sigma_b2", sigma_b2), "normal", generator)

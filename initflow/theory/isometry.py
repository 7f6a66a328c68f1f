"""The singular values of a wide network's Jacobian: dynamical isometry, by free probability.

The Jacobian is a product of weight matrices W and of the activation function's slopes, diagonal
matrices D, which in wide networks are freely independent of each other: the spectrum of the product
follows from those of its factors. With n the width and M(z) = Σ λ/(z − λ)/n over the eigenvalues λ
of JJᵀ, and χ its inverse, that of a product is, for square matrices,

    χ_AB(w) = χ_A(w) χ_B(w) w/(1 + w),        which is S_AB = S_A S_B, S = (1 + w)/(w χ).

Pennington, Schoenholz and Ganguli 2017, "Resurrecting the sigmoid in deep learning through
dynamical isometry: theory and practice", and 2018, "The Emergence of Spectral Universality in Deep
Networks"; for matrices that are not square, Burda et al. 2010, "Eigenvalues and singular values of
products of rectangular Gaussian random matrices". Independent entries of any distribution count as
Gaussian ones.

The density is −Im M/π of ln λ, just above the real axis. M is followed there along half circles
from the negative half of the axis, where it is real and monotone. Nothing is drawn.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from initflow.initializers.activations import Activation
from initflow.theory.integrals import distribution

POINTS = 300  # of ln λ
CHEBYSHEV = 5  # variances that those of all layers are interpolated from
TAIL = 1e-4  # share of the spectrum that may lie beyond the points at first
TRIMMED = 2e-5  # share that may lie beyond those that are kept
LOWEST, HIGHEST = 1e-7, 3e-3  # angles above the real axis at which the density is taken
MISSED = 0.1  # of the spectrum, at most
STEPS, TURN = 16, 0.3  # of the first half circles, down to this angle
LOWERED = 0.4  # logarithm of the factor on the angle in each further step
PASSES = 3
NEWTON = 30  # iterations
HALVINGS = 24  # of some hundred units of a logarithm, from where Newton goes on
CLOSE = 1e-6  # change of a logarithm with which they end: the error is its square
LONGEST = 0.5  # change of a logarithm in one of them
SAME = 1e-9
SMALLEST = 1e-250  # value, of the largest
FEW = 9  # values of a function that is made of straight lines


@dataclass(frozen=True)
class Weights:
    """A random matrix, (fan_out, fan_in), of independent entries of ``variance`` and mean 0.

    Or, where ``orthogonal``, a uniformly drawn one whose rows or columns are orthogonal and of one
    length: its entries have that variance too.
    """

    fan_in: int
    fan_out: int
    variance: float
    orthogonal: bool = False

    @property
    def rank(self) -> int:
        return min(self.fan_in, self.fan_out)

    @property
    def gain2(self) -> float:
        """The square of every singular value of an orthogonal one."""
        return self.variance * max(self.fan_in, self.fan_out)

    @property
    def trace(self) -> float:
        """Of WWᵀ."""
        return self.variance * self.fan_in * self.fan_out

    @property
    def spread(self) -> float:
        """tr (WWᵀ)² over the square of the trace."""
        return 1 / self.rank if self.orthogonal else 1 / self.fan_in + 1 / self.fan_out


@dataclass(frozen=True)
class Slopes:
    """A diagonal matrix of a layer's slopes: φ′(√q z) for each unit, z ~ N(0, 1)."""

    width: int
    activation: Activation
    q: float

    @functools.cached_property
    def squares(self) -> tuple[Tensor, Tensor]:
        """The values of φ′², ascending, and their weights, which sum to 1."""
        values, weights = distribution(
            lambda x: self.activation.derivative(x).square(), self.q, self.activation
        )
        different, of = torch.unique(values, return_inverse=True)  # sorted
        summed = torch.zeros_like(different).index_add(0, of, weights)
        return different, summed / summed.sum()

    @property
    def fan_in(self) -> int:
        return self.width

    @property
    def fan_out(self) -> int:
        return self.width

    @property
    def rank(self) -> float:
        values, weights = self.squares
        return self.width * float(weights[values > 0].sum())

    @property
    def trace(self) -> float:
        return self.width * self._moment(1)

    @property
    def spread(self) -> float:
        first = self._moment(1)
        return self._moment(2) / first**2 / self.width if first else math.inf

    @property
    def is_trivial(self) -> bool:
        """Whether all slopes are the same."""
        return len(self.squares[0]) == 1

    def _moment(self, power: int) -> float:
        values, weights = self.squares
        return float((weights * values**power).sum())


Factor = Weights | Slopes


@dataclass(frozen=True)
class Spectrum:
    """How the singular values of a wide network's Jacobian lie, ``n`` of them for an input.

    ``logarithms``: (k,), natural ones, ascending; ``shares``: (k,), the share of the values that
    lie at or below each; of values that are all the same, it is a single point. ``zero`` is the
    share that is 0. ``mean_square`` and ``square_variance`` are the mean and the variance of the
    values' squares, the zeros among them, in closed form.
    """

    n: int
    logarithms: Tensor
    shares: Tensor
    zero: float
    mean_square: float
    square_variance: float

    def share_below(self, logarithms: Tensor) -> Tensor:
        """The share of values whose logarithm is at most each of ``logarithms``, (m,)."""
        at = torch.searchsorted(self.logarithms, logarithms, right=True)
        upper, lower = at.clamp(max=len(self.shares) - 1), (at - 1).clamp(min=0)
        x0, x1 = self.logarithms[lower], self.logarithms[upper]
        y0, y1 = self.shares[lower], self.shares[upper]
        part = ((logarithms - x0) / (x1 - x0).where(x1 > x0, 1.0)).clamp(0, 1)
        between = y0 + part * (y1 - y0)
        return between.where(at > 0, self.zero).where(at < len(self.shares), self.shares[-1])

    def quantile(self, share: float) -> float:
        """The singular value below which a ``share`` of them lies."""
        if share <= self.zero:
            return 0.0
        if len(self.logarithms) == 1:
            return float(self.logarithms[0].exp())
        at = int(torch.searchsorted(self.shares, self.shares.new_tensor(share)))
        at = min(max(at, 1), len(self.shares) - 1)
        y0, y1 = self.shares[at - 1 : at + 1].tolist()
        x0, x1 = self.logarithms[at - 1 : at + 1].tolist()
        part = (share - y0) / (y1 - y0) if y1 > y0 else 1.0
        return math.exp(x0 + min(max(part, 0.0), 1.0) * (x1 - x0))


def spectrum(factors: Sequence[Factor]) -> Spectrum | None:
    """Of the product of ``factors``, the first being applied first: D₁, W₂, D₂, … .

    None where the product is 0, or has no finite size in double precision.
    """
    n = min(factors[0].fan_in, factors[-1].fan_out)
    junctions = [before.fan_out for before, _ in pairwise(factors)]
    log_trace = sum(_log(one.trace) for one in factors) - sum(map(math.log, junctions))
    if not math.isfinite(log_trace):
        return None
    spread = sum(one.spread for one in factors) - sum(1 / width for width in junctions)
    rank = min(one.rank for one in factors)
    # In units of its mean, so that no depth leaves the range of numbers.
    log_mean = log_trace - math.log(n)
    found = _exactly(factors, rank, spread) or _followed(factors, junctions, rank)
    if found is None:
        return None
    logarithms, shares = found
    zero = 1 - rank / n
    mean, excess = _exp(log_mean), n * spread - 1
    return Spectrum(
        n,
        (logarithms + log_mean) / 2,
        zero + (1 - zero) * shares,
        zero,
        mean,
        mean**2 * (excess if excess > SAME else 0.0) if mean < 1e150 else math.inf,
    )


def _exactly(factors: Sequence[Factor], rank: float, spread: float) -> tuple[Tensor, Tensor] | None:
    """ln(λ/mean) and the shares below, where no factor's spectrum is mixed with another's."""
    n = min(factors[0].fan_in, factors[-1].fan_out)
    if rank * spread < 1 + SAME:  # all are the same, but those that are 0
        return torch.tensor([math.log(n / rank)], dtype=torch.float64), torch.ones(1).double()
    mixed = [one for one in factors if isinstance(one, Slopes) and not one.is_trivial]
    if len(mixed) != 1 or abs(spread - mixed[0].spread) > SAME * spread:
        return None  # the others leave lengths as they are, but for a factor
    (slopes,) = mixed
    values, weights = slopes.squares
    values, weights = values[values > 0], weights[values > 0]
    logarithms = (n * values / slopes.trace).log()
    below = weights.cumsum(0) / weights.sum()
    if len(values) < FEW:  # steps
        at = torch.stack([logarithms - SAME, logarithms], 1).flatten()
        return at, torch.stack([below - weights / weights.sum(), below], 1).flatten()
    return logarithms, below - weights / (2 * weights.sum())


class _Product:
    """The equations of M(z) of a product, m being n·M: of unit mean.

    For each different diagonal factor its own argument u, χ_D(m), is an unknown beside m.
    """

    def __init__(self, factors: Sequence[Factor], junctions: Sequence[int]) -> None:
        self.n = min(factors[0].fan_in, factors[-1].fan_out)
        self._widths = torch.tensor(junctions, dtype=torch.float64)
        weights = [one for one in factors if isinstance(one, Weights)]
        fans = [w.fan_in for w in weights if not w.orthogonal]
        fans += [w.fan_out for w in weights if not w.orthogonal]
        self._fans = torch.tensor(fans, dtype=torch.float64)  # of (n + m) in χ
        ranks = [w.rank for w in weights if w.orthogonal]
        self._ranks = torch.tensor(ranks, dtype=torch.float64)
        self._poles = len(weights) - len(junctions)
        # ln of what the factors are multiplied by, relative to the mean.
        self._constant = -sum(_log(one.trace) for one in factors if isinstance(one, Slopes))
        self._constant -= sum(math.log(fan) for fan in fans) + sum(map(math.log, ranks))
        self._constant += sum(map(math.log, junctions)) + math.log(self.n)
        slopes = [one for one in factors if isinstance(one, Slopes)]
        self._slopes, self.powers = _interpolated(slopes)
        size = max((len(one.squares[0]) for one in self._slopes), default=0)
        # One over the values: 0 counts for nothing, and none leaves the range of numbers.
        self._inverses = torch.zeros(len(self._slopes), 1, size, dtype=torch.float64)
        self._masses = torch.zeros(len(self._slopes), size, 1, dtype=torch.float64)
        self._largest = torch.ones(len(self._slopes), dtype=torch.float64)
        for at, one in enumerate(self._slopes):
            values, masses = one.squares
            self._largest[at] = values[-1]
            inverses = (values / values[-1]).clamp(min=SMALLEST).reciprocal()
            self._inverses[at, 0, : len(values)] = inverses
            self._masses[at, : len(values), 0] = one.width * masses * (values > 0)

    def known(self, m: Tensor, log_m: Tensor) -> tuple[Tensor, Tensor]:
        """ln z but for the diagonal factors' u, and its derivative by ln m; ``m``: (g,)."""
        sums = [m.unsqueeze(-1) + of for of in (self._fans, self._ranks, self._widths)]
        fans, ranks, widths = (one.log().sum(-1) for one in sums)
        by_fans, by_ranks, by_widths = (one.reciprocal().sum(-1) for one in sums)
        value = self._constant + fans + ranks - widths - self._poles * log_m
        return value, m * (by_fans + by_ranks - by_widths) - self._poles

    def diagonal(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """n·M of each diagonal factor at complex ``u``, (g, k), and its derivative by ln u.

        These are sums of 1/(x − 1), x = u/λ, and of −x/(x − 1)² = −1/(x − 1) − 1/(x − 1)², in real
        numbers: those that are complex take several times as long.
        """
        u = (u / self._largest).T.unsqueeze(-1)  # (k, g, 1)
        real, imaginary = u.real * self._inverses - 1, u.imag * self._inverses  # (k, g, λ)
        size = (real.square().addcmul_(imaginary, imaginary)).reciprocal_()
        real, imaginary = real.mul_(size), imaginary.mul_(size).neg_()
        value = torch.complex(real @ self._masses, imaginary @ self._masses)
        product = (real * imaginary) @ self._masses
        square = real.square_().addcmul_(imaginary, imaginary, value=-1) @ self._masses
        by = -value - torch.complex(square, 2 * product)
        return value.squeeze(-1).T, by.squeeze(-1).T

    def on_negative(self, u: Tensor) -> Tensor:
        """n·M of each diagonal factor at −``u``, which are positive, (g, k)."""
        x = (u / self._largest).T.unsqueeze(-1) * self._inverses
        return -(x.add_(1).reciprocal_() @ self._masses).squeeze(-1).T

    def newton(self, log_z: Tensor, log_m: Tensor, log_u: Tensor) -> tuple[Tensor, Tensor]:
        """ln m (g,) and ln u (g, k) at ``log_z`` (g,), from some near it."""
        log_m, log_u = log_m.clone(), log_u.clone()
        open_ = torch.arange(len(log_z))  # the points that are still to be solved
        for _ in range(NEWTON):
            at_m, at_u = log_m[open_], log_u[open_]
            m = at_m.exp()
            known, slope = self.known(m, at_m)
            value, by = self.diagonal(at_u.exp())
            off = value - m.unsqueeze(-1)
            residual = known + (self.powers * (at_u - off / by)).sum(-1) - log_z[open_]
            of_u = m.unsqueeze(-1) / by
            change = -residual / (slope + (self.powers * of_u).sum(-1))
            changes = torch.cat([change[:, None], of_u * change[:, None] - off / by], 1)
            largest = changes.abs().amax(1)
            changes = changes / largest.clamp(min=LONGEST)[:, None] * LONGEST
            log_m[open_] += changes[:, 0]
            log_u[open_] += changes[:, 1:]
            open_ = open_[largest > CLOSE]
            if not len(open_):
                break
        return log_m, log_u

    def on_axis(self, m: Tensor) -> tuple[Tensor, Tensor]:
        """ln(−z) and ln(−u) at real, negative ``m`` above −rank."""
        positive = [one.squares[0][one.squares[0] > 0] for one in self._slopes]
        low = torch.tensor([float(x.min()) for x in positive], dtype=torch.float64).log() - 60
        high = torch.tensor([float(x.max()) for x in positive], dtype=torch.float64).log() + 60
        low, high = low.expand(len(m), -1).clone(), high.expand(len(m), -1).clone()
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            above = self.on_negative(middle.exp()) < m.unsqueeze(-1)
            low, high = middle.where(above, low), high.where(above, middle)
        log_u = (low + high) / 2
        value = self.known(m, (-m).log())[0]
        return value + (self.powers * log_u).sum(-1), log_u


def _followed(
    factors: Sequence[Factor], junctions: Sequence[int], rank: float
) -> tuple[Tensor, Tensor] | None:
    """ln(λ/mean) and the share of those that are not 0 below it, from M above the real axis.

    None where that was not followed to its end: the density would not be of the whole spectrum.
    """
    product = _Product(factors, junctions)
    far = math.log(1 / TAIL)
    start = -rank * torch.sigmoid(torch.linspace(far, -far, POINTS, dtype=torch.float64))
    axis, log_u = product.on_axis(start)
    log_m, points = (-start).log(), axis
    for highest in (math.inf, *[HIGHEST] * PASSES):
        near = torch.searchsorted(axis, points).clamp(0, POINTS - 1)
        points, density = _density(product, points, log_m[near], log_u[near], highest)
        below = _cumulated(points, density)
        finer = _where_it_is(points, below)
        if highest == HIGHEST and finer[-1] - finer[0] > (points[-1] - points[0]) / 2:
            break
        points = finer
    near = torch.searchsorted(axis, finer).clamp(0, POINTS - 1)
    finer, density = _density(product, finer, log_m[near], log_u[near], HIGHEST)
    whole = torch.trapezoid(density, finer).item() / (math.pi * rank)
    return (finer, _cumulated(finer, density)) if abs(whole - 1) < MISSED else None


def _where_it_is(points: Tensor, below: Tensor) -> Tensor:
    """Points where the spectrum lies: half of them evenly, half where it is dense, or ends."""
    first = int((below <= TRIMMED).nonzero()[-1])
    last = int((below >= 1 - TRIMMED).nonzero()[0])
    part = torch.linspace(0, 1, POINTS // 2, dtype=torch.float64)
    evenly = torch.lerp(points[first], points[last], part)
    towards_ends = (part[1:-1] * (math.pi / 2)).sin().square()
    shares = torch.lerp(below[first], below[last], towards_ends)
    at = torch.searchsorted(below, shares).clamp(1, len(below) - 1)
    across = (shares - below[at - 1]) / (below[at] - below[at - 1]).clamp(min=1e-300)
    dense = torch.lerp(points[at - 1], points[at], across.clamp(0, 1))
    return torch.cat([evenly, dense]).sort().values


def _density(
    product: _Product, points: Tensor, log_m: Tensor, log_u: Tensor, highest: float
) -> tuple[Tensor, Tensor]:
    """Those of ``points``, which are ln λ, that could be solved, and −Im M there.

    From ln(−m) and ln(−u) on the negative half of the axis to half as high above the axis as the
    next point is away, ``highest`` at most; then a quarter, and from there on to the axis by a
    straight line: what lies outside of the spectrum goes with the angle.
    """
    gaps = points.diff()
    gaps = torch.minimum(torch.cat([gaps, gaps[-1:]]), torch.cat([gaps[:1], gaps]))
    end = (gaps / 2).clamp(LOWEST, min(highest, TURN / 2))
    turn = torch.linspace(math.pi, TURN, STEPS, dtype=torch.float64)
    down = torch.linspace(0, 1, math.ceil(math.log(TURN / end.min()) / LOWERED) + 1)
    angles = [torch.full_like(end, angle) for angle in turn]
    angles += [TURN * (end / TURN) ** part for part in down[1:].double()]
    angles.append(end / 2)
    log_m = torch.complex(log_m, torch.full_like(log_m, -math.pi))
    log_u = torch.complex(log_u, torch.full_like(log_u, math.pi))
    path: list[tuple[Tensor, Tensor, Tensor]] = []
    for angle in angles:
        if len(path) > 1:  # straight on
            (earlier, *first), (before, *second) = path[-2:]
            on = (1 + (angle - before) / (before - earlier)).to(torch.complex128)
            ahead = torch.lerp(first[0], second[0], on)
            there = (ahead.imag < 0) & (ahead.imag > -math.pi)
            log_m = ahead.where(there, second[0])
            ahead = torch.lerp(first[1], second[1], on.unsqueeze(-1))
            log_u = ahead.where(there.unsqueeze(-1), second[1])
        log_m, log_u = product.newton(torch.complex(points, angle), log_m, log_u)
        path.append((angle, log_m, log_u))
    by_end, by_half = (-log_m.exp().imag for _, log_m, _ in path[-2:])
    density = (2 * by_half - by_end).clamp(min=0.0)
    solved = density.isfinite()
    return points[solved], density[solved]


def _cumulated(points: Tensor, density: Tensor) -> Tensor:
    """The share below each of ``points``, by the trapezoidal rule."""
    parts = torch.cat([density.new_zeros(1), torch.cumulative_trapezoid(density, points)])
    return parts / parts[-1]


def _interpolated(slopes: Sequence[Slopes]) -> tuple[list[Slopes], Tensor]:
    """Few layers' slopes, and how often each counts, for ``slopes`` of many variances.

    ln χ_D of all layers is what counts, and a smooth function of ln q: its sum is that of the
    polynomials through few variances.
    """
    found: list[Slopes] = []
    counts: list[float] = []
    for width in dict.fromkeys(one.width for one in slopes):
        own = [one for one in slopes if one.width == width]
        logs = torch.tensor([one.q for one in own], dtype=torch.float64).clamp(min=1e-300).log()
        low, high = logs.min().item(), logs.max().item()
        ends = (own[logs.argmin()].squares, own[logs.argmax()].squares)
        if len(ends[0][0]) < FEW and all(map(torch.equal, *ends)):  # a rectifier, at any variance
            found.append(own[0])
            counts.append(float(len(own)))
            continue
        different = torch.unique(logs.round(decimals=9))
        if len(different) <= CHEBYSHEV:
            nodes = different
        else:
            angles = (torch.arange(CHEBYSHEV, dtype=torch.float64) + 0.5) * math.pi / CHEBYSHEV
            nodes = (low + high) / 2 - (high - low) / 2 * angles.cos()
        for at, node in enumerate(nodes):
            others = torch.cat([nodes[:at], nodes[at + 1 :]])
            basis = ((logs[:, None] - others) / (node - others)).prod(-1)
            found.append(Slopes(width, own[0].activation, math.exp(node.item())))
            counts.append(float(basis.sum()))
    return found, torch.tensor(counts, dtype=torch.float64)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf

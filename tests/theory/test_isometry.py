"""The spectra of Jacobians: closed forms, products of matrices that are really drawn, moments."""

import math

import pytest
import torch

from initflow.initializers.activations import ACTIVATIONS, Activation
from initflow.theory import isometry
from initflow.theory.isometry import Slopes, Weights, spectrum

TANH, RELU, LEAKY = (ACTIVATIONS[name] for name in ("tanh", "relu", "leaky_relu"))
BENT = Activation.of(lambda x: torch.where(x > 0.5, 2 * x, 0.1 * x), "bent")
D = torch.float64


def gaussian(n, sigma_w2=1.0):
    return Weights(n, n, sigma_w2 / n)


def orthogonal(n, gain=1.0):
    return Weights(n, n, gain**2 / n, orthogonal=True)


def layers(n, activation, variances, weights):
    """The factors D₁, W₂, D₂, …, the layers' pre-activations being of these ``variances``."""
    return [factor for q in variances for factor in (Slopes(n, activation, q), weights)]


def drawn(factor, generator):
    """A matrix that the factor stands for."""
    if isinstance(factor, Slopes):
        z = torch.randn(factor.width, dtype=D, generator=generator)
        return torch.diag(factor.activation.derivative(math.sqrt(factor.q) * z))
    matrix = torch.randn(factor.fan_out, factor.fan_in, dtype=D, generator=generator)
    if not factor.orthogonal:
        return math.sqrt(factor.variance) * matrix
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return math.sqrt(factor.gain2) * u @ v


def simulated(factors, draws=3):
    """The singular values of ``draws`` products, in ascending order."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(draws):
        product = drawn(factors[0], generator)
        for factor in factors[1:]:
            product = drawn(factor, generator) @ product
        found.append(torch.linalg.svdvals(product))
    return torch.cat(found).sort().values


WIDE = 300
PRODUCTS = {
    "Gaussian, tanh, one variance": layers(WIDE, TANH, [0.5] * 5, gaussian(WIDE, 1.3)),
    "orthogonal, tanh, a variance a layer": layers(
        WIDE, TANH, [1 / (layer + 1) for layer in range(6)], orthogonal(WIDE, 1.05)
    ),
    "Gaussian, tanh, variances of two decades": layers(
        WIDE, TANH, [10 ** (1 - layer / 2) for layer in range(5)], gaussian(WIDE)
    ),
    "orthogonal, tanh, near 0": layers(WIDE, TANH, [1e-3] * 10, orthogonal(WIDE)),
    "orthogonal, a single layer": layers(WIDE, TANH, [0.5], orthogonal(WIDE)),
    "Gaussian, relu": layers(WIDE, RELU, [1.0] * 4, gaussian(WIDE, 2.0)),
    "orthogonal, relu": layers(WIDE, RELU, [1.0] * 4, orthogonal(WIDE, 2**0.5)),
    "orthogonal, leaky relu, in bands": layers(WIDE, LEAKY, [1.0] * 2, orthogonal(WIDE, 2**0.5)),
    "orthogonal, gelu": layers(WIDE, ACTIVATIONS["gelu"], [1.0] * 3, orthogonal(WIDE)),
    "a function of one's own": layers(WIDE, BENT, [1.0] * 2, gaussian(WIDE)),
    "fewer units from layer to layer": [
        Weights(600, 400, 1 / 600),
        Slopes(400, TANH, 0.5),
        Weights(400, 200, 1 / 400, orthogonal=True),
        Slopes(200, TANH, 0.5),
    ],
    "more units": [Weights(150, 300, 1 / 150, orthogonal=True), Slopes(300, TANH, 1.0)],
    "a bottleneck": [Weights(400, 100, 1 / 400), Slopes(100, TANH, 0.5), Weights(100, 400, 0.01)],
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_spectrum_is_that_of_products_that_are_drawn(name):
    """The Kolmogorov-Smirnov distance to the singular values that are not 0, and their number."""
    factors = PRODUCTS[name]
    found, values = spectrum(factors), simulated(factors)
    there = values[values > 1e-12 * values.max()]
    missing = 1 - len(there) / len(values)
    if found.zero > 0:
        assert missing == pytest.approx(found.zero, abs=0.04)
    # Those that are far below the largest are lost in rounding, and count as 0.
    least = max(missing, found.zero) if found.zero == 0 else found.zero
    shares = least + (1 - least) * (torch.arange(len(there)) + 0.5) / len(there)
    step = 1e-3 * torch.tensor([[-1.0], [1.0]])  # on both sides, of those that are all the same
    off = found.share_below(there.log() + step) - shares
    apart = torch.where(off[0] > 0, off[0], torch.where(off[1] < 0, -off[1], 0.0))
    assert apart.max() < 0.035


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_closed_moments_are_those_of_the_density(name):
    """Mean and variance of the squares, from the cumulative shares."""
    found = spectrum(PRODUCTS[name])
    squares = torch.exp(2 * found.logarithms)
    shares = found.shares.diff()
    middle = (squares[1:] + squares[:-1]) / 2
    mean = (shares * middle).sum() + (found.shares[0] - found.zero) * squares[0]
    second = (shares * middle.square()).sum()
    assert mean.item() == pytest.approx(found.mean_square, rel=0.02)
    variance = second - mean.square()
    assert variance.item() == pytest.approx(found.square_variance, rel=0.08, abs=1e-3)


def test_one_gaussian_matrix_follows_the_quarter_circle():
    """Of variance 1/n: density √(4 − s²)/π on [0, 2] (Marchenko and Pastur)."""
    found = spectrum([gaussian(1000)])
    s = torch.linspace(0.02, 1.98, 99, dtype=D)
    exact = (s * (4 - s.square()).sqrt() / 2 + 2 * (s / 2).arcsin()) / math.pi
    assert (found.share_below(s.log()) - exact).abs().max() < 2e-3


def test_two_gaussian_matrices_follow_fuss_and_catalan():
    """The moments of the squares are binomial((L + 1)k, k)/(Lk + 1) of L matrices."""
    for factors, expected in ((2, (1, 3, 12)), (3, (1, 4, 22))):
        found = spectrum([gaussian(100)] * factors)
        squares = torch.exp(2 * found.logarithms)
        middle = (squares[1:] + squares[:-1]) / 2
        moments = [(found.shares.diff() * middle**k).sum().item() for k in (1, 2, 3)]
        assert moments == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("depth", [1, 2, 10, 50])
def test_the_largest_singular_value_of_gaussian_matrices(depth):
    """s_max² = σ_w^{2L} (L + 1)^{L + 1}/L^L, the edge of the spectrum."""
    edge = 1.1**depth * math.sqrt((depth + 1) ** (depth + 1) / depth**depth)
    found = spectrum([gaussian(100, 1.21)] * depth)
    assert found.quantile(0.99998) == pytest.approx(edge, rel=0.03)


@pytest.mark.parametrize(("depth", "gain"), [(1, 1.0), (20, 1.0), (20, 1.1), (300, 0.5)])
def test_orthogonal_linear_layers_have_gain_to_the_depth_alone(depth, gain):
    """Every singular value of an orthogonal square linear network is gain^L."""
    linear = layers(100, ACTIVATIONS["linear"], [1.0] * depth, orthogonal(100, gain))
    found = spectrum(linear)
    for share in (0.01, 0.5, 0.99):
        assert math.log(found.quantile(share)) == pytest.approx(depth * math.log(gain), abs=1e-9)
    assert found.square_variance == 0
    assert found.zero == 0


def test_the_moments_are_penningtons():
    """m₁ = χ^L, σ² = χ^{2L} L (μ₂/μ₁² − 1 − s₁); s₁ is −1 of Gaussian, 0 of orthogonal weights."""
    slopes = Slopes(100, TANH, 0.6)
    values, weights = slopes.squares
    mu = [(weights * values**k).sum().item() for k in (1, 2)]
    for make, s_1 in ((gaussian, -1), (orthogonal, 0)):
        found = spectrum(layers(100, TANH, [0.6] * 12, make(100, 1.0)))
        assert found.mean_square == pytest.approx(mu[0] ** 12)
        ratio = found.square_variance / found.mean_square**2
        assert ratio == pytest.approx(12 * (mu[1] / mu[0] ** 2 - 1 - s_1))


def test_relu_leaves_half_of_the_singular_values():
    """With orthogonal weights, one layer's others are the gain; the rank of many is that of one."""
    one = spectrum(layers(100, RELU, [1.0], orthogonal(100, 2**0.5)))
    assert one.zero == pytest.approx(0.5)
    assert one.quantile(0.4) == 0
    assert one.quantile(0.6) == one.quantile(0.99) == pytest.approx(2**0.5)
    many = spectrum(layers(100, RELU, [1.0] * 30, gaussian(100, 2.0)))
    assert many.zero == pytest.approx(0.5)
    assert many.mean_square == pytest.approx(1.0)


def test_depth_leaves_no_range_of_numbers():
    """Products beyond double precision have a spectrum in logarithms; a product that is 0 none."""
    for sigma_w2 in (1e-9, 1e9):
        found = spectrum([gaussian(100, sigma_w2)] * 60)
        middle = found.logarithms[len(found.logarithms) // 2].item()
        assert middle == pytest.approx(30 * math.log(sigma_w2), abs=80)
        assert found.share_below(torch.tensor([-1e9, 1e9], dtype=D)).tolist() == [0, 1]
    assert spectrum([gaussian(100, 0.0), gaussian(100)]) is None


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "gelu", "elu", "leaky_relu"])
@pytest.mark.parametrize("q", [1e-8, 1000.0])
def test_every_variance_is_followed_to_the_end(name, q):
    """Of variances that make the slopes nearly all the same, or as different as can be."""
    found = spectrum(layers(100, ACTIVATIONS[name], [q] * 20, orthogonal(100)))
    assert found.shares[-1] == 1
    assert (found.logarithms.diff() >= 0).all()


def test_few_variances_stand_for_those_of_many_layers(monkeypatch):
    """Interpolated, the spectrum is that of all of them, each solved for itself."""
    factors = layers(100, TANH, [1 / (layer + 1) for layer in range(7)], orthogonal(100))
    found = spectrum(factors)
    monkeypatch.setattr(isometry, "CHEBYSHEV", 7)
    exact = spectrum(factors)
    assert (found.share_below(exact.logarithms) - exact.shares).abs().max() < 2e-3

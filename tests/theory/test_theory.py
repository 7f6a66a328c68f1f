"""Mean-field theory: published and exact values, and scipy's quadrature."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

import initflow
from initflow.initializers.activations import ACTIVATIONS
from initflow.theory import infinite_width, integrals

TANH, RELU = ACTIVATIONS["tanh"], ACTIVATIONS["relu"]
every_activation = pytest.mark.parametrize("name", ACTIVATIONS)


def double(value):
    return torch.tensor(value, dtype=torch.float64)


def gaussian_mean(function, q):
    """E[f(√q z)] by scipy's adaptive quadrature, in pieces."""
    std = math.sqrt(q)

    def integrand(z):
        density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        return float(function(double(std * z))) * density

    inner = [edge / std for edge in (0.1, 1, 5, 30) if edge / std < 12]
    edges = [-12, *(-edge for edge in reversed(inner)), 0, *inner, 12]
    pieces = itertools.pairwise(edges)
    return sum(integrate.quad(integrand, a, b, epsrel=1e-11, limit=200)[0] for a, b in pieces)


def pair_mean(function, q, c):
    """E[f(u₁) f(u₂)] by scipy, u₂ = c·u₁ + √(1 − c²)·w, split where either is 0."""
    std, rest = math.sqrt(q), math.sqrt(1 - c * c)

    def value(x):
        return float(function(double(std * x)))

    def inner(z):
        def integrand(w):
            return value(c * z + rest * w) * math.exp(-w * w / 2) / math.sqrt(2 * math.pi)

        kink = max(-9.0, min(9.0, -c * z / rest))
        halves = ((-9.0, kink), (kink, 9.0))
        return sum(integrate.quad(integrand, a, b, epsabs=1e-9, limit=100)[0] for a, b in halves)

    def outer(z):
        return value(z) * inner(z) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    return sum(integrate.quad(outer, a, b, epsabs=1e-8)[0] for a, b in ((-9, 0), (0, 9)))


@every_activation
@pytest.mark.parametrize("q", [1e-4, 0.3, 2.0, 80.0])
def test_moments_are_scipys(name, q):
    """E[φ²] and E[φ′²], closed form or quadrature, to 1e-6 and better."""
    phi = ACTIVATIONS[name]
    second = integrals.second_moment(phi, double(q)).item()
    slope = integrals.slope_moment(phi, double(q)).item()
    assert second == pytest.approx(gaussian_mean(lambda x: phi.function(x) ** 2, q), rel=1e-8)
    assert slope == pytest.approx(gaussian_mean(lambda x: phi.derivative(x) ** 2, q), rel=1e-8)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "linear", "gelu"])
@pytest.mark.parametrize("q", [1e-6, 1.0, 1e4, 1e8])
def test_closed_forms_are_the_quadratures(name, q):
    """The two ways agree, so that either can be trusted."""
    phi = ACTIVATIONS[name]
    at, c = double(q), double(0.7)
    by_quadrature = {
        integrals.second_moment: integrals.expectation(lambda x: phi.function(x).square(), at),
        integrals.slope_moment: integrals.expectation(lambda x: phi.derivative(x).square(), at),
    }
    for closed, expected in by_quadrature.items():
        assert closed(phi, at).item() == pytest.approx(expected.item(), rel=1e-6)
    product = integrals.product_moment(phi, at, c).item()
    assert product == pytest.approx(
        integrals.pair_expectation(phi.function, at, c).item(), rel=1e-6
    )
    slopes = integrals.slope_product_moment(phi, at, c).item()
    assert slopes == pytest.approx(
        integrals.pair_expectation(phi.derivative, at, c).item(), rel=1e-5
    )


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu", "selu", "gelu"])
@pytest.mark.parametrize(("q", "c"), [(0.5, 0.0), (1.0, 0.6), (3.0, -0.4), (1.0, 0.99)])
def test_products_are_scipys(name, q, c):
    """Two correlated inputs, by nested adaptive quadrature."""
    phi = ACTIVATIONS[name]
    expected = pair_mean(phi.function, q, c)
    assert integrals.product_moment(phi, double(q), double(c)).item() == pytest.approx(
        expected, abs=1e-6
    )


@every_activation
def test_an_input_is_fully_correlated_with_itself(name):
    """E[φ(u) φ(u)] = E[φ²], and two independent ones give E[φ]²."""
    phi = ACTIVATIONS[name]
    for q in (0.01, 1.0, 100.0):
        at = double(q)
        same = integrals.product_moment(phi, at, double(1.0)).item()
        assert same == pytest.approx(integrals.second_moment(phi, at).item(), rel=1e-6)
        apart = integrals.product_moment(phi, at, double(0.0)).item()
        mean = integrals.expectation(phi.function, at).item()
        assert apart == pytest.approx(mean**2, rel=1e-5, abs=1e-9)


@given(st.floats(1e-6, 1e6), st.floats(0.01, 10), st.floats(0, 1))
def test_relus_map_is_exact(q, sigma_w2, sigma_b2):
    """q′ = σ_w² q/2 + σ_b², and χ₁ = σ_w²/2."""
    moved = infinite_width.variance_map(RELU, double(q), sigma_w2, sigma_b2).item()
    assert moved == pytest.approx(sigma_w2 * q / 2 + sigma_b2, rel=1e-12)
    assert infinite_width.mean_field(RELU, sigma_w2, 0.0).chi_1 == sigma_w2 / 2


@pytest.mark.parametrize(
    ("sigma_w2", "sigma_b2", "q_star", "chi_1"),
    [
        (1.05, 2.01e-5, 0.02592, 1),
        (1.760955, 0.05, 0.570048, 1),
        (2.153303, 0.150965, 1, 1),
        (1.69, 0.09, 0.60705, 0.93981),
        (6.25, 0.09, 4.0791, 1.58522),
        (2, 0, 0.61796, 1.10553),
        (25 / 9, 0, 1.17848, 1.20983),
        (1 / 3, 0, 0, 1 / 3),
        # The reference prints 0.82096 beside σ_b = 0.322, where scipy and this find 0.82118.
        (2, 0.322**2, 0.82118, 1),
    ],
)
def test_tanhs_fixed_points(sigma_w2, sigma_b2, q_star, chi_1):
    """q* and χ₁ on the critical line and off it."""
    field = infinite_width.mean_field(TANH, sigma_w2, sigma_b2)
    assert field.q_star == pytest.approx(q_star, rel=5e-5, abs=1e-9)
    assert field.chi_1 == pytest.approx(chi_1, rel=1e-4)
    if q_star:
        expected = sigma_w2 * gaussian_mean(lambda x: x.tanh() ** 2, q_star) + sigma_b2
        assert expected == pytest.approx(q_star, rel=2e-5)


def test_depth_scales_are_those_of_the_orbits():
    """The maps, iterated, come nearer to their fixed points by e^(−1/ξ) a layer."""
    for sigma_w2, sigma_b2 in ((1.69, 0.09), (6.25, 0.09), (2.0, 0.0)):
        field = infinite_width.mean_field(TANH, sigma_w2, sigma_b2)
        q, c = double(field.q_star + 1e-4), double(field.c_star - 1e-3)
        apart_q, apart_c = [], []
        for _ in range(12):
            q = infinite_width.variance_map(TANH, q, sigma_w2, sigma_b2)
            c = infinite_width.correlation_map(TANH, c, field.q_star, sigma_w2, sigma_b2)
            apart_q.append(abs(q.item() - field.q_star))
            apart_c.append(abs(c.item() - field.c_star))
        assert apart_q[3] / apart_q[2] == pytest.approx(math.exp(-1 / field.xi_q), rel=1e-2)
        assert apart_c[11] / apart_c[10] == pytest.approx(math.exp(-1 / field.xi_c), rel=1e-2)
    ordered = infinite_width.mean_field(TANH, 1.69, 0.09)
    assert ordered.c_star == 1
    assert ordered.xi_c == pytest.approx(-1 / math.log(ordered.chi_1), rel=1e-5)


@pytest.mark.parametrize("name", ["relu", "tanh", "linear"])
@pytest.mark.parametrize("sigma_w2", [0.5, 1.0, 3.0])
def test_depth_scales_where_the_variance_vanishes_or_explodes(name, sigma_w2):
    """The correlation, which is relative, is not drawn together any faster for it."""
    field = infinite_width.mean_field(ACTIVATIONS[name], sigma_w2, 0.0)
    if 0 < field.q_star < math.inf:
        return
    assert field.c_star in (0.0, 1.0)
    assert field.xi_c == math.inf
    c = double(0.9)
    for _ in range(60):
        q = 1e-12 if field.q_star == 0 else 1e12
        c = infinite_width.correlation_map(ACTIVATIONS[name], c, q, sigma_w2, 0.0)
    moved = infinite_width.correlation_map(ACTIVATIONS[name], c, q, sigma_w2, 0.0)
    assert (1 - moved) / (1 - c) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("sigma_w2", "sigma_b2", "q_star"), [(1e14, 0.0, 1e14), (0.5, 1e-10, 2e-10)]
)
def test_fixed_points_far_out_are_found(sigma_w2, sigma_b2, q_star):
    """Bounded activations have one, however large or small."""
    assert infinite_width.fixed_point(TANH, sigma_w2, sigma_b2) == pytest.approx(q_star, rel=1e-5)


def test_lecun_with_tanh_decays_as_one_over_twice_the_depth():
    """From q = 1."""
    q = double(1.0)
    orbit = [q := infinite_width.variance_map(TANH, q, 1.0, 0.0) for _ in range(100)]
    assert orbit[9].item() == pytest.approx(0.05220, abs=1e-5)
    assert orbit[99].item() == pytest.approx(0.005069, abs=1e-6)
    assert infinite_width.mean_field(TANH, 1.0, 0.0).xi_c == math.inf


def test_relus_correlation_map():
    """c₁ = 1/π, c₁₀ and c₅₀ under He, and the closed form of the map."""
    c = double(0.0)
    orbit = [c := infinite_width.correlation_map(RELU, c, 1.0, 2.0, 0.0) for _ in range(50)]
    assert orbit[0].item() == pytest.approx(1 / math.pi, rel=1e-12)
    assert orbit[9].item() == pytest.approx(0.871536, abs=1e-6)
    assert orbit[49].item() == pytest.approx(0.987862, abs=1e-6)
    c = 0.3
    closed = (math.sqrt(1 - c * c) + c * (math.pi - math.acos(c))) / math.pi
    moved = infinite_width.correlation_map(RELU, double(c), 7.0, 2.0, 0.0).item()
    assert moved == pytest.approx(closed, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "sigma_w2", "q_star"),
    [
        ("relu", 2.0, 1.0),  # every variance stays: what it starts from
        ("relu", 1.0, 0.0),
        ("relu", 3.0, math.inf),
        ("linear", 1.0, 1.0),
        ("selu", 1.0, 1.0),  # Klambauer et al. 2017
    ],
)
def test_where_the_variance_leads(name, sigma_w2, q_star):
    """To 0, to infinity, or to what is left as it is."""
    assert infinite_width.fixed_point(ACTIVATIONS[name], sigma_w2, 0.0) == pytest.approx(
        q_star, rel=1e-6
    )


def test_selus_and_tanhs_second_moments():
    """E[selu(z)²] = 1, and tanh's gain of 1.592537."""
    one = double(1.0)
    assert integrals.second_moment(ACTIVATIONS["selu"], one).item() == pytest.approx(1, abs=1e-6)
    gain = 1 / math.sqrt(integrals.second_moment(TANH, one).item())
    assert gain == pytest.approx(1.592537, abs=1e-6)


@every_activation
@pytest.mark.parametrize("sigma_w2", [0.0, 1e-3, 1.0, 2.0, 100.0, 1e4])
@pytest.mark.parametrize("sigma_b2", [0.0, 0.01])
def test_every_corner_has_numbers(name, sigma_w2, sigma_b2):
    """No NaN, whatever the weights."""
    field = infinite_width.mean_field(ACTIVATIONS[name], sigma_w2, sigma_b2)
    for value in (field.q_star, field.chi_1, field.c_star, field.xi_q, field.xi_c):
        assert value >= 0


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        *(
            (name, (torch.tanh, *[double(1.0)] * more), "activation must be an Activation, .*tanh")
            for name, more in {
                "mean_fields": 2,
                "fixed_points": 2,
                "critical_line": 1,
                "variance_map": 3,
                "second_moment": 1,
                "slope_moment": 1,
                "product_moment": 2,
                "slope_product_moment": 2,
            }.items()
        ),
        ("mean_field", ("tanh", 1.0, 0.0), "activation must be an Activation, .*not 'tanh'$"),
        ("mean_field", (TANH, -1.5, 0.0), "sigma_w2 must be finite and at least 0, not -1.5$"),
        ("mean_field", (TANH, 1.5, math.nan), "sigma_b2 must be finite and at least 0, not nan$"),
        ("mean_field", (TANH, "1.5", 0.0), "sigma_w2 must be a number, not '1.5'$"),
        ("mean_fields", (TANH, 1.5, double(0.0)), "sigma_w2 must be a tensor of variances, not "),
        ("mean_fields", (TANH, double([1, 2]), double([1, 2, 3])), r"shapes .* sigma_b2 \(3,\)$"),
        ("critical_line", (TANH, 0.05), "sigma_b2 must be a tensor of variances, not 0.05$"),
        ("critical_line", (TANH, double(-0.05)), "sigma_b2 must be finite and at least 0, not -0"),
        ("fixed_point", (TANH, 1.5, 0.05, 0.0), "start must be a number above 0, .* not 0.0$"),
        ("correlation_map", (TANH, double(0.5), -1.0, 1.0, 0.0), "q must be a number above 0, "),
        ("correlation_map", (TANH, 0.5, 1.0, 1.0, 0.0), "c must be a tensor of double precision"),
        ("second_moment", (TANH, 1.0), "q must be a tensor of double precision .* not 1.0$"),
        ("expectation", (torch.abs, torch.ones(1)), "q must be a tensor .* not torch.float32$"),
        ("pair_expectation", (torch.abs, double(1.0), 0.5), "c must be a tensor of double "),
    ],
)
def test_what_it_cannot_be_of_is_told(name, given, said):
    """In one line that names it, and without working on for ever."""
    with pytest.raises(initflow.SettingError, match=f"^{said}") as caught:
        getattr(initflow.theory, name)(*given)
    assert "\n" not in str(caught.value)

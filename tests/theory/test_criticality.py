"""The plane of σ_w² and σ_b²: fixed points, critical lines and depth scales of many networks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from initflow.initializers.activations import ACTIVATIONS, Activation
from initflow.theory import criticality, infinite_width
from initflow.theory.correlations import Correlations
from initflow.theory.integrals import difference_moment, product_moment, second_moment
from initflow.theory.roots import root

ERF = Activation.of(torch.erf)
BY_NAME = {**ACTIVATIONS, "erf": ERF}


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def iterated(activation, sigma_w2, sigma_b2, layers=20_000):
    """The variance and the correlation that many layers lead to, from 1 and from 0.5."""
    q, c = double(1.0), double(0.5)
    for _ in range(layers):
        moved = infinite_width.variance_map(activation, q, sigma_w2, sigma_b2)
        if abs(moved.item() - q.item()) < 1e-15:
            break
        q = moved
    for _ in range(400):
        c = infinite_width.correlation_map(activation, c, q.item(), sigma_w2, sigma_b2)
    return q.item(), c.item()


@pytest.mark.parametrize(
    ("name", "sigma_w2", "sigma_b2"),
    [
        ("tanh", 4.0, 0.1),
        ("tanh", 0.8, 0.3),
        ("sigmoid", 120.0, 0.1),
        ("elu", 1.8, 0.0),
    ],
)
def test_a_plane_is_what_the_maps_lead_to(name, sigma_w2, sigma_b2):
    """Iterated slowly; every cell of a plane is what it is alone."""
    w, b = double(sigma_w2, 0.9 * sigma_w2)[:, None], double(sigma_b2, 0.0)
    plane = infinite_width.mean_fields(BY_NAME[name], w, b)
    q, c = iterated(BY_NAME[name], sigma_w2, sigma_b2)
    assert plane.q_star[0, 0].item() == pytest.approx(q, rel=1e-9)
    assert plane.c_star[0, 0].item() == pytest.approx(c, abs=1e-4)
    for i, one in enumerate(w.flatten().tolist()):
        for j, other in enumerate(b.tolist()):
            alone = vars(infinite_width.mean_field(BY_NAME[name], one, other))
            cell = {key: of[i, j].item() for key, of in vars(plane).items()}
            assert cell == pytest.approx(alone, rel=1e-9, abs=1e-9)


def test_a_whole_plane_is_interpolated():
    """And every cell of it is what it is alone, where nothing is interpolated by variance."""
    w, b = torch.linspace(0.2, 4, 40).double()[:, None], torch.linspace(0, 0.5, 20).double()
    plane = infinite_width.mean_fields(ACTIVATIONS["tanh"], w, b)
    for i, j in ((39, 19), (39, 0), (20, 3), (13, 1), (9, 0), (2, 7)):
        alone = infinite_width.mean_field(ACTIVATIONS["tanh"], w[i].item(), b[j].item())
        assert plane.c_star[i, j].item() == pytest.approx(alone.c_star, abs=1e-9)
        assert plane.xi_c[i, j].item() == pytest.approx(alone.xi_c, rel=1e-6)


@pytest.mark.parametrize(("sigma_w2", "sigma_b2"), [(0.5, 0.1), (1.5, 0.0), (3.0, 0.4)])
def test_erf_has_closed_forms(sigma_w2, sigma_b2):
    """E[erf²] = 2/π · asin(2q/(1 + 2q)), and E[erf′²] = 4/π/√(1 + 4q)."""
    field = infinite_width.mean_field(ERF, sigma_w2, sigma_b2)
    q = field.q_star
    share = 2 * q / (1 + 2 * q)
    assert q == pytest.approx(sigma_w2 * 2 / math.pi * math.asin(share) + sigma_b2, rel=1e-9)
    assert field.chi_1 == pytest.approx(sigma_w2 * 4 / math.pi / math.sqrt(1 + 4 * q), rel=1e-9)
    slope = sigma_w2 * 4 / math.pi / math.sqrt((1 + 2 * q) ** 2 - (2 * q * field.c_star) ** 2)
    assert field.xi_c == pytest.approx(1 / abs(math.log(slope)), rel=1e-6)
    moved = sigma_w2 * 2 / math.pi * math.asin(share * field.c_star) + sigma_b2
    assert field.c_star * q == pytest.approx(moved, rel=1e-6, abs=1e-9)


def test_tanhs_line_is_the_published_one():
    """Of the reference, and from (1, 0), where Poole et al. and Schoenholz et al. have it begin."""
    b = double(0.0, 2.01e-5, 0.05, 0.150965)
    line = criticality.critical_line(ACTIVATIONS["tanh"], b)
    assert line.tolist() == pytest.approx([1.0, 1.05, 1.760955, 2.153303], rel=1e-5)
    q = infinite_width.fixed_points(ACTIVATIONS["tanh"], line, b)
    assert q.tolist() == pytest.approx([0.0, 0.02592, 0.570048, 1.0], rel=2e-4, abs=1e-9)


@pytest.mark.parametrize("q", [0.1, 1.0, 10.0])
def test_erfs_line_in_closed_form(q):
    """By its variance: σ_w² = π√(1 + 4q)/4, σ_b² = q − σ_w² · 2/π · asin(2q/(1 + 2q))."""
    sigma_w2 = math.pi * math.sqrt(1 + 4 * q) / 4
    sigma_b2 = q - sigma_w2 * 2 / math.pi * math.asin(2 * q / (1 + 2 * q))
    assert criticality.critical_line(ERF, double(sigma_b2)).item() == pytest.approx(sigma_w2)


@pytest.mark.parametrize(
    ("name", "start", "further"),
    [
        ("tanh", 1.0, None),
        ("erf", math.pi / 4, None),
        ("relu", 2.0, 2.0),
        ("leaky_relu", 2 / (1 + 1e-4), 2 / (1 + 1e-4)),
        ("linear", 1.0, 1.0),
        ("elu", 1.0, None),
        ("softplus", 2.0, 2.0),
        ("sigmoid", 103.008, None),
        ("gelu", math.nan, None),
        ("silu", math.nan, None),
    ],
)
def test_where_the_line_begins(name, start, further):
    """Without biases; where the line is of one σ_w² alone, also with them."""
    found = criticality.critical_line(BY_NAME[name], double(0.0, 0.7)).tolist()
    assert found[0] == pytest.approx(start, rel=1e-5, nan_ok=True)
    if further:
        assert found[1] == pytest.approx(further, rel=1e-5)


def test_gelus_line_begins_where_its_variance_is_held():
    """At small biases the variance jumps from small to infinite, and χ₁ with it across 1."""
    gelu, b = ACTIVATIONS["gelu"], double(0.1, 0.3)
    none, w = criticality.critical_line(gelu, b).tolist()
    assert math.isnan(none)
    assert infinite_width.mean_field(gelu, w, 0.3).chi_1 == pytest.approx(1, abs=1e-9)
    steps = torch.linspace(1.5, 2.5, 201).double()
    fields = infinite_width.mean_fields(gelu, steps, b[:1])
    assert (fields.chi_1[fields.q_star.isfinite()] < 0.95).all()
    assert (fields.chi_1[fields.q_star.isinf()] > 1).all()


@settings(max_examples=10)
@given(st.sampled_from(["tanh", "erf"]), st.floats(1e-6, 3), st.floats(0.02, 0.5))
def test_the_line_parts_order_from_chaos(name, sigma_b2, apart):
    """On it χ₁ is 1; left of it two inputs become one, right of it they do not."""
    activation, b = BY_NAME[name], double(sigma_b2)
    line = criticality.critical_line(activation, b)
    on, left, right = (
        infinite_width.mean_field(activation, w.item(), sigma_b2)
        for w in (line, line * (1 - apart), line * (1 + apart))
    )
    assert on.chi_1 == pytest.approx(1, abs=1e-8)
    moved = infinite_width.variance_map(activation, double(on.q_star), line, b).item()
    assert moved == pytest.approx(on.q_star, rel=1e-10)
    assert left.chi_1 < 1 < right.chi_1
    assert left.c_star == 1 > right.c_star >= 0


def test_a_wide_network_has_this_variance_and_gradient():
    """Drawn, not predicted: 2,000 units, 30 layers, tanh right of the line."""
    sigma_w2, sigma_b2, width = 2.5, 0.05, 2_000
    field = infinite_width.mean_field(ACTIVATIONS["tanh"], sigma_w2, sigma_b2)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(width, 2, generator=generator)
    gradient = torch.randn(width, generator=generator)
    growth, correlation = [], []
    for _ in range(30):
        weight = torch.randn(width, width, generator=generator) * (sigma_w2 / width) ** 0.5
        bias = torch.randn(width, 1, generator=generator) * sigma_b2**0.5
        slope = 1 - h[:, 0].tanh().square()
        # Backwards through the same kind of layer: the mean square gains σ_w² E[φ′²].
        passed = (weight.T @ gradient) * slope
        growth.append((passed.square().mean() / gradient.square().mean()).item())
        gradient = torch.randn(width, generator=generator)
        h = weight @ h.tanh() + bias
        correlation.append((h[:, 0] @ h[:, 1] / h[:, 0].norm() / h[:, 1].norm()).item())
    assert h[:, 0].var().item() == pytest.approx(field.q_star, rel=0.1)
    assert sum(growth[10:]) / 20 == pytest.approx(field.chi_1, rel=0.03)
    assert sum(correlation[20:]) / 10 == pytest.approx(field.c_star, abs=0.05)


@pytest.mark.parametrize("name", ["tanh", "relu", "leaky_relu", "gelu", "erf"])
@pytest.mark.parametrize("q", [0.01, 3.0])
def test_differences_are_those_of_products(name, q):
    """E[(φ(u₁) − φ(u₂))²]/2 = E[φ²] − E[φ(u₁) φ(u₂)]."""
    activation, angle = BY_NAME[name], double(0.3, 1.5)
    found = difference_moment(activation, double(q), angle)
    moment = second_moment(activation, double(q))
    expected = moment - product_moment(activation, double(q), angle.cos())
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-9)


def test_slopes_are_those_of_the_closed_form():
    """Of ReLU: E[φ′φ′] = (π − α)/(2π); the interpolation knows nothing of it."""
    q, angle = double(0.5, 2.0), double(0.4, 1.2)
    slope = Correlations.of(ACTIVATIONS["relu"], q).slope(angle.sqrt())
    assert slope.tolist() == pytest.approx(((math.pi - angle) / (2 * math.pi)).tolist(), rel=1e-7)


def test_roots_are_found_together():
    """Steep, flat, at an end, and where there is none."""
    power = double(1, 3, 9, 1, 1)
    target = double(0.5, 1e-6, 0.3, 0.0, 5.0)
    found = root(lambda x: x**power - target, double(0, 0, 0, 0, 0), double(1, 1, 1, 1, 1))
    expected = [0.5, 1e-2, 0.3 ** (1 / 9), 0.0, 1.0]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)

"""The edge of chaos: published and exact values, scipy's quadrature, and a deep network."""

import itertools
import math
from statistics import geometric_mean

import pytest
import torch
from scipy import integrate

from initflow.core.configurations import TrainConfig
from initflow.diagnostics import measure
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.initializers.scheme import Place, Scheme
from initflow.testing import assert_initializer_contract
from initflow.training import datasets, model
from initflow_critical import critical, edge

SCHEME = Scheme.of(critical, "critical", "a test")


def gaussian_mean(function, q):
    """E[f(√q z)²] by scipy's adaptive quadrature, in pieces."""

    def integrand(z):
        value = function(torch.tensor(math.sqrt(q) * z, dtype=torch.float64)).item()
        return value**2 * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    pieces = itertools.pairwise((-12, -3, -0.5, 0, 0.5, 3, 12))
    return sum(integrate.quad(integrand, a, b, epsabs=1e-12)[0] for a, b in pieces)


def test_it_keeps_the_contract():
    """Also where the biases' variance is 0, and where a large q lets sigmoid take part."""
    assert_initializer_contract(critical)


@pytest.mark.parametrize(
    ("q", "sigma_w2", "sigma_b2"),
    [
        (0.02592, 1.05, 2.01e-5),
        (0.570048, 1.760955, 0.05),
        (0.82096, 2.0, 0.322**2),
        (1.0, 2.153303, 0.150965),
    ],
)
def test_the_published_points_of_tanhs_critical_line(q, sigma_w2, sigma_b2):
    """As Schoenholz et al. and others give them, in the digits they give."""
    assert edge(ACTIVATIONS["tanh"], q) == pytest.approx((sigma_w2, sigma_b2), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "q", "sigma_w2", "sigma_b2"),
    [("silu", 14.32017, 1.98800, 0.55514), ("gelu", 3.56155, 1.98305, 0.17292)],
)
def test_the_half_stable_points_of_silu_and_gelu(name, q, sigma_w2, sigma_b2):
    """Where the variance's own slope is 1 as well: Roberts, Yaida and Hanin 2022, section 5.3.4."""
    assert edge(ACTIVATIONS[name], q) == pytest.approx((sigma_w2, sigma_b2), rel=2e-5)


@pytest.mark.parametrize("name", ["tanh", "elu", "selu", "gelu", "silu"])
@pytest.mark.parametrize("q", [0.02, 0.15, 3.0])
def test_the_conditions_hold_by_scipys_quadrature(name, q):
    """χ₁ = 1, and the variance's map leaves q where it is."""
    phi = ACTIVATIONS[name]
    sigma_w2, sigma_b2 = edge(phi, q)
    assert sigma_w2 * gaussian_mean(phi.derivative, q) == pytest.approx(1, rel=1e-8)
    moved = sigma_w2 * gaussian_mean(phi.function, q) + sigma_b2
    assert moved == pytest.approx(q, rel=1e-8)


@pytest.mark.parametrize("q", [1e-6, 0.15, 1.0, 1e6])
@pytest.mark.parametrize(
    ("name", "sigma_w2"), [("relu", 2), ("leaky_relu", 2 / (1 + 0.01**2)), ("linear", 1)]
)
def test_rectifiers_get_hes_scheme_with_biases_0(name, sigma_w2, q):
    """Exactly 0, at every q: rounding leaves nothing, of either sign."""
    assert edge(ACTIVATIONS[name], q) == (pytest.approx(sigma_w2), 0.0)


def test_it_says_for_which_q_an_activation_has_a_critical_point():
    """And what it says is true: sigmoid has one there, and none just below."""
    sigmoid = ACTIVATIONS["sigmoid"]
    with pytest.raises(
        ValueError, match=r"no critical point at q = 0.15, .* it has one from 46 on"
    ):
        edge(sigmoid, 0.15)
    assert edge(sigmoid, 46.0)[1] >= 0
    with pytest.raises(ValueError, match="it has one from 46 on"):
        edge(sigmoid, 45.0)


@pytest.mark.parametrize("q", [1e-3, 0.15, 1e4])
def test_it_says_that_softplus_has_none(q):
    """Its mean is too large at every q."""
    with pytest.raises(ValueError, match="it has none at any q"):
        edge(ACTIVATIONS["softplus"], q)


@pytest.mark.parametrize("q", [0.0, -1.0, math.inf, math.nan])
def test_q_is_a_variance(q):
    """Above 0 and finite."""
    with pytest.raises(ValueError, match="q must be a finite number above 0"):
        edge(ACTIVATIONS["tanh"], q)


@pytest.mark.parametrize("shape", [(300, 400), (40, 10, 5, 5)], ids=str)
def test_weights_and_biases_have_the_stated_variances(shape):
    """Those of the critical line at q = 1, also of a convolution's kernel."""
    fan_in, fan_out = math.prod(shape[1:]), shape[0] * math.prod(shape[2:])
    at = Place(fan_in, fan_out, ACTIVATIONS["tanh"])
    scheme = SCHEME.bind({"q": "1"})
    generator = torch.Generator().manual_seed(0)
    weight, many = torch.empty(shape, dtype=torch.float64), torch.empty(20_000)
    scheme.fill_layer(weight, many, at, generator)
    assert scheme.variance(at) == pytest.approx(2.153303 / fan_in, rel=1e-6)
    assert scheme.bias_variance(at) == pytest.approx(0.150965, rel=1e-5)
    assert weight.var().item() == pytest.approx(scheme.variance(at), rel=0.05)
    assert many.square().mean().item() == pytest.approx(scheme.bias_variance(at), rel=0.05)


def test_the_signal_survives_a_hundred_tanh_layers_where_xaviers_fades():
    """As the README has it: what tells digits apart, and the gradient, in the mean of 3 seeds."""
    tanh = ACTIVATIONS["tanh"]
    splits = datasets.load(TrainConfig(dataset="digits"))
    probe = measure.probe(splits.train, 200)
    widths = (splits.pixels, *[100] * 100, splits.classes)
    signal, gradient = {}, {}
    for scheme in (find("xavier"), SCHEME):
        signals = []
        for seed in range(3):
            start = model.initialize(widths, scheme, tanh, bias_init="zeros", seed=seed)
            (seen,) = measure.observe(start, [tanh], probe)
            signals.append(seen.signals.layers)
        signal[scheme.name] = geometric_mean(at["fc100"]["signal_variance"] for at in signals)
        gradient[scheme.name] = geometric_mean(
            at["fc1"]["gradient_second_moment"] / at["fc100"]["gradient_second_moment"]
            for at in signals
        )
    assert signal["critical"] > 5 * signal["xavier"]
    assert gradient["xavier"] < 0.1
    assert 0.2 < gradient["critical"] < 5


def test_the_theorys_numbers_are_computed_once():
    """Not anew for each of a hundred layers."""
    edge.cache_clear()
    for _ in range(100):
        SCHEME.variance(Place(100, 100, ACTIVATIONS["tanh"]))
    assert edge.cache_info().misses == 1

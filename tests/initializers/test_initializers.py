"""One table of all schemes drives the contract that each of them keeps."""

import math

import pytest
import torch
from scipy import stats

from initflow.initializers.built_in import BUILT_IN, TRUNCATED_STD, draw
from initflow.initializers.plugins import find
from initflow.initializers.scheme import Place, fans

NAMES = [
    *("zero", "constant", "normal", "random", "uniform", "truncated_normal"),
    *("lecun", "lecun_uniform", "xavier", "xavier_uniform", "he", "he_uniform", "pytorch"),
    *("orthogonal", "sparse", "identity", "mean_field"),
]
DRAWN = [name for name in NAMES if name not in ("zero", "constant", "identity")]
SPECS = [
    *NAMES,
    "constant:value=-2",
    "normal:std=0.05",
    "random:std=0.1",
    "uniform:bound=0.3",
    "truncated_normal:std=0.02",
    "xavier:gain=1.6667",
    "xavier_uniform:gain=0.5",
    "he:mode=fan_out",
    "he:mode=fan_avg,negative_slope=0.2",
    "he_uniform:mode=fan_out",
    "orthogonal:gain=2",
    "sparse:nonzero=40,std=0.1",
    "sparse:nonzero=999",
    "identity:gain=0.5",
    "mean_field:sigma_w2=1.76,sigma_b2=0.05",
]
SHAPES = [(256, 784), (784, 256), (10, 10), (1, 1), (5, 1), (1, 5)]
every_spec = pytest.mark.parametrize("spec", SPECS)


def fill(scheme, weight, generator):
    at = Place(*fans(weight.shape))
    scheme.fill_layer(weight, weight.new_zeros(len(weight)), at, generator)


def filled(spec, shape, seed=0, dtype=torch.float32):
    weight = torch.full(shape, math.nan, dtype=dtype)
    fill(find(spec), weight, torch.Generator().manual_seed(seed))
    return weight


def test_the_contracts_schemes_are_all_there():
    """Names and order."""
    assert list(BUILT_IN) == NAMES
    assert all(scheme.provider == "built-in" for scheme in BUILT_IN.values())


@every_spec
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fills_in_place_with_finite_values(spec, shape, dtype):
    """Every entry of the very tensor, whose shape and type stay."""
    weight = torch.full(shape, math.nan, dtype=dtype)
    address = weight.data_ptr()
    fill(find(spec), weight, torch.Generator().manual_seed(0))
    assert weight.data_ptr() == address
    assert (weight.shape, weight.dtype) == (shape, dtype)
    assert weight.isfinite().all()


@every_spec
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_stays_on_the_device_of_the_weight(spec, device):
    """Drawn there, from a generator there."""
    weight = torch.full((20, 30), math.nan, device=device)
    fill(find(spec), weight, torch.Generator(device).manual_seed(0))
    assert weight.device.type == device
    assert weight.isfinite().all()


@every_spec
def test_fills_a_layers_parameter_and_leaves_it_one(spec):
    """A weight of a module keeps requiring its gradient, and none is recorded."""
    weight = torch.nn.Linear(4, 3).weight
    fill(find(spec), weight, torch.Generator())
    assert weight.requires_grad
    assert weight.is_leaf


@every_spec
def test_draws_from_the_generator_alone(spec):
    """Same seed same weights; the global stream is neither read nor moved."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = filled(spec, (20, 30))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, filled(spec, (20, 30)))
    other_seed = filled(spec, (20, 30), seed=1)
    assert torch.equal(first, other_seed) == (spec.split(":")[0] not in DRAWN)


@every_spec
@pytest.mark.parametrize("shape", [(600, 800), (800, 600), (700, 700)], ids=str)
def test_sampled_variance_is_the_stated_one(spec, shape):
    """The variance of 420,000 or more entries is what the scheme says; so is their mean."""
    weight = filled(spec, shape, dtype=torch.float64)
    stated = find(spec).variance(Place(fan_in=shape[1], fan_out=shape[0]))
    n = weight.numel()
    assert weight.var(correction=0).item() == pytest.approx(stated, rel=0.02)
    if spec.split(":")[0] in DRAWN:
        assert abs(weight.mean().item()) < 5 * math.sqrt(stated / n)


DISTRIBUTIONS = {
    "normal": lambda std: stats.norm(scale=std),
    "uniform": lambda std: stats.uniform(loc=-math.sqrt(3) * std, scale=2 * math.sqrt(3) * std),
    "truncated_normal": lambda std: stats.truncnorm(-2, 2, scale=std / TRUNCATED_STD),
}
DISTRIBUTION_OF = {
    "normal": "normal",
    "random": "normal",
    "uniform": "uniform",
    "truncated_normal": "truncated_normal",
    "lecun": "normal",
    "lecun_uniform": "uniform",
    "xavier": "normal",
    "xavier_uniform": "uniform",
    "he": "normal",
    "he_uniform": "uniform",
    "pytorch": "uniform",
    "mean_field": "normal",
}


@pytest.mark.parametrize("name", DISTRIBUTION_OF)
def test_draws_are_of_the_documented_distribution(name):
    """Kolmogorov–Smirnov on 200,000 entries; its docstring says which it is."""
    weight = filled(name, (400, 500), dtype=torch.float64)
    std = math.sqrt(find(name).variance(Place(fan_in=500, fan_out=400)))
    kind = DISTRIBUTION_OF[name]
    p = stats.kstest(weight.flatten().numpy(), DISTRIBUTIONS[kind](std).cdf).pvalue
    assert p > 1e-3
    words = {"normal": "not truncated", "uniform": "U(", "truncated_normal": "truncated at ±2"}
    assert words[kind] in BUILT_IN[name].description


def test_mean_field_fills_the_biases_too():
    """N(0, σ_b²), as it states."""
    scheme = find("mean_field:sigma_w2=1.76,sigma_b2=0.05")
    weight, bias = torch.empty(20_000, 3), torch.empty(20_000)
    scheme.fill_layer(weight, bias, Place(3, 20_000), torch.Generator().manual_seed(0))
    assert scheme.bias_variance(Place(3, 20_000)) == 0.05
    assert stats.kstest(bias.numpy(), stats.norm(scale=math.sqrt(0.05)).cdf).pvalue > 1e-3


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_wrong_distribution_would_be_found(distribution):
    """The Kolmogorov–Smirnov test above can fail: the right variance is not enough."""
    weight = torch.empty(200_000, dtype=torch.float64)
    draw(weight, 1.0, distribution, torch.Generator().manual_seed(0))
    for other in DISTRIBUTIONS.keys() - {distribution}:
        assert stats.kstest(weight.numpy(), DISTRIBUTIONS[other](1.0).cdf).pvalue < 1e-6


@pytest.mark.parametrize(
    ("spec", "std"),
    [
        ("lecun", 0.0357143),
        ("he", 0.0505076),
        ("xavier", 0.0438529),
        ("pytorch", 0.0206197),
        ("lecun_uniform", 0.0357143),
        ("he_uniform", 0.0505076),
        ("xavier_uniform", 0.0438529),
        ("truncated_normal", 0.87962566103423978),
        ("normal", 1),
        ("random", 0.01),
        ("zero", 0),
    ],
)
def test_published_standard_deviations(spec, std):
    """At fan_in 784 and fan_out 256, from the papers' formulas, to all digits given."""
    assert math.sqrt(find(spec).variance(Place(784, 256))) == pytest.approx(std, abs=5e-8)


def test_truncation_constant_is_that_of_the_distribution():
    """Against scipy's truncated normal."""
    assert pytest.approx(stats.truncnorm.std(-2, 2), abs=1e-15) == TRUNCATED_STD


def test_truncated_normal_stays_within_two_standard_deviations():
    """Of the normal before it is cut."""
    assert filled("truncated_normal:std=0.5", (500, 500)).abs().max() <= 1.0


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)], ids=str)
def test_orthogonal_rows_or_columns_are_orthonormal(shape):
    """W Wᵀ or Wᵀ W is gain² times the identity."""
    weight = filled("orthogonal:gain=2", shape, dtype=torch.float64)
    gram = weight @ weight.T if shape[0] <= shape[1] else weight.T @ weight
    torch.testing.assert_close(gram, 4 * torch.eye(min(shape), dtype=torch.float64))


def test_orthogonal_draws_are_haar():
    """A 2×2 draw turns by a uniform angle; without the sign rule it would not."""
    angles = [
        math.atan2(w[1, 0], w[0, 0])
        for seed in range(400)
        for w in [filled("orthogonal", (2, 2), seed)]
    ]
    assert stats.kstest(angles, stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-3


def test_orthogonal_linear_network_is_an_isometry():
    """Every singular value of a product of L square ones is gain^L (Saxe et al. 2013)."""
    jacobian = torch.eye(50, dtype=torch.float64)
    for seed in range(10):
        jacobian = filled("orthogonal:gain=1.1", (50, 50), seed, torch.float64) @ jacobian
    values = torch.linalg.svdvals(jacobian)
    torch.testing.assert_close(values, torch.full_like(values, 1.1**10))


def test_sparse_units_have_exactly_that_many_inputs():
    """And each unit its own."""
    nonzero = filled("sparse:nonzero=7", (100, 60)) != 0
    assert nonzero.sum(dim=1).tolist() == [7] * 100
    assert len({tuple(row.tolist()) for row in nonzero}) > 95


def test_zero_constant_and_identity_are_what_they_say():
    """Schemes that draw nothing."""
    assert torch.equal(filled("zero", (3, 4)), torch.zeros(3, 4))
    assert torch.equal(filled("constant:value=0.5", (3, 4)), torch.full((3, 4), 0.5))
    assert torch.equal(filled("identity:gain=3", (3, 4)), 3 * torch.eye(3, 4))


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_state_variance_and_source(name):
    """Each says what its variance is; all but the plainest say from where it comes."""
    text = BUILT_IN[name].description
    assert "ariance" in text
    plain = ("zero", "constant", "normal", "uniform", "truncated_normal", "pytorch")
    assert name in plain or any(str(year) in text for year in range(1990, 2025))


@pytest.mark.parametrize("spec", ["he", "xavier_uniform", "sparse:nonzero=400", "truncated_normal"])
def test_convolution_shapes_count_the_kernel(spec):
    """A kernel's positions are inputs (He et al. 2015)."""
    weight = filled(spec, (64, 32, 5, 5), dtype=torch.float64)
    stated = find(spec).variance(Place(fan_in=32 * 25, fan_out=64 * 25))
    assert weight.var(correction=0).item() == pytest.approx(stated, rel=0.05)


def test_orthogonal_convolutions_have_orthonormal_kernels():
    """Each unit's kernel, flattened, is one of the orthonormal rows."""
    rows = filled("orthogonal", (64, 32, 5, 5), dtype=torch.float64).flatten(start_dim=1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(64, dtype=torch.float64))

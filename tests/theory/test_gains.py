"""Gains and moments of functions that nothing is known of, against scipy's quadrature."""

import itertools
import math
import re

import pytest
import torch
from scipy import integrate
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all PyTorch code calls it

import initflow
from initflow.errors import SettingError
from initflow.initializers.activations import ACTIVATIONS, Activation
from initflow.theory import infinite_width, integrals, pieces, prediction
from tests.conftest import ROOT

# Functions as PyTorch has them, the same in Python's own numbers, and where the latter has kinks.
ODD = {
    "hardtanh": (F.hardtanh, lambda x: min(1, max(-1, x)), (-1, 1)),
    "relu6": (nn.ReLU6(), lambda x: min(6, max(0, x)), (6,)),
    "softsign": (F.softsign, lambda x: x / (1 + abs(x)), ()),
    "x·relu(x)": (lambda x: x * torch.relu(x), lambda x: x * max(0, x), ()),
    "relu³": (lambda x: F.relu(x) ** 3, lambda x: max(0, x) ** 3, ()),
    "step": (lambda x: x > 0.3, lambda x: float(x > 0.3), (0.3,)),
    "sign": (torch.sign, lambda x: math.copysign(1, x), ()),
    "abs": (torch.abs, abs, ()),
    "sin": (torch.sin, math.sin, ()),
    "sin(20x)": (lambda x: torch.sin(20 * x), lambda x: math.sin(20 * x), ()),
    "round": (torch.round, round, tuple(n + 0.5 for n in range(-12, 12))),
    "hardshrink": (nn.Hardshrink(0.7), lambda x: x * (abs(x) > 0.7), (-0.7, 0.7)),
    "threshold": (nn.Threshold(0.123, -2), lambda x: x if x > 0.123 else -2.0, (0.123,)),
    "hardswish, in place": (
        nn.Hardswish(inplace=True),
        lambda x: x * min(6, max(0, x + 3)) / 6,
        (-3, 3),
    ),
    "steep": (
        lambda x: torch.tanh(500 * (x - 1)),
        lambda x: math.tanh(500 * (x - 1)),
        (0.9, 0.99, 1, 1.01, 1.1),
    ),
    "learned": (nn.PReLU(init=0.5), lambda x: x if x > 0 else x / 2, ()),
}
odd_functions = pytest.mark.parametrize("name", ODD)


def double(value):
    return torch.tensor(value, dtype=torch.float64)


def density(z):
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def mean_square(function, kinks, std):
    """E[f(std · z)²] by scipy, in pieces between the kinks and the whole numbers."""
    edges = sorted({*range(-12, 13), *(kink / std for kink in kinks if abs(kink / std) < 12)})
    return sum(
        integrate.quad(lambda z: function(std * z) ** 2 * density(z), a, b, epsrel=1e-12)[0]
        for a, b in itertools.pairwise(edges)
    )


@odd_functions
@pytest.mark.parametrize("q", [0.25, 1.0, 4.0])
def test_any_function_has_its_gain(name, q):
    """1/√(E[φ²]/q), kinks and steps anywhere, to 1e-9."""
    function, written_out, kinks = ODD[name]
    expected = math.sqrt(q / mean_square(written_out, kinks, math.sqrt(q)))
    assert initflow.theory.gain(function, q=q) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("q", [1e-3, 1.0, 1e4])
def test_a_built_in_function_has_the_same_gain_as_an_unknown_one(name, q):
    """By its name, as a value, and as a function of which nothing is known."""
    gain, phi = initflow.theory.gain, ACTIVATIONS[name]
    assert gain(name, q) == gain(phi, q) == pytest.approx(gain(phi.function, q), rel=1e-6)


def test_the_named_gains():
    """Those known by heart: √2 of relu, 1 of linear, and selu's, which is made for it."""
    gain = initflow.theory.gain
    assert gain("relu") == gain(torch.relu) == pytest.approx(math.sqrt(2), rel=1e-12)
    assert gain("linear") == 1
    assert gain("selu") == pytest.approx(1, rel=1e-12)
    assert gain(F.relu, 9) == pytest.approx(math.sqrt(2), rel=1e-12)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: torch.softmax(x, -1), "must be elementwise, without chance; <lambda> gives an"),
        (lambda x: x - x.mean(), "must be elementwise, without chance; <lambda> gives an"),
        (nn.Dropout(0.5), r"must be elementwise, without chance; Dropout\(p=0.5, inplace=False\)"),
        (lambda x: x[:2], r"must be elementwise; <lambda> gives shape \(2,\) for \(22,\)"),
        (lambda x: x.sum(), r"must be elementwise; <lambda> gives shape \(\) for \(22,\)"),
        (nn.Linear(3, 3), "must take a tensor in double precision; Linear.*RuntimeError: "),
        (F.glu, "must take a tensor in double precision; glu: RuntimeError: Halving dimension"),
        (lambda _: 3, "must give a tensor of real numbers; <lambda> gives int$"),
        (lambda x: x + 1j, "must give a tensor of real numbers; <lambda> gives torch.complex128$"),
        (torch.log, "must give finite numbers; log gives -inf at 0$"),
        (torch.sqrt, "must give finite numbers; sqrt gives nan at -0.01$"),
        (lambda x: 0 * x, "must not be 0 everywhere, as <lambda> is: no gain helps$"),
        (lambda x: (x * x).exp(), "must have a finite mean square at q = 1; <lambda> grows too"),
        ("rellu", r"must be one of sigmoid, .*, not 'rellu' \(did you mean 'relu'\?\)$"),
        (5, "must be a built-in one's name or a function of a tensor, not int$"),
    ],
)
def test_what_has_no_gain_is_told(function, said):
    """In one line that names it."""
    with pytest.raises(SettingError, match=f"^activation {said}") as caught:
        initflow.theory.gain(function)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("q", [0, -1, math.nan, math.inf, "1", True])
def test_a_variance_is_a_number_above_0(q):
    """And finite."""
    with pytest.raises(SettingError, match=r"^q must be a number above 0, the pre-activations'"):
        initflow.theory.gain("relu", q)


def test_the_random_state_is_left_alone():
    """Also by a function that draws."""
    before = torch.get_rng_state()
    with pytest.raises(SettingError):
        initflow.theory.gain(nn.Dropout(0.5))
    assert torch.equal(torch.get_rng_state(), before)


def test_kinks_are_found():
    """Wherever they are, and 0 besides."""
    for function, kinks in (
        (F.hardtanh, [-1, 0, 1]),
        (F.relu6, [0, 6]),
        (lambda x: x > 0.3, [0, 0.3]),
    ):
        found = pieces.pieces(Activation.of(function), 4).breaks
        assert found.tolist() == pytest.approx(kinks, abs=1e-12)


@pytest.mark.parametrize("name", ["hardtanh", "step", "hardshrink", "threshold", "softsign"])
def test_the_slopes_mean_square_is_a_difference_of_the_functions(name):
    """E[φ′²] of a piecewise linear function is a normal probability; of others, scipy's."""
    function, _, kinks = ODD[name]
    below = [0.5 * (1 + math.erf(kink / math.sqrt(2))) for kink in kinks]
    expected = {
        "hardtanh": lambda: below[1] - below[0],
        "step": lambda: 0.0,
        "hardshrink": lambda: 1 - (below[1] - below[0]),
        "threshold": lambda: 1 - below[0],
        "softsign": lambda: mean_square(lambda x: (1 + abs(x)) ** -2, (), 1.0),
    }[name]()
    slope = integrals.slope_moment(Activation.of(function), double(1.0)).item()
    assert slope == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("threshold", [0.0, 0.3, -1.5])
@pytest.mark.parametrize("c", [-1.0, -0.7, 0.0, 0.4, 0.99, 0.9999999, 1.0])
def test_a_step_of_two_correlated_numbers_is_an_orthant(threshold, c):
    """P(u₁ > t, u₂ > t), by Owen's integral over the correlation (Plackett 1954)."""
    phi = Activation.of(lambda x: x > threshold)
    alone = 0.5 * math.erfc(threshold / math.sqrt(2))

    def by_angle(angle):  # c = sin(angle)
        return math.exp(-(threshold**2) / (1 + math.sin(angle))) / (2 * math.pi)

    low = -math.pi / 2 + 1e-9
    expected = alone**2 + integrate.quad(by_angle, 0, max(low, math.asin(c)), epsabs=1e-12)[0]
    found = integrals.product_moment(phi, double(1.0), double(c)).item()
    assert found == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("name", ["tanh", "relu", "selu", "gelu"])
def test_products_of_an_unknown_function_are_the_built_in_ones(name):
    """Polar coordinates and closed forms against the pieces, at several variances at once."""
    phi = ACTIVATIONS[name]
    q, c = double([0.01, 1.0, 50.0]), double([0.9, -0.3, 0.999])
    for moment in (integrals.product_moment, integrals.slope_product_moment):
        found = moment(Activation.of(phi.function), q, c)
        torch.testing.assert_close(found, moment(phi, q, c), rtol=1e-5, atol=1e-9)


def test_predictions_take_any_function():
    """The mean field, and a network's bands, are those of the same function built in."""
    phi = Activation.of(ACTIVATIONS["tanh"].function)
    expected = infinite_width.mean_field(ACTIVATIONS["tanh"], 1.5, 0.05)
    assert vars(infinite_width.mean_field(phi, 1.5, 0.05)) == pytest.approx(vars(expected))
    layers = [prediction.LayerStatistics(20, 30, 0.05, 0.01)] * 2
    layers.append(prediction.LayerStatistics(30, 10, 0.05, 0.01))
    ends = prediction.Ends(50, double([1.0, 2.0]), 0.5, 1e-4, 0.3)
    found = prediction.predict(layers, phi, ends)
    for quantity, intervals in prediction.predict(layers, ACTIVATIONS["tanh"], ends).items():
        for ours, theirs in zip(found[quantity], intervals, strict=True):
            assert vars(ours) == pytest.approx(vars(theirs), rel=1e-6)


def test_a_name_alone_makes_no_built_in_function():
    """Closed forms are for what they are of."""
    phi = Activation.of(F.hardtanh, name="relu")
    assert integrals.second_moment(phi, double(1.0)).item() == pytest.approx(0.5160585510, rel=1e-9)


def test_the_examples_of_the_page_are_true(capsys):
    """They print what stands beside them, and weights of tanh's gain keep its signal."""
    page = (ROOT / "docs" / "theory.md").read_text()
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names := {})  # noqa: S102 - our own
        printed = capsys.readouterr().out.splitlines()
        for said, line in zip(re.findall(r"# ([\d.]+)\.\.\.", code), printed, strict=False):
            assert line.startswith(said)
    assert printed[-1].startswith("tensor(0.6827")
    assert "hardtanh" in names


def test_the_table_of_gains_is_true():
    """Every row of docs/theory.md: torch's gain, and the exact one."""
    page = (ROOT / "docs" / "theory.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| ([\d.]+) \| (.*) \|$", page, re.MULTILINE)
    assert {row[0] for row in rows} >= set(ACTIVATIONS)
    modules = {"hardtanh": F.hardtanh, "relu6": F.relu6, "softsign": F.softsign}
    modules |= {"mish": F.mish, "hardswish": F.hardswish}
    for name, theirs, exact, share in rows:
        gain = initflow.theory.gain(modules.get(name, name))
        assert exact == f"{gain:.4f}", name
        try:
            by_torch = nn.init.calculate_gain(name)
        except ValueError:
            assert (theirs, share) == ("none", ""), name
            continue
        assert theirs.rpartition("= ")[2] == f"{by_torch:.4f}", name
        # Of 0.5625, the last digit differs with the libraries.
        assert float(share.removeprefix("× ")) == pytest.approx((by_torch / gain) ** 2, abs=5.1e-4)

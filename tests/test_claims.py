"""The reference experiments' claims, held on scikit-learn's digits, and the page that shows them.

What ``docs/claims.py`` measures is asserted here, and held against plain PyTorch.
"""

import functools
import io
import itertools
import re

import pytest
import torch
from torch import nn

from docs import claims, model_claims, pixels
from initflow.core.configurations import TrainConfig
from initflow.diagnostics import measure, networks
from initflow.training import cache, datasets
from tests.commands import read
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "claims.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^\$ initflow (.*)$", PAGE, re.MULTILINE)
MODULES = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}
CLAIMS = {**claims.CLAIMS, **model_claims.CLAIMS}
every_claim = pytest.mark.parametrize("name", CLAIMS)
here = model_claims.here
INITS = "orthogonal,xavier,default"


@functools.cache
def digits(normalize="unit"):
    return datasets.load(TrainConfig(dataset="digits", normalize=normalize))


def by_autograd(config, images):
    """Each layer's pre-activations, with their gradients and the weights', by plain PyTorch."""
    probe = claims.measure.probe(images.train, config.probe)
    state = claims.network(config, images).state()
    x, layers = probe.images, []
    for name in dict.fromkeys(key.partition(".")[0] for key in state):
        if layers:
            x = MODULES[config.activation]()(x)
        linear = nn.Linear(x.shape[1], len(state[f"{name}.bias"]))
        linear.load_state_dict({part: state[f"{name}.{part}"] for part in ("weight", "bias")})
        x = linear(x)
        x.retain_grad()
        layers.append((x, linear.weight))
    nn.functional.cross_entropy(x, probe.labels).backward()
    return layers


def mean_square(x):
    return x.detach().double().square().mean().item()


def a_layer(signals, quantity):
    """What a quantity is multiplied by from one hidden layer to the next (geometric mean)."""
    hidden = signals.by_layer(quantity)[:-1]
    return (hidden[-1] / hidden[0]) ** (1 / (len(hidden) - 1))


def forward(signals):
    return a_layer(signals, "preactivation_second_moment")


def backward(signals):
    return 1 / a_layer(signals, "gradient_second_moment")


def test_units_that_start_equal_stay_equal():
    """The same output and gradient, then the same weights; only random weights or biases help."""
    found = claims.symmetry(digits(), steps=150)
    constant, zero = found["constant, zero biases"], found["zero, zero biases"]
    for course in (constant, zero):
        first = course.signals[0].layers["fc1"]
        assert first["distinct_fraction"] == first["distinct_gradient_fraction"] == 1 / 100
        assert max(course.apart) < 1e-3  # rounding errors are not copies of each other
    assert zero.final_loss == pytest.approx(claims.CHANCE, abs=0.02)

    equal = TrainConfig(init="constant:value=0.01", bias_init="zeros", activation="sigmoid")
    (preactivations, weight), _ = by_autograd(equal, digits())
    for rows in (preactivations.T, preactivations.grad.T, weight.grad):
        assert torch.allclose(rows, rows[:1].expand_as(rows), rtol=1e-5, atol=0)
        assert rows.abs().max() > 0

    biased, random = found["zero, PyTorch's biases"], found["He, zero biases"]
    assert biased.apart[0] == 0
    assert biased.apart[-1] > 0.5
    assert min(random.apart) > 0.9
    assert random.final_loss < 0.3 < constant.final_loss


def test_the_variance_grows_with_fan_in_under_unit_normal_weights():
    """Ten times the inputs, ten times the variance; under LeCun the same."""
    fans = (10, 100, 1_000)
    found = claims.growth(digits("standard"), fans)
    for few, many in itertools.pairwise(fans):
        assert found["unit normal"][many] / found["unit normal"][few] == pytest.approx(10, rel=0.2)
        assert found["LeCun"][many] / found["LeCun"][few] == pytest.approx(1, rel=0.3)
    config = TrainConfig(init="normal", activation="tanh", hidden=(100, 300), bias_init="zeros")
    _, (second, _), _ = by_autograd(config, digits("standard"))
    assert found["unit normal"][100] == pytest.approx(second.var(correction=0).item(), rel=1e-5)


def test_lecun_keeps_the_variance_of_a_linear_layer_constant():
    """PyTorch's default, which one text calls LeCun's, makes a third of it; He doubles it."""
    found = claims.lecun(digits("standard"))
    for name, gain in (
        ("LeCun, linear", 1),
        ("PyTorch's default, linear", 1 / 3),
        ("He, linear", 2),
        ("LeCun, ReLU", 1 / 2),
    ):
        assert forward(found[name]) == pytest.approx(gain, rel=0.06)
        assert backward(found[name]) == pytest.approx(gain, rel=0.06)
    # tanh is not quite linear: what is left falls as 1/(2·layer).
    assert forward(found["LeCun, tanh"]) ** 19 == pytest.approx(1 / (2 * 19), rel=0.3)


def test_xavier_suits_tanh():
    """It keeps the gradient's size where others lose it or blow it up, and trains fastest."""
    found = claims.xavier(digits(), "tanh", steps=300)
    gradient = {name: backward(signals) for name, signals in found.untrained.items()}
    assert gradient["Xavier"] == pytest.approx(1, rel=0.15)
    assert gradient["small normal, std 0.01"] < 0.02
    assert gradient["unit normal"] > 3
    loss = {name: course.final_loss for name, course in found.trained.items()}
    assert loss["Xavier"] < 0.2
    assert loss["small normal, std 0.01"] == pytest.approx(claims.CHANCE, abs=0.02)
    assert loss["unit normal"] > 2 * loss["Xavier"]


def test_xavier_suits_sigmoid_in_shallow_networks_only():
    """It trains three layers where small weights do not, but loses 15/16 of the gradient a layer.

    Sigmoid's slope is at most 1/4; a gain of 4 makes up for that.
    """
    found = claims.xavier(digits(), "sigmoid", steps=600)
    trained = {name: course.accuracies[-1] for name, course in found.trained.items()}
    assert trained["Xavier"] > 0.8
    assert trained["small normal, std 0.01"] < 0.2
    assert trained["Xavier, gain 4"] > trained["Xavier"] + 0.05
    gradient = {name: backward(signals) for name, signals in found.untrained.items()}
    assert gradient["small normal, std 0.01"] < gradient["Xavier"] < 1 / 16
    assert gradient["Xavier, gain 4"] > 5 * gradient["Xavier"]


def test_he_keeps_signal_and_gradient_through_relu_and_leaky_relu():
    """For 30 layers; under Xavier both are halved by each."""
    found = claims.he(digits("standard"))
    for activation in ("ReLU", "leaky ReLU"):
        for through_all in (forward, backward):
            assert through_all(found[f"He, {activation}"]) == pytest.approx(1, rel=0.06)
            assert through_all(found[f"Xavier, {activation}"]) == pytest.approx(0.5, rel=0.06)
    config = TrainConfig(init="he", hidden=(300,) * 30, bias_init="zeros")
    layers = by_autograd(config, digits("standard"))
    for quantity, expected in (
        ("preactivation_second_moment", [mean_square(x) for x, _ in layers]),
        ("gradient_second_moment", [mean_square(x.grad) for x, _ in layers]),
        ("weight_gradient_variance", [w.grad.double().var(correction=0).item() for _, w in layers]),
    ):
        assert found["He, ReLU"].by_layer(quantity) == pytest.approx(expected, rel=1e-4)


def test_sigmoid_and_tanh_saturate_when_the_input_variance_is_too_large():
    """Nearly all activations where the slope, and so the gradient, is near 0."""
    found = claims.responses(digits("standard"), ["tanh", "sigmoid"])
    for points in found.values():
        saturated = [point.saturated for point in points]
        passed = [point.passed for point in points]
        assert saturated == sorted(saturated)
        assert passed == sorted(passed, reverse=True)
        assert saturated[0] == 0
        assert passed[0] > 0.99
        assert saturated[-1] > 0.9
        assert passed[-1] < 0.03
    config = TrainConfig(init="normal:std=1", activation="tanh", bias_init="zeros")
    (x, _), _ = by_autograd(config, digits("standard"))
    (point,) = [p for p, std in zip(found["tanh"], claims.STDS, strict=True) if std == 1]
    slopes = 1 - x.detach().double().tanh().square()
    assert point.passed == pytest.approx(mean_square(slopes), rel=1e-4)
    assert point.saturated == pytest.approx((slopes < 0.05).double().mean().item(), abs=1e-4)


def test_sigmoid_and_tanh_are_linear_when_the_input_variance_is_too_small():
    """A straight line says it all of them, but at no size of ReLU."""
    found = claims.responses(digits("standard"), ["tanh", "sigmoid", "relu"])
    for name in ("tanh", "sigmoid"):
        bends = [point.bend for point in found[name]]
        assert bends[0] < 1e-6
        assert bends[-1] > 0.2
    # Of a Gaussian, 1 − (1/4)/(1/2 − 1/2π).
    assert [point.bend for point in found["ReLU"]] == pytest.approx([0.2666] * 19, abs=0.08)


def test_relu_is_unbounded():
    """Its largest output grows with its input; tanh's and sigmoid's ends at 1."""
    found = claims.responses(digits("standard"), ["tanh", "sigmoid", "relu", "leaky_relu"])
    for name in ("ReLU", "leaky ReLU"):
        small, large = found[name][0], found[name][-1]
        growth = large.received / small.received
        assert large.largest / small.largest == pytest.approx(growth, rel=1e-4)
        assert large.largest > 100
    for name in ("tanh", "sigmoid"):
        assert max(point.largest for point in found[name]) <= 1


def test_relu_units_die_and_leaky_relu_repairs_that():
    """At a large learning rate, one that leaky ReLU bears: dead units get no gradient."""
    found = claims.dying(digits(), rates=(0.1, 1.0), steps=300)
    usual, dead = found["ReLU, learning rate 0.1"], found["ReLU, learning rate 1"]
    leaky = found["leaky ReLU, learning rate 1"]
    assert usual.negative[-1] < 0.1
    for course in (dead, leaky):
        assert course.negative[-1] > 0.8
    fraction = [signals.layers["fc1"]["dead_fraction"] for signals in dead.signals]
    assert fraction == pytest.approx(dead.negative, abs=0.02)
    assert dead.signals[-1].layers["fc1"]["distinct_gradient_fraction"] < 0.2
    assert leaky.signals[-1].layers["fc1"]["dead_fraction"] == 0
    assert leaky.signals[-1].layers["fc1"]["distinct_gradient_fraction"] > 0.9
    assert leaky.accuracies[-1] > dead.accuracies[-1] + 0.1


def test_too_small_weights_make_gradients_vanish_and_too_large_ones_explode():
    """By width · std² / 2 a layer, which He makes 1."""
    found = claims.extremes(digits("standard"))
    for name, std in (("0.01", 0.01), ("0.05", 0.05), ("0.4", 0.4), ("1", 1)):
        assert backward(found[f"std {name}"]) == pytest.approx(100 * std**2 / 2, rel=0.15)
    assert backward(found["std √(2/fan-in), He"]) == pytest.approx(1, rel=0.15)


def test_a_proper_scale_converges_faster():
    """He and Xavier are ahead of the small Gaussian, which is ahead of zero."""
    found = claims.convergence(digits("half"), steps=402)
    he, xavier, small, zero = (
        found[name].final_loss for name in ("He", "Xavier", "small normal, std 0.01", "zero")
    )
    assert max(he, xavier) < 0.5 * small
    assert small < zero
    assert zero == pytest.approx(claims.CHANCE, abs=0.02)
    assert found["He"].accuracies[-1] > 0.85


def test_at_30_layers_of_relu_he_trains_where_xavier_stalls():
    """Whatever Xavier's learning rate."""
    found = claims.depth(digits(), he_rates=[0.003], xavier_rates=[0.003, 0.01, 0.1], steps=200)
    for name, course in found.items():
        if name.startswith("He"):
            assert course.final_loss < 0.8
            assert course.accuracies[-1] > 0.8
        else:
            assert course.final_loss == pytest.approx(claims.CHANCE, abs=0.02)
            assert course.accuracies[-1] < 0.2


def of(outcomes):
    """By scheme the accuracies, seed by seed."""
    return {cell.init: [one.accuracy for one in found] for cell, found in outcomes.items()}


def test_orthogonal_weights_keep_the_gradient_through_time():
    """From seed to seed alike; PyTorch's default loses it, and an LSTM loses it whatever it has."""
    settings = {"dataset": "digits", "normalize": "half", "hidden": "50"}
    found = model_claims.through_time(here, seeds=6, **settings)
    rnn, unbiased, lstm = found.values()
    for by_scheme in (rnn, unbiased):
        steps = {name: model_claims.a_step_back(found) for name, found in by_scheme.items()}
        assert steps["default"] < 0.4
        assert min(steps["orthogonal"], steps["xavier"], steps["he"]) > 0.55
    spread = {
        name: max(x[0] / x[-1] for x in of_seeds) / min(x[0] / x[-1] for x in of_seeds)
        for name, of_seeds in unbiased.items()
    }
    assert 1.5 * spread["orthogonal"] < min(spread["xavier"], spread["he"])
    assert all(model_claims.a_step_back(of_seeds) < 0.5 for of_seeds in lstm.values())

    config = TrainConfig(model="rnn", init="orthogonal", activation="tanh", probe=100, **settings)
    splits = digits("half")
    module = networks.initialize(config, cache.scheme("orthogonal", None), splits).module
    weights, probe = dict(module.named_parameters()), measure.probe(splits.train, 100)
    state, states = torch.zeros(100, 50), []
    for rows in probe.images.view(-1, 8, 8).unbind(1):
        state = torch.tanh(
            rows @ weights["rnn1.weight_ih_l0"].T
            + weights["rnn1.bias_ih_l0"]
            + state @ weights["rnn1.weight_hh_l0"].T
            + weights["rnn1.bias_hh_l0"]
        )
        state.retain_grad()
        states.append(state)
    nn.functional.cross_entropy(module.fc(state), probe.labels).backward()
    expected = [mean_square(state.grad) for state in states]
    assert rnn["orthogonal"][0] == pytest.approx(expected, rel=1e-4)


def test_orthogonal_initialization_works_better_for_rnn_than_the_default():
    """Over few steps no better than Xavier, as far as two seeds say; a seed gives the same."""
    panels = {
        "rnn": model_claims.Panel(model_claims.RNN | {"inits": INITS}, (0.01,)),
        "lstm": model_claims.Panel(model_claims.LSTM, (0.1,)),
    }
    settings = {"dataset": "digits", "seeds": 2, "epochs": 8}
    found = model_claims.recurrent(here, panels, **settings)
    rnn, lstm = of(found["rnn"][0.01]), of(found["lstm"][0.1])
    for model in (rnn, lstm):
        for orthogonal, default in zip(model["orthogonal"], model["default"], strict=True):
            assert orthogonal > default + 0.07
        assert model["xavier"] == pytest.approx(model["orthogonal"], abs=0.12)
    few = {"rnn": model_claims.Panel(model_claims.RNN | {"inits": "default"}, (0.01,))}
    again = model_claims.recurrent(here, few, **settings)
    assert of(again["rnn"][0.01]) == {"default": rnn["default"]}


def test_a_tuned_learning_rate_brings_the_default_nearer():
    """It is chosen for each scheme among the same number of trials."""
    (found,) = model_claims.tuned(
        here,
        {"digits": {"dataset": "digits"}},
        inits="orthogonal,default",
        seeds=2,
        trials=3,
        epochs=6,
        lr_high=0.05,
        eval_every=45,
        workers=1,
    ).values()
    before, after = (
        {row.cell.init: row.mean for row in rows} for rows in (found.untuned, found.tuned)
    )
    assert after["default"] > before["default"] + 0.15
    before_apart, after_apart = (x["orthogonal"] - x["default"] for x in (before, after))
    assert before_apart > 0.2
    assert after_apart < before_apart / 2
    assert "tuning" in " ".join(found.sentences).lower()


def test_he_suits_deep_convolutional_networks_with_relu():
    """PyTorch's default is late with 4 layers, and stays at chance with 12."""
    found = model_claims.convolutional(
        here, (4, 12), (0.02,), dataset="digits", seeds=2, epochs=10, inits="he,default"
    )
    shallow, deep = (of(by_rate[0.02]) for by_rate in found.values())
    assert min(shallow["he"]) > 0.8
    assert max(shallow["default"]) < 0.6
    assert min(deep["he"]) > 0.4
    assert max(deep["default"]) < 0.2


def test_lecun_suits_selu():
    """It keeps the signal, and trains where He's twice the variance overflows."""
    found = model_claims.selu(here, (0.003,), dataset="digits", seeds=2, epochs=6)
    assert forward(found.untrained["lecun"]) == pytest.approx(1, abs=0.06)
    assert backward(found.untrained["lecun"]) == pytest.approx(1.08, abs=0.06)
    assert backward(found.untrained["he"]) > 1.25
    trained = of(found.trained[0.003])
    assert min(trained["lecun"]) > 0.9
    assert trained["he"] == [None, None]


def test_the_pixels_are_means_in_one_order_for_all():
    """Of squares of the image, as NumPy has them; the digits' 8 × 8 to 4 × 4."""
    split, order = digits().test, torch.randperm(16, generator=torch.Generator().manual_seed(3))
    x, y = pixels.read(split, 4, order)
    means = split.images.double().numpy().reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)
    assert abs(x - 255 * means[:, order.numpy()]).max() < 0.51
    assert y.tolist() == split.labels.tolist()


@pytest.mark.mnist
@pytest.mark.parametrize(
    ("name", "shape"), [("permuted", (196,)), ("coarse", (49,)), ("small", (1, 14, 14))]
)
def test_mnist_is_made_small(name, shape, mnist, monkeypatch):
    """10,000 of its training images, all test images; sequences in an order of their own."""
    monkeypatch.setenv("INITFLOW_DATA_DIR", str(mnist))
    splits = datasets.load(TrainConfig(dataset=f"{pixels.__file__}:{name}"))
    assert (splits.shape, splits.classes) == (shape, 10)
    assert (len(splits.train), len(splits.test)) == (10_000, 10_000)
    whole = datasets.load(TrainConfig(dataset="mnist"))
    assert splits.test.images.mean(1) == pytest.approx(whole.test.images.mean(1), abs=2e-3)
    side = round(splits.pixels**0.5)
    averaged = (
        whole.test.images.view(-1, side, 28 // side, side, 28 // side).mean((2, 4)).flatten(1)
    )
    assert (name == "small") == torch.allclose(splits.test.images, averaged, atol=3e-3)


@every_claim
def test_the_page_states_the_claim_with_its_figure_and_a_command(name):
    """The title of the figure is the heading."""
    section = SECTIONS[CLAIMS[name].title]
    assert f"](images/claims/{name}.png)" in section
    assert "$ initflow " in section
    assert re.match(r"\n_[A-Z][^_]*_", section)
    figure = ROOT / "docs" / "images" / "claims" / f"{name}.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert figure.stat().st_size < 125_000


def test_every_figure_is_of_a_claim_on_the_page():
    """None is left of one that is gone."""
    figures = {path.stem for path in (ROOT / "docs" / "images" / "claims").iterdir()}
    assert figures == set(CLAIMS) == set(re.findall(r"claims/(\w+)\.png", PAGE))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_are_valid(command):
    """Every option and value; they are too long to run here."""
    name, words = command.split(" ", 1)
    config, more = read(name, words)
    assert more == {"experiment": None}
    if name != "reproduce":
        for init in [config.init] if name == "train" else config.inits:
            cache.scheme(init, None)


def test_figures_are_drawn_of_what_is_measured():
    """With the claim as their title, and a line that says what was found."""
    claim = claims.CLAIMS["growth"]
    found = claims.growth(digits(claim.normalize), (10, 20))
    figure = claim.draw(found, claim.title)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert figure.get_suptitle() == claim.title
    assert "LeCun: " in claim.say(found)

"""The rules that every initializer keeps, each broken once; and what a breach leaves behind."""

import math
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from initflow.core import isolation
from initflow.core.seeds import generator
from initflow.errors import PluginError, SettingError
from initflow.initializers import contract
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.built_in import BUILT_IN
from initflow.initializers.contract import RULES, Breach, attempt
from initflow.initializers.plugins import find
from initflow.initializers.scheme import Place, Scheme
from initflow.training import model
from initflow.training.splits import Split

RELU = ACTIVATIONS["relu"]
AT = Place(5, 4)


def replaced(weight, generator):
    weight.data = torch.randn(weight.shape, generator=generator)


def reshaped(weight, generator):
    weight.normal_(generator=generator).data = weight.reshape(5, 4)


def other_type(weight, generator):
    weight.data = weight.double().normal_(generator=generator)


def other_device(weight, generator):
    weight.data = weight.cuda()


def infinite(weight, generator):
    weight.normal_(generator=generator)[0, 0] = math.inf


def partial(weight, generator):
    weight[1:].normal_(generator=generator)


def untouched(weight, generator):
    weight.clone().normal_(generator=generator)


def returning(weight, generator):
    return torch.randn(weight.shape, generator=generator)


def another_dtype(weight, generator):
    torch.set_default_dtype(torch.float64)
    weight.normal_(generator=generator)


def another_device(weight, generator):
    weight.normal_(generator=generator)
    torch.set_default_device("meta")


def threads(weight, generator):
    weight.normal_(generator=generator)
    torch.set_num_threads(torch.get_num_threads() + 1)


def deterministic(weight, generator):
    weight.normal_(generator=generator)
    torch.use_deterministic_algorithms(mode=True)


def elsewhere(weight, generator):
    weight.normal_(generator=generator)
    os.chdir("/")


def returning_besides(weight, generator):
    return weight.normal_(generator=generator) / 100


def refusing_by_a_library(weight):
    np.zeros(3) + np.zeros(4)


def exiting(weight):
    raise SystemExit


def leaving(weight):
    raise GeneratorExit


def from_what_was_there(weight, generator):
    weight.nan_to_num_(nan=1.0).add_(1.0)


def globally(weight, generator):
    weight.normal_()


def seeding(weight, generator):
    torch.manual_seed(0)
    weight.normal_(generator=generator)


def by_numpy(weight, generator):
    weight.copy_(torch.from_numpy(np.random.standard_normal(weight.shape)))  # noqa: NPY002


def by_random(weight, generator):
    weight.fill_(random.random())  # noqa: S311


def of_its_own(weight, generator):
    weight.copy_(torch.from_numpy(np.random.default_rng().standard_normal(weight.shape)))


def wrong_bias(weight, bias, generator):
    weight.normal_(generator=generator)
    bias.fill_(math.nan)


def half_way(weight, bias, generator):
    weight.normal_()
    bias.fill_(7.0)
    raise KeyError("half-way")


BREACHES = [
    (replaced, "in place", "it was replaced by another tensor"),
    (reshaped, "shape", "was (4, 5), became (5, 4)"),
    (other_type, "dtype", "was torch.float32, became torch.float64"),
    pytest.param(other_device, "device", "was cpu, became cuda:0", marks=pytest.mark.gpu),
    (infinite, "finite", "1 of 20 entries are NaN or infinite"),
    (partial, "finite", "5 of 20 entries are NaN or infinite"),
    (untouched, "finite", "nothing was written into it, or NaN only"),
    (returning, "in place", "another tensor was returned instead"),
    (returning_besides, "in place", "another tensor was returned instead"),
    (from_what_was_there, "same seed", "20 of 20 entries differ in a second run"),
    (globally, "global state", "torch's random state was changed"),
    (seeding, "global state", "torch's random state was changed"),
    (by_numpy, "global state", "numpy's random state was changed"),
    (by_random, "global state", "the state of Python's random was changed"),
    (another_dtype, "global state", "torch's default dtype was changed"),
    (another_device, "global state", "torch's default device was changed"),
    (threads, "global state", "torch's number of threads was changed"),
    (deterministic, "global state", "torch's determinism was changed"),
    (elsewhere, "global state", "the working folder was changed"),
    (of_its_own, "same seed", "20 of 20 entries differ in a second run"),
    (wrong_bias, "finite", "4 of 4 entries are NaN or infinite"),
]


def tensors():
    return {"fc1.weight": torch.full((4, 5), 3.0), "fc1.bias": torch.full((4,), 2.0)}


def applied(function, into):
    scheme = Scheme.of(function, "mine", "a-plugin 1.2")

    def fill(copies, generator):
        return scheme.fill_layer(*copies.values(), AT, generator)

    contract.apply(scheme, into, fill, torch.Generator().manual_seed(0), "fc1")


def states():
    numpys = np.random.get_state()  # noqa: NPY002
    settings = torch.get_default_dtype(), isolation._default_device(), torch.get_num_threads()
    more = torch.are_deterministic_algorithms_enabled(), Path.cwd()
    return torch.get_rng_state().tolist(), str(numpys), random.getstate(), settings, more


@pytest.mark.parametrize(("function", "rule", "detail"), BREACHES)
def test_a_breach_names_the_plugin_the_layer_and_the_rule(function, rule, detail):
    """And leaves the weights, and the global random states, as they were."""
    torch.rand(1)  # or the state might be that of the seed which a plugin sets
    weights, before = tensors(), states()
    with pytest.raises(PluginError) as error:
        applied(function, weights)
    assert str(error.value) == (
        f"scheme 'mine' of a-plugin 1.2 at fc1 breaks the rule '{rule}': {detail}"
    )
    assert states() == before
    for name, tensor in tensors().items():
        assert torch.equal(weights[name], tensor)


def test_every_rule_is_broken_above():
    """But for running at all, which is below."""
    broken = {getattr(breach, "values", breach)[1] for breach in BREACHES}
    assert broken | {"runs"} == set(RULES)


def test_an_error_half_way_leaves_everything_as_it_was():
    """Weights, biases and the global state that was moved before."""
    weights, before = tensors(), states()
    with pytest.raises(PluginError, match=r"a-plugin 1\.2 at fc1 failed: KeyError: 'half-way'"):
        applied(half_way, weights)
    assert states() == before
    for name, tensor in tensors().items():
        assert torch.equal(weights[name], tensor)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (refusing_by_a_library, "ValueError: operands could not be broadcast together"),
        (exiting, "SystemExit"),
        (leaving, "GeneratorExit"),
    ],
)
def test_other_failures_are_the_plugins(function, message):
    """A library's ValueError is no refusal, and an exit ends nothing but the plugin."""
    with pytest.raises(PluginError, match=f"'mine' of a-plugin 1.2 at fc1 failed: {message}"):
        applied(function, tensors())


def test_an_interruption_is_no_failure_of_the_plugin():
    """Ctrl-C goes on to whoever handles it."""

    def interrupted(weight):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        applied(interrupted, tensors())


def test_what_another_thread_does_is_no_breach():
    """MLflow's telemetry, for one, draws from Python's random as it likes."""

    def slow(weight, generator):
        if weight[0, 0] != 0.0:  # in the first of two runs
            thread = threading.Thread(target=random.random)
            thread.start()
            thread.join()
        weight.normal_(generator=generator)

    applied(slow, tensors())


def test_a_tensor_that_was_filled_may_be_returned():
    """As the functions of torch.nn.init do."""

    def filling(weight, generator):
        return torch.nn.init.normal_(weight, generator=generator)

    applied(filling, tensors())


def test_what_a_scheme_refuses_is_the_users_mistake():
    """A ValueError of its own is about an argument or an activation."""

    def refusing(weight, *, gain: float = -1.0):
        raise ValueError(f"gain must be above 0, not {gain}\nmore")

    with pytest.raises(SettingError, match=r"^scheme 'mine': gain must be above 0, not -1\.0$"):
        applied(refusing, tensors())


def test_what_keeps_the_rules_is_written_once_from_the_generators_place():
    """The bits of one plain run, and the generator where one run leaves it."""

    def good(weight, bias, fan_in, generator):
        assert weight.isnan().all() or not weight.any()
        assert bias.eq(2.0).all()
        weight.normal_(0.0, fan_in**-0.5, generator=generator)

    weights, plain = tensors(), torch.empty(4, 5)
    ours, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    scheme = Scheme.of(good, "good", "a test")
    attempt(weights, lambda t, g: scheme.fill_layer(*t.values(), AT, g), ours)
    plain.normal_(0.0, 5**-0.5, generator=theirs)
    assert torch.equal(weights["fc1.weight"], plain)
    assert torch.equal(weights["fc1.bias"], torch.full((4,), 2.0))
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_a_breach_is_an_exception_with_its_parts():
    """For the conformance table."""
    with pytest.raises(Breach) as breach:
        attempt(tensors(), lambda *_: None, torch.Generator())
    assert (breach.value.rule, breach.value.tensor) == ("finite", "fc1.weight")


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_schemes_have_the_bits_of_a_plain_run(name):
    """Checking changes no weight."""
    scheme, widths = find(name), (12, 9, 7)
    parameters = model.initialize(widths, scheme, RELU, bias_init="zeros", seed=5)
    stream = generator(5, "weights")
    for index, weight in enumerate(parameters.weights):
        plain = torch.empty_like(weight[0])
        place = Place(widths[index], widths[index + 1], RELU, index, 2)
        scheme.fill_layer(plain, torch.empty(len(plain)), place, stream)
        assert torch.equal(weight[0], plain)


def test_a_layers_initializer_gets_what_it_asks_for():
    """Fans, index, depth, activation, and the biases that were drawn, which it may change."""
    seen = []

    def asking(weight, bias, fan_in, fan_out, activation, layer, depth, generator, *, b: int = 4):  # noqa: PLR0917
        seen.append((fan_in, fan_out, activation.name, layer, depth, b, bias.numel()))
        weight.normal_(generator=generator)
        bias.mul_(0.5)

    scheme = Scheme.of(asking, "asking", "a test").bind({"b": "6"})
    tanh = ACTIVATIONS["tanh"]
    mine = model.initialize((12, 9, 7), scheme, tanh, bias_init="pytorch", seed=5)
    usual = model.initialize((12, 9, 7), find("he"), tanh, bias_init="pytorch", seed=5)
    assert seen[::2] == [(12, 9, "tanh", 0, 2, 6, 9), (9, 7, "tanh", 1, 2, 6, 7)]
    for own, other in zip(mine.biases, usual.biases, strict=True):
        assert torch.equal(own, other / 2)


def test_a_networks_initializer_sees_the_network_and_images():
    """Modules on the very weights; up to 1,000 images of the seed's own choice."""
    seen = []

    def whole(network, images, labels, activation, depth, generator):  # noqa: PLR0917
        seen.append((images, labels, activation.name, depth, [type(m).__name__ for m in network]))
        for module in network:
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(generator=generator)
                module.bias.zero_()
        assert network(images).shape == (len(images), 7)

    scheme = Scheme.of(whole, "whole", "a test")
    data = Split(torch.rand(1_500, 12), torch.arange(1_500) % 7)
    for seed in (1, 2):
        parameters = model.initialize(
            (12, 9, 7), scheme, RELU, bias_init="pytorch", seed=seed, data=data
        )
        assert not parameters.biases[0].any()
        plain = torch.randn(9, 12, generator=generator(seed, "weights"))
        assert torch.equal(parameters.weights[0][0], plain)
    images, labels, *others = seen[0]
    assert others == ["relu", 2, ["Linear", "Elementwise", "Linear"]]
    assert (len(images), len(labels)) == (1_000, 1_000)
    assert len(set(labels.tolist())) == 7
    assert torch.equal(images, seen[1][0])  # the second run of the same seed
    assert not torch.equal(images, seen[2][0])  # another seed
    with pytest.raises(SettingError, match="scheme 'whole' needs images to see the network on"):
        model.initialize((12, 9, 7), scheme, RELU, bias_init="zeros", seed=0)


@pytest.mark.parametrize("how", ["data", "parameter", "module"])
def test_a_network_keeps_its_tensors(how):
    """Filled first and replaced then, it would have other weights than it seems to."""

    def replacing(network, generator):
        for layer in network[::2]:
            layer.weight.normal_(generator=generator)
        last = network[2]
        if how == "data":
            last.weight.data = last.weight / 100
        elif how == "parameter":
            last.weight = torch.nn.Parameter(last.weight / 100)
        else:
            network.append(torch.nn.Linear(7, 7))

    data = Split(torch.rand(10, 12), torch.arange(10) % 7)
    scheme = Scheme.of(replacing, "replacing", "a test")
    with pytest.raises(PluginError, match="breaks the rule 'in place': "):
        model.initialize((12, 9, 7), scheme, RELU, bias_init="zeros", seed=0, data=data)


def test_the_images_may_be_changed(monkeypatch):
    """They are the initializer's own."""

    def centering(network, images, labels):
        for layer in network[::2]:
            layer.weight.fill_(float(images.sum()))
        images.zero_()
        labels.zero_()

    data = Split(torch.rand(10, 12), torch.arange(10) % 7)
    before = data.images.clone()
    scheme = Scheme.of(centering, "centering", "a test")
    model.initialize((12, 9, 7), scheme, RELU, bias_init="zeros", seed=0, data=data)
    assert torch.equal(data.images, before)


def test_a_networks_breach_names_the_layer():
    """Of a network that is filled as a whole."""

    def lazy(network):
        network[0].weight.zero_()

    data = Split(torch.rand(10, 12), torch.arange(10) % 7)
    with pytest.raises(
        PluginError, match="scheme 'lazy' of a test at fc2 breaks the rule 'finite'"
    ):
        model.initialize(
            (12, 9, 7), Scheme.of(lazy, "lazy", "a test"), RELU,
            bias_init="zeros", seed=0, data=data,
        )  # fmt: skip

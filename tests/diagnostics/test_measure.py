"""Evaluation, against PyTorch's layers; a stack on a GPU, measured at once."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import reference
from initflow.core import machine
from initflow.core.configurations import TrainConfig
from initflow.diagnostics import measure, networks
from initflow.diagnostics.signals import QUANTITIES
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.theory import prediction
from initflow.training import model, trainer
from tests import elsewhere
from tests.training.test_train import images


@pytest.fixture(autouse=True)
def _much_memory(monkeypatch):
    """Of the device that is none."""
    monkeypatch.setattr(machine, "working_memory", lambda _: 2**30)


@pytest.mark.parametrize("n", [1, 999, 1_000, 2_345])
def test_loss_and_accuracy_are_pytorchs(n):
    """Over the whole split, whatever the chunks; for each member of a stack."""
    data = images(n, pixels=30)
    stack = model.Parameters((30, 20, 10), members=2)
    for member in range(2):
        single = model.initialize(
            (30, 20, 10), find("he"), ACTIVATIONS["relu"], bias_init="pytorch", seed=member
        )
        for name, tensor in stack.state(member).items():
            tensor.copy_(single.state()[name])
    evaluations = measure.evaluate(stack, [ACTIVATIONS["tanh"]] * stack.members, data)
    for member, evaluation in enumerate(evaluations):
        logits = reference.network(stack.state(member), "tanh")(data.images)
        expected = torch.nn.functional.cross_entropy(logits, data.labels).item()
        assert evaluation.loss == pytest.approx(expected, rel=1e-5)
        assert evaluation.accuracy == (logits.argmax(1) == data.labels).double().mean().item()


def drawn(members):
    """Untrained networks."""
    return [
        model.initialize(
            (30, 20, 10), find("he"), ACTIVATIONS["relu"], bias_init="pytorch", seed=seed
        )
        for seed in range(members)
    ]


def configs_of(members, **own):
    """Of the networks of a stack: two activation functions, one after the other."""
    kinds = ["relu"] * (members // 2) + ["tanh"] * (members - members // 2)
    return [TrainConfig(**{"seed": at} | own, activation=kind) for at, kind in enumerate(kinds)]


def on_the_device(members, data):
    """A stack there, of networks as they are."""
    schemes = [find("he")] * members
    there = data.to(torch.device(elsewhere.DEVICE))
    return networks.Stack(drawn(members), configs_of(members), schemes, there), there


@elsewhere.possible
@pytest.mark.parametrize("memory", [2**30, 2**14], ids=["all at once", "few images at once"])
def test_a_stack_on_a_gpu_is_evaluated_at_once(monkeypatch, memory):
    """What is done grows with no network, and the result alone is read: the same numbers."""
    monkeypatch.setattr(machine, "working_memory", lambda _: memory)
    data, done = images(150, pixels=30), []
    for members in (2, 20):
        stack, there = on_the_device(members, data)
        with elsewhere.work() as work:
            found = stack.evaluate(range(members), {"test": there})
        done.append(work)
        for member, (one, config) in enumerate(
            zip(drawn(members), configs_of(members), strict=True)
        ):
            (alone,) = measure.evaluate(one, [ACTIVATIONS[config.activation]], data)
            assert found[member]["test"].loss == pytest.approx(alone.loss, rel=1e-5)
            assert found[member]["test"].accuracy == alone.accuracy
    assert [work.reads for work in done] == [1, 1]
    if memory == 2**30:
        assert done[0] == done[1]


def in_numpy(state, activation, data):
    """The quantities of each layer in double precision, from the formulas alone."""
    x, found, passed = data.images.double().numpy(), {}, []
    weights = [state[f"fc{at}.weight"].double().numpy() for at in (1, 2)]
    biases = [state[f"fc{at}.bias"].double().numpy() for at in (1, 2)]
    h = x @ weights[0].T + biases[0]
    y, slopes = {
        "relu": (np.maximum(h, 0), (h > 0).astype(float)),
        "tanh": (np.tanh(h), 1 - np.tanh(h) ** 2),
    }[activation]
    logits = y @ weights[1].T + biases[1]
    shares = np.exp(logits - logits.max(1, keepdims=True))
    by_logits = shares / shares.sum(1, keepdims=True) - np.eye(10)[data.labels.numpy()]
    by_logits /= len(data)
    by_h = by_logits @ weights[1] * slopes
    passed = [(h, by_h, by_h.T @ x, y), (logits, by_logits, by_logits.T @ y, None)]
    for at, (received, gradient, by_weights, activations) in enumerate(passed):
        tensors = {
            "weight": weights[at],
            "preactivation": received,
            "gradient": gradient,
            "weight_gradient": by_weights,
        }
        if activations is not None:
            tensors["activation"] = activations
        values = {f"{name}_variance": of.var() for name, of in tensors.items()}
        values |= {f"{name}_second_moment": (of**2).mean() for name, of in tensors.items()}
        rows = received / np.linalg.norm(received, axis=1, keepdims=True)
        cosines = rows @ rows.T
        values["mean_cosine"] = cosines[~np.eye(len(rows), dtype=bool)].mean()
        values["signal_variance"] = received.var(0).mean()
        values["distinct_fraction"] = len(np.unique(weights[at], axis=0)) / len(weights[at])
        of_float = by_weights.astype(np.float32)
        values["distinct_gradient_fraction"] = len(np.unique(of_float, axis=0)) / len(of_float)
        if activations is not None:
            values["dead_fraction"] = (activations == 0).all(0).mean()
            values["saturated_fraction"] = (abs(slopes) < 0.05).mean()
        found[f"fc{at + 1}"] = {name: values[name] for name in QUANTITIES if name in values}
    return found


def measured(stack, members, data):
    """What is seen of all networks, and what was done for it."""
    with elsewhere.work() as work:
        found = list(stack.observe(range(members), data))
    return found, work


@elsewhere.possible
def test_signals_of_a_stack_on_a_gpu_are_measured_at_once():
    """What is done grows with no network, and one read is all: the numbers of the formulas."""
    data, done = images(150, pixels=30), []
    for members in (4, 8, 40):
        stack, there = on_the_device(members, data)
        found, work = measured(stack, members, there)
        done.append(work)
        for one, config, seen in zip(drawn(members), configs_of(members), found, strict=True):
            expected = in_numpy(one.state(), config.activation, data)
            assert list(seen.signals.layers) == list(expected)
            assert seen.signals.nonfinite == {}
            assert seen.preactivations == []
            for layer, values in expected.items():
                assert list(seen.signals.layers[layer]) == list(values)
                assert seen.signals.layers[layer] == pytest.approx(values, rel=2e-4, abs=1e-12)
            (here,) = measure.observe(one, [ACTIVATIONS[config.activation]], data)
            assert seen.gradient_moment == pytest.approx(here.gradient_moment, rel=1e-5)
            assert seen.gradient_alignment == pytest.approx(here.gradient_alignment, rel=1e-5)
    assert done[0] == done[1] == done[2]
    assert done[0].reads == 1


def odd_networks():
    """Untrained networks in which something is not as usual."""
    usual, copies, lost, infinite, zero = drawn(5)
    copies.weights[0][0, 3:] = copies.weights[0][0, 2]
    copies.weights[1][0, 0] = 0.0
    copies.weights[1][0, 1] = -0.0
    lost.weights[0][0, 2, 3] = math.nan
    lost.weights[0][0, 4, 5] = math.nan
    infinite.weights[1][0, 0, 0] = math.inf
    zero.flat.zero_()
    return [usual, copies, lost, infinite, zero]


@elsewhere.possible
def test_what_is_odd_is_measured_there_as_on_the_cpu():
    """Copies, which count once; what is no number, which is counted; networks that are 0."""
    data = images(150, pixels=30)
    asked = [TrainConfig(activation="tanh", seed=seed) for seed in range(5)]
    there = data.to(torch.device(elsewhere.DEVICE))
    stack = networks.Stack(odd_networks(), asked, [find("he")] * 5, there)
    shares = []
    for one, seen in zip(odd_networks(), measured(stack, 5, there)[0], strict=True):
        (here,) = measure.observe(one, [ACTIVATIONS["tanh"]], data)
        assert seen.signals.nonfinite == here.signals.nonfinite
        assert seen.signals.sizes == here.signals.sizes
        for layer, values in here.signals.layers.items():
            assert seen.signals.layers[layer] == pytest.approx(values, rel=1e-4, abs=1e-12)
            shares.append(values["distinct_fraction"])
    assert shares == [1.0, 1.0, 3 / 20, 9 / 10, 1.0, 1.0, 1.0, 1.0, 1 / 20, 1 / 10]


@elsewhere.possible
def test_in_little_memory_a_stack_on_a_gpu_is_measured_in_parts(monkeypatch):
    """With the same numbers."""
    data = images(150, pixels=30)
    whole, _ = measured(*on_the_device_with(20, data))
    monkeypatch.setattr(machine, "working_memory", lambda _: 2**22)
    parts, work = measured(*on_the_device_with(20, data))
    assert 1 < work.reads < 20
    assert [seen.signals for seen in parts] == [seen.signals for seen in whole]


def on_the_device_with(members, data):
    stack, there = on_the_device(members, data)
    return stack, members, there


@elsewhere.possible
def test_some_of_a_stack_are_measured_by_themselves():
    """In the order in which they are asked for; so they are evaluated."""
    data = images(150, pixels=30)
    stack, members, there = on_the_device_with(6, data)
    whole, _ = measured(stack, members, there)
    evaluated = stack.evaluate(range(6), {"test": there})
    chosen = [1, 2, 4]
    assert [seen.signals for seen in stack.observe(chosen, there)] == [
        whole[member].signals for member in chosen
    ]
    some = stack.evaluate(chosen, {"test": there})
    assert some == {member: evaluated[member] for member in chosen}


@elsewhere.possible
def test_untrained_networks_on_a_gpu_are_read_at_once():
    """Two reads, of the images and of what was measured; the theory is that of each alone."""
    data, done = images(150, pixels=30), []
    for members in (4, 8, 40):
        stack, there = on_the_device(members, data)
        with elsewhere.work() as work:
            found = dict(stack.read(there))
        done.append(work)
        assert set(found) == set(range(members))
        configs, starts = configs_of(members), drawn(members)
        for member in (0, members - 1):
            one = networks.FeedForward(starts[member], configs[member], find("he"))
            expected = one.read(data)
            assert found[member].verdict == expected.verdict
            assert found[member].metrics() == pytest.approx(expected.metrics(), rel=1e-4)
            assert found[member].mean_field == expected.mean_field
    assert done[0] == done[1] == done[2]
    assert done[0].reads == 2


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param(elsewhere.DEVICE, marks=elsewhere.possible)]
)
def test_theory_is_worked_out_once_for_the_seeds_of_a_scheme(device):
    """In whatever order they stand; with the numbers that it has for each network by itself."""
    data = images(150, pixels=30)
    kinds = [(init, kind) for init in ("he", "lecun", "xavier") for kind in ("relu", "tanh")]
    asked = [
        TrainConfig(init=init, activation=kind, seed=seed)
        for seed in range(4)
        for init, kind in kinds
    ]
    schemes = [find(config.init) for config in asked]
    starts = [
        model.initialize(
            (30, 20, 10),
            scheme,
            ACTIVATIONS[config.activation],
            bias_init="pytorch",
            seed=config.seed,
        )
        for config, scheme in zip(asked, schemes, strict=True)
    ]
    stack = networks.Stack(starts, asked, schemes, data.to(torch.device(device)))
    prediction._way.cache_clear()
    found = dict(stack.read(data.to(torch.device(device))))
    assert prediction._way.cache_info().misses == len(kinds)
    for member, (start, config, scheme) in enumerate(zip(starts, asked, schemes, strict=True)):
        prediction._way.cache_clear()
        alone = networks.FeedForward(start, config, scheme).read(data)
        if device == "cpu":
            assert found[member].predicted == alone.predicted
            assert found[member].changes == alone.changes
        for name, intervals in found[member].predicted.items():
            for ours, its in zip(intervals, alone.predicted[name], strict=True):
                assert vars(ours) == pytest.approx(vars(its), rel=1e-4)


@elsewhere.possible
def test_first_losses_on_a_gpu_are_found_at_once():
    """Each over the first batch of its seed, however many seeds there are."""
    data, done = images(150, pixels=30), []
    there = data.to(torch.device(elsewhere.DEVICE))
    for members, seeds in ((4, 1), (4, 4), (20, 1), (20, 5), (20, 20)):
        configs = [
            replace(config, seed=config.seed % seeds)
            for config in configs_of(members, batch_size=40)
        ]
        schemes = [find("he")] * members
        stack = networks.Stack(drawn(members), configs, schemes, there)
        with elsewhere.work() as work:
            found = stack.first_losses()
        done.append(work)
        here = networks.Stack(drawn(members), configs, schemes, data)
        assert found == pytest.approx(here.first_losses(), rel=1e-5)
        for member, config in enumerate(configs):
            first = data.take(trainer.batch_order(150, config.seed, 0)[:40])
            logits = reference.network(drawn(members)[member].state(), config.activation)(
                first.images
            )
            expected = torch.nn.functional.cross_entropy(logits, first.labels).item()
            assert found[member] == pytest.approx(expected, rel=1e-5)
    assert all(work == done[0] for work in done)
    assert done[0].reads == 1


@elsewhere.possible
def test_trained_networks_leave_a_gpu_in_one_read():
    """Each with what is its own."""
    for members in (2, 20):
        stack, _ = on_the_device(members, images(150, pixels=30))
        with elsewhere.work() as work:
            found = list(stack.states())
        assert work.reads == 1
        for one, state in zip(drawn(members), found, strict=True):
            assert model.weights_sha256(state) == model.weights_sha256(one.state())


def test_measuring_changes_nothing():
    """Neither the parameters nor the global random stream."""
    parameters = model.initialize(
        (30, 20, 10), find("he"), ACTIVATIONS["relu"], bias_init="pytorch", seed=0
    )
    before, stream = parameters.flat.clone(), torch.get_rng_state()
    measure.evaluate(parameters, [ACTIVATIONS["relu"]], images(100, pixels=30))
    assert torch.equal(before, parameters.flat)
    assert torch.equal(stream, torch.get_rng_state())

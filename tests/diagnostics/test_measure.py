"""Evaluation, against PyTorch's layers."""

import pytest
import torch

from bench import reference
from initflow.core import machine
from initflow.core.configurations import TrainConfig
from initflow.diagnostics import measure, networks
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.training import model
from tests import elsewhere
from tests.training.test_train import images


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


def configs_of(members):
    """Of the networks of a stack: two activation functions, one after the other."""
    kinds = ["relu"] * (members // 2) + ["tanh"] * (members - members // 2)
    return [TrainConfig(activation=kind, seed=seed) for seed, kind in enumerate(kinds)]


def on_the_device(members, data):
    """A stack there, of networks as they are."""
    schemes = [find("he")] * members
    there = data.to(torch.device(elsewhere.DEVICE))
    return networks.Stack(drawn(members), configs_of(members), schemes, there), there


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


def test_measuring_changes_nothing():
    """Neither the parameters nor the global random stream."""
    parameters = model.initialize(
        (30, 20, 10), find("he"), ACTIVATIONS["relu"], bias_init="pytorch", seed=0
    )
    before, stream = parameters.flat.clone(), torch.get_rng_state()
    measure.evaluate(parameters, [ACTIVATIONS["relu"]], images(100, pixels=30))
    assert torch.equal(before, parameters.flat)
    assert torch.equal(stream, torch.get_rng_state())

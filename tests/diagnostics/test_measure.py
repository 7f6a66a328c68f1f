"""Evaluation, against PyTorch's layers."""

import pytest
import torch

from bench import reference
from initflow.diagnostics import measure
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.training import model
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
    evaluations = measure.evaluate(stack, ACTIVATIONS["tanh"], data)
    for member, evaluation in enumerate(evaluations):
        logits = reference.network(stack.state(member), "tanh")(data.images)
        expected = torch.nn.functional.cross_entropy(logits, data.labels).item()
        assert evaluation.loss == pytest.approx(expected, rel=1e-5)
        assert evaluation.accuracy == (logits.argmax(1) == data.labels).double().mean().item()


def test_measuring_changes_nothing():
    """Neither the parameters nor the global random stream."""
    parameters = model.initialize(
        (30, 20, 10), find("he"), ACTIVATIONS["relu"], bias_init="pytorch", seed=0
    )
    before, stream = parameters.flat.clone(), torch.get_rng_state()
    measure.evaluate(parameters, ACTIVATIONS["relu"], images(100, pixels=30))
    assert torch.equal(before, parameters.flat)
    assert torch.equal(stream, torch.get_rng_state())

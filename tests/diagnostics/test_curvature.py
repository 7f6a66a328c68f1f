"""The largest eigenvalue of the loss's Hessian, held against the whole matrix."""

import math

import pytest
import torch

from initflow.diagnostics import curvature
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.theory.stability import largest_stable_rate
from initflow.training import model
from initflow.training.splits import Split
from initflow.training.trainer import Recipe, Trainer

WIDTHS = (5, 6, 4, 3)


def drawn(activation, init="he", seed=0):
    scheme, function = find(init), ACTIVATIONS[activation]
    return model.initialize(WIDTHS, scheme, function, bias_init="pytorch", seed=seed)


def images():
    g = torch.Generator().manual_seed(1)
    return Split(torch.randn(40, 5, generator=g), torch.randint(3, (40,), generator=g))


def dense(parameters, activation, split, factors):
    """Of the whole Hessian, by autograd, of a loss written with the tensors alone."""
    tensors = [x.double() for x in parameters.state().values()]
    flat = torch.cat([x.reshape(-1) for x in tensors])
    function = ACTIVATIONS[activation].function

    def loss(flat):
        parts = torch.split(flat, [x.numel() for x in tensors])
        x = split.images.double()
        for layer in range(0, len(parts), 2):
            weight = parts[layer].view(tensors[layer].shape)
            x = x @ weight.T + parts[layer + 1]
            x = function(x) if layer < len(parts) - 2 else x
        logs = torch.log_softmax(x, 1)
        return -logs[torch.arange(len(x)), split.labels].mean()

    hessian = torch.autograd.functional.hessian(loss, flat)
    root = torch.cat(
        [torch.full((x.numel(),), f**0.5) for x, f in zip(tensors, factors, strict=True)]
    )
    return float(torch.linalg.eigvalsh(root[:, None] * hessian * root)[-1])


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "sigmoid"])
@pytest.mark.parametrize("factors", [(1.0,) * 6, (4.0, 4.0, 1.0, 4.0, 0.25, 1.0)], ids=str)
def test_it_is_that_of_the_whole_matrix(activation, factors):
    """To a thousandth, with and without a factor on each tensor's rate; nothing is changed."""
    parameters = drawn(activation)
    before = parameters.flat.clone()
    found = curvature.largest_eigenvalue(parameters, ACTIVATIONS[activation], images(), factors)
    assert found == pytest.approx(dense(parameters, activation, images(), factors), rel=2e-3)
    assert found == curvature.largest_eigenvalue(
        parameters, ACTIVATIONS[activation], images(), factors
    )
    assert torch.equal(parameters.flat, before)


def test_the_largest_is_found_where_it_is_not_the_largest_in_size():
    """As where the loss curves downwards more than upwards; and of a matrix of one number."""
    values = torch.cat([torch.linspace(-9, 1, 199), torch.tensor([1.2])]).double()
    assert curvature.lanczos(lambda x: values * x, 200) == pytest.approx(1.2, rel=2e-3)
    assert curvature.lanczos(lambda x: 3 * x, 1) == pytest.approx(3)


def test_what_is_not_finite_curves_without_bounds():
    """As in a network whose logits overflow."""
    parameters = drawn("relu", "constant:value=1e30")
    assert curvature.largest_eigenvalue(parameters, ACTIVATIONS["relu"], images()) == math.inf


def test_steps_begin_to_rise_where_it_says():
    """Over all images and without momentum: at half of the rate the loss falls, at 4 times not."""
    split, tanh = images(), ACTIVATIONS["tanh"]
    parameters = drawn("tanh", "xavier")
    rate = largest_stable_rate(curvature.largest_eigenvalue(parameters, tanh, split))
    highest = {}
    for share in (0.5, 4.0):
        trainer = Trainer(parameters.copy(), [Recipe(tanh, 0, [share * rate] * 60)], split)
        losses = [x for one in trainer.train(batch_size=40, eval_every=10) for x in one.losses[0]]
        highest[share] = max(losses) / losses[0]
    assert highest[0.5] <= 1.0001
    assert highest[4.0] > 1.05

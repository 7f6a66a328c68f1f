"""The training loop, held bit for bit against the usual PyTorch one."""

import math

import pytest
import torch
from torch.utils.data import TensorDataset

from bench import reference
from initflow import measure, model, train
from initflow.activations import ACTIVATIONS
from initflow.data import Split
from initflow.plugins import find


def images(n, pixels=784, seed=0):
    """MNIST-shaped data that can be learned: noisy copies of ten patterns."""
    g = torch.Generator().manual_seed(seed)
    patterns = torch.rand(10, pixels, generator=g)
    labels = torch.randint(10, (n,), generator=g)
    noisy = patterns[labels] + torch.rand(n, pixels, generator=g)
    return Split((noisy * 127).to(torch.uint8).to(torch.float32).div_(255), labels)


def run(parameters, activation, data, *, epochs, batch_size=100, lr=0.1, seed=0, **settings):
    """Train to the end; the checkpoints, and every loss of every member."""
    settings = {"momentum": 0.9, "nesterov": True, "eval_every": 500} | settings
    checkpoints = list(
        train.train(
            parameters,
            ACTIVATIONS[activation],
            data,
            order=lambda epoch: train.batch_order(len(data), seed, epoch),
            rates=train.learning_rates(lr, 0.96, epochs),
            batch_size=batch_size,
            **settings,
        )
    )
    return checkpoints, [loss for checkpoint in checkpoints for loss in checkpoint.losses]


def assert_identical_to_pytorch(
    activation, *, n, epochs, hidden=(100,), batch_size=100, momentum=0.9, nesterov=True, lr=0.1
):
    data = images(n)
    parameters = model.initialize(
        (784, *hidden, 10), find("he"), ACTIVATIONS["relu"], bias_init="pytorch", seed=0
    )
    initial = {name: tensor.clone() for name, tensor in parameters.state().items()}
    _, losses = run(
        parameters,
        activation,
        data,
        epochs=epochs,
        batch_size=batch_size,
        momentum=momentum,
        nesterov=nesterov,
        lr=lr,
    )
    expected, trained = reference.train(
        initial,
        activation,
        TensorDataset(data.images, data.labels),
        [train.batch_order(n, 0, epoch) for epoch in range(epochs)],
        batch_size=batch_size,
        momentum=momentum,
        nesterov=nesterov and momentum > 0,
        lr=lr,
    )
    assert len(losses) == math.ceil(n / batch_size) * epochs
    assert [loss for (loss,) in losses] == expected
    assert all(torch.equal(parameters.state()[name], trained[name]) for name in trained)
    return losses


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_1200_iterations_are_pytorchs_bit_for_bit(activation, threads):
    """Losses and weights of nn.Linear, torch.optim.SGD, StepLR and a DataLoader."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        losses = assert_identical_to_pytorch(activation, n=6_000, epochs=20)
    finally:
        torch.set_num_threads(before)
    assert len(losses) == 1_200
    assert losses[-1][0] < losses[0][0] / 2  # something was learned


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("hidden", "batch_size", "momentum", "nesterov"),
    [
        ((100,), 64, 0.0, True),
        ((300, 100), 37, 0.9, False),
        ((33, 7, 3), 13, 0.9, True),
        ((1, 2), 50, 0.9, True),
        ((32,) * 6, 128, 0.5, True),
        ((), 100, 0.9, True),
    ],
    ids=str,
)
def test_every_shape_and_optimizer_is_pytorchs_bit_for_bit(
    activation, hidden, batch_size, momentum, nesterov
):
    """All activations; depth, an odd last batch, plain SGD and both momenta."""
    assert_identical_to_pytorch(
        activation,
        n=1_000,
        epochs=2,
        hidden=hidden,
        batch_size=batch_size,
        momentum=momentum,
        nesterov=nesterov,
        lr=0.001,
    )


@pytest.mark.parametrize("hidden", [(1,), (2,), (7, 3), (33,), (101,)], ids=str)
def test_batches_of_one_image_are_pytorchs_bit_for_bit(hidden):
    """The smallest products, for which libraries have kernels of their own."""
    assert_identical_to_pytorch("relu", n=100, epochs=2, hidden=hidden, batch_size=1, lr=0.001)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("hidden", [(10,), (17,), (65,), (50,) * 5], ids=str)
def test_odd_widths_are_pytorchs_bit_for_bit(hidden, threads):
    """Kernels round by where a tensor starts in memory: each starts on a cache line."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_identical_to_pytorch("relu", n=1_000, epochs=3, hidden=hidden, lr=0.01)
    finally:
        torch.set_num_threads(before)


def test_a_batch_larger_than_the_data_is_one_batch():
    """As a DataLoader has it."""
    assert len(assert_identical_to_pytorch("relu", n=50, epochs=3, batch_size=1_000)) == 3


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("hidden", [(50,), (33, 7)], ids=str)
def test_a_network_in_a_stack_is_the_network_alone(activation, hidden):
    """One network is a stack of one: three together train as each does by itself."""
    data = images(1_050)
    widths = (784, *hidden, 10)
    alone = [
        model.initialize(widths, find("he"), ACTIVATIONS["relu"], bias_init="pytorch", seed=seed)
        for seed in range(3)
    ]
    stack = model.Parameters(widths, members=3)
    for member, parameters in enumerate(alone):
        for name, tensor in stack.state(member).items():
            tensor.copy_(parameters.state()[name])
    _, together = run(stack, activation, data, epochs=3)
    for member, parameters in enumerate(alone):
        _, losses = run(parameters, activation, data, epochs=3)
        assert [loss[member] for loss in together] == [loss for (loss,) in losses]
        assert model.weights_sha256(stack.state(member)) == model.weights_sha256(parameters.state())


def test_stopping_to_look_changes_nothing():
    """Evaluating at every step leaves losses and weights as they were."""
    data = images(1_000)
    quiet = model.initialize(
        (784, 30, 10), find("he"), ACTIVATIONS["relu"], bias_init="zeros", seed=0
    )
    looked_at = quiet.copy_to("cpu")
    _, losses = run(quiet, "relu", data, epochs=2)
    seen = []
    for checkpoint in train.train(
        looked_at,
        ACTIVATIONS["relu"],
        data,
        order=lambda epoch: train.batch_order(1_000, 0, epoch),
        rates=train.learning_rates(0.1, 0.96, 2),
        batch_size=100,
        momentum=0.9,
        nesterov=True,
        eval_every=1,
    ):
        measure.evaluate(looked_at, ACTIVATIONS["relu"], data)
        seen += checkpoint.losses
    assert seen == losses
    assert torch.equal(quiet.flat, looked_at.flat)


def test_checkpoints_come_at_the_start_the_interval_and_the_end():
    """Steps count updates; the rate is that of the last one; no loss is told twice."""
    data = images(1_000)
    parameters = model.initialize(
        (784, 10), find("he"), ACTIVATIONS["relu"], bias_init="zeros", seed=0
    )
    checkpoints, losses = run(parameters, "relu", data, epochs=3, eval_every=7)
    assert [checkpoint.step for checkpoint in checkpoints] == [0, 7, 14, 21, 28, 30]
    assert [len(checkpoint.losses) for checkpoint in checkpoints] == [0, 7, 7, 7, 7, 2]
    rates = train.learning_rates(0.1, 0.96, 3)
    assert [checkpoint.lr for checkpoint in checkpoints] == [rates[e] for e in (0, 0, 1, 2, 2, 2)]
    assert len(losses) == train.iterations(1_000, 100, 3) == 30


def test_rates_are_those_of_step_lr():
    """The tutorial's five epochs, and StepLR's own bits."""
    rates = train.learning_rates(0.1, 0.96, 5)
    assert rates == pytest.approx([0.1, 0.096, 0.09216, 0.0884736, 0.084934656])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.96)
    theirs = []
    for _ in rates:
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == theirs


def test_batch_order_is_a_permutation_of_seed_and_epoch_alone():
    """Every image once an epoch, in another order in each, the global stream left alone."""
    before = torch.get_rng_state()
    first = train.batch_order(1_000, 0, 0)
    assert torch.equal(before, torch.get_rng_state())
    assert sorted(first.tolist()) == list(range(1_000))
    assert torch.equal(first, train.batch_order(1_000, 0, 0))
    assert not torch.equal(first, train.batch_order(1_000, 0, 1))
    assert not torch.equal(first, train.batch_order(1_000, 1, 0))


def test_divergence_stops_at_the_step_whose_loss_is_not_finite():
    """Everything before it is kept, and the last checkpoint says so."""
    data = images(1_000)
    parameters = model.initialize(
        (784, 50, 50, 10), find("normal"), ACTIVATIONS["relu"], bias_init="zeros", seed=0
    )
    checkpoints, losses = run(parameters, "linear", data, epochs=5, lr=10.0, eval_every=2)
    last = checkpoints[-1]
    assert last.diverged
    assert not any(checkpoint.diverged for checkpoint in checkpoints[:-1])
    assert 0 < last.step == len(losses) < 50
    assert all(math.isfinite(loss) for (loss,) in losses)


def test_a_network_that_starts_without_a_finite_loss_diverges_at_step_0():
    """Before any update."""
    parameters = model.initialize(
        (784, 50, 10), find("normal:std=1e30"), ACTIVATIONS["relu"], bias_init="zeros", seed=0
    )
    checkpoints, losses = run(parameters, "linear", images(100), epochs=1)
    assert [(c.step, c.diverged) for c in checkpoints] == [(0, False), (0, True)]
    assert losses == []


def test_zero_weights_start_at_ln_10_and_only_the_output_bias_learns():
    """With zero weights and biases and ReLU every weight gradient is exactly 0."""
    parameters = model.initialize(
        (784, 30, 30, 10), find("zero"), ACTIVATIONS["relu"], bias_init="zeros", seed=0
    )
    _, losses = run(parameters, "relu", images(1_000), epochs=2)
    assert losses[0][0] == pytest.approx(math.log(10), abs=1e-6)
    assert not any(weight.any() for weight in parameters.weights)
    assert [bool(bias.any()) for bias in parameters.biases] == [False, False, True]

"""The training loop, held bit for bit against the usual PyTorch one."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.data import TensorDataset

from bench import reference
from initflow.core import machine
from initflow.core.configurations import TrainConfig
from initflow.diagnostics import measure
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.training import model, optimizers, propagation, trainer
from initflow.training.splits import Split
from tests.conftest import ROOT


def images(n, pixels=784, seed=0):
    """MNIST-shaped data that can be learned: noisy copies of ten patterns."""
    g = torch.Generator().manual_seed(seed)
    patterns = torch.rand(10, pixels, generator=g)
    labels = torch.randint(10, (n,), generator=g)
    noisy = patterns[labels] + torch.rand(n, pixels, generator=g)
    return Split((noisy * 127).to(torch.uint8).to(torch.float32).div_(255), labels)


def recipe(activation, *, epochs, lr=0.1, gamma=0.96, seed=0, momentum=0.9, nesterov=True):
    rates = optimizers.step_rates(lr, gamma, epochs)
    sgd = optimizers.Optimizer("sgd", momentum, nesterov)
    return trainer.Recipe(ACTIVATIONS[activation], seed, rates, sgd)


def population(parameters, recipes, data, *, batch_size=100, eval_every=500):
    """Train to the end; the checkpoints, and every loss of each member."""
    trained = trainer.Trainer(parameters, recipes, data)
    checkpoints = list(trained.train(batch_size=batch_size, eval_every=eval_every))
    losses = [[] for _ in recipes]
    for checkpoint in checkpoints:
        for member, more in checkpoint.losses.items():
            losses[member] += more
    return checkpoints, losses


def run(parameters, activation, data, *, epochs, batch_size=100, eval_every=500, **settings):
    """One network, or several of one recipe, trained to the end."""
    recipes = [recipe(activation, epochs=epochs, **settings)] * parameters.members
    return population(parameters, recipes, data, batch_size=batch_size, eval_every=eval_every)


def assert_identical_to_pytorch(
    activation, *, n, epochs, hidden=(100,), batch_size=100, momentum=0.9, nesterov=True, lr=0.1
):
    data = images(n)
    parameters = model.initialize(
        (784, *hidden, 10), find("he"), ACTIVATIONS["relu"], bias_init="pytorch", seed=0
    )
    initial = {name: tensor.clone() for name, tensor in parameters.state().items()}
    _, (losses,) = run(
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
        [trainer.batch_order(n, 0, epoch) for epoch in range(epochs)],
        batch_size=batch_size,
        momentum=momentum,
        nesterov=nesterov and momentum > 0,
        lr=lr,
    )
    assert len(losses) == math.ceil(n / batch_size) * epochs
    assert losses == expected
    assert all(torch.equal(parameters.state()[name], trained[name]) for name in trained)
    return losses


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_1200_iterations_are_pytorchs_bit_for_bit(activation, threads):
    """Losses and weights of nn.Linear, torch.optim.SGD, StepLR and a DataLoader."""
    with machine.threads(threads):
        losses = assert_identical_to_pytorch(activation, n=6_000, epochs=20)
    assert len(losses) == 1_200
    assert min(losses) < losses[0] / 2  # something was learned


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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("hidden", [(1,), (2,), (7, 3), (33,), (101,), (2, 1, 16)], ids=str)
def test_batches_of_one_image_are_pytorchs_bit_for_bit(hidden, threads):
    """The smallest products, for which libraries have kernels of their own."""
    one = {"n": 50, "epochs": 2, "batch_size": 1, "lr": 0.01}
    with machine.threads(threads):
        assert_identical_to_pytorch("tanh", hidden=hidden, **one)


def test_single_numbers_are_pytorchs_bit_for_bit_by_other_kernels():
    """Of MKL's for other processors, the sum of a product depends on the order of its factors."""
    subprocess.run(
        [sys.executable, "-c", "from tests.training.test_train import *; units_of_one()"],
        env={**os.environ, "MKL_CBWR": "COMPATIBLE"},
        cwd=ROOT,
        check=True,
    )


def units_of_one():
    for hidden in ((1,), (5, 1), (1, 2)):
        assert_identical_to_pytorch("tanh", n=8, epochs=2, hidden=hidden, batch_size=7, lr=0.1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("hidden", [(10,), (17,), (65,), (50,) * 5], ids=str)
def test_odd_widths_are_pytorchs_bit_for_bit(hidden, threads):
    """Kernels round by where a tensor starts in memory: each starts on a cache line."""
    with machine.threads(threads):
        assert_identical_to_pytorch("relu", n=1_000, epochs=3, hidden=hidden, lr=0.01)


def test_a_batch_larger_than_the_data_is_one_batch():
    """As a DataLoader has it."""
    assert len(assert_identical_to_pytorch("relu", n=50, epochs=3, batch_size=1_000)) == 3


def drawn(widths, seed, scheme="he"):
    return model.initialize(
        widths, find(scheme), ACTIVATIONS["relu"], bias_init="pytorch", seed=seed
    )


def assert_identical_to_alone(recipes, data, *, hidden=(100,), batch_size=100):
    """Every loss and the final weights of each, together and by itself."""
    alone = [drawn((784, *hidden, 10), member) for member in range(len(recipes))]
    stack = model.Parameters.stack(alone, "cpu")
    _, together = population(stack, recipes, data, batch_size=batch_size)
    for member, (parameters, own) in enumerate(zip(alone, recipes, strict=True)):
        _, (losses,) = population(parameters, [own], data, batch_size=batch_size)
        assert together[member] == losses
        assert model.weights_sha256(stack.state(member)) == model.weights_sha256(parameters.state())
    return together


@pytest.mark.parametrize("threads", [1, 2])
def test_a_network_in_a_population_is_the_network_alone(threads):
    """Over 300 iterations, with other seeds, rates, momenta and activation functions beside it."""
    recipes = [
        recipe("tanh", epochs=20, seed=3),
        recipe("tanh", epochs=20, seed=3, lr=0.02, gamma=0.9),
        recipe("relu", epochs=20, seed=3),
        recipe("relu", epochs=20, seed=8),
        recipe("relu", epochs=20, seed=8),
        recipe("tanh", epochs=20, seed=8, momentum=0.5, nesterov=False),
        recipe("tanh", epochs=20, seed=1, momentum=0.0),
    ]
    with machine.threads(threads):
        losses = assert_identical_to_alone(recipes, images(1_500))
    assert [len(own) for own in losses] == [300] * 7
    assert all(own[-1] < own[0] for own in losses)
    assert losses[3] != losses[4]  # of other weights


@pytest.mark.parametrize("hidden", [(), (1, 2), (33, 7, 3), (32,) * 6, (300, 100)], ids=str)
@pytest.mark.parametrize("batch_size", [13, 64])
def test_so_it_is_in_every_shape(hidden, batch_size):
    """All activation functions side by side; odd widths and batches, many layers and none."""
    recipes = [
        recipe(name, epochs=2, seed=seed, lr=0.02) for seed in (0, 1) for name in ACTIVATIONS
    ]
    assert_identical_to_alone(recipes, images(500), hidden=hidden, batch_size=batch_size)


def test_one_that_diverges_is_frozen_and_the_others_go_on():
    """It keeps what it had at that step; theirs are the bits that they have without it."""
    data = images(1_000)
    widths = (784, 50, 50, 10)
    recipes = [
        recipe("linear", epochs=5, seed=0, lr=0.01),
        recipe("linear", epochs=5, seed=0, lr=10.0),
        recipe("linear", epochs=5, seed=0, lr=0.005),
        recipe("linear", epochs=5, seed=1, lr=30.0),
    ]
    alone = [drawn(widths, 0, scheme) for scheme in ("he", "normal", "he", "normal")]
    stack = model.Parameters.stack(alone, "cpu")
    checkpoints, together = population(stack, recipes, data, eval_every=7)
    ended = {member: c.step for c in checkpoints if c.diverged for member in c.rates}
    assert set(ended) == {1, 3}
    assert all(0 < step < 50 and step % 7 for step in ended.values())
    for member, (parameters, own) in enumerate(zip(alone, recipes, strict=True)):
        own_checkpoints, (losses,) = population(parameters, [own], data, eval_every=7)
        assert together[member] == losses
        assert len(losses) == ended.get(member, 50) == own_checkpoints[-1].step
        assert model.weights_sha256(stack.state(member)) == model.weights_sha256(parameters.state())


def test_one_that_is_told_to_stop_stays_as_it_is():
    """And the last checkpoint is not of it."""
    stack = model.Parameters.stack([drawn((784, 20, 10), seed) for seed in range(3)], "cpu")
    population_ = trainer.Trainer(stack, [recipe("relu", epochs=2)] * 3, images(500))
    for checkpoint in population_.train(batch_size=100, eval_every=3):
        if checkpoint.step == 3:
            population_.stop(1)
            kept = model.weights_sha256(stack.state(1))
    assert list(checkpoint.rates) == [0, 2]
    assert model.weights_sha256(stack.state(1)) == kept
    assert population_.running == [0, 2]


def test_together_or_one_by_one_is_found_by_trying():
    """Where a batched product rounds differently it is not used; where it does not, it is."""
    g = torch.Generator().manual_seed(0)
    a, b, out = (torch.randn(3, n, n, generator=g) for n in (8, 8, 8))
    product = propagation._Operation(
        lambda x, y, z: torch.mm(x, y, out=z), lambda x, y, z: torch.bmm(x, y, out=z)
    )
    used = []
    off = propagation._Operation(
        lambda x, y, z: used.append("each") or torch.mm(x, y, out=z),
        lambda x, y, z: used.append("together") or z.copy_(torch.bmm(x, y) * (1 + 1e-6)),
    )
    same = propagation._Operation(
        lambda x, y, z: used.append("each") or torch.mm(x, y, out=z),
        lambda x, y, z: (
            used.append("together")
            or [torch.mm(*m[:2], out=m[2]) for m in zip(x, y, z, strict=True)]
        ),
    )
    for call in product.plan(a, b, out):
        call()
    assert torch.equal(out, torch.stack([x @ y for x, y in zip(a, b, strict=True)]))
    for operation, way in ((off, ["each"] * 3), (same, ["together"])):
        calls = operation.plan(a, b, out)  # tried here
        used.clear()
        for call in calls:
            call()
        assert used == way


@pytest.mark.parametrize(
    ("threads", "members", "at_once"),
    [
        (1, 5, 5),
        (2, 5, 4),
        (2, 4, 4),
        (2, 2, 2),
        (2, 3, 2),
        (2, 1, 0),
        (3, 5, 3),
        (3, 2, 2),
        (4, 5, 4),
    ],
)
def test_threads_that_take_whole_networks_share_them_evenly(threads, members, at_once):
    """Those left over are done one by one, by all threads; with an operation they divide, none."""
    g = torch.Generator().manual_seed(0)
    stacks = [torch.randn(n, 8, 8, generator=g) for n in (members, 1, members)]
    expected = stacks[0] * stacks[1]
    used = []
    for undivided, wanted in ((True, at_once), (False, members if members > 1 else 0)):
        multiply = propagation._Operation(
            lambda x, y, z: used.append(0) or torch.mul(x, y, out=z),
            lambda x, y, z: used.append(len(z)) or torch.mul(x, y, out=z),
            undivided=undivided,
        )
        with machine.threads(threads):
            calls = multiply.plan(*stacks)
        used.clear()
        for call in calls:
            call()
        assert used == [wanted] * (wanted > 0) + [0] * (members - wanted)
        assert torch.equal(stacks[-1], expected)
        stacks[-1].zero_()


@pytest.mark.parametrize(
    ("sources", "members", "expected"),
    [
        ([0, 0, 0], [0, 1, 2], [(0, 3)]),
        ([0, 1, 2], [0, 1, 2], [(0, 3)]),
        ([0, 1, 2, 3], [0, 2, 3], [(0, 1), (2, 4)]),  # the second has stopped
        ([0, 0, 1, 1], [0, 1, 2, 3], [(0, 2), (2, 4)]),
        ([0, 0, 1, 2, 2, 3, 4], range(7), [(0, 2), (2, 3), (3, 5), (5, 7)]),
        ([2, 1, 0], [0, 1, 2], [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_neighbours_whose_batches_lie_in_a_row_are_one_product(sources, members, expected):
    """Or share one; all others have products of their own."""
    found = propagation._by_source(sources, members)
    assert [(at.start, at.stop) for at in found] == expected
    images = torch.rand(max(sources) + 1, 5, 4)
    networks = model.Parameters((4, 3, 2), len(sources))
    both = propagation.Pass(
        networks, [ACTIVATIONS["relu"]] * len(sources), 5, sources=sources, members=members
    )
    for at, x in both._inputs(0, images):
        given = x.expand(at.stop - at.start, -1, -1)
        wanted = images[[sources[member] for member in range(at.start, at.stop)]]
        assert torch.equal(given, wanted)


@pytest.mark.parametrize("name", [name for name, one in ACTIVATIONS.items() if not one.rounds])
def test_where_an_activation_does_not_round_an_entry_has_its_bits_anywhere(name):
    """Alone, in a few and among many, of numbers of all sizes: its products are exact or one."""
    of = ACTIVATIONS[name]
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (3, 100_003), generator=g, dtype=torch.int32)
    x, gradient, out = bits.view(torch.float32).nan_to_num_()
    y = torch.empty_like(x)
    of.forward(x, y)
    of.backward(gradient, x, y, out)
    for size in (1, 7, 33):
        pieces = [tensor[: 100 * size].split(size) for tensor in (x, gradient, y, out)]
        for part, of_gradient, expected, expected_gradient in zip(*pieces, strict=True):
            found, found_gradient = torch.empty_like(part), torch.empty_like(part)
            of.forward(part, found)
            of.backward(of_gradient, part, found, found_gradient)
            assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
            assert torch.equal(
                found_gradient.view(torch.int32), expected_gradient.view(torch.int32)
            )


def test_stopping_to_look_changes_nothing():
    """Evaluating at every step leaves losses and weights as they were."""
    data = images(1_000)
    quiet = drawn((784, 30, 10), 0)
    looked_at = quiet.copy_to("cpu")
    _, (losses,) = run(quiet, "relu", data, epochs=2)
    seen = []
    looking = trainer.Trainer(looked_at, [recipe("relu", epochs=2)], data)
    for checkpoint in looking.train(batch_size=100, eval_every=1):
        measure.evaluate(looked_at, [ACTIVATIONS["relu"]], data)
        seen += checkpoint.losses[0]
    assert seen == losses
    assert torch.equal(quiet.flat, looked_at.flat)


def test_checkpoints_come_at_the_start_the_interval_and_the_end():
    """Steps count updates; the rate is that of the last one; no loss is told twice."""
    data = images(1_000)
    parameters = model.initialize(
        (784, 10), find("he"), ACTIVATIONS["relu"], bias_init="zeros", seed=0
    )
    checkpoints, (losses,) = run(parameters, "relu", data, epochs=3, eval_every=7)
    assert [checkpoint.step for checkpoint in checkpoints] == [0, 7, 14, 21, 28, 30]
    assert [len(checkpoint.losses[0]) for checkpoint in checkpoints] == [0, 7, 7, 7, 7, 2]
    rates = optimizers.step_rates(0.1, 0.96, 3)
    assert [c.rates[0] for c in checkpoints] == [rates[e] for e in (0, 0, 1, 2, 2, 2)]
    assert len(losses) == trainer.iterations(TrainConfig(epochs=3), 1_000) == 30


@pytest.mark.parametrize("updates", [1, 7, 10, 13, 30, 99])
def test_a_training_ends_after_so_many_updates(updates):
    """With the bits that the whole one had there, and one checkpoint at its end."""
    data = images(1_000)
    starts = [
        model.initialize((784, 10), find("he"), ACTIVATIONS["relu"], bias_init="zeros", seed=0)
        for _ in range(2)
    ]
    whole, part = (trainer.Trainer(one, [recipe("relu", epochs=3)], data) for one in starts)
    steps, losses = [], []
    for checkpoint in part.train(batch_size=100, eval_every=7, updates=updates):
        steps.append(checkpoint.step)
        losses += checkpoint.losses[0]
    made = min(updates, 30)
    assert steps == sorted({*range(0, made, 7), made})
    for checkpoint in whole.train(batch_size=100, eval_every=1):
        if checkpoint.step == made:
            break
    assert torch.equal(starts[0].flat, starts[1].flat)
    assert len(losses) == made
    config = TrainConfig(epochs=3, updates=updates)
    assert trainer.iterations(config, 1_000) == made


def test_batch_order_is_a_permutation_of_seed_and_epoch_alone():
    """Every image once an epoch, in another order in each, the global stream left alone."""
    before = torch.get_rng_state()
    first = trainer.batch_order(1_000, 0, 0)
    assert torch.equal(before, torch.get_rng_state())
    assert sorted(first.tolist()) == list(range(1_000))
    assert torch.equal(first, trainer.batch_order(1_000, 0, 0))
    assert not torch.equal(first, trainer.batch_order(1_000, 0, 1))
    assert not torch.equal(first, trainer.batch_order(1_000, 1, 0))


def test_divergence_stops_at_the_step_whose_loss_is_not_finite():
    """Everything before it is kept, and the last checkpoint says so."""
    data = images(1_000)
    parameters = model.initialize(
        (784, 50, 50, 10), find("normal"), ACTIVATIONS["relu"], bias_init="zeros", seed=0
    )
    checkpoints, (losses,) = run(parameters, "linear", data, epochs=5, lr=10.0, eval_every=2)
    last = checkpoints[-1]
    assert last.diverged
    assert not any(checkpoint.diverged for checkpoint in checkpoints[:-1])
    assert 0 < last.step == len(losses) < 50
    assert all(map(math.isfinite, losses))


def test_a_network_that_starts_without_a_finite_loss_diverges_at_step_0():
    """Before any update."""
    parameters = model.initialize(
        (784, 50, 10), find("normal:std=1e30"), ACTIVATIONS["relu"], bias_init="zeros", seed=0
    )
    checkpoints, (losses,) = run(parameters, "linear", images(100), epochs=1)
    assert [(c.step, c.diverged) for c in checkpoints] == [(0, False), (0, True)]
    assert losses == []


def test_zero_weights_start_at_ln_10_and_only_the_output_bias_learns():
    """With zero weights and biases and ReLU every weight gradient is exactly 0."""
    parameters = model.initialize(
        (784, 30, 30, 10), find("zero"), ACTIVATIONS["relu"], bias_init="zeros", seed=0
    )
    _, (losses,) = run(parameters, "relu", images(1_000), epochs=2)
    assert losses[0] == pytest.approx(math.log(10), abs=1e-6)
    assert not any(weight.any() for weight in parameters.weights)
    assert [bool(bias.any()) for bias in parameters.biases] == [False, False, True]

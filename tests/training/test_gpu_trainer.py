"""Stacks on a GPU, by the device that is none: numbers, what is launched, and what is read."""

import math
from dataclasses import replace

import pytest
import torch

from initflow.core import machine
from initflow.core.configurations import TrainConfig
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.training import gpu_trainer, model, optimizers, trainer
from initflow.training.splits import Split
from tests import elsewhere
from tests.training.test_train import images, recipe

PIXELS, IMAGES, BATCH = 37, 220, 50  # of which the last of an epoch is smaller
# Networks of one stack, whose settings differ as those of a comparison or of a study.
STACKS = {
    "sgd": [
        {},
        {"momentum": 0.5, "nesterov": False},
        {"momentum": 0.0},
        {"weight_decay": 0.05, "clip": 0.3},
        {"lr": 0.02, "gamma": 0.5},
        {"schedule": "cosine", "seed": 1},
        {"parametrization": "mup", "base_width": 8},
    ],
    "velocity": [{"nesterov": False}, {"nesterov": False, "momentum": 0.5}],
    "plain": [{"momentum": 0.0}, {"momentum": 0.0, "weight_decay": 0.1}],
    "adam": [
        {},
        {"weight_decay": 0.1, "seed": 1},
        {"betas": (0.3, 0.9), "clip": 0.5},
        {"eps": 0.1, "betas": (0.0, 0.0)},
        {"parametrization": "mup", "base_width": 8},
    ],
    "adamw": [{}, {"weight_decay": 0.0, "lr": 0.03}, {"weight_decay": 0.3, "schedule": "cosine"}],
}


def data(n=IMAGES):
    return images(n, PIXELS)


def drawn(seed, widths=(PIXELS, 17, 10), scheme="he"):
    return model.initialize(
        widths, find(scheme), ACTIVATIONS["relu"], bias_init="pytorch", seed=seed
    )


def losses_of(training, members, *, batch_size=BATCH, eval_every=7):
    """All losses of each network, and where checkpoints were of which."""
    losses, told = [[] for _ in range(members)], []
    for checkpoint in training.train(batch_size=batch_size, eval_every=eval_every):
        for member, more in checkpoint.losses.items():
            losses[member] += more
        told.append((checkpoint.step, tuple(checkpoint.rates.items()), checkpoint.diverged))
    return losses, told


def there(networks, recipes, split):
    """The stack on the other device, and what trains it."""
    stack = model.Parameters.stack(networks, elsewhere.DEVICE)
    on_device = split.to(torch.device(elsewhere.DEVICE))
    return stack, gpu_trainer.GpuTrainer(stack, recipes, on_device)


@elsewhere.possible
@pytest.mark.parametrize("name", STACKS)
def test_networks_train_there_as_they_do_on_the_cpu(name):
    """Whatever settings of their own they have: but for rounding, at the same checkpoints."""
    optimizer = name if name in optimizers.NAMES else "sgd"
    usual = TrainConfig(epochs=3, optimizer=optimizer, lr=0.1 if optimizer == "sgd" else 0.01)
    configs = [replace(usual, **own) for own in STACKS[name]]
    recipes = [trainer.Recipe.of(config, (PIXELS, 17, 10)) for config in configs]
    networks = [drawn(seed) for seed in range(len(configs))]
    stack = model.Parameters.stack(networks, "cpu")
    here, told = losses_of(trainer.Trainer(stack, recipes, data()), len(configs))
    other, training = there(networks, recipes, data())
    found, told_there = losses_of(training, len(configs))
    assert told_there == told
    for one, theirs in zip(here, found, strict=True):
        assert theirs == pytest.approx(one, rel=2e-4)
    assert torch.allclose(stack.flat, other.flat.cpu(), rtol=1e-3, atol=1e-4)
    assert training.exact(BATCH) == [False] * len(configs)


@elsewhere.possible
def test_every_activation_function_trains_there():
    """Side by side, under several seeds."""
    recipes = [recipe(name, epochs=3, seed=n % 3, lr=0.05) for n, name in enumerate(ACTIVATIONS)]
    networks = [drawn(seed, (PIXELS, 12, 9, 10)) for seed in range(len(recipes))]
    stack = model.Parameters.stack(networks, "cpu")
    here, _ = losses_of(trainer.Trainer(stack, recipes, data()), len(recipes))
    _, training = there(networks, recipes, data())
    found, _ = losses_of(training, len(recipes))
    for one, theirs in zip(here, found, strict=True):
        assert theirs == pytest.approx(one, rel=2e-4)


@elsewhere.possible
def test_one_that_diverges_keeps_what_it_had_at_that_step():
    """That is told at the next checkpoint, of the step where it was; the others go on."""
    widths, split = (784, 50, 50, 10), images(1_000)
    recipes = [
        recipe("linear", epochs=3, seed=seed, lr=lr)
        for seed, lr in ((0, 0.01), (0, 10.0), (0, 0.005), (1, 30.0))
    ]
    schemes = ("he", "normal", "he", "normal")
    networks = [drawn(0, widths, scheme) for scheme in schemes]
    stack = model.Parameters.stack(networks, "cpu")
    on_cpu = trainer.Trainer(stack, recipes, split)
    here, _ = losses_of(on_cpu, 4, batch_size=100)
    other, training = there(networks, recipes, split)
    found, told = losses_of(training, 4, batch_size=100)
    lost = {member: step for step, rates, diverged in told if diverged for member, _ in rates}
    assert set(lost) == {1, 3}
    assert training.running == on_cpu.running == [0, 2]
    for member, (one, theirs) in enumerate(zip(here, found, strict=True)):
        assert all(map(math.isfinite, theirs))
        assert len(theirs) == lost.get(member, 30)
        if member in training.running:
            assert theirs == pytest.approx(one, rel=2e-4)
        else:  # it grows beyond all bounds: where that ends is a matter of rounding
            assert abs(len(one) - len(theirs)) <= 1
            assert theirs[:5] == pytest.approx(one[:5], rel=2e-4)
    # Trained for so many updates only, they have the same parameters.
    for member, steps in lost.items():
        alone, again = there([networks[member]], [recipes[member]], split)
        for checkpoint in again.train(batch_size=100, eval_every=100, updates=steps):
            assert not checkpoint.diverged
        for name, tensor in alone.state().items():
            theirs = other.state(member)[name].cpu()
            assert torch.allclose(tensor.cpu(), theirs, rtol=1e-3, equal_nan=True)


@elsewhere.possible
def test_a_training_without_a_network_left_ends():
    """At the checkpoint that finds the last one lost, though more updates were asked for."""
    networks = [drawn(0)]
    networks[0].weights[0].fill_(math.inf)
    _, training = there(networks, [recipe("relu", epochs=50)], data())
    checkpoints = list(training.train(batch_size=BATCH, eval_every=3))
    assert [(c.step, c.diverged) for c in checkpoints] == [(0, False), (0, True)]
    assert training.running == []


@elsewhere.possible
def test_one_that_is_told_to_stop_stays_as_it_is():
    """And the last checkpoint is not of it."""
    networks = [drawn(seed) for seed in range(3)]
    stack, training = there(networks, [recipe("relu", epochs=2)] * 3, data())
    for checkpoint in training.train(batch_size=BATCH, eval_every=3):
        if checkpoint.step == 3:
            training.stop(1)
            kept = stack.member(1).flat.cpu()
    assert list(checkpoint.rates) == [0, 2]
    assert torch.equal(stack.member(1).flat.cpu(), kept)
    assert not torch.equal(stack.member(0).flat.cpu(), networks[0].flat)


@elsewhere.possible
@pytest.mark.parametrize("updates", [1, 5, 7, 10, 1_000])
def test_a_training_ends_after_so_many_updates(updates):
    """With a checkpoint there, as on the CPU."""
    ways = [
        trainer.Trainer(drawn(0), [recipe("relu", epochs=3)], data()),
        there([drawn(0)], [recipe("relu", epochs=3)], data())[1],
    ]
    steps = [
        [c.step for c in way.train(batch_size=BATCH, eval_every=5, updates=updates)] for way in ways
    ]
    assert steps[0] == steps[1]


def recipes_of(members, seeds):
    """Of two activation functions, one after the other."""
    return [
        recipe("relu" if member < members / 2 else "tanh", epochs=2, seed=member % seeds)
        for member in range(members)
    ]


def update(members, seeds, monkeypatch, settings):
    """What an update does there, and what was recorded."""
    recordings = []
    record = machine.recorded
    monkeypatch.setattr(
        machine, "recorded", lambda update, device: recordings.append(1) or record(update, device)
    )
    recipes = [replace(one, **settings) for one in recipes_of(members, seeds)]
    _, training = there([drawn(seed) for seed in range(members)], recipes, data(6 * BATCH))
    steps = training.train(batch_size=BATCH, eval_every=2)
    for _ in range(2):
        assert not next(steps).diverged  # at 0, and at 2 when all is set up
    with elsewhere.work() as work:
        next(steps)
    monkeypatch.setattr(machine, "recorded", record)
    return work, len(recordings)


@elsewhere.possible
@pytest.mark.parametrize(
    "settings",
    [{}, {"optimizer": optimizers.Optimizer("adam"), "clip": 1.0}],
    ids=["sgd", "adam, clipped"],
)
def test_what_is_launched_grows_with_neither_networks_nor_seeds(monkeypatch, settings):
    """And one read at a checkpoint is all that is read; one recording serves all updates."""
    few, _ = update(2, 1, monkeypatch, settings)
    for members, seeds in ((2, 2), (20, 1), (20, 5), (20, 20)):
        many, recordings = update(members, seeds, monkeypatch, settings)
        assert many == few
        assert recordings == 1
    assert few.reads == 1


@elsewhere.possible
def test_a_gpu_counts_what_it_does():
    """Or the counts would say nothing."""
    one = torch.ones(3, device=elsewhere.DEVICE)
    with elsewhere.work() as work:
        assert (one + 1).tolist() == [2.0] * 3
        (one + 1).cpu()
    assert work.reads == 2
    assert work.operations >= 4


@elsewhere.possible
def test_a_batch_as_large_as_the_data_is_the_data():
    """And larger ones."""
    split = Split(*(of_all[:30] for of_all in (data().images, data().labels)))
    found = [
        losses_of(there([drawn(0)], [recipe("relu", epochs=4)], split)[1], 1, batch_size=size)
        for size in (30, 1_000)
    ]
    assert found[0] == found[1]
    assert len(found[0][0][0]) == 4

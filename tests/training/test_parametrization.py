"""Maximal updates: the rate of each tensor and the output's weights, held against torch.optim."""

import math

import pytest
import torch

from bench import reference
from initflow.core import machine
from initflow.core.configurations import TrainConfig
from initflow.diagnostics import measure, networks
from initflow.errors import SettingError
from initflow.initializers.plugins import find
from initflow.training import optimizers, parametrization, trainer
from initflow.training.splits import Splits
from tests.training.test_optimizers import BATCH, PIXELS, images

BASE, EPOCHS = 8, 10
HIDDEN = (24, 4)  # 3 and 1/2 of the base width
ADAM = [("fc1", 1, 1), ("fc2", 1 / 3, 1), ("fc3", 2, 1)]
# What Table 3 of Yang, Hu et al. gives the weight and the bias of each layer.
FACTORS = {
    "sgd": [("fc1", 3, 3), ("fc2", 1 / 6, 1 / 2), ("fc3", 2, 1)],
    "adam": ADAM,
    "adamw": ADAM,
}


def config(**own):
    shared = {"hidden": HIDDEN, "epochs": EPOCHS, "batch_size": BATCH, "activation": "tanh"}
    maximal = {"parametrization": "mup", "base_width": BASE}
    return TrainConfig(**shared | maximal | own)


def splits():
    data = images()
    return Splits("some", data, None, data, 0.0, 1.0, "0" * 64, "here", (1, 1, PIXELS), 10)


@pytest.mark.parametrize("optimizer", FACTORS)
def test_the_factors_of_the_rates_are_those_of_the_paper(optimizer):
    """Of each weight and bias, between hidden layers of unequal widths too."""
    found = parametrization.rate_factors(config(optimizer=optimizer), (PIXELS, *HIDDEN, 10))
    expected = [factor for _, *both in FACTORS[optimizer] for factor in both]
    assert found == pytest.approx(expected, rel=1e-15)


def usual(state, of, data):
    """A loop with torch.optim's parameter groups; its losses, and the trained tensors."""
    network = reference.network(state, of.activation)
    groups = []
    decay = of.weight_decay or 0.0
    layers = [one for one in network.modules() if isinstance(one, torch.nn.Linear)]
    for layer, (_, *both) in zip(layers, FACTORS[of.optimizer], strict=True):
        for tensor, factor in zip((layer.weight, layer.bias), both, strict=True):
            own = {"lr": of.lr * factor, "weight_decay": decay / factor}
            groups.append({"params": [tensor], **own})
    sgd = {"momentum": of.momentum, "nesterov": of.nesterov}
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    optimizer = make[of.optimizer](groups, **(sgd if of.optimizer == "sgd" else {}))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=of.gamma)
    losses = []
    for epoch in range(of.epochs):
        for batch in trainer.batch_order(len(data), of.seed, epoch).split(of.batch_size):
            optimizer.zero_grad()
            logits = network(data.images[batch])
            loss = torch.nn.functional.cross_entropy(logits, data.labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
    return losses, [parameter.detach() for parameter in network.parameters()]


SETTINGS = {
    "sgd": [{"lr": 0.1}, {"lr": 0.3, "weight_decay": 0.01}, {"lr": 0.3, "gamma": 0.9}],
    "adam": [{"lr": 0.01}, {"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.03}],
    "adamw": [{"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.03, "weight_decay": 0.2}],
}


@pytest.mark.parametrize("rounds_alike", [True, False])
@pytest.mark.parametrize("optimizer", SETTINGS)
def test_a_stack_is_pytorchs_parameter_groups_bit_for_bit(optimizer, rounds_alike, monkeypatch):
    """Beside a network of the standard parametrization, whose bits stay its own."""
    if not rounds_alike:
        monkeypatch.setattr(optimizers.Optimizer, "rounds_alike", lambda _: False)
    data = splits().train
    of = [
        config(optimizer=optimizer, seed=n % 2, **own) for n, own in enumerate(SETTINGS[optimizer])
    ]
    of = [*of, of[-1]]  # two neighbours that share all take their steps as one
    plain = {"parametrization": "standard", "base_width": 100, "optimizer": optimizer}
    of.append(config(**plain, lr=0.01))
    schemes = [find("he")] * len(of)
    with machine.threads(1):
        starts = [networks.initialize(one, find("he"), splits()) for one in of]
        stack = networks.Stack(starts, of, schemes, data)
        losses = [[] for _ in of]
        for checkpoint in stack.trainer.train(batch_size=BATCH, eval_every=1_000):
            for member, more in checkpoint.losses.items():
                losses[member] += more
        for n, one in enumerate(of[:-1]):
            expected, trained = usual(starts[n].state(), one, data)
            assert losses[n] == expected
            assert min(expected) < expected[0] / 1.1  # something was learned
            assert all(map(torch.equal, stack.network(n).state().values(), trained))
        alone = networks.Stack(starts[-1:], of[-1:], schemes[-1:], data)
        list(alone.trainer.train(batch_size=BATCH, eval_every=1_000))
        both = stack.network(len(of) - 1).state(), alone.network(0).state()
        assert all(map(torch.equal, *(state.values() for state in both)))


def test_at_the_base_width_it_is_the_standard_one():
    """Its weights and its steps, to the bit; without hidden layers, too."""
    for hidden in ((BASE, BASE), ()):
        standard = config(hidden=hidden, parametrization="standard", base_width=100)
        starts = [
            networks.initialize(one, find("he"), splits())
            for one in (standard, config(hidden=hidden))
        ]
        assert torch.equal(*(start.flat for start in starts))
        widths = (PIXELS, *hidden, 10)
        assert trainer.Recipe.of(standard) == trainer.Recipe.of(config(hidden=hidden), widths)


def test_the_outputs_weights_are_scaled_and_stated():
    """Their variance goes with 1/n², and so do the logits that theory predicts."""
    for width, of_base in ((400, 1 / 50), (4, 2)):
        shared = {"hidden": (24, width), "bias_init": "zeros", "activation": "relu"}
        of = config(**shared)
        standard = config(**shared, parametrization="standard", base_width=100)
        ours, theirs = (networks.initialize(one, find("he"), splits()) for one in (of, standard))
        assert torch.equal(ours.weights[2], theirs.weights[2] * math.sqrt(of_base))
        assert all(torch.equal(ours.weights[layer], theirs.weights[layer]) for layer in (0, 1))
        assert torch.equal(ours.biases[2], theirs.biases[2])
        probe = measure.probe(splits().train, 200)
        reading = networks.FeedForward(ours, of, find("he")).read(probe)
        plain = networks.FeedForward(theirs, standard, find("he")).read(probe)
        moments = [
            one.predicted["preactivation_second_moment"][2].expected for one in (reading, plain)
        ]
        assert moments[0] == pytest.approx(of_base * moments[1], rel=1e-6)


def test_other_models_and_other_settings_have_none_of_it():
    """A line says what it is for."""
    with pytest.raises(SettingError, match="parametrization=mup is for model=mlp, not for 'cnn'"):
        TrainConfig(model="cnn", parametrization="mup")
    with pytest.raises(SettingError, match="base_width=7 is for parametrization=mup"):
        TrainConfig(base_width=7)

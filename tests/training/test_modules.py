"""Networks that are any module: held bit for bit against plain loops with DataLoader."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from initflow.core import machine
from initflow.core.configurations import TrainConfig
from initflow.core.seeds import stream_seed
from initflow.diagnostics import record
from initflow.errors import SettingError
from initflow.models import weights
from initflow.training import cache, modules, trainer
from initflow.training.model import weights_sha256
from initflow.training.module_trainer import ModuleTrainer
from initflow.training.splits import Split, Splits
from initflow.training.trainer import Recipe


def batch_norm(shape, classes):
    """A model of a user's: with buffers, dropout, a frozen weight and an unused one."""
    channels, height, width = shape
    model = nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(4 * height * width, 20),
        nn.Linear(20, classes),
    )
    model[5].weight.requires_grad_(requires_grad=False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return model


MODELS = {
    "cnn": {"model": "cnn", "hidden": "12"},
    "deep cnn": {
        "model": "cnn", "channels": "3x2,4x2", "kernel": 3, "pool": "average",
        "activation": "tanh", "hidden": "none",
    },
    "rnn": {"model": "rnn", "activation": "tanh", "hidden": "9"},
    "lstm": {"model": "lstm", "hidden": "9,7"},
    "gru": {"model": "gru", "hidden": "9"},
    "own": {"model": f"{__name__}:batch_norm", "momentum": 0.0},
    "own by adamw": {
        "model": f"{__name__}:batch_norm", "optimizer": "adamw", "lr": 0.003, "clip": 0.5,
    },
    "lstm by adam": {
        "model": "lstm", "hidden": "9", "optimizer": "adam", "betas": "0.8,0.99", "lr": 0.01,
        "weight_decay": 0.01, "schedule": "cosine", "clip": 0.1,
    },
}  # fmt: skip
SMALL = {"dataset": "digits", "epochs": 2, "batch_size": 100, "lr": 0.05, "eval_every": 1_000}


def pieces(shape=(1, 8, 8), classes=10, n=250):
    """Splits that can be learned, of examples of any shape."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    patterns = torch.rand(classes, math.prod(shape), generator=g)
    data = Split(patterns[labels] + torch.rand(n, math.prod(shape), generator=g), labels)
    return Splits("some", data, None, data, 0.0, 1.0, "0" * 64, "here", shape, classes)


def start(**settings):
    config = TrainConfig(**(SMALL | settings))
    splits = pieces()
    return modules.initialize(config, cache.scheme(config.init, None), splits), config, splits


def run(network, config, data):
    """The losses of a training, and the module after it."""
    training = ModuleTrainer(network, Recipe.of(config), data)
    checkpoints = list(
        training.train(
            batch_size=config.batch_size, eval_every=config.eval_every, updates=config.updates
        )
    )
    return [loss for one in checkpoints for loss in one.losses[0]], training.network.module


def plain_loop(module, config, data, shape):
    """What a user would write, with the images in the same order."""
    loader_of = lambda order: DataLoader(  # noqa: E731
        TensorDataset(data.images.view(-1, *shape), data.labels),
        batch_size=config.batch_size,
        sampler=order.tolist(),
    )
    parameters = list(module.parameters())
    if config.optimizer == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        optimizer = torch.optim.SGD(
            parameters, config.lr, momentum=config.momentum, nesterov=nesterov
        )
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        decay = {} if config.weight_decay is None else {"weight_decay": config.weight_decay}
        optimizer = kind(parameters, config.lr, betas=config.betas, eps=config.eps, **decay)
    if config.schedule == "step":
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, config.gamma)
    else:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    losses = []
    module.train()
    torch.manual_seed(stream_seed(config.seed, "training"))
    state = torch.get_rng_state()
    for epoch in range(config.epochs):
        for images, labels in loader_of(trainer.batch_order(len(data), config.seed, epoch)):
            torch.set_rng_state(state)
            loss = functional.cross_entropy(module(images), labels)
            state = torch.get_rng_state()  # the loader draws too
            optimizer.zero_grad()
            loss.backward()
            if config.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
    return losses


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_training_is_that_of_a_plain_loop_bit_for_bit(name, threads):
    """Losses, parameters and buffers, also with an incomplete last batch."""
    with machine.threads(threads):
        network, config, splits = start(**MODELS[name])
        twin = network.copy()
        losses, trained = run(network, config, splits.train)
        expected = plain_loop(twin.module, config, splits.train, splits.shape)
    assert losses == expected
    assert losses[-1] < losses[0]
    assert trained.state_dict().keys() == twin.module.state_dict().keys()
    for key, tensor in trained.state_dict().items():
        assert torch.equal(tensor, twin.module.state_dict()[key]), key
    assert not any(torch.equal(trained.state_dict()[k], v) for k, v in network.state().items()
                   if k.endswith("weight") and "5." not in k)  # fmt: skip


@pytest.mark.parametrize("updates", [2, 4, 9])
def test_a_training_ends_after_so_many_updates(updates):
    """With the losses that the whole one has until there, which are six."""
    whole, part = (run(*of_small(updates=many))[0] for many in ("all", updates))
    assert part == whole[:updates]


def of_small(**settings):
    network, config, splits = start(model="rnn", hidden="5", activation="tanh", **settings)
    return network, config, splits.train


def test_what_a_training_draws_is_its_own():
    """Dropout follows from the seed, whatever else draws meanwhile, and torch's state stays."""
    network, config, splits = start(**MODELS["own"])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, _ = run(network, config, splits.train)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert run(network, config, splits.train)[0] == first
    assert run(network, replace(config, seed=1), splits.train)[0] != first


@pytest.mark.parametrize("name", [name for name in MODELS if "own" not in name])
def test_schemes_fill_every_matrix_and_nothing_else(name):
    """Networks of one seed differ by their schemes in their weights, and in these alone."""
    networks = {init: start(init=init, **MODELS[name])[0] for init in ("zero", "he", "default")}
    matrices = weights.of(networks["zero"].module).every
    filled = {matrix.slot.name for matrix in matrices}
    for key, tensor in networks["zero"].state().items():
        assert bool(tensor.any()) != (key in filled), key
        he, default = (networks[init].state()[key] for init in ("he", "default"))
        assert torch.equal(he, default) != (key in filled)
    assert set(networks["he"].stated) == {matrix.name for matrix in matrices}
    zeros = start(init="default", bias_init="zeros", **MODELS[name])[0].state()
    for key, tensor in zeros.items():
        assert bool(tensor.any()) == (key in filled), key


def test_a_default_is_what_pytorch_makes():
    """Of the same random numbers."""
    network, config, _ = start(init="default", model="cnn", hidden="12", seed=3)
    torch.manual_seed(stream_seed(config.seed, "model"))
    plain = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5, padding=2), nn.Linear(64, 12),
        nn.Linear(12, 10),
    )  # fmt: skip
    for ours, theirs in zip(network.state().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def too_few(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes - 3))


def sequences(shape, classes):
    return nn.Linear(8, classes)


def flat(shape, classes):
    return nn.Linear(63, classes)


def frozen(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).requires_grad_(requires_grad=False)


def with_a_loss(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes)), None, functional.mse_loss


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": f"{__name__}:too_few"}, r"must give logits of shape \(2, 10\) for 2 images of"),
        ({"model": f"{__name__}:sequences"}, r"logits .* not shape \(2, 1, 8, 10\)"),
        ({"model": f"{__name__}:flat"}, r"takes no images of shape \(1, 8, 8\): .*mat1 and mat2"),
        ({"model": f"{__name__}:frozen"}, "has no parameters to train"),
        ({"model": f"{__name__}:with_a_loss"}, "must give a module alone to be trained, which"),
        ({"model": "cnn", "channels": "2,3,4,5"}, "channels must have at most 3 widths for im"),
        ({"model": "rnn", "activation": "gelu"}, "activation must be tanh or relu for model=rnn"),
        ({"model": "gru", "hidden": "none"}, "hidden must have a width for model=gru, not 'none'"),
        ({"model": "lstm", "init": "looks-linear"}, "scheme 'looks-linear': sigmoid cannot look"),
    ],
    ids=str,
)  # fmt: skip
def test_a_model_that_cannot_be_trained_is_one_line(settings, said):
    """Before anything is trained."""
    with pytest.raises(SettingError, match=said) as caught:
        start(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "models"),
    [((20,), ["rnn", "lstm"]), ((6, 3), ["gru", "cnn"]), ((3, 8, 8), ["cnn", "rnn"])],
)
def test_examples_of_other_shapes(shape, models):
    """Time steps of one feature or of several, images of one channel or of three."""
    splits = pieces(shape, classes=4)
    for model in models:
        activation = {"activation": "tanh"} if model == "rnn" else {}
        config = TrainConfig(
            **(SMALL | activation), model=model, channels="2" if model == "cnn" else "6,16"
        )
        network = modules.initialize(config, cache.scheme("xavier", None), splits)
        losses, _ = run(network, config, splits.train)
        assert losses[-1] < losses[0]


def test_features_that_are_no_images():
    """A convolution has nothing to go over."""
    config = TrainConfig(**SMALL, model="cnn")
    with pytest.raises(SettingError, match=r"images of \(channels, height, width\), not features"):
        modules.initialize(config, cache.scheme("he", None), pieces((20,)))


class Own(nn.Module):
    """Of a weight that is no layer's."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, 10) / 8)

    def forward(self, x):
        return x.flatten(1) @ self.table


def unlayered(shape, classes):
    return Own()


def compiled(shape, classes):
    return torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(64, classes)))


def test_a_model_that_cannot_be_measured_can_be_trained():
    """It is told before, with what would be right; a compiled one is taken as it was written."""
    config = TrainConfig(**SMALL, model=f"{__name__}:unlayered", init="default")
    splits, scheme = pieces(), cache.scheme("default", None)
    with pytest.raises(SettingError, match="cannot be measured, and probe=0 trains it all the sam"):
        record.start(config, scheme, splits)
    one = record.start(replace(config, probe=0), scheme, splits)
    record.train_together([one], splits)
    assert one.losses[-1] < one.losses[0]
    whole = TrainConfig(**SMALL, model=f"{__name__}:compiled")
    assert isinstance(record.start(whole, scheme, splits).initial.module, nn.Sequential)


def test_a_record_of_a_module():
    """It holds what a feed-forward network's does, and is the same again."""
    settings = SMALL | {"eval_every": 6, "epochs": 6, "lr": 0.02}
    config = TrainConfig(**settings, model="cnn", hidden="12", probe=50)
    splits, scheme = pieces(), cache.scheme("he", None)
    first, again = (record.start(config, scheme, splits) for _ in range(2))
    record.train_together([first, again], splits)
    assert first.history == again.history
    assert first.losses == again.losses
    assert weights_sha256(first.trained) == weights_sha256(again.trained)
    assert (first.outcome, first.step, first.is_exact) == ("finished", 18, True)
    assert first.last("accuracy/test") > first.history["accuracy/test"][0][1]
    assert [step for step, _ in first.signals] == [0, 6, 12, 18]
    assert {"weight_variance/conv1", "dead_fraction/fc1", "gradient_variance/fc2"} < {
        *first.history
    }
    assert len(first.history["predicted_preactivation_second_moment/conv2"]) == 1


def test_evaluating_is_done_in_evaluation_mode_and_leaves_no_trace():
    """A module's running statistics and its modes stay."""
    config = TrainConfig(**SMALL, **MODELS["own"], probe=0)
    splits = pieces()
    one = record.start(config, cache.scheme("he", None), splits)
    record.train_together([one], splits)
    twin = one.initial.copy(one.trained).module.eval()
    with torch.no_grad():
        logits = twin(one.initial.images(splits.test))
    expected = (logits.argmax(1) == splits.test.labels).double().mean().item()
    assert one.last("accuracy/test") == pytest.approx(expected, abs=1e-9)
    loss = functional.cross_entropy(logits, splits.test.labels).item()
    assert one.last("loss/test") == pytest.approx(loss, rel=1e-5)


def test_one_that_diverges_stops_there():
    """With the parameters as they were when that was found."""
    config = TrainConfig(**SMALL | {"lr": 1e25, "probe": 0}, model="cnn", hidden="12")
    splits = pieces()
    one = record.start(config, cache.scheme("he", None), splits)
    record.train_together([one], splits)
    assert one.outcome == "diverged"
    assert one.step == one.diverged_at < 6
    assert all(map(math.isfinite, one.losses))


def test_a_module_that_fails_while_it_trains_is_one_line():
    """As a normalization over a last batch of one image does."""
    network, config, splits = start(**MODELS["own"] | {"batch_size": 249})
    network.module.insert(5, nn.BatchNorm1d(256))
    with pytest.raises(SettingError, match=r"batch_norm' failed on 1 images: Expected more than 1"):
        run(network, config, splits.train)

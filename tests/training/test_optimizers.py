"""The optimizers, their schedules and the clipping, held bit for bit against torch.optim's."""

import math
import os
import subprocess
import sys

import pytest
import torch

from bench import reference
from initflow.core import machine
from initflow.core.configurations import TrainConfig
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import find
from initflow.training import model, optimizers, trainer
from initflow.training.optimizers import Optimizer
from initflow.training.splits import Split
from tests.conftest import ROOT

PIXELS, IMAGES, BATCH = 37, 220, 50  # of which the last of an epoch is smaller
EPOCHS = 25
SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
MOMENTUM = {"momentum": 0.9, "nesterov": True}
# Our settings, and what they mean in PyTorch's words.
SETTINGS = [
    ({"lr": 0.1}, SGD, MOMENTUM),
    ({"lr": 0.1, "weight_decay": 0.01}, SGD, {**MOMENTUM, "weight_decay": 0.01}),
    ({"lr": 0.1, "momentum": 0, "weight_decay": 0.1}, SGD, {"weight_decay": 0.1}),
    ({"lr": 0.5, "clip": 0.3, "nesterov": False}, SGD, {"momentum": 0.9}),
    ({"lr": 0.5, "clip": 0.3, "schedule": "cosine"}, SGD, MOMENTUM),
    ({"lr": 0.01, "optimizer": "adam"}, ADAM, {}),
    ({"lr": 0.01, "optimizer": "adam", "weight_decay": 0.1}, ADAM, {"weight_decay": 0.1}),
    ({"lr": 0.01, "optimizer": "adam", "betas": "0.3,0.9"}, ADAM, {"betas": (0.3, 0.9)}),
    ({"lr": 0.03, "optimizer": "adam", "gamma": 0.9, "clip": 0.5}, ADAM, {}),
    (
        {"lr": 0.03, "optimizer": "adam", "betas": "0,0", "eps": 0.1},
        ADAM,
        {"betas": (0.0, 0.0), "eps": 0.1},
    ),
    ({"lr": 0.01, "optimizer": "adamw"}, ADAMW, {}),
    ({"lr": 0.01, "optimizer": "adamw", "weight_decay": 0}, ADAMW, {"weight_decay": 0.0}),
    ({"lr": 0.01, "optimizer": "adamw", "schedule": "cosine", "clip": 5}, ADAMW, {}),
]


def images():
    """Noisy copies of ten patterns; some pixels are never on, so that their weights stay."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (IMAGES,), generator=g)
    pixels = torch.rand(10, PIXELS, generator=g)[labels] + torch.rand(IMAGES, PIXELS, generator=g)
    pixels[:, ::9] = 0
    return Split(pixels, labels)


def drawn(widths, seed):
    return model.initialize(widths, find("he"), ACTIVATIONS["relu"], bias_init="pytorch", seed=seed)


def usual(state, config, make, options, data):
    """The loop that everybody writes; its losses, and the trained tensors."""
    network = reference.network(state, config.activation)
    optimizer = make(network.parameters(), lr=config.lr, **options)
    scheduler = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs)
        if config.schedule == "cosine"
        else torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=config.gamma)
    )
    losses = []
    for epoch in range(config.epochs):
        order = trainer.batch_order(len(data), config.seed, epoch)
        for batch in order.split(config.batch_size):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(
                network(data.images[batch]), data.labels[batch]
            )
            loss.backward()
            if config.clip is not None:
                torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip)
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
    return losses, [parameter.detach() for parameter in network.parameters()]


def configs(settings, **shared):
    return [
        TrainConfig(
            **{"epochs": EPOCHS, "batch_size": BATCH, "seed": n % 2, "activation": "tanh"}
            | own
            | shared
        )
        for n, (own, *_) in enumerate(settings)
    ]


def together(networks, of, data):
    """The losses of each, trained as one stack, and the stack."""
    stack = model.Parameters.stack(networks, "cpu")
    training = trainer.Trainer(stack, [trainer.Recipe.of(config) for config in of], data)
    losses = [[] for _ in of]
    for checkpoint in training.train(batch_size=of[0].batch_size, eval_every=1_000):
        for member, more in checkpoint.losses.items():
            losses[member] += more
    return losses, stack


def assert_pytorchs(settings, hidden):
    data = images()
    of = configs(settings)
    networks = [drawn((PIXELS, *hidden, 10), n) for n in range(len(of))]
    losses, stack = together(networks, of, data)
    for n, (config, (_, make, options)) in enumerate(zip(of, settings, strict=True)):
        expected, trained = usual(networks[n].state(), config, make, options, data)
        assert losses[n] == expected
        assert len(expected) == 5 * EPOCHS
        assert min(expected) < expected[0] / 1.1  # something was learned
        assert all(map(torch.equal, stack.state(n).values(), trained))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("hidden", [(10,), (17, 33), (65,), (101, 7)], ids=str)
def test_every_optimizer_is_pytorchs_bit_for_bit(hidden, threads):
    """Thirteen in one stack, over 125 updates, each as nn.Linear and torch.optim have it."""
    with machine.threads(threads):
        assert_pytorchs(SETTINGS, hidden)


@pytest.mark.parametrize("own", SETTINGS[5:11:5], ids=str)
def test_neighbours_that_share_all_take_their_steps_as_one(own):
    """A stack of five of the same rate, whose numbers lie side by side."""
    assert_pytorchs([own] * 5, (33,))


def test_where_numbers_round_by_their_place_each_tensor_has_its_own_step(monkeypatch):
    """As on a processor whose vectorized loops end otherwise: the same bits by another way."""
    monkeypatch.setattr(Optimizer, "rounds_alike", lambda _: False)
    assert_pytorchs(SETTINGS[::4], (17,))


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_whether_numbers_round_alike_is_found_by_trying(name, monkeypatch):
    """They do on this machine; where the last numbers of a tensor differ, that is seen."""
    assert Optimizer(name).rounds_alike()

    def step(self, parameter, *_):
        parameter[: parameter.numel() // 8 * 8].mul_(1 + 1e-6)

    optimizers._rounds_alike.cache_clear()
    monkeypatch.setattr(Optimizer, "step", step)
    assert not Optimizer(name).rounds_alike()
    optimizers._rounds_alike.cache_clear()


def test_the_fused_kernel_is_used_where_it_has_the_same_bits(monkeypatch):
    """It has on this machine, where vectors are whole; where it rounds otherwise, that is seen."""
    used, fused = [], Optimizer._fused_sgd

    def counted(self, parameter, *others):
        used.append(parameter.numel())
        fused(self, parameter, *others)

    def off(self, parameter, *others):
        fused(self, parameter, *others)
        parameter[::100].mul_(1 + 2**-20)

    for kernel, expected in ((counted, [640]), (off, [])):
        optimizers._is_fused_alike.cache_clear()
        monkeypatch.setattr(Optimizer, "_fused_sgd", kernel)
        assert optimizers._is_fused_alike(torch.get_num_threads()) == (kernel is counted)
        used.clear()
        for size in (640, 641):  # the last number of which would be rounded twice
            parameter = torch.nn.Parameter(torch.linspace(-1, 1, size))
            theirs = torch.optim.SGD([parameter], lr=0.1, foreach=False, **MOMENTUM)
            ours, state = parameter.detach().clone(), [torch.zeros(size)]
            for number in range(1, 4):
                parameter.grad = torch.sin(number * torch.arange(size))
                theirs.step()
                used.clear()
                Optimizer(**MOMENTUM).step(ours, parameter.grad.clone(), state, 0.1, number)
                assert used == (expected if size == 640 else [])
            assert torch.equal(ours, parameter)
    optimizers._is_fused_alike.cache_clear()


def test_what_is_of_another_type_or_order_is_updated_by_operations():
    """A half-precision parameter, and one by columns, as torch.optim has them."""
    for start in (torch.linspace(-1, 1, 64, dtype=torch.bfloat16), torch.eye(8).add_(0.3).T):
        parameter = torch.nn.Parameter(start.clone(memory_format=torch.preserve_format))
        theirs = torch.optim.SGD([parameter], lr=0.1, foreach=False, **MOMENTUM)
        ours, state = start.clone(), [torch.zeros_like(start)]
        for number in range(1, 6):
            parameter.grad = (
                torch.sin(number * torch.arange(64.0)).to(start.dtype).view(start.shape)
            )
            theirs.step()
            Optimizer(**MOMENTUM).step(ours, parameter.grad.clone(), state, 0.1, number)
        assert torch.equal(ours, parameter)


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_so_it_is_by_the_kernels_of_other_processors(capability):
    """Those of PyTorch's that this one would not choose."""
    subprocess.run(
        [sys.executable, "-c", "from tests.training.test_optimizers import *; of_others()"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        cwd=ROOT,
        check=True,
    )


def of_others():
    assert all(Optimizer(name).rounds_alike() for name in optimizers.NAMES)
    assert_pytorchs(SETTINGS, (17,))


@pytest.mark.parametrize("eps", [1e-30, 1e30])
def test_weights_that_never_had_a_gradient_stay(eps):
    """Nor do the gaps between tensors become NaN, at the smallest eps that may be given."""
    parameter = torch.zeros(20)
    gradient = torch.zeros(20)
    adam = Optimizer("adam", eps=eps)
    state = adam.state_like(parameter)
    for number in (1, 2):
        for rate in (0.1, 0.0):
            adam.step(parameter, gradient, state, rate, number)
    assert not any(bool(tensor.any()) for tensor in (parameter, gradient, *state))


def test_the_networks_of_a_stack_are_clipped_apart():
    """By the norm of all gradients of each: only the longer one is scaled."""
    parameters = model.Parameters((5, 3, 2), 2)
    parameters.flat.copy_(torch.randn(parameters.flat.shape, generator=torch.Generator()))
    long, short = (list(parameters.state(n).values()) for n in range(2))
    for tensor in short:
        tensor.mul_(1e-3)
    before = [tensor.clone() for tensor in [*long, *short]]
    optimizers.clip_(long, 0.5)
    optimizers.clip_(short, 0.5)
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in before[:4]))
    assert norm > 1
    for was, now in zip(before, [*long, *short], strict=True):
        scale = 0.5 / norm if any(now is one for one in long) else 1.0
        assert torch.allclose(now, was * scale, rtol=1e-5)
    assert sum(float(one.square().sum()) for one in long) == pytest.approx(0.25, rel=1e-4)


def test_step_rates_are_those_of_step_lr():
    """The tutorial's five epochs, and StepLR's own bits."""
    rates = optimizers.step_rates(0.1, 0.96, 5)
    assert rates == pytest.approx([0.1, 0.096, 0.09216, 0.0884736, 0.084934656])
    assert rates == of_scheduler(torch.optim.lr_scheduler.StepLR, 0.1, 5, step_size=1, gamma=0.96)


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 17, 300])
@pytest.mark.parametrize("lr", [0.1, 3e-4])
def test_cosine_rates_are_those_of_cosine_annealing_lr(epochs, lr):
    """To the bit, and near the closed form: half a cosine from lr to 0."""
    rates = optimizers.cosine_rates(lr, epochs)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR
    assert rates == of_scheduler(scheduler, lr, epochs, T_max=epochs)
    closed = [lr * (1 + math.cos(math.pi * epoch / epochs)) / 2 for epoch in range(epochs)]
    assert rates == pytest.approx(closed, rel=1e-9)
    assert rates[0] == lr
    assert all(rates)


def of_scheduler(make, lr, epochs, **options):
    optimizer = SGD([torch.zeros(1)], lr=lr)
    scheduler = make(optimizer, **options)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("own", "optimizer"),
    [
        ({}, Optimizer("sgd", 0.9, nesterov=True)),
        ({"momentum": 0}, Optimizer("sgd")),
        ({"weight_decay": 0.1}, Optimizer("sgd", 0.9, nesterov=True, weight_decay=0.1)),
        ({"optimizer": "adam"}, Optimizer("adam")),
        ({"optimizer": "adamw"}, Optimizer("adamw", weight_decay=0.01)),
        ({"optimizer": "adamw", "weight_decay": 0}, Optimizer("adamw")),
        ({"optimizer": "adam", "betas": (0.5, 0.9)}, Optimizer("adam", betas=(0.5, 0.9))),
    ],
    ids=str,
)
def test_the_optimizer_of_a_network(own, optimizer):
    """PyTorch's weight decay where none is given, and nothing of another optimizer's."""
    assert Optimizer.of(TrainConfig(**own)) == optimizer


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({}, "SGD with lr 0.1, gamma 0.96, Nesterov momentum 0.9"),
        ({"momentum": 0, "clip": 1}, "SGD with lr 0.1, gamma 0.96, gradients clipped to norm 1"),
        (
            {"nesterov": False, "schedule": "cosine", "weight_decay": 0.01},
            "SGD with lr 0.1, along a cosine to 0, momentum 0.9, weight decay 0.01",
        ),
        (
            {"optimizer": "adamw", "lr": 0.001},
            "AdamW with lr 0.001, gamma 0.96, betas 0.9 and 0.999, eps 1e-08, weight decay 0.01",
        ),
        (
            {"optimizer": "adam", "eps": 0.1},
            "Adam with lr 0.1, gamma 0.96, betas 0.9 and 0.999, eps 0.1",
        ),
    ],
    ids=str,
)
def test_how_a_network_is_optimized_in_words(own, said):
    """The settings of its optimizer, and of no other."""
    assert optimizers.described(TrainConfig(**own)) == said


def test_they_need_not_wait_for_torch_optim():
    """Whose first optimizer pulls in torch._dynamo, for seconds."""
    code = (
        "import sys, torch; from initflow.training import optimizers; x = torch.ones(3);"
        "one = optimizers.Optimizer('adam'); one.step(x, x.clone(), one.state_like(x), 0.1, 1);"
        "optimizers.clip_([x], 1.0); sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

"""The band of some draws: how often a further one lies in it, on networks of any kind."""

import math

import pytest
import torch
from torch import nn

from initflow.theory.draws import band

BANDS, DRAWS = 12, 20
COVERED = (0.90, 0.99)


class Block(nn.Module):
    """ResNet's, with batch normalization."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        branch = self.second(self.b(torch.relu(self.first(self.a(x)))))
        return self.head(torch.relu(branch + x).mean((2, 3)))


def transformer():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return nn.Sequential(block, nn.Flatten(), nn.Linear(40, 3))


MODELS = {
    "MLP": (
        lambda: nn.Sequential(
            *(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
        ),
        (8, 6),
    ),
    "CNN with pooling": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(6, 3)),
        ),
        (8, 1, 8, 8),
    ),
    "ResNet block": (Block, (4, 4, 5, 5)),
    "transformer block": (transformer, (4, 5, 8)),
}


def measured(model, x, seed):
    """Mean squares of each layer's output and of the loss's gradient by it, of one draw."""
    stream = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            std = math.sqrt(2 / parameter[0].numel())
            nn.init.normal_(parameter, 0, std, stream)
    kept = []
    hooks = [
        module.register_forward_hook(lambda _m, _x, y: kept.append(y))
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    loss = nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 3)
    gradients = torch.autograd.grad(loss, kept)
    for hook in hooks:
        hook.remove()
    return [y.detach().square().mean().item() for y in (*kept, *gradients)]


@pytest.mark.parametrize("name", MODELS)
def test_the_band_holds_95_percent_of_further_draws(name):
    """From 90 to 99 %, forward and backward, over all layers of a small network."""
    build, size = MODELS[name]
    torch.manual_seed(0)
    model, x = build(), torch.randn(size)
    draws = torch.tensor([measured(model, x, seed) for seed in range(2 * BANDS * DRAWS)])
    held = []
    for i in range(BANDS):
        known = draws[i * DRAWS : (i + 1) * DRAWS]
        further = draws[BANDS * DRAWS :]
        for values, others in zip(known.T.tolist(), further.T.tolist(), strict=True):
            interval = band(values)
            held.append(sum(map(interval.holds, others)) / len(others))
    assert COVERED[0] <= sum(held) / len(held) <= COVERED[1]


def test_of_log_normal_draws_it_is_the_prediction_interval():
    """Twenty draws of standard deviation s give m ± 2.093 · s · √(1 + 1/20)."""
    logs = torch.linspace(-1, 1, 20).double()
    interval = band(logs.exp().tolist())
    half = 2.093024 * logs.std().item() * math.sqrt(1 + 1 / 20)
    assert math.log(interval.high) == pytest.approx(half, rel=1e-5)
    assert math.log(interval.low) == pytest.approx(-half, rel=1e-5)
    assert interval.expected == pytest.approx(logs.exp().mean().item())


@pytest.mark.parametrize(
    ("draws", "low", "high"),
    [
        ([0.0, 0.0, 0.0], 0.0, 0.0),
        ([0.0, 1.0, 2.0], 0.0, 2.0),
        ([1.0, math.inf], 1.0, math.inf),
        ([1.0, math.nan], 0.0, math.inf),
        ([3.0, 3.0], 3.0, 3.0),
    ],
)
def test_draws_without_a_logarithm_give_what_they_reach_over(draws, low, high):
    """A dead layer's 0 and an overflow are draws, too."""
    interval = band(draws)
    assert interval.low == pytest.approx(low)
    assert interval.high == pytest.approx(high)


def test_one_draw_gives_no_band():
    """There is no spread to go by."""
    with pytest.raises(ValueError, match="at least 2 draws, not 1"):
        band([1.0])

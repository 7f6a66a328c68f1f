"""Ten small architectures as people write them, each with its batch, to predict what they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from initflow.core.configurations import TrainConfig
from initflow.training import datasets

IMAGES = 8
WIDTH, HEADS, TOKENS, VOCABULARY = 64, 4, 16, 100


def images() -> Tensor:
    """Handwritten digits, (n, 1, 28, 28): MNIST or else scikit-learn's, enlarged."""
    try:
        splits = datasets.load(TrainConfig(dataset="mnist"))
    except Exception:  # noqa: BLE001 - whatever keeps MNIST away
        splits = datasets.load(TrainConfig(dataset="digits"))
    side = int(splits.pixels**0.5)
    found = splits.train.images[:IMAGES].reshape(-1, 1, side, side)
    return nn.functional.interpolate(found, size=28)


def tokens() -> Tensor:
    return torch.randn(IMAGES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def ids() -> Tensor:
    stream = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (IMAGES, TOKENS), generator=stream)


def mlp(depth: int = 3, width: int = 256, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    widths = [784, *[width] * depth]
    layers = [
        layer
        for fan_in, fan_out in pairwise(widths)
        for layer in (nn.Linear(fan_in, fan_out), activation())
    ]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 10))


def deep_mlp() -> nn.Module:
    return mlp(20, 128, nn.Tanh)


def lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh()),
        nn.Linear(84, 10),
    )


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    before = 1
    for width, convolutions in ((32, 2), (64, 2), (128, 2)):
        for _ in range(convolutions):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
        layers.append(nn.MaxPool2d(2))
    classifier = (nn.Flatten(), nn.Linear(128 * 9, 256), nn.ReLU(), nn.Linear(256, 10))
    return nn.Sequential(*layers, *classifier)


def gelu_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.GELU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3), nn.GELU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 64), nn.GELU(), nn.Linear(64, 10)),
    )


class Block(nn.Module):
    """ResNet's, which halves the images and doubles the channels where it has a stride."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        self.trunk: nn.Module = nn.Identity()
        if stride > 1:
            projection = nn.Conv2d(before, width, 1, stride, bias=False)
            self.trunk = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm2(self.second(self.act1(self.norm1(self.first(x)))))
        result: Tensor = self.act2(branch + self.trunk(x))
        return result


def resnet() -> nn.Module:
    stem = (nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = (Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Mixing(nn.Module):
    """A block of MLP-Mixer: over the tokens, then over their entries."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_tokens = nn.Sequential(
            nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens)
        )
        self.over_entries = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        result: Tensor = x + self.over_entries(self.norm2(x))
        return result


class Mixer(nn.Module):
    """MLP-Mixer on patches of 4 × 4."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 4, 4)
        self.blocks = nn.Sequential(*(Mixing(49, WIDTH) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        result: Tensor = self.head(self.norm(x).mean(1))
        return result


class Encoder(nn.Module):
    """torch's own encoder, and a head on the mean of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.encoder(x).mean(1))
        return result


class Causal(nn.Module):
    """GPT's block, its attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.three, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.act, self.down = (
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.GELU(),
            nn.Linear(4 * WIDTH, WIDTH),
        )
        self.register_buffer("mask", torch.ones(TOKENS, TOKENS).tril() == 0)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (
            each.view(b, t, HEADS, c // HEADS).transpose(1, 2)
            for each in self.three(self.norm1(x)).split(c, dim=2)
        )
        logits = (q @ k.transpose(-2, -1)) * (c // HEADS) ** -0.5
        weights = logits.masked_fill(self.mask, -torch.inf).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(b, t, c))
        result: Tensor = x + self.down(self.act(self.up(self.norm2(x))))
        return result


class GPT(nn.Module):
    """Token and position embeddings, three blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = (nn.Embedding(n, WIDTH) for n in (VOCABULARY, TOKENS))
        self.blocks = nn.Sequential(*(Causal() for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("places", torch.arange(TOKENS))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(self.places)
        result: Tensor = self.head(self.norm(self.blocks(x)))
        return result


def autoencoder() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 7), nn.ReLU(), nn.ConvTranspose2d(64, 32, 7), nn.ReLU()),
        *(nn.ConvTranspose2d(32, 16, 3, 2, 1, 1), nn.ReLU()),
        *(nn.ConvTranspose2d(16, 1, 3, 2, 1, 1), nn.Sigmoid()),
    )


class Recurrent(nn.Module):
    """An LSTM whose last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.lstm(x)[0][:, -1])
        return result


@dataclass(frozen=True)
class Architecture:
    """A model, and what it is given."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Tensor]


ARCHITECTURES = [
    Architecture("MLP", mlp, images),
    Architecture("deep MLP", deep_mlp, images),
    Architecture("LeNet", lenet, images),
    Architecture("VGG-like", vgg, images),
    Architecture("CNN, GELU, max pooling", gelu_cnn, images),
    Architecture("ResNet", resnet, images),
    Architecture("MLP-Mixer", Mixer, images),
    Architecture("transformer encoder", Encoder, tokens),
    Architecture("small GPT", GPT, ids),
    Architecture("autoencoder", autoencoder, images),
    Architecture("LSTM classifier", Recurrent, tokens),
]

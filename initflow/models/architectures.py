"""The built-in models beside the feed-forward one: a convolutional and three recurrent networks.

Each is plain PyTorch, from images of the shape that it is built for to the logits of the classes,
and starts with the weights that PyTorch gives its layers.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from initflow.core.configurations import CNN, GRU, LSTM, RNN
from initflow.core.kinds import format_widths
from initflow.errors import SettingError
from initflow.initializers.activations import Activation

Shape = tuple[int, ...]
OF_RNN = ("tanh", "relu")  # the activation functions that PyTorch's kernel has
POOLED = 2  # pixels of height and of width that become one


class Elementwise(nn.Module):
    """An activation function as a module."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation.function(x)


def cnn(
    shape: Shape,
    classes: int,
    *,
    activation: Activation,
    hidden: Sequence[int],
    channels: Sequence[int],
    kernel: int,
    pool: str,
) -> nn.Module:
    """Convolutions, ``conv1`` and so on, then fully connected layers, ``fc1`` and so on.

    For images of ``shape`` (channels, height, width), or (height, width) of one channel. Each
    convolution has ``kernel`` × ``kernel`` weights a channel, keeps height and width, and is
    followed by the activation function. After the last of those of one width the images are
    pooled, 2 by 2: channels 6,16 are LeNet's (LeCun et al. 1998), and 16x3,32x3 have three of 16,
    a pooling, three of 32, a pooling, as VGG has them (Simonyan & Zisserman 2015).

    Raises :class:`SettingError` for what has no height and width, or too little for the poolings.
    """
    if len(shape) not in (2, 3):
        raise SettingError(
            f"model=cnn needs images of (channels, height, width), not features of shape {shape}"
        )
    first, height, width = (1, *shape)[-3:]
    stages = [list(group) for _, group in itertools.groupby(channels)]
    halvings = int(math.log2(min(height, width)))
    if pool != "none" and len(stages) > halvings:
        raise SettingError(
            f"channels must have at most {halvings} widths for images of {height} × {width}, which "
            f"are pooled after each, not '{format_widths(tuple(channels))}'; or use pool=none"
        )
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    if len(shape) == 2:
        modules["image"] = nn.Unflatten(1, (1, height))
    number, before = 0, first
    for stage, of_one_width in enumerate(stages, start=1):
        for after in of_one_width:
            number += 1
            modules[f"conv{number}"] = nn.Conv2d(before, after, kernel, padding=kernel // 2)
            modules[f"{activation.name}{number}"] = Elementwise(activation)
            before = after
        if pool != "none":
            pooling = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}[pool]
            modules[f"pool{stage}"] = pooling(POOLED)
            height, width = height // POOLED, width // POOLED
    modules["flat"] = nn.Flatten()
    widths = [before * height * width, *hidden, classes]
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(widths), start=1):
        modules[f"fc{layer}"] = nn.Linear(fan_in, fan_out)
        if layer < len(widths) - 1:
            modules[f"{activation.name}{number + layer}"] = Elementwise(activation)
    return nn.Sequential(modules)


class Recurrent(nn.Module):
    """Recurrent layers over the rows of an image, and one on their last hidden state.

    ``cell`` is ``rnn``, ``lstm`` or ``gru``; the layers are ``rnn1`` and so on, then ``fc``. The
    time steps are the rows of images of (channels, height, width), each with the pixels of all
    channels; those of (steps, features) as they are; of (steps,) one feature each.
    """

    def __init__(
        self,
        cell: str,
        shape: Shape,
        classes: int,
        *,
        activation: Activation,
        hidden: Sequence[int],
    ) -> None:
        super().__init__()
        if not 1 <= len(shape) <= 3:
            raise SettingError(
                f"model={cell} needs images, or features of shape (steps, features), not {shape}"
            )
        if not hidden:
            raise SettingError(f"hidden must have a width for model={cell}, not 'none'")
        options = {}
        if cell == RNN:
            if activation.name not in OF_RNN:
                raise SettingError(
                    f"activation must be {' or '.join(OF_RNN)} for model=rnn, not "
                    f"'{activation.name}'"
                )
            options["nonlinearity"] = activation.name
        kind = {RNN: nn.RNN, LSTM: nn.LSTM, GRU: nn.GRU}[cell]
        features = {1: 1, 2: shape[-1], 3: shape[0] * shape[-1]}[len(shape)]
        self.layers = [f"{cell}{layer}" for layer in range(1, len(hidden) + 1)]
        for name, (before, after) in zip(
            self.layers, itertools.pairwise([features, *hidden]), strict=True
        ):
            self.add_module(name, kind(before, after, batch_first=True, **options))
        self.fc = nn.Linear(hidden[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (n, *shape)."""
        if x.dim() == 4:
            x = x.transpose(1, 2).flatten(2)
        elif x.dim() == 2:
            x = x.unsqueeze(2)
        for name in self.layers:
            x, _ = self.get_submodule(name)(x)
        logits: Tensor = self.fc(x[:, -1])
        return logits


def _recurrent(cell: str) -> Callable[..., nn.Module]:
    def build(
        shape: Shape, classes: int, *, activation: Activation, hidden: Sequence[int], **_: object
    ) -> nn.Module:
        return Recurrent(cell, shape, classes, activation=activation, hidden=hidden)

    return build


BUILT_IN: dict[str, Callable[..., nn.Module]] = {
    CNN: cnn,
    **{cell: _recurrent(cell) for cell in (RNN, LSTM, GRU)},
}

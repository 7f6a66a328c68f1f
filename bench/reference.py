"""The usual way to train: nn.Module, torch.optim.SGD, StepLR and a DataLoader.

It shares no code with the package's training, so that the tests can hold the two against
each other bit for bit, and the benches against the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

# PyTorch's own modules for the activations.
MODULES: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "selu": nn.SELU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "linear": nn.Identity,
}


def network(state: Mapping[str, Tensor], activation: str) -> nn.Sequential:
    """Linear layers with a copy of ``state``, the activation between them."""
    tensors = list(state.values())
    layers: list[nn.Module] = [nn.Flatten()]
    for weight, bias in zip(tensors[::2], tensors[1::2], strict=True):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        layers += [linear, MODULES[activation]()]
    return nn.Sequential(*layers[:-1])


def train(
    state: Mapping[str, Tensor],
    activation: str,
    dataset: Dataset[Any],
    orders: Sequence[Tensor],
    *,
    batch_size: int = 100,
    lr: float = 0.1,
    gamma: float = 0.96,
    momentum: float = 0.9,
    nesterov: bool = True,
    after_iteration: Callable[[nn.Module, int], None] = lambda *_: None,
) -> tuple[list[float], dict[str, Tensor]]:
    """Train a network from ``state``, one epoch for each of ``orders``.

    Returns the loss of every iteration and the trained tensors, named as in ``state``.
    """
    model = network(state, activation)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, nesterov=nesterov)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=gamma)
    losses = []
    for order in orders:
        for images, labels in DataLoader(dataset, batch_size, sampler=order.tolist()):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
            after_iteration(model, len(losses))
        scheduler.step()
    parameters = (parameter.detach() for parameter in model.parameters())
    return losses, dict(zip(state, parameters, strict=True))

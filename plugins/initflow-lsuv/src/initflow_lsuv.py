"""Orthonormal weights, then unit variance layer by layer, as measured on images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import initflow

ROUNDING = 16  # so many units in the last place of the outputs are no variance of theirs
# What gives the outputs of one weight when it is called: others hold several, or call nothing.
LAYERS = (
    *(nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.Bilinear),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@initflow.initializer
def lsuv(
    network: nn.Module,
    images: Tensor | tuple[Any, ...] | Mapping[str, Any],
    generator: torch.Generator,
    *,
    tolerance: float = 0.1,
    max_iterations: int = 10,
) -> None:
    """Orthonormal weights, scaled until every layer's outputs have variance 1 on the images.

    Layer by layer from the first to the logits, in the order in which the network calls them:
    the weights are drawn as ``orthogonal`` draws them, then divided by the standard deviation of
    the layer's pre-activations, over all images and units, until that variance is 1 to within
    ``tolerance``, at most ``max_iterations`` times. Once would do but for the biases, which stay
    as they are. What does not vary cannot be scaled: a layer that receives nothing, or constants
    that it maps to one number, keeps its orthonormal weights. Mishkin and Matas 2015, "All you
    need is a good init", algorithm 1.

    Nothing is assumed of the activation function, and so no variance is stated. Of any model,
    linear layers, convolutions and embeddings are filled, as one of them gives what it weighs.
    Raises a ValueError for weights that are used otherwise, in a recurrent layer or an attention,
    or not at all on these images; for a ``tolerance`` that is not above 0 or ``max_iterations``
    below 1.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, not {tolerance:g}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, not {max_iterations}")
    layers = _layers(network)
    waiting = dict(layers)

    def fill(layer: nn.Module, arguments: tuple[Any, ...], given: Any, output: Any) -> Any:
        if waiting.pop(layer, None) is None:
            return output  # called once more: it has its weights
        nn.init.orthogonal_(_weight(layer), generator=generator)

        def outputs() -> Tensor:
            result: Tensor = layer.forward(*arguments, **given)
            return result

        _scale(layer, outputs, tolerance, max_iterations)
        return outputs()

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(fill, with_kwargs=True).remove)
        _call(network, images)
    for name in waiting.values():
        raise ValueError(f"lsuv goes by what a layer gives: '{name}' is not called, skip it")


def _layers(network: nn.Module) -> dict[nn.Module, str]:
    """The modules to be filled, by which their weight requires a gradient."""
    layers: dict[nn.Module, str] = {}
    seen = set()
    for name, module in network.named_modules():
        for parameter, value in module.named_parameters(recurse=False):
            if not value.requires_grad or value.dim() < 2 or id(value) in seen:
                continue
            seen.add(id(value))
            # An attention takes its output's weights by itself.
            inside = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
            if not isinstance(module, LAYERS) or inside or parameter != "weight":
                raise ValueError(
                    f"lsuv goes by what a layer gives, and cannot fill '{name}' "
                    f"({type(module).__name__}): skip it"
                )
            layers[module] = name
    return layers


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _call(network: nn.Module, images: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> None:
    if isinstance(images, Mapping):
        network(**images)
    elif isinstance(images, tuple):
        network(*images)
    else:
        network(images)


def _scale(
    layer: nn.Module, outputs: Callable[[], Tensor], tolerance: float, max_iterations: int
) -> None:
    """Scale the weights of ``layer`` until its ``outputs`` have variance 1."""
    for _ in range(max_iterations):
        found = outputs()
        variance = found.double().var(correction=0).item()
        reached = abs(variance - 1) <= tolerance
        if reached or not (_varies(found) and _varies(_without_bias(layer, found))):
            return
        _weight(layer).div_(variance**0.5)


def _without_bias(layer: nn.Module, outputs: Tensor) -> Tensor:
    bias = getattr(layer, "bias", None)
    if not isinstance(bias, Tensor):
        return outputs
    kernel = _weight(layer).dim() - 2 if hasattr(layer, "kernel_size") else 0
    return outputs - bias.view(-1, *[1] * kernel)


def _varies(outputs: Tensor) -> bool:
    """Whether ``outputs`` are finite, and differ by more than rounding."""
    limits = torch.finfo(outputs.dtype)
    std = outputs.double().std(correction=0).item()
    least = max(ROUNDING * limits.eps * outputs.abs().max().item(), limits.tiny)
    return least < std < limits.max

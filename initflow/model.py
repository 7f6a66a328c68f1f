"""The feed-forward networks: their parameters, initialized, exported and hashed."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from initflow.activations import Activation
from initflow.scheme import Scheme
from initflow.seeds import generator

# Floats in a cache line: the kernels of matrix products round differently where a tensor does
# not start on one, as PyTorch's own tensors all do.
ALIGNMENT = 16


def padded_size(shape: tuple[int, ...]) -> int:
    """Floats that a tensor takes up to where the next one may start."""
    return -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT


def stack_of(flat: Tensor, members: int, shape: tuple[int, ...]) -> Tensor:
    """A view (members, *shape) of ``flat``, each member's tensor starting on a cache line."""
    rows = flat.view(members, padded_size(shape))[:, : math.prod(shape)]
    return rows.view(members, *shape)


class Parameters:
    """Weights and biases of ``members`` networks of one shape, as views of one flat tensor.

    ``widths`` runs from the pixels over the hidden layers to the classes. Layer l has
    ``weights[l]`` of shape (members, fan_out, fan_in) and ``biases[l]`` of shape
    (members, fan_out). One network is a stack of one. What is done elementwise to all of
    them (momentum, the update) is one operation on ``flat``, in which zeros fill the gaps
    between tensors that start on cache lines.
    """

    def __init__(self, widths: tuple[int, ...], members: int = 1, device: str = "cpu") -> None:
        self.widths = widths
        self.members = members
        shapes = [
            shape
            for fan_in, fan_out in pairwise(widths)
            for shape in ((fan_out, fan_in), (fan_out,))
        ]
        sizes = [members * padded_size(shape) for shape in shapes]
        self.flat = torch.zeros(sum(sizes), device=device)
        parts = torch.split(self.flat, sizes)
        views = [stack_of(part, members, shape) for part, shape in zip(parts, shapes, strict=True)]
        self.weights: list[Tensor] = views[::2]
        self.biases: list[Tensor] = views[1::2]

    @property
    def depth(self) -> int:
        return len(self.weights)

    def zeros_like(self) -> Parameters:
        return Parameters(self.widths, self.members, str(self.flat.device))

    def copy_to(self, device: str) -> Parameters:
        copy = Parameters(self.widths, self.members, device)
        copy.flat.copy_(self.flat)
        return copy

    def state(self, member: int = 0) -> dict[str, Tensor]:
        """One network's tensors by name, ``fc1.weight``, ``fc1.bias``, …, as views."""
        state = {}
        for name, weight, bias in zip(
            layer_names(self.depth), self.weights, self.biases, strict=True
        ):
            state[f"{name}.weight"] = weight[member]
            state[f"{name}.bias"] = bias[member]
        return state


def layer_names(depth: int) -> list[str]:
    """``fc1``, ``fc2``, … in forward order."""
    return [f"fc{layer}" for layer in range(1, depth + 1)]


def initialize(widths: tuple[int, ...], scheme: Scheme, *, bias_init: str, seed: int) -> Parameters:
    """One network under ``scheme``, on the CPU, so that every device starts from the same bits.

    Weights and biases are drawn from streams of their own: networks of one seed have the
    same biases, whatever their schemes draw.
    """
    parameters = Parameters(widths)
    weight_stream, bias_stream = generator(seed, "weights"), generator(seed, "biases")
    for weight, bias in zip(parameters.weights, parameters.biases, strict=True):
        scheme.initialize(weight[0], weight_stream)
        bound = bias_bound(bias_init, weight.shape[-1])
        if bound:
            bias.uniform_(-bound, bound, generator=bias_stream)
    return parameters


def bias_bound(bias_init: str, fan_in: int) -> float:
    """Biases are drawn from U(±bound), by default as ``torch.nn.Linear`` does, or are 0."""
    return {"pytorch": 1 / math.sqrt(fan_in), "zeros": 0.0}[bias_init]


class _Normalize(nn.Module):
    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std


class _Elementwise(nn.Module):
    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation.function(x)


def to_module(
    state: Mapping[str, Tensor], activation: Activation, *, mean: float = 0.0, std: float = 1.0
) -> nn.Sequential:
    """A plain PyTorch module with a copy of ``state``: (n, pixels) to (n, classes) logits.

    It takes pixels in [0, 1]: it starts with the normalization that its data had.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    if (mean, std) != (0.0, 1.0):
        modules["normalize"] = _Normalize(mean, std)
    names = layer_names(len(state) // 2)
    for name in names:
        fan_out, fan_in = state[f"{name}.weight"].shape
        modules[name] = nn.Linear(fan_in, fan_out)
        if name != names[-1]:
            modules[f"{activation.name}{name.removeprefix('fc')}"] = _Elementwise(activation)
    module = nn.Sequential(modules)
    module.load_state_dict(state)
    return module.eval()


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, shape and little-endian float32 bytes of each tensor, in order."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()

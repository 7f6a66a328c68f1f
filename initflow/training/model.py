"""The feed-forward networks: their parameters, initialized, exported and hashed."""

from __future__ import annotations

import functools
import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from initflow.core.kinds import format_shape
from initflow.core.seeds import generator
from initflow.errors import SettingError
from initflow.initializers import contract
from initflow.initializers.activations import Activation
from initflow.initializers.scheme import Place, Scheme, places
from initflow.models.architectures import Elementwise
from initflow.training.splits import Scale, Split

BATCH = 1_000  # images, at most, that a scheme sees which fills the network as a whole

# Floats in a cache line: the kernels of matrix products round differently where a tensor does
# not start on one, as PyTorch's own tensors all do.
ALIGNMENT = 16


def padded_size(shape: tuple[int, ...]) -> int:
    """Floats that a tensor takes up to where the next one may start."""
    return -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT


def aligned(members: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An empty (members, *shape), each member's part starting on a cache line."""
    rows = torch.empty(members, padded_size(shape), device=device)
    return rows[:, : math.prod(shape)].view(members, *shape)


class Parameters:
    """Weights and biases of ``members`` networks of one shape, as views of one flat tensor.

    ``widths`` runs from the pixels over the hidden layers to the classes. Layer l has
    ``weights[l]`` of shape (members, fan_out, fan_in) and ``biases[l]`` of shape
    (members, fan_out). One network is a stack of one. What is done elementwise to all of
    them (momentum, the update) is one operation on ``flat``, in which zeros fill the gaps
    between tensors that start on cache lines; to some of them, it is one on the ``rows`` of
    each tensor.
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
        self._parts = [part.view(members, -1) for part in torch.split(self.flat, sizes)]
        views = [
            part[:, : math.prod(shape)].view(members, *shape)
            for part, shape in zip(self._parts, shapes, strict=True)
        ]
        self.weights: list[Tensor] = views[::2]
        self.biases: list[Tensor] = views[1::2]

    @property
    def depth(self) -> int:
        return len(self.weights)

    @property
    def title(self) -> str:
        """``784-100-10``, for people."""
        return format_shape(self.widths)

    def rows(self, members: slice) -> list[Tensor]:
        """All numbers of ``members``, neighbours in the stack, as few contiguous tensors."""
        return [self.flat] if members == slice(0, self.members) else self.parts(members)

    def parts(self, members: slice) -> list[Tensor]:
        """The same in one contiguous tensor for each of :meth:`state`, in its order."""
        return [part[members] for part in self._parts]

    def zeros_like(self) -> Parameters:
        return Parameters(self.widths, self.members, str(self.flat.device))

    def copy_to(self, device: str) -> Parameters:
        copy = Parameters(self.widths, self.members, device)
        copy.flat.copy_(self.flat)
        return copy

    def copy(self) -> Parameters:
        """A copy where it is."""
        return self.copy_to(str(self.flat.device))

    def member(self, member: int) -> Parameters:
        """A copy of one network, as a stack of one."""
        one = Parameters(self.widths, 1, str(self.flat.device))
        for part, originals in zip(one._parts, self._parts, strict=True):
            part.copy_(originals[member])
        return one

    def select(self, members: Sequence[int]) -> Parameters:
        """A copy of ``members`` in their order; of all of them, it is the stack itself."""
        if list(members) == list(range(self.members)):
            return self
        some = Parameters(self.widths, len(members), str(self.flat.device))
        at = torch.tensor(members).to(self.flat.device)
        for part, originals in zip(some._parts, self._parts, strict=True):
            torch.index_select(originals, 0, at, out=part)
        return some

    @classmethod
    def stack(cls, networks: Sequence[Parameters], device: str) -> Parameters:
        """A copy of ``networks`` of one shape, each a stack of one, in their order."""
        first = networks[0]
        own = str(first.flat.device)  # where many small copies are no matter
        stacked = cls(first.widths, len(networks), own)
        for member, network in enumerate(networks):
            for part, original in zip(stacked._parts, network._parts, strict=True):  # noqa: SLF001
                part[member].copy_(original[0])
        return stacked if device == own else stacked.copy_to(device)

    def state(self, member: int = 0) -> dict[str, Tensor]:
        """One network's tensors by name, ``fc1.weight``, ``fc1.bias``, …, as views."""
        state, names = {}, layer_names(self.depth)
        for name, weight, bias in zip(names, self.weights, self.biases, strict=True):
            state[f"{name}.weight"] = weight[member]
            state[f"{name}.bias"] = bias[member]
        return state


def layer_names(depth: int) -> list[str]:
    """``fc1``, ``fc2``, … in forward order."""
    return [f"fc{layer}" for layer in range(1, depth + 1)]


def initialize(
    widths: tuple[int, ...],
    scheme: Scheme,
    activation: Activation,
    *,
    bias_init: str,
    seed: int,
    data: Split | None = None,
) -> Parameters:
    """One network under ``scheme``, on the CPU, so that every device starts from the same bits.

    Weights and biases are drawn from streams of their own: networks of one seed have the
    same biases, whatever their schemes draw, unless a scheme sets them itself. A scheme that
    fills the network as a whole sees :data:`BATCH` images of ``data``, drawn from a third.

    Raises :class:`initflow.errors.PluginError` for a scheme of a plugin that fails or breaks a
    rule, and :class:`initflow.errors.SettingError` for one that refuses its arguments.
    """
    parameters = Parameters(widths)
    weight_stream, bias_stream = generator(seed, "weights"), generator(seed, "biases")
    for weight, bias in zip(parameters.weights, parameters.biases, strict=True):
        bound = bias_bound(bias_init, weight.shape[-1])
        if bound:
            bias.uniform_(-bound, bound, generator=bias_stream)
    state = parameters.state()
    if scheme.kind == "network":
        if data is None:
            raise SettingError(f"scheme '{scheme.spec}' needs images to see the network on")
        order = torch.randperm(len(data), generator=generator(seed, "initialization"))
        batch = data.take(order[:BATCH]).to(torch.device("cpu"))
        fill = functools.partial(fill_network, scheme, activation, batch)
        contract.apply(scheme, state, fill, weight_stream, "the network")
    for name, at in zip(layer_names(parameters.depth), places(widths, activation), strict=True):
        if scheme.kind == "layer":
            tensors = {key: state[key] for key in (f"{name}.weight", f"{name}.bias")}
            fill = functools.partial(fill_layer, scheme, at)
            contract.apply(scheme, tensors, fill, weight_stream, name)
        scheme.variance(at)  # what it cannot state is found here, not when it is used
        scheme.bias_variance(at)
    return parameters


def fill_layer(
    scheme: Scheme, at: Place, tensors: Mapping[str, Tensor], generator: torch.Generator
) -> object:
    """Let ``scheme`` fill one layer's tensors, its weight and its bias."""
    weight, bias = tensors.values()
    return scheme.fill_layer(weight, bias, at, generator)


def fill_network(
    scheme: Scheme,
    activation: Activation,
    batch: Split,
    tensors: Mapping[str, Tensor],
    generator: torch.Generator,
) -> object:
    """Let ``scheme`` fill the tensors of a whole network, named as by :meth:`Parameters.state`."""
    module = network(tensors, activation)
    images, labels = batch.images.clone(), batch.labels.clone()  # it may do with them what it likes
    returned = scheme.fill_network(module, images, labels, activation, generator)
    contract.kept(tensors, dict(module.named_parameters()))
    return returned


def bias_bound(bias_init: str, fan_in: int) -> float:
    """Biases are drawn from U(±bound), by default as ``torch.nn.Linear`` does, or are 0."""
    return {"pytorch": 1 / math.sqrt(fan_in), "zeros": 0.0}[bias_init]


class Normalize(nn.Module):
    """As :func:`initflow.training.scaling.scaled` does it, to the bit."""

    def __init__(self, mean: Scale, std: Scale) -> None:
        super().__init__()
        self.mean: float | Tensor
        self.std: float | Tensor
        for name, scale in (("mean", mean), ("std", std)):
            if isinstance(scale, float):
                setattr(self, name, scale)
            else:  # of each feature; no weights of the network
                self.register_buffer(
                    name, torch.tensor(scale, dtype=torch.float32), persistent=False
                )

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


def network(state: Mapping[str, Tensor], activation: Activation) -> nn.Sequential:
    """A plain PyTorch module on the very tensors of ``state``: (n, pixels) to (n, classes)."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    names = layer_names(len(state) // 2)
    for name in names:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        modules[name] = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        modules[name].weight, modules[name].bias = nn.Parameter(weight), nn.Parameter(bias)
        if name != names[-1]:
            modules[f"{activation.name}{name.removeprefix('fc')}"] = Elementwise(activation)
    return nn.Sequential(modules)


def to_module(
    state: Mapping[str, Tensor], activation: Activation, *, mean: Scale = 0.0, std: Scale = 1.0
) -> nn.Sequential:
    """A plain PyTorch module with a copy of ``state``: (n, pixels) to (n, classes) logits.

    It takes pixels in [0, 1], or other features as the data has them: it starts with the
    normalization that its data had.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    if (mean, std) != (0.0, 1.0):
        modules["normalize"] = Normalize(mean, std)
    copied = {name: tensor.clone() for name, tensor in state.items()}
    modules.update(network(copied, activation).named_children())
    return nn.Sequential(modules).eval()


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, shape and little-endian float32 bytes of each tensor, in order."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()

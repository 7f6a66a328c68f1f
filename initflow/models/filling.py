"""New weights for a model's matrices, drawn beside it: the model itself is only read here."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from initflow.core.seeds import generator
from initflow.errors import PluginError, SettingError, cause
from initflow.initializers import contract
from initflow.initializers.activations import Activation
from initflow.initializers.scheme import Place, Scheme
from initflow.models.batches import Batch, form
from initflow.models.weights import LINEAR, Matrix, bias_part, unwrapped

REDUCED = (torch.float16, torch.bfloat16)  # drawn in single precision, and rounded then
Drawn = dict[Matrix, Tensor]


def by_layer(scheme: Scheme, places: Mapping[Matrix, Place], seed: int) -> tuple[Drawn, Drawn]:
    """Rows and biases of each matrix, by themselves; biases where the scheme sets them.

    Each is drawn on the CPU, from a stream of its own name.
    """
    rows: Drawn = {}
    biases: Drawn = {}
    for matrix, place in places.items():
        tensors = {f"{matrix.name}.weight": _empty(matrix), f"{matrix.name}.bias": _bias(matrix)}
        weight, bias = tensors.values()
        fill = functools.partial(_fill_layer, scheme, place)
        stream = generator(seed, f"initialize {matrix.name}")
        try:
            contract.apply(scheme, tensors, fill, stream, matrix.name)
        except SettingError as error:
            raise SettingError(f"{error} (at '{matrix.name}', {matrix.kind})") from error
        rows[matrix] = weight
        if not scheme.fills_biases:
            continue
        if matrix.bias:
            biases[matrix] = bias
        elif bias.any():
            raise SettingError(
                f"scheme '{scheme.spec}' sets biases, and '{matrix.name}' ({matrix.kind}) has none"
            )
    return rows, biases


def _fill_layer(
    scheme: Scheme, place: Place, tensors: Mapping[str, Tensor], stream: torch.Generator
) -> object:
    weight, bias = tensors.values()
    return scheme.fill_layer(weight, bias, place, stream)


def _empty(matrix: Matrix) -> Tensor:
    rows = matrix.rows()
    return torch.empty(rows.shape, dtype=_dtype(rows))


def _bias(matrix: Matrix) -> Tensor:
    """A copy of a matrix's biases; zeros where it has none."""
    if matrix.bias:
        bias = matrix.bias.read()[bias_part(matrix)]
        return bias.to("cpu", _dtype(bias), copy=True)
    return torch.zeros(len(matrix.rows()), dtype=_dtype(matrix.rows()))


def _dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in REDUCED else tensor.dtype


def as_network(
    scheme: Scheme,
    model: nn.Module,
    places: Mapping[Matrix, Place],
    batch: Batch | None,
    seed: int,
) -> tuple[Drawn, Drawn]:
    """Rows and biases of each matrix, by a scheme that sees a copy of the model and a batch.

    The copy is on the CPU, in evaluation mode; what is to be filled, and nothing else, has
    ``requires_grad``. ``images`` are the model's inputs: a tensor or, of several, a tuple, or a
    mapping by name; ``labels`` the first targets.
    """
    if batch is None:
        raise SettingError(f"scheme '{scheme.spec}' sees the model on a batch: give one")
    model = unwrapped(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for matrix in places:
        if not matrix.slot.is_plain:
            raise SettingError(
                f"scheme '{scheme.spec}' fills whole models, and cannot fill '{matrix.name}' "
                f"({matrix.kind}), whose weight is parametrized: skip it"
            )
    slots = {m.slot.name: m.slot for m in places}
    of_bias = {m.bias.name: m.bias for m in places if m.bias and m.bias.is_plain}
    keys = {name: f"{names[id(slot.originals[0])]}.weight" for name, slot in slots.items()}
    keys |= {name: f"{names[id(slot.originals[0])]}.bias" for name, slot in of_bias.items()}
    tensors = {keys[n]: slot.read().to("cpu", copy=True) for n, slot in (slots | of_bias).items()}
    try:
        original = copy.deepcopy(model).to("cpu").eval()
    except Exception as error:  # a module may refuse to be copied in any way
        raise SettingError(f"model cannot be copied: {cause(error)}") from error
    network = _Network(original, places, batch)
    fill = functools.partial(network.fill, scheme)
    contract.apply(scheme, tensors, fill, generator(seed, "initialize"), "the model")
    return (
        {m: m.of(tensors[keys[m.slot.name]]).contiguous() for m in places},
        {m: tensors[keys[m.bias.name]][bias_part(m)] for m in places if m.bias and m.bias.is_plain},
    )


@dataclass(frozen=True)
class _Network:
    """A model and what is to be seen on it; each run gets copies."""

    original: nn.Module
    places: Mapping[Matrix, Place]
    batch: Batch

    def fill(
        self, scheme: Scheme, tensors: Mapping[str, Tensor], stream: torch.Generator
    ) -> object:
        """Let ``scheme`` fill a copy of the model, made of ``tensors``."""
        network = copy.deepcopy(self.original)
        own = _by_key(network)
        network.requires_grad_(requires_grad=False)
        for name, tensor in tensors.items():
            own[name].data = tensor
            own[name].requires_grad_()
        before = {name: tensor.clone() for name, tensor in _others(network).items()}
        returned = scheme.fill_network(
            network,
            _inputs(self.batch),
            _labels(scheme, self.batch),
            _single(scheme, [place.activation for place in self.places.values()]),
            stream,
            depth=next(iter(self.places.values())).depth,
        )
        now = _by_key(network)
        contract.kept(tensors, {name: now[name].data for name in tensors if name in now})
        for name, tensor in _others(network).items():
            if name not in before or not torch.equal(before[name], tensor):
                raise PluginError(
                    f"scheme '{scheme.spec}' of {scheme.provider} changes '{name}', which it is "
                    "not to fill"
                )
        return returned


def _by_key(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by the names that the contract goes by."""
    ends = (".weight", ".bias")
    return {f"{name}{end}": p for name, p in network.named_parameters() for end in ends}


def _others(network: nn.Module) -> dict[str, Tensor]:
    """The parameters that are not filled."""
    found = network.named_parameters()
    return {name: p.detach() for name, p in found if not p.requires_grad}


def _inputs(batch: Batch) -> object:
    """What the model is called with, copied, as one value."""
    if batch.by_name:
        return {name: _copied(value) for name, value in batch.by_name.items()}
    arguments = tuple(map(_copied, batch.arguments))
    return arguments[0] if len(arguments) == 1 else arguments


def _copied(value: object) -> object:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _labels(scheme: Scheme, batch: Batch) -> object:
    targets = [*batch.targets, *batch.targets_by_name.values()]
    if not targets and scheme.asks_for("labels"):
        raise SettingError(
            f"scheme '{scheme.spec}' asks for labels: batch must have them, not {form(batch)}"
        )
    return _copied(targets[0]) if targets else None


def _single(scheme: Scheme, activations: Sequence[Activation]) -> Activation:
    """The one activation function of the hidden layers, for a scheme that asks for it."""
    different = dict.fromkeys(activations)
    found = [phi for phi in different if phi.name != LINEAR] or activations
    if len(found) > 1 and scheme.asks_for("activation"):
        names = ", ".join(phi.name for phi in found)
        raise SettingError(
            f"scheme '{scheme.spec}' goes by one activation function; the model has {names}"
        )
    return found[0]

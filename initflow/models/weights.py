"""The weight matrices of any ``nn.Module``: what one initialization scheme after the other fills.

A matrix is one linear map: all of a parameter or, where several are packed into one (the gates of
a recurrent layer, the projections of an attention), a block of its rows. Its fans are what a unit
really sums over and what an input really feeds, on average: in a convolution of ``groups`` and
``stride``, in/groups · kernel and out/groups · kernel/stride; in a transposed one
in/groups · kernel/stride and out/groups · kernel (rounded). An embedding is a lookup, of fan-in 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from initflow.errors import SettingError
from initflow.models import layers, slots
from initflow.models.slots import Slot

LINEAR = "linear"
FORGET = "forget"
PROJECTIONS = layers.PROJECTIONS[:3]  # the output's is a module of its own
WHOLE = (0, None)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *layers.TRANSPOSED)


@dataclass(frozen=True, eq=False)
class Matrix:
    """One linear map of a model, as it lies in ``slot``: in the rows ``part`` of it.

    ``layer`` is what it shares with those beside it, such as the other gates; ``activation`` is
    given where the module itself applies one. ``form`` says how units lie in the slot: first,
    second (``transposed``), or by ``groups`` as in a transposed convolution. ``tied`` are other
    names that the same tensor has.
    """

    name: str
    kind: str
    module: str
    slot: Slot
    fan_in: int
    fan_out: int
    layer: str
    part: tuple[int, int | None] = WHOLE
    form: Literal["units", "transposed", "groups"] = "units"
    groups: int = 1
    activation: str | None = None
    gate: str = ""
    bias: Slot | None = None
    padding: int | None = None
    tied: tuple[str, ...] = ()

    def rows(self) -> Tensor:
        """It as it is, units along the first axis: (out, in/groups, *kernel)."""
        return self.of(self.slot.read())

    def of(self, stored: Tensor) -> Tensor:
        """Its rows of what the slot holds."""
        stored = stored[slice(*self.part)]
        if self.form == "transposed":
            return stored.transpose(0, 1)
        return layers.rows_by_unit(stored, self.groups) if self.form == "groups" else stored

    @torch.no_grad()
    def put(self, rows: Tensor, stored: Tensor) -> None:
        """Write ``rows`` where they belong in ``stored``; a padding entry stays as it is."""
        if self.form == "groups":
            by_group = rows.view(self.groups, -1, *rows.shape[1:])
            rows = by_group.transpose(1, 2).flatten(0, 1)
        elif self.form == "transposed":
            rows = rows.transpose(0, 1)
        target = stored[slice(*self.part)]
        kept = target[self.padding].clone() if self.padding is not None else None
        target.copy_(rows)
        if kept is not None:
            target[self.padding] = kept

    def variance(self) -> float:
        """Of its entries, without those of the padding."""
        rows = self.rows().double()
        if self.padding is not None:
            keep = torch.arange(rows.shape[1], device=rows.device) != self.padding
            rows = rows[:, keep]
        return rows.var(correction=0).item() if rows.numel() else 0.0


@dataclass(frozen=True)
class Weights:
    """The matrices to fill, in the order of the modules, and why other tensors are left alone.

    ``every`` has those that are left alone, too.
    """

    matrices: Sequence[Matrix]
    left: Mapping[str, str]
    every: Sequence[Matrix]


def of(model: nn.Module) -> Weights:
    """What ``model`` holds. Raises :class:`SettingError` for one that has no weights yet."""
    layers.check(model)
    model = unwrapped(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise SettingError(
                f"model must have its weights; '{name}' is on the meta device: call "
                "model.to_empty(device='cpu') first"
            )
    own = parametrize.type_before_parametrizations(model).__name__.lower()
    found: list[Matrix] = []
    left: dict[str, str] = {}
    first: dict[int, Matrix] = {}
    for name, module in model.named_modules():
        # The parts of a parametrized weight are seen where it is used.
        if "parametrizations" in name.split("."):
            continue
        for found_here in _of_module(name or own, module):
            matrix = replace(found_here, module=name)
            key = id(matrix.slot.originals[0])
            known = first.get(key)
            if known and known.slot.module is not matrix.slot.module:
                _tie(known, matrix, found, first)
                left[matrix.slot.name] = f"tied to {known.slot.name}"
                continue
            first.setdefault(key, matrix)
            found.append(matrix)
    fillable = [matrix for matrix in found if not (reason := _frozen(matrix.slot))]
    left |= {m.slot.name: reason for m in found if (reason := _frozen(m.slot))}
    return Weights(fillable, left | _unknown(model, found), found)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, where it is spread over devices."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model


def _tie(known: Matrix, other: Matrix, found: list[Matrix], first: dict[int, Matrix]) -> None:
    """Let one tensor in two places go by the place that sums over more.

    A head that shares its weights with an embedding is the one that could explode.
    """
    names = (*known.tied, other.name)
    tied = replace(known, tied=names)
    if other.fan_in > known.fan_in:
        tied = replace(
            tied,
            kind=f"{known.kind}, {other.kind}",
            fan_in=other.fan_in,
            fan_out=other.fan_out,
            form=other.form,
            groups=other.groups,
            part=other.part,
        )
    found[found.index(known)] = tied
    first[id(known.slot.originals[0])] = tied


def _frozen(slot: Slot) -> str:
    if not all(original.requires_grad for original in slot.originals):
        return "frozen"
    if not all(original.is_floating_point() for original in slot.originals):
        return f"of {slot.originals[0].dtype}".replace("torch.", "")
    return ""


def _unknown(model: nn.Module, matrices: Sequence[Matrix]) -> dict[str, str]:
    """Parameters that are no matrix, nor the bias of one."""
    known = {id(p) for m in matrices for p in m.slot.originals}
    known |= {id(p) for m in matrices if m.bias for p in m.bias.originals}
    found = {}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if id(parameter) in known:
            continue
        holder = modules[name.rpartition(".")[0]]
        kinds = [kind.__name__ for kind in type(holder).__mro__]
        if any(map(layers.NORMALIZATION.fullmatch, kinds)):
            found[name] = "normalization"
        elif not parameter.requires_grad:
            found[name] = "frozen"
        else:
            found[name] = f"no matrix of a known kind, but {type(holder).__name__}'s own"
    return found


def _of_module(name: str, module: nn.Module) -> Iterator[Matrix]:
    """Those that ``module`` itself holds."""
    if isinstance(module, nn.RNNBase):
        yield from _of_recurrent(name, module)
    elif isinstance(module, nn.RNNCellBase):
        yield from _of_gates(name, module, name, "")
    elif isinstance(module, nn.MultiheadAttention):
        yield from _of_attention(name, module)
    else:
        weight = slots.of(name, module, "weight")
        about = _about(module) if weight else None
        if weight and about:
            base = {"name": name, "module": name, "layer": name, "slot": weight}
            yield Matrix(**base, bias=slots.of(name, module, "bias"), **about)  # type: ignore[arg-type]


def _about(module: nn.Module) -> dict[str, Any] | None:
    """Kind, fans and form of a module with a single weight, None for one of no known kind."""
    if isinstance(module, nn.Linear):
        return _kind(module, nn.Linear) | _fans(module.in_features, module.out_features)
    if isinstance(module, nn.Bilinear):
        fan_in = module.in1_features * module.in2_features
        return _kind(module, nn.Bilinear) | _fans(fan_in, module.out_features)
    if isinstance(module, layers.EMBEDDINGS):
        its = _kind(module, *layers.EMBEDDINGS) | _fans(1, module.embedding_dim)
        return its | {"form": "transposed", "padding": module.padding_idx}
    if isinstance(module, CONVOLUTIONS):
        return _of_convolution(module)
    if _is_conv1d(module):
        fan_in, fan_out = module._parameters["weight"].shape  # type: ignore[union-attr]  # noqa: SLF001
        return {"kind": "Conv1D", "form": "transposed"} | _fans(int(fan_in), int(fan_out))
    return None


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's linear layer with a weight (in, out), as GPT-2 has it."""
    weight = module._parameters.get("weight")  # noqa: SLF001
    return (
        any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
        and weight is not None
        and weight.dim() == 2
        and weight.shape[1] == getattr(module, "nf", None)
    )


def _of_convolution(module: Any) -> dict[str, Any]:
    transposed = isinstance(module, layers.TRANSPOSED)
    kernel, stride = math.prod(module.kernel_size), math.prod(module.stride)
    inputs = module.in_channels // module.groups * kernel
    outputs = module.out_channels // module.groups * kernel
    if transposed:
        its: dict[str, Any] = _fans(inputs / stride, outputs)
        its |= {"form": "groups", "groups": module.groups}
    else:
        its = _fans(inputs, outputs / stride)
    return _kind(module, *CONVOLUTIONS) | its


def _fans(fan_in: float, fan_out: float) -> dict[str, Any]:
    return {"fan_in": max(1, round(fan_in)), "fan_out": max(1, round(fan_out))}


def _kind(module: nn.Module, *kinds: type[nn.Module]) -> dict[str, Any]:
    """The name of torch's own type, also of a type that is made of it."""
    return {"kind": next(kind.__name__ for kind in kinds if isinstance(module, kind))}


def _of_recurrent(name: str, module: nn.RNNBase) -> Iterator[Matrix]:
    directions = ("", "_reverse") if module.bidirectional else ("",)
    for level, direction in itertools.product(range(module.num_layers), directions):
        suffix = f"_l{level}{direction}"
        layer = f"{name}.l{level}{direction}"
        yield from _of_gates(name, module, layer, suffix)
        projection = slots.of(name, module, f"weight_hr{suffix}")
        if projection:
            yield Matrix(
                f"{layer}.projection",
                "LSTM projection",
                name,
                projection,
                module.hidden_size,
                module.proj_size,
                layer,
                activation=LINEAR,
            )


def _of_gates(name: str, module: nn.Module, layer: str, suffix: str) -> Iterator[Matrix]:
    """Of one layer of a recurrent module: input and recurrent matrix of each gate."""
    gates = layers.gates(module)
    kind = _kind(module, *layers.GATES)["kind"]
    size = int(module.hidden_size)  # type: ignore[arg-type]
    for side, short in (("input", "ih"), ("recurrent", "hh")):
        slot = slots.of(name, module, f"weight_{short}{suffix}")
        if slot is None:
            continue
        inputs = slot.read().shape[1]
        for number, (gate, activation) in enumerate(gates.items()):
            yield Matrix(
                f"{layer}.{gate}.{side}",
                f"{kind} {gate}, {side}",
                name,
                slot,
                inputs,
                size,
                layer,
                (number * size, (number + 1) * size),
                activation=activation,
                gate=gate,
                bias=slots.of(name, module, f"bias_{short}{suffix}"),
            )


def _of_attention(name: str, module: nn.MultiheadAttention) -> Iterator[Matrix]:
    """Query, key and value; the output's is a module of its own."""
    size = module.embed_dim
    for number, part in enumerate(PROJECTIONS):
        packed = slots.of(name, module, "in_proj_weight")
        slot = packed or slots.of(name, module, f"{part[0]}_proj_weight")
        if slot is None:
            continue
        block = (number * size, (number + 1) * size)
        yield Matrix(
            f"{name}.{part}",
            f"MultiheadAttention {part}",
            name,
            slot,
            slot.read().shape[1],
            size,
            name,
            block if packed else WHOLE,
            activation=LINEAR,
            bias=slots.of(name, module, "in_proj_bias"),
            gate=part,
        )


def bias_part(matrix: Matrix) -> slice:
    """Where a matrix's biases lie in their slot."""
    if matrix.gate in PROJECTIONS and matrix.part == WHOLE:
        number = PROJECTIONS.index(matrix.gate)
        return slice(number * matrix.fan_out, (number + 1) * matrix.fan_out)
    return slice(*matrix.part) if matrix.gate else slice(None)

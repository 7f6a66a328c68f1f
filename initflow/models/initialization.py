"""Any model's weights under a scheme: all are drawn first, and written then."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from initflow.core.kinds import choice, integer, number
from initflow.core.settings import invalid
from initflow.errors import SettingError, cause
from initflow.initializers.scheme import Place, Scheme
from initflow.models import batches, choosing, filling, places, residual, weights
from initflow.models.choosing import Wanted
from initflow.models.filling import Drawn
from initflow.models.places import Given, Structure
from initflow.models.slots import Slot
from initflow.models.weights import FORGET, Matrix, Weights, bias_part

BIASES = ("keep", "zeros")
SEED = integer(0, 2**63 - 1)


@dataclass(frozen=True)
class Options:
    """How a model is filled, beside its scheme: as :func:`initflow.initialize` has it."""

    batch: object = None
    seed: int = 0
    only: Wanted | Sequence[Wanted] | None = None
    skip: Wanted | Sequence[Wanted] | None = None
    residual: str | None = None
    bias: str = "keep"
    forget_bias: float | None = None

    def __post_init__(self) -> None:
        """Raise :class:`SettingError` for what none of them can be."""
        kinds = {"seed": SEED, "bias": choice(BIASES)}
        if self.forget_bias is not None:
            kinds["forget_bias"] = number("a finite number", math.isfinite)
        if self.residual is not None:
            kinds["residual"] = choice(residual.KINDS)
        for name, kind in kinds.items():
            try:
                kind.parse(getattr(self, name))
            except (TypeError, ValueError):
                raise invalid(name, kind, getattr(self, name)) from None


@dataclass(frozen=True)
class Filled:
    """What was done to a matrix: ``variance`` is of what the model now has.

    ``activation`` is the name of the function that follows, None where it is not known;
    ``stated`` is the variance that the scheme states, None where it states none, times the square
    of ``scale``, by which the drawn matrix was multiplied as the last of a residual branch.
    """

    name: str
    kind: str
    fan_in: int
    fan_out: int
    activation: str | None
    scheme: str
    stated: float | None
    variance: float
    scale: float = 1.0
    tied: tuple[str, ...] = ()
    through: str = ""


@dataclass(frozen=True)
class Report:
    """What was filled, what was left alone with the reason, and what else was set to what."""

    filled: Sequence[Filled]
    left: Mapping[str, str]
    values: Mapping[str, float]
    biases: str
    additions: int = 0
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Plan:
    """How a model is to be filled: all but the seed, so that it can be filled anew, time and again.

    ``at`` is where each of the chosen matrices stands, and ``schemes`` what it is filled by.
    """

    model: nn.Module
    chosen: Weights
    structure: Structure
    at: Mapping[Matrix, Place]
    schemes: Mapping[Matrix, Scheme]
    start: residual.Start
    batch: batches.Batch | None
    options: Options

    @classmethod
    def of(cls, model: nn.Module, given: Given, options: Options) -> Plan:
        """Of ``options``, whose seed is left for :meth:`fill` to say."""
        found = weights.of(model)
        chosen = choosing.chosen(model, found, options.only, options.skip)
        inner = weights.unwrapped(model)
        scheme = places.scheme_of(given)
        batch = None if options.batch is None else batches.given(inner, options.batch)
        structure = Structure.of(inner, found.every, batch)
        at = places.of(scheme, chosen.matrices, structure)
        start = residual.Start(0)
        if options.residual:
            traced = structure.known(f"residual='{options.residual}' needs the model's graph")
            start = residual.start(
                options.residual, inner, traced, structure.products, chosen.matrices
            )
        schemes = {m: scheme or places.made_for(at[m].activation) for m in chosen.matrices}
        return cls(inner, chosen, structure, at, schemes, start, batch, options)

    def fill(self, seed: int) -> Report:
        """Fill the model, which is as it was where this raises."""
        matrices, start = self.chosen.matrices, self.start
        rows, biases = _drawn(self.schemes, self.model, self.at, self.batch, seed)
        stated = {m: self.schemes[m].variance(self.at[m]) for m in matrices}
        set_by_scheme = bool(biases)
        biases |= _other_biases(self.chosen, biases, self.options)
        scales = {m: start.scales.get(m, 1.0) for m in matrices}
        with _put_back(self.model, self.chosen, biases):
            _write(rows, biases, scales)
            _set(self.model, start.values)
            filled = [
                _filled(m, self.schemes[m], self.structure, stated[m], scales[m]) for m in matrices
            ]
        left = {n: reason for n, reason in self.chosen.left.items() if n not in start.values}
        remarks = [self.structure.problem] if self.structure.problem else []
        told = _told(self.chosen, biases, set_by_scheme=set_by_scheme)
        return Report(filled, left, start.values, told, start.number, remarks)


def initialize(model: nn.Module, given: Given, options: Options) -> Report:
    """Fill the weights of ``model``, which is as it was where this raises."""
    return Plan.of(model, given, options).fill(options.seed)


def _drawn(
    schemes: Mapping[Matrix, Scheme],
    model: nn.Module,
    at: Mapping[Matrix, Place],
    batch: batches.Batch | None,
    seed: int,
) -> tuple[Drawn, Drawn]:
    """Of all matrices, each by its scheme."""
    first = next(iter(schemes.values()))
    if first.kind == "network":
        return filling.as_network(first, model, at, batch, seed)
    rows: Drawn = {}
    biases: Drawn = {}
    for matrix, scheme in schemes.items():
        of_one, its_biases = filling.by_layer(scheme, {matrix: at[matrix]}, seed)
        rows |= of_one
        biases |= its_biases
    return rows, biases


def _other_biases(chosen: Weights, drawn: Drawn, options: Options) -> Drawn:
    """What ``bias`` and ``forget_bias`` say of those that the scheme does not set."""
    found: Drawn = {}
    if options.bias == "zeros":
        for matrix in chosen.matrices:
            if matrix.bias and matrix not in drawn:
                found[matrix] = torch.zeros_like(matrix.bias.read()[bias_part(matrix)])
    if options.forget_bias is None:
        return found
    forgetting = [m for m in chosen.matrices if m.gate == FORGET and m.bias]
    if not forgetting:
        raise SettingError("forget_bias needs an LSTM with biases, and none is filled")
    for matrix in forgetting:
        assert matrix.bias is not None
        value = options.forget_bias if matrix.name.endswith(".input") else 0.0  # they are added
        found[matrix] = torch.full_like(matrix.bias.read()[bias_part(matrix)], value)
    return found


@torch.no_grad()
def _write(rows: Drawn, biases: Drawn, scales: Mapping[Matrix, float]) -> None:
    """Into the model, tensor by tensor."""
    by_slot: dict[str, tuple[Slot, Tensor]] = {}
    for matrix, values in rows.items():
        _, stored = by_slot.setdefault(matrix.slot.name, (matrix.slot, matrix.slot.read().clone()))
        matrix.put((scales[matrix] * values).to(stored), stored)
    for matrix, values in biases.items():
        assert matrix.bias is not None
        slot, stored = by_slot.setdefault(
            matrix.bias.name, (matrix.bias, matrix.bias.read().clone())
        )
        stored[bias_part(matrix)] = values.to(stored)
    for slot, stored in by_slot.values():
        try:
            slot.write(stored)
        except Exception as error:  # what a parametrization says of a weight that it cannot be
            raise SettingError(
                f"'{slot.name}' cannot be filled through its parametrization: {cause(error)}"
            ) from error
        if not slot.is_plain and not slot.read().isfinite().all():
            raise SettingError(
                f"'{slot.name}' cannot be filled through its parametrization: it becomes NaN"
            )


@torch.no_grad()
def _set(model: nn.Module, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        model.get_parameter(name).fill_(value)


@contextlib.contextmanager
def _put_back(model: nn.Module, chosen: Weights, biases: Drawn) -> Iterator[None]:
    """Undo what was written where anything fails; only what is parametrized can."""
    slots = [m.slot for m in chosen.matrices]
    slots += [m.bias for m in biases if m.bias]
    kept: list[tuple[Tensor, Tensor]] = []
    if not all(slot.is_plain for slot in slots):
        # Views of inference mode, or shared ones, are the parameters' own business.
        tensors: list[Any] = [*model.parameters(), *model.buffers()]
        kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except SettingError:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        raise


def _filled(
    matrix: Matrix, scheme: Scheme, structure: Structure, stated: float | None, scale: float
) -> Filled:
    followed = structure.activation(matrix)
    return Filled(
        matrix.name,
        matrix.kind,
        matrix.fan_in,
        matrix.fan_out,
        followed.name if followed else None,
        scheme.spec,
        None if stated is None else stated * scale**2,
        matrix.variance(),
        scale,
        matrix.tied,
        "" if matrix.slot.is_plain else "a parametrization",
    )


def _told(chosen: Weights, biases: Drawn, *, set_by_scheme: bool) -> str:
    """What became of the biases, in words."""
    having = [matrix for matrix in chosen.matrices if matrix.bias]
    if not having:
        return "there are none"
    if set_by_scheme:
        return "set by the scheme"
    if not biases:
        return "as they were"
    some = all(matrix in biases for matrix in having)
    opened = any(biases[matrix].any() for matrix in biases)
    others = "set to 0" if some else "as they were"
    return f"{others}, but for the forget gates" if opened or not some else others

"""Rules of normalizations: what comes out has the second moment γ² + β², whatever goes in.

Where what is normalized has many units, its mean and variance are numbers, and it is scaled by
them. Where not (batch normalization, one channel), they hang together with its entries, by the
covariances of all pairs, of which some offsets are taken.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from initflow.models import offsets, operations
from initflow.models.graph import Node
from initflow.models.offsets import Offset
from initflow.models.rules import Backward, Forward, NoRuleError, Rule, shape_of

NORMALIZING = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm")
MANY = 16  # units, whose mean and variance are as good as their expectations
PAIRS = 14  # offsets by which the covariance of all pairs is known
PARTS = 4  # of an axis: offsets are such parts of it, the same ones at each size


def scales_by_numbers(node: Node) -> bool:
    """Whether mean and variance are taken to be numbers; else :class:`Normalized` is its rule."""
    return _units(node) >= MANY


def _uses_batch(node: Node) -> bool:
    known = operations.arguments(node)
    if node.function == "batch_norm":
        return bool(known.get("training", False))
    return node.function != "instance_norm" or bool(known.get("use_input_stats", True))


def _units(node: Node) -> int:
    """How many independent units are normalized together."""
    known, shape = operations.arguments(node), shape_of(node)
    if not _uses_batch(node):
        return MANY
    if node.function in ("batch_norm", "instance_norm"):
        return 1
    if node.function == "group_norm":
        return int(shape[1] // known["num_groups"])
    return max(int(known["normalized_shape"][-1]), MANY)


def _axes(node: Node) -> list[int]:
    """Those that are normalized over, without the units'."""
    known, shape = operations.arguments(node), shape_of(node)
    if node.function == "batch_norm":
        return [0, *range(2, len(shape))]
    if node.function in ("instance_norm", "group_norm"):
        return list(range(2, len(shape)))
    return list(range(len(shape) - len(known["normalized_shape"]), len(shape)))


def affine(node: Node) -> tuple[Tensor, Tensor]:
    """γ and β, each of one entry where all are the same, in the shape of what comes out."""
    known, axes = operations.arguments(node), len(shape_of(node))
    found = []
    for name, value in (("weight", 1.0), ("bias", 0.0)):
        given = known.get(name)
        given = torch.tensor(value) if given is None else given.detach()
        found.append(_laid(offsets.compact(given.double()), node, axes))
    return found[0], found[1]


def _laid(values: Tensor, node: Node, axes: int) -> Tensor:
    if values.numel() == 1:
        return values.reshape((1,) * axes)
    if node.function in ("layer_norm", "rms_norm"):
        return values.reshape(*(1,) * (axes - values.dim()), *values.shape)
    return values.reshape(1, -1, *(1,) * (axes - 2))


def numbers(at: Forward, node: Node) -> tuple[Tensor, Tensor]:
    """The mean that is taken away, and what the rest is multiplied by, before γ and β."""
    known, axes = operations.arguments(node), len(shape_of(node))
    if not _uses_batch(node):
        mean, variance = known["running_mean"], known["running_var"]
        laid = [_laid(offsets.compact(each.double()), node, axes) for each in (mean, variance)]
        return laid[0], (laid[1] + known.get("eps", 1e-5)).rsqrt()
    source = known["input"]
    mean = torch.zeros((), dtype=torch.double)
    if node.function != "rms_norm":
        mean = _mean(at.mean(source), node)
    variance = _mean(at.moment(source), node) - mean.square()
    return mean, (variance + (known.get("eps") or 1e-5)).rsqrt()


def _mean(values: Tensor, node: Node) -> Tensor:
    """Over what is normalized together, in the shape that can be put beside it."""
    if node.function == "group_norm" and values.shape[1] > 1:
        groups = operations.arguments(node)["num_groups"]
        parts = values.reshape(len(values), groups, -1).mean(-1)
        each = parts.repeat_interleave(values.shape[1] // groups, 1)
        return each.reshape(*each.shape, *(1,) * (values.dim() - 2))
    return values.mean(_axes(node), keepdim=True)


class Normalized(Rule):
    """A few units of their own mean and variance."""

    def __init__(self) -> None:
        self._with_all: dict[Node, Tensor] = {}

    def moment(self, at: Forward, node: Node, offset: Offset) -> Tensor:
        known, shape = operations.arguments(node), shape_of(node)
        gamma, beta = affine(node)
        ones = offsets.inside(offset, shape)
        try:
            own = at.moment(known["input"], offset)
        except NoRuleError:
            if any(offset):
                raise
            return gamma.square() + beta.square() + 0 * ones
        with_all, variance = self._statistics(at, node)
        both = own - ones * (with_all + offsets.shifted(with_all, offset, shape))
        both = both + ones * _mean(with_all, node)
        both = both / (variance + (known.get("eps") or 1e-5))
        shifted = (offsets.shifted(each, offset, shape) for each in (gamma, beta))
        return both * gamma * next(shifted) + beta * next(shifted)

    def mean(self, at: Forward, node: Node) -> Tensor:  # noqa: ARG002 - β, whatever goes in
        return affine(node)[1]

    def _statistics(self, at: Forward, node: Node) -> tuple[Tensor, Tensor]:
        """The mean of each entry's product with all that it is normalized with; the variance."""
        source = operations.arguments(node)["input"]
        if node not in self._with_all:
            self._with_all[node] = self._covariance(at, node, source)
        with_all = self._with_all[node]
        return with_all, _mean(at.moment(source), node) - _mean(with_all, node)

    def _covariance(self, at: Forward, node: Node, source: Node) -> Tensor:
        shape, mean, units = shape_of(source), at.mean(source), _units(node)
        number = math.prod(shape[axis] for axis in _axes(node))
        own, total, weight = at.moment(source), torch.zeros(()), torch.zeros(())
        for by, share in _pairs([shape[a] if a in _axes(node) else 1 for a in range(len(shape))]):
            for each in (by, offsets.opposite(by)):
                total = total + share * at.moment(source, each)
                weight = weight + share * offsets.inside(each, shape)
        others = torch.where(weight > 0, total / weight.clamp(min=1e-9), own)
        # An entry with itself is one of all pairs.
        every = (own + (number - 1) * others) / number
        of_other_units = mean * _mean(mean, node)
        with_all = every / units + (1 - 1 / units) * of_other_units
        # What few offsets say is held within Cauchy's and Schwarz's bound.
        bound = (own * _mean(with_all, node).clamp(min=0)).clamp(min=0).sqrt()
        return with_all.clamp(-bound, bound)

    def gradient(
        self,
        back: Backward,
        node: Node,
        source: Node,  # noqa: ARG002 - it takes no other
        offset: Offset,
    ) -> Tensor:
        """Less what is lost in the gradient's mean, and along the entries themselves."""
        gamma, _ = affine(node)
        _, variance = self._statistics(back.forward, node)
        scale = gamma.square() / (variance + (operations.arguments(node).get("eps") or 1e-5))
        moments = back.moment(node, offset) * scale
        if any(offset):
            return moments
        return moments * self._kept(back, node)

    def _kept(self, back: Backward, node: Node) -> Tensor:
        shape = shape_of(node)
        number = math.prod(shape[axis] for axis in _axes(node)) * _units(node)
        own = back.moment(node).mean()
        lost, weight = torch.zeros(()).double(), 0.0
        try:
            sizes = [shape[axis] if axis in _axes(node) else 1 for axis in range(len(shape))]
            for by, share in _pairs(sizes):
                inside = offsets.inside(by, shape)
                both = back.moment(node, by)
                along = back.forward.moment(node, by) / gamma_square(node)
                lost = lost + share * (both * (1 + along) * inside).sum() / inside.sum()
                weight += share
        except NoRuleError:
            return torch.tensor(1 - 2 / number).double()
        others = lost / weight / own if weight and own else torch.zeros(()).double()
        others = others * (1 - 1 / number) / _units(node)
        return (1 - 2 / number - others).clamp(min=0)


def gamma_square(node: Node) -> Tensor:
    return affine(node)[0].square().clamp(min=1e-30)


def _pairs(size: list[int]) -> Iterator[tuple[Offset, float]]:
    """Offsets of pairs of different entries, and how many pairs each stands for.

    They are the same parts of an axis at each size, so that those of a layer are, times the
    stride, those of the one below.
    """
    steps: list[list[int]] = []
    for axis, n in enumerate(size):
        unit = max(1, n // PARTS) if axis else 1
        steps.append([step for step in range(1 - n, n) if step % unit == 0])
    number = math.prod(map(len, steps))
    if number <= 2 * PAIRS:
        chosen: Any = itertools.product(*steps)
    else:
        stream = random.Random(0)  # noqa: S311 - the same ones each time
        chosen = {tuple(map(stream.choice, steps)) for _ in range(PAIRS)}
        chosen = sorted(chosen)
    for by in chosen:
        if any(by) and offsets.is_first(by):
            yield by, math.prod(n - abs(step) for n, step in zip(size, by, strict=True))
        elif any(by) and number > 2 * PAIRS:
            yield (
                offsets.opposite(by),
                math.prod(n - abs(step) for n, step in zip(size, by, strict=True)),
            )

"""Rules of the operations that sum entries with random weights: Linear, convolutions, embeddings.

With independent weights of mean 0 each product of two different weights is 0 in the mean. What is
left is exact, however the entries hang together: every square goes in with the weight's variance.
An offset between two entries of the output is one between the entries that meet the same weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as f

from initflow.models.graph import Node
from initflow.models.moments import offsets, operations
from initflow.models.moments.offsets import Offset
from initflow.models.moments.rules import Backward, Forward, NoRuleError, Rule, said, shape_of


class Linear(Rule):
    """Of the last axis, also as a matrix product with a matrix that is no node."""

    def moment(self, at: Forward, node: Node, offset: Offset) -> Tensor:
        known = operations.arguments(node)
        weight, bias = known["weight"], known.get("bias")
        if not isinstance(known["input"], Node):
            raise NoRuleError(f"no rule for {said(node)} of a weight that depends on the batch")
        variance, bias_moment = at.weight_moments(node, weight, bias)
        shape = shape_of(known["input"])
        if offset[-1]:  # two units
            return torch.zeros((1,) * len(shape), dtype=torch.double)
        moments = at.moment(known["input"], offset)
        total = _summed(moments, -1, shape[-1]) * variance
        return total + bias_moment * offsets.inside(offset, shape_of(node))

    def gradient(self, back: Backward, node: Node, source: Node, offset: Offset) -> Tensor:
        known = operations.arguments(node)
        variance, _ = back.forward.weight_moments(node, known["weight"], known.get("bias"))
        if offset[-1]:
            return torch.zeros((1,) * len(shape_of(source)), dtype=torch.double)
        return _summed(back.moment(node, offset), -1, shape_of(node)[-1]) * variance


class Embedding(Rule):
    """Rows of a table: entries of the same row are the same, of two rows independent."""

    def moment(self, at: Forward, node: Node, offset: Offset) -> Tensor:
        known = operations.arguments(node)
        variance, _ = at.weight_moments(node, known["weight"], None)
        ids = at.known(known["input"]) if isinstance(known["input"], Node) else known["input"]
        if ids is None:
            raise NoRuleError(f"no rule for {said(node)} of ids that depend on the weights")
        same = ids + 1 == offsets.shifted(ids + 1, offset[:-1], ids.shape)  # 0 is outside
        moments = variance * same.double().unsqueeze(-1)
        if "padding_idx" in known and known["padding_idx"] is not None:
            moments = moments * (ids != known["padding_idx"]).unsqueeze(-1)
        return moments * (not offset[-1])


class Convolution(Rule):
    """Of any number of axes, also transposed, with groups, stride, padding and dilation."""

    def moment(self, at: Forward, node: Node, offset: Offset) -> Tensor:
        known = operations.arguments(node)
        _, bias_moment = at.weight_moments(node, known["weight"], known.get("bias"))
        source, axes = known["input"], known["weight"].dim() - 2
        batched = len(shape_of(node)) == axes + 2
        moved = _before(node, offset[-axes:], axes)
        if offset[-axes - 1] or moved is None:
            return torch.zeros((1,) * len(shape_of(node)), dtype=torch.double)
        lead = offset[:1] if batched else ()
        shape = shape_of(source)
        moments = at.moment(source, (*lead, 0, *moved))
        full = moments.expand(*moments.shape[:-axes], *shape[-axes:])
        full = full if batched else full.unsqueeze(0)
        summed, groups = _grouped(full, shape[-axes - 1], known.get("groups", 1), axes)
        spread = _apply(node, summed, self._variance(at, node))
        spread = spread.reshape(-1, groups, *spread.shape[2:])
        if groups > 1:
            units = shape_of(node)[-axes - 1] // groups
            spread = spread.repeat_interleave(units, 1)
        spread = spread if batched else spread.squeeze(0)
        return spread + bias_moment * offsets.inside(offset, shape_of(node))

    def gradient(self, back: Backward, node: Node, source: Node, offset: Offset) -> Tensor:
        known = operations.arguments(node)
        axes = known["weight"].dim() - 2
        batched = len(shape_of(node)) == axes + 2
        moved = _after(node, offset[-axes:], axes)
        if offset[-axes - 1] or moved is None:
            return torch.zeros((1,) * len(shape_of(source)), dtype=torch.double)
        lead = offset[:1] if batched else ()
        shape = shape_of(node)
        moments = back.moment(node, (*lead, 0, *moved))
        full = moments.expand(*moments.shape[:-axes], *shape[-axes:])
        full = full if batched else full.unsqueeze(0)
        summed, groups = _grouped(full, shape[-axes - 1], known.get("groups", 1), axes)
        template = torch.zeros(
            len(summed), 1, *shape_of(source)[-axes:], dtype=torch.double, requires_grad=True
        )
        with torch.enable_grad():
            forward = _apply(node, template, self._variance(back.forward, node))
        (spread,) = torch.autograd.grad(forward, template, summed)
        spread = spread.reshape(-1, groups, *spread.shape[2:])
        if groups > 1:
            spread = spread.repeat_interleave(shape_of(source)[-axes - 1] // groups, 1)
        return spread if batched else spread.squeeze(0)

    def _variance(self, at: Forward, node: Node) -> float:
        known = operations.arguments(node)
        return at.weight_moments(node, known["weight"], known.get("bias"))[0]


def _summed(moments: Tensor, axis: int, size: int) -> Tensor:
    times = size if moments.shape[axis] == 1 else 1
    return moments.sum(axis, keepdim=True) * times


def _grouped(full: Tensor, channels: int, groups: int, axes: int) -> tuple[Tensor, int]:
    """Summed over each group's channels, (batch · groups, 1, …), and how many groups differ."""
    if full.shape[1] == 1:
        return full * (channels // groups), 1
    parts = full.reshape(len(full), groups, channels // groups, *full.shape[-axes:])
    return parts.sum(2).flatten(0, 1).unsqueeze(1), groups


def _apply(node: Node, moments: Tensor, variance: float) -> Tensor:
    """The convolution with a kernel of variances, which one channel takes and gives."""
    known = operations.arguments(node)
    kernel = torch.full((1, 1, *known["weight"].shape[2:]), variance, dtype=torch.double)
    names = ("stride", "padding", "dilation", "output_padding")
    settings: dict[str, Any] = {name: known[name] for name in names if name in known}
    function = getattr(f, node.function)
    result: Tensor = function(moments, kernel, **settings)
    return result


def _times(offset: Offset, stride: int | tuple[int, ...], axes: int) -> Offset:
    steps = operations.each(stride, axes)
    return tuple(by * step for by, step in zip(offset, steps, strict=True))


def _parts(offset: Offset, stride: int | tuple[int, ...], axes: int) -> Offset | None:
    steps = operations.each(stride, axes)
    if any(by % step for by, step in zip(offset, steps, strict=True)):
        return None  # entries that no weight meets both
    return tuple(by // step for by, step in zip(offset, steps, strict=True))


def _before(node: Node, offset: Offset, axes: int) -> Offset | None:
    """The offset at what goes in that one at what comes out is of."""
    stride = operations.arguments(node).get("stride", 1)
    turned = node.function in operations.TRANSPOSED
    return _parts(offset, stride, axes) if turned else _times(offset, stride, axes)


def _after(node: Node, offset: Offset, axes: int) -> Offset | None:
    stride = operations.arguments(node).get("stride", 1)
    turned = node.function in operations.TRANSPOSED
    return _times(offset, stride, axes) if turned else _parts(offset, stride, axes)

"""Rules of means and sums over entries: average pooling, global pooling, ``mean`` and ``sum``.

The mean's second moment is that of all pairs of its window. Of a large window, some of the
offsets are taken, each for its share of the pairs.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as f

from initflow.models.graph import Node
from initflow.models.moments import offsets, operations
from initflow.models.moments.offsets import Offset
from initflow.models.moments.rearranging import gathered
from initflow.models.moments.rules import Backward, Forward, NoRuleError, Rule, said, shape_of

MOST = 32  # offsets of a window
MOST_SPREAD = 0.25  # of a mean, its variance over its square, for it to be of one sign
TINY = 1e-300


@dataclass(frozen=True)
class Windows:
    """For each axis of what is averaged; ``divisor`` is what the sum is divided by.

    ``kept`` says whether the result has the axes, too, of size 1 where it is of a whole axis.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    divisor: float
    kept: bool = True


class Averaged(Rule):
    """Of windows that are all of one size."""

    def moment(self, at: Forward, node: Node, offset: Offset) -> Tensor:
        source, windows = _source(node), _windows(node)
        shape = shape_of(source)
        outer = _with_axes(windows, offset, shape)
        total: Tensor | None = None
        for by, share in _offsets(windows.size):
            moved = tuple(o * s + b for o, s, b in zip(outer, windows.stride, by, strict=True))
            part = _over_windows(at.moment(source, moved), windows, by, shape) * share
            total = part if total is None else total + part
        assert total is not None
        return _without_axes(windows, total / windows.divisor**2, node)

    def mean(self, at: Forward, node: Node) -> Tensor:
        source, windows = _source(node), _windows(node)
        shape = shape_of(source)
        total = _over_windows(at.mean(source), windows, offsets.none(shape), shape)
        return _without_axes(windows, total / windows.divisor, node)

    def draw(self, at: Forward, node: Node, z: Tensor) -> Tensor:
        """Of one sign where the mean is far from 0, as a mean of squares is."""
        mean = at.mean(node)
        variance = (at.moment(node) - mean.square()).clamp(min=0)
        ratio = variance / mean.square().clamp(min=TINY)
        spread = ratio.clamp(max=1).log1p()
        of_one_sign = mean * torch.exp(spread.sqrt() * z - spread / 2)
        return torch.where(ratio < MOST_SPREAD, of_one_sign, mean + variance.sqrt() * z)

    def gradient(self, back: Backward, node: Node, source: Node, offset: Offset) -> Tensor:
        windows, shape = _windows(node), shape_of(source)
        if windows.size == windows.stride and not any(windows.padding):
            numbers = torch.arange(math.prod(shape_of(node)), dtype=torch.double)
            numbers = _with_axes_of(windows, numbers.reshape(shape_of(node)), shape)
            for axis, size in enumerate(windows.size):
                numbers = numbers.repeat_interleave(size, axis)
            short = [n - m for n, m in zip(shape, numbers.shape, strict=True)]
            ends = [end for missing in reversed(short) for end in (0, missing)]
            index = f.pad(numbers, ends, value=-1).long()
            moments = gathered(
                index, shape_of(node), offset, lambda by: back.moment(node, by), said(node)
            )
            return offsets.compact(moments / windows.divisor**2)
        if any(offset):
            raise NoRuleError(f"no rule for pairs of gradients of {said(node)}")
        # Of an entry in several windows, their gradients are taken to be uncorrelated.
        return _to_windows(back.moment(node), windows, shape) / windows.divisor**2


def _source(node: Node) -> Node:
    source = operations.arguments(node).get("input")
    if not isinstance(source, Node):
        raise NoRuleError(f"no rule for {said(node)}")
    return source


def _windows(node: Node) -> Windows:
    known = operations.arguments(node)
    shape = shape_of(_source(node))
    axes = len(shape)
    if node.function in ("mean", "sum"):
        dim = known.get("dim", known.get("axis"))
        dims = range(axes) if dim is None else operations.each(dim, 1)
        over = {d % axes for d in dims}
        size = tuple(n if axis in over else 1 for axis, n in enumerate(shape))
        divisor = math.prod(size) if node.function == "mean" else 1.0
        kept = bool(known.get("keepdim", False))
        return Windows(size, size, (0,) * axes, divisor, kept)
    pooled = int(node.function[-2])
    ones, zeros = (1,) * (axes - pooled), (0,) * (axes - pooled)
    if node.function in operations.ADAPTIVE_POOLS:
        given = shape_of(node)[axes - pooled :]
        if any(n % out for n, out in zip(shape[axes - pooled :], given, strict=True)):
            raise NoRuleError(f"no rule for windows of several sizes, of {said(node)}")
        size = tuple(n // out for n, out in zip(shape[axes - pooled :], given, strict=True))
        return Windows((*ones, *size), (*ones, *size), (0,) * axes, math.prod(size))
    size = operations.each(known["kernel_size"], pooled)
    stride = operations.each(known.get("stride") or size, pooled)
    padding = operations.each(known.get("padding", 0), pooled)
    if known.get("ceil_mode") or (any(padding) and not known.get("count_include_pad", True)):
        raise NoRuleError(f"no rule for windows of several sizes, of {said(node)}")
    divisor = known.get("divisor_override") or math.prod(size)
    return Windows((*ones, *size), (*ones, *stride), (*zeros, *padding), divisor)


def _reduced(windows: Windows, shape: tuple[int, ...]) -> list[bool]:
    """Which axes the result has not: those that ``mean`` is over."""
    whole = zip(windows.size, windows.stride, shape, strict=True)
    return [not windows.kept and size == step == n and n > 1 for size, step, n in whole]


def _with_axes(windows: Windows, offset: Offset, shape: tuple[int, ...]) -> Offset:
    if len(offset) == len(shape):
        return offset
    own = iter(offset)
    return tuple(0 if gone else next(own, 0) for gone in _reduced(windows, shape))


def _with_axes_of(windows: Windows, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    if values.dim() == len(shape):
        return values
    for axis, gone in enumerate(_reduced(windows, shape)):
        if gone:
            values = values.unsqueeze(axis)
    return values.reshape(values.shape[: len(shape)])


def _without_axes(windows: Windows, values: Tensor, node: Node) -> Tensor:
    wanted = shape_of(node)
    if len(wanted) == values.dim():
        return values
    axes = [axis for axis, size in enumerate(windows.size) if size > 1]
    axes = axes[: values.dim() - len(wanted)]
    if len(axes) < values.dim() - len(wanted):  # of axes of size 1
        axes = [a for a, n in enumerate(values.shape) if n == 1][: values.dim() - len(wanted)]
    return values.squeeze(axes)


def _offsets(size: tuple[int, ...]) -> Iterator[tuple[Offset, float]]:
    """The differences of two entries of a window, each with how many others it stands for."""
    axes = [axis for axis, n in enumerate(size) if n > 1]
    total = math.prod(2 * size[axis] - 1 for axis in axes)
    zero = offsets.none(size)
    yield zero, 1.0
    if total <= 2 * MOST:
        for steps in itertools.product(*(range(1 - size[axis], size[axis]) for axis in axes)):
            if any(steps):
                yield _placed(zero, axes, steps), 1.0
        return
    yield from _some(size, axes)


def _some(size: tuple[int, ...], axes: list[int]) -> Iterator[tuple[Offset, float]]:
    """Drawn as often as pairs of entries have them, so that each stands for as many."""
    stream = random.Random(0)  # noqa: S311 - the same ones each time
    zero = offsets.none(size)
    drawn: dict[Offset, int] = {}
    while len(drawn) < MOST:
        steps = [stream.randrange(size[axis]) - stream.randrange(size[axis]) for axis in axes]
        if any(steps):
            by = _placed(zero, axes, steps)
            drawn[by] = drawn.get(by, 0) + 1
    number, pairs = sum(drawn.values()), math.prod(size) ** 2 - math.prod(size)
    for by, times in drawn.items():
        own = math.prod(n - abs(step) for n, step in zip(size, by, strict=True))
        yield by, times / number * pairs / own


def _placed(zero: Offset, axes: list[int], steps: tuple[int, ...] | list[int]) -> Offset:
    placed = list(zero)
    for axis, step in zip(axes, steps, strict=True):
        placed[axis] = step
    return tuple(placed)


def _over_windows(values: Tensor, windows: Windows, by: Offset, shape: tuple[int, ...]) -> Tensor:
    """Summed over the entries of each window whose partner, ``by`` further on, is in it, too."""
    for axis, (size, stride, padding) in enumerate(
        zip(windows.size, windows.stride, windows.padding, strict=True)
    ):
        if size == stride == 1:
            continue
        step, n = by[axis], shape[axis]
        if values.shape[axis] == 1 and n == size and not padding and not step:
            values = values * n
            continue
        if values.shape[axis] != n:
            values = values.expand(*values.shape[:axis], n, *values.shape[axis + 1 :])
        if padding:
            ends = [0, 0] * (values.dim() - axis - 1) + [padding, padding]
            values = f.pad(values, ends)
        given = (n + 2 * padding - size) // stride + 1
        first = values.narrow(axis, max(0, -step), values.shape[axis] - max(0, -step))
        parts = first.unfold(axis, size - abs(step), stride)
        values = parts.narrow(axis, 0, given).sum(-1)
    return values


def _to_windows(moments: Tensor, windows: Windows, shape: tuple[int, ...]) -> Tensor:
    """For each entry the sum over the windows that it is in: the transpose of the sum over them."""
    size = [
        n if s > 1 or k > 1 else m
        for n, s, k, m in zip(shape, windows.size, windows.stride, moments.shape, strict=True)
    ]
    template = torch.zeros(size, dtype=torch.double, requires_grad=True)
    with torch.enable_grad():
        forward = _over_windows(template, windows, offsets.none(shape), shape)
    (spread,) = torch.autograd.grad(forward, template, moments.expand(forward.shape))
    return spread

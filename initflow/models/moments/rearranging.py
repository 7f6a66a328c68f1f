"""The rule of all that only puts entries in other places: it is found by moving their numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from initflow.models.graph import Node
from initflow.models.moments import offsets, operations
from initflow.models.moments.offsets import Offset
from initflow.models.moments.rules import Backward, Forward, NoRuleError, Rule, said, shape_of

LARGE = 2**14  # entries of images
MOST = 64  # different offsets at a source for a single one here
Moment = Callable[[Offset], Tensor]


@dataclass(frozen=True)
class Places:
    """Where each entry comes from: ``source`` of ``tensors``, and ``index`` in it; −1 is a 0."""

    tensors: list[Node | Tensor]
    source: Tensor
    index: Tensor


@dataclass(frozen=True)
class Joined:
    """Tensors that are put together along an ``axis``: their maps need no numbers.

    Of a ``large`` one all channels are given their mean, which is all that a convolution sums.
    """

    tensors: tuple[Node | Tensor, ...]
    axis: int
    large: bool

    def put(self, moment: Callable[[Node | Tensor, Offset], Tensor], offset: Offset) -> Tensor:
        maps = [moment(tensor, offset) for tensor in self.tensors]
        shape = offsets.broadcast(
            *([*m.shape[: self.axis], *m.shape[self.axis + 1 :]] for m in maps)
        )
        sizes = [_shape(tensor)[self.axis] for tensor in self.tensors]
        full = [
            m.expand(*shape[: self.axis], n, *shape[self.axis :])
            for m, n in zip(maps, sizes, strict=True)
        ]
        whole = torch.cat(full, self.axis)
        return whole.mean(self.axis, keepdim=True) if self.large else whole

    def taken(self, moments: Tensor, source: Node) -> Tensor:
        """The parts of a map that are ``source``'s, summed."""
        total, start = torch.zeros((1,) * moments.dim(), dtype=torch.double), 0
        for tensor in self.tensors:
            n = _shape(tensor)[self.axis]
            if tensor is source:
                own = (
                    moments
                    if moments.shape[self.axis] == 1
                    else moments.narrow(self.axis, start, n)
                )
                total = total + own
            start += n
        return offsets.compact(total)


def _joined(node: Node) -> Joined | None:
    if node.function not in ("cat", "concat", "concatenate") or not node.arguments:
        return None
    tensors = node.arguments[0]
    axis = node.keywords.get("dim", node.arguments[1] if len(node.arguments) > 1 else 0)
    if not all(isinstance(each, (Node, Tensor)) for each in tensors):
        return None
    shape = shape_of(node)
    axis %= len(shape)
    large = axis == 1 and len(shape) > 2 and math.prod(shape) > LARGE
    return Joined(tuple(tensors), axis, large)


def _shape(tensor: Node | Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else shape_of(tensor)


class Rearranged(Rule):
    """Of one or several tensors, which may be constants."""

    def __init__(self) -> None:
        self._places: dict[Node, Places] = {}

    def moment(self, at: Forward, node: Node, offset: Offset) -> Tensor:
        if (joined := _joined(node)) is not None and not offset[joined.axis]:
            return joined.put(functools.partial(_moment, at), offset)
        return self._gathered(node, offset, functools.partial(_moment, at))

    def mean(self, at: Forward, node: Node) -> Tensor:
        def mean(source: Node | Tensor, _: Offset) -> Tensor:
            return source.double() if isinstance(source, Tensor) else at.mean(source)

        return self._gathered(node, offsets.none(shape_of(node)), mean)

    def _gathered(
        self, node: Node, offset: Offset, moment: Callable[[Node | Tensor, Offset], Tensor]
    ) -> Tensor:
        places = self.places(node)
        total: Tensor | None = None
        for i, tensor in enumerate(places.tensors):
            own = torch.where(places.source == i, places.index, -1)
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else shape_of(tensor)
            of_tensor = functools.partial(moment, tensor)
            part = gathered(own, shape, offset, of_tensor, said(node))
            total = part if total is None else total + part
        assert total is not None
        return offsets.compact(total)

    def gradient(self, back: Backward, node: Node, source: Node, offset: Offset) -> Tensor:
        if (joined := _joined(node)) is not None and not offset[joined.axis]:
            return joined.taken(back.moment(node, offset), source)
        places = self.places(node)
        shape = shape_of(source)
        total = torch.zeros(shape, dtype=torch.double)
        for i, tensor in enumerate(places.tensors):
            if tensor is not source:
                continue
            taken = (places.source == i) & (places.index >= 0)
            index = places.index[taken]
            numbers = torch.arange(taken.numel()).reshape(taken.shape)[taken]
            to = torch.full((math.prod(shape),), -1).scatter(0, index, numbers)
            if len(torch.unique(index)) == len(index):
                total = total + gathered(
                    to.reshape(shape),
                    shape_of(node),
                    offset,
                    lambda by: back.moment(node, by),
                    said(node),
                )
            elif any(offset):
                raise NoRuleError(f"no rule for pairs of gradients of {said(node)}")
            else:  # the gradients of an entry's copies are taken to be uncorrelated
                moments = back.moment(node).expand(shape_of(node))[taken]
                total = total + torch.zeros(math.prod(shape), dtype=torch.double).scatter_add(
                    0, index, moments
                ).reshape(shape)
        return offsets.compact(total)

    def places(self, node: Node) -> Places:
        if node not in self._places:
            self._places[node] = _places(node)
        return self._places[node]


def _places(node: Node) -> Places:
    whole = node.arguments[0] if operations.is_part(node) else node
    tensors: list[Node | Tensor] = []
    starts = [1]

    def number(x: Node | Tensor) -> Tensor:
        size = math.prod(shape_of(x) if isinstance(x, Node) else x.shape)
        tensors.append(x)
        starts.append(starts[-1] + size)
        numbers = torch.arange(starts[-2], starts[-1], dtype=torch.double)
        return numbers.reshape(shape_of(x) if isinstance(x, Node) else x.shape)

    result = called(whole, number)
    if node is not whole:
        result = result[node.arguments[1]]
    result = result.round().long().contiguous()
    bounds = torch.tensor(starts)
    source = torch.bucketize(result, bounds, right=True) - 1
    index = torch.where(source >= 0, result - bounds[source.clamp(min=0)], -1)
    return Places(tensors, source, index)


def called(node: Node, replace: Callable[[Any], Any]) -> Any:
    """``node``'s operation again, with each float tensor of its arguments replaced."""
    assert node.call is not None
    keywords = {name: _changed(value, replace) for name, value in node.keywords.items()}
    return node.call(*_changed(node.arguments, replace), **keywords)


def _changed(value: Any, replace: Callable[[Any], Any]) -> Any:
    if isinstance(value, Node) or (isinstance(value, Tensor) and value.is_floating_point()):
        return replace(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_changed(each, replace) for each in value)
    return value


def _moment(at: Forward, source: Node | Tensor, offset: Offset) -> Tensor:
    if isinstance(source, Node):
        return at.moment(source, offset)
    values = source.detach().double()
    return values * offsets.shifted(values, offset, values.shape)


def gathered(
    index: Tensor, shape: tuple[int, ...], offset: Offset, moment: Moment, what: str
) -> Tensor:
    """The map of entries that are those numbered ``index`` of a tensor of ``shape``; −1 is a 0."""
    if not any(offset):
        values = moment(offsets.none(shape)).expand(shape).reshape(-1)
        return torch.where(index >= 0, values[index.clamp(min=0)], 0.0)
    partner = offsets.shifted(index + 1, offset, index.shape) - 1
    both = (index >= 0) & (partner >= 0)
    total = torch.zeros(index.shape, dtype=torch.double)
    for by, where in _differences(index, partner, both, shape, what):
        values = moment(by).expand(shape).reshape(-1)
        total = torch.where(where, values[index.clamp(min=0)], total)
    return total


def _differences(
    index: Tensor, partner: Tensor, both: Tensor, shape: tuple[int, ...], what: str
) -> Iterator[tuple[Offset, Tensor]]:
    """The offsets at the source, and which entries they are for."""
    if not both.any():
        return
    code, scale = torch.zeros_like(index), 1
    rest, rest_of_partner = index.clamp(min=0), partner.clamp(min=0)
    for size in reversed(shape):
        step = rest_of_partner % size - rest % size
        code = code + (step + size) * scale
        scale *= 2 * size
        rest, rest_of_partner = rest // size, rest_of_partner // size
    codes = code[both]
    found = codes[:1] if bool((codes == codes[0]).all()) else torch.unique(codes)
    if len(found) > MOST:
        raise NoRuleError(f"no rule for pairs of entries of {what}")
    for each in found.tolist():
        by, left = [], each
        for size in reversed(shape):
            by.append(left % (2 * size) - size)
            left //= 2 * size
        yield tuple(reversed(by)), both & (code == each)

"""Pairs of a tensor's entries, an offset apart: one step for each axis.

A map has the number of axes of the tensor that it is of; along an axis where it is the same for
all entries its size may be 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Offset = tuple[int, ...]


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The shape that tensors of all ``shapes`` are broadcast to."""
    return np.broadcast_shapes(*map(tuple, shapes))


def none(shape: Sequence[int]) -> Offset:
    return (0,) * len(shape)


def shifted(values: Tensor, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
    """At each entry the value that stands ``offset`` further on, 0 where that is outside.

    ``shape`` is the tensor's; ``values`` may have leading axes more, of samples.
    """
    lead = values.dim() - len(shape)
    for axis, (step, size) in enumerate(zip(offset, shape, strict=True), lead):
        if not step:
            continue
        if values.shape[axis] != size:
            values = values.expand(*values.shape[:axis], size, *values.shape[axis + 1 :])
        if abs(step) >= size:
            values = torch.zeros_like(values)
            continue
        outside = torch.zeros_like(values.narrow(axis, 0, abs(step)))
        kept = values.narrow(axis, max(step, 0), size - abs(step))
        values = torch.cat([kept, outside] if step > 0 else [outside, kept], axis)
    return values


def inside(offset: Sequence[int], shape: Sequence[int]) -> Tensor:
    """1 at each entry whose partner is an entry, too, and 0 elsewhere."""
    return shifted(torch.ones((1,) * len(shape), dtype=torch.double), offset, shape)


def is_first(offset: Sequence[int]) -> bool:
    """Of an offset and its opposite, which are the same pairs, one is the first."""
    return next((step > 0 for step in offset if step), True)


def opposite(offset: Sequence[int]) -> Offset:
    return tuple(-step for step in offset)


def aligned(offset: Sequence[int], shape: Sequence[int]) -> Offset:
    """The offset of a tensor as that of one of ``shape`` which is broadcast to it."""
    own = tuple(offset)[len(offset) - len(shape) :] if shape else ()
    return tuple(0 if size == 1 else step for step, size in zip(own, shape, strict=True))


def to_shape(values: Tensor, shape: Sequence[int], lead: int = 0) -> Tensor:
    """With axes of size 1 before the others, as many as ``shape`` has more."""
    missing = len(shape) + lead - values.dim()
    return values.reshape(*values.shape[:lead], *(1,) * missing, *values.shape[lead:])


def compact(values: Tensor) -> Tensor:
    """With size 1 along each axis on which all are the same."""
    for axis in range(values.dim()):
        first = values.narrow(axis, 0, 1)
        if values.shape[axis] > 1 and torch.equal(first.expand_as(values), values):
            values = first
    return values.contiguous()


def summed_to(values: Tensor, full: Sequence[int], shape: Sequence[int]) -> Tensor:
    """A map of a tensor of shape ``full``, summed to one of ``shape`` that was broadcast to it."""
    lead = len(full) - len(shape)
    for axis, size in enumerate(full):
        own = shape[axis - lead] if axis >= lead else 1
        if own == 1 and size > 1:
            times = size if values.shape[axis] == 1 else 1
            values = values.sum(axis, keepdim=True) * times
    return values.reshape(values.shape[lead:])

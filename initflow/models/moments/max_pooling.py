"""The rule of max pooling: the entries of a window are drawn together, as they hang together.

They are functions of normal variables with the covariances that the network gives them. Of two
windows, the maxima are taken to hang together as two of their entries do, by a Gaussian copula.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from initflow.models.graph import Node
from initflow.models.moments import offsets, operations
from initflow.models.moments.offsets import Offset
from initflow.models.moments.rules import Backward, Forward, NoRuleError, Rule, said, shape_of
from initflow.theory.normal_samples import normal_samples, weighted_samples

JITTER = 1e-6
FEWEST, MOST = 256, 1024
ENTRIES = 2**19  # of samples of what is pooled, between the fewest and the most of them
LIKE = 8  # samples of like value


@dataclass(frozen=True)
class Window:
    """Along the last axes: its entries' places, the step between two, and how much is padded."""

    places: Sequence[Offset]
    stride: tuple[int, ...]
    padding: tuple[int, ...]


class Maximum(Rule):
    """Of windows of up to the size that is given, where padding makes them smaller."""

    def __init__(self) -> None:
        self._sorted: dict[Node, Tensor] = {}

    def moment(self, at: Forward, node: Node, offset: Offset) -> Tensor:
        drawn = self._drawn(at, node)
        if not any(offset):
            square: Tensor = drawn.square().mean(0)
            return square
        axes = len(_window(node).stride)
        if not any(offset[:-axes]) and max(map(abs, offset)) == 1:
            return _of_neighbours(at, node, offset[-axes:])
        return self._of_distant(at, node, offset)

    def _of_distant(self, at: Forward, node: Node, offset: Offset) -> Tensor:
        source, drawn = operations.arguments(node)["input"], self._drawn(at, node)
        stride = _window(node).stride
        lead = len(offset) - len(stride)
        steps = (*offset[:lead], *(o * s for o, s in zip(offset[lead:], stride, strict=True)))
        correlation = _correlation(at, source, steps)
        places = _window(node).places
        correlation = torch.stack([_taken(correlation, place, node) for place in places]).mean(0)
        z, weights = weighted_samples(len(drawn), 2)
        first, other = (offsets.to_shape(each, shape_of(node), 1) for each in z.T)
        here = self.draw(at, node, first)
        moved = offsets.shifted(correlation, offsets.opposite(offset), shape_of(node))
        there = self.draw(at, node, moved * first + (1 - moved.square()).sqrt() * other)
        both = here * offsets.shifted(there, offset, shape_of(node))
        mean: Tensor = torch.tensordot(weights, both, 1)
        return mean

    def mean(self, at: Forward, node: Node) -> Tensor:
        return self._drawn(at, node).mean(0)

    def draw(self, at: Forward, node: Node, z: Tensor) -> Tensor:
        """By the place of ``z`` among normal samples, that among the maxima."""
        drawn = self._drawn(at, node)
        z = z.expand(len(z), *offsets.broadcast(z.shape[1:], drawn.shape[1:]))
        drawn = drawn.expand(len(drawn), *z.shape[1:])
        place = torch.special.ndtr(z.detach()) * len(drawn) - 0.5
        lower = place.floor().clamp(0, len(drawn) - 2).long()
        part = (place - lower).clamp(0, 1)
        found: Tensor = drawn.gather(0, lower) * (1 - part) + drawn.gather(0, lower + 1) * part
        return found

    def _drawn(self, at: Forward, node: Node) -> Tensor:
        """The maxima of each window (samples, …), in order."""
        if node not in self._sorted:
            entries, _ = _entries(at, node, _window(node).places)
            largest: Tensor = _at_windows(entries, node, -torch.inf).amax(0)
            self._sorted[node] = largest.sort(0).values
        return self._sorted[node]

    def gradient_by(self, back: Backward, node: Node, head: Node, head_offset: Offset) -> Tensor:
        """By ``head``, of which the pooled entries are functions: what comes of the largest."""
        if any(head_offset):
            raise NoRuleError(f"no rule for pairs of gradients of {said(node)}")
        window = _window(node)
        with torch.enable_grad():
            entries, values = _entries(back.forward, node, window.places, head)
            largest = _at_windows(entries, node, -torch.inf).amax(0)
        slopes: Sequence[Tensor | None] = torch.autograd.grad(
            largest.sum(), values, allow_unused=True
        )
        total = torch.zeros((), dtype=torch.double)
        alike: dict[Offset, Tensor] = {}
        for place, slope, value in zip(window.places, slopes, values, strict=True):
            if slope is None:
                continue
            total = total + slope.square().mean(0) * _spread(back.moment(node), place, node)
            steps = {other: _step(window, other, place) for other in alike}
            alike[place] = _by_value(slope, value)
            for other, step in steps.items():
                if step is not None:
                    both = (alike[other] * alike[place]).mean(0)
                    total = total + 2 * both * _spread(_pairs(back, node, step), other, node)
        pooled = shape_of(operations.arguments(node)["input"])
        return offsets.compact(offsets.summed_to(total, pooled, shape_of(head)))


def _of_neighbours(at: Forward, node: Node, step: Offset) -> Tensor:
    """The moments of the maxima of two windows next to each other, drawn together."""
    window = _window(node)
    moved = tuple(s * by for s, by in zip(step, window.stride, strict=True))
    others = [tuple(p + m for p, m in zip(place, moved, strict=True)) for place in window.places]
    places = list(dict.fromkeys([*window.places, *others]))
    entries, _ = _entries(at, node, places)
    values = {place: entries[i] for i, place in enumerate(places)}
    here, there = (
        torch.stack([_taken(values[place], place, node, -torch.inf) for place in chosen]).amax(0)
        for chosen in (window.places, others)
    )
    lead = (0,) * (len(shape_of(node)) - len(step))
    both = torch.where(there.isfinite(), here * there, 0.0).mean(0)
    return both * offsets.inside((*lead, *step), shape_of(node))


def _window(node: Node) -> Window:
    known = operations.arguments(node)
    axes = int(node.function[-2])
    size = operations.each(known["kernel_size"], axes)
    dilation = operations.each(known.get("dilation", 1), axes)
    places = [
        tuple(step * by for step, by in zip(steps, dilation, strict=True))
        for steps in itertools.product(*map(range, size))
    ]
    stride = operations.each(known.get("stride") or size, axes)
    return Window(places, stride, operations.each(known.get("padding", 0), axes))


def _entries(
    at: Forward, node: Node, places: Sequence[Offset], by: Node | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The pooled tensor once for each place in a window, (places, samples, …), drawn together.

    What stands at an entry plus its place is in the same window. Also the values of ``by``, one
    of those that it is a function of, by which it can be derived.
    """
    source = operations.arguments(node)["input"]
    shape = shape_of(source)
    heads = at.heads(source)
    samples = 4 * max(FEWEST // 4, min(MOST, ENTRIES // at.moment(source).numel()) // 4)
    z = normal_samples(samples, len(heads) * len(places))
    parts = z.reshape(samples, len(heads), len(places)).unbind(1)
    together = {
        head: [part[:, i].reshape(-1, *(1,) * len(shape)) for i in range(len(places))]
        if operations.drops(head)
        else _together(at, head, part, places, node)
        for head, part in zip(heads, parts, strict=True)
    }
    derived: list[Tensor] = []
    found = []
    for i in range(len(places)):
        values: Mapping[Node, Tensor] = {
            head: at.draw(head, each[i]) for head, each in together.items()
        }
        if by is not None:
            leaf = values[by].detach().requires_grad_()
            values = {**values, by: leaf}
            derived.append(leaf)
        found.append(at.evaluate(source, values))
    return torch.stack([each.expand(samples, *each.shape[1:]) for each in found]), derived


def _together(
    at: Forward, head: Node, z: Tensor, places: Sequence[Offset], node: Node
) -> list[Tensor]:
    """Normal values of ``head`` for each place, where they stand, correlated as it is."""
    own, lead = shape_of(head), len(shape_of(head)) - len(_window(node).stride)
    if own[lead:] != shape_of(operations.arguments(node)["input"])[-len(own[lead:]) :]:
        raise NoRuleError(f"no rule for {said(node)} of what is the same along an axis")
    rows = []
    for first in places:
        row = []
        for second in places:
            by = (*(0,) * lead, *(b - a for a, b in zip(first, second, strict=True)))
            row.append(_taken(_correlation(at, head, by), first, node))
        rows.append(row)
    sizes = offsets.broadcast(*(each.shape for row in rows for each in row))
    matrix = torch.stack([torch.stack([e.expand(sizes) for e in row], -1) for row in rows], -1)
    vectors, roots = _root((matrix + matrix.mT) / 2)
    drawn = torch.einsum("...ij,sj->is...", vectors * roots.unsqueeze(-2), z)
    return [_spread(each, place, node) for each, place in zip(drawn, places, strict=True)]


def _step(window: Window, place: Offset, other: Offset) -> Offset | None:
    """From the window in which an entry stands at ``place`` to that in which it is at ``other``."""
    steps = [(p - o, s) for p, o, s in zip(place, other, window.stride, strict=True)]
    if any(by % stride for by, stride in steps):
        return None
    return tuple(by // stride for by, stride in steps)


def _pairs(back: Backward, node: Node, step: Offset) -> Tensor:
    """Of the gradients of two windows; where that is not known, they are uncorrelated."""
    lead = (0,) * (len(shape_of(node)) - len(step))
    try:
        return back.moment(node, (*lead, *step))
    except NoRuleError:
        return torch.zeros((1,) * len(shape_of(node)), dtype=torch.double)


def _by_value(slope: Tensor, value: Tensor) -> Tensor:
    """The mean slope of entries of like value: given its value, windows decide by themselves."""
    sizes = offsets.broadcast(slope.shape, value.shape)
    order = value.detach().float().expand(sizes).argsort(0)
    sorted_slopes = slope.expand(sizes).gather(0, order)
    groups = len(slope) // LIKE
    kept = sorted_slopes[: groups * LIKE]
    return kept.reshape(groups, LIKE, *kept.shape[1:]).mean(1)


def _root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and the roots of the eigenvalues, none negative, of unit variances again."""
    values, vectors = torch.linalg.eigh(matrix)
    roots = values.clamp(min=0).sqrt()
    variances = (vectors * roots.unsqueeze(-2)).square().sum(-1, keepdim=True)
    return vectors / variances.clamp(min=JITTER).sqrt(), roots


def _correlation(at: Forward, node: Node, offset: Offset) -> Tensor:
    shape, mean = shape_of(node), at.mean(node)
    variance = (at.moment(node) - mean.square()).clamp(min=0)
    if not any(offset):
        return (variance > 0).double()
    both = at.moment(node, offset) - mean * offsets.shifted(mean, offset, shape)
    product = variance * offsets.shifted(variance, offset, shape)
    return torch.where(product > 0, both / product.clamp(min=1e-300).sqrt(), 0.0).clamp(-1, 1)


def _at_windows(entries: Tensor, node: Node, outside: float) -> Tensor:
    """From (places, …) the value at each window's place: (places, …, windows)."""
    places = _window(node).places
    return torch.stack([_taken(entries[i], place, node, outside) for i, place in enumerate(places)])


def _taken(values: Tensor, place: Offset, node: Node, outside: float = 0.0) -> Tensor:
    """The entries at ``place`` of each window."""
    given, shape = shape_of(node), shape_of(operations.arguments(node)["input"])
    for axis in range(-len(place), 0):
        where, within = _along(node, place, axis)
        full = values.expand(*values.shape[:axis], shape[axis], *_after(values, axis))
        values = full.index_select(axis, where.clamp(0, shape[axis] - 1))
        values = torch.where(within.reshape(-1, *(1,) * (-axis - 1)), values, outside)
    assert values.shape[-len(place) :] == given[-len(place) :]
    return values


def _spread(values: Tensor, place: Offset, node: Node) -> Tensor:
    """The windows' values where each one's ``place`` stands in what is pooled, 0 elsewhere."""
    given, shape = shape_of(node), shape_of(operations.arguments(node)["input"])
    for axis in range(-len(place), 0):
        where, within = _along(node, place, axis)
        full = values.expand(*values.shape[:axis], given[axis], *_after(values, axis))
        taken = full.index_select(axis, within.nonzero().flatten())
        sizes = (*values.shape[:axis], shape[axis], *_after(values, axis))
        blank = torch.zeros(sizes, dtype=torch.double)
        values = blank.index_copy(axis, where[within], taken)
    return values


def _along(node: Node, place: Offset, axis: int) -> tuple[Tensor, Tensor]:
    """Where each window's ``place`` is, along an axis, and whether that is no padding."""
    window, size = _window(node), shape_of(operations.arguments(node)["input"])[axis]
    where = torch.arange(shape_of(node)[axis]) * window.stride[axis]
    where = where - window.padding[axis] + place[axis]
    return where, (where >= 0) & (where < size)


def _after(values: Tensor, axis: int) -> tuple[int, ...]:
    return tuple(values.shape[axis + 1 :]) if axis + 1 else ()

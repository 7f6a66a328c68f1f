"""Rules of normalizations: what comes out has the second moment γ² + β², whatever goes in.

Where what is normalized has many units, its mean and variance are numbers, and it is scaled by
them. Where not (batch normalization, one channel), they hang together with its entries, by the
covariances of all pairs, of which some offsets are taken; the variance is taken for a number all
the same. Where a channel has few directions (the first layer, on images that are much alike), it
is not one, and a maximum behind it is some 20 % larger than expected. What comes back through a
single channel's statistics was up to four fifths off, so that there is no rule for that gradient.
"""

from __future__ import annotations

import itertools
import math
import random

import torch
from torch import Tensor

from initflow.models.graph import Node
from initflow.models.moments import offsets, operations
from initflow.models.moments.offsets import Offset
from initflow.models.moments.rules import Backward, Forward, NoRuleError, Rule, said, shape_of

NORMALIZING = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm")
TINY = 1e-300
FILLED = 4  # partners
MANY = 16  # units, whose mean and variance are as good as their expectations
PAIRS, PAIRS_BACKWARD = 24, 8  # offsets by which the covariance of all pairs is known
PARTS = 4  # of an axis: offsets are such parts of it, the same ones at each size


def scales_by_numbers(node: Node) -> bool:
    """Whether mean and variance are taken to be numbers; else :class:`Normalized` is its rule."""
    return _units(node) >= MANY


def uses_batch(node: Node) -> bool:
    known = operations.arguments(node)
    if node.function == "batch_norm":
        return bool(known.get("training", False))
    return node.function != "instance_norm" or bool(known.get("use_input_stats", True))


def _units(node: Node) -> int:
    """How many independent units are normalized together."""
    known, shape = operations.arguments(node), shape_of(node)
    if not uses_batch(node):
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
    if not uses_batch(node):
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


class Reset(Rule):
    """What is known where nothing is of what goes in."""

    def moment(self, at: Forward, node: Node, offset: Offset) -> Tensor:  # noqa: ARG002
        if any(offset):
            raise NoRuleError(f"no rule for pairs of entries of {said(node)}")
        gamma, beta = affine(node)
        return gamma.square() + beta.square()

    def mean(self, at: Forward, node: Node) -> Tensor:  # noqa: ARG002
        return affine(node)[1]


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
        own = at.moment(source).clamp(min=0)
        root = own.sqrt()
        typical = _mean(root, node)
        products, roots = torch.zeros(()).double(), torch.zeros(()).double()
        sizes = [n if axis in _axes(node) else 1 for axis, n in enumerate(shape)]
        for first, _ in _pairs(sizes, PAIRS):
            for by in (first, offsets.opposite(first)):
                products = products + at.moment(source, by)
                roots = roots + offsets.shifted(root, by, shape) * offsets.inside(by, shape)
        # An entry's with all others is its partners', as if they were typical; what few partners
        # say is filled up with what all entries' say. With itself it is one of all pairs.
        all_roots = _mean(roots * root, node).clamp(min=TINY)
        correlation = _mean(products + torch.zeros_like(root), node) / all_roots
        filled = products + FILLED * correlation * root * typical
        others = filled / (roots + FILLED * typical).clamp(min=TINY) * typical
        bound = root * typical
        others = others.clamp(-bound, bound)
        every = (own + (number - 1) * others) / number
        of_other_units = mean * _mean(mean, node)
        return every / units + (1 - 1 / units) * of_other_units

    def gradient(
        self,
        back: Backward,
        node: Node,
        source: Node,  # noqa: ARG002 - it takes no other
        offset: Offset,
    ) -> Tensor:
        """Less what is lost in the gradient's mean, and along the entries themselves."""
        if _units(node) == 1:
            raise NoRuleError(f"no rule for the gradient through the batch's own {said(node)}")
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
        lost, weight = torch.zeros((), dtype=torch.double), 0.0
        try:
            sizes = [n if axis in _axes(node) else 1 for axis, n in enumerate(shape)]
            for by, share in _pairs(sizes, PAIRS_BACKWARD):
                along = back.forward.moment(node, by) / gamma_square(node)
                both = back.moment(node, by) * (1 + along)
                inside = offsets.inside(by, shape)
                lost = lost + share * _ratio(both, inside)
                weight += share
        except NoRuleError:
            return torch.tensor(1 - 2 / number).double()
        others = lost / weight / own if weight and own else torch.zeros(()).double()
        others = others * (1 - 1 / number) / _units(node)
        return (1 - 2 / number - others).clamp(min=0)


def _ratio(values: Tensor, inside: Tensor) -> Tensor:
    """The mean over those entries whose partners are inside, 0 being what the others have."""
    sizes = offsets.broadcast(values.shape, inside.shape)
    return values.expand(sizes).sum() / inside.expand(sizes).sum()


def gamma_square(node: Node) -> Tensor:
    return affine(node)[0].square().clamp(min=1e-30)


def _pairs(size: list[int], number: int) -> list[tuple[Offset, float]]:
    """Offsets of pairs of different entries, some of one image and some of two, and their shares.

    They are the same parts of an axis at each size, so that those of a layer are, times the
    stride, those of the one below.
    """
    steps: list[list[int]] = []
    for axis, n in enumerate(size):
        unit = max(1, n // PARTS) if axis else 1
        steps.append([step for step in range(1 - n, n) if step % unit == 0])
    entries = math.prod(size)
    of_one = (entries // size[0] - 1) / max(1, entries - 1)
    within = _chosen([[0], *steps[1:]], number // 2)
    between = _chosen([[step for step in steps[0] if step > 0], *steps[1:]], number // 2)
    found = []
    for chosen, share in ((within, of_one), (between, 1 - of_one)):
        pairs = [math.prod(n - abs(b) for n, b in zip(size, by, strict=True)) for by in chosen]
        found += [(by, share * n / sum(pairs)) for by, n in zip(chosen, pairs, strict=True)]
    return found


def _chosen(steps: list[list[int]], number: int) -> list[Offset]:
    if math.prod(map(len, steps)) <= 2 * number:
        drawn = set(itertools.product(*steps))
    else:
        stream = random.Random(0)  # noqa: S311 - the same ones each time
        drawn = {tuple(map(stream.choice, steps)) for _ in range(number)}
    turned = {by if offsets.is_first(by) else offsets.opposite(by) for by in drawn}
    return sorted(by for by in turned if any(by))

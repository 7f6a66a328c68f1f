"""What a rule of an operation says of second moments, over random draws of the weights.

Forward, it is the mean of the product of two entries of what the operation gives, an offset apart
(:mod:`~initflow.models.moments.offsets`); backward, that of the loss's gradient by two entries of
what it takes. Entries have the batch's place in them: the batch itself is not random.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from initflow.errors import cause
from initflow.models.graph import Node
from initflow.models.moments import offsets
from initflow.models.moments.offsets import Offset

ALL = slice(None)


class WeightMoments(Protocol):
    """Gives the mean squares of the entries of a node's weight and bias.

    Where several matrices are packed into one weight, of the ``rows`` of one of them.
    """

    def __call__(
        self, node: Node, weight: Tensor, bias: Tensor | None, rows: slice = ALL, /
    ) -> tuple[float, float]: ...


class NoRuleError(Exception):
    """Why there is no prediction, in a few words."""


@contextlib.contextmanager
def of(node: Node) -> Iterator[None]:
    """A rule that fails, of an operation that is used in a way that it does not know, is none."""
    try:
        yield
    except NoRuleError:
        raise
    except Exception as error:  # a model may call anything with anything
        raise NoRuleError(f"no rule for {said(node)} as it is used: {cause(error)}") from error


class PairMoments(ABC):
    """The means of products of two entries, each found once, or why there is none."""

    def __init__(self) -> None:
        self._moments: dict[tuple[Node, Offset], Tensor | NoRuleError] = {}

    def moment(self, node: Node, offset: Offset | None = None) -> Tensor:
        """The mean of each entry's product with the one ``offset`` further on, 0 outside."""
        shape = shape_of(node)
        offset = offsets.none(shape) if offset is None else offset
        if any(abs(step) >= size for step, size in zip(offset, shape, strict=True)):
            return torch.zeros((1,) * len(shape), dtype=torch.double)
        if not offsets.is_first(offset):
            return offsets.shifted(self.moment(node, offsets.opposite(offset)), offset, shape)
        key = (node, offset)
        if key not in self._moments:
            try:
                with of(node):
                    self._moments[key] = self._moment(node, offset)
            except NoRuleError as error:
                self._moments[key] = error
        found = self._moments[key]
        if isinstance(found, NoRuleError):
            raise found
        return found

    @abstractmethod
    def _moment(self, node: Node, offset: Offset) -> Tensor:
        """Of an offset that :func:`~initflow.models.moments.offsets.is_first`."""


class Forward(Protocol):
    """The second moments of all nodes."""

    def moment(self, node: Node, offset: Offset | None = None) -> Tensor: ...

    def mean(self, node: Node) -> Tensor: ...

    def known(self, node: Node) -> Tensor | None: ...

    @property
    def weight_moments(self) -> WeightMoments: ...

    def heads(self, node: Node) -> Sequence[Node]: ...

    def evaluate(self, node: Node, values: Mapping[Node, Tensor]) -> Tensor: ...

    def draw(self, head: Node, z: Tensor) -> Tensor: ...


class Backward(Protocol):
    """The second moments of the loss's gradient by all nodes."""

    @property
    def forward(self) -> Forward: ...

    def moment(self, node: Node, offset: Offset | None = None) -> Tensor: ...


class Rule:
    """That of one operation; what it has no answer to is a :class:`NoRuleError`."""

    def moment(self, at: Forward, node: Node, offset: Offset) -> Tensor:
        """Of ``node``, which the operation gives; its axes are ``node``'s, or of size 1."""
        raise NotImplementedError

    def mean(self, at: Forward, node: Node) -> Tensor:
        return at.moment(node)[(slice(0, 1),) * len(shape_of(node))] * 0

    def draw(self, at: Forward, node: Node, z: Tensor) -> Tensor:
        """Entries drawn from their distribution, by normal ``z`` (samples, …)."""
        mean = at.mean(node)
        return mean + (at.moment(node) - mean.square()).clamp(min=0).sqrt() * z

    def gradient(
        self,
        back: Backward,  # noqa: ARG002 - this rule has none
        node: Node,
        source: Node,  # noqa: ARG002
        offset: Offset,  # noqa: ARG002
    ) -> Tensor:
        """By ``source``, which the operation takes."""
        raise NoRuleError(f"no rule for the gradient of {said(node)}")


def said(node: Node) -> str:
    """An operation by name and place."""
    function = node.arguments[0].function if node.function == "getitem" else node.function
    return f"{function} in {node.module}" if node.module else function


def shape_of(node: Node) -> tuple[int, ...]:
    if node.shape is None:
        raise NoRuleError(f"no rule for {said(node)}")
    return node.shape

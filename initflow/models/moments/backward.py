"""What second moments the loss's gradient by every tensor of a forward is expected to have.

It goes back from what it is at the model's outputs, by the transposes of the rules forward. As in
mean-field theory, a gradient is taken to be independent of the entries that it is by, and those
that come by two ways of each other.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from initflow.models.graph import Node
from initflow.models.moments import offsets, operations
from initflow.models.moments.forward import Moments
from initflow.models.moments.offsets import Offset
from initflow.models.moments.rules import NoRuleError, PairMoments, said, shape_of


class GradientMoments(PairMoments):
    """Those by the nodes of ``forward``'s graph; ``outputs`` is the gradient by each output.

    That by an entry which only others are functions of, one by one, is what comes through these,
    too.
    """

    def __init__(self, forward: Moments, outputs: Mapping[Node, Tensor]) -> None:
        super().__init__()
        self._forward = forward
        self._outputs = outputs
        self._slopes: dict[tuple[Node, Node, Offset], Tensor] = {}

    @property
    def forward(self) -> Moments:
        return self._forward

    def _moment(self, node: Node, offset: Offset) -> Tensor:
        shape = shape_of(node)
        total = torch.zeros((1,) * len(shape), dtype=torch.double)
        for end in self._ends(node):
            full = shape_of(end)
            by = (*(0,) * (len(full) - len(shape)), *offset)
            if self._leaves(end):
                slopes = self._slope(end, node, by)
                each = slopes * self._arriving(end, by)
                total = total + offsets.summed_to(each, full, shape)
            for user in self._users(end):
                if user.function in operations.MAX_POOLS:
                    rule = self._forward.maximum
                    total = total + rule.gradient_by(self, user, node, offset)
        return offsets.compact(total)

    def _ends(self, node: Node) -> list[Node]:
        """``node`` and all that are functions of it, entry by entry."""
        found, seen = [node], {node}
        for each in found:
            for user in self._forward.graph.users[each]:
                if user not in seen and self._is_function(user):
                    seen.add(user)
                    found.append(user)
        return found

    def _is_function(self, node: Node) -> bool:
        if node.shape is None:
            return False
        if node in self._attention_of or self._forward.known(node) is not None:
            return False
        return self._forward.rule(node) is None

    def _users(self, node: Node) -> list[Node]:
        """Those that take ``node`` by a rule; of an operation that gives several, its parts."""
        found = []
        for user in self._forward.graph.users[node]:
            parts = [user] if user.shape is not None else self._forward.graph.users[user]
            found += [part for part in parts if not self._is_function(part)]
        return [self._attention_of.get(user, user) for user in found]

    @functools.cached_property
    def _attention_of(self) -> Mapping[Node, Node]:
        """By the product of queries and keys, what the attention that is written out gives."""
        attention = self._forward.attention
        found: dict[Node, Node] = {}
        for node in self._forward.graph.nodes:
            with contextlib.suppress(NoRuleError):
                if self._forward.known(node) is None and self._forward.rule(node) is attention:
                    product = attention.product(node)
                    found |= {} if product is None else {product: node}
        return found

    def _leaves(self, node: Node) -> bool:
        others = [u for u in self._users(node) if u.function not in operations.MAX_POOLS]
        return node in self._outputs or bool(others)

    def _arriving(self, node: Node, offset: Offset) -> Tensor:
        """What comes to ``node`` from where it is no more done to single entries."""
        shape = shape_of(node)
        total = torch.zeros((1,) * len(shape), dtype=torch.double)
        if node in self._outputs:
            own = self._outputs[node].detach().double()
            total = total + own * offsets.shifted(own, offset, shape)
        for user in self._users(node):
            if user.function in operations.MAX_POOLS:
                continue
            rule = self._forward.rule(user)
            if rule is None:
                raise NoRuleError(f"no rule for the gradient of {said(user)}")
            total = total + rule.gradient(self, user, node, offset)
        return total

    def _slope(self, end: Node, node: Node, offset: Offset) -> Tensor:
        """The mean of the products of ``end``'s slopes by ``node``, of entries ``offset`` apart."""
        if end is node:
            return torch.ones((1,) * len(offset), dtype=torch.double)
        key = (end, node, offset)
        if key not in self._slopes:
            forward = self._forward
            values, partners = forward.pair_of_heads(end, offset)
            here = self._derivative(end, node, values)
            there = self._derivative(end, node, partners) if any(offset) else here
            there = offsets.shifted(there, offset, shape_of(end))
            self._slopes[key] = forward.averaged(here * there, end, offset)
        return self._slopes[key]

    def _derivative(self, end: Node, node: Node, values: Mapping[Node, Tensor]) -> Tensor:
        """(samples, …) of ``end`` by ``node``, each entry's by the entry that it is of."""
        forward = self._forward
        with torch.enable_grad():
            own = offsets.to_shape(forward.evaluate(node, values).detach(), shape_of(end), 1)
            result = forward.evaluate(end, values)
            leaf = own.expand(offsets.broadcast(own.shape, result.shape))
            leaf = leaf.clone().requires_grad_()
            result = forward.evaluate(end, {**values, node: leaf})
        (slope,) = torch.autograd.grad(result.sum(), leaf, allow_unused=True)
        return torch.zeros_like(leaf) if slope is None else slope

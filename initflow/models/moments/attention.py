"""The rule of softmax attention, as torch's function or written out as two products of matrices.

Queries and keys are drawn with the covariances that the network gives their tokens; the weights of
attention follow, and with them which tokens' values are summed. Queries, keys and values are taken
to be independent of each other; the more heads there are, the more nearly they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as f

from initflow.models.graph import Node
from initflow.models.moments import offsets, operations
from initflow.models.moments.offsets import Offset
from initflow.models.moments.rearranging import called
from initflow.models.moments.rules import Backward, Forward, NoRuleError, Rule, said, shape_of

ENTRIES = 2**21  # of drawn weights of attention
FEWEST, MOST = 16, 256
BACKWARD = 16  # of the drawn ones that gradients go back through


@dataclass(frozen=True)
class Parts:
    """``logits`` of the product of queries and keys are ``scale`` times it, masked or not."""

    query: Node
    key: Node
    value: Node
    logits: Callable[[Tensor], Tensor]
    scale: float
    dropped: float
    product: Node | None = None  # where it is written out

    @property
    def key_turned(self) -> bool:
        return self.product is not None


@dataclass(frozen=True)
class Drawn:
    """The weights (samples, …, queries, keys), before and after dropout, and what they come of.

    ``of_queries`` and ``of_keys`` are the products of drawn tokens, a unit's.
    """

    weights: Tensor
    dropped: Tensor
    of_queries: Tensor
    of_keys: Tensor
    of_values: Tensor
    moments: Tensor


def parts(node: Node, at: Forward) -> Parts | None:
    """What the softmax attention is of that ``node`` gives, None where it is no such thing."""
    if node.function == operations.ATTENTION:
        return _of_function(node, at)
    if node.function not in operations.PRODUCTS or len(node.sources) != 2:
        return None
    weights, value = node.sources
    dropped = 0.0
    while operations.drops(weights) or weights.function in operations.DROPOUTS:
        dropped, weights = operations.drops(weights), weights.sources[0]
    weights = _without_casts(weights)
    known = operations.arguments(weights)
    last = len(shape_of(node)) - 1
    if weights.function != "softmax" or known.get("dim") not in (-1, last):
        return None
    product = _product(weights.sources[0])
    if product is None:
        return None
    query, key = [s for s in product.sources if len(shape_of(s)) == len(shape_of(product))][-2:]

    def logits(values: Tensor) -> Tensor:
        return _run(weights.sources[0], product, values, at)

    both = logits(torch.tensor([[0.0], [1.0]]).double().expand(2, 1))
    scale = (both[1] - both[0]).flatten()
    scale = scale[scale.isfinite()]
    return Parts(query, key, value, logits, float(scale[0]), dropped, product)


def _of_function(node: Node, at: Forward) -> Parts | None:
    known = operations.arguments(node)
    query, key, value = (known[name] for name in ("query", "key", "value"))
    if not all(isinstance(each, Node) for each in (query, key, value)):
        return None
    scale = known.get("scale") or shape_of(query)[-1] ** -0.5
    mask, causal = known.get("attn_mask"), known.get("is_causal", False)
    mask = at.known(mask) if isinstance(mask, Node) else mask

    def logits(values: Tensor) -> Tensor:
        values = values * scale
        if causal:
            upper = torch.ones(values.shape[-2:], dtype=torch.bool).triu(1)
            values = values.masked_fill(upper, -torch.inf)
        if mask is not None and mask.dtype == torch.bool:
            values = values.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            values = values + mask
        return values

    dropped = float(known.get("dropout_p", 0.0))
    return Parts(query, key, value, logits, scale, dropped)


def _without_casts(node: Node) -> Node:
    while node.function in ("to", "float", "type_as", "nan_to_num", "view", "reshape"):
        node = node.sources[0]
    return node


def _product(node: Node) -> Node | None:
    """The product of two nodes that ``node`` is an elementwise function of."""
    while node.function not in operations.PRODUCTS:
        candidates = [s for s in node.sources if s.shape == node.shape]
        if not candidates:
            return None
        node = candidates[0]
    return node if len(node.sources) >= 2 else None


def _run(node: Node, product: Node, values: Tensor, at: Forward) -> Tensor:
    """``node`` for ``values`` (samples, …) of the product, as large as it is."""
    if node is product:
        shape = shape_of(product)
        own = values.reshape(
            len(values), *(1,) * (len(shape) + 1 - values.dim()), *values.shape[1:]
        )
        return own.expand(len(own), *shape)
    if (known := at.known(node)) is not None:
        return known
    given = {source: _run(source, product, values, at) for source in node.sources}
    batched = [
        source
        for source, its in given.items()
        if len(its) == len(values) and its is not at.known(source)
    ]

    def one(*own: Tensor) -> Tensor:
        here = {**given, **dict(zip(batched, own, strict=True))}
        result: Tensor = called(node, lambda x: here[x] if isinstance(x, Node) else x.double())
        return result

    result: Tensor = torch.func.vmap(one, randomness="different")(*(given[s] for s in batched))
    return result


class Attention(Rule):
    """``find`` gives the parts of what a node gives."""

    def __init__(self, find: Callable[[Node], Parts | None]) -> None:
        self._parts = functools.cache(find)
        self._of: dict[Node, Drawn] = {}

    def product(self, node: Node) -> Node | None:
        """Of queries and keys, where the attention that ``node`` gives is written out."""
        own = self._parts(node)
        return None if own is None else own.product

    def moment(self, at: Forward, node: Node, offset: Offset) -> Tensor:
        return _diagonal(self._drawn(at, node).moments, offset, node)

    def gradient(self, back: Backward, node: Node, source: Node, offset: Offset) -> Tensor:
        own = self._parts(node)
        assert own is not None
        drawn = self._drawn(back.forward, node)
        gradient = kernel(back.moment, node, turned=False)
        total: Tensor | None = None
        if source is own.value:
            total = _mean(lambda a: a.mT @ gradient @ a, drawn.dropped)
        width = shape_of(own.value)[-1] * own.scale**2
        roots = _root(drawn.of_values)
        weights, dropped = drawn.weights[:BACKWARD], drawn.dropped[:BACKWARD]
        if source is own.query:

            def by_queries(before: Tensor, after: Tensor, keys: Tensor) -> Tensor:
                slopes = _jacobian(before, after, roots)
                return _gram(_root(keys).mT.unsqueeze(-3) @ slopes)

            found = width * gradient * _mean(by_queries, weights, dropped, drawn.of_keys)
            total = found if total is None else total + found
        if source is own.key:

            def by_keys(before: Tensor, after: Tensor, queries: Tensor) -> Tensor:
                slopes = _jacobian(before, after, roots)
                return _pairs_of_keys(_root(gradient * queries).mT, slopes)

            found = width * _mean(by_keys, weights, dropped, drawn.of_queries)
            total = found if total is None else total + found
            if own.key_turned:
                turned = _diagonal(total, (*offset[:-2], offset[-1], offset[-2]), node)
                return turned.mT
        assert total is not None
        return _diagonal(total, offset, source)

    def _drawn(self, at: Forward, node: Node) -> Drawn:
        if node not in self._of:
            own = self._parts(node)
            assert own is not None
            self._of[node] = _draw(at, own)
        return self._of[node]


def _mean(function: Callable[..., Tensor], *samples: Tensor) -> Tensor:
    """Over the samples, one at a time."""
    total = torch.zeros((), dtype=torch.double)
    for each in zip(*samples, strict=True):
        total = total + function(*each)
    return total / len(samples[0])


def _jacobian(before: Tensor, after: Tensor, roots: Tensor) -> Tensor:
    """(…, queries, keys, keys): softmax's for each query, times the root of values' covariances."""
    spread = after.unsqueeze(-1) * roots.unsqueeze(-3)
    return spread - before.unsqueeze(-1) * (after @ roots).unsqueeze(-2)


def _gram(each: Tensor) -> Tensor:
    flat = each.flatten(-2)
    return flat @ flat.mT


def _pairs_of_keys(both: Tensor, jacobian: Tensor) -> Tensor:
    summed = torch.einsum("...rt,...tij->...rij", both, jacobian)
    return (summed @ summed.mT).sum(-3)


def _draw(at: Forward, own: Parts) -> Drawn:
    queries = kernel(at.moment, own.query, turned=False)
    keys = kernel(at.moment, own.key, turned=own.key_turned)
    values = kernel(at.moment, own.value, turned=False)
    width = shape_of(own.query)[-1]
    lead = offsets.broadcast(queries.shape[:-2], keys.shape[:-2])
    entries = math.prod(lead) * queries.shape[-1] * keys.shape[-1]
    samples = max(FEWEST, min(MOST, ENTRIES // max(1, entries)))
    stream = torch.Generator().manual_seed(0)

    def drawn(covariance: Tensor) -> Tensor:
        size = (samples, *covariance.shape[:-1], width)
        z = torch.randn(size, generator=stream, dtype=torch.double)
        return _root(covariance) @ z

    of_queries, of_keys = drawn(queries), drawn(keys)
    product = of_queries @ of_keys.mT
    weights = f.softmax(own.logits(product), -1).nan_to_num()
    dropped = weights
    if own.dropped:
        kept = torch.rand(weights.shape, generator=stream, dtype=torch.double) >= own.dropped
        dropped = weights * kept / (1 - own.dropped)
    moments = _mean(lambda a: a @ values @ a.mT, dropped)
    first, other = (each[:BACKWARD] @ each[:BACKWARD].mT / width for each in (of_queries, of_keys))
    return Drawn(weights, dropped, first, other, values, moments)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    root: Tensor = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return root


def kernel(moment: Callable[[Node, Offset], Tensor], node: Node, *, turned: bool) -> Tensor:
    """The moments of all pairs of tokens, (…, tokens, tokens), those of a unit.

    The units lie along the last axis and the tokens along the one before, or ``turned`` round.
    """
    shape = shape_of(node)
    axis = len(shape) - (1 if turned else 2)
    tokens = shape[axis]
    rows: list[Tensor] = []
    for step in range(tokens):
        offset = tuple(step if a == axis else 0 for a in range(len(shape)))
        own = moment(node, offset)
        own = (own.mT if turned else own).mean(-1)
        rows.append(own.expand(*own.shape[:-1], tokens)[..., : tokens - step])
    lead = offsets.broadcast(*(row.shape[:-1] for row in rows))
    whole = torch.zeros(*lead, tokens, tokens, dtype=torch.double)
    for step, row in enumerate(rows):
        whole.diagonal(step, -2, -1).copy_(row.expand(*lead, -1))
        whole.diagonal(-step, -2, -1).copy_(row.expand(*lead, -1))
    return whole


def _diagonal(matrix: Tensor, offset: Offset, node: Node) -> Tensor:
    """Its pairs of tokens ``offset`` apart, as a map of ``node``."""
    *lead, step, unit = offset
    if unit:
        return torch.zeros((1,) * len(offset), dtype=torch.double)
    if any(lead):
        raise NoRuleError(f"no rule for pairs of images of {said(node)}")
    tokens = matrix.shape[-1]
    line = matrix.diagonal(step, -2, -1)
    blank = torch.zeros(*line.shape[:-1], min(abs(step), tokens), dtype=torch.double)
    line = torch.cat([line, blank] if step >= 0 else [blank, line], -1)
    return line.reshape(*(1,) * (len(offset) - line.dim() - 1), *line.shape).unsqueeze(-1)

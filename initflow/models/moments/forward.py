"""What second moments every tensor of a forward is expected to have, over draws of the weights.

The graph of a real forward is gone through, with the batch as it is: what is random are the
weights, independent of each other and of mean 0. What sums many of them (a *head*: Linear, a
convolution, attention, pooling) gives entries that are normal, with moments by the rules; what is
done to single entries (activations, sums of branches, any function at all) is done to samples of
them, by the very function that the model calls. Two heads are taken to be independent.

A weight that is used twice is taken for two, a mean of weights that is not 0 for none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from initflow.models.graph import INPUT, Graph, Node
from initflow.models.moments import attention, normalizing, offsets, operations
from initflow.models.moments.averaging import Averaged
from initflow.models.moments.max_pooling import Maximum
from initflow.models.moments.normalizing import Normalized, Reset
from initflow.models.moments.offsets import Offset
from initflow.models.moments.rearranging import Rearranged, called
from initflow.models.moments.recurring import Recurring, is_recurrent
from initflow.models.moments.rules import (
    ALL,
    NoRuleError,
    PairMoments,
    Rule,
    WeightMoments,
    said,
    shape_of,
)
from initflow.models.moments.weighted import Convolution, Embedding, Linear
from initflow.theory.normal_samples import weighted_samples

_Values = Mapping[Node, Tensor]
ENTRIES = 2**20  # of samples of a map, with between the fewest and the most of them
FEWEST, MOST = 256, 1024
TINY = 1e-300
LEARNED = 8  # entries along the last axis, from which on a learned tensor is taken for random
RANDOM = ("bernoulli", "multinomial", "rand_like", "randn_like", "rrelu", "gumbel_softmax")


def own_moments(
    _node: Node, weight: Tensor, bias: Tensor | None, rows: slice = ALL
) -> tuple[float, float]:
    """Mean squares of a weight's own entries, in some of its ``rows``, and of a bias's."""
    of_bias = 0.0 if bias is None else bias.detach().double().square().mean().item()
    return weight.detach()[rows].double().square().mean().item(), of_bias


class Moments(PairMoments):
    """Those of the nodes of ``graph``; what has none is a :class:`NoRuleError` that says why."""

    def __init__(self, graph: Graph, weight_moments: WeightMoments = own_moments) -> None:
        super().__init__()
        self.graph = graph
        self.weight_moments = weight_moments
        self._known: dict[Node, Tensor | None] = {}
        self._rules: dict[Node, Rule | NoRuleError | None] = {}
        self._means: dict[Node, Tensor] = {}
        self._inputs: dict[int, Node] = {}
        self._heads: dict[Node, Sequence[Node]] = {}
        self._linear, self._convolution, self._embedding = Linear(), Convolution(), Embedding()
        self._rearranged, self._averaged, self.maximum = Rearranged(), Averaged(), Maximum()
        self._normalized, self._reset = Normalized(), Reset()
        self.recurring = Recurring(lambda whole: graph.users[whole])
        self.attention = attention.Attention(lambda node: attention.parts(node, self))

    def _moment(self, node: Node, offset: Offset) -> Tensor:
        if (value := self.known(node)) is not None:
            return offsets.compact(value * offsets.shifted(value, offset, value.shape))
        rule = self.rule(node)
        if rule is not None:
            return rule.moment(self, node, offset)
        if operations.drops(node) and not any(offset):
            source = next(iter(node.sources))
            return self.moment(source) / (1 - operations.drops(node))
        values, partners = self._pair(node, offset)
        partners = offsets.shifted(partners, offset, shape_of(node))
        return self.averaged(values * partners, node, offset)

    def mean(self, node: Node) -> Tensor:
        """Each entry's own mean."""
        if node not in self._means:
            value, rule = self.known(node), None
            if value is None and (rule := self.rule(node)) is None:
                none = offsets.none(shape_of(node))
                value = self.averaged(self._pair(node, none)[0], node, none)
            if rule is not None:
                value = rule.mean(self, node)
            assert value is not None
            self._means[node] = value
        return self._means[node]

    def known(self, node: Node) -> Tensor | None:
        """What ``node`` gives where no weight is in it."""
        if node not in self._known:
            self._known[node] = self._value(node)
        return self._known[node]

    def _value(self, node: Node) -> Tensor | None:
        if node.function == INPUT:
            return node.value if node.value is None else _double(node.value)
        if node.shape is None or operations.is_weighted(node) or operations.drops(node):
            return None
        whole = node.arguments[0] if operations.is_part(node) else node
        values = {source: self.known(source) for source in whole.sources}
        if whole.call is None or whole.function in RANDOM or None in values.values():
            return None
        if not self._is_fixed(node, whole):
            return None
        try:
            result = called(whole, lambda x: values[x] if isinstance(x, Node) else x.double())
        except (RuntimeError, TypeError, IndexError):
            return None
        result = result if node is whole else result[node.arguments[1]]
        return _double(result) if isinstance(result, Tensor) else None

    def _is_fixed(self, node: Node, whole: Node) -> bool:
        """Whether no random weight can be among what it is called with."""
        if not any(x.is_floating_point() for x in whole.constants):
            return True
        normalizes = whole.function in normalizing.NORMALIZING
        return operations.rearranges(node) or normalizes or _is_pointwise(whole)

    def rule(self, node: Node) -> Rule | None:
        """None where it is a function of single entries."""
        if node not in self._rules:
            try:
                self._rules[node] = self._rule(node)
            except NoRuleError as error:
                self._rules[node] = error
        found = self._rules[node]
        if isinstance(found, NoRuleError):
            raise found
        return found

    def _rule(self, node: Node) -> Rule | None:
        function = node.function
        if operations.is_weighted(node) or is_recurrent(node):
            return self._of_weighted(node)
        if function in normalizing.NORMALIZING:
            return self._of_normalization(node)
        if operations.rearranges(node):
            return self._rearranged
        if (pooling := self._of_pooling(node)) is not None:
            return pooling
        if function in (operations.ATTENTION, *operations.PRODUCTS):
            if attention.parts(node, self) is not None:
                return self.attention
        elif operations.drops(node) or _is_pointwise(node):
            return None
        raise NoRuleError(f"no rule for {said(node)}")

    def _of_normalization(self, node: Node) -> Rule | None:
        if not normalizing.scales_by_numbers(node):
            return self._normalized
        try:
            self.moment(operations.arguments(node)["input"])
        except NoRuleError:
            if normalizing.uses_batch(node):
                return self._reset
            raise
        return None

    def _of_pooling(self, node: Node) -> Rule | None:
        if node.function in operations.AVERAGING:
            return self._averaged
        return self.maximum if node.function in operations.MAX_POOLS else None

    def _of_weighted(self, node: Node) -> Rule:
        function = node.function
        if is_recurrent(node):
            return self.recurring
        if function in (*operations.CONVOLUTIONS, *operations.TRANSPOSED):
            return self._convolution
        return self._embedding if function == "embedding" else self._linear

    def heads(self, node: Node) -> Sequence[Node]:
        """The nodes that ``node`` is a function of, entry by entry; a dropout brings its own."""
        if node not in self._heads:
            self._heads[node] = list(dict.fromkeys(self._found_heads(node)))
        return self._heads[node]

    def _found_heads(self, node: Node) -> Sequence[Node]:
        if self.known(node) is not None:
            return []
        if self.rule(node) is not None:
            return [node]
        own = [node] if operations.drops(node) else []
        own += [head for source in node.sources for head in self.heads(source)]
        known = [*node.sources, *self._constants(node)]
        return own + [each for each in known if self._stands_for_units(each, own)]

    def _constants(self, node: Node) -> list[Node]:
        """A position embedding, for one, as the input that it might be."""
        found = [each for each in node.constants if each.dim() > 1]
        for each in found:
            self._inputs.setdefault(id(each), Node(INPUT, shape=tuple(each.shape), value=each))
        return [self._inputs[id(each)] for each in found]

    def _stands_for_units(self, node: Node, others: Sequence[Node]) -> bool:
        """Whether what is known is taken for random units, as what it is put beside has such."""
        known, shape = self.known(node), shape_of(node)
        if known is None or len(shape) < 2 or shape[-1] < LEARNED or not known.is_floating_point():
            return False
        beside = [self.moment(head) for head in others if self._is_drawn(head)]
        return bool(beside) and all(each.shape[-1] == 1 for each in beside)

    def _is_drawn(self, head: Node) -> bool:
        return not operations.drops(head) and self.known(head) is None

    def _of_head(self, head: Node, offset: Offset | None = None) -> tuple[Tensor, Tensor]:
        """The mean, and the moments of pairs; of what stands for units, those over them."""
        mean, moment = self.mean(head), self.moment(head, offset)
        if self.known(head) is not None:
            return mean.mean(-1, keepdim=True), moment.mean(-1, keepdim=True)
        return mean, moment

    def samples(self, node: Node) -> int:
        """How many are drawn, so that they fit."""
        entries = max((self.moment_size(head) for head in self.heads(node)), default=1)
        return max(FEWEST, min(MOST, 4 * (ENTRIES // max(1, 4 * entries))))

    def moment_size(self, head: Node) -> int:
        return 1 if operations.drops(head) else self._of_head(head)[1].numel()

    def draw(self, head: Node, z: Tensor) -> Tensor:
        """Values of ``head`` by normal ``z`` (samples, …), which is broadcast to its entries."""
        kept = 1 - operations.drops(head)
        if kept < 1:
            held: Tensor = torch.special.ndtr(z) < kept
            return held.double() / max(kept, TINY)
        if self.known(head) is not None:
            mean, moment = self._of_head(head)
            return mean + (moment - mean.square()).clamp(min=0).sqrt() * z
        rule = self.rule(head)
        assert rule is not None
        return rule.draw(self, head, z)

    def evaluate(self, node: Node, values: Mapping[Node, Tensor]) -> Tensor:
        """``node`` (samples, …) where its heads have ``values``."""
        return self._kept(node, values, {})

    def _kept(self, node: Node, values: Mapping[Node, Tensor], found: dict[Node, Tensor]) -> Tensor:
        """The same; ``found`` keeps what was evaluated on the way."""
        if node not in found:
            found[node] = self._evaluated(
                node, values, lambda each: self._kept(each, values, found)
            )
        return found[node]

    def _evaluated(
        self, node: Node, values: Mapping[Node, Tensor], of: Callable[[Node], Tensor]
    ) -> Tensor:
        if node in values and not operations.drops(node):
            return values[node]
        if (known := self.known(node)) is not None:
            return known.unsqueeze(0)
        if operations.drops(node):
            return of(node.sources[0]) * values[node]
        if node.function in normalizing.NORMALIZING:
            mean, scale = normalizing.numbers(self, node)
            gamma, beta = normalizing.affine(node)
            return (of(node.sources[0]) - mean) * scale * gamma + beta
        return _applied(
            node, {source: of(source) for source in node.sources}, self._put(node, values)
        )

    def _put(self, node: Node, values: Mapping[Node, Tensor]) -> Mapping[int, Tensor]:
        """The samples of those constants of ``node`` that stand for random units."""
        of_constants = [self._inputs.get(id(each)) for each in node.constants]
        return {id(x.value): values[x] for x in of_constants if x is not None and x in values}

    def _pair(self, node: Node, offset: Offset) -> tuple[Tensor, Tensor]:
        """``node``'s samples, and those of the entries ``offset`` further on, where they stand."""
        here, there = self.pair_of_heads(node, offset)
        values = self.evaluate(node, here)
        return values, self.evaluate(node, there) if any(offset) else values

    def _normal(self, node: Node, offset: Offset) -> tuple[Tensor, Tensor]:
        variables = max(1, len(self.heads(node))) * (2 if any(offset) else 1)
        return weighted_samples(self.samples(node), variables)

    def averaged(self, values: Tensor, node: Node, offset: Offset) -> Tensor:
        """The mean of what comes of ``node``'s samples, (samples, …) or one for all."""
        _, weights = self._normal(node, offset)
        mean: Tensor = values[0] if len(values) == 1 else torch.tensordot(weights, values, 1)
        return mean

    def pair_of_heads(self, node: Node, offset: Offset) -> tuple[_Values, _Values]:
        """Values of what ``node`` is a function of, by which :meth:`evaluate` gives its pairs."""
        heads = self.heads(node)
        pairs, (z, _) = any(offset), self._normal(node, offset)
        here: dict[Node, Tensor] = {}
        there: dict[Node, Tensor] = {}
        for i, head in enumerate(heads):
            shape = shape_of(head)
            first = offsets.to_shape(z[:, i], shape, 1)
            if not pairs:
                here[head] = self._through(head, first)
                continue
            other = offsets.to_shape(z[:, len(heads) + i], shape, 1)
            moved = self._correlation(head, offsets.aligned(offset, shape))
            here[head] = self.draw(head, first)
            there[head] = self.draw(head, moved * first + (1 - moved.square()).sqrt() * other)
        return here, there

    def _through(self, head: Node, z: Tensor) -> Tensor:
        """Where entries of a function are only put elsewhere, they stay what they are."""
        source = head.sources[0] if head.sources else head
        alone = len(set(head.sources)) == 1 and self._is_drawn(head)
        if not alone or self.rule(head) is not self._rearranged or self.known(source) is not None:
            return self.draw(head, z)
        if self.rule(source) is not None and not self._is_shaped(source):
            return self.draw(head, z)
        values, _ = self._pair(source, offsets.none(shape_of(source)))
        if len(values) != len(z):
            return self.draw(head, z)
        values = values.expand(len(values), *shape_of(source))
        return _applied(head, {source: values})

    def _is_shaped(self, node: Node) -> bool:
        """Whether its entries are other than normal."""
        return self.rule(node) is self.maximum

    def _correlation(self, head: Node, offset: Offset) -> Tensor:
        """Of each entry and the one ``offset`` before it, from −1 to 1."""
        if not any(offset):
            return torch.tensor(1.0).double() - (1.0 if operations.drops(head) else 0.0)
        if operations.drops(head):
            return torch.zeros((), dtype=torch.double)
        shape, back = shape_of(head), offsets.opposite(offset)
        mean, moment = self._of_head(head)
        variance = (moment - mean.square()).clamp(min=0)
        both = self._of_head(head, back)[1] - mean * offsets.shifted(mean, back, shape)
        product = variance * offsets.shifted(variance, back, shape)
        found = both / product.clamp(min=torch.finfo(torch.double).tiny).sqrt()
        return torch.where(product > 0, found, 0.0).clamp(-1, 1)


def _double(value: Tensor) -> Tensor:
    value = value.detach()
    return value.double() if value.is_floating_point() else value


def _applied(
    node: Node, values: Mapping[Node, Tensor], constants: Mapping[int, Tensor] | None = None
) -> Tensor:
    """``node``'s own function on samples (samples, …) of what it takes; one sample is for all.

    ``constants`` are samples of some of its constants, by their ids.
    """
    constants = constants or {}
    given_values = (*values.values(), *constants.values())
    several = max(len(each) for each in given_values)
    shape = shape_of(node)
    sources = list(values)
    own = [each.expand(several, *each.shape[1:]).clone() for each in given_values]

    def one(*given: Tensor) -> Tensor:
        by: dict[object, Tensor] = dict(zip((*sources, *constants), given, strict=True))

        def replaced(x: Node | Tensor) -> Tensor:
            return by[x] if isinstance(x, Node) else by.get(id(x), short(x))

        result: Tensor = called(node, replaced)
        return result

    short = _short
    try:
        result = torch.func.vmap(one, randomness="different")(*own)
    except RuntimeError:  # it asks for all units, as prelu with a slope for each
        short = _whole
        full = [shape_of(source) for source in sources] + [x.shape[1:] for x in constants.values()]
        own = [x.expand(len(x), *size).clone() for x, size in zip(own, full, strict=True)]
        result = offsets.compact(torch.func.vmap(one, randomness="different")(*own))
    return offsets.to_shape(result, shape, 1)


def _whole(constant: Tensor) -> Tensor:
    return constant.detach().double()


def _short(constant: Tensor) -> Tensor:
    """Of size 1 where all entries are the same, as a new layer's scales are."""
    return offsets.compact(_whole(constant))


def _is_pointwise(node: Node) -> bool:
    """Whether an entry of what ``node`` gives depends on the same entry of what it takes alone.

    It is tried: what is changed elsewhere must not matter.
    """
    shape = node.shape
    if shape is None or node.call is None or node.function in RANDOM:
        return False
    sources = list(dict.fromkeys(node.sources))
    try:
        sizes = [shape_of(source) for source in sources]
        if offsets.broadcast(*sizes) != shape:
            constants = [tuple(each.shape) for each in node.constants]
            if offsets.broadcast(*sizes, *constants) != shape:
                return False
        stream = torch.Generator().manual_seed(0)
        first = [torch.rand(size, generator=stream).double() for size in sizes]
        kept = torch.rand(shape, generator=stream) < 0.5
        kept = kept if kept.numel() > 1 else torch.zeros(shape, dtype=torch.bool)
        second = [
            torch.where(_all(kept, size), x, torch.rand(size, generator=stream).double())
            for x, size in zip(first, sizes, strict=True)
        ]
        results = [_once(node, sources, values) for values in (first, second)]
    except (RuntimeError, TypeError, ValueError, IndexError, NoRuleError):
        return False
    if not all(isinstance(each, Tensor) and each.shape == shape for each in results):
        return False
    before, after = (each[kept] for each in results)
    return bool(torch.isclose(before.double(), after.double(), equal_nan=True).all())


def _all(kept: Tensor, size: Sequence[int]) -> Tensor:
    """Entries of a tensor of ``size`` that must be kept for ``kept`` of what it is broadcast to."""
    lead = kept.dim() - len(size)
    for axis in range(kept.dim()):
        own = size[axis - lead] if axis >= lead else 1
        if own == 1 and kept.shape[axis] > 1:
            kept = kept.any(axis, keepdim=True)
    return kept.reshape(tuple(size))


def _once(node: Node, sources: Sequence[Node], values: Sequence[Tensor]) -> Tensor:
    by = {source: x.clone() for source, x in zip(sources, values, strict=True)}
    result: Tensor = called(node, lambda x: by[x] if isinstance(x, Node) else x.detach().double())
    return result

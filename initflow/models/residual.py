"""Branches that are added to a trunk, found on the graph, and how they are to start.

An ``add`` of two tensors is a residual one where both come of one tensor, the fork, and one of
them by fewer matrices: that is the trunk (the identity, or a projection), the other the branch.
Names say nothing here.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from initflow.errors import SettingError
from initflow.models import following
from initflow.models.graph import Graph, Node
from initflow.models.weights import Matrix

KINDS = ("scaled", "zero", "rezero", "fixup")
ADD = "add"
Products = Mapping[Node, Sequence[Matrix]]


@dataclass(frozen=True, eq=False)
class Branch:
    """What is added to a trunk.

    ``last`` are the matrices that nothing weighs after, ``layers`` is the largest number of them
    that a path through the branch goes by. ``norms`` and ``gates`` are parameters that scale what
    the last ones give: of normalizations, which undo any scale before them, and others.
    """

    last: Sequence[Matrix]
    others: Sequence[Matrix]
    layers: int
    norms: Sequence[str]
    gates: Sequence[str]


@dataclass(frozen=True)
class Start:
    """How branches start: factors on matrices, values of parameters; ``number`` of additions."""

    number: int
    scales: Mapping[Matrix, float] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)


def start(
    kind: str, model: nn.Module, graph: Graph, products: Products, chosen: Collection[Matrix]
) -> Start:
    """What ``residual=kind`` means for ``model``, of which the ``chosen`` matrices are filled.

    - ``scaled``: every branch by 1/√N, N the number of additions, as GPT-2's (Radford et al.
      2019): 1/√(2·layers) in a transformer.
    - ``zero`` or ``rezero``: every branch starts at 0 (Bachlechner et al. 2020), by its gate
      where it has one.
    - ``fixup``: every branch starts at 0, its other matrices are scaled by N^(−1/(2m−2)), m
      being its layers, and the head is 0, unless it is tied (Zhang, Dauphin and Ma 2019).

    What a branch is scaled by is the weight of the normalization at its end, where there is one,
    and else its last matrices.
    """
    branches = find(model, graph, products)
    if not branches:
        raise SettingError(
            f"residual='{kind}' needs branches that are added; {type(model).__name__} has none"
        )
    number = len(branches)
    at_end = 1 / math.sqrt(number) if kind == "scaled" else 0.0
    scales: dict[Matrix, float] = {}
    values: dict[str, float] = {}
    branches = [branch for branch in branches if any(m in chosen for m in branch.last)]
    for branch in branches:
        if branch.gates and kind != "scaled":
            values |= dict.fromkeys(branch.gates, at_end)
        elif branch.norms:
            values |= dict.fromkeys(branch.norms, at_end)
        else:
            scales |= dict.fromkeys(branch.last, at_end)
    if kind == "fixup":
        for branch in branches:
            if branch.layers > 1:
                factor = number ** (-1 / (2 * branch.layers - 2))
                scales = dict.fromkeys(branch.others, factor) | scales
        # One that shares its weights with an embedding would leave nothing to start from.
        scales |= {matrix: 0.0 for matrix in _head(graph, products) if not matrix.tied}
    return Start(number, scales, values)


def find(model: nn.Module, graph: Graph, products: Products) -> list[Branch]:
    """All of them, in the order of their additions."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for node in graph.nodes:
        sides = node.sources
        if node.function == ADD and len(sides) == 2 and sides[0] is not sides[1]:
            branch = _branch(sides, graph, products)
            if branch:
                found.append(_described(branch, model, graph, products, names))
    return found


def _branch(sides: Sequence[Node], graph: Graph, products: Products) -> tuple[Node, Node] | None:
    """The fork and the side that is the branch.

    Both sides are followed backwards together, from the latest node to the first, with the fewest
    matrices between each node and the side. The fork is the node of both that one of them reaches
    by the fewest, the latest of several.
    """
    crossed: tuple[dict[Node, int], dict[Node, int]] = ({sides[0]: 0}, {sides[1]: 0})
    waiting = [(-graph.places[side], side) for side in sides]
    heapq.heapify(waiting)
    seen = set(sides)
    best: tuple[int, int, Node] | None = None
    while waiting:
        _, node = heapq.heappop(waiting)
        ways = [reached[node] for reached in crossed if node in reached]
        if len(ways) == 2 and (best is None or min(ways) < min(best[:2])):
            best = (ways[0], ways[1], node)
            if min(ways) == 0:
                break  # none is reached by fewer
        for reached in crossed:
            if node in reached:
                through = reached[node] + _layers_of(node, products)
                for source in node.sources:
                    reached[source] = min(reached.get(source, through), through)
        for source in node.sources:
            if source not in seen:
                seen.add(source)
                heapq.heappush(waiting, (-graph.places[source], source))
    if best is None or best[0] == best[1]:
        return None
    return best[2], sides[0] if best[0] > best[1] else sides[1]


def _between(fork: Node, side: Node, graph: Graph) -> list[Node]:
    """What ``side`` comes of, from the fork on, in order."""
    seen, waiting = {side}, [side]
    while waiting:
        for source in waiting.pop().sources:
            if source not in seen and graph.places[source] >= graph.places[fork]:
                seen.add(source)
                waiting.append(source)
    return sorted(seen, key=graph.places.__getitem__)


def _layers_of(node: Node, products: Products) -> int:
    """An attention that is not looked into has two, one after the other."""
    return len(dict.fromkeys(matrix.module for matrix in products.get(node, ())))


def _described(
    branch: tuple[Node, Node],
    model: nn.Module,
    graph: Graph,
    products: Products,
    names: Mapping[int, str],
) -> Branch:
    fork, side = branch
    inside = _between(fork, side, graph)
    longest = {fork: 0}
    for node in inside:
        before = [longest[source] for source in node.sources if source in longest]
        if node is not fork and before:
            longest[node] = max(before) + _layers_of(node, products)
    of_branch = longest.keys() - {fork}
    inner = [node for node in inside if node in of_branch]
    matrices = dict.fromkeys(matrix for node in inner for matrix in products.get(node, ()))
    last: dict[Matrix, None] = {}
    norms: dict[str, None] = {}
    gates: dict[str, None] = {}
    waiting, seen = [side], {side}
    while waiting:
        node = waiting.pop()
        if node in products:
            last |= dict.fromkeys(_last_of(products[node]))
            continue
        norms |= _norm(node, model, names)
        if node.function == "mul":
            gates |= dict.fromkeys(names[id(x)] for x in node.constants if id(x) in names)
        for source in _weighed(node):
            if source in of_branch and source not in seen:
                seen.add(source)
                waiting.append(source)
    others = [matrix for matrix in matrices if matrix not in last]
    return Branch(list(last), others, longest[side], list(norms), list(gates))


def _last_of(matrices: Sequence[Matrix]) -> Sequence[Matrix]:
    """Of an attention that is not looked into, its output's."""
    modules = list(dict.fromkeys(matrix.module for matrix in matrices))
    return [matrix for matrix in matrices if matrix.module == modules[-1]]


def _weighed(node: Node) -> Iterator[Node]:
    """What a node takes, but for the gates of a product."""
    sources = node.sources
    if node.function == "mul" and len(sources) == 2:
        one, other = sources
        if following.is_gate(one, other):
            sources = [other]
        elif following.is_gate(other, one):
            sources = [one]
    yield from sources


def _norm(node: Node, model: nn.Module, names: Mapping[int, str]) -> dict[str, None]:
    """The weight of a normalization."""
    if node.function not in following.NORMALIZING or not node.module:
        return {}
    weight = getattr(model.get_submodule(node.module), "weight", None)
    return {names[id(weight)]: None} if id(weight) in names else {}


def _head(graph: Graph, products: Products) -> list[Matrix]:
    """The matrices that give the outputs, where nothing is added between."""
    found: dict[Matrix, None] = {}
    waiting, seen = list(graph.outputs), set(graph.outputs)
    while waiting:
        node = waiting.pop()
        if node in products:
            found |= dict.fromkeys(_last_of(products[node]))
            continue
        if node.function == ADD and len(node.sources) > 1:
            return []
        for source in node.sources:
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return list(found)

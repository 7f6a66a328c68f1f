"""What theory expects of each layer of a model on a batch, or why it expects nothing.

The modules ``forward`` and ``backward`` say it of every entry; here it is the mean over a layer's
output, by the name of its module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from initflow.models import batches, graph
from initflow.models.graph import Graph, Node
from initflow.models.moments import operations
from initflow.models.moments.backward import GradientMoments
from initflow.models.moments.forward import Moments, own_moments
from initflow.models.moments.rules import NoRuleError, WeightMoments, of
from initflow.theory import recurrent

IMAGES = 8  # of a batch, which are gone by: more cost time, and change little


@dataclass(frozen=True)
class Expected:
    """A mean square over draws of the weights; None where there is no rule, for that ``reason``."""

    value: float | None
    reason: str = ""


@dataclass(frozen=True)
class LayerExpectation:
    """Of what an operation with a weight gives, and of the loss's gradient by that."""

    forward: Expected
    backward: Expected


@dataclass(frozen=True)
class Theory:
    """What is expected of a recorded ``graph``: of its nodes, and of its layers by name.

    A module that is called several times has the mean over its calls.
    """

    graph: Graph
    forward: Moments
    backward: GradientMoments | None = None

    def of_node(self, node: Node) -> LayerExpectation:
        forward = _expected(node, self.forward.moment)
        if self.backward is None:
            return LayerExpectation(forward, Expected(None, "no gradient by the outputs was given"))
        return LayerExpectation(forward, _expected(node, self.backward.moment))

    def forward_through_time(self, node: Node) -> Sequence[recurrent.Forward]:
        """Of each layer of a recurrent kernel; a :class:`NoRuleError` where there is no rule."""
        with of(node):
            return self.forward.recurring.forward(self.forward, node)

    def backward_through_time(self, node: Node) -> Sequence[recurrent.Backward]:
        """The same of the gradient, which must be given at the outputs."""
        assert self.backward is not None
        with of(node):
            return self.forward.recurring.backward(self.backward, node)

    def of_layers(self) -> Mapping[str, LayerExpectation]:
        found: dict[str, list[LayerExpectation]] = {}
        for node in self.graph.nodes:
            if operations.is_weighted(node):
                found.setdefault(node.module, []).append(self.of_node(node))
        return {name: _together(calls) for name, calls in found.items()}


def theory(
    recorded: Graph,
    output_gradients: Mapping[Node, Tensor] | None = None,
    weight_moments: WeightMoments = own_moments,
) -> Theory:
    """What is expected of ``recorded``, whose inputs have their values.

    ``output_gradients`` are the loss's by the graph's outputs, from which it goes backward.
    ``weight_moments`` gives the mean squares of the entries of a node's weight and bias.
    """
    forward = Moments(recorded, weight_moments)
    if output_gradients is None:
        return Theory(recorded, forward)
    return Theory(recorded, forward, GradientMoments(forward, output_gradients))


def of_model(
    model: nn.Module, batch: object, weight_moments: WeightMoments = own_moments
) -> Theory:
    """Forward alone, on the first :data:`IMAGES` of ``batch``."""
    return theory(graph.of_batch(model, batches.given(model, first(batch))), None, weight_moments)


def first(batch: object, images: int = IMAGES) -> object:
    """``batch`` with the first of its images alone; what has another number of them is left."""
    sizes = {len(x) for x in batches.tensors(batch) if x.dim()}
    if len(sizes) != 1 or sizes.pop() <= images:
        return batch
    return batches.mapped(batch, lambda x: x[:images] if x.dim() else x)


def _expected(node: Node, moment: Callable[[Node], Tensor]) -> Expected:
    try:
        return Expected(_mean(moment(node), node))
    except NoRuleError as error:
        return Expected(None, str(error))


def _mean(moments: Tensor, node: Node) -> float:
    assert node.shape is not None
    return moments.expand(node.shape).mean().item()


def _together(calls: list[LayerExpectation]) -> LayerExpectation:
    ways = ([call.forward for call in calls], [call.backward for call in calls])
    return LayerExpectation(*(_mean_of(way) for way in ways))


def _mean_of(calls: list[Expected]) -> Expected:
    missing = next((call for call in calls if call.value is None), None)
    if missing is not None:
        return missing
    return Expected(sum(call.value or 0.0 for call in calls) / len(calls))

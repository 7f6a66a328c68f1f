"""Whose prediction lies nearer to the mean over many draws: AnyInit's or ours.

``python -m bench.anyinit``, with anyinit 0.4 on the path (``make anyinit``). Each architecture is
drawn 50 times by AnyInit's own ``initialize(model, "analytic", batch, seed=…)``. What it predicts
and what it measured stand in its report, for one place behind each layer. What it measured, it did
on the batch that it was given, and its prediction starts from that batch's moments; the mean of
what it measured over the draws is what both predictions are held against. Ours is for the same
batch and the same variances of the weights, at the node of the recorded forward that gives just
what AnyInit measured, in two draws. Places of which one side predicts nothing are counted, and left
out of the errors of both.

On images, also with a batch of independent normal pixels in their place, which is what AnyInit
takes its input for. "chance" is the standard error of the mean over the draws: medians that differ
by less are equal. AnyInit's report holds no gradients.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.architectures import ARCHITECTURES, Architecture
from initflow.models import batches, graph
from initflow.models.graph import Graph, Node
from initflow.models.moments.expectations import theory
from initflow.models.moments.rules import ALL

SEEDS = 50
SAME = 1e-4  # of two measurements of one place


@dataclass
class Drawn:
    """What AnyInit says of one architecture: by layer what it predicts and measured, per draw."""

    predicted: dict[str, float] = field(default_factory=dict)
    measured: dict[str, list[float]] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    variances: dict[int, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Errors:
    """Relative errors of both by place, and how many places each predicts, of ``places``."""

    theirs: list[float]
    ours: list[float]
    noise: list[float]
    places: int
    by_them: int
    by_us: int
    seconds: float


def compared(one: Architecture, batch: Tensor) -> Errors:
    torch.manual_seed(0)
    model = one.build()
    drawn = _drawn(model, batch)
    started = time.perf_counter()
    recorded = graph.of_batch(model, batches.given(model, batch))
    variances = {key: statistics.mean(each) for key, each in drawn.variances.items()}

    def moments(
        _node: Node, weight: Tensor, bias: Tensor | None, rows: slice = ALL
    ) -> tuple[float, float]:
        of_bias = 0.0 if bias is None else bias.square().mean().item()
        return variances.get(id(weight), weight[rows].square().mean().item()), of_bias

    expected = theory(recorded, weight_moments=moments)
    nodes = _tensors(recorded)
    theirs, ours, noise, by_us = [], [], [], 0
    for name, measured in drawn.measured.items():
        mean = statistics.mean(measured)
        if name not in drawn.places:
            continue
        own = expected.of_node(nodes[drawn.places[name]]).forward.value
        by_us += own is not None
        if own is None or name not in drawn.predicted:
            continue
        theirs.append(abs(drawn.predicted[name] / mean - 1))
        ours.append(abs(own / mean - 1))
        noise.append(statistics.stdev(measured) / mean / len(measured) ** 0.5)
    seconds = time.perf_counter() - started
    measured_at = len(drawn.measured)
    return Errors(theirs, ours, noise, measured_at, len(drawn.predicted), by_us, seconds)


def _drawn(model: nn.Module, batch: Tensor) -> Drawn:
    anyinit: Any = importlib.import_module("anyinit")
    drawn = Drawn()
    matches: dict[str, set[int]] = {}
    for seed in range(SEEDS):
        report = anyinit.initialize(model, "analytic", batch, seed=seed)
        for parameter in model.parameters():
            square = parameter.detach().double().square().mean().item()
            drawn.variances.setdefault(id(parameter), []).append(square)
        values = _moments(model, batch) if seed < 2 else []
        for layer in report.layers:
            if layer.measured is None:
                continue
            if layer.predicted is not None:
                drawn.predicted[layer.name] = layer.predicted
            drawn.measured.setdefault(layer.name, []).append(layer.measured)
            if values:
                like = {i for i, x in enumerate(values) if abs(x / layer.measured - 1) < SAME}
                matches[layer.name] = matches.get(layer.name, like) & like
    drawn.places = {name: min(found) for name, found in matches.items() if found}
    return drawn


def _tensors(recorded: Graph) -> list[Node]:
    return [node for node in recorded.nodes if node.shape is not None]


def _moments(model: nn.Module, batch: Tensor) -> list[float]:
    """Of what each node gives, in the order of the nodes, by doing the forward again."""
    recorded = graph.of_batch(model, batches.given(model, batch))
    values: dict[Node, Any] = {}
    with batches.undisturbed(model), torch.no_grad():
        for node in recorded.nodes:
            values[node] = _value(node, values)
    nodes = _tensors(recorded)
    return [values[node].double().square().mean().item() for node in nodes]


def _value(node: Node, values: Mapping[Node, Any]) -> Any:
    if node.value is not None:
        return node.value

    def given(value: Any) -> Any:
        if isinstance(value, Node):
            found = values[value]
            return found.clone() if isinstance(found, Tensor) else found
        if isinstance(value, (tuple, list)):
            return type(value)(map(given, value))
        return value

    if node.call is None:  # a part of what gives several
        whole, i = node.arguments
        return _flat(values[whole])[i]
    return node.call(*given(node.arguments), **{k: given(v) for k, v in node.keywords.items()})


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [x for each in value for x in _flat(each)]
    return [value]


def _rows() -> Iterator[tuple[str, Errors]]:
    for one in ARCHITECTURES:
        batch = one.batch()
        yield one.name, compared(one, batch)
        if batch.dim() == 4:
            stream = torch.Generator().manual_seed(0)
            yield f"{one.name}, normal", compared(one, torch.randn(batch.shape, generator=stream))


def main() -> None:
    try:
        importlib.import_module("anyinit")
    except ImportError:
        sys.exit("anyinit is not installed: make anyinit does it, apart from this environment")
    print(f"relative errors of the mean square behind a layer against {SEEDS} draws, medians\n")
    titles = ("AnyInit", "initflow", "chance", "places", "theirs", "ours", "s")
    print(f"{'':32s}" + "".join(f"{title:>9s}" for title in titles))
    missed = []
    for name, found in _rows():
        shares = [_median(each) for each in (found.theirs, found.ours, found.noise)]
        counts = (found.places, found.by_them, found.by_us)
        print(
            f"{name:32s}"
            + "".join(f"{share:>9s}" for share in map(_percent, shares))
            + "".join(f"{count:9d}" for count in counts)
            + f"{found.seconds:9.1f}  {_verdict(found)}"
        )
        if _verdict(found) == "farther":
            missed.append(name)
    if missed:
        sys.exit(f"not held, to be nearer or equal: {', '.join(missed)}")


def _verdict(found: Errors) -> str:
    """Medians that differ by less than what chance leaves open in the mean are equal."""
    if not found.ours:
        return "nothing that both predict"
    further = _median(found.ours) - _median(found.theirs)
    if abs(further) < _median(found.noise):
        return "equal"
    return "farther" if further > 0 else "nearer"


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    main()

"""What is measured of networks as they stand; measuring changes nothing and draws nothing."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from initflow.core import machine
from initflow.diagnostics.signals import (
    PART,
    SATURATED_SLOPE,
    Signals,
    Size,
    distinct_fraction,
    named_finite,
)
from initflow.initializers.activations import Activation
from initflow.theory.prediction import Products, alignment
from initflow.training.model import Parameters, layer_names
from initflow.training.propagation import Pass, blocks
from initflow.training.splits import Split

CHUNK = 1_000  # images evaluated at once: their activations stay in the cache
BUFFERS = 3  # numbers for each unit and image, at most, that a forward pass keeps
NONFINITE = "nonfinite"
END = "end"  # of the network, beside its layers
SHARE = 0.5  # of what is free of a GPU's memory, for these


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, in nats, and accuracy, as a fraction, over a split."""

    loss: float
    accuracy: float


def evaluate(
    parameters: Parameters, activations: Sequence[Activation], split: Split
) -> list[Evaluation]:
    """The loss and accuracy over ``split`` of each network, with its activation function.

    Nothing but the result is read from their device.
    """
    device = parameters.flat.device
    loss, correct = torch.zeros(2, parameters.members, dtype=torch.float64, device=device)
    at_size = functools.cache(functools.partial(Pass, parameters, activations))
    chunks = (torch.split(of_all, _chunk(parameters)) for of_all in (split.images, split.labels))
    for images, labels in zip(*chunks, strict=True):
        forward = at_size(len(labels))
        predicted = forward.forward(images.unsqueeze(0)).argmax(dim=2)
        loss += len(labels) * forward.losses(labels.unsqueeze(0)).to(torch.float64)
        correct += (predicted == labels).sum(dim=1)
    return [
        Evaluation(total / len(split), hits / len(split))
        for total, hits in torch.stack([loss, correct], dim=1).tolist()
    ]


def _chunk(parameters: Parameters) -> int:
    """Images at once: of a stack on a GPU as many as a share of its memory holds."""
    device = parameters.flat.device
    if not machine.is_launch_bound(device):
        return CHUNK
    numbers = BUFFERS * parameters.members * sum(parameters.widths[1:])
    return min(CHUNK, max(1, int(SHARE * machine.working_memory(str(device)) / (4 * numbers))))


def probe(split: Split, images: int) -> Split:
    """``images`` of ``split``, or all where there are fewer, evenly spaced through it.

    The same ones whatever the seed, and of all classes also where a split is sorted.
    """
    n = min(images, len(split))
    return split.take(torch.arange(n) * len(split) // n)


@dataclass(frozen=True)
class Observation:
    """One network on some images.

    ``gradient_moment`` and ``gradient_alignment`` are those of the mean loss's gradient by the
    logits, as :class:`initflow.theory.prediction.Ends` has them. ``preactivations``, where they
    were asked for, are for each layer (n, units) on the CPU, the last being the logits.
    """

    signals: Signals
    gradient_moment: float
    gradient_alignment: float
    preactivations: Sequence[Tensor] = ()


def observe(
    parameters: Parameters,
    activations: Sequence[Activation],
    split: Split,
    *,
    keeping: bool = False,
) -> list[Observation]:
    """What passes through each network on ``split``, layers being ``fc1``, ``fc2`` and so on.

    Gradients are those of the mean cross-entropy over the split. ``keeping`` says that the
    pre-activations are asked for; all else is one read from their device.
    """
    both = Pass(parameters, activations, len(split))
    gradient = parameters.zeros_like()
    images, labels = split.images.unsqueeze(0), split.labels.unsqueeze(0)
    both.forward(images)
    both.backward(labels, gradient)
    names = layer_names(parameters.depth)
    whole = slice(0, parameters.members)
    alone = [slice(member, member + 1) for member in range(parameters.members)]
    # On the CPU one by one, to the bit as alone.
    parts = [whole] if machine.is_launch_bound(parameters.flat.device) else alone
    found = [_measured(both, gradient, activations, part) for part in parts]
    keys, rows = list(found[0]), torch.cat([torch.stack([*of.values()], 1) for of in found])
    sizes = {
        name: Size(units, units * len(split))
        for name, units in zip(names, parameters.widths[1:], strict=True)
    }
    kept = [of_layer.cpu() for of_layer in both.preactivations] if keeping else []
    observations = []
    for member, values in enumerate(rows.tolist()):
        by_key = dict(zip(keys, values, strict=True))
        moment, power, pairs = (by_key.pop((END, name)) for name in Products.NAMES)
        observations.append(
            Observation(
                _signals_of(by_key, sizes),
                moment,
                alignment(len(split), power, pairs),
                [of_layer[member] for of_layer in kept],
            )
        )
    return observations


def _measured(
    both: Pass, gradient: Parameters, activations: Sequence[Activation], part: slice
) -> dict[tuple[str, str], Tensor]:
    """What is measured of a ``part`` of the networks, each (members,), by layer and quantity.

    And, of the :data:`END`, what there is to know of the gradient by the logits.
    """
    found: dict[tuple[str, str], Tensor] = {}
    for at, name in enumerate(layer_names(both.parameters.depth)):
        layer = _Layer(
            both.parameters.weights[at][part],
            gradient.weights[at][part],
            both.preactivations[at][part],
            both.gradients[at][part],
        )
        if at < len(both.outputs):  # the last layer has no activation
            flat = _saturated(layer.preactivation, activations[part])
            layer = replace(layer, activation=both.outputs[at][part], saturated=flat)
        found |= {(name, quantity): of for quantity, of in layer.quantities().items()}
    last = both.gradients[-1][part]
    products = Products.of(last[0] if len(last) == 1 else last)
    return found | {(END, name): getattr(products, name).reshape(-1) for name in Products.NAMES}


def _saturated(preactivations: Tensor, activations: Sequence[Activation]) -> Tensor:
    """How many of each network's slopes are nearly flat, (members,)."""
    counts = []
    for some in blocks([one.name for one in activations], range(len(activations))):
        activation = activations[some.start]
        slopes = activation.derivative(preactivations[some])
        flat = slopes.abs() < SATURATED_SLOPE * activation.steepest
        counts.append(flat.sum((1, 2)))
    return torch.cat(counts)


@dataclass(frozen=True)
class _Layer:
    """A layer of each of some networks, of which the quantities are measured at once.

    What is launched for it does not depend on how many networks there are. Of a stack of one each
    quantity has the bits that :mod:`initflow.diagnostics.signals` gives it.

    ``weight`` and ``weight_gradient`` are (members, units, inputs); ``preactivation``, ``gradient``
    and ``activation`` (members, n, units) over n images. ``saturated``: (members,), how many of the
    activations lie where the function is nearly flat. The output layer has none of these two.
    """

    weight: Tensor
    weight_gradient: Tensor
    preactivation: Tensor
    gradient: Tensor
    activation: Tensor | None = None
    saturated: Tensor | None = None

    def quantities(self) -> dict[str, Tensor]:
        """Each (members,) in double precision, with the counts of what is not finite."""
        moments = {"weight": _Moments.of(self.weight)}
        moments["preactivation"] = received = _Moments.of(self.preactivation)
        if self.activation is not None:
            moments["activation"] = _Moments.of(self.activation)
        moments["gradient"] = _Moments.of(self.gradient)
        moments["weight_gradient"] = _Moments.of(self.weight_gradient)
        found = {
            "signal_variance": received.variance.mean(1),
            "mean_cosine": _mean_cosines(self.preactivation),
            "distinct_fraction": _distinct_fractions(self.weight),
            "distinct_gradient_fraction": _distinct_fractions(self.weight_gradient),
        }
        for tensor, of in moments.items():
            found[f"{tensor}_variance"] = of.variance.mean(1) + of.mean.var(1, correction=0)
            found[f"{tensor}_second_moment"] = (of.variance + of.mean.square()).mean(1)
            found[f"{NONFINITE}/{tensor}"] = of.nonfinite
        if self.activation is not None and self.saturated is not None:
            silent = self.activation.abs().amax(1) == 0
            count = self.activation[0].numel()
            known = moments["activation"].nonfinite == 0
            found["dead_fraction"] = silent.double().mean(1).where(known, torch.nan)
            share = self.saturated.double() / count
            found["saturated_fraction"] = share.where(known, torch.nan)
        return found


@dataclass(frozen=True)
class _Moments:
    """Mean and variance of each unit's numbers, (members, units), and what is not finite."""

    mean: Tensor
    variance: Tensor
    nonfinite: Tensor  # (members,)

    @classmethod
    def of(cls, x: Tensor) -> _Moments:
        """Of ``x``, (members, n, units)."""
        count = x.shape[1]
        mean = x.sum(1, keepdim=True, dtype=torch.float64) / count
        apart = x - mean.to(x.dtype)
        if len(x) == 1:  # by a kernel that is several times as fast
            low, high = torch.aminmax(apart)
        else:
            low, high = (of.view(-1, 1, 1) for of in torch.aminmax(apart.flatten(1), dim=1))
        size = torch.maximum(-low, high)
        size = size.where(size > 0, 1.0)
        squares = (apart / size).square_().sum(1, keepdim=True, dtype=torch.float64)
        variance = (squares * size.double().square() / count).squeeze(1)
        return cls(mean.squeeze(1), variance, _nonfinite(x, variance))


def _nonfinite(x: Tensor, variance: Tensor) -> Tensor:
    """How many entries of each network's are NaN or infinite; ``variance`` is their units'."""
    # On the CPU to ask whether there are any is cheaper than to count.
    if not machine.is_launch_bound(x.device) and variance.isfinite().all():
        return variance.new_zeros(len(x))
    return x.isfinite().logical_not_().sum((1, 2)).double()


def _mean_cosines(x: Tensor) -> Tensor:
    """That of :class:`initflow.diagnostics.signals.Cosine`, of each of (members, n, units).

    NaN where there is no pair of inputs that are not 0.
    """
    at_once = max(1, PART // x.shape[2])
    n = x.new_zeros(len(x), dtype=torch.float64)
    total = x.new_zeros(len(x), x.shape[2], dtype=torch.float64)
    for part in torch.split(x, at_once, dim=1):
        rows = part.double()
        length = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
        n = n + length.count_nonzero((1, 2))
        total = total + (rows / length.where(length != 0, 1.0)).sum(1)
    mean = (total.square().sum(1) - n) / (n * (n - 1))
    return mean.where(n > 1, torch.nan).clamp(max=1.0)


def _distinct_fractions(rows: Tensor) -> Tensor:
    """:func:`initflow.diagnostics.signals.distinct_fraction` of each of (members, units, inputs).

    Sorted by a number that is the same for the same rows, these lie side by side.
    """
    if not machine.is_launch_bound(rows.device):
        shares = [distinct_fraction(own) for own in rows]
        return torch.tensor(shares, dtype=torch.float64)
    rows = rows.detach() + 0.0  # minus zero is zero
    _, units, inputs = rows.shape
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (inputs,), generator=generator).to(rows.device)
    # Whole numbers add up to the same in any order, also where they wrap around.
    numbers = (rows.view(torch.int32).to(torch.int64) * factors).sum(2)
    order = numbers.argsort(1).unsqueeze(2).expand(-1, -1, inputs)
    rows = rows.gather(1, order)
    new = (rows[:, 1:] != rows[:, :-1]).any(2).sum(1) + 1
    return new.double() / units


def _signals_of(values: Mapping[tuple[str, str], float], sizes: Mapping[str, Size]) -> Signals:
    """Those of a network with these ``values``, by the layer and the name of the quantity."""
    layers: dict[str, dict[str, float]] = {layer: {} for layer in sizes}
    nonfinite = {}
    for (layer, quantity), value in values.items():
        kind, _, tensor = quantity.partition("/")
        if kind != NONFINITE:
            layers[layer][quantity] = value
        elif value:
            nonfinite[f"{tensor}/{layer}"] = int(value)
    return Signals({name: named_finite(of) for name, of in layers.items()}, nonfinite, sizes)


def members_at_once(parameters: Parameters, images: int, members: Sequence[int]) -> list[list[int]]:
    """``members`` in as few parts as have room, when so many ``images`` go through them.

    Counted is what a pass keeps, and what is looked at in double precision.
    """
    units, weights = parameters.widths[1:], parameters.flat.numel() // parameters.members
    numbers = images * (parameters.widths[0] + 4 * sum(units) + 6 * max(units)) + 8 * weights
    free = SHARE * machine.working_memory(str(parameters.flat.device))
    at_once = max(1, int(free / (4 * numbers)))
    return [list(members[at : at + at_once]) for at in range(0, len(members), at_once)]

"""Where each matrix of a model stands, and which scheme is for it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from initflow.core.configurations import RECOMMENDED
from initflow.errors import SettingError
from initflow.initializers import plugins
from initflow.initializers.activations import ACTIVATIONS, Activation
from initflow.initializers.built_in import BUILT_IN, draw
from initflow.initializers.scheme import Place, Scheme
from initflow.models import batches, following, graph
from initflow.models.batches import Batch
from initflow.models.following import Followed
from initflow.models.graph import Graph, Node
from initflow.models.weights import LINEAR, Matrix
from initflow.theory import gain

AUTO = "auto"
DEFAULT = "default"
RECTIFIERS = ("relu", "leaky_relu")
Given = str | Scheme | Callable[..., object]


@functools.cache
def _gain_of(activation: Activation) -> float:
    return gain(activation)


def exact(fan_in: int, activation: Activation) -> float:
    """N(0, gain²/fan_in) with the exact gain of the activation function, whichever it is."""
    return _gain_of(activation) ** 2 / fan_in


def _fill_exact(
    weight: Tensor, fan_in: int, activation: Activation, generator: torch.Generator
) -> None:
    draw(weight, exact(fan_in, activation), "normal", generator)


EXACT = Scheme("gain", _fill_exact, exact, signature=exact)


def _fill_auto(
    weight: Tensor, fan_in: int, fan_out: int, activation: Activation, generator: torch.Generator
) -> None:
    """The scheme made for the activation function that follows: see :func:`made_for`."""
    scheme = made_for(activation)
    scheme.fill_layer(weight, weight, Place(fan_in, fan_out, activation), generator)


def _auto(fan_in: int, fan_out: int, activation: Activation) -> float | None:
    return made_for(activation).variance(Place(fan_in, fan_out, activation))


def _leave(weight: Tensor) -> None:  # noqa: ARG001 - an initializer asks for it
    """The weights as the model's own function makes them."""
    raise ValueError("it is for other models than mlp, whose weights by PyTorch are 'pytorch'")


# What a scheme's name may be besides, where there is a model.
OF_A_MODEL = {
    AUTO: Scheme(AUTO, _fill_auto, _auto, signature=_fill_auto),  # type: ignore[arg-type]
    DEFAULT: Scheme(DEFAULT, _leave, None, signature=_leave),
}


def scheme_of(given: Given) -> Scheme | None:
    """The scheme that ``given`` is, None for ``"auto"``."""
    if isinstance(given, Scheme):
        return None if given is OF_A_MODEL[AUTO] else given
    if isinstance(given, str):
        if given.strip() == AUTO:
            return None
        try:
            return plugins.find(given)
        except SettingError as error:
            raise SettingError(re.sub("^init ", "scheme ", str(error))) from None
    if not callable(given):
        raise SettingError(
            "scheme must be a scheme's name, with arguments after a colon, 'auto', a Scheme or a "
            f"function, not {batches.form(given)}"
        )
    return Scheme.of(given, getattr(given, "__name__", "initializer"), "a function")


def made_for(activation: Activation) -> Scheme:
    """The scheme that ``"auto"`` takes before an activation function.

    That which was made for it, by its authors' claim: he for rectifiers, xavier for tanh and
    sigmoid, lecun for selu and where none follows. For any other N(0, gain²/fan_in), exactly.
    """
    if activation.is_built_in and activation.name in RECTIFIERS:
        return BUILT_IN["he"]
    if activation.is_built_in and activation.name in RECOMMENDED:
        return BUILT_IN[RECOMMENDED[activation.name]]
    return EXACT


@dataclass(frozen=True)
class Structure:
    """A model's graph with what its operations multiply by; ``problem`` where there is none."""

    model: nn.Module
    graph: Graph | None
    products: Mapping[Node, Sequence[Matrix]] = field(default_factory=dict)
    problem: str = ""

    @classmethod
    def of(cls, model: nn.Module, matrices: Sequence[Matrix], batch: Batch | None) -> Structure:
        """From a forward on ``batch``, which the model must take; without one as torch.fx sees."""
        if batch:
            traced = graph.of_batch(model, batch)
        else:
            try:
                traced = graph.of_structure(model)
            except SettingError as error:
                return cls(model, None, problem=str(error))
        return cls(model, traced, following.weighing(traced, matrices))

    def known(self, why: str) -> Graph:
        """The graph, or a :class:`SettingError` that says ``why`` it is needed."""
        if self.graph is None:
            raise SettingError(f"{why}: {self.problem}")
        return self.graph

    @functools.cached_property
    def followed(self) -> Mapping[Matrix, Followed]:
        """What each matrix's output meets first; its module's own activation, where it has one."""
        found: dict[Matrix, Followed] = {}
        for node, matrices in self.products.items():
            assert self.graph is not None
            first = following.after(self.graph, node, self.products)
            for matrix in matrices:
                if first and (matrix not in found or found[matrix].name == LINEAR):
                    found[matrix] = first
                found.setdefault(matrix, Followed(LINEAR, ACTIVATIONS[LINEAR]))
        return found

    def activation(self, matrix: Matrix) -> Followed | None:
        """None where it is not known."""
        if matrix.activation:
            return Followed(matrix.activation, ACTIVATIONS[matrix.activation])
        if self.graph is None:
            return None
        return self.followed.get(matrix, Followed(LINEAR, ACTIVATIONS[LINEAR]))

    def numbered(self, matrices: Sequence[Matrix]) -> dict[Matrix, int]:
        """Each matrix's layer, counted in the order in which they are called, if that is known."""
        called = [matrix for found in self.products.values() for matrix in found]
        layers = dict.fromkeys(m.layer for m in [*called, *matrices] if m in set(matrices))
        numbers = {layer: number for number, layer in enumerate(layers)}
        return {matrix: numbers[matrix.layer] for matrix in matrices}

    def check_chain(self, who: str) -> None:
        """Raise for a model whose layers do not follow one another, and so have no numbers."""
        traced = self.known(f"{who} goes by the layers' numbers")
        for node in self.products:
            after = _next(traced, node, self.products)
            if len(after) > 1:
                names = " and ".join(self.products[n][0].name for n in after[:2])
                raise SettingError(
                    f"{who} goes by the layers' numbers, which only a chain of layers has: "
                    f"'{self.products[node][0].name}' leads to {names}"
                )


def _next(traced: Graph, node: Node, products: Mapping[Node, object]) -> list[Node]:
    """The products that what ``node`` gives leads to without another one between."""
    found: dict[Node, None] = {}
    waiting, seen = [node], {node}
    while waiting:
        for user in traced.users[waiting.pop()]:
            if user in products:
                found[user] = None
            elif user not in seen:
                seen.add(user)
                waiting.append(user)
    return list(found)


def of(
    scheme: Scheme | None, matrices: Sequence[Matrix], structure: Structure
) -> dict[Matrix, Place]:
    """Where each of the ``matrices`` stands, as far as ``scheme`` (None: auto) goes by it."""
    if scheme and scheme.asks_for("layer"):
        structure.check_chain(f"scheme '{scheme.spec}'")
    numbers = structure.numbered(matrices)
    depth = 1 + max(numbers.values())
    return {
        matrix: Place(
            matrix.fan_in,
            matrix.fan_out,
            _activation(scheme, matrix, structure),
            numbers[matrix],
            depth,
        )
        for matrix in matrices
    }


def _activation(scheme: Scheme | None, matrix: Matrix, structure: Structure) -> Activation:
    """That of a matrix, or any where the scheme does not go by it."""
    followed = structure.activation(matrix)
    if followed and followed.activation:
        return followed.activation
    if scheme and not scheme.asks_for("activation"):
        return ACTIVATIONS[LINEAR]
    who = f"scheme '{scheme.spec if scheme else AUTO}' goes by the activation functions"
    structure.known(who)
    assert followed is not None
    raise SettingError(f"{who}: '{matrix.name}' is followed by {followed.name}: {followed.problem}")

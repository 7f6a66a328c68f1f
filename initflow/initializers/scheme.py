"""What an initialization scheme is: a name, a function that fills tensors, a stated variance."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from initflow.core.importing import within_limit
from initflow.core.isolation import left_alone
from initflow.errors import PluginError, SettingError, cause, first_line, unknown
from initflow.initializers.activations import ACTIVATIONS, Activation
from initflow.initializers.finder import MARK
from initflow.initializers.signature import (
    GIVEN,
    OF_A_VARIANCE,
    Value,
    ask,
    check,
    parameters_of,
    read,
    type_of,
    write,
)

BUILT_IN = "built-in"
FUNCTION = re.compile(
    r"(?P<where>.+?\.py|[^\W\d][\w.]*):(?P<function>[^\W\d]\w*)(?::(?P<rest>.*))?"
)

Variance = Callable[..., float]
F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True)
class Place:
    """Where a layer stands: what its initialization may go by.

    - ``fan_in``: the inputs that each of its units sums over; of a convolution every position of
      the kernel counts (He et al. 2015, section 2.2).
    - ``fan_out``: the outputs that each input feeds, likewise.
    - ``activation``: the :class:`Activation` of the hidden layers (default ReLU).
    - ``layer``: its number, from 0 to ``depth`` - 1, the one that gives the logits (default 0).
    - ``depth``: how many layers the network has (default 1).
    """

    fan_in: int
    fan_out: int
    activation: Activation = ACTIVATIONS["relu"]
    layer: int = 0
    depth: int = 1

    def given(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in OF_A_VARIANCE}


def places(widths: Sequence[int], activation: Activation) -> list[Place]:
    """Every layer's place in a network of ``widths`` (pixels, hidden, …, classes)."""
    pairs = list(pairwise(widths))
    return [
        Place(fan_in, fan_out, activation, layer, len(pairs))
        for layer, (fan_in, fan_out) in enumerate(pairs)
    ]


@dataclass(frozen=True)
class Scheme:
    """A way to fill a network's weights, with the arguments it was given.

    :func:`initflow.initializers.find` gives one, :class:`Place` says where a layer stands.

    - ``name``: what it is called, without arguments.
    - ``fill``: the function that writes into tensors in place. It gets what it asks for by
      parameter name: of ``weight``, ``bias``, ``fan_in``, ``fan_out``, ``activation``, ``layer``,
      ``depth`` and ``generator`` or, where it asks for ``network``, of ``network``, ``images``,
      ``labels``, ``activation``, ``depth`` and ``generator``; and the arguments.
    - ``stated_variance``: the function that gives the variance of a weight tensor's entries: of the
      distribution they are drawn from or, where nothing is drawn, of the entries themselves. It
      gets what it asks for of a :class:`Place` and the arguments. None where nothing is stated.
    - ``stated_bias_variance``: the same of the mean square of the biases, if ``fill`` sets them.
    - ``signature``: the function whose keyword parameters are the scheme's arguments, with their
      defaults and types.
    - ``arguments``: those that were given, by name; the others have their defaults.
    - ``provider``: who offers the scheme, in which version.
    """

    name: str
    fill: Callable[..., object]
    stated_variance: Variance | None
    signature: Callable[..., object]
    arguments: Mapping[str, Value] = field(default_factory=dict)
    provider: str = BUILT_IN
    stated_bias_variance: Variance | None = None

    @classmethod
    def of(cls, function: object, name: str, provider: str) -> Scheme:
        """The scheme that ``function`` is, called ``name`` and offered by ``provider``.

        Raises a :class:`SettingError` that says why it is none.
        """
        variances = getattr(function, MARK, (None, None))
        check(function, variances)
        assert callable(function)
        return cls(name, function, variances[0], function, {}, provider, variances[1])

    @property
    def kind(self) -> Literal["layer", "network"]:
        """``layer`` where ``fill`` sees one at a time, ``network`` where it sees all of them."""
        return "network" if "network" in parameters_of(self.fill) else "layer"

    @property
    def fills_biases(self) -> bool:
        """Whether it sets the biases too; else they are as ``bias_init`` says."""
        return self.kind == "network" or "bias" in parameters_of(self.fill)

    def asks_for(self, name: str) -> bool:
        """Whether it, or what it states, goes by what has this name, such as ``activation``."""
        functions = (self.fill, self.stated_variance, self.stated_bias_variance)
        return any(name in parameters_of(function) for function in functions if function)

    @property
    def description(self) -> str:
        """Its docstring: what it draws, of which variance, and who published it."""
        return inspect.getdoc(self.signature) or ""

    @property
    def spec(self) -> str:
        """The text that names it with its arguments: ``normal:std=0.05``."""
        arguments = ",".join(f"{name}={write(value)}" for name, value in self.arguments.items())
        return f"{self.name}:{arguments}" if arguments else self.name

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The arguments the scheme takes, by name."""
        return {
            name: parameter
            for name, parameter in parameters_of(self.signature).items()
            if name not in GIVEN
        }

    @property
    def values(self) -> dict[str, Value]:
        """Every argument by name, as given or by default."""
        return {name: p.default for name, p in self.parameters.items()} | dict(self.arguments)

    def variance(self, at: Place) -> float | None:
        """The stated variance of a layer's weights, a number of at least 0; None without one.

        Raises :class:`SettingError` for a ValueError of the function that states it, which is
        about arguments, and :class:`PluginError` for any other failure.
        """
        return self._stated(self.stated_variance, at)

    def bias_variance(self, at: Place) -> float | None:
        """The stated mean square of a layer's biases, or None; errors as of :meth:`variance`."""
        return self._stated(self.stated_bias_variance, at)

    def _stated(self, variance: Variance | None, at: Place) -> float | None:
        if variance is None:
            return None
        value = math.nan
        try:
            if self.provider == BUILT_IN:
                stated = ask(variance, at.given(), self.values)
            else:
                with left_alone():
                    stated = within_limit(lambda: ask(variance, at.given(), self.values))
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                value = float(stated)
        except ValueError as error:
            raise SettingError(f"scheme '{self.spec}': {first_line(error)}") from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin's function may fail in any way
            what = f"the variance that it states failed: {cause(error)}"
            raise PluginError(f"scheme '{self.spec}' of {self.provider}: {what}") from error
        if not 0 <= value < math.inf:
            what = f"it states {stated!r}, which is no variance"
            raise PluginError(f"scheme '{self.spec}' of {self.provider}: {what}")
        return value

    @torch.no_grad()
    def fill_layer(
        self, weight: Tensor, bias: Tensor, at: Place, generator: torch.Generator
    ) -> object:
        """Fill ``weight``, of shape (fan_out, fan_in) or (channels_out, channels_in, *kernel).

        ``bias``, (fan_out,) or (channels_out,), is filled too if the scheme asks for it. All
        randomness is drawn from ``generator``, on the weight's device. What ``fill`` returns is
        returned. Nothing is checked: what ``fill`` raises is raised.
        """
        given = {"weight": weight, "bias": bias, "generator": generator, **at.given()}
        return ask(self.fill, given, self.values)

    @torch.no_grad()
    def fill_network(
        self,
        network: nn.Module,
        images: object,
        labels: object,
        activation: object,
        generator: torch.Generator,
        *,
        depth: int | None = None,
    ) -> object:
        """Fill all of ``network``, seeing ``images`` (n, pixels) and their ``labels`` (n,).

        ``activation`` is that of the hidden layers, ``generator`` what is drawn from. Of any other
        model than the feed-forward one, ``images`` are what it is called with, and ``depth``, how
        many layers it has, is given; that one has as many as it has Linears.
        """
        if depth is None:
            depth = sum(isinstance(module, nn.Linear) for module in network.modules())
        given = {
            "network": network,
            "images": images,
            "labels": labels,
            "activation": activation,
            "depth": depth,
            "generator": generator,
        }
        return ask(self.fill, given, self.values)

    def bind(self, arguments: Mapping[str, str]) -> Scheme:
        """The scheme with ``arguments``, each as text; a :class:`SettingError` for a wrong one."""
        bound = {}
        for name, text in arguments.items():
            if name not in self.parameters:
                raise unknown(f"argument of scheme '{self.name}'", name, self.parameters)
            kind = type_of(self.signature, self.parameters[name])
            bound[name] = read(f"{self.name}:{name}", text, kind)
        return replace(self, arguments=bound)


@overload
def initializer(function: F) -> F: ...


@overload
def initializer(
    *, variance: Variance | None = None, bias_variance: Variance | None = None
) -> Callable[[F], F]: ...


def initializer(
    function: F | None = None,
    *,
    variance: Variance | None = None,
    bias_variance: Variance | None = None,
) -> F | Callable[[F], F]:
    """Make a ``function`` an initialization scheme, which may state its ``variance``: a decorator.

    ::

        @initflow.initializer(variance=lambda fan_in, gain: gain**2 / fan_in)
        def mine(weight, fan_in, generator, *, gain: float = 1.0):
            weight.normal_(0.0, gain / fan_in**0.5, generator=generator)

    - ``function``: fills ``weight`` in place, and is called as ``fill`` of a :class:`Scheme` is;
      its other keyword parameters, with defaults, are the scheme's arguments.
    - ``variance``: a function that gives the variance of the weights' entries, from what it asks
      for by parameter name: of ``fan_in``, ``fan_out``, ``activation``, ``layer``, ``depth`` and
      the arguments (default None: theory takes the one that it finds).
    - ``bias_variance``: the same of the mean square of the biases, where ``function`` fills
      ``bias`` too (default None: likewise).

    Returns the function, as it is. Defined in a notebook or a script, it is a scheme there, by its
    name; elsewhere an entry point or ``package.module:function`` names it.

    Raises :class:`SettingError` where the function cannot be an initializer.
    """

    def mark(function: F) -> F:
        check(function, (variance, bias_variance))
        setattr(function, MARK, (variance, bias_variance))
        return function

    return mark if function is None else mark(function)


def fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Inputs a unit sums over and outputs an input feeds: (fan_in, fan_out).

    A convolution's fans count every position of its kernel (He et al. 2015, section 2.2).
    """
    fan_out, fan_in, *kernel = shape
    receptive_field_size = math.prod(kernel)
    return fan_in * receptive_field_size, fan_out * receptive_field_size


def parse(spec: str, names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Name and arguments of a scheme: of ``he:mode=fan_out``, or ``file.py:function:gain=2``.

    What stands before the first colon is a scheme's name if it is one of ``names``. The text is
    taken apart, never evaluated. Raises :class:`SettingError`.
    """
    name, colon, rest = (part.strip() for part in spec.partition(":"))
    function = FUNCTION.fullmatch(spec.strip())
    if function and name not in names:
        name = f"{function['where']}:{function['function']}"
        rest, colon = function["rest"], ":" if function["rest"] is not None else ""
    arguments: dict[str, str] = {}
    for item in rest.split(",") if colon else ():
        key, equals, text = (part.strip() for part in item.partition("="))
        if not (key and equals and text):
            raise SettingError(f"init must look like name or name:key=value,…, not '{spec}'")
        if key in arguments:
            raise SettingError(f"init '{spec}' gives the argument '{key}' twice")
        arguments[key] = text
    return name, arguments

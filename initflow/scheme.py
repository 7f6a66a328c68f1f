"""What an initialization scheme is: a name, a function that fills weights, a stated variance."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from initflow.errors import SettingError, unknown

# What a scheme's functions may ask for, by parameter name; other parameters are arguments.
GIVEN = ("weight", "fan_in", "fan_out", "generator")

Value = bool | int | float | str
T = TypeVar("T")


@dataclass(frozen=True)
class Scheme:
    """A way to fill one layer's weights, with the arguments it was given.

    ``fill`` writes into ``weight`` in place. ``stated_variance`` gives the variance of a
    weight tensor's entries: of the distribution they are drawn from or, where nothing is
    drawn, of the entries themselves; it is None where a scheme states none. Either gets
    those of :data:`GIVEN` that it names (a variance only the fans), and the arguments.

    ``signature`` is the function whose keyword parameters are the scheme's arguments, with
    their defaults and types; ``provider`` says who offers the scheme.
    """

    name: str
    fill: Callable[..., None]
    stated_variance: Callable[..., float] | None
    signature: Callable[..., object]
    arguments: Mapping[str, Value] = field(default_factory=dict)
    provider: str = "built-in"

    @property
    def description(self) -> str:
        return inspect.getdoc(self.signature) or ""

    @property
    def spec(self) -> str:
        """The text that :func:`resolve` reads back: ``normal:std=0.05``."""
        arguments = ",".join(f"{name}={_write(value)}" for name, value in self.arguments.items())
        return f"{self.name}:{arguments}" if arguments else self.name

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The arguments the scheme takes, by name."""
        return {
            name: parameter
            for name, parameter in inspect.signature(self.signature).parameters.items()
            if name not in GIVEN
        }

    def variance(self, fan_in: int, fan_out: int) -> float | None:
        """The stated variance of the weights of a layer with these fans, or None."""
        if self.stated_variance is None:
            return None
        return ask(self.stated_variance, {"fan_in": fan_in, "fan_out": fan_out}, self.arguments)

    @torch.no_grad()
    def initialize(self, weight: Tensor, generator: torch.Generator) -> None:
        """Fill ``weight``, of shape (fan_out, fan_in) or (channels_out, channels_in, *kernel).

        All randomness is drawn from ``generator``, on the weight's device.
        """
        fan_in, fan_out = fans(weight.shape)
        ask(
            self.fill,
            {"weight": weight, "fan_in": fan_in, "fan_out": fan_out, "generator": generator},
            self.arguments,
        )

    def bind(self, arguments: Mapping[str, str]) -> Scheme:
        """The scheme with ``arguments``, given as text, or a :class:`SettingError`."""
        types = get_type_hints(self.signature)
        bound = {}
        for name, text in arguments.items():
            if name not in self.parameters:
                raise unknown(f"argument of scheme '{self.name}'", name, self.parameters)
            bound[name] = _read(f"{self.name}:{name}", text, types[name])
        scheme = replace(self, arguments=bound)
        try:  # on a small layer, so that a value out of range is found before any real work
            small = torch.empty(3, 4)
            scheme.initialize(small, torch.Generator())
            scheme.variance(4, 3)
        except ValueError as error:
            raise SettingError(f"scheme '{scheme.spec}': {error}") from error
        except (OverflowError, RuntimeError) as error:
            raise SettingError(f"scheme '{scheme.spec}' cannot fill a layer: {error}") from error
        if not small.isfinite().all():
            raise SettingError(f"scheme '{scheme.spec}' gives weights that are not finite")
        return scheme


def ask(
    function: Callable[..., T], given: Mapping[str, object], arguments: Mapping[str, Value]
) -> T:
    """Call ``function`` with those of ``given`` that it names, and with ``arguments``."""
    named = inspect.signature(function).parameters
    return function(**{key: value for key, value in given.items() if key in named}, **arguments)


def fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Inputs a unit sums over and outputs an input feeds: (fan_in, fan_out).

    A convolution's fans count every position of its kernel (He et al. 2015, section 2.2).
    """
    fan_out, fan_in, *kernel = shape
    receptive_field_size = math.prod(kernel)
    return fan_in * receptive_field_size, fan_out * receptive_field_size


def resolve(spec: str, schemes: Mapping[str, Scheme]) -> Scheme:
    """The one of ``schemes`` that ``spec`` names, with its arguments: ``he:mode=fan_out``.

    The text is taken apart, never evaluated. Raises :class:`SettingError`.
    """
    name, colon, rest = (part.strip() for part in spec.partition(":"))
    if name not in schemes:
        raise unknown("init", name, schemes)
    arguments: dict[str, str] = {}
    for item in rest.split(",") if colon else ():
        key, equals, text = (part.strip() for part in item.partition("="))
        if not (key and equals and text):
            raise SettingError(f"init must look like name or name:key=value,…, not '{spec}'")
        if key in arguments:
            raise SettingError(f"init '{spec}' gives the argument '{key}' twice")
        arguments[key] = text
    return schemes[name].bind(arguments)


def _read(what: str, text: str, kind: object) -> Value:
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise unknown(what, text, get_args(kind))
        return text
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is int:
            return int(text)
        if kind is float and math.isfinite(float(text)):
            return float(text)
    except (ValueError, KeyError):
        pass
    expected = {bool: "true or false", int: "a whole number", float: "a finite number"}
    if kind not in expected:
        return text
    raise SettingError(f"{what} must be {expected[kind]}, not '{text}'")


def _write(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

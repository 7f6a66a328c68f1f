"""What an initialization scheme is: a name, a function that fills tensors, a stated variance."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints, overload

import torch
from torch import Tensor, nn

from initflow.activations import ACTIVATIONS, Activation
from initflow.errors import LONGEST, PluginError, SettingError, cause, first_line, unknown
from initflow.finder import MARK
from initflow.importing import within_limit
from initflow.isolation import left_alone

# What a function may ask for, by parameter name: one that fills layer by layer, one that fills
# the whole network, and one that states a variance. All other parameters are arguments.
OF_A_LAYER = ("weight", "bias", "fan_in", "fan_out", "activation", "layer", "depth", "generator")
OF_THE_NETWORK = ("network", "images", "labels", "activation", "depth", "generator")
OF_A_VARIANCE = ("fan_in", "fan_out", "activation", "layer", "depth")
GIVEN = frozenset(OF_A_LAYER + OF_THE_NETWORK)

BUILT_IN = "built-in"
EXPECTED = {bool: "true or false", int: "a whole number", float: "a finite number"}
FUNCTION = re.compile(
    r"(?P<where>.+?\.py|[^\W\d][\w.]*):(?P<function>[^\W\d]\w*)(?::(?P<rest>.*))?"
)

Value = bool | int | float | str
Variance = Callable[..., float]
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True)
class Place:
    """Where a layer stands: what its initialization may go by.

    ``layer`` counts from 0 to ``depth`` - 1, the one that gives the logits; ``activation`` is
    that of the hidden layers.
    """

    fan_in: int
    fan_out: int
    activation: Activation = ACTIVATIONS["relu"]
    layer: int = 0
    depth: int = 1

    def given(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in OF_A_VARIANCE}


@dataclass(frozen=True)
class Statement:
    """What :func:`initializer` notes of a function: the variances that it states."""

    variance: Variance | None = None
    bias_variance: Variance | None = None


@dataclass(frozen=True)
class Scheme:
    """A way to fill a network's weights, with the arguments it was given.

    ``fill`` writes into tensors in place and gets what it asks for by parameter name: of
    :data:`OF_A_LAYER`, or of :data:`OF_THE_NETWORK` where it asks for ``network``, and the
    arguments. ``stated_variance`` gives the variance of a weight tensor's entries: of the
    distribution they are drawn from or, where nothing is drawn, of the entries themselves;
    ``stated_bias_variance`` the mean square of the biases, if ``fill`` sets them. Either gets
    what it asks for of :data:`OF_A_VARIANCE` and the arguments; None where nothing is stated.

    ``signature`` is the function whose keyword parameters are the scheme's arguments, with
    their defaults and types; ``provider`` says who offers the scheme, in which version.
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
        """The scheme that ``function`` is, or a :class:`SettingError` that says why it is none."""
        _check_callable(function)
        assert callable(function)
        stated: Statement = getattr(function, MARK, Statement())
        _check_signature(function, stated)
        return cls(
            name,
            function,
            stated.variance,
            signature=function,
            provider=provider,
            stated_bias_variance=stated.bias_variance,
        )

    @property
    def kind(self) -> Literal["layer", "network"]:
        """Whether ``fill`` sees one layer at a time or the whole network and some images."""
        return "network" if "network" in _parameters(self.fill) else "layer"

    @property
    def fills_biases(self) -> bool:
        return self.kind == "network" or "bias" in _parameters(self.fill)

    @property
    def draws(self) -> bool:
        """Whether it asks for random numbers."""
        return self.asks_for("generator")

    def asks_for(self, name: str) -> bool:
        """Whether it, or what it states, goes by what has this name."""
        functions = (self.fill, self.stated_variance, self.stated_bias_variance)
        return any(name in _parameters(function) for function in functions if function)

    @property
    def description(self) -> str:
        return inspect.getdoc(self.signature) or ""

    @property
    def spec(self) -> str:
        """The text that :func:`parse` reads back: ``normal:std=0.05``."""
        arguments = ",".join(f"{name}={write(value)}" for name, value in self.arguments.items())
        return f"{self.name}:{arguments}" if arguments else self.name

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The arguments the scheme takes, by name."""
        return {
            name: parameter
            for name, parameter in _parameters(self.signature).items()
            if name not in GIVEN
        }

    @property
    def values(self) -> dict[str, Value]:
        """Every argument by name, as given or by default."""
        return {name: p.default for name, p in self.parameters.items()} | dict(self.arguments)

    def variance(self, at: Place) -> float | None:
        """The stated variance of a layer's weights, or None.

        Raises :class:`SettingError` for a ValueError of the function that states it, which is
        about arguments, and :class:`PluginError` for any other failure.
        """
        return self._stated(self.stated_variance, at)

    def bias_variance(self, at: Place) -> float | None:
        """The stated mean square of a layer's biases, or None."""
        return self._stated(self.stated_bias_variance, at)

    def _stated(self, variance: Variance | None, at: Place) -> float | None:
        if variance is None:
            return None
        value = math.nan
        try:
            stated = self._ask_for(variance, at)
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

    def _ask_for(self, variance: Variance, at: Place) -> float:
        if self.provider == BUILT_IN:
            return ask(variance, at.given(), self.values)
        with left_alone():
            return within_limit(lambda: ask(variance, at.given(), self.values))

    @torch.no_grad()
    def fill_layer(
        self, weight: Tensor, bias: Tensor, at: Place, generator: torch.Generator
    ) -> object:
        """Fill ``weight``, of shape (fan_out, fan_in) or (channels_out, channels_in, *kernel).

        ``bias``, (fan_out,) or (channels_out,), is filled too if the scheme asks for it. All
        randomness is drawn from ``generator``, on the weight's device. What ``fill`` returns is
        returned.
        """
        given = {"weight": weight, "bias": bias, "generator": generator, **at.given()}
        return ask(self.fill, given, self.values)

    @torch.no_grad()
    def fill_network(
        self,
        network: nn.Sequential,
        images: Tensor,
        labels: Tensor,
        activation: Activation,
        generator: torch.Generator,
    ) -> object:
        """Fill all of ``network``, seeing ``images`` (n, pixels) and their ``labels`` (n,)."""
        depth = sum(isinstance(module, nn.Linear) for module in network)
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
        """The scheme with ``arguments``, given as text, or a :class:`SettingError`."""
        bound = {}
        for name, text in arguments.items():
            if name not in self.parameters:
                raise unknown(f"argument of scheme '{self.name}'", name, self.parameters)
            kind = _type(self.signature, self.parameters[name])
            bound[name] = _read(f"{self.name}:{name}", text, kind)
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
    """Make a function an initialization scheme, which may state its ``variance``.

    ::

        @initflow.initializer(variance=lambda fan_in, gain: gain**2 / fan_in)
        def mine(weight, fan_in, generator, *, gain: float = 1.0):
            weight.normal_(0.0, gain / fan_in**0.5, generator=generator)

    The function stays as it is. Defined in a notebook or a script, it is a scheme there, by its
    name; elsewhere an entry point or ``package.module:function`` names it. ``variance`` asks by
    parameter name for what it needs of ``fan_in``, ``fan_out``, ``activation``, ``layer``,
    ``depth`` and the function's own arguments, and gives the variance of the weights' entries;
    ``bias_variance`` the mean square of the biases. The theory predicts by them.

    Raises :class:`SettingError` where the function cannot be an initializer.
    """

    def mark(function: F) -> F:
        statement = Statement(variance, bias_variance)
        _check_callable(function)
        _check_signature(function, statement)
        setattr(function, MARK, statement)
        return function

    return mark if function is None else mark(function)


def ask(
    function: Callable[..., T], given: Mapping[str, object], arguments: Mapping[str, Value]
) -> T:
    """Call ``function`` with those of ``given`` and of ``arguments`` that it names."""
    parameters = _parameters(function)
    named = set(parameters)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        named |= set(arguments)
    values = {**given, **arguments}
    return function(**{name: value for name, value in values.items() if name in named})


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


@functools.lru_cache(maxsize=1_000)
def _parameters(function: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _type(function: Callable[..., object], parameter: inspect.Parameter) -> object:
    """An argument's type: by its annotation or, where there is none, by its default."""
    if parameter.annotation is parameter.empty:
        return type(parameter.default)
    # This one alone: others may name what only type checkers import.
    holder = type("_", (), {"__annotations__": {parameter.name: parameter.annotation}})
    return get_type_hints(holder, globalns=_globals(function))[parameter.name]


def _globals(function: Callable[..., object]) -> dict[str, object]:
    """Where a function, a partial one or a callable object finds its names."""
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = inspect.unwrap(function.func)
    code = function if hasattr(function, "__globals__") else type(function).__call__
    return getattr(code, "__globals__", {})


def _check_callable(function: object) -> None:
    if not callable(function) or inspect.isclass(function):
        kind = "a class" if inspect.isclass(function) else type(function).__name__
        raise SettingError(f"an initializer is a function, not {kind}")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise SettingError("an initializer is a plain function, without async or yield")


def _check_signature(function: Callable[..., object], stated: Statement) -> None:
    """Raise a :class:`SettingError` for what no initializer can ask for."""
    try:
        parameters = _parameters(function)
    except (TypeError, ValueError) as error:
        raise SettingError(f"an initializer is a function with named parameters: {error}") from None
    allowed = OF_THE_NETWORK if "network" in parameters else OF_A_LAYER
    if allowed[0] not in parameters:
        raise SettingError("an initializer asks for 'weight', or for 'network': this one does not")
    for parameter in parameters.values():
        _check_parameter(function, parameter, allowed)
    known = (*OF_A_VARIANCE, *(name for name in parameters if name not in GIVEN))
    for variance in (stated.variance, stated.bias_variance):
        if variance is None:
            continue
        if not callable(variance):
            raise SettingError(
                f"a variance is stated by a function, such as lambda fan_in: 1 / fan_in, "
                f"not by {variance!r}"
            )
        for name, parameter in _parameters(variance).items():
            if name not in known and parameter.default is parameter.empty:
                raise unknown("what a stated variance asks for", name, known)


def _check_parameter(
    function: Callable[..., object], parameter: inspect.Parameter, allowed: tuple[str, ...]
) -> None:
    name = parameter.name
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise SettingError(f"an initializer names its parameters: '{parameter}' names none")
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise SettingError(f"an initializer is called by parameter name: not so '{name}'")
    if name in allowed:
        return
    if name in GIVEN:
        raise SettingError(f"an initializer that asks for '{allowed[0]}' is not given '{name}'")
    if parameter.default is parameter.empty:
        raise SettingError(
            f"an initializer is given {', '.join(allowed)}: '{name}' is none of them and, "
            "for an argument, has no default"
        )
    _check_type(function, parameter)


def _check_type(function: Callable[..., object], parameter: inspect.Parameter) -> None:
    try:
        kind = _type(function, parameter)
    except (NameError, TypeError, SyntaxError) as error:
        raise SettingError(f"annotation of '{parameter.name}': {error}") from None
    words = get_origin(kind) is Literal and all(isinstance(word, str) for word in get_args(kind))
    if not words and kind not in (bool, int, float, str):
        raise SettingError(
            f"argument '{parameter.name}' must be annotated as bool, int, float, str or a Literal "
            f"of words, not '{getattr(kind, '__name__', kind)}'"
        )
    if not _fits(parameter.default, kind):
        name = f"one of {', '.join(get_args(kind))}" if words else getattr(kind, "__name__", kind)
        default = f"{parameter.default!r}"[:LONGEST]
        raise SettingError(f"the default of '{parameter.name}' must be {name}, not {default}")


def _fits(value: object, kind: object) -> bool:
    """Whether an argument of this type can have this value, of which int is float too."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else (int if kind is int else str))


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
    if kind not in EXPECTED:
        return text
    raise SettingError(f"{what} must be {EXPECTED[kind]}, not '{text}'")


def write(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

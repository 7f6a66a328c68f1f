"""What a function's parameters ask for by name, and what an initializer's may ask for."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

from initflow.core.kinds import BOOLEAN, Kind, choice, number
from initflow.core.settings import invalid
from initflow.errors import LONGEST, SettingError, unknown

# What a function may ask for, by parameter name: one that fills layer by layer, one that fills
# the whole network, and one that states a variance. All other parameters are arguments.
OF_A_LAYER = ("weight", "bias", "fan_in", "fan_out", "activation", "layer", "depth", "generator")
OF_THE_NETWORK = ("network", "images", "labels", "activation", "depth", "generator")
OF_A_VARIANCE = ("fan_in", "fan_out", "activation", "layer", "depth")
GIVEN = frozenset(OF_A_LAYER + OF_THE_NETWORK)
# How text is read as a value of each type that an argument may have, beside a Literal of words.
KINDS: dict[object, Kind] = {
    bool: BOOLEAN,
    int: number("a whole number", lambda _: True, int),
    float: number("a finite number", math.isfinite),
    str: Kind("TEXT", "text", str),
}

Value = bool | int | float | str
T = TypeVar("T")


@functools.lru_cache(maxsize=1_000)
def parameters_of(function: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def type_of(function: Callable[..., object], parameter: inspect.Parameter) -> object:
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


def check(function: object, variances: Iterable[Callable[..., float] | None]) -> None:
    """Raise a :class:`SettingError` for what is no plain function, or asks for what none can."""
    if not callable(function) or inspect.isclass(function):
        kind = "a class" if inspect.isclass(function) else type(function).__name__
        raise SettingError(f"an initializer is a function, not {kind}")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise SettingError("an initializer is a plain function, without async or yield")
    try:
        parameters = parameters_of(function)
    except (TypeError, ValueError) as error:
        raise SettingError(f"an initializer is a function with named parameters: {error}") from None
    allowed = OF_THE_NETWORK if "network" in parameters else OF_A_LAYER
    if allowed[0] not in parameters:
        raise SettingError("an initializer asks for 'weight', or for 'network': this one does not")
    for parameter in parameters.values():
        _check_parameter(function, parameter, allowed)
    known = (*OF_A_VARIANCE, *(name for name in parameters if name not in GIVEN))
    for variance in variances:
        if variance is not None:
            _check_variance(variance, known)


def _check_variance(variance: object, known: tuple[str, ...]) -> None:
    if not callable(variance):
        raise SettingError(
            f"a variance is stated by a function, such as lambda fan_in: 1 / fan_in, "
            f"not by {variance!r}"
        )
    for name, parameter in parameters_of(variance).items():
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
        kind = type_of(function, parameter)
    except (NameError, TypeError, SyntaxError) as error:
        raise SettingError(f"annotation of '{parameter.name}': {error}") from None
    words = get_origin(kind) is Literal and all(isinstance(word, str) for word in get_args(kind))
    if not words and kind not in KINDS:
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


def read(what: str, text: str, its_type: object) -> Value:
    """The value of an argument of this type, or a :class:`SettingError` that calls it ``what``."""
    kind = choice(get_args(its_type)) if get_origin(its_type) is Literal else KINDS[its_type]
    try:
        return kind.parse(text)  # type: ignore[no-any-return]
    except (ValueError, KeyError):
        raise invalid(what, kind, text) from None


def write(value: Value) -> str:
    """The text that :func:`read` reads back."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def ask(
    function: Callable[..., T], given: Mapping[str, object], arguments: Mapping[str, Value]
) -> T:
    """Call ``function`` with those of ``given`` and of ``arguments`` that it names."""
    parameters = parameters_of(function)
    named = set(parameters)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        named |= set(arguments)
    values = {**given, **arguments}
    return function(**{name: value for name, value in values.items() if name in named})

"""The kinds of values that settings take: how each is read from text, written, and described."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from initflow.core import paths
from initflow.core.secrets import without_password

MAX_LAYERS = 1_000
MAX_WIDTH = 65_536
MAX_WEIGHTS = 2**28  # between the hidden layers; training holds three copies in memory
MAX_FEATURES = 2**20  # of one example
MAX_CLASSES = 10_000
ARRAYS = ".npz"  # how a file of arrays is called, as numpy.savez writes it


@dataclass(frozen=True)
class Kind:
    """What values a setting takes: how to read them, write them, and describe them.

    ``choices`` are all of them where they can be listed, and ``names`` words that are or, where it
    ``is_list``, may stand in one.
    """

    metavar: str
    expected: str
    parse: Callable[[object], Any]  # raises ValueError or TypeError for anything unexpected
    format: Callable[[Any], str] = str
    choices: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    is_list: bool = False


NUMBERS = {int: Integral, float: Real}  # of which NumPy's numbers are, too


def number(expected: str, is_valid: Callable[[float], bool], of: type[int | float] = float) -> Kind:
    """A number for which ``is_valid`` holds, which must be false of NaN and infinity."""

    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (NUMBERS[of], str)):
            raise TypeError
        number = of(value)  # type: ignore[arg-type]
        if not is_valid(number):
            raise ValueError
        return number

    return Kind("INTEGER" if of is int else "NUMBER", expected, parse)


def integer(minimum: int, maximum: float = math.inf) -> Kind:
    top = f" and at most {maximum}" if maximum < math.inf else ""
    expected = f"a whole number, at least {minimum}{top}"
    return number(expected, lambda n: minimum <= n <= maximum, int)


def matching(metavar: str, expected: str, pattern: str) -> Kind:
    """Text that matches all of ``pattern``, a regular expression."""

    def parse(value: object) -> str:
        if not re.fullmatch(pattern, str(value), re.ASCII):
            raise ValueError
        return str(value)

    return Kind(metavar, expected, parse)


def choice(valid: tuple[str, ...]) -> Kind:
    def parse(value: object) -> str:
        if value not in valid:
            raise ValueError
        return str(value)

    return Kind(
        f"[{'|'.join(valid)}]", f"one of {', '.join(valid)}", parse, choices=valid, names=valid
    )


def or_word(word: str, kind: Kind) -> Kind:
    """``kind``, or ``word``, which stands for None."""
    return Kind(
        f"{word}|{kind.metavar}",
        f"'{word}' or {kind.expected}",
        lambda value: None if value is None or value == word else kind.parse(value),
        lambda value: word if value is None else kind.format(value),
        names=(word, *kind.names),
        is_list=kind.is_list,
    )


def listed(item: Kind, expected: str, *, least: int = 1) -> Kind:
    """Several of ``item``, none twice, between commas; ``inits`` may have commas of their own.

    ``least``: how many there must be.
    """

    def parse(value: object) -> tuple[Any, ...]:
        parts = value.split(",") if isinstance(value, str) else list(value)  # type: ignore[call-overload]
        items: list[Any] = []
        for part in (one.strip() if isinstance(one, str) else one for one in parts):
            if isinstance(part, str) and items and "=" in part and ":" not in part:
                items[-1] = f"{items[-1]},{part}"  # a further argument of the last one
            else:
                items.append(item.parse(part))
        if len(items) < least or len(set(items)) < len(items):
            raise ValueError
        return tuple(items)

    return Kind(
        f"{item.metavar},…",
        expected,
        parse,
        lambda values: ",".join(map(item.format, values)),
        names=item.names,
        is_list=True,
    )


def several_whole(maximum: int) -> Kind:
    """Two or more whole numbers between commas, by rising size and none twice."""
    expected = f"two or more whole numbers between commas, none twice, from 1 to {maximum}"
    several = listed(integer(1, maximum), expected, least=2)
    return replace(several, parse=lambda value: tuple(sorted(several.parse(value))))


def _parse_boolean(value: object) -> bool:
    return {"true": True, "false": False}[str(value).lower()]


def _parse_text(value: object) -> str:
    text = str(value).strip()
    text.encode()  # a ValueError for what is no Unicode
    if not text or "\0" in text:  # which no file's name may have
        raise ValueError
    return text


def _parse_path(value: object) -> Path:
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise TypeError
    str(value).encode()  # a ValueError for what is no Unicode, which MLflow could not log
    return paths.own(value)


def parse_widths(value: object) -> tuple[int, ...]:
    """Hidden widths from ``100``, ``300,100``, ``100x20`` (20 layers of 100) or ``none``."""
    if isinstance(value, str) and value.strip() == "none":
        return ()
    if isinstance(value, (list, tuple)):
        widths = list(value)
    else:
        widths = []
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*(\d{1,6})(?:x(\d{1,6}))?\s*", part)
            if not match:
                raise ValueError
            width, count = int(match[1]), int(match[2] or 1)
            if not 1 <= count <= MAX_LAYERS - len(widths):
                raise ValueError
            widths += [width] * count
    widths = [integer(1, MAX_WIDTH).parse(width) for width in widths]
    weights = sum(fan_in * fan_out for fan_in, fan_out in pairwise(widths))
    if len(widths) > MAX_LAYERS or weights > MAX_WEIGHTS:
        raise ValueError
    return tuple(widths)


def format_shape(widths: tuple[int, ...]) -> str:
    """``784-100-10``; of deep networks ``784-100x20-10``."""
    pixels, *hidden, classes = widths
    parts = format_widths(tuple(hidden)).split(",") if hidden else []
    return "-".join([str(pixels), *parts, str(classes)])


def format_widths(widths: tuple[int, ...]) -> str:
    """The text that :func:`parse_widths` reads back: ``300,100x3``."""
    runs = ((width, len(list(run))) for width, run in groupby(widths))
    return ",".join(f"{width}x{n}" if n > 1 else f"{width}" for width, n in runs) or "none"


def _parse_storage(value: object) -> str:
    """A database's URL as it is, or a file's path."""
    text = _parse_text(value)
    return text if "://" in text else str(paths.own(text))


def _parse_place(value: object) -> str:
    """A function by its place, also where it is given itself, as in a notebook; or any text."""
    if callable(value):
        value = f"{value.__module__}:{value.__qualname__}"  # type: ignore[attr-defined]
    return _parse_text(value)


def is_place(text: str) -> bool:
    """Whether it is ``path/to/file.py:function`` or ``package.module:function``."""
    return bool(re.fullmatch(r"(.+\.py|[^\W\d][\w.]*):[^\W\d]\w*", text))


def _parse_model(value: object) -> str:
    text = _parse_place(value)
    if not re.fullmatch(r"\w[\w.-]*", text) and not is_place(text):
        raise ValueError
    return text


def data(published: tuple[str, ...]) -> Kind:
    """A data set: a ``published`` one, a file of arrays, or a function that gives them."""

    def parse(value: object) -> str:
        text = _parse_place(str(value) if isinstance(value, Path) else value)
        if not (text in published or text.endswith(ARRAYS) or is_place(text)):
            raise ValueError
        return text

    forms = (*published, f"FILE{ARRAYS}", "FILE.py:FUNCTION")
    expected = (
        f"one of {', '.join(published)}, a file of arrays (path/to/file{ARRAYS}), or the function "
        "that gives them: path/to/file.py:load or package.module:load"
    )
    return Kind("|".join(forms), expected, parse, choices=forms, names=published)


def elementwise(published: tuple[str, ...]) -> Kind:
    """An activation: a ``published`` one, or any function of a tensor, by its place."""

    def parse(value: object) -> str:
        text = _parse_place(value)
        if not (text in published or is_place(text)):
            raise ValueError
        return text

    forms = (*published, "MODULE:FUNCTION", "FILE.py:FUNCTION")
    expected = (
        f"one of {', '.join(published)}, or a function of a tensor: torch:erf or "
        "path/to/file.py:function"
    )
    return Kind("|".join(forms), expected, parse, choices=forms, names=published)


BOOLEAN = Kind(
    "true|false",
    "true or false",
    _parse_boolean,
    lambda value: str(value).lower(),
    names=("true", "false"),
)


def true_false_or(word: str) -> Kind:
    """As text: ``true``, ``false`` or ``word``."""
    valid = ("true", "false", word)

    def parse(value: object) -> str:
        return word if value == word else BOOLEAN.format(BOOLEAN.parse(value))

    return Kind("|".join(valid), f"one of {', '.join(valid)}", parse, names=valid)


TEXT = Kind("TEXT", "a name", _parse_text)
STORAGE = Kind("PATH|URL", "a journal's path or a database's URL", _parse_storage, without_password)
# Of a study or a registered model: it becomes a part of files' names and of searches.
NAME = matching(
    "NAME", "a name of up to 100 letters, digits, - _ and .", r"[A-Za-z0-9][\w.-]{0,99}"
)
FOLDER = Kind("FOLDER", "a folder", _parse_path)
DEVICE = matching(
    "auto|cpu|cuda|cuda:N", "auto, cpu, cuda or cuda:N", r"auto|cpu|cuda(:[0-9]{1,3})?"
)
MODEL = Kind(
    "MODEL|FILE.py:FUNCTION",
    "a model's name, or the function that builds one: path/to/file.py:build or "
    "package.module:build",
    _parse_model,
)
WIDTHS = Kind(
    "WIDTHS",
    "widths such as 100, 300,100 or 100x20 (20 layers of 100), or none"
    f" (at most {MAX_LAYERS} layers of at most {MAX_WIDTH}, {MAX_WEIGHTS} weights between them)",
    parse_widths,
    format_widths,
)
KERNEL = number("an odd whole number from 1 to 99", lambda n: 1 <= n <= 99 and n % 2 == 1, int)
PROBE = number(  # with one image nothing would vary from image to image
    "0, or a whole number from 2 to 1000000000", lambda n: n == 0 or 2 <= n <= 10**9, int
)
RATE = number("a number above 0 and at most 1e30", lambda x: 0 < x <= 1e30)
DECAY = number("a number above 0 and at most 1", lambda x: 0 < x <= 1)
MAX_SEEDS = 10_000
SEEDS = integer(1, MAX_SEEDS)
FIRST_SEED = integer(0, 2**63 - 1 - MAX_SEEDS)  # the others follow it
MOMENTUM = number("a number from 0 up to, not including, 1", lambda x: 0 <= x < 1)


def _parse_betas(value: object) -> tuple[float, float]:
    parts = value.split(",") if isinstance(value, str) else list(value)  # type: ignore[call-overload]
    first, second = parts
    return MOMENTUM.parse(first), MOMENTUM.parse(second)


BETAS = Kind(
    "BETA1,BETA2",
    "two numbers from 0 up to, not including, 1, such as 0.9,0.999",
    _parse_betas,
    lambda values: ",".join(map(str, values)),
)
# Not 0: what never had a gradient would be 0 divided by 0.
EPSILON = number("a number from 1e-30 to 1e30", lambda x: 1e-30 <= x <= 1e30)
VARIANCE = number("a number from 0 to 1e6", lambda x: 0 <= x <= 1e6)
WEIGHT_DECAY = number("a number from 0 to 1e30", lambda x: 0 <= x <= 1e30)

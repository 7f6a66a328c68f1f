"""The files of a network's provenance, read back: whole, of one piece, and trusted in nothing.

What is read may be anybody's: all that is wrong with it is a :class:`initflow.errors.ReplayError`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn, TypeVar

import numpy as np
import safetensors
import torch
from torch import Tensor

from initflow.core.configurations import ADDED, MLP, TrainConfig
from initflow.core.kinds import MAX_CLASSES, MAX_FEATURES
from initflow.errors import ReplayError, SettingError, first_line
from initflow.experiments.replay.provenance import (
    FORMAT,
    REPLAY,
    TRACE,
    WEIGHTS,
    Evidence,
    ModelProvenance,
    Provenance,
    losses_sha256,
)
from initflow.training import model

OUTCOMES = ("finished", "diverged", "pruned")
LARGEST = 2**22  # bytes of a replay.json
HEADER = 2**20  # bytes of what stands before the numbers of a safetensors file
OLD_CLASSES = 10  # of all sets, before it was recorded how many
MAX_NUMBERS = 2**28  # of all tensors of a network
SHOWN = 100  # letters of a value that is wrong
MAX_COUNT = 2**53  # that JSON holds exactly
DEVICE = re.compile(r"cpu|cuda:\d{1,3}")
SHA256 = re.compile(r"[0-9a-f]{64}")
# The content of the file of a name, which must not have more bytes; None where there is none.
Read = Callable[[str, int], bytes | None]
T = TypeVar("T")


def gathered(read_file: Read, where: str) -> Evidence:
    """What :func:`files` gave, read anew and checked to be whole and of one piece.

    ``where`` names their place in errors. That the losses are as many as the training had updates,
    and the weights as large as its network, is sure then; and no more is read than that takes.
    """
    content = read_file(REPLAY, LARGEST)
    if content is None:
        raise ReplayError(f"{where} has no {REPLAY}")
    provenance = read(content, where)
    trace = read_file(TRACE, HEADER + 4 * provenance.updates)
    if trace is None:
        raise ReplayError(f"{where} has no {TRACE}")
    shapes = {"losses": (provenance.updates,)}
    losses = _tensors(trace, shapes, f"{where}: {TRACE}")["losses"]
    if not bool(torch.isfinite(losses).all()):
        raise ReplayError(f"{where}: {TRACE} has a loss that is not finite")
    _check(losses_sha256(losses), provenance.losses, f"{where}: the losses in {TRACE}")

    of_network = provenance.shapes
    size = HEADER + 8 * sum(map(math.prod, of_network.values()))
    weights = read_file(WEIGHTS, size)
    if weights is None:
        return Evidence(provenance, losses)
    both = {f"{when}.{n}": s for when in ("initial", "final") for n, s in of_network.items()}
    tensors = _tensors(weights, both, f"{where}: {WEIGHTS}")
    initial, final = (
        {name: tensors[f"{when}.{name}"] for name in of_network} for when in ("initial", "final")
    )
    for state, digest, when in (
        (initial, provenance.initial, "initial"),
        (final, provenance.final, "final"),
    ):
        _check(model.weights_sha256(state), digest, f"{where}: the {when} weights in {WEIGHTS}")
    return Evidence(provenance, losses, initial, final)


def _check(found: str, stated: str, what: str) -> None:
    if found != stated:
        raise ReplayError(
            f"{what} have the SHA-256 {found[:12]}…, but {REPLAY} states {stated[:12]}…: one of "
            "the two was changed"
        )


def _tensors(content: bytes, shapes: Mapping[str, tuple[int, ...]], what: str) -> dict[str, Tensor]:
    """The float32 tensors of a safetensors file, which must have these names and shapes."""
    try:
        found = dict(safetensors.deserialize(content))  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever its header says
        raise ReplayError(f"{what} is damaged: {first_line(error)}") from error
    if found.keys() != shapes.keys():
        odd = min(found.keys() ^ shapes.keys())
        raise ReplayError(f"{what} must hold {_few(shapes)}; '{odd[:100]}' is missing or too much")
    tensors = {}
    for name, shape in shapes.items():
        kind, its = found[name]["dtype"], tuple(found[name]["shape"])
        if kind != "F32" or its != shape:
            raise ReplayError(f"{what}: {name} must be F32 {shape}, not {kind} {its}")
        numbers = np.frombuffer(found[name]["data"], dtype="<f4").astype(np.float32)
        tensors[name] = torch.from_numpy(numbers).reshape(shape)
    return tensors


def _few(names: Mapping[str, object]) -> str:
    first = list(names)[:3]
    return ", ".join(first) + (", …" if len(names) > len(first) else "")


def read(content: bytes, where: str) -> Provenance:
    """The provenance that ``content`` is the JSON of, checked to be one that can be had."""
    parts = _Parts(_parsed(content, where), f"{where}: {REPLAY}")
    if (found := parts.take("format", int)) != FORMAT:
        raise ReplayError(
            f"{where}: {REPLAY} has the format {found}, and this version of initflow reads the "
            f"format {FORMAT}"
        )
    of_data, scheme, hashes = (parts.part(name) for name in ("data", "scheme", "sha256"))
    pixels = of_data.count("pixels", 1, MAX_FEATURES)
    provenance = Provenance(
        config=_config(parts),
        device=parts.text("device", DEVICE),
        threads=parts.count("threads", 1, 1024),
        digest=of_data.text("digest", SHA256),
        pixels=pixels,
        shape=_shape(of_data, pixels),
        classes=_classes(of_data),
        images=of_data.count("images", 1),
        tested=of_data.take("tested", bool),
        spec=scheme.text("spec"),
        provider=scheme.text("provider"),
        source=scheme.text("source_sha256", re.compile(rf"{SHA256.pattern}|unknown")),
        outcome=parts.text("outcome", re.compile("|".join(OUTCOMES))),
        updates=parts.count("updates", 0),
        is_exact=parts.take("bit_identical_to_alone", bool),
        initial=hashes.text("initial_weights", SHA256),
        final=hashes.text("final_weights", SHA256),
        losses=hashes.text("losses", SHA256),
        environment=parts.take("environment", dict),
        model=_model(parts) if "model" in parts.values else None,
    )
    if (provenance.config.model == MLP) != (provenance.model is None):
        raise parts.odd("model", "there for all models but mlp", provenance.config.model)
    whole, updates = provenance.whole, provenance.updates
    if updates > whole or (provenance.outcome == "finished" and updates < whole):
        raise parts.odd(
            "updates", f"{whole} of a finished training, at most that of others", updates
        )
    return provenance


def _shape(of_data: _Parts, pixels: int) -> tuple[int, ...]:
    """One example's; where it was not recorded yet, that of a picture, if it is square."""
    if "shape" not in of_data.values:
        side = math.isqrt(pixels)
        return (1, side, side) if side * side == pixels else (pixels,)
    shape = of_data.take("shape", list)
    if not all(type(n) is int and n > 0 for n in shape) or math.prod(shape) != pixels:
        raise of_data.odd("shape", f"a list of whole numbers, whose product is {pixels}", shape)
    return tuple(shape)


def _classes(of_data: _Parts) -> int:
    return of_data.count("classes", 2, MAX_CLASSES) if "classes" in of_data.values else OLD_CLASSES


def _model(parts: _Parts) -> ModelProvenance:
    part = parts.part("model")
    shapes = {}
    for name, shape in part.take("shapes", dict).items():
        if not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)):
            raise part.odd("shapes", f"a list of whole numbers for {name[:SHOWN]}", shape)
        shapes[name] = tuple(shape)
    if sum(map(math.prod, shapes.values())) > MAX_NUMBERS:
        raise part.odd("shapes", f"of at most {MAX_NUMBERS:,} numbers in all", "more")
    source = part.text("source_sha256", re.compile(rf"{SHA256.pattern}|unknown"))
    return ModelProvenance(part.text("provider"), source, shapes)


def _parsed(content: bytes, where: str) -> dict[str, Any]:
    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number of JSON")

    try:
        values = json.loads(content.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ReplayError(f"{where}: {REPLAY} is no JSON: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise ReplayError(f"{where}: {REPLAY} must hold names and values, not {_type(values)}")
    return values


def _config(parts: _Parts) -> TrainConfig:
    """The resolved settings: all of them, each as text, but for those that came later."""
    config = parts.part("config")
    config = replace(config, values={**ADDED, **config.values})
    texts = {setting.name: config.take(setting.name, str) for setting in fields(TrainConfig)}
    try:
        return TrainConfig(**texts)  # type: ignore[arg-type]  # it reads text
    except SettingError as error:
        raise ReplayError(f"{config.what}: {first_line(error)}") from error


@dataclass(frozen=True)
class _Parts:
    """Values by name, of which nothing is known yet; ``what`` says in an error whose they are."""

    values: Mapping[str, Any]
    what: str

    def take(self, name: str, kind: type[T]) -> T:
        if name not in self.values:
            raise ReplayError(f"{self.what} lacks '{name}'")
        value = self.values[name]
        if type(value) is not kind:  # a boolean is an int too
            raise self.odd(name, _NAMES[kind], value)
        return value

    def part(self, name: str) -> _Parts:
        return _Parts(self.take(name, dict), f"{self.what}, {name}")

    def text(self, name: str, form: re.Pattern[str] | None = None) -> str:
        value = self.take(name, str)
        if form and not form.fullmatch(value):
            raise self.odd(name, f"of the form {form.pattern}", value)
        if not value.isprintable():
            raise self.odd(name, "printable text", value)
        return value

    def count(self, name: str, least: int, most: int = MAX_COUNT) -> int:
        value = self.take(name, int)
        if not least <= value <= most:
            raise self.odd(name, f"from {least} to {most}", value)
        return value

    def odd(self, name: str, right: str, value: object) -> ReplayError:
        told = str(value) if isinstance(value, (str, int, float)) else _type(value)
        shown = "".join(c if c.isprintable() else "�" for c in told[:SHOWN])
        return ReplayError(f"{self.what}: {name} must be {right}, not '{shown}'")


_NAMES: dict[type, str] = {
    int: "a whole number",
    str: "text",
    bool: "true or false",
    dict: "a table",
    list: "a list",
    type(None): "nothing",
}


def _type(value: object) -> str:
    return _NAMES.get(type(value), type(value).__name__)

"""Calls of a model, and of a ``GradScaler``, observed from outside for as long as one asks.

Nothing is put on a model or a scaler, so that they are copied, saved, scripted, exported and
compiled as if nobody observed them. What observes must not raise.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

# Called before a forward; gives what is to be called after it, however it ends, if anything.
ForwardObserver = Callable[[], Callable[[], object] | None]
# Called with the scaler and what its ``scale`` gave: a tensor, or several.
ScaleObserver = Callable[[GradScaler, object], object]

_of_models: dict[int, list[ForwardObserver]] = {}  # by the identity of the model
_of_scalers: list[ScaleObserver] = []
_lock = threading.Lock()


@contextlib.contextmanager
def forwards(model: nn.Module, observer: ForwardObserver) -> Iterator[None]:
    """Tell ``observer`` of every call of ``model`` itself meanwhile."""
    # Where a module's own compiled call stands, which torch makes instead of its usual one.
    with _replaced(nn.Module, "_compiled_call_impl", lambda _: _Calls()):
        _of_models.setdefault(id(model), []).append(observer)
        try:
            yield
        finally:
            _of_models[id(model)].remove(observer)
            if not _of_models[id(model)]:
                del _of_models[id(model)]


@contextlib.contextmanager
def scaled(observer: ScaleObserver) -> Iterator[None]:
    """Tell ``observer`` of every loss that any scaler scales meanwhile."""
    with _replaced(GradScaler, "scale", _scale):
        _of_scalers.append(observer)
        try:
            yield
        finally:
            _of_scalers.remove(observer)


class _Calls:
    """As an attribute of all modules: None, but for those that are observed."""

    def __get__(self, module: object, _kind: object) -> object:
        return functools.partial(_called, module) if id(module) in _of_models else None


def _called(module: Any, *args: object, **kwargs: object) -> object:
    if torch.compiler.is_compiling():
        return module._call_impl(*args, **kwargs)  # noqa: SLF001
    after = [observer() for observer in tuple(_of_models.get(id(module), ()))]
    try:
        return module._call_impl(*args, **kwargs)  # noqa: SLF001
    finally:
        for end in reversed(after):
            if end:
                end()


def _scale(original: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(original)
    def scale(self: GradScaler, *args: object, **kwargs: object) -> object:
        outputs = original(self, *args, **kwargs)
        for observer in tuple(_of_scalers):
            observer(self, outputs)
        return outputs

    return scale


_in_place: dict[tuple[type, str], tuple[int, object, object]] = {}  # how often, theirs and ours


@contextlib.contextmanager
def _replaced(owner: type, name: str, ours: Callable[[Any], object]) -> Iterator[None]:
    """Have what ``ours`` makes of an attribute in its place, until the last one leaves."""
    with _lock:
        theirs = vars(owner)[name]
        n, original, own = _in_place.get((owner, name)) or (0, theirs, ours(theirs))
        if not n:
            setattr(owner, name, own)
        _in_place[owner, name] = (n + 1, original, own)
    try:
        yield
    finally:
        with _lock:
            n, original, own = _in_place.pop((owner, name))
            if n > 1:
                _in_place[owner, name] = (n - 1, original, own)
            elif vars(owner)[name] is own:  # else another's wraps it by now: it does nothing there
                setattr(owner, name, original)

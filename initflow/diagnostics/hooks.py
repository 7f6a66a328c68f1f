"""Calls of modules, and of a ``GradScaler``, observed from outside.

Nothing is put on a module or a scaler, so that they are copied, saved, scripted, exported and
compiled as if nobody observed them. What observes must not raise: it is :func:`harmless`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

# Called before a forward; gives what is to be called after it with its output, if anything: with
# None where it raised.
ForwardObserver = Callable[[], Callable[[object], object] | None]
# Called with the scaler and what its ``scale`` gave: a tensor, or several.
ScaleObserver = Callable[[GradScaler, object], object]

P = ParamSpec("P")
R = TypeVar("R")

_of_modules: dict[int, list[ForwardObserver]] = {}  # by their identity
_of_scalers: list[ScaleObserver] = []
_in_place: dict[tuple[type, str], tuple[int, object, object]] = {}  # how often, theirs and ours
_lock = threading.Lock()


def harmless(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R | None]:
    """A method that runs inside of someone's training, and cannot end it.

    What fails in it is given to ``self.failed``, and the method gives None. Tensors' own functions
    (``__torch_function__``) and modes for functions are left out of what it computes.
    """

    @functools.wraps(method)
    def guarded(self: Any, *args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            with torch._C.DisableTorchFunction():  # noqa: SLF001
                return method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever it is, the training goes on
            self.failed(error)
            return None

    return guarded  # type: ignore[return-value]  # the name of `self`


def is_traced() -> bool:
    """Whether a forward that runs now is one that is written down, and computes no numbers."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()  # noqa: SLF001
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()  # noqa: SLF001
        or torch._C._functorch.peek_interpreter_stack() is not None  # noqa: SLF001
        or torch._guards.active_fake_mode() is not None  # noqa: SLF001
    )


@contextlib.contextmanager
def forwards(observers: Iterable[tuple[nn.Module, ForwardObserver]]) -> Iterator[None]:
    """Until the block ends, call each observer at every call of its module itself."""
    observers = list(observers)
    # Where a module's own compiled call stands, which torch makes instead of its usual one.
    with _replaced(nn.Module, "_compiled_call_impl", lambda _: _Calls()):
        for module, observer in observers:
            _of_modules.setdefault(id(module), []).append(observer)
        try:
            yield
        finally:
            for module, observer in observers:
                its = _of_modules[id(module)]
                its.remove(observer)
                if not its:
                    del _of_modules[id(module)]


@contextlib.contextmanager
def scaled(observer: ScaleObserver) -> Iterator[None]:
    """Until the block ends, call ``observer`` with every loss that any scaler scales."""
    with contextlib.ExitStack() as places:
        for kind in _kinds(GradScaler):
            if "scale" in vars(kind):
                places.enter_context(_replaced(kind, "scale", _scale))
        _of_scalers.append(observer)
        try:
            yield
        finally:
            _of_scalers.remove(observer)


def _kinds(root: type) -> set[type]:
    return {root}.union(*map(_kinds, root.__subclasses__()))


class _Calls:
    """As an attribute of all modules: None, but for those that are observed."""

    def __get__(self, module: object, _kind: object) -> object:
        return functools.partial(_called, module) if id(module) in _of_modules else None


def _called(module: Any, *args: object, **kwargs: object) -> object:
    if torch.compiler.is_compiling():
        return module._call_impl(*args, **kwargs)  # noqa: SLF001
    # One may bring others for this very call.
    after = [observer() for observer in _of_modules.get(id(module), ())]
    output = None
    try:
        output = module._call_impl(*args, **kwargs)  # noqa: SLF001
        return output
    finally:
        for finish in filter(None, reversed(after)):
            finish(output)


def _scale(original: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(original)
    def scale(self: GradScaler, *args: object, **kwargs: object) -> object:
        outputs = original(self, *args, **kwargs)
        for observer in tuple(_of_scalers):
            observer(self, outputs)
        return outputs

    return scale


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

"""Calls of modules, and of a ``GradScaler``, observed from outside.

Nothing is put on a module or a scaler, so that they are copied, saved, scripted, exported and
compiled as if nobody observed them. A call of what ``torch.compile`` made of a module is one of the
module. What observes must not raise: it is :func:`harmless`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from initflow.models import layers

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
# By its newer name where there is one: the older one has come to mean torch.export as well.
_OF_FX: Any = torch.fx._symbolic_trace  # noqa: SLF001
IS_WRITTEN_DOWN = getattr(_OF_FX, "is_fx_symbolic_tracing", _OF_FX.is_fx_tracing)
COMPILED = "_compiled_call_impl"  # as modules have it


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
        or IS_WRITTEN_DOWN()
        or torch._C._functorch.peek_interpreter_stack() is not None  # noqa: SLF001
        or torch._guards.active_fake_mode() is not None  # noqa: SLF001
        or _is_exported()
    )


def _is_exported() -> bool:
    """Whether ``torch.export`` is at work: PyTorch 2.6 also runs what it writes down."""
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    exporting = sys.modules.get("torch.export._trace")
    return getattr(exporting, "_EXPORT_FLAGS", None) is not None


@contextlib.contextmanager
def forwards(observers: Iterable[tuple[nn.Module, ForwardObserver]]) -> Iterator[None]:
    """Until the block ends, call each observer at every call of its module itself."""
    observers = list(observers)
    # Where a module's own compiled call stands, which torch makes instead of its usual one.
    with _replaced(nn.Module, COMPILED, lambda _: _Calls()):
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
def calls(owner: object, method: str, observer: ForwardObserver) -> Iterator[None]:
    """Until the block ends, call ``observer`` at every call of a method of ``owner``, no module."""
    call = getattr(owner, method)
    setattr(owner, method, functools.partial(_observed, call, (observer,)))
    try:
        yield
    finally:
        delattr(owner, method)


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


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Until the block ends, what ``torch.compile`` made runs as it was written."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _Calls:
    """As an attribute of all modules: what they have themselves, but for those that are observed.

    It comes before what ``module.compile()`` writes into the module, also later.
    """

    def __get__(self, module: Any, _kind: object) -> object:
        if module is None:
            return None
        # Every module of the process comes here: most end at once.
        if id(module) not in _of_modules and type(module).__name__ != layers.COMPILED:
            return module.__dict__.get(COMPILED)
        return functools.partial(_called, module) if _observers(module) else _own(module)

    def __set__(self, module: object, value: object) -> None:
        vars(module)[COMPILED] = value

    def __delete__(self, module: object) -> None:
        if COMPILED not in vars(module):
            raise AttributeError(COMPILED)
        del vars(module)[COMPILED]


def _observers(module: Any) -> Iterable[ForwardObserver]:
    """Its own, or those of what it was compiled from."""
    its = _of_modules.get(id(module), ())
    if its or layers.uncompiled(module) is module:
        return its
    return next(filter(None, (_of_modules.get(id(one)) for one in layers.bare(module))), ())


def _own(module: object) -> Any:
    """Its compiled call, if it was compiled in place."""
    return vars(module).get(COMPILED)


def _called(module: Any, *args: object, **kwargs: object) -> object:
    call = _own(module) or module._call_impl  # noqa: SLF001
    if torch.compiler.is_compiling():
        return call(*args, **kwargs)
    return _observed(call, _observers(module), *args, **kwargs)


def _observed(
    call: Callable[..., object],
    observers: Iterable[ForwardObserver],
    *args: object,
    **kwargs: object,
) -> object:
    after = [observer() for observer in observers]  # one may bring others for this very call
    output = None
    try:
        output = call(*args, **kwargs)
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

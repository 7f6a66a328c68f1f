"""What the layers of any ``nn.Module`` do over a step, recorded while it runs.

Measured are those of its :mod:`initflow.models.layers` that are called. A layer's activation
is the first of :data:`ACTIVATIONS` that is applied to what the layer gave, as a module, function or
method, in place or not, at once or after what :data:`BETWEEN` names.

A layer that is called several times has the moments of all its calls together. Its weights are
those that it multiplies by, parametrized or not; their gradient is the sum over the step, and
measured where they are a parameter that is trained. Several backward passes through one call
count each on its own; a reentrant checkpoint hides its layers' gradients. Gradients are those of
the loss, also where a ``GradScaler`` scales it.

Layers that give no plain tensor of real numbers (none, an empty, sparse, quantized, complex or
meta one, one of a type with rules of its own) are left out.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from initflow.diagnostics import hooks
from initflow.diagnostics.signals import Firing, Layer, Moments, Signals, signals
from initflow.models import layers

PRODUCT = re.compile(r"linear|conv(_transpose)?[123]d")
# Names in torch, torch.nn.functional and Tensor; elementwise functions without chance.
ACTIVATIONS = {
    "celu",
    "elu",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "mish",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "softplus",
    "softsign",
    "tanh",
}
# What keeps the units and their axis.
BETWEEN = re.compile(
    r"(batch|layer|group|instance|rms|local_response)_norm"
    r"|(feature_)?(alpha_)?dropout([123]d)?"
    r"|(adaptive_)?(max|avg)_pool[123]d"
    r"|contiguous|to|float"
)
# Units of all calls that are kept of a step, some 200 bytes each: without an update it would never
# end, and take all memory.
MOST_UNITS = 2_000_000
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

T = TypeVar("T", Moments, Firing)
P = ParamSpec("P")
R = TypeVar("R")


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


class Recorder:
    """What the layers of ``model`` do in the forwards from :meth:`begin` to :meth:`close`.

    The layers are observed during a forward alone, and hooks stand on tensors that get gradients
    until it is closed.
    """

    def __init__(self, model: nn.Module) -> None:
        layers.check(model)
        self._failures: list[Exception] = []
        self._layers = layers.named(model)
        self._forwards: list[list[_Call]] = []
        self._weights: dict[str, Tensor] = {}
        self._weight_gradients: dict[str, Tensor] = {}
        self._scales: dict[int, float] = {}  # of the loss, by the backward pass under way
        self._functions = _Functions(self._failures.append)
        self._depth, self._thread, self._units = 0, 0, 0
        self._observing = contextlib.ExitStack()
        self._gradient_hooks = contextlib.ExitStack()

    @harmless
    def begin(self) -> Callable[[object], object] | None:
        """Record the forward that starts now; what is to be called at its end."""
        if self.is_busy_elsewhere() or self.failure:
            return None
        if self._depth == 0 and self._units > MOST_UNITS:
            forwards = len(self._forwards)
            self.close()
            self._forwards.clear()
            raise RuntimeError(f"no update was seen in {forwards:,} forwards: too much to keep")
        if self._depth == 0:
            self._thread = threading.get_ident()
            self._open()
        self._depth += 1  # also where the model calls itself
        return self._end

    def _open(self) -> None:
        self._scales.clear()  # of passes that an error ended
        self._forwards.append([])
        self._functions = _Functions(self._failures.append)
        self._functions.enter()
        # Before a call of a layer there is nothing to do but to say what is done after it.
        after = functools.partial(functools.partial, self._called)
        calls = [(m, functools.partial(after, name, m)) for name, m in self._layers.items()]
        self._observing.enter_context(hooks.forwards(calls))

    @harmless
    def _end(self, _output: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._observing.close()
            self._functions.leave()

    @harmless
    def scaled(self, scaler: GradScaler, losses: object) -> None:
        """Note its scale in every backward pass that begins at one of ``losses``."""
        if not scaler.is_enabled() or is_traced():
            return
        hook = functools.partial(self._pass_begins, scaler.get_scale())
        for loss in _tensors(losses):
            if loss.requires_grad:
                self._on_gradient(loss, hook)

    def is_busy_elsewhere(self) -> bool:
        """Whether another thread is in a forward that is recorded: it has this one's layers."""
        return self._depth > 0 and self._is_elsewhere()

    def close(self) -> None:
        """Observe no more, and take every hook away."""
        self._observing.close()
        self._functions.leave()
        self._gradient_hooks.close()

    def failed(self, error: Exception) -> None:
        self._failures.append(error)

    @property
    def failure(self) -> Exception | None:
        """What went wrong first: what was recorded is not whole then."""
        return next(iter(self._failures), None)

    @property
    def saw_nothing(self) -> bool:
        """Whether the model's layers were called in none of its forwards."""
        return bool(self._layers and self._forwards and not any(self._forwards))

    def signals(self) -> Signals | None:
        """Of the forwards that a gradient came back through; None where there is none."""
        calls: dict[str, list[_Call]] = {}
        for forward in self._forwards:
            if any(call.gradient for call in forward):
                for call in forward:
                    calls.setdefault(call.layer, []).append(call)
        if not calls:
            return None
        measured = {
            name: Layer(
                weight=self._weights[name],
                preactivation=functools.reduce(operator.add, [call.preactivation for call in its]),
                gradient=_sum(call.gradient for call in its),
                weight_gradient=self._weight_gradients.get(name),
                activation=_sum(call.activation for call in its),
                firing=_sum(call.firing for call in its),
            )
            for name, its in calls.items()
        }
        return signals(measured)

    def _is_elsewhere(self) -> bool:
        return threading.get_ident() != self._thread

    @harmless
    def _called(self, name: str, module: nn.Module, output: object) -> None:
        if self._is_elsewhere() or not _is_plain(output) or is_traced():
            return
        # A parametrized layer would compute its weight anew when it is read, and might change it.
        own = dict(module.named_parameters(recurse=False)).get("weight")
        weight = self._functions.weights.get(output, own)
        unit = layers.units_axis(module)
        if not _is_plain(weight) or weight.dim() < 2 or output.dim() < -unit:
            return
        call = _Call(name, unit, Moments.of(output, unit))
        self._forwards[-1].append(call)
        self._units += len(call.preactivation.mean)
        self._functions.calls[output] = call
        if output.requires_grad:
            # A view that is changed in place gets another place in the graph; its base does not.
            base = output._base  # noqa: SLF001
            if base is None or base.squeeze().shape != output.squeeze().shape:
                base = output
            self._on_gradient(base, functools.partial(self._gave_back, call))
        if name not in self._weights:
            self._weights[name] = layers.rows(module, weight).clone()
            if weight.is_leaf and weight.requires_grad:
                hook = functools.partial(self._weight_gave_back, name, module)
                self._on_gradient(weight, hook)

    def _on_gradient(self, x: Tensor, hook: Callable[[Tensor], None]) -> None:
        handle: RemovableHandle = x.register_hook(hook)  # type: ignore[no-untyped-call]
        self._gradient_hooks.enter_context(handle)

    @harmless
    def _gave_back(self, call: _Call, gradient: Tensor) -> None:
        moments = Moments.of(self._unscaled(gradient), call.unit)
        call.gradient = _sum([call.gradient, moments])

    @harmless
    def _weight_gave_back(self, name: str, module: nn.Module, gradient: Tensor) -> None:
        so_far = self._weight_gradients.get(name)
        rows = layers.rows(module, self._unscaled(gradient))
        self._weight_gradients[name] = rows.clone() if so_far is None else so_far + rows

    @harmless
    def _pass_begins(self, scale: float, _gradient: Tensor) -> None:
        this = torch._C._current_graph_task_id()  # noqa: SLF001
        self._scales[this] = scale
        engine = torch.autograd.Variable._execution_engine  # noqa: SLF001
        engine.queue_callback(lambda: self._ended(this))

    def _ended(self, backward: int) -> None:
        self._scales.pop(backward, None)

    def _unscaled(self, gradient: Tensor) -> Tensor:
        """As the loss itself would have given it."""
        this = torch._C._current_graph_task_id()  # noqa: SLF001
        outer = next(reversed(self._scales.values()), 1.0)  # of a checkpoint's pass within it
        scale = self._scales.get(this, outer)
        if scale == 1:
            return gradient
        # In half precision it might be rounded to 0.
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / scale


@dataclass(eq=False)
class _Call:
    """One call of a layer, whose units lie along axis ``unit``."""

    layer: str
    unit: int
    preactivation: Moments
    gradient: Moments | None = None
    activation: Moments | None = None
    firing: Firing | None = None

    def activated(
        self, function: Callable[..., Tensor], x: Tensor, *args: object, **kwargs: object
    ) -> None:
        activations, slopes = _slopes(function, x, *args, **kwargs)
        steepest = _steepest(function, *args, **kwargs)
        self.activation = Moments.of(activations, self.unit)
        self.firing = Firing.of(activations, slopes, steepest, self.unit)


class _Functions(TorchFunctionMode):
    """Sees every torch function: which weights gave a tensor, and whose activation it becomes."""

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        super().__init__()
        self.failed = failed
        self.calls: MutableMapping[Tensor, _Call] = WeakIdKeyDictionary()
        self.weights: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()

    def enter(self) -> None:
        super().__enter__()  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """Take it out of this thread's modes, where others may have come since and stayed."""
        modes: Any = torch.overrides  # which says nothing of its functions' types
        stack = modes._get_current_function_mode_stack()  # noqa: SLF001
        if self in stack:
            above = stack[stack.index(self) + 1 :]
            for _mode in (self, *above):
                modes._pop_mode()  # noqa: SLF001
            for mode in above:
                modes._push_mode(mode)  # noqa: SLF001

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a part of the forward, into one kernel without us
            return func(*args, **kwargs)
        call = self._before(func, args, kwargs)
        result = func(*args, **kwargs)
        self._after(func, args, call, result)
        return result

    @harmless
    def _before(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> _Call | None:
        """The call whose output ``func`` is applied to; its activation is taken before it is."""
        first, *others = args or (None,)
        call = self.calls.get(first) if isinstance(first, Tensor) else None
        plain = not any(isinstance(value, Tensor) for value in (*others, *kwargs.values()))
        if call and not call.activation and _name(func) in ACTIVATIONS and plain:
            call.activated(func, *args, **kwargs)
        return call

    @harmless
    def _after(
        self, func: Callable[..., Any], args: tuple[Any, ...], call: _Call | None, result: object
    ) -> None:
        if not isinstance(result, Tensor):
            return
        name = _name(func)
        if PRODUCT.fullmatch(name) and len(args) > 1:
            self.weights[result] = args[1]
        elif call and BETWEEN.fullmatch(name):
            self.calls[result] = call
        elif call and result is args[0]:  # changed in place into something else
            del self.calls[result]


def is_traced() -> bool:
    """Whether a forward that runs now is one that is written down, and computes no numbers."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()  # noqa: SLF001
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()  # noqa: SLF001
        or torch._C._functorch.peek_interpreter_stack() is not None  # noqa: SLF001
        or torch._guards.active_fake_mode() is not None  # noqa: SLF001
    )


def _is_plain(x: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor whose numbers can be taken as of any."""
    return (
        isinstance(x, Tensor)
        and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
        and x.dtype in FLOATS
        and x.layout is torch.strided
        and not (x.is_meta or x.is_nested)
        and x.numel() > 0
    )


def _tensors(values: object) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _name(func: Callable[..., Any]) -> str:
    """As torch spells it, without underscores; nothing for a function of anybody else's."""
    if inspect.isfunction(func) and not func.__module__.startswith("torch."):
        return ""
    return str(getattr(func, "__name__", "")).partition(".")[0].rstrip("_")


def _slopes(
    function: Callable[..., Tensor], x: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor]:
    """φ(x) and φ′(x), elementwise; x is left alone also by a function that works in place."""
    # Hooks of our own, so that a checkpointed forward does not see what this one saves.
    own = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda saved: saved)
    with torch.enable_grad(), own:
        at = x.detach().requires_grad_()
        activations = function(at.clone(), *args, **kwargs)
        (slopes,) = torch.autograd.grad(activations, at, x.new_ones(()).expand_as(x))
    return activations.detach(), slopes


@functools.lru_cache
def _steepest(function: Callable[..., Tensor], *args: object, **kwargs: object) -> float:
    """The largest |φ′(x)| there is."""
    x = torch.linspace(-20.0, 20.0, 40_001, dtype=torch.float64)
    return _slopes(function, x, *args, **kwargs)[1].abs().max().item()


def _sum(parts: Iterable[T | None]) -> T | None:
    """Of those that are there."""
    there = [part for part in parts if part is not None]
    return functools.reduce(operator.add, there) if there else None

"""What the layers of any ``nn.Module`` do over a step, recorded while it runs.

Measured are those of its :mod:`initflow.models.layers` that are called, with the activation and
the residual trunk that :mod:`initflow.diagnostics.observing.functions` finds for them.

A layer that is called several times has the moments of all its calls together. Its weights are
those that it multiplies by, parametrized or not; their gradient is the sum over the step, and
measured where they are a parameter that is trained. Several backward passes through one call
count each on its own; a reentrant checkpoint hides its layers' gradients. Gradients are those of
the loss, also where a ``GradScaler`` scales it.

A gate's weights are those of its inputs and of the hidden state together. Its calls are all time
steps of all sequences. Hidden states are measured by their place in the sequence, those of a cell
by how often it was called in the forward before.

Layers that give no plain tensor of real numbers (none, an empty, sparse, quantized, complex or
meta one, one of a type with rules of its own) are left out.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.hooks import RemovableHandle

from initflow.diagnostics.observing import hooks, recurrent
from initflow.diagnostics.observing.calls import Call, KeptWeight, Part, added_up, is_plain
from initflow.diagnostics.observing.functions import Functions, Inside
from initflow.diagnostics.observing.hooks import harmless, is_traced
from initflow.diagnostics.observing.recurrent import Kernel, NotMeasuredError, Unrolled
from initflow.diagnostics.signals import (
    Cosine,
    Hidden,
    Layer,
    Moments,
    MomentsByTime,
    Signals,
    signals,
)
from initflow.models import batches, layers

# Units of all calls that are kept of a step, some 200 bytes each: without an update it would never
# end, and take all memory.
MOST_UNITS = 2_000_000
# They take a path with other bits, in evaluation and without gradients, unless a mode is there.
WITH_A_FAST_PATH = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


@dataclass(eq=False)
class _ByTime:
    """The hidden states of one call of a recurrent layer, the first of them at time step ``at``."""

    layer: str
    at: int
    state: MomentsByTime
    gradient: MomentsByTime | None = None


@dataclass(frozen=True)
class _Forward:
    """All calls of one forward of the model."""

    calls: list[Call] = field(default_factory=list)
    by_time: list[_ByTime] = field(default_factory=list)
    times: Counter[str] = field(default_factory=Counter)  # that a cell was called


class Recorder:
    """What the layers of ``model`` do in the forwards from :meth:`begin` to :meth:`close`.

    The layers are observed during a forward alone, and hooks stand on tensors that get gradients
    until it is closed.
    """

    def __init__(self, model: nn.Module) -> None:
        layers.check(model)
        self._failures: list[Exception] = []
        self._layers = layers.named(model)
        self._fast = [module for module in model.modules() if isinstance(module, WITH_A_FAST_PATH)]
        self._forwards: list[_Forward] = []
        self._weights: dict[str, KeptWeight] = {}
        self._weight_gradients: dict[int, Tensor] = {}  # by the parameter's identity
        self._observed: set[int] = set()  # the parameters whose gradients are
        self._not_measured: dict[str, str] = {}
        self._scales: dict[int, float] = {}  # of the loss, by the backward pass under way
        self._functions = Functions(weakref.proxy(self))
        self._depth, self._thread, self._units, self._was_called = 0, 0, 0, False
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
        self._forwards.append(_Forward())
        self._functions = Functions(weakref.proxy(self))
        self._functions.enter()
        calls = [(module, self._before(name, module)) for name, module in self._layers.items()]
        calls += [(module, self._pauses) for module in self._fast if _is_fast(module)]
        self._observing.enter_context(hooks.forwards(calls))

    def _before(self, name: str, module: nn.Module) -> hooks.ForwardObserver:
        """What is to be called before a call of ``module``, and gives what is after it."""
        if layers.units_axis(module):
            return functools.partial(functools.partial, self._called, name, module)
        return functools.partial(self._enters, name, module)

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
        for loss in batches.tensors(losses):
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
        return bool(self._layers and self._forwards) and not self._was_called

    def signals(self, *, is_updated: bool = False) -> Signals | None:
        """Of the forwards that a gradient came back through; None where there is none.

        ``is_updated`` says that the weights are by now those after the step's update.
        """
        calls: dict[str, list[Call]] = {}
        hidden: dict[str, list[_ByTime]] = {}
        for forward in self._forwards:
            if any(call.gradient for call in forward.calls):
                for call in forward.calls:
                    calls.setdefault(call.layer, []).append(call)
                for one in forward.by_time:
                    hidden.setdefault(one.layer, []).append(one)
        if not calls:
            return None
        found = signals(
            {name: self._layer(name, its, is_updated) for name, its in calls.items()},
            {name: _hidden(its) for name, its in hidden.items()},
        )
        return replace(found, not_measured=self._not_measured)

    def _layer(self, name: str, calls: list[Call], is_updated: bool) -> Layer:
        weight = self._weights[name]
        preactivation = added_up(call.preactivation for call in calls)
        assert preactivation is not None
        return Layer(
            weight=weight.rows,
            preactivation=preactivation,
            gradient=added_up(call.gradient for call in calls),
            weight_gradient=weight.gradient(self._weight_gradients),
            activation=added_up(call.activation for call in calls),
            firing=added_up(call.firing for call in calls),
            branch=added_up(call.branch for call in calls),
            cosine=added_up(call.cosine for call in calls),
            updated_weight=weight.now() if is_updated and weight.is_trained else None,
        )

    def _is_elsewhere(self) -> bool:
        return threading.get_ident() != self._thread

    @harmless
    def _called(self, name: str, module: nn.Module, output: object) -> None:
        if self._is_elsewhere() or not is_plain(output) or is_traced():
            return
        # A parametrized layer would compute its weight anew when it is read, and might change it.
        own = dict(module.named_parameters(recurse=False)).get("weight")
        weight = self._functions.weights.get(output, own)
        unit = layers.units_axis(module)
        if not is_plain(weight) or weight.dim() < 2 or output.dim() < -unit:
            return
        call = Call(name, unit, Moments.of(output, unit))
        if output.dim() > -unit:  # several inputs
            call.cosine = Cosine.of(output)
        self._keep(call, Part(weight, functools.partial(layers.rows, module)))
        self._functions.calls[output] = call
        self._functions.gave(call, output)
        if output.requires_grad:
            # A view that is changed in place gets another place in the graph; its base does not.
            base = _reshaped(output)
            self._on_gradient(base, functools.partial(self._gave_back, [call], output.shape))

    @harmless
    def _pauses(self) -> Callable[[object], object] | None:
        """Look at no functions until the module has been called."""
        if self._is_elsewhere() or is_traced() or not self._functions.leave():
            return None
        return self._resumes

    @harmless
    def _resumes(self, _output: object) -> None:
        self._functions.enter()

    @harmless
    def _enters(self, name: str, module: nn.Module) -> Callable[[object], object] | None:
        """Before a module whose layers are no modules; what is to be called after it."""
        if self._is_elsewhere() or is_traced():
            return None
        inside = Inside(name, module)
        self._functions.inside.append(inside)
        return functools.partial(self._left, inside)

    @harmless
    def _left(self, inside: Inside, output: object) -> None:
        self._functions.inside.remove(inside)
        if output is not None:
            self._was_called = True
        if output is not None and not inside.seen:
            self._missed(inside, "computes in a way of its own")

    def _missed(self, inside: Inside, reason: str) -> None:
        self._not_measured[inside.name] = f"{type(inside.module).__name__}: {reason}"

    @harmless
    def projected(self, inside: Inside, weight: Tensor, output: Tensor) -> None:
        """Measure the projections of an attention that one product gave."""
        taken = inside.projections.next(weight) if inside.projections else []
        if not taken:
            return
        inside.seen = True
        if not is_plain(output):
            self._missed(inside, "gives no plain tensors of real numbers")
            return
        calls = []
        for one, moments in zip(taken, Moments.of_parts(output, len(taken)), strict=True):
            call = Call(f"{inside.name}.{one.name}", -1, moments)
            self._keep(call, Part(one.parameter, one.rows))
            self._functions.gave(call, output)
            calls.append(call)
        if len(calls) == 1:
            self._functions.calls[output] = calls[0]
        if output.requires_grad:
            self._on_gradient(output, functools.partial(self._gave_back, calls, output.shape))

    @harmless
    def recurred(
        self,
        inside: Inside,
        name: str,
        args: tuple[Any, ...],
        outputs: tuple[Tensor, ...],
        stream: Tensor | None,
    ) -> None:
        """Measure the gates of a recurrent module, whose kernel of ``name`` gave ``outputs``."""
        gates = [*layers.gates(inside.module)]
        if not gates:
            return
        inside.seen = True
        kernel = Kernel.of(name, args, outputs)
        try:
            unrolled = recurrent.unroll(kernel, outputs, stream)
        except NotMeasuredError as reason:
            self._missed(inside, str(reason))
            return
        forward, times, calls, by_time = self._forwards[-1], kernel.times, [], []
        at = forward.times[inside.name] if kernel.is_cell else 0
        forward.times[inside.name] += 1
        names = layers.recurrences(inside.name, inside.module)
        for one, layer, weights in zip(names, unrolled.layers, kernel.weights, strict=True):
            n, parts = len(kernel.sizes), layer.preactivations.chunk(len(gates), 1)
            moments = Moments.of_parts(layer.preactivations, len(gates))
            functions = recurrent.KERNELS[kernel.name]
            for gate, (of_gate, x) in enumerate(zip(moments, parts, strict=True)):
                call = Call(f"{one}.{gates[gate]}", -1, of_gate)
                activations = functions[gate].apply(x)
                slopes = functions[gate].slope(activations)
                call.fired(activations, slopes, functions[gate].steepest)
                rows = functools.partial(_rows, gate, len(gates))
                self._keep(call, *(Part(weight, rows) for weight in weights[:2]))
                calls.append(call)
            by_time.append(_ByTime(one, at, MomentsByTime.of(torch.cat(layer.hidden), times, n)))
        forward.by_time.extend(by_time)
        self._functions.gave(calls[-1], *outputs)
        observed, turned = kernel.observed(outputs)
        if all(one.requires_grad for one in observed):
            back = functools.partial(self._gave_back_through_time, unrolled, turned, calls, by_time)
            self._gradient_hooks.enter_context(register_multi_grad_hook(observed, back))

    def _keep(self, call: Call, *parts: Part) -> None:
        """Note ``call``, and the weight of its layer, made of ``parts``."""
        self._was_called = True
        self._forwards[-1].calls.append(call)
        self._units += len(call.preactivation.mean)
        if call.layer in self._weights:
            return
        self._weights[call.layer] = weight = KeptWeight.of(*parts)
        for part in parts if weight.is_trained else ():
            key = id(part.tensor)
            if key not in self._observed:  # of which other layers may have another part
                self._observed.add(key)
                hook = functools.partial(self._weight_gave_back, key)
                self._on_gradient(part.tensor, hook)

    def _on_gradient(self, x: Tensor, hook: Callable[[Tensor], None]) -> None:
        handle: RemovableHandle = x.register_hook(hook)  # type: ignore[no-untyped-call]
        self._gradient_hooks.enter_context(handle)

    @harmless
    def _gave_back(self, calls: list[Call], shape: torch.Size, gradient: Tensor) -> None:
        _add_gradient(calls, self._unscaled(gradient).reshape(shape))

    @harmless
    def _gave_back_through_time(
        self,
        unrolled: Unrolled,
        turned: bool,
        calls: list[Call],
        by_time: list[_ByTime],
        gradients: list[Tensor | None],
    ) -> None:
        received = [None if one is None else self._unscaled(one) for one in gradients]
        kernel = unrolled.kernel
        found = unrolled.gradients(kernel.as_unrolled(received, turned=turned))
        of_layer = len(calls) // len(by_time)
        for at, (by_gates, by_hidden) in enumerate(found):
            _add_gradient(calls[at * of_layer : (at + 1) * of_layer], by_gates)
            moments = MomentsByTime.of(by_hidden, kernel.times, len(kernel.sizes))
            by_time[at].gradient = added_up([by_time[at].gradient, moments])

    @harmless
    def _weight_gave_back(self, weight: int, gradient: Tensor) -> None:
        so_far = self._weight_gradients.get(weight)
        gradient = self._unscaled(gradient).detach()
        self._weight_gradients[weight] = gradient.clone() if so_far is None else so_far + gradient

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


def _is_fast(module: nn.Module) -> bool:
    """Whether it may take its fast path; unless what it is given has a gradient."""
    return not module.training and not any(p.requires_grad for p in module.parameters())


def _reshaped(view: Tensor) -> Tensor:
    """What ``view`` is a view of, where that has the same numbers in their order; else itself."""
    base = view._base  # noqa: SLF001
    if base is None or base.numel() != view.numel():
        return view
    is_flat = base.is_contiguous() and view.is_contiguous()
    return base if is_flat or base.squeeze().shape == view.squeeze().shape else view


def _add_gradient(calls: list[Call], gradient: Tensor) -> None:
    """By the units of all ``calls``, side by side."""
    found = Moments.of_parts(gradient, len(calls), calls[0].unit)
    for call, moments in zip(calls, found, strict=True):
        call.gradient = added_up([call.gradient, moments])


def _rows(gate: int, gates: int, packed: Tensor) -> Tensor:
    """Those of a gate in what is packed into one."""
    return packed.detach().chunk(gates)[gate]


def _hidden(calls: list[_ByTime]) -> Hidden:
    state = added_up(one.state.shifted(one.at) for one in calls)
    assert state is not None
    gradients = (one.gradient.shifted(one.at) if one.gradient else None for one in calls)
    return Hidden(state, added_up(gradients))

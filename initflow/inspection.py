"""Any ``nn.Module`` looked into: its layers' quantities over a step, or on one batch.

The layers are its modules of type ``nn.Linear`` and ``nn.Conv1d`` to ``nn.Conv3d`` that are
called, by their first names in ``model.named_modules()``. ``nn.MultiheadAttention`` applies
its projections without calling a module: they are not measured.

A layer's activation is the first of :data:`ACTIVATIONS` that is applied to what the layer gave,
as a module, function or method, in place or not, at once or after what :data:`BETWEEN` names.

A layer that is called several times has the moments of all its calls together. Its weights are
those that it multiplies by, parametrized or not; their gradient is the sum over the step, and
measured where they are a parameter that is trained. Several backward passes through one call
count each on its own; a reentrant checkpoint hides its layers' gradients.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from initflow.errors import SettingError
from initflow.signals import Firing, Layer, Moments, Signals, signals

# And the axis of what they give that the units lie along.
LAYERS: dict[type[nn.Module], int] = {nn.Linear: -1, nn.Conv1d: -2, nn.Conv2d: -3, nn.Conv3d: -4}
PRODUCT = re.compile(r"linear|conv[123]d")
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

T = TypeVar("T", Moments, Firing)


def inspect(model: nn.Module, batch: object, loss: Callable[..., Tensor]) -> Signals:
    """The quantities of each layer of ``model`` on ``batch``, with the gradients of ``loss``.

    ``batch`` is what a DataLoader gives: a pair (inputs, targets), with the loss
    ``loss(model(inputs), targets)``, or a tensor alone, with the loss ``loss(model(batch))``.
    The model is measured in the mode that it is in, training or evaluation; its parameters,
    their gradients, its buffers and torch's random state are left as they were.
    """
    recorder = Recorder(model)
    inputs, *targets = _parts(batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with (
        torch.random.fork_rng(gpus),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        contextlib.closing(recorder),
        model.register_forward_pre_hook(lambda *_: recorder.begin()),
    ):
        with _refused(f"model takes no batch of {_form(inputs)}"):
            outputs = torch.func.functional_call(model, buffers, (inputs,))
        against = "".join(f" with targets of {_form(target)}" for target in targets)
        with _refused(f"loss takes no outputs of {_form(outputs)}{against}"):
            value = loss(outputs, *targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise SettingError(f"loss must give one number as a tensor, not {_form(value)}")
        if not value.requires_grad or not trained:
            raise SettingError("loss must have a gradient by the model's parameters")
        torch.autograd.grad(value, trained, allow_unused=True)  # touches no parameter's .grad
    found = recorder.signals()
    if found is None:
        raise SettingError("loss must depend on a Linear or a convolution that the model calls")
    return found


class Recorder:
    """What the layers of ``model`` do in the forwards from :meth:`begin` to :meth:`close`.

    Its hooks stand on the layers and the model during a forward alone, and on the tensors
    that gradients are asked of until it is closed.
    """

    def __init__(self, model: nn.Module) -> None:
        _check(model)
        self._model = model
        self._layers: list[tuple[str, nn.Module]] = [
            (name or type(module).__name__.lower(), module)
            for name, module in model.named_modules()
            if _units_axis(module)
        ]
        self._forwards: list[list[_Call]] = []
        self._weights: dict[str, Tensor] = {}
        self._weight_gradients: dict[str, Tensor] = {}
        self._functions = _Functions()
        self._depth = 0
        self._forward_hooks = contextlib.ExitStack()
        self._gradient_hooks = contextlib.ExitStack()

    def begin(self) -> None:
        """Record the forward that starts now."""
        self._depth += 1
        if self._depth > 1:  # the model calls itself
            return
        self._forwards.append([])
        self._functions = self._forward_hooks.enter_context(_Functions())
        for name, module in self._layers:
            hook = functools.partial(self._called, name)
            self._forward_hooks.enter_context(module.register_forward_hook(hook))
        self._forward_hooks.enter_context(
            self._model.register_forward_hook(self._end, always_call=True)
        )

    def close(self) -> None:
        """Take every hook away."""
        self._forward_hooks.close()
        self._gradient_hooks.close()

    def signals(self) -> Signals | None:
        """Of the forwards that a gradient came back through; None where there is none."""
        calls: dict[str, list[_Call]] = {}
        for forward in self._forwards:
            if any(call.gradient for call in forward):
                for call in forward:
                    calls.setdefault(call.layer, []).append(call)
        layers = {name: self._layer(name, found) for name, found in calls.items()}
        return signals(layers) if layers else None

    def _layer(self, name: str, calls: list[_Call]) -> Layer:
        return Layer(
            weight=self._weights[name],
            preactivation=functools.reduce(operator.add, [call.preactivation for call in calls]),
            gradient=_sum(call.gradient for call in calls),
            weight_gradient=self._weight_gradients.get(name),
            activation=_sum(call.activation for call in calls),
            firing=_sum(call.firing for call in calls),
        )

    def _end(self, _module: nn.Module, _inputs: object, _outputs: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._forward_hooks.close()

    def _called(self, name: str, module: nn.Module, _inputs: object, output: object) -> None:
        if not isinstance(output, Tensor) or not output.numel():
            return
        # A parametrized layer would compute its weight anew when asked, and might change it.
        own = dict(module.named_parameters(recurse=False)).get("weight")
        weight = self._functions.weights.get(output, own)
        if weight is None or not weight.is_floating_point():
            return
        unit = _units_axis(module)
        call = _Call(name, unit, Moments.of(output, unit))
        self._forwards[-1].append(call)
        self._functions.calls[output] = call
        if output.requires_grad:
            # A view that is changed in place gets another place in the graph; its base does not.
            base = output._base  # noqa: SLF001
            if base is None or base.squeeze().shape != output.squeeze().shape:
                base = output
            self._gradient_hooks.enter_context(_on_gradient(base, call.gave_back))
        if name not in self._weights:
            self._weights[name] = weight.detach().clone()
            if weight.is_leaf and weight.requires_grad:
                hook = functools.partial(self._weight_gave_back, name)
                self._gradient_hooks.enter_context(_on_gradient(weight, hook))

    def _weight_gave_back(self, name: str, gradient: Tensor) -> None:
        so_far = self._weight_gradients.get(name)
        gradient = gradient.detach()
        self._weight_gradients[name] = gradient.clone() if so_far is None else so_far + gradient


@dataclass(eq=False)
class _Call:
    """One call of a layer, whose units lie along axis ``unit``."""

    layer: str
    unit: int
    preactivation: Moments
    gradient: Moments | None = None
    activation: Moments | None = None
    firing: Firing | None = None

    def gave_back(self, gradient: Tensor) -> None:
        self.gradient = _sum([self.gradient, Moments.of(gradient, self.unit)])

    def activated(
        self, function: Callable[..., Tensor], x: Tensor, *args: object, **kwargs: object
    ) -> None:
        activations, slopes = _slopes(function, x, *args, **kwargs)
        steepest = _steepest(function, *args, **kwargs)
        self.activation = Moments.of(activations, self.unit)
        self.firing = Firing.of(activations, slopes, steepest, self.unit)


class _Functions(TorchFunctionMode):
    """Sees every torch function: which weights gave a tensor, and whose activation it becomes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: MutableMapping[Tensor, _Call] = WeakIdKeyDictionary()
        self.weights: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0].rstrip("_")
        first, *others = args or (None,)
        call = self.calls.get(first) if isinstance(first, Tensor) else None
        plain = not any(isinstance(value, Tensor) for value in (*others, *kwargs.values()))
        if call and not call.activation and name in ACTIVATIONS and plain:
            call.activated(func, *args, **kwargs)
        result = func(*args, **kwargs)
        if PRODUCT.fullmatch(name) and others:
            self.weights[result] = others[0]
        elif call and isinstance(result, Tensor):
            if BETWEEN.fullmatch(name):
                self.calls[result] = call
            elif result is first:  # changed in place into something else
                del self.calls[first]
        return result


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


def _on_gradient(x: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    return x.register_hook(hook)  # type: ignore[no-untyped-call,no-any-return]


def _sum(parts: Iterable[T | None]) -> T | None:
    """Of those that are there."""
    there = [part for part in parts if part is not None]
    return functools.reduce(operator.add, there) if there else None


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise SettingError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    kind = type(model).__name__
    if any(map(_is_compiled, model.modules())):
        raise SettingError(
            "model must not be compiled: fused kernels have no layers to look into; give the model "
            "as it was before compiling"
        )
    if not any(True for _ in model.parameters()):
        raise SettingError(f"model must have parameters; {kind} has none")
    if any(map(is_lazy, model.parameters())):
        raise SettingError(f"model must have its weights; {kind} is lazy: call it on a batch first")
    if not any(map(_units_axis, model.modules())):
        raise SettingError(f"model must hold a Linear or a convolution; {kind} has none")


def _units_axis(module: nn.Module) -> int:
    """0 for a module that is no layer."""
    return next((axis for kind, axis in LAYERS.items() if isinstance(module, kind)), 0)


def _is_compiled(module: nn.Module) -> bool:
    # By name, because importing torch._dynamo takes seconds.
    return (
        isinstance(module, torch.jit.ScriptModule)
        or type(module).__name__ == "OptimizedModule"
        or module._compiled_call_impl is not None  # noqa: SLF001
    )


def _parts(batch: object) -> tuple[object, ...]:
    """The inputs, and the targets if there are any."""
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return tuple(batch)
    raise SettingError(f"batch must be a tensor or a pair (inputs, targets), not {_form(batch)}")


def _form(value: object) -> str:
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Raise what a model or a loss makes of a wrong batch as one line that names it."""
    try:
        yield
    except Exception as error:  # a module may refuse a batch in any way
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise SettingError(f"{what}: {reason}") from error

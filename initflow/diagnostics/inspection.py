"""Any ``nn.Module`` looked into on one batch: its layers' quantities, as the recorder has them."""

from __future__ import annotations

import contextlib
import inspect as introspection
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from initflow.diagnostics import hooks, layers
from initflow.diagnostics.recorder import Recorder
from initflow.diagnostics.signals import Signals
from initflow.errors import SettingError, cause


def inspect(model: nn.Module, batch: object, loss: Callable[..., Tensor]) -> Signals:
    r"""The quantities of each layer of ``model`` on ``batch``, with the gradients of ``loss``.

    ``batch`` is what a DataLoader gives:

    - a tensor: the loss is ``loss(model(batch))``;
    - a tuple or list (inputs, \*targets): it is ``loss(model(inputs), *targets)``. Inputs that
      are a tuple themselves are the model's arguments, one by one, and those that are a mapping
      its arguments by name;
    - a mapping: the entries that ``model.forward`` has parameters for are given to it by name,
      and the others to the loss, ``loss(model(...), **others)``.

    The model is measured in the mode that it is in, training or evaluation; its parameters,
    their gradients, its buffers and torch's random state are left as they were.
    """
    layers.check(model)
    kind = type(model).__name__
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not any(True for _ in model.parameters()):
        raise SettingError(f"model must have parameters; {kind} has none")
    if not layers.named(model):
        raise SettingError(f"model must hold a Linear or a convolution; {kind} has none")
    given = _given(model, batch)
    recorder = Recorder(model)
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with (
        torch.random.fork_rng(gpus),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        _buffers_apart(model),
        contextlib.ExitStack() as afterwards,
        contextlib.closing(recorder),
        hooks.forwards([(model, recorder.begin)]),
    ):
        if isinstance(model, nn.DataParallel):  # it calls its own module then, and no copies of it
            afterwards.callback(setattr, model, "device_ids", model.device_ids)
            model.device_ids = model.device_ids[:1]
        with _refused(f"model takes no batch of {given.form}"):
            outputs = model(*given.arguments, **given.by_name)
        with _refused(f"loss takes no outputs of {_form(outputs)}{given.against}"):
            value = loss(outputs, *given.targets, **given.targets_by_name)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise SettingError(f"loss must give one number as a tensor, not {_form(value)}")
        if not value.requires_grad or not trained:
            raise SettingError("loss must have a gradient by the model's parameters")
        torch.autograd.grad(value, trained, allow_unused=True)  # touches no parameter's .grad
    if recorder.failure:
        raise SettingError(
            f"model cannot be measured: {cause(recorder.failure)}"
        ) from recorder.failure
    found = recorder.signals()
    if found is None:
        raise SettingError("loss must depend on a Linear or a convolution that the model calls")
    return replace(found, not_measured=layers.not_measured(model))


@dataclass(frozen=True)
class _Given:
    """What the model and the loss get of a batch; ``form`` is the inputs' in words."""

    form: str
    arguments: tuple[object, ...] = ()
    by_name: Mapping[str, object] = field(default_factory=dict)
    targets: tuple[object, ...] = ()
    targets_by_name: Mapping[str, object] = field(default_factory=dict)

    @property
    def against(self) -> str:
        """The targets in words."""
        forms = list(map(_form, self.targets))
        forms += [f"{name} ({_form(value)})" for name, value in self.targets_by_name.items()]
        return f" with targets of {', '.join(forms)}" if forms else ""


def _given(model: nn.Module, batch: object) -> _Given:
    if isinstance(batch, Mapping) and _has_names(batch):
        taken = _taken(model, batch)
        others = {name: value for name, value in batch.items() if name not in taken}
        return _Given(_form(taken), by_name=taken, targets_by_name=others)
    if isinstance(batch, Tensor):
        return _Given(_form(batch), (batch,))
    if not isinstance(batch, (tuple, list)) or not batch:
        raise SettingError(
            "batch must be a tensor, a tuple or list (inputs, *targets) or a mapping of names, "
            f"not {_form(batch)}"
        )
    inputs, *targets = batch
    if isinstance(inputs, Mapping) and _has_names(inputs):
        return _Given(_form(inputs), by_name=inputs, targets=tuple(targets))
    # A tuple of a type of its own, a PackedSequence for one, is a single argument.
    arguments = inputs if type(inputs) is tuple else (inputs,)
    return _Given(_form(inputs), arguments, targets=tuple(targets))


def _has_names(batch: Mapping[object, object]) -> bool:
    return all(isinstance(name, str) for name in batch)


def _taken(model: nn.Module, batch: Mapping[str, object]) -> dict[str, object]:
    """The entries of ``batch`` that the model's forward has parameters for."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module  # they pass on whatever they get
    parameters = introspection.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(batch)
    named = {
        name
        for name, p in parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    return {name: value for name, value in batch.items() if name in named}


@contextlib.contextmanager
def _buffers_apart(model: nn.Module) -> Iterator[None]:
    """Let ``model`` work on copies of its buffers meanwhile; one that is shared stays so."""
    own = {module: dict(module._buffers) for module in model.modules()}  # noqa: SLF001
    buffers = {id(b): b for of in own.values() for b in of.values() if b is not None}
    copies = {key: buffer.detach().clone() for key, buffer in buffers.items()}
    try:
        for module, its in own.items():
            for name, buffer in its.items():
                module._buffers[name] = copies.get(id(buffer))  # noqa: SLF001
        yield
    finally:
        for module, its in own.items():
            module._buffers.clear()  # noqa: SLF001
            module._buffers.update(its)  # noqa: SLF001


def _form(value: object) -> str:
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {', '.join(map(str, value)) or 'nothing'}"
    return type(value).__name__


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Raise what a model or a loss makes of a wrong batch as one line that names it."""
    try:
        yield
    except Exception as error:  # a module may refuse a batch in any way
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise SettingError(f"{what}: {reason}") from error

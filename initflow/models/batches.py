"""What a DataLoader gives, as a model and a loss take it; what they refuse becomes one line."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from initflow.errors import SettingError


@dataclass(frozen=True)
class Batch:
    """What the model and the loss get of a batch; ``form`` is the inputs' in words."""

    form: str
    arguments: tuple[object, ...] = ()
    by_name: Mapping[str, object] = field(default_factory=dict)
    targets: tuple[object, ...] = ()
    targets_by_name: Mapping[str, object] = field(default_factory=dict)

    @property
    def against(self) -> str:
        """The targets in words."""
        forms = list(map(form, self.targets))
        forms += [f"{name} ({form(value)})" for name, value in self.targets_by_name.items()]
        return f" with targets of {', '.join(forms)}" if forms else ""


def given(model: nn.Module, batch: object) -> Batch:
    if isinstance(batch, Mapping) and _has_names(batch):
        taken = _taken(model, batch)
        others = {name: value for name, value in batch.items() if name not in taken}
        return Batch(form(taken), by_name=taken, targets_by_name=others)
    if isinstance(batch, Tensor):
        return Batch(form(batch), (batch,))
    if not isinstance(batch, (tuple, list)) or not batch:
        raise SettingError(
            "batch must be a tensor, a tuple or list (inputs, *targets) or a mapping of names, "
            f"not {form(batch)}"
        )
    inputs, *targets = batch
    if isinstance(inputs, Mapping) and _has_names(inputs):
        return Batch(form(inputs), by_name=inputs, targets=tuple(targets))
    # A tuple of a type of its own, a PackedSequence for one, is a single argument.
    arguments = inputs if type(inputs) is tuple else (inputs,)
    return Batch(form(inputs), arguments, targets=tuple(targets))


def _has_names(batch: Mapping[object, object]) -> bool:
    return all(isinstance(name, str) for name in batch)


def _taken(model: nn.Module, batch: Mapping[str, object]) -> dict[str, object]:
    """The entries of ``batch`` that the model's forward has parameters for."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module  # they pass on whatever they get
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(batch)
    named = {
        name
        for name, p in parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    return {name: value for name, value in batch.items() if name in named}


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave the model's buffers and torch's random state as they were before the block."""
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(gpus), torch.inference_mode(mode=False), _buffers_apart(model):
        yield


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


def moved(value: object, device: torch.device) -> object:
    """The same batch with its tensors on ``device``."""
    return mapped(value, lambda x: x.to(device))


def mapped(value: object, change: Callable[[Tensor], Tensor]) -> object:
    """The same batch with each of its tensors changed; what is of a type of its own is left."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(each, change) for each in value)  # type: ignore[call-arg, attr-defined]
    if isinstance(value, Mapping):
        made = {name: mapped(each, change) for name, each in value.items()}
        return type(value)(made) if type(value) is not dict else made  # type: ignore[call-arg]
    return value


def form(value: object) -> str:
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {', '.join(map(str, value)) or 'nothing'}"
    return type(value).__name__


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Raise what a model or a loss makes of a wrong batch as one line that names it."""
    try:
        yield
    except Exception as error:  # a module may refuse a batch in any way
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise SettingError(f"{what}: {reason}") from error


def tensors(value: object) -> Iterator[Tensor]:
    """All that are in ``value``, in sequences and mappings too."""
    for each in leaves(value):
        if isinstance(each, Tensor):
            yield each


def leaves(value: object) -> Iterator[object]:
    """All that is in ``value`` and no sequence or mapping."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from leaves(each)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from leaves(each)
    else:
        yield value

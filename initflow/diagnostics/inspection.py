"""Any ``nn.Module`` looked into on one batch: its layers' quantities, as the recorder has them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from initflow.diagnostics.observing import hooks
from initflow.diagnostics.recorder import Recorder
from initflow.diagnostics.signals import Signals
from initflow.errors import SettingError, cause
from initflow.models import batches, layers


def inspect(model: nn.Module, batch: object, loss: Callable[..., Tensor]) -> Signals:
    """The quantities of each layer of ``model``, as :func:`initflow.inspect` gives them."""
    layers.check(model)
    model = layers.uncompiled(model)
    kind = type(model).__name__
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not any(True for _ in model.parameters()):
        raise SettingError(f"model must have parameters; {kind} has none")
    if not layers.named(model):
        raise SettingError(f"model must hold a layer that can be measured; {kind} has none")
    given = batches.given(model, batch)
    recorder = Recorder(model)
    with (
        batches.undisturbed(model),
        torch.enable_grad(),
        contextlib.ExitStack() as afterwards,
        contextlib.closing(recorder),
        hooks.forwards([(model, recorder.begin)]),
    ):
        if isinstance(model, nn.DataParallel):  # it calls its own module then, and no copies of it
            afterwards.callback(setattr, model, "device_ids", model.device_ids)
            model.device_ids = model.device_ids[:1]
        with hooks.eagerly(), batches.refused(f"model takes no batch of {given.form}"):
            outputs = model(*given.arguments, **given.by_name)
        with batches.refused(f"loss takes no outputs of {batches.form(outputs)}{given.against}"):
            value = loss(outputs, *given.targets, **given.targets_by_name)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise SettingError(f"loss must give one number as a tensor, not {batches.form(value)}")
        if not value.requires_grad or not trained:
            raise SettingError("loss must have a gradient by the model's parameters")
        torch.autograd.grad(value, trained, allow_unused=True)  # touches no parameter's .grad
    if recorder.failure:
        raise SettingError(
            f"model cannot be measured: {cause(recorder.failure)}"
        ) from recorder.failure
    found = recorder.signals()
    if found is None:
        raise SettingError("loss must depend on a layer that the model calls and can be measured")
    return replace(found, not_measured=layers.not_measured(model) | dict(found.not_measured))

"""A model of the user's, built by a function of theirs that is named by its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from initflow.core import importing
from initflow.core.seeds import stream_seed
from initflow.errors import SettingError
from initflow.models import batches, layers

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Built:
    """What a function gave: a ``model``, with a ``batch`` and a ``loss`` or without.

    ``place`` names the function, and ``provider`` whose it is, in which version.
    """

    model: nn.Module
    batch: object
    loss: Loss
    place: str
    provider: str


def build(place: str, seed: int) -> Built:
    """Call the function at ``place``, ``path/to/file.py:build`` or ``package.module:build``.

    What it draws from torch's, NumPy's or Python's global generator follows from ``seed``. It gives
    a module, (module, batch) or (module, batch, loss), the batch being what a DataLoader gives.
    Without a loss it is :func:`usual_loss`. Whatever is wrong is a :class:`SettingError`.
    """
    who = f"model '{place}'"
    made, provider = importing.called(place, who, stream_seed(seed, "model"))
    model, batch, loss = _parts(made)
    if not isinstance(model, nn.Module) or not callable(loss):
        raise SettingError(
            f"{who} must give a module, (module, batch) or (module, batch, loss), not "
            f"{batches.form(made)}"
        )
    layers.check(model)
    return Built(model, batch, loss, place, provider)


def _parts(made: object) -> tuple[object, object, Any]:
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3:
        return None, None, None
    model, batch, loss = (*parts, None, None)[:3]
    return model, batch, usual_loss if loss is None else loss


def usual_loss(outputs: Any, *targets: Any, **by_name: Any) -> Tensor:
    """The loss that such outputs usually have.

    A ``loss`` among the outputs (as Hugging Face's models give one); without targets, half the
    outputs' mean square; with whole numbers as targets, the cross-entropy, of logits whose classes
    lie along the last axis or the second one; else the mean squared error. Raises a
    :class:`ValueError` for any others.
    """
    given = outputs.get("loss") if isinstance(outputs, dict) else getattr(outputs, "loss", None)
    if isinstance(given, Tensor):
        return given
    found = _first(outputs)
    known = [value for value in (*targets, *by_name.values()) if isinstance(value, Tensor)]
    if not known:
        return found.float().square().mean() / 2
    target = known[0]
    if not target.is_floating_point():
        if found.shape[:-1] == target.shape:
            return functional.cross_entropy(found.flatten(0, -2), target.flatten().long())
        if found.shape[:1] + found.shape[2:] == target.shape:
            return functional.cross_entropy(found, target.long())
    elif found.shape == target.shape:
        return functional.mse_loss(found, target)
    raise ValueError(
        f"outputs of {batches.form(found)} and targets of {batches.form(target)} have no usual "
        "loss: have build() give (module, batch, loss)"
    )


def _first(outputs: Any) -> Tensor:
    """The first tensor of what a model gives."""
    if isinstance(outputs, Tensor):
        return outputs
    values = outputs.values() if isinstance(outputs, dict) else outputs
    if isinstance(values, (tuple, list)) or hasattr(values, "__iter__"):
        for value in values:
            if isinstance(value, Tensor):
                return value
    raise ValueError(f"outputs of {batches.form(outputs)} have no usual loss: give one")

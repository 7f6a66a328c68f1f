"""Models built: the built-in ones, and those of functions of the user's or of a plugin."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from initflow.core import importing
from initflow.core.configurations import MODEL_NAMES, Architecture
from initflow.core.kinds import is_place
from initflow.core.seeds import stream_seed
from initflow.errors import SettingError, cause, unknown
from initflow.initializers import finder
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.plugins import imported
from initflow.initializers.scheme import BUILT_IN
from initflow.models import architectures, batches, layers

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Built:
    """What a builder gave: a ``model``, with a ``batch`` and a ``loss`` or without.

    ``drawn`` names the global random states that a function of the user's drew from.
    """

    model: nn.Module
    batch: object
    loss: Loss
    drawn: Sequence[str] = ()


@dataclass(frozen=True)
class Builder:
    """The ``function`` that builds the model of a name or a place.

    ``provider`` says whose it is, in which version. It takes the shape of an image and the number
    of classes or, where it does not ask for the ``example``, nothing.
    """

    model: str
    function: Callable[..., object]
    provider: str
    takes_example: bool = True

    @property
    def is_built_in(self) -> bool:
        return self.provider == BUILT_IN

    def build(self, seed: int, *example: object) -> Built:
        """Call the function with the ``example``: (shape, classes).

        What it draws from torch's, NumPy's or Python's global generator follows from ``seed``. It
        gives a module, (module, batch) or (module, batch, loss), the batch being what a DataLoader
        gives. Without a loss it is :func:`usual_loss`. Whatever is wrong is a
        :class:`SettingError`.
        """
        who = f"model '{self.model}'"
        arguments = example if self.takes_example else ()
        made, drawn = importing.call(self.function, arguments, who, stream_seed(seed, "model"))
        model, batch, loss = _parts(made)
        if not isinstance(model, nn.Module) or not callable(loss):
            raise SettingError(
                f"{who} must give a module, (module, batch) or (module, batch, loss), not "
                f"{batches.form(made)}"
            )
        layers.check(model)
        return Built(model, batch, loss, [] if self.is_built_in else drawn)


def builder(config: Architecture, activation: str, hidden: Sequence[int]) -> Builder:
    """That of the model of ``config``: a built-in one, a plugin's, or a function by its place.

    Raises :class:`SettingError` for what there is none of, or what takes other arguments.
    """
    name = config.model
    if name in architectures.BUILT_IN:
        built_in = functools.partial(
            architectures.BUILT_IN[name],
            activation=ACTIVATIONS[activation],
            hidden=hidden,
            channels=config.channels,
            kernel=config.kernel,
            pool=config.pool,
        )
        return Builder(name, built_in, BUILT_IN)
    function, provider = _of_user(name, getattr(config, "plugins_dir", None))
    return Builder(name, function, provider, _takes_example(function, name))


def _of_user(name: str, plugins_dir: Path | None) -> tuple[Callable[..., object], str]:
    """A plugin's function by its name, or any by its place; and its provider."""
    who = f"model '{name}'"
    if is_place(name):
        return importing.function_at(name, who)
    plugins = finder.found(plugins_dir, finder.MODELS)
    if name not in plugins:
        raise unknown("model", name, [*MODEL_NAMES, *plugins])
    try:
        function, provider = imported(plugins[name], finder.MODELS)
    except Exception as error:  # the code may raise anything
        raise SettingError(f"{who} of {plugins[name].origin}: {cause(error)}") from error
    if not callable(function):
        raise SettingError(f"{who} must name a function, not {type(function).__name__}")
    return function, provider


def _takes_example(function: Callable[..., object], name: str) -> bool:
    """Whether it takes (shape, classes), not nothing; all else is an error."""
    try:
        signature = inspect.signature(function)
        for example in ((), ((1, 28, 28), 10)):
            with contextlib.suppress(TypeError):
                signature.bind(*example)
                return bool(example)
    except ValueError:  # what is written in C tells none
        return True
    raise SettingError(
        f"model '{name}' must be built from the shape of an image and the number of classes, or "
        f"from nothing, not from {signature}"
    )


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

"""Callbacks that watch where another package has the training loop, which is optional here."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from initflow.errors import naming_extras
from initflow.tracking.watching.watch import Wanted


def lightning_callback(
    *,
    every: int = 100,
    quantities: Iterable[str] | None = None,
    name: str | None = None,
    run_id: str | None = None,
) -> Any:
    """A ``lightning.pytorch.Callback`` that watches the LightningModule in ``Trainer.fit``.

    It logs as :func:`initflow.watch` does, whose ``every``, ``quantities`` and ``name`` these are:
    into the run with ``run_id``, else into that of the Trainer's ``MLFlowLogger``, else into the
    one that is active, as it is under ``mlflow.pytorch.autolog``. The process of rank 0 logs.

    A forward is all that ``training_step`` does, and a step has Lightning's number, by which its
    loggers log: of batches after which an optimizer stepped. Where ``training_step`` optimizes by
    itself, all of its forwards and updates are one step.

    Returns the callback, for ``Trainer(callbacks=[…])``. Raises :class:`initflow.SettingError`
    without the package ``lightning`` and for a wrong setting.
    """
    wanted = Wanted.of(every, quantities, name)
    return _module("lightning").Watch(wanted, run_id)


def transformers_callback(
    *,
    every: int = 100,
    quantities: Iterable[str] | None = None,
    name: str | None = None,
    run_id: str | None = None,
) -> Any:
    """A ``transformers.TrainerCallback`` that watches the model in ``Trainer.train``.

    It logs as :func:`initflow.watch` does, whose ``every``, ``quantities`` and ``name`` these are:
    into the run with ``run_id``, else into the one that is active, as it is with
    ``report_to="mlflow"``. The process of rank 0 logs, and a step has the Trainer's number,
    ``state.global_step``.

    The Trainer tells its callbacks nothing of a training that fails: watching ends then with the
    callback, or with the next ``train()``.

    Returns the callback, for ``Trainer(callbacks=[…])``. Raises :class:`initflow.SettingError`
    without the package ``transformers`` and for a wrong setting.
    """
    wanted = Wanted.of(every, quantities, name)
    return _module("transformers").Watch(wanted, run_id)


def _module(package: str) -> Any:
    """That of the callback for an optional ``package``."""
    with naming_extras(f"{package}_callback"):
        return importlib.import_module(f"initflow.tracking.watching.{package}_callback")

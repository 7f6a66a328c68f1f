"""Watching in Lightning's ``fit``."""

from __future__ import annotations

import contextlib
import functools

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from initflow.diagnostics.observing import hooks
from initflow.errors import SettingError
from initflow.tracking import runs
from initflow.tracking.watching.watch import Wanted, watched


class Watch(Callback):
    """Watches from the first training batch to the last, or to what ends ``fit``."""

    def __init__(self, wanted: Wanted, run_id: str | None) -> None:
        self._wanted, self._run_id = wanted, run_id
        self._watching = contextlib.ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watching.close()
        if not trainer.is_global_zero:
            return
        # The module's own forward need not be called: training_step may call its parts.
        observing = functools.partial(hooks.calls, trainer.strategy, "training_step")
        run = _run(trainer, self._run_id)
        number = functools.partial(_number, trainer)
        self._watching.enter_context(watched(pl_module, run, self._wanted, observing, number))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self._watching.close()

    def on_exception(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        self._watching.close()


def _number(trainer: Trainer) -> int:
    """The step's, as loggers have it; ``trainer.global_step`` counts those of each optimizer."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)  # noqa: SLF001


def _run(trainer: Trainer, run_id: str | None) -> runs.Run:
    if run_id is not None:
        return runs.of_id(run_id)
    for logger in trainer.loggers:
        # By name, because the packages lightning and pytorch_lightning have one each.
        if "MLFlowLogger" in (kind.__name__ for kind in type(logger).__mro__):
            return runs.of_id(logger.run_id)
    run = runs.active()
    if run is None:
        raise SettingError(
            "lightning_callback needs an MLflow run: give the Trainer an MLFlowLogger, open a run "
            "around fit, with mlflow.start_run(): …, or give run_id"
        )
    return run

"""Watching in ``train`` of Hugging Face's Trainer."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from initflow.errors import SettingError
from initflow.tracking import runs
from initflow.tracking.watching.watch import Wanted, forwards, watched


class Watch(TrainerCallback):
    """Watches from the beginning of a training to its end, or to its own."""

    def __init__(self, wanted: Wanted, run_id: str | None) -> None:
        self._wanted, self._run_id = wanted, run_id
        self._end: Callable[[], object] = lambda: None

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        *,
        model: nn.Module,
        **_others: object,
    ) -> None:
        self._end()  # of a training that failed
        if not state.is_world_process_zero:
            return
        run = runs.active() if self._run_id is None else runs.of_id(self._run_id)
        if run is None:
            raise SettingError(
                "transformers_callback needs an MLflow run: give TrainingArguments "
                'report_to="mlflow", open a run around train, with mlflow.start_run(): …, or give '
                "run_id"
            )
        watching = contextlib.ExitStack()
        bare, observing = forwards(model)
        number = lambda: state.global_step  # noqa: E731 - holds no reference to the callback
        watching.enter_context(watched(bare, run, self._wanted, observing, number))
        self._end = weakref.finalize(self, watching.close)

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **_others: object,
    ) -> None:
        self._end()

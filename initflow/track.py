"""MLflow: the only module that imports it. A run is opened, written to, and always closed."""

from __future__ import annotations

import contextlib
import os
import re
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlflow
import mlflow.data.meta_dataset
import mlflow.pytorch
import numpy as np
import torch
from filelock import FileLock
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from sqlalchemy.exc import SQLAlchemyError

from initflow.data import Splits
from initflow.errors import SettingError, TrackingError
from initflow.figures import Figure

EXPERIMENT = "initflow"
DIGEST_LENGTH = 32  # MLflow takes up to 36 characters
STORE_TIMEOUT_S = 120
DESCRIPTION = "mlflow.note.content"
# A driver may be missing, an address malformed.
FAILURES = (MlflowException, SQLAlchemyError, OSError, ImportError, ValueError)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Raise what MLflow or its store refuses as :class:`TrackingError`."""
    try:
        yield
    except FAILURES as error:
        lines = [line for line in str(error).splitlines() if not line.startswith("(raised as")]
        reason = lines[0] if lines else type(error).__name__
        message = f"MLflow at '{mlflow.get_tracking_uri()}' failed: {reason}"
        raise TrackingError(re.sub(r"//[^/\s]+@", "//", message)) from error  # no credentials


@dataclass(frozen=True)
class Run:
    """The open MLflow run; every call is one request, or one batch of them.

    ``launcher`` holds the options of the ``mlflow run`` that started it, if one did: with
    them its experiment and its kind of environment are met again.
    """

    id: str
    experiment_id: str
    launcher: tuple[str, ...]

    @_translated()
    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(_key(key), value, now, step) for key, value in values.items()]
        mlflow.MlflowClient().log_batch(self.id, metrics=metrics)

    @_translated()
    def set_tags(self, tags: Mapping[str, object]) -> None:
        entities = [RunTag(key, str(value)) for key, value in tags.items()]
        mlflow.MlflowClient().log_batch(self.id, tags=entities)

    def describe(self, text: str) -> None:
        """Set the description, Markdown, that MLflow's page shows above all else."""
        self.set_tags({DESCRIPTION: text})

    @_translated()
    def log_figure(self, name: str, figure: Figure) -> None:
        file, options = f"{name}.png", {"dpi": figure.dpi}
        mlflow.MlflowClient().log_figure(self.id, figure, file, save_kwargs=options)

    @_translated()
    def log_json(self, name: str, values: Mapping[str, object]) -> None:
        mlflow.MlflowClient().log_dict(self.id, dict(values), f"{name}.json")

    @_translated()
    def log_data(self, splits: Splits) -> None:
        """The data set as an MLflow dataset input, by a digest of all its pixels and labels."""
        train = len(splits.train) + len(splits.validation or ())
        schema = Schema(
            [
                TensorSpec(np.dtype(np.uint8), shape, name)
                for part, images in (("train", train), ("test", len(splits.test)))
                for name, shape in (
                    (f"{part}_images", (images, splits.pixels)),
                    (f"{part}_labels", (images,)),
                )
            ]
        )
        dataset = mlflow.data.meta_dataset.MetaDataset(  # type: ignore[abstract]
            CodeDatasetSource(tags={"source": splits.source}),
            name=splits.name,
            digest=splits.digest[:DIGEST_LENGTH],
            schema=schema,
        )
        mlflow.log_input(dataset, context="training")

    @_translated()
    def log_model(self, module: torch.nn.Module, pixels: int) -> None:
        """``module`` as an MLflow model: (n, pixels) float32 in, (n, classes) logits out.

        The requirements are stated, because guessing them takes MLflow 12 to 17 s.
        """
        example = np.zeros((2, pixels), dtype=np.float32)  # a batch of 1 would fix the size at 1
        with torch.no_grad():
            classes = module(torch.from_numpy(example)).shape[1]
        tensor = np.dtype(np.float32)
        mlflow.pytorch.log_model(
            module,
            name="model",
            input_example=example,
            signature=ModelSignature(
                inputs=Schema([TensorSpec(tensor, (-1, pixels))]),
                outputs=Schema([TensorSpec(tensor, (-1, classes))]),
            ),
            pip_requirements=[f"{name}=={_public_version(name)}" for name in ("mlflow", "torch")],
        )


def _key(name: str) -> str:
    """A metric key of the letters that MLflow takes."""
    return re.sub(r"[^\w.:/ -]", "_", name, flags=re.ASCII)


@contextlib.contextmanager
def start(
    *,
    name: str,
    description: str,
    params: Mapping[str, str],
    tags: Mapping[str, object],
    experiment: str | None = None,
    parent: Run | None = None,
) -> Iterator[Run]:
    """Open a run, and close it as FINISHED, FAILED or, when interrupted, KILLED.

    Inside ``mlflow run`` it is the run that MLflow made, whose parameters are left as they
    are. Elsewhere it is a new one, in ``experiment`` or else in the one that MLflow's own
    environment variables name or else in ``initflow``; where a run is open already, it is
    nested in that, and in the experiment of ``parent`` where one is given. What MLflow or its
    store refuses is raised as :class:`TrackingError`.
    """
    outer = mlflow.active_run()
    run = None
    try:
        with _translated():
            where = parent.experiment_id if parent else None
            run = _open(name, experiment, where, params, {**tags, DESCRIPTION: description})
        yield run
        with _translated():
            mlflow.end_run("FINISHED")
    except BaseException as error:
        active = mlflow.active_run()
        own = active if active and not (outer and outer.info.run_id == active.info.run_id) else None
        # MLflow has forgotten a run whose closing was cut off, but the run is still open.
        opened = own.info.run_id if own else run.id if run else None
        if opened:
            interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
            status = "KILLED" if interrupted else "FAILED"
            if interrupted:  # a statement that was cut off locks SQLite as long as its frame lives
                traceback.clear_frames(error.__traceback__)
            with contextlib.suppress(*FAILURES):  # the error at hand is the one to tell
                if own:
                    mlflow.end_run(status)
                else:
                    mlflow.MlflowClient().set_terminated(opened, status)
            if interrupted:
                error.add_note(f"what was measured so far is in run {opened}")
        raise


def active() -> Run | None:
    """The run that is open in this thread, if one is."""
    run = mlflow.active_run()
    return Run(run.info.run_id, run.info.experiment_id, ()) if run else None


def _open(
    name: str,
    experiment: str | None,
    experiment_id: str | None,
    params: Mapping[str, str],
    tags: Mapping[str, object],
) -> Run:
    launched = os.environ.get("MLFLOW_RUN_ID")
    if experiment is not None and not experiment.strip():
        raise SettingError(f"experiment must be a name, not '{experiment}'")
    if launched and experiment:
        raise SettingError(
            f"experiment '{experiment}' cannot be chosen inside mlflow run, which has made the run "
            "already; give mlflow run --experiment-name instead"
        )
    if launched:
        status = mlflow.MlflowClient().get_run(launched).info.status
        if status not in ("RUNNING", "SCHEDULED"):
            raise SettingError(
                f"MLFLOW_RUN_ID must name a run that is still open, not '{launched}', "
                f"which is {status}"
            )
        active = mlflow.start_run()
    else:
        active = mlflow.start_run(
            run_name=name,
            experiment_id=experiment_id or _experiment_id(experiment),
            nested=mlflow.active_run() is not None,
        )
    there = active.data.params
    mlflow.log_params({key: value for key, value in params.items() if key not in there})
    mlflow.set_tags(dict(tags))
    launcher: tuple[str, ...] = ()
    if launched:
        manager = active.data.tags.get("mlflow.project.env", "local")
        experiment = mlflow.get_experiment(active.info.experiment_id).name
        launcher = ("--env-manager", manager, "--experiment-name", experiment)
    return Run(active.info.run_id, active.info.experiment_id, launcher)


def _experiment_id(name: str | None) -> str:
    """The experiment to open a run in, made if it is not there.

    MLflow makes experiments, and an SQLite store, without a lock: several processes that
    start at once on an empty store would fail.
    """
    uri = mlflow.get_tracking_uri()
    with _store_lock(uri):
        client = mlflow.MlflowClient(uri)  # makes the store
        if not name and os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return os.environ["MLFLOW_EXPERIMENT_ID"]
        name = name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        found = client.get_experiment_by_name(name)
        if found:
            return str(found.experiment_id)
        try:
            return str(client.create_experiment(name))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # made by another, on a server
            if not found:
                raise
            return str(found.experiment_id)


def _store_lock(uri: str) -> contextlib.AbstractContextManager[object]:
    if not uri.startswith("sqlite:///"):
        return contextlib.nullcontext()
    store = Path(uri.removeprefix("sqlite:///"))
    store.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{store}.lock", timeout=STORE_TIMEOUT_S)


def _public_version(distribution: str) -> str:
    """The version without a local part (``+cpu``), which no package index holds."""
    return version(distribution).partition("+")[0]

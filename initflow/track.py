"""MLflow: the only module that imports it. A run is opened, written to, and always closed."""

from __future__ import annotations

import contextlib
import os
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


@dataclass(frozen=True)
class Run:
    """An open MLflow run; every call is one request, or one batch of them."""

    id: str
    experiment_id: str

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        mlflow.log_metrics(dict(values), step=step)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        mlflow.set_tags(dict(tags))

    def describe(self, text: str) -> None:
        """Set the description, Markdown, that MLflow's page shows above all else."""
        mlflow.set_tag("mlflow.note.content", text)

    def log_figure(self, name: str, figure: Figure) -> None:
        mlflow.log_figure(figure, f"{name}.png", save_kwargs={"dpi": figure.dpi})

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


@contextlib.contextmanager
def start(
    *,
    name: str,
    description: str,
    params: Mapping[str, str],
    tags: Mapping[str, object],
    experiment: str | None = None,
) -> Iterator[Run]:
    """Open a run, and close it as FINISHED, FAILED or, when interrupted, KILLED.

    Inside ``mlflow run`` it is the run that MLflow made, whose parameters are left as they
    are. Elsewhere it is a new one, in ``experiment`` or else in the one that MLflow's own
    environment variables name or else in ``initflow``. What MLflow or its store
    refuses is raised as :class:`TrackingError`.
    """
    resumed = os.environ.get("MLFLOW_RUN_ID")
    if resumed and experiment:
        raise SettingError(
            f"experiment '{experiment}' cannot be chosen inside mlflow run, which has made the run "
            "already; give mlflow run --experiment-name instead"
        )
    try:
        if resumed:
            active = mlflow.start_run()
        else:
            active = mlflow.start_run(run_name=name, experiment_id=_experiment_id(experiment))
        try:
            there = active.data.params
            mlflow.log_params({key: value for key, value in params.items() if key not in there})
            mlflow.set_tags({**tags, "mlflow.note.content": description})
            yield Run(active.info.run_id, active.info.experiment_id)
        except (KeyboardInterrupt, SystemExit) as interruption:
            mlflow.end_run("KILLED")
            interruption.add_note(f"what was measured so far is in run {active.info.run_id}")
            raise
        except BaseException:
            mlflow.end_run("FAILED")
            raise
        mlflow.end_run("FINISHED")
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise TrackingError(f"MLflow at '{mlflow.get_tracking_uri()}' failed: {reason}") from error


def _experiment_id(name: str | None) -> str | None:
    """The experiment to open a run in, made if it is not there; None for MLflow's own choice.

    MLflow makes experiments, and an SQLite store, without a lock: several processes that
    start at once on an empty store would fail.
    """
    uri = mlflow.get_tracking_uri()
    with _store_lock(uri):
        client = mlflow.MlflowClient(uri)  # makes the store
        if not name and {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            return None
        name = name or EXPERIMENT
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

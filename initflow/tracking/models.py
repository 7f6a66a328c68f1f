"""A trained network as an MLflow model: exported, saved with what loads it, and found again."""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path

import mlflow
import mlflow.pyfunc
import numpy as np
import torch
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric, Run
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.tracking.context.registry import resolve_tags
from mlflow.types import Schema, TensorSpec
from safetensors.torch import load as tensors_of
from torch import nn

from initflow.initializers.activations import ACTIVATIONS
from initflow.tracking import served_model
from initflow.tracking.connection import impatient
from initflow.tracking.outbox import Entry, Known
from initflow.training import model, modules
from initflow.training.splits import PIXELS

READY = LoggedModelStatus.READY
LOADER = "initflow_model"  # the module of a logged model by which MLflow loads it


def log(client: mlflow.MlflowClient, entry: Entry) -> Known:
    """As ``mlflow.pytorch.log_model`` does it, but going on where it was cut off."""
    values, run = entry.values, client.get_run(entry.run)
    found = logged(client, run) if entry.is_again else []
    for twin in found[1:]:  # of whose making the answer was lost
        client.delete_logged_model(twin.model_id)
    if found:
        made = found[0]
    else:
        where, tags, params = run.info.experiment_id, resolve_tags(), run.data.params
        with impatient(retries=0):  # or MLflow makes a second one where an answer was lost
            made = client.create_logged_model(where, "model", entry.run, tags, params)
    if made.status != READY:
        with tempfile.TemporaryDirectory() as folder:
            _save_model(entry, made, Path(folder, "model"))
            client.log_model_artifacts(made.model_id, str(Path(folder, "model")))
        client.finalize_logged_model(made.model_id, READY)
    outputs = run.outputs.model_outputs if run.outputs else []
    if made.model_id not in {output.model_id for output in outputs}:
        client.log_outputs(entry.run, [LoggedModelOutput(made.model_id, values["step"])])
    if not made.metrics:
        metrics = [  # the run's at this step
            Metric(m.key, m.value, m.timestamp, m.step, model_id=made.model_id)
            for key in run.data.metrics
            for m in client.get_metric_history(entry.run, key)
            if m.step == values["step"]
        ]
        client.log_batch(entry.run, metrics=metrics)
    return {values["key"]: str(made.model_id)}


def logged(client: mlflow.MlflowClient, run: Run) -> list[LoggedModel]:
    condition = f"source_run_id = '{run.info.run_id}'"
    return list(client.search_logged_models([run.info.experiment_id], condition))


def _module(entry: Entry) -> nn.Module:
    """A feed-forward network of its tensors, or what was exported of any other."""
    values = entry.values
    if "activation" not in values:
        return torch.export.load(io.BytesIO(entry.content)).module()
    return model.to_module(
        tensors_of(entry.content),
        ACTIVATIONS[values["activation"]],
        mean=values["mean"],
        std=values["std"],
    )


def _save_model(entry: Entry, made: LoggedModel, folder: Path) -> None:
    """(n, pixels) numbers in, (n, classes) float32 logits out.

    The signature states no input, because MLflow would refuse all but one type of number, and each
    list; :mod:`initflow.tracking.served_model` says what is taken. The requirements are stated,
    because guessing them takes MLflow 12 to 17 s.
    """
    module, pixels = _module(entry), entry.values["pixels"]
    example = np.zeros((2, pixels), dtype=np.float32)  # a batch of 1 would fix the size at 1
    with torch.no_grad():
        classes = module(torch.from_numpy(example)).shape[1]
    saved = Model(
        made.artifact_location,
        run_id=entry.run,
        model_uuid=made.model_id,
        model_id=made.model_id,
        metadata={
            "input": f"{entry.values.get('takes', PIXELS)}, as numbers of shape (n, {pixels})",
            served_model.PIXELS: pixels,
        },
    )
    number = np.dtype(np.float32)
    inputs, outputs = (Schema([TensorSpec(number, (-1, n))]) for n in (pixels, classes))
    loader = folder.parent / f"{LOADER}.py"
    shutil.copyfile(served_model.__file__, loader)
    with modules.exporting():
        mlflow.pytorch.save_model(  # loaded here: MLflow imports Lightning with it, if it is there
            module,
            folder,
            mlflow_model=saved,
            code_paths=[str(loader)],
            input_example=example,
            signature=ModelSignature(inputs, outputs),  # as the format pt2 asks
            # Without a local part (+cpu), which no package index holds.
            pip_requirements=[
                f"{lib.__name__}=={lib.__version__.partition('+')[0]}" for lib in (mlflow, torch)
            ],
        )
    saved.signature = ModelSignature(outputs=outputs)
    saved.flavors[mlflow.pyfunc.FLAVOR_NAME][mlflow.pyfunc.MAIN] = LOADER
    saved.save(str(folder / MLMODEL_FILE_NAME))

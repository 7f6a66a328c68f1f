"""A trained network as an MLflow model: saved with what loads it, and found again."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import mlflow
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric, Run
from mlflow.tracking.context.registry import resolve_tags

from initflow.tracking.connection import impatient
from initflow.tracking.logged_models import artifacts, model_files
from initflow.tracking.outbox import Entry, Known

READY = LoggedModelStatus.READY


def log(
    client: mlflow.MlflowClient, entry: Entry, params: Mapping[str, str] | None = None
) -> Known:
    """As ``mlflow.pytorch.log_model`` does it, but going on where it was cut off.

    The model's parameters are ``params`` or else those that its run has.
    """
    values, run = entry.values, client.get_run(entry.run)
    found = logged(client, run) if entry.is_again else []
    for twin in found[1:]:  # of whose making the answer was lost
        client.delete_logged_model(twin.model_id)
    files = model_files.of(entry) if not found or found[0].status != READY else None
    params = run.data.params if params is None else params
    made = found[0] if found else _made(client, run.info.experiment_id, entry, params)
    if files:
        _finish(client, made, files, entry.run)
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


def log_new(
    client: mlflow.MlflowClient, entry: Entry, experiment_id: str, params: Mapping[str, str]
) -> Known:
    """The same of a run that was made just now, with these ``params`` and no metrics yet.

    Nothing is read for it.
    """
    files = model_files.of(entry)
    made = _made(client, experiment_id, entry, params)
    _finish(client, made, files, entry.run)
    client.log_outputs(entry.run, [LoggedModelOutput(made.model_id, entry.values["step"])])
    return {entry.values["key"]: str(made.model_id)}


def logged(client: mlflow.MlflowClient, run: Run) -> list[LoggedModel]:
    condition = f"source_run_id = '{run.info.run_id}'"
    return list(client.search_logged_models([run.info.experiment_id], condition))


_tags = functools.cache(resolve_tags)  # of the user and the source


def _made(
    client: mlflow.MlflowClient, experiment_id: str, entry: Entry, params: Mapping[str, str]
) -> LoggedModel:
    with impatient(retries=0):  # or MLflow makes a second one where an answer was lost
        return client.create_logged_model(experiment_id, "model", entry.run, _tags(), dict(params))


def _finish(
    client: mlflow.MlflowClient, made: LoggedModel, files: model_files.Files, run: str
) -> None:
    place, model_id = str(made.artifact_location), str(made.model_id)
    content = files.of(place, model_id, run)
    upload = functools.partial(client.log_model_artifacts, model_id)
    artifacts.put(str(client.tracking_uri), place, content, upload)
    client.finalize_logged_model(model_id, READY)

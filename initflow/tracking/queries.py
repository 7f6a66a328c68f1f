"""What MLflow keeps of a run, read back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from mlflow.exceptions import MlflowException

from initflow.errors import TrackingError
from initflow.tracking import connection, delivery, outbox
from initflow.tracking.runs import reading


class Kept(NamedTuple):
    """A run as MLflow keeps it: ``lifecycle`` is active or deleted."""

    id: str
    experiment_id: str
    status: str
    lifecycle: str
    tags: Mapping[str, str]
    params: Mapping[str, str]


def read_run(run_id: str) -> Kept | None:
    """The run with this id, also a deleted one; None where there is none.

    Of a run whose ``run_id`` is a key, as its id was not known then, it has the id. A store that
    is not there is not made.
    """
    if not connection.is_there(connection.uri()):
        return None
    with reading():
        client = connection.client()
        try:
            known = delivery.looked_up(client, run_id) if run_id.startswith(outbox.KEY) else run_id
            found = client.get_run(known)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
    info, its = found.info, found.data
    return Kept(
        info.run_id, info.experiment_id, info.status, info.lifecycle_stage, its.tags, its.params
    )


def read_history(run_id: str, keys: Iterable[str]) -> dict[str, list[tuple[int, float]]]:
    """The (step, value) pairs of those metrics that the run has."""
    client = connection.client()
    with reading():
        found = {key: client.get_metric_history(run_id, key) for key in keys}
    return {
        key: sorted((m.step, m.value) for m in points) for key, points in found.items() if points
    }


def read_artifact(run_id: str, name: str, limit: int) -> bytes | None:
    """The content of the run's file ``name``; None where there is none.

    One of more than ``limit`` bytes is a :class:`TrackingError`.
    """
    client = connection.client()
    with reading(), tempfile.TemporaryDirectory() as folder:
        sizes = {file.path: file.file_size for file in client.list_artifacts(run_id)}
        if name not in sizes:
            return None
        if (sizes[name] or 0) > limit:
            raise TrackingError(
                f"{name} of run {run_id} has {sizes[name]:,} bytes, and may have {limit:,}"
            )
        return Path(client.download_artifacts(run_id, name, folder)).read_bytes()

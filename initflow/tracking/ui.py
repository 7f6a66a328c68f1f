"""MLflow's page: where it is, what it shows first, and serving it of a local store."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import mlflow

from initflow.core.paths import store_file
from initflow.tracking import connection, mlflow_page
from initflow.tracking.outages import translated
from initflow.tracking.runs import close_left_open

HOST, PORT = "127.0.0.1", 5000  # where `initflow ui` serves a local store's page, by default


def server(port: int = PORT) -> str:
    """The address of MLflow's page: the tracking server's or, of a local store, our own."""
    return connection.uri() if connection.is_served() else f"http://{HOST}:{port}"


def page(port: int) -> str:
    """The address of the saved view of the last comparison or, without one, of all experiments."""
    if connection.is_there():
        close_left_open()
    address = mlflow_page.EXPERIMENTS
    with translated():
        views = [
            (made_at, experiment.experiment_id, key.removeprefix(mlflow_page.VIEW))
            for experiment in connection.client().search_experiments()
            for key, value in experiment.tags.items()
            if key.startswith(mlflow_page.VIEW) and (made_at := mlflow_page.made_at(value))
        ]
        if views:
            address = mlflow_page.runs_address(*max(views)[1:])
        return mlflow_page.absolute(server(port), address)


def serve(port: int) -> int:
    """Serve MLflow's page of a local store on this machine alone, to the end; its exit code.

    By one process, without those that judge language models: it is up in a third of the time.
    """
    uri = mlflow.get_tracking_uri()
    store = store_file(uri)
    folder = store.parent if store else Path()
    options = {
        "--host": HOST,
        "--port": str(port),
        "--workers": "1",
        "--uvicorn-opts": "--log-level warning",
        "--backend-store-uri": uri,
        "--default-artifact-root": str(folder.resolve() / "mlruns"),
    }
    command = [sys.executable, "-m", "mlflow", "server", *itertools.chain(*options.items())]
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ}
    with subprocess.Popen(command, env=environment) as process:  # noqa: S603 - our own arguments
        try:
            return process.wait()
        finally:  # on Ctrl-C Popen itself would not wait, and leave the page there for a moment
            process.terminate()
            process.wait()

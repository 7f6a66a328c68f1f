"""What writing a trained network costs: ``python -m bench.logging sqlite`` or ``server``.

Prints as JSON the milliseconds of a nested run with all it carries, in turn with the usual calls of
MLflow's client for the same things, and the seconds of the first model's export, with no cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import torch
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset

from bench.training import CONFIG
from initflow.core import machine
from initflow.diagnostics.record import Record, start, train_together
from initflow.experiments import network_run
from initflow.experiments.replay import provenance
from initflow.initializers.activations import ACTIVATIONS
from initflow.tracking import runs
from initflow.training import cache, model
from initflow.training.splits import Splits

RUNS = 7  # on each side, after one that is not counted
RESOLVED = machine.Resolved("cpu", 1)


def trained(splits: Splits) -> Record:
    """The tutorial's network, its signals measured."""
    record = start(CONFIG, cache.scheme(CONFIG.init, CONFIG.plugins_dir), splits)
    train_together([record], splits)
    return record


def ours(parent: runs.Run, record: Record, splits: Splits) -> None:
    """A run below ``parent``, as a comparison writes it."""
    network_run.log_network(parent, record, splits, name="a", resolved=RESOLVED, tags={})


def usual(record: Record, splits: Splits) -> None:
    """The same by MLflow's fluent calls; with requirements, which it would guess for seconds."""
    import mlflow.pytorch

    tags = network_run.start_tags(record.scheme, record.initial, splits)
    with mlflow.start_run(nested=True, run_name="a"), tempfile.TemporaryDirectory() as folder:
        mlflow.set_tags({**tags, **network_run.result_tags(record)})
        mlflow.log_params(record.config.as_text() | RESOLVED.as_text())
        source = CodeDatasetSource(tags={"source": splits.source})
        data = MetaDataset(  # type: ignore[abstract]
            source, name=splits.name, digest=splits.digest[:32]
        )
        mlflow.log_input(data)
        for step in sorted({step for points in record.history.values() for step, _ in points}):
            values = {
                name: value
                for name, points in record.history.items()
                for at, value in points
                if at == step
            }
            mlflow.log_metrics(values, step=step)
        evidence = provenance.of(record, splits, RESOLVED)
        for name, content in provenance.files(evidence).items():
            Path(folder, name).write_bytes(content)
        mlflow.log_artifacts(folder)
        module = model.to_module(
            record.trained, ACTIVATIONS[CONFIG.activation], mean=splits.mean, std=splits.std
        )
        mlflow.pytorch.log_model(
            module,
            name="model",
            input_example=np.zeros((2, splits.pixels), dtype=np.float32),
            pip_requirements=[f"mlflow=={mlflow.__version__}", f"torch=={torch.__version__}"],
        )


@contextlib.contextmanager
def server(folder: str) -> Iterator[str]:
    """The address of MLflow's own, on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    files = ["--artifacts-destination", f"{folder}/files"]
    process = subprocess.Popen(
        [*command, *store, *files],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait()


def measured(uri: str, *, compared: bool) -> dict[str, list[float] | float]:
    mlflow.set_tracking_uri(uri)
    splits = cache.splits(CONFIG)
    record = trained(splits)
    found: dict[str, list[float]] = {"ours": [], "usual": []}
    with runs.start(name="bench", description="", params={}, tags={}) as parent:
        started = time.perf_counter()
        ours(parent, record, splits)
        first = time.perf_counter() - started
        with mlflow.start_run():
            for _ in range(RUNS + 1):
                started = time.perf_counter()
                ours(parent, record, splits)
                found["ours"].append(1000 * (time.perf_counter() - started))
                if compared:
                    started = time.perf_counter()
                    usual(record, splits)
                    found["usual"].append(1000 * (time.perf_counter() - started))
    return {name: values[1:] for name, values in found.items()} | {"first": first}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"XDG_CACHE_HOME": f"{folder}/cache", "INITFLOW_OUTBOX": f"{folder}/outbox"}
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        torch.set_num_threads(1)
        if sys.argv[1] == "sqlite":
            found = measured(f"sqlite:///{folder}/mlflow.db", compared=False)
        else:
            with server(folder) as address:
                found = measured(address, compared=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""What a training cannot do without, timed in one fresh process: ``python -m bench.parts FOLDER``.

It is what a script takes that does nothing else than ``initflow train`` and is written for that
alone: it imports torch, MLflow and matplotlib, reads the data, trains, draws, and opens a run of
MLflow in the store of ``FOLDER`` for what came of it. Figures are drawn, and the model's files
made, by our own functions, as MLflow's take longer. Prints the seconds of CPU of each as JSON: with
one thread, these are not what else runs on the machine.
"""

import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

gc.set_threshold(100_000, 50, 100)  # as the command has it: else importing takes longer
clock = [time.process_time()]

import torch  # noqa: E402

clock.append(time.process_time())

import mlflow  # noqa: E402

clock.append(time.process_time())

from matplotlib.figure import Figure  # noqa: E402

Figure()
clock.append(time.process_time())

STORE = f"sqlite:///{Path(sys.argv[1]).resolve()}/mlflow.db"
mlflow.MlflowClient(STORE).search_experiments(max_results=1)  # with what it imports for that
clock.append(time.process_time())

from mlflow.entities import Metric  # noqa: E402
from mlflow.tracking.fluent import log_artifacts, set_experiment, start_run  # noqa: E402

from bench.training import CONFIG, ours, start_of  # noqa: E402
from initflow.core.machine import Resolved  # noqa: E402
from initflow.diagnostics import record as records  # noqa: E402
from initflow.experiments import network_run  # noqa: E402
from initflow.experiments.replay import provenance  # noqa: E402
from initflow.reporting.drawing import png  # noqa: E402
from initflow.tracking import runs  # noqa: E402
from initflow.training import cache, datasets  # noqa: E402

seconds = {
    what: end - begin
    for what, begin, end in zip(
        ("Python", "torch", "MLflow", "matplotlib", "connect"), [0.0, *clock], clock, strict=False
    )
}


@contextmanager
def timed(what: str) -> Iterator[None]:
    started = time.process_time()
    yield
    seconds[what] = time.process_time() - started


def log(run: str, record: records.Record, files: dict[str, bytes]) -> None:
    """Into the run that is open, by MLflow's own calls."""
    client = mlflow.MlflowClient()
    mlflow.log_params(CONFIG.as_text())
    mlflow.set_tags(network_run.result_tags(record))
    now = time.time_ns() // 1_000_000
    for step in sorted({step for points in record.history.values() for step, _ in points}):
        metrics = [
            Metric(key, value, now, step)
            for key, points in record.history.items()
            for at, value in points
            if at == step
        ]
        client.log_batch(run, metrics=metrics)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        log_artifacts(folder)


def main() -> None:
    torch.set_num_threads(1)
    with timed("read"):
        splits = datasets.load(CONFIG)
    initial = start_of(splits)
    with timed("train"):
        ours(initial, splits)
    record = records.start(CONFIG, cache.scheme(CONFIG.init, CONFIG.plugins_dir), splits)
    records.train_together([record], splits)
    evidence = provenance.files(provenance.of(record, splits, Resolved("cpu", 1)))
    with timed("draw"):
        files = {f"{name}.png": png(draw()) for name, draw in network_run.drawings(record).items()}
    mlflow.set_tracking_uri(STORE)
    with timed("log"):
        set_experiment("parts")
        with start_run() as run:
            log(run.info.run_id, record, files | evidence)
            runs.Run(run.info.run_id, run.info.experiment_id).log_model(
                record.trained,
                CONFIG.activation,
                mean=splits.mean,
                std=splits.std,
                pixels=splits.pixels,
                step=record.step,
            )
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()

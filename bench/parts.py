"""What `initflow train` cannot do without, timed in one fresh process: ``python -m bench.parts``.

Importing torch and mlflow, training, exporting the model into an MLflow run. Prints the
seconds of each as JSON.
"""

import json
import sys
import time
from pathlib import Path

clock = [time.perf_counter()]

import torch  # noqa: E402, F401

clock.append(time.perf_counter())

import mlflow.pytorch  # noqa: E402

clock.append(time.perf_counter())

from bench.training import CONFIG, ours, start_of  # noqa: E402
from initflow.tracking import runs  # noqa: E402
from initflow.training import datasets  # noqa: E402


def main() -> None:
    splits = datasets.load(CONFIG)
    initial = start_of(splits)
    training, _ = ours(initial, splits)
    mlflow.set_tracking_uri(f"sqlite:///{Path(sys.argv[1]).resolve()}/mlflow.db")
    with runs.start(name="parts", description="", params={}, tags={}) as run:
        started = time.perf_counter()
        run.log_model(
            initial.state(), CONFIG.activation, mean=0.0, std=1.0, pixels=splits.pixels, step=0
        )
        exporting = time.perf_counter() - started
    parts = {
        "import torch": clock[1] - clock[0],
        "import mlflow": clock[2] - clock[1],
        "train": training,
        "export": exporting,
    }
    print(json.dumps(parts))


if __name__ == "__main__":
    main()

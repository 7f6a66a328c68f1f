"""How a study's storage and sampler go on as it grows: ``python -m bench.scaling [STORAGE]``.

Trials without training: as many evaluations as five epochs of MNIST have, of made-up accuracies.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from sqlalchemy import Engine, event

from initflow.experiments.tuning.running import RunningTrials
from initflow.experiments.tuning.searches import Search
from initflow.experiments.tuning.storages import is_database, shown
from initflow.experiments.tuning.studies import Study

TRIALS = 1_000
BATCH = 5
STEPS = range(500, 3_001, 500)
TOLD = (50, 100, 200, 500, TRIALS)  # trials after which the times of the last ones are told


def main(storage: str) -> None:
    search = Search(
        storage=storage,
        name=f"scaling {time.time()}",
        lr=(1e-3, 1.0),
        gamma=(0.5, 1.0),
        sampler="tpe",
        pruner="median",
        seed=0,
        updates=STEPS[-1],
        eval_every=STEPS.step,
    )
    statements = 0

    def count(*_: object) -> None:
        nonlocal statements
        statements += 1

    event.listen(Engine, "after_cursor_execute", count)
    study = Study(search, {}, (0.1, 0.96))
    asking: list[float] = []
    telling: list[float] = []
    begun = time.perf_counter()
    print(f"{shown(storage)}: ms a trial, medians of the last 50")
    for place in range(0, TRIALS, BATCH):
        started = time.perf_counter()
        asked = study.ask(BATCH)
        asking += [(time.perf_counter() - started) / BATCH] * BATCH
        started = time.perf_counter()
        trying = RunningTrials(search, asked)
        for one in asked:
            accuracy = 1 - abs(one.lr - 0.2) / 2
            for step in STEPS:
                trying.report(one.number, step, accuracy * step / STEPS[-1])
                trying.should_prune(one.number)
            trying.finished(one.number, accuracy)
        telling += [(time.perf_counter() - started) / BATCH] * BATCH
        if place + BATCH in TOLD:
            ask, tell = (1e3 * statistics.median(times[-50:]) for times in (asking, telling))
            print(
                f"  at {place + BATCH:5d} trials   ask {ask:6.1f}   report, prune, tell {tell:6.1f}"
            )
    print(f"  {TRIALS / (time.perf_counter() - begun):.0f} trials a second by one process")
    if is_database(storage):
        print(f"  {statements / TRIALS:.0f} statements a trial")
    else:
        content = Path(storage).read_bytes()
        lines = content.count(b"\n")
        print(f"  {lines / TRIALS:.0f} writes and {len(content) / TRIALS:.0f} bytes a trial")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1] if sys.argv[1:] else f"{folder}/scaling.journal")

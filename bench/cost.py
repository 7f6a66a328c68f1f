"""What networks cost by their number, width, depth and seeds: ``python -m bench.cost [TABLE]``.

Each row is measured in a fresh process of one thread, by its CPU time: updates alone, with batches
of MNIST, until a row takes too long or memory does not suffice. The tables can be told by their
first words. Linux only.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from initflow.core.configurations import TrainConfig
from initflow.diagnostics import networks
from initflow.experiments.populations import stacking
from initflow.training import cache, datasets, model

LEAST, LEAST_S = 3, 1.0  # updates, and seconds of CPU, that a row is timed for
MIB = 1 << 20
LIMIT_S = 240.0  # of a row
SHARE = 0.5  # of the memory that is free, for a row


@dataclass(frozen=True)
class Row:
    """So many networks in one stack, ``width`` units in each of ``depth`` hidden layers."""

    members: int = 1
    width: int = 100
    depth: int = 1
    seeds: int = 1

    def configs(self) -> list[TrainConfig]:
        """Of each seed neighbours."""
        each = -(-self.members // self.seeds)
        first = TrainConfig(hidden=(self.width,) * self.depth)
        return [replace(first, seed=at // each) for at in range(self.members)]


WIDTHS = (16, 64, 256, 512, 1_024, 2_048)
DEPTHS = (1, 2, 5, 10, 20, 50)
TABLES = {
    "seeds of 20 networks": [Row(20, seeds=seeds) for seeds in (1, 2, 5, 10, 20)],
    "width alone": [Row(width=width) for width in WIDTHS],
    "width, ten networks": [Row(10, width=width) for width in WIDTHS],
    "depth alone": [Row(depth=depth) for depth in DEPTHS],
    "depth, ten networks": [Row(10, depth=depth) for depth in DEPTHS],
    "networks, each with a seed": [
        Row(n, seeds=n) for n in (1, 4, 14, 50, 200, 1_000, 4_000, 10_000)
    ],
}


def system(file: str) -> dict[str, int]:
    """The bytes that a file of /proc tells, by name: VmRSS is now, VmHWM was the most."""
    lines = (line.split() for line in Path(file).read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[2:] == ["kB"]}


def measured(row: Row) -> dict[str, float]:
    """Milliseconds an update and network, MiB beyond the data's, and how large a stack would be."""
    configs = row.configs()
    splits = cache.splits(configs[0])
    scheme = cache.scheme("he", None)
    Path("/proc/self/clear_refs").write_text("5")  # the most from now on
    before = system("/proc/self/status")["VmRSS"]
    starts = [networks.initialize(config, scheme, splits) for config in configs]
    stack = networks.Stack(
        [start for start in starts if isinstance(start, model.Parameters)],
        configs,
        [scheme] * len(configs),
        splits.train,
    )
    training = stack.trainer.train(batch_size=100, eval_every=1)
    next(training)  # before the first update
    next(training)  # with what is bound at the first
    laps: list[float] = []
    begun = time.process_time()
    while len(laps) < LEAST or time.process_time() - begun < LEAST_S:
        started = time.process_time()
        if not next(training, None):  # all its epochs are over
            break
        laps.append(time.process_time() - started)
    widths = datasets.widths(splits.pixels, configs[0].hidden, splits.classes)
    return {
        "ms": 1_000 * statistics.median(laps) / row.members,
        "mib": (system("/proc/self/status")["VmHWM"] - before) / MIB,
        "room": stacking.room(widths, 100, "cpu"),
    }


def main() -> None:
    asked = sys.argv[1] if sys.argv[1:] else ""
    if asked.startswith("{"):
        torch.set_num_threads(1)
        share = int(SHARE * system("/proc/meminfo")["MemAvailable"])
        resource.setrlimit(resource.RLIMIT_DATA, (share, share))  # or others would be killed for it
        print(json.dumps(measured(Row(**json.loads(asked)))))
        return
    for name, rows in TABLES.items():
        if not name.startswith(asked):
            continue
        print(f"{name:36s} ms of CPU an update and network   MiB   stack by default")
        for row in rows:
            command = [sys.executable, "-m", "bench.cost", json.dumps(asdict(row))]
            try:
                done = subprocess.run(
                    command, check=False, capture_output=True, text=True, timeout=LIMIT_S
                )
            except subprocess.TimeoutExpired:
                print(f"  {told(row)}  takes longer than {LIMIT_S:.0f} s", flush=True)
                break
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1:] or [f"ended by {done.returncode}"]
                print(f"  {told(row)}  {last[0]}", flush=True)
                break
            found = json.loads(done.stdout)
            print(
                f"  {told(row)} {found['ms']:10.3f} {found['mib']:23,.0f} {found['room']:10,.0f}",
                flush=True,
            )


def told(row: Row) -> str:
    return f"{row.members:6,} of {row.depth:2} x {row.width:5,}, {row.seeds:6,} seeds"


if __name__ == "__main__":
    main()

"""All benches, one after the other, each a ratio of two sides timed in turn in this run.

The machine may be shared: read the medians and the ratios, not single seconds.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import cnn, gpu, populations, starting, study, training, watching
from initflow.initializers.finder import INITIALIZERS
from initflow.training import datasets

ROUNDS = 3
PROCESSES = 5  # in which the loop is held against its products
PLUGINS = 200


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {ROUNDS}\n")
    missed = [
        *_training(),
        *_products(),
        *_populations(),
        *_comparing(),
        *_on_gpu(),
        *_tuning(),
        *_workers(),
        *_cnn(),
        *_watching(),
        *_context(),
        *_logging(),
        *_command(),
        *_starting(),
        *_help(),
        *_listing(),
    ]
    if missed:
        sys.exit(f"not held: {', '.join(missed)}")


def _training() -> Iterator[str]:
    usual, ours, measuring, agree = zip(*training.rounds(ROUNDS), strict=True)
    print("the tutorial's training (3,000 iterations, tested every 500)")
    print(f"  DataLoader, nn.Module, torch.optim   {statistics.median(usual):6.2f} s")
    print(f"  initflow                             {statistics.median(ours):6.2f} s")
    ratios = [slow / fast for slow, fast in zip(usual, ours, strict=True)]
    print(f"  times faster                         {_spread(ratios)}   (to hold: at least 6)")
    print(f"  losses bit-identical                 {'yes' if all(agree) else 'NO'}")
    shares = [100 * share for share in measuring]
    print(f"  measuring the signals adds, %        {_spread(shares)}   (to hold: at most 5)\n")
    if statistics.median(shares) > 5:
        yield "measuring within 5 % of training"
    if statistics.median(ratios) < 6:
        yield "training 6 times faster"
    if not all(agree):
        yield "losses bit-identical"


def _products() -> Iterator[str]:
    """In processes of their own, as the threads of one may lie badly."""
    for threads in sorted({torch.get_num_threads(), 1}, reverse=True):
        found = []
        for _ in range(PROCESSES):
            done = subprocess.run(
                [sys.executable, "-m", "bench.products", str(threads)],
                env=_environment(),
                check=True,
                capture_output=True,
                text=True,
            )
            found.append(json.loads(done.stdout))
        print(f"the updates of the tutorial's training, {threads} threads, {PROCESSES} processes")
        alone = [one["products"] for one in found]
        print(f"  a network's matrix products alone    {_spread(alone)} s")
        for name, side, bound in (("alone", "alone", 2.0), ("in a stack of ten", "stacked", 1.5)):
            ratios = [one[side] / one["products"] for one in found]
            print(f"  {name:25s} {statistics.median(one[side] for one in found):6.2f} s each")
            held = f"(to hold: at most {bound})"
            print(f"  times as long as these               {_spread(ratios)}   {held}")
            if statistics.median(ratios) > bound:
                yield f"training {name} within {bound} of its products, {threads} threads"
    print()


def _populations() -> Iterator[str]:
    usual, alone, stacked = map(list, zip(*populations.rounds(), strict=True))
    print(
        "the tutorial's five networks under ten seeds, in stacks, each against the DataLoader loop"
    )
    for name, ours, bound in (("alone", alone, 9), ("in stacks of fifty in all", stacked, 12)):
        ratios = [slow / fast for slow, fast in zip(usual, ours, strict=True)]
        print(f"  {name:25s} {statistics.median(ours):6.2f} s each")
        held = f"(to hold: at least {bound})"
        print(f"  times faster                         {_spread(ratios)}   {held}")
        if statistics.median(ratios) < bound:
            yield f"training {name} {bound} times faster"
    print()


def _comparing() -> Iterator[str]:
    found = populations.whole(_environment())
    script = statistics.median(found.scripts)
    ratio = script * found.networks / found.command
    share = found.logging / found.training
    print(f"initflow compare, {found.networks} networks, all of it {found.command:10.1f} s")
    print(f"  the usual script, imports and all    {_spread(found.scripts)} s each")
    print(f"  times faster than so many of them    {ratio:5.2f}   (to hold: at least 12)")
    print(f"  logging / training                   {share:5.2f}   (to hold: less than 0.33)\n")
    if ratio < 12:
        yield "compare 12 times faster than scripts"
    if share >= 1 / 3:
        yield "logging less than a third of training"


def _on_gpu() -> Iterator[str]:
    """In seconds, which are of the device that is named; without one there is nothing to hold."""
    where = gpu.device()
    if where is None:
        print("on a GPU: PyTorch finds no CUDA device here, so nothing was measured on one\n")
        return
    print(f"many trainings on a GPU, {torch.cuda.get_device_name(where)}")
    for found in gpu.rounds(datasets.load(training.CONFIG), where):
        name, bound = f"{found.networks:,} of the tutorial's", gpu.OF_LOOP[found.networks]
        print(f"  {name:36s} {found.training:6.1f} s   (to hold: at most {bound:g})")
        print(f"  {'making their weights, on the CPU':36s} {found.making:6.1f} s")
        if found.training > bound:
            yield f"{found.networks:,} trainings on a GPU within {bound:g} s"
    whole = gpu.compared(_environment())
    name, bound = f"initflow compare, {whole.networks:,} networks", gpu.OF_COMMAND
    print(f"  {name:36s} {whole.command:6.1f} s   (to hold: at most {bound:g})")
    print(
        f"  of which training and logging        {whole.training:.1f} and {whole.logging:.1f} s\n"
    )
    if whole.command > bound:
        yield f"compare with {whole.networks:,} networks on a GPU within {bound:g} s"


def _tuning() -> Iterator[str]:
    environment = _environment()
    usual = [study.usual()]
    ours = study.ours(environment, study.TRIALS)
    usual.append(study.usual())
    ratio = statistics.mean(usual) * ours.trials / ours.seconds
    share = (ours.studying + ours.logging) / ours.seconds
    print(f"initflow tune, {ours.trials} trials of 5 epochs, none pruned {ours.seconds:10.1f} s")
    print(f"  the usual way                        {_spread(usual)} s a trial")
    print(f"  times more trials a minute           {ratio:5.2f}   (to hold: at least 10)")
    print(f"  Optuna and MLflow / whole            {share:5.2f}   (to hold: at most 0.15)\n")
    if ratio < 10:
        yield "10 times more trials a minute"
    if share > 0.15:
        yield "Optuna and MLflow within 15 % of a study"


def _workers() -> Iterator[str]:
    """The start of the workers included."""
    environment = _environment()
    one = study.ours(environment, study.OF_WORKERS, "--threads", "1")
    two = study.ours(environment, study.OF_WORKERS, "--workers", "2")
    ratio = one.seconds / two.seconds
    print(f"{study.OF_WORKERS} trials by one worker of one thread  {one.seconds:10.1f} s")
    print(f"  by two of them                       {two.seconds:10.1f} s")
    print(f"  times more trials a minute           {ratio:5.2f}   (to hold: at least 1.6)\n")
    if ratio < 1.6:
        yield "two workers 1.6 times one"


def _cnn() -> Iterator[str]:
    found = cnn.measured(_environment())
    scripts, own = cnn.SEEDS * found.script / found.command, found.command / cnn.SEEDS
    print(f"initflow compare of a CNN, {cnn.SEEDS} networks, two workers {found.command:8.1f} s")
    print(f"  a script with a DataLoader           {found.script:6.2f} s each")
    most = found.script / found.kernels  # no training is faster than its kernels
    print(f"  times faster than so many of them    {scripts:5.2f}   (at most {most:.2f})")
    print(f"  the kernels alone                    {found.kernels:6.2f} s each")
    ratio = own / found.kernels
    print(f"  times as long as these               {ratio:5.2f}   (to hold: at most 1.3)")
    print(f"initflow tune of it, two workers       {found.trial:6.2f} s a trial")
    print(f"  a loop with a DataLoader             {found.loop:6.2f} s")
    print(f"  times more trials a minute           {found.loop / found.trial:5.2f}\n")
    if scripts < most / 1.3:
        yield f"comparing a CNN {most / 1.3:.2f} times faster than scripts"
    if ratio > 1.3:
        yield "comparing a CNN within 1.3 of its kernels"


def _watching() -> Iterator[str]:
    print(f"watching any model, every {watching.EVERY} steps, against the same training unwatched")
    for name, blocks in watching.rounds(ROUNDS).items():
        watched = [block.watched / block.bare for block in blocks]
        hooked = [block.histograms / block.bare for block in blocks]
        print(f"  {name:20s} initflow.watch  {_spread(watched)}   (to hold: at most 1.03)")
        print(f"  {'':20s} histograms      {_spread(hooked)}   (by plain hooks, every step)")
        if statistics.median(watched) > 1.03:
            yield f"watching a {name} within 1.03"
    print()


def _context() -> Iterator[str]:
    environment = _environment()
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # the first use is to compile only once
    found = []
    for _ in range(ROUNDS):
        done = subprocess.run(
            [sys.executable, "-m", "bench.context"],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        found.append(json.loads(done.stdout))
    first = [1000 * one["first"] for one in found]
    without, added = ([1000 * s for one in found for s in one[of]] for of in ("without", "added"))
    print("the environment's tags on a run that the user opens, with and without in turn")
    print(f"  mlflow.start_run without, ms         {_spread(without)}")
    print(f"  the tags add, ms                     {_spread(added)}   (to hold: at most 5)")
    print(f"  telling them for the first time, ms  {_spread(first)}   (to hold: at most 5)\n")
    if max(statistics.median(added), statistics.median(first)) > 5:
        yield "the environment's tags within 5 ms a run"


def _logging() -> Iterator[str]:
    found = {}
    for where in ("sqlite", "server"):
        command = [sys.executable, "-m", "bench.logging", where]
        done = subprocess.run(
            command, env=_environment(), check=True, capture_output=True, text=True
        )
        found[where] = json.loads(done.stdout.splitlines()[-1])
    own, pairs = found["sqlite"]["ours"], found["server"]
    ratios = [ours / usual for ours, usual in zip(pairs["ours"], pairs["usual"], strict=True)]
    first = found["sqlite"]["first"]
    print("a nested run with its metrics, files and model")
    print(f"  in SQLite, ms                        {_spread(own)}   (to hold: at most 40)")
    print(f"  by a server, ms                      {_spread(pairs['ours'])}")
    print(f"  against the client's usual calls     {_spread(ratios)}   (to hold: at most 0.25)")
    print(f"  the first, exported, s               {first:5.2f}   (to hold: at most 1.5)\n")
    if statistics.median(own) > 40:
        yield "a nested run within 40 ms"
    if statistics.median(ratios) > 0.25:
        yield "a nested run by a server within a quarter of the usual calls"
    if first > 1.5:
        yield "the first export within 1.5 s"


def _command() -> Iterator[str]:
    """By what its CPU takes, with one thread: that is little disturbed by what else runs."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        command = ("initflow", "train", "--threads", "1")
        _seconds(*command, cwd=folder)  # makes the store and the model's archive, once for all
        for _ in range(PROCESSES):
            before = _cpu_of_commands()
            _seconds(*command, cwd=folder)
            whole = _cpu_of_commands() - before
            parts = _printed("bench.parts", folder, cwd=folder)
            ratios.append(whole / sum(parts.values()))
            shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
            print(f"initflow train {whole:.1f} s of CPU; its unavoidable parts: {shown}")
    print(f"  whole / parts                        {_spread(ratios)}   (to hold: at most 1.15)\n")
    if statistics.median(ratios) > 1.15:
        yield "initflow train within 1.15 of its parts"


def _starting() -> Iterator[str]:
    """Each command in turn, in one store, but with no study that is there already."""
    cpu: dict[str, list[float]] = {command: [] for command in starting.SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(1 + PROCESSES):
            for command, found in cpu.items():
                done = _printed("bench.starting", command, str(time.time()), cwd=folder)
                found.append(done["cpu"])
                shutil.rmtree(Path(folder, "studies"), ignore_errors=True)
    print("s of CPU until the first update")
    for command, (_, *found) in cpu.items():  # but for those that make the store
        ratios = [one / other for one, other in zip(found, cpu["train"][1:], strict=True)]
        held = "" if command == "train" else "(to hold: at most 1.1 times that of train)"
        print(f"  initflow {command:27s} {_spread(found)}   {_spread(ratios)} {held}")
        if statistics.median(ratios) > 1.1:
            yield f"initflow {command} starting as soon as train"
    print()


def _help() -> Iterator[str]:
    seconds = [_seconds("initflow", "--help") for _ in range(5)]
    print(f"initflow --help                        {_spread(seconds)} s (to hold: under 1)")
    if statistics.median(seconds) >= 1:
        yield "initflow --help under 1 s"


def _listing() -> Iterator[str]:
    """The whole command with many plugins installed, and with none."""
    with tempfile.TemporaryDirectory() as folder:
        for n in range(PLUGINS):
            info = Path(folder) / f"plugin_{n}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Name: plugin-{n}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(
                f"[{INITIALIZERS.name}]\nscheme-{n} = plugin_{n}:fill\n"
            )
        command = ("initflow", "plugins", "list")
        pairs = [
            (_seconds(*command, PYTHONPATH=folder), _seconds(*command, cwd=folder))
            for _ in range(5)
        ]
    many, none = map(list, zip(*pairs, strict=True))
    print(f"initflow plugins list, {PLUGINS} installed   {_spread(many)} s (to hold: under 0.3)")
    print(f"{'':25s}none installed  {_spread(none)} s")
    if statistics.median(many) >= 0.3:
        yield f"listing {PLUGINS} plugins under 0.3 s"


def _seconds(*command: str, cwd: str | None = None, **more: str) -> float:
    environment = _environment() | more
    started = time.perf_counter()
    subprocess.run(command, cwd=cwd, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


def _printed(module: str, *arguments: str, cwd: str) -> dict[str, float]:
    """The JSON object that it prints."""
    command = [sys.executable, "-m", module, *arguments]
    environment = _environment() | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _cpu_of_commands() -> float:
    """Seconds of CPU that all commands have taken which were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _environment() -> dict[str, str]:
    environment = os.environ | {"INITFLOW_DATA_DIR": str(datasets.data_dir(None).resolve())}
    environment.pop("MLFLOW_TRACKING_URI", None)  # each folder gets a store of its own
    return environment


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):5.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()

"""How work is shared out: the rule as a table, what always holds of it, and who may be asked."""

import dataclasses
import itertools
import random
from concurrent.futures import Future

import pytest
import torch

from initflow.core import capacity, workers
from initflow.core.configurations import CompareConfig, TrainConfig
from initflow.experiments.populations import arrangement
from initflow.experiments.populations.arrangement import Part, choose
from initflow.training import datasets

MNIST, DIGITS, WIDE = (784, 100, 10), (64, 100, 10), (784, 1000, 10)


def part(widths, networks, together, updates=3000):
    """With batches of 100; a stack where all are together."""
    weights = [a * b for a, b in itertools.pairwise(widths)]
    products = 100 * (sum(weights) + 2 * sum(weights) - weights[0])
    is_whole = networks != together
    return Part(networks, together, updates, len(weights), products, is_whole=is_whole)


def modules(n, updates=3000):
    return [Part(1, 1, updates, 0, 0, is_module=True)] * n


@pytest.mark.parametrize(
    ("parts", "cores", "expected"),
    [
        # One training: small products are those of one thread.
        ([part(MNIST, 1, 1)], 1, (1, 1)),
        ([part(MNIST, 1, 1)], 2, (1, 2)),
        ([part(WIDE, 1, 1)], 8, (1, 8)),
        ([part(DIGITS, 1, 1, 75)], 2, (1, 1)),
        ([part(DIGITS, 1, 1, 75_000)], 8, (1, 1)),
        # Stacks: all threads in this process, but for long work, which workers share as fast.
        ([part(MNIST, 5, 5)] * 2, 2, (1, 2)),
        ([part(MNIST, 10, 10)], 2, (1, 2)),
        ([part(MNIST, 10, 10)] * 2, 2, (1, 2)),
        ([part(MNIST, 10, 10)] * 5, 2, (2, 1)),
        ([part(MNIST, 10, 10)] * 100, 16, (16, 1)),
        ([part(WIDE, 1, 1)] * 5, 2, (1, 2)),
        # One by one: a worker of one thread for each core, where there are enough of them.
        ([part(MNIST, 1, 1)] * 4, 2, (1, 2)),
        ([part(MNIST, 1, 1)] * 100, 2, (2, 1)),
        ([part(MNIST, 1, 1)] * 100, 8, (8, 1)),
        ([part(MNIST, 40, 1)] * 4, 2, (2, 1)),  # a tuning's studies, whose trials wait
        ([part(MNIST, 40, 1)], 2, (1, 2)),
        (modules(2), 2, (1, 2)),
        (modules(100), 2, (2, 1)),
        (modules(100), 16, (15, 1)),
        (modules(1), 16, (1, 16)),
        # Little work stays here, however many parts it has.
        ([part(DIGITS, 8, 8, 75)] * 5, 8, (1, 8)),
        ([part(DIGITS, 10, 10, 75)] * 100, 2, (2, 1)),
        ([], 2, (1, 2)),
    ],
)
def test_what_is_chosen(parts, cores, expected):
    """The rule of docs/performance.md, case by case."""
    assert choose(parts, cores=cores, most=1000) == expected


def test_what_was_asked_for_is_kept():
    """And the other is chosen to go with it."""
    many = [part(MNIST, 1, 1)] * 100
    assert choose(many, cores=8, most=1000, size=1) == (1, 8)
    assert choose(many, cores=8, most=1000, threads=3) == (2, 3)
    assert choose(many, cores=8, most=1000, threads=1) == (8, 1)
    assert choose(many, cores=8, most=1000, threads=64) == (1, 64)
    assert choose(many, cores=8, most=1000, size=1, threads=1) == (1, 1)


def test_workers_and_threads_are_within_what_there_is():
    """Of 300 random works: at least one each; no worker is idle, no core is taken twice."""
    at_random = random.Random(0)  # noqa: S311 - no secrets
    for _ in range(300):
        widths = at_random.choice((MNIST, DIGITS, WIDE))
        together = at_random.randint(1, 10)
        parts = [
            part(widths, at_random.randint(1, 40), together, at_random.randint(1, 5000))
            for _ in range(at_random.randint(0, 40))
        ]
        cores, most = at_random.randint(1, 70), at_random.randint(1, 20)
        size, threads = choose(parts, cores=cores, most=most)
        assert 1 <= size <= max(1, min(most, len(parts)))
        assert threads >= 1
        assert size * threads <= cores
        assert choose(parts[::-1], cores=cores, most=1)[0] == 1


def test_more_of_the_same_work_never_takes_fewer_workers():
    """As it is their start that has to be made up for."""
    sizes = [choose([part(MNIST, 1, 1)] * n, cores=4, most=4)[0] for n in range(1, 200, 4)]
    assert sizes[0] == 1
    assert sizes[-1] == 4
    assert sizes == sorted(sizes)


def test_a_part_is_counted_from_the_settings():
    """Against the products of a network written out: forward, weights, inputs; no images' own."""
    config = TrainConfig(dataset="digits", hidden="30,20", batch_size=50, epochs=2, updates=31)
    splits = datasets.load(config)
    made = Part.of(config, splits, 7, 10)
    forward = [64 * 30, 30 * 20, 20 * 10]
    expected = sum(50 * n for n in [*forward, *forward, *forward[1:]])
    assert made == Part(7, 7, 31, 3, expected)
    assert Part.of(config, splits, 7) == dataclasses.replace(made, is_whole=False)
    assert Part.of(config, splits, 7, 2) == dataclasses.replace(made, together=2)
    lstm = dataclasses.replace(config, model="lstm", hidden=(8,))
    assert Part.of(lstm, splits, 7, 10) == Part(7, 1, 31, 0, 0, is_module=True)


@pytest.mark.parametrize(
    ("sizes", "workers_", "expected"),
    [
        ([10] * 5, 1, [10] * 5),
        ([10] * 4, 2, [10] * 4),
        ([10] * 5, 2, [10] * 4 + [5, 5]),
        ([10, 10, 7], 2, [10, 10, 3, 4]),
        ([10] * 5, 4, [10] * 4 + [2, 3, 2, 3]),
        ([10] * 7, 4, [10] * 7),  # three for four: halves would not end sooner
        ([10] * 6, 4, [10] * 4 + [5] * 4),
        ([1] * 5, 2, [1] * 5),
        ([2], 8, [1, 1]),
        ([], 3, []),
    ],
)
def test_the_last_stacks_are_cut_for_workers_that_would_be_idle(sizes, workers_, expected):
    """Each network is still in one of them, in its order; parts are cut as stacks are."""
    seeds = iter(range(100))
    stacks = [[TrainConfig(seed=next(seeds)) for _ in range(size)] for size in sizes]
    cut = arrangement.evened_stacks(stacks, workers_)
    assert [len(stack) for stack in cut] == expected
    assert [config for stack in cut for config in stack] == [c for one in stacks for c in one]
    parts = arrangement.evened([part(MNIST, n, n) for n in sizes], workers_, Part.cut)
    assert [(one.networks, one.together) for one in parts] == [(n, n) for n in expected]
    studies = [part(MNIST, n + 1, 1) for n in sizes]
    assert arrangement.evened(studies, workers_, Part.cut) == studies


@pytest.fixture
def opened(monkeypatch):
    """What pools are opened with, of which none starts anything; the machine has four cores."""
    calls = []

    def worker_pool(backend, size, threads):
        calls.append((backend, size, threads))
        pool = workers.WorkerPool(size or 6, threads or 1, Future, is_here=size == 1)
        return workers.contextlib.nullcontext(pool)

    monkeypatch.setattr(workers, "worker_pool", worker_pool)
    monkeypatch.setattr(capacity, "cpus", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    return calls


LONG = [part(MNIST, 1, 1)] * 100


@pytest.mark.parametrize(
    ("settings", "device", "expected", "said"),
    [
        ({}, "cpu", ("local", 4, 1), "4 workers of 1 thread each (workers and threads: auto)"),
        ({"workers": 1}, "cpu", ("local", 1, 4), "this process, with 4 threads (threads: auto)"),
        ({"workers": 2}, "cpu", ("local", 2, 1), "2 workers of 1 thread each (threads: auto)"),
        ({"threads": 2}, "cpu", ("local", 2, 2), "2 workers of 2 threads each (workers: auto)"),
        ({"workers": 3, "threads": 5}, "cpu", ("local", 3, 5), "3 workers of 5 threads each"),
        ({}, "cuda:0", ("local", 1, 4), "this process, with 4 threads (workers and threads: auto)"),
        ({"workers": 2}, "cuda:0", ("local", 2, 2), "2 workers of 2 threads each (threads: auto)"),
        (
            {"backend": "ray"},
            "cpu",
            ("ray", None, None),
            "6 workers of 1 thread each (work",
        ),
        ({"backend": "ray", "workers": 9}, "cpu", ("ray", 9, None), "9 workers of 1 thread each"),
    ],
)
def test_a_command_gets_what_it_asks_for_or_what_is_best(opened, settings, device, expected, said):
    """Of the Ray cluster as many as it has CPUs for."""
    config = CompareConfig(**settings)
    with workers.startable(), arrangement.pool(config, LONG, 1000, device) as pool:
        assert opened == [expected]
        assert arrangement.told(config, pool).startswith(f"The work was that of {said}")
    assert arrangement.resolved(device, pool) == {
        "resolved.device": device,
        "resolved.threads": str(pool.threads),
        "resolved.workers": str(pool.size),
    }


def test_a_cluster_gets_no_more_tasks_than_there_are(opened):
    """Two studies are never more than two batches at once."""
    with arrangement.pool(CompareConfig(backend="ray"), LONG[:2], 1000, "cpu") as pool:
        assert pool.size == 2


def test_no_process_is_started_that_was_not_asked_for(opened):
    """Outside of a command, whose script would run again, or where there is no memory for two."""
    with arrangement.pool(CompareConfig(), LONG, 1000, "cpu"):
        pass
    with workers.startable(), arrangement.pool(CompareConfig(), LONG, 1, "cpu"):
        pass
    assert opened == [("local", 1, 4), ("local", 1, 4)]
    assert not workers.are_startable()


def test_there_is_room_for_workers_in_half_of_the_memory(monkeypatch):
    """Each with its images, beside what it needs anyway."""
    splits = datasets.load(TrainConfig(dataset="digits"))
    images = 1797 * 64 * 4
    for n in (0, 1, 5):
        memory = 2 * (n * (arrangement.WORKER_BYTES + images) + 5)
        monkeypatch.setattr(capacity, "memory", lambda memory=memory: memory)
        assert arrangement.room(splits) == n
    monkeypatch.setattr(capacity, "memory", lambda: float("inf"))
    assert arrangement.room(splits) == arrangement.LIMIT


@pytest.mark.parametrize(
    ("settings", "device", "expected"),
    [
        ({"dataset": "digits"}, "cpu", 1),
        ({"dataset": "digits", "hidden": "2000,2000"}, "cpu", 4),
        ({"dataset": "digits", "threads": 3}, "cpu", 3),
        ({"dataset": "digits"}, "cuda:0", 4),
        ({"dataset": "digits", "model": "lstm"}, "cpu", 4),
    ],
)
def test_the_threads_of_a_single_training(opened, settings, device, expected):
    """Those that it asks for; one where the products are small; else all."""
    config = TrainConfig(**settings)
    assert arrangement.threads(config, datasets.load(config), device) == expected

"""What the numbers are computed on: the device, its memory, its threads."""

import contextlib
from pathlib import Path

import pytest
import torch

from initflow.core import machine
from initflow.errors import SettingError


def test_auto_is_cuda_where_there_is_one():
    """And the CPU elsewhere; a number is that of the device."""
    expected = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert machine.device("auto") == expected
    assert machine.device("cpu") == "cpu"


def test_several_devices_are_told_apart(monkeypatch):
    """By their number, the first without one; one too many is an error that says how many."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    named = ("auto", "cpu", "cuda", "cuda:1")
    assert [machine.device(name) for name in named] == ["cuda:0", "cpu", "cuda:0", "cuda:1"]
    with pytest.raises(SettingError, match="not 'cuda:2': PyTorch sees 2 CUDA devices"):
        machine.device("cuda:2")


def test_drivers_without_a_device_are_none(monkeypatch):
    """CUDA may count devices that it cannot use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert machine.device("auto") == "cpu"
    with pytest.raises(SettingError, match="PyTorch sees 0 CUDA devices"):
        machine.device("cuda")


def test_memory_at_hand_is_the_last_cache(monkeypatch):
    """The largest that Linux tells of; some number where it tells of none."""
    files = {"index0": "32K\n", "index2": "2048K\n", "index3": "33792K\n", "index9": "none\n"}
    monkeypatch.setattr(Path, "glob", lambda *_: [Path(name) for name in files])
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    assert machine.working_memory("cpu") == 33_792 * 1024
    files.clear()
    assert machine.working_memory("cpu") == machine.USUAL_CACHE > 0


def test_a_cache_that_cannot_be_read_is_passed_over(monkeypatch):
    """As in some containers."""

    def refuse(_):
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert machine.working_memory("cpu") == machine.USUAL_CACHE


def test_memory_at_hand_here_is_that_of_a_cache():
    """Between what any processor has and what none has."""
    assert 256 * 1024 <= machine.working_memory("cpu") <= 4 * 1024**3


def test_memory_of_a_cuda_device_is_what_is_free(monkeypatch):
    """Not all of it: others may use it too."""
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda at: asked.append(at) or (1_000, 9_000))
    assert machine.working_memory("cuda:1") == 1_000
    assert asked == ["cuda:1"]


def test_threads_are_put_back_after_an_error():
    """None leaves them as they are."""
    before = torch.get_num_threads()

    def interrupted():
        with machine.threads(3) as threads:
            assert threads == torch.get_num_threads() == 3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.get_num_threads() == before
    with machine.threads(None) as threads:
        assert threads == before


def test_only_the_cpu_is_not_bound_by_launching():
    """Whatever the number of the device."""
    assert not machine.is_launch_bound(torch.device("cpu"))
    assert machine.is_launch_bound(torch.device("cuda"))
    assert machine.is_launch_bound(torch.device("cuda", 1))


def test_on_the_cpu_a_recorded_function_is_the_function():
    """Nothing is between it and who calls it."""

    def function():
        return 1

    assert machine.recorded(function, torch.device("cpu")) is function


class Graph:
    """Stands for a CUDA graph: it replays what ran while it was recorded."""

    def __init__(self):
        self.replayed = 0

    def replay(self):
        self.replayed += 1


def test_on_cuda_it_runs_once_is_recorded_and_then_replayed(monkeypatch):
    """Its result is always the tensor of the recording; recording does not run it."""
    graphs, ran, devices = [], [], []

    class Recording:
        def __init__(self, graph, stream):
            graphs.append(graph)
            devices.append(stream)

        def __enter__(self):
            ran.append("recorded")

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: contextlib.nullcontext(devices.append(device))
    )
    monkeypatch.setattr(machine, "_capture_stream", lambda device: device)
    results = iter(("at first", "of the graph"))
    second = torch.device("cuda", 1)
    run = machine.recorded(lambda: ran.append("ran") or next(results), second)
    assert [run() for _ in range(4)] == ["at first", *["of the graph"] * 3]
    assert ran == ["ran", "recorded", "ran"]
    assert [graph.replayed for graph in graphs] == [3]
    assert devices == [second, second]  # made current, and with a stream of its own


@pytest.mark.gpu
def test_a_recorded_function_does_on_cuda_what_it_does():
    """Each call counts, the first and the recorded one too."""
    total, one = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")

    def add():
        total.add_(one)
        return total

    run = machine.recorded(add, torch.device("cuda"))
    seen = [run().tolist() for _ in range(5)]
    assert seen == [[float(n)] * 3 for n in range(1, 6)]

"""What the numbers are computed on: a device, and how many CPU threads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from initflow.errors import SettingError

USUAL_CACHE = 16 * 1024**2  # bytes, where it is not known
Result = TypeVar("Result")


def device(requested: str) -> str:
    """The device that ``requested`` (auto, cpu, cuda, cuda:N) means here, or a `SettingError`."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested == "auto":
        return "cuda:0" if available else "cpu"
    if requested == "cpu":
        return requested
    index = int(requested.partition(":")[2] or 0)
    if index >= available:
        raise SettingError(
            f"device must be auto or cpu, not '{requested}': PyTorch sees {available} CUDA devices"
            " here"
        )
    return f"cuda:{index}"


@dataclass(frozen=True)
class Resolved:
    """What ``auto`` became: a device (cpu, cuda:N) and a number of CPU threads."""

    device: str
    threads: int

    def as_text(self) -> dict[str, str]:
        """As the params of a run say it."""
        return {"resolved.device": self.device, "resolved.threads": str(self.threads)}


def working_memory(device: str) -> int:
    """Bytes that a training should fit in: the CPU's last cache, or CUDA's free memory."""
    if device != "cpu":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):  # Linux only
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(file.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes, default=USUAL_CACHE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch has raised it because memory, of the machine or a GPU, does not suffice."""
    is_told = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return is_told or isinstance(error, (MemoryError, torch.OutOfMemoryError))


@contextlib.contextmanager
def threads(requested: int | None) -> Iterator[int]:
    """Give PyTorch this many CPU threads for a while; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(requested or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def is_launch_bound(device: torch.device) -> bool:
    """Whether launching many small operations on it takes longer than the operations."""
    return device.type != "cpu"


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def recorded(function: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """``function``, launched on CUDA as one graph; elsewhere as it is.

    It must use and return the same tensors at each call, and must not wait for the device. On
    CUDA the first call runs it as it is, as kernels and libraries set themselves up at first use;
    the second records it.
    """
    if device.type != "cuda":
        return function
    graph: torch.cuda.CUDAGraph | None = None
    calls = 0
    result: Any = None

    def run() -> Result:
        nonlocal graph, calls, result
        calls += 1
        if calls == 1:
            return function()
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            # On this device, which need not be the current one: or nothing would be recorded.
            with torch.cuda.device(device), torch.cuda.graph(graph, stream=_capture_stream(device)):
                result = function()
        graph.replay()
        return result  # type: ignore[no-any-return]

    return run

"""What the numbers are computed on: a device, how many CPU threads, and TF32 on CUDA or not.

By itself PyTorch lets cuDNN round the factors of its products to TF32's 10 bits, and cuBLAS not,
and a process may set either. Here a setting decides, whatever the process has set, so that what is
recorded is what was computed with.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from initflow.errors import SettingError

PRECISION = "fp32_precision"
OVERRIDE = "NVIDIA_TF32_OVERRIDE"  # at 0 the libraries never use TF32, whatever a program says
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


def check_tf32(device: str, *, tf32: bool) -> None:
    """Raise :class:`SettingError` where ``tf32`` is asked for on a ``device`` that has none."""
    if tf32 and device == "cpu":
        raise SettingError(
            "tf32 must be false with device=cpu, not 'true': it is for CUDA, by device=cuda where "
            "there is one"
        )
    if tf32 and os.environ.get(OVERRIDE) == "0":
        raise SettingError(
            f"tf32 must be false where the environment says {OVERRIDE}=0, not 'true': unset it"
        )


@contextlib.contextmanager
def tf32(device: str, *, allowed: bool) -> Iterator[None]:
    """On CUDA, have TF32 ``allowed`` for a while, or not; nothing changes for the CPU."""
    if device == "cpu":
        yield
        return
    before = _told(_old_names()) + _own(_new_names())
    for one, _ in before:
        one.write(one.on if allowed else one.off)
    try:
        yield
    finally:
        for one, value in before:
            one.write(value)


@dataclass(frozen=True)
class _Setting:
    """One of PyTorch's, with its values that allow TF32 and do not."""

    of: Any
    name: str
    on: Any
    off: Any

    def read(self) -> Any:
        return getattr(self.of, self.name)

    def write(self, value: object) -> None:
        setattr(self.of, self.name, value)


class _Products(_Setting):
    """That of products, which has functions."""

    def read(self) -> str:
        return torch.get_float32_matmul_precision()

    def write(self, value: object) -> None:
        torch.set_float32_matmul_precision(str(value))


def _told(settings: Iterable[_Setting]) -> list[tuple[_Setting, Any]]:
    """Those of ``settings`` that can be read, with their values.

    The old ones cannot, once a process has set the new ones to something else.
    """
    found = []
    for one in settings:
        with contextlib.suppress(RuntimeError):
            found.append((one, one.read()))
    return found


def has_new_names() -> bool:
    """Whether PyTorch has a precision for each kind of operation, as it does since 2.9."""
    return hasattr(torch.backends.cuda.matmul, PRECISION)


def _old_names() -> list[_Setting]:
    """Those of all versions of PyTorch, which set the new ones too.

    They are set beside them, as each raises errors where the other ones say something else.
    """
    return [
        _Products(torch, "", on="high", off="highest"),
        _Setting(torch.backends.cudnn, "allow_tf32", on=True, off=False),
    ]


def _new_names() -> list[_Setting]:
    """Those of PyTorch since 2.9; none before."""
    if not has_new_names():
        return []
    backends: Any = torch.backends  # its modules make up some attributes as they are requested
    of_cuda = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    # The CPU's is set along with CUDA's by the old name, and has no part in this.
    of_cpu = _Setting(backends.mkldnn.matmul, PRECISION, on="ieee", off="ieee")
    return [*(_Setting(one, PRECISION, on="tf32", off="ieee") for one in of_cuda), of_cpu]


def _own(settings: Sequence[_Setting]) -> list[tuple[_Setting, Any]]:
    """The ``settings`` with the values that are their own: none where they follow a wider one."""
    seen = _told(settings)
    with _wider_ones_unset():
        alone = _told(settings)
    return [
        (one, value if value == by_itself else "none")
        for (one, value), (_, by_itself) in zip(seen, alone, strict=True)
    ]


@contextlib.contextmanager
def _wider_ones_unset() -> Iterator[None]:
    """While what new names say is their own, and not that of a wider one which they follow."""
    backends: Any = torch.backends
    wider = [one for one in (backends, backends.cudnn, backends.mkldnn) if hasattr(one, PRECISION)]
    with contextlib.ExitStack() as stack:
        for one in wider:
            stack.callback(setattr, one, PRECISION, getattr(one, PRECISION))
            setattr(one, PRECISION, "none")
        yield

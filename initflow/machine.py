"""What the numbers are computed on: a device, and how many CPU threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from initflow.errors import SettingError


def device(asked: str) -> str:
    """The device that ``asked`` (auto, cpu, cuda, cuda:N) means here, or a `SettingError`."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        return "cuda:0" if available else "cpu"
    if asked == "cpu":
        return asked
    index = int(asked.partition(":")[2] or 0)
    if index >= available:
        raise SettingError(
            f"device must be auto or cpu, not '{asked}': PyTorch sees {available} CUDA devices here"
        )
    return f"cuda:{index}"


@contextlib.contextmanager
def threads(asked: int | None) -> Iterator[int]:
    """Give PyTorch this many CPU threads for a while; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(asked or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)

"""TF32 on CUDA: whether products, convolutions and recurrent kernels may round to 10 bits first.

By itself PyTorch lets cuDNN do so and cuBLAS not, and a process may set either. Here a setting
decides, whatever the process has set, so that what is recorded is what was computed with.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from initflow.errors import SettingError

PRECISION = "fp32_precision"
OVERRIDE = "NVIDIA_TF32_OVERRIDE"  # at 0, the libraries use it whatever a program says


def check(device: str, *, tf32: bool) -> None:
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
    before = _told(_old_names())
    with _wider_ones_unset():
        before += _told(_new_names())
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


def _old_names() -> list[_Setting]:
    """Those of all versions of PyTorch, which set the new ones too.

    They are set beside them, as each raises errors where the other ones say something else.
    """
    return [
        _Products(torch, "", on="high", off="highest"),
        _Setting(torch.backends.cudnn, "allow_tf32", on=True, off=False),
    ]


def _new_names() -> list[_Setting]:
    """Those that PyTorch has since 2.9, one for each kind of operation."""
    backends: Any = torch.backends  # its modules make up some attributes as they are requested
    if not hasattr(backends.cuda.matmul, PRECISION):
        return []
    of_cuda = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    # The CPU's is set along with CUDA's by the old name, and has no part in this.
    of_cpu = _Setting(backends.mkldnn.matmul, PRECISION, on="ieee", off="ieee")
    return [*(_Setting(one, PRECISION, on="tf32", off="ieee") for one in of_cuda), of_cpu]


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

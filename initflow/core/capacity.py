"""How much of the machine this process may use: its CPUs, and its memory.

A container, or a service, may be allowed less than the machine has: on Linux by control groups
(version 2, https://docs.kernel.org/admin-guide/cgroup-v2.html).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OF_PROCESS = Path("/proc/self/cgroup")


def cpus() -> int:
    """Those that it may run on, and no more than it may use at once; at least one."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    for quota, period in _limits("cpu.max"):
        count = min(count, math.floor(int(quota) / int(period)))
    return max(1, count)


def memory() -> float:
    """Bytes, infinite where it is not known."""
    try:
        physical: float = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has none of this
        physical = math.inf
    return min([physical, *(float(limit) for (limit,) in _limits("memory.max"))])


def _limits(name: str) -> Iterator[list[str]]:
    """The words of the file ``name`` of this process's group and those above, where it limits."""
    own = GROUPS
    with contextlib.suppress(OSError):
        for line in OF_PROCESS.read_text().splitlines():
            if line.startswith("0::/"):
                own = GROUPS / line.removeprefix("0::/")
    for group in (own, *own.parents):
        if group.is_relative_to(GROUPS):
            with contextlib.suppress(OSError):
                words = (group / name).read_text().split()
                if words[:1] != ["max"]:
                    yield words

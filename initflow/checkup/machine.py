"""What numbers are computed on here: devices, threads, and what chooses kernels."""

from __future__ import annotations

from pathlib import Path

import torch

from initflow.checkup.finding import Finding
from initflow.core import capacity, environment, machine

NVIDIA = Path("/proc/driver/nvidia/version")  # on Linux, where there is its driver
GIB = 2**30


def look() -> Finding:
    """The devices, of which ``device`` is the one that auto means; memory in GiB."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = [torch.cuda.get_device_properties(index) for index in range(count)]
    device = machine.device("auto")
    current = environment.current(device)
    return Finding(
        {
            "device": device,
            "processor": environment.processor(),
            "cpus": capacity.cpus(),
            "memory_gib": round(capacity.memory() / GIB, 1),
            "cuda": [{"name": one.name, "gib": round(one.total_memory / GIB, 1)} for one in cards],
            "cuda_of_torch": torch.version.cuda,
            "has_nvidia_driver": NVIDIA.exists(),
            "threads": torch.get_num_threads(),
            **{name: current.facts[name] for name in ("blas", "cpu_capability", "deterministic")},
            "variables": dict(current.variables),
        }
    )

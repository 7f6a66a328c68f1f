"""Independent random streams from one seed; nothing here touches torch's global one."""

from __future__ import annotations

import hashlib

import torch


def stream_seed(seed: int, stream: str) -> int:
    """A 63-bit seed for the named ``stream`` of a run's ``seed``.

    It is a SHA-256 of both, so that no stream repeats another's numbers, and drawing more from
    one leaves the others as they were.
    """
    digest = hashlib.sha256(f"{stream}:{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, stream: str) -> torch.Generator:
    """A CPU generator at the start of the named ``stream``."""
    return torch.Generator().manual_seed(stream_seed(seed, stream))

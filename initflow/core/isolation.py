"""What other people's code may not change for all: put back after it has run."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from initflow.core.paths import working_folder


@contextlib.contextmanager
def left_alone() -> Iterator[set[str]]:
    """Put all global state back at the end; gives a set, to hold then what had been changed.

    What is printed meanwhile goes to standard error, because standard output is for results.
    """
    before = {name: get() for name, (get, _) in _STATES.items()}
    changed: set[str] = set()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield changed
    finally:
        for name, (get, put) in _STATES.items():
            if before[name] != () and get() != before[name]:
                changed.add(name)
                put(before[name])


def seed_all(seed: int) -> None:
    """Seed the global generators of torch, NumPy and Python, for what draws from them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the one that a user's function may draw from


def _cuda_states() -> tuple[bytes, ...]:
    there = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return tuple(map(_bytes, torch.cuda.get_rng_state_all())) if there else ()


def _numpy_state() -> tuple[object, ...]:
    name, keys, *others = np.random.get_state(legacy=True)  # noqa: NPY002
    return (name, keys.tobytes(), *others)  # type: ignore[union-attr]


def _put_numpy_state(state: tuple[str, bytes, int, int, float]) -> None:
    name, keys, *others = state
    np.random.set_state((name, np.frombuffer(keys, np.uint32), *others))  # type: ignore[arg-type]  # noqa: NPY002


def _default_device() -> torch.device:
    try:
        return torch.get_default_device()
    except AttributeError:  # older versions of PyTorch, once it was set to none
        return torch.device("cpu")


def _bytes(state: Tensor) -> bytes:
    return state.numpy().tobytes()


def _tensor(state: bytes) -> Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


# How each state is read, as what can be compared, and put back. () is none: CUDA has none before
# its first use, nor is there a working folder that was removed meanwhile.
_STATES: dict[str, tuple[Callable[[], object], Callable[..., object]]] = {
    "torch's random state": (
        lambda: _bytes(torch.get_rng_state()),
        lambda state: torch.set_rng_state(_tensor(state)),
    ),
    "torch.cuda's random state": (
        _cuda_states,
        lambda states: torch.cuda.set_rng_state_all(list(map(_tensor, states))),
    ),
    "numpy's random state": (_numpy_state, _put_numpy_state),
    "the state of Python's random": (random.getstate, random.setstate),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (
        _default_device,
        # Not by "cpu", which would make every tensor's making ask for it.
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
    ),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's determinism": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "the working folder": (lambda: working_folder() or (), os.chdir),
}

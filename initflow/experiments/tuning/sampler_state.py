"""The state of CMA-ES, which Optuna keeps in a study as a pickle: read as the numbers that it is.

Whoever can write to a study's storage could have whoever unpickles it run any Python. Here nothing
that a pickle names is called: an object in it becomes a holder of values, an array its bytes.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

# What differs between a new optimizer of the package cmaes and one that was told accuracies: its
# generation, mean, step size, covariance and evolution paths, and the values it was told.
LEARNED = {"_g", "_mean", "_sigma", "_c_1d", "_p_sigma", "_pc", "_funhist_values"}
LONGEST = 100_000  # bytes of a pickle; of two parameters it has 1,600
LARGEST = 2**31  # generation


class _Object:
    """Stands for a cmaes.CMA: its attributes."""


class _Array:
    """Stands for a numpy.ndarray, whose content comes after it."""

    content: object = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], object, bool, bytes]) -> None:
        _, shape, _, by_columns, raw = state
        self.content = _array(raw, None, shape, "F" if by_columns else "C")


class _Type:
    """Stands for a numpy.dtype: all numbers are of one."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _array(raw: bytes, _: object, shape: tuple[int, ...], order: Literal["C", "F"] = "C") -> object:
    numbers = np.frombuffer(raw, np.float64).copy()  # the optimizer goes on in it
    return numbers.reshape(shape, order=order)


ADMITTED: dict[tuple[str, str], Callable[..., object] | None] = {
    ("cmaes._cma", "CMA"): _Object,
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _Type,
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy._core.multiarray", "scalar"): lambda _, raw: np.frombuffer(raw, np.float64)[0],
    ("numpy._core.numeric", "_frombuffer"): _array,
}


class _Reader(pickle._Unpickler):  # noqa: SLF001 - the one in C takes any memory that it is told to
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy.core."):  # as NumPy 1 names it
            module = module.replace("core", "_core", 1)
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return ADMITTED[module, name]


def learned(packed: bytes, new: Mapping[str, object]) -> dict[str, object]:
    """The attributes of the optimizer in ``packed``; ``new`` are those of one before it learned.

    Raises :class:`ValueError` for what is no state of such a one.
    """
    if len(packed) > LONGEST:
        raise ValueError(f"it has {len(packed):,} bytes")
    try:
        kept = vars(_Reader(io.BytesIO(packed)).load())
    except Exception as error:  # a damaged pickle fails in any way
        raise ValueError(str(error) or type(error).__name__) from error
    state = {k: v.content if isinstance(v, _Array) else v for k, v in kept.items()}
    if state.keys() != new.keys():
        raise ValueError("it is of another version of the package cmaes")
    for name, value in state.items():
        if not (_is_like if name in LEARNED else _is_same)(value, new[name]):
            raise ValueError(f"{name} is {value!r:.100}")
    return state


def _is_same(value: object, other: object) -> bool:
    alike = isinstance(value, np.ndarray) == isinstance(other, np.ndarray)
    return alike and np.array_equal(value, other)  # type: ignore[arg-type]


def _is_like(value: object, other: object) -> bool:
    """Whether it is a number, or an array of numbers, where the other one is."""
    if isinstance(other, np.ndarray):
        return isinstance(value, np.ndarray) and value.shape == other.shape
    if isinstance(other, int):
        return type(value) is int and 0 <= value < LARGEST
    return isinstance(value, float) and math.isfinite(value)

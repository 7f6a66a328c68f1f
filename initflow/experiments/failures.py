"""What fails once the numbers are there: noted and told at the end, and nothing is lost by it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from initflow.core.progress import warn
from initflow.errors import ReportError, cause
from initflow.reporting.drawing import png
from initflow.tracking import runs

if TYPE_CHECKING:
    from initflow.reporting.drawing import Figure

Failures = dict[str, str]  # of figures, reports and models: by what it is, why it could not be made


@contextlib.contextmanager
def noted(failures: Failures, what: str) -> Iterator[None]:
    """Note in ``failures`` what goes wrong in the ``with``, and go on after it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, numbers must not be lost to it
        warn(f"{what} could not be made", error=True)
        failures[what] = cause(error)


def log_figures(
    run: runs.Run, figures: Mapping[str, Callable[[], Figure]], failures: Failures
) -> dict[str, bytes]:
    """Draw and log each figure by its name; the PNG files of those that could be drawn."""
    made = {}
    for name, draw in figures.items():
        with noted(failures, f"{name}.png"):
            made[name] = png(draw())
            run.log_bytes(f"{name}.png", made[name])
    return made


def of(name: str, failures: Failures) -> Failures:
    """The same, said to be of one of several networks."""
    return {f"{what} of {name}": why for what, why in failures.items()}


def lines(failures: Failures) -> list[str]:
    """A sentence for each."""
    return [f"{what} could not be made: {why}" for what, why in failures.items()]


def check(failures: Failures) -> None:
    """Raise :class:`ReportError`, in one line, where there are any."""
    if failures:
        raise ReportError("; ".join(lines(failures)))

"""Progress of long work: passed to a callback, shown as a bar in a terminal or a notebook."""

from __future__ import annotations

import contextlib
import functools
import html
import logging
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from initflow.errors import SettingError

if TYPE_CHECKING:
    from rich.console import Console

# Called with what is being done and how much of it is done: (what, done, of).
Progress = Callable[[str, int, int], None]
# Which log each step of making MLflow's database. In older versions of MLflow alembic's levels are
# put back meanwhile, and two steps set their own: only a filter holds.
LOUD = (
    "alembic.runtime.migration",
    "mlflow.store.db.utils",
    "2b4d017a5e9b_add_model_registry_tables_to_db_py",
    "89d4b8295536_create_latest_metrics_table_py",
)
_logger = logging.getLogger("initflow")


def silent(_what: str, _done: int, _of: int) -> None:
    """Show nothing."""


def part_of(progress: Progress, before: int, these: int, whole: int) -> Progress:
    """What tells of ``these`` of a ``whole``, after those ``before``: how far the whole is."""
    return lambda what, done, of: progress(what, before * of + these * done, whole * of)


@contextlib.contextmanager
def shown(progress: bool | Progress) -> Iterator[Progress]:
    """``progress`` itself or, where it is True, a bar in a notebook or a terminal, if in one.

    What is neither True, False nor a function is a :class:`SettingError`.
    """
    if callable(progress):
        yield progress
    elif not isinstance(progress, bool):
        raise SettingError(f"progress must be True, False or a function, not {progress!r}")
    elif progress and _in_notebook():
        with _notebook_bar() as update:
            yield update
    elif progress and sys.stderr.isatty():
        from rich.console import Console  # noqa: PLC0415 - needed only here

        with bar(Console(stderr=True)) as update:
            yield update
    else:
        yield silent


@contextlib.contextmanager
def bar(console: Console, beginning: str = "") -> Iterator[Progress]:
    """A bar on a ``console`` that is a terminal, which is gone at the end; silent on any other."""
    if not console.is_terminal:
        yield silent
        return
    from rich import progress  # noqa: PLC0415 - needed only here

    columns = ("{task.description}", progress.BarColumn(), progress.TimeElapsedColumn())
    with progress.Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=not console.stderr,  # else what is printed would go to the bar's stream
    ) as shown:
        task = shown.add_task(beginning, total=None)
        yield lambda what, done, of: shown.update(task, description=what, completed=done, total=of)


def _in_notebook() -> bool:
    """Whether the code runs in a Jupyter kernel, which shows HTML."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython.get_ipython() if ipython else None, "kernel")


@contextlib.contextmanager
def _notebook_bar() -> Iterator[Progress]:
    """An element of HTML, which needs no extension of the notebook as widgets do.

    A front end that shows no HTML has the text; at the end nothing is left of either.
    """
    display: Any = sys.modules["IPython"].display
    nothing = {"text/plain": "", "text/html": ""}
    handle = display.display(nothing, raw=True, display_id=True)

    def update(what: str, done: int, of: int) -> None:
        element = (
            f'<progress value="{done}" max="{of}" style="vertical-align: middle"></progress> '
            f"{html.escape(what)}"
        )
        handle.update({"text/plain": what, "text/html": element}, raw=True)

    try:
        yield update
    finally:
        handle.update(nothing, raw=True)


def warn(text: str, *, error: bool = False) -> None:
    """Log ``text`` as a warning of initflow; with the traceback of the ``error`` being handled.

    It is seen also where MLflow's databases have raised the level of the root logger.
    """
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.WARNING)
    _logger.warning(text, exc_info=error)


def is_warning(record: logging.LogRecord) -> bool:
    """Whether it says that something may be wrong."""
    return record.levelno >= logging.WARNING


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without what MLflow logs of each step of making its database."""
    loud = [logging.getLogger(name) for name in LOUD]
    filtering = functools.partial(is_warning)  # its own, or it would be gone where this is nested
    for logger in loud:
        logger.addFilter(filtering)
    try:
        yield
    finally:
        for logger in loud:
            logger.removeFilter(filtering)

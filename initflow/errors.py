"""The errors a user can meet; each message is one line that names what was wrong."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

LONGEST = 500  # characters of another's message that are shown

# The extra of the distribution that brings a package, of those that not all need.
EXTRAS = {
    "lightning": "lightning",
    "matplotlib": "experiments",
    "optuna": "tune",
    "ray": "ray",
    "rich": "experiments",
    "safetensors": "experiments",
    "scipy": "experiments",
    "sklearn": "experiments",
    "torchvision": "experiments",
    "transformers": "transformers",
}


class InitflowError(Exception):
    """What all errors of this package are; each that is raised is of one of its subclasses.

    ``exit_code`` is that of the command: 1, or 2 for a :class:`SettingError`.
    """

    exit_code = 1


class SettingError(InitflowError):
    """An argument is wrong: an unknown name, a value out of range, an odd combination."""

    exit_code = 2


class PluginError(InitflowError):
    """An initializer of a plugin cannot be loaded, failed, or broke a rule."""


class DataError(InitflowError):
    """A data set is missing, damaged, or not what it says it is."""


class TrackingError(InitflowError):
    """MLflow could not be reached or refused what was to be logged."""


class OutageError(TrackingError):
    """MLflow does not answer for the moment, and the request cannot wait."""


class OutboxError(TrackingError):
    """What was kept for MLflow cannot be read: a file is damaged, or is no outbox."""


class StudyError(InitflowError):
    """A study cannot be reached or written, or another process is running it."""


class GivenUpError(StudyError):
    """A trial was given up meanwhile by another process, which took its worker for dead."""


class WorkError(InitflowError):
    """Workers died, one after the other, or memory does not suffice for what they are given."""


class ReplayError(InitflowError):
    """What a run recorded cannot be replayed, is damaged, or gave other numbers this time."""


class ReportError(InitflowError):
    """A figure, a report or a model could not be made; the numbers are all there."""


class VerdictError(InitflowError):
    """A network was diagnosed as what the user wants to fail on."""


def first_line(error: BaseException) -> str:
    """What it says, in one line of bounded length; its type where it says nothing."""
    return shortened(str(error).strip().partition("\n")[0] or type(error).__name__)


def shortened(text: str) -> str:
    """``text``, cut to a length that a person reads."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def cause(error: BaseException) -> str:
    """What any error says, in one line: its first, and of others' errors the type before it."""
    line, kind = first_line(error), type(error).__name__
    return line if isinstance(error, InitflowError) or line == kind else f"{kind}: {line}"


def unknown(what: str, value: object, valid: Iterable[str]) -> SettingError:
    """The error for a ``value`` that is none of the ``valid`` names of a ``what``."""
    valid = list(valid)
    listed, hint = ", ".join(valid) or "(none)", did_you_mean(value, valid)
    return SettingError(f"{what} must be one of {listed}, not '{value}'{hint}")


def did_you_mean(value: object, valid: Iterable[str]) -> str:
    """A hint at the nearest of the ``valid`` names, to stand behind a message; empty if far.

    The dashes of options are left out of account, as they would make any two alike.
    """
    names = {name.lstrip("-"): name for name in valid}
    close = difflib.get_close_matches(str(value).lower().lstrip("-"), names, n=1)
    return f" (did you mean '{names[close[0]]}'?)" if close else ""


@contextlib.contextmanager
def naming_extras(who: str) -> Iterator[None]:
    """Where a package of :data:`EXTRAS` is not there that ``who`` needs, say what to type."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise SettingError(
            f"{who} needs the package {package}: pip install 'initflow[{EXTRAS[package]}]'"
        ) from error

"""Functions as users call them: with a configuration, or with its settings as keywords."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Protocol, TypeVar

from initflow.core.progress import Progress, quiet_libraries, shown, warn
from initflow.core.settings import Settings
from initflow.errors import SettingError, TrackingError, naming_extras
from initflow.tracking import unsent

Result_co = TypeVar("Result_co", covariant=True)
# What help says of the parameters that all such functions have; the page of docs says it once.
SETTINGS = """
Settings are keywords, the fields of :class:`initflow.{kind}`, whose help says what each means,
with its values and its default. Or they are given as one such object, ``config``."""
EXPERIMENT = """
``experiment`` is the name of MLflow's experiment (default None: the one that MLflow's environment
variables name, else ``initflow``)."""
PROGRESS = """
``progress`` is True for a bar in a terminal or a notebook, False for none, or a function that is
called with ``(what, done, total)``.
"""


class Public(Protocol[Result_co]):
    """``progress`` is True for a bar where somebody looks, False, or a callback of one's own."""

    def __call__(
        self, *args: Any, progress: bool | Progress = True, **settings: Any
    ) -> Result_co: ...


def public(kind: type[Settings]) -> Callable[[Callable[..., Result_co]], Public[Result_co]]:
    """Let a function of a ``config`` of this ``kind`` take its settings as keywords instead.

    A setting that there is none of, or both a configuration and settings, is a
    :class:`SettingError`.
    """

    def decorate(function: Callable[..., Result_co]) -> Public[Result_co]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, progress: bool | Progress = True, **keywords: Any) -> Result_co:
            own = {name: keywords.pop(name) for name in [*keywords] if name in signature.parameters}
            bound = signature.bind_partial(*args, **own)
            given = bound.arguments.get("config")
            if given is None:
                bound.arguments["config"] = kind.of(keywords)
            elif not isinstance(given, kind):
                raise SettingError(f"config must be a {kind.__name__}, not {given!r}")
            elif keywords:
                raise SettingError(
                    f"settings must stand in the {kind.__name__} that is given, not beside it: "
                    f"{', '.join(keywords)}"
                )
            with (
                naming_extras(f"initflow.{function.__name__}"),
                quiet_libraries(),
                shown(progress) as update,
            ):
                result = function(*bound.args, **bound.kwargs, progress=update)
            for warning in getattr(result, "warnings", list)():
                warn(warning)
            try:
                unsent.check_kept()
            except TrackingError as error:
                warn(str(error))
            return result

        call.__signature__ = _told(signature, kind)  # type: ignore[attr-defined]
        of_all = [SETTINGS.format(kind=kind.__name__)]
        of_all += [EXPERIMENT] if "experiment" in signature.parameters else []
        call.__doc__ = "\n".join([inspect.getdoc(function) or "", *of_all, PROGRESS])
        return call

    return decorate


def _told(signature: inspect.Signature, kind: type[Settings]) -> inspect.Signature:
    """That of a function with the settings, each with its default, for help and completion."""
    changed: dict[str, dict[str, Any]] = {
        "config": {"default": None, "annotation": f"{kind.__name__} | None"},
        "progress": {"default": True, "annotation": "bool | Progress"},
    }
    own = [one.replace(**changed.get(one.name, {})) for one in signature.parameters.values()]
    settings = [
        inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=setting.default)
        for setting in fields(kind)
    ]
    return signature.replace(parameters=[*own, *settings])

"""All that can be looked at, one after the other, whatever is broken of it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from initflow.checkup.finding import Finding
from initflow.core.secrets import without_home
from initflow.errors import cause

PARTS = ("versions", "machine", "store", "outboxes", "plugins", "data", "folders")


@dataclass(frozen=True)
class Examination:
    """The facts of each of :data:`PARTS`, none where it failed, and what is broken."""

    problems: Sequence[str]
    parts: Mapping[str, Mapping[str, Any]]

    def as_json(self) -> dict[str, Any]:
        return {"problems": self.problems, **self.parts}


def look() -> Examination:
    """Look at everything; the user's home folder is ``~`` in all that is told."""
    found = {name: _part(name) for name in PARTS}
    problems = dict.fromkeys(one for finding in found.values() for one in finding.problems)
    told: Any = _homeless(
        [list(problems), {name: finding.facts for name, finding in found.items()}]
    )
    return Examination(*told)


def _part(name: str) -> Finding:
    """By its name, as importing it may fail, too."""
    try:
        finding: Finding = importlib.import_module(f"initflow.checkup.{name}").look()
    except ModuleNotFoundError as error:  # of any part, and told once
        return Finding({}, [f"{error.name} cannot be imported: install it, and look again"])
    except Exception as error:  # noqa: BLE001 - what is broken is what is asked for
        return Finding({}, [f"{name}: cannot be looked at ({cause(error)}); please report it"])
    return finding


def _homeless(value: Any) -> Any:
    """``value``, through mappings and sequences, with ``~`` for the home folder in its texts."""
    if isinstance(value, str):
        return without_home(value)
    if isinstance(value, Mapping):
        return {key: _homeless(its) for key, its in value.items()}
    return [_homeless(its) for its in value] if isinstance(value, (list, tuple)) else value

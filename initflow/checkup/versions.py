"""Which packages are installed: those that are needed, those that are pinned, those of extras.

By their metadata alone: nothing is imported, as it may be missing.
"""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import InvalidVersion

import initflow
from initflow.checkup.finding import Finding
from initflow.core import paths


def look() -> Finding:
    """The installed version of each package, and which are others than the pinned ones."""
    project = tomllib.loads(paths.shipped("pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = _requirements(project["dependencies"])
    pinned = _requirements(paths.shipped("requirements.lock").read_text().splitlines())
    extras = {
        name: [one.name for one in _requirements(its) if not _is_met(one)]
        for name, its in project["optional-dependencies"].items()
    }
    facts = {
        "initflow": initflow.__version__,
        "python": platform.python_version(),
        "system": " ".join([platform.system(), platform.machine(), *platform.libc_ver()]).strip(),
        "packages": {one.name: _installed(one.name) for one in needed},
        "pinned": len(pinned),
        "others_than_pinned": {
            one.name: {"installed": _installed(one.name), "pinned": str(one.specifier)[2:]}
            for one in pinned
            if not _is_met(one)
        },
        "missing_of_extras": extras,
    }
    return Finding(facts, [_problem(one) for one in needed if not _is_met(one)])


def _requirements(lines: Iterable[str]) -> list[Requirement]:
    """Those that hold for this Python and system."""
    read = map(Requirement, lines)
    return [one for one in read if not one.marker or one.marker.evaluate()]


def _installed(name: str) -> str | None:
    """The version, None of what is not installed."""
    try:
        return metadata.distribution(name).version
    except metadata.PackageNotFoundError:
        return None


def _is_met(requirement: Requirement) -> bool:
    version = _installed(requirement.name)
    try:
        return version is not None and requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return False


def _problem(needed: Requirement) -> str:
    version = _installed(needed.name)
    what = f"is {version}, and must be {needed.specifier}" if version else "is missing"
    return f"{needed.name} {what}: pip install '{needed}'"

"""Which packages are installed: those that are needed, those that are pinned, those of extras.

By their metadata alone: nothing is imported, as it may be missing.
"""

from __future__ import annotations

import platform

from packaging.requirements import Requirement

import initflow
from initflow.checkup.finding import Finding
from initflow.experiments.replay import promise


def look() -> Finding:
    """The installed version of each package, and which are others than the pinned ones."""
    project, pinned = promise.project(), promise.pins()
    needed = promise.required(project["dependencies"])
    extras = {
        name: [one.name for one in promise.required(its) if not promise.is_met(one)]
        for name, its in project["optional-dependencies"].items()
    }
    facts = {
        "initflow": initflow.__version__,
        "python": platform.python_version(),
        "system": " ".join([platform.system(), platform.machine(), *platform.libc_ver()]).strip(),
        "packages": {one.name: promise.installed(one.name) for one in needed},
        "pinned": len(pinned),
        "others_than_pinned": {
            one.name: {"installed": promise.installed(one.name), "pinned": promise.version(one)}
            for one in pinned
            if not promise.is_met(one)
        },
        "promise": promise.here()._asdict(),
        "missing_of_extras": extras,
    }
    return Finding(facts, [_problem(one) for one in needed if not promise.is_met(one)])


def _problem(needed: Requirement) -> str:
    version = promise.installed(needed.name)
    what = f"is {version}, and must be {needed.specifier}" if version else "is missing"
    return f"{needed.name} {what}: pip install '{needed}'"

"""With which versions the same bits are promised, and what that comes to with those installed.

By the metadata of packages alone: nothing is imported, as it may be missing.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib import metadata
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from initflow.core import paths

PROMISED, TESTED, NOT_PROMISED = "promised", "tested", "not promised"
# What computes the numbers of a training: NumPy the scale of images, and the nodes of the integrals
# by which some schemes draw; torch all else. What brings the images does not count: their digest is
# compared.
DECIDING = ("torch", "numpy")


class Promise(NamedTuple):
    """The same ``bits`` are promised, tested or not promised, as a ``sentence`` says by name."""

    bits: str
    sentence: str


def here() -> Promise:
    """What is promised with the installed versions; what the tests try with the lowest ones."""
    pinned = {one.name: one for one in pins()}
    promise = _listed(f"{name} {version(pinned[name])}" for name in DECIDING)
    others = [name for name in DECIDING if not is_met(pinned[name])]
    if not others:
        return Promise(PROMISED, f"The same bits are promised with {promise}.")
    lowest = [one for one in required(project()["dependencies"]) if one.name in DECIDING]
    found = _listed(f"{name} {installed(name) or 'missing'}" for name in others)
    if all(_is_lowest(one) for one in lowest):
        told = f"The same bits are promised with {promise}; with {found} they are only tested."
        return Promise(TESTED, told)
    return Promise(NOT_PROMISED, f"The same bits are promised with {promise}, not with {found}.")


def project() -> dict[str, Any]:
    """The table ``project`` of ``pyproject.toml``."""
    table: dict[str, Any] = tomllib.loads(paths.shipped("pyproject.toml").read_text("utf-8"))
    its: dict[str, Any] = table["project"]
    return its


def pins() -> list[Requirement]:
    """The pinned packages, each with the one :func:`version` that it may have."""
    return required(paths.shipped("requirements.lock").read_text("utf-8").splitlines())


def required(lines: Iterable[str]) -> list[Requirement]:
    """Those that hold for this Python and system."""
    read = map(Requirement, lines)
    return [one for one in read if not one.marker or one.marker.evaluate()]


def version(bound: Requirement) -> str:
    """That of a requirement with one bound: of ``torch==2.15.0`` and ``torch>=2.15.0``, 2.15.0."""
    (one,) = bound.specifier
    return one.version


def installed(name: str) -> str | None:
    """The version, None of what is not installed."""
    try:
        return metadata.distribution(name).version
    except metadata.PackageNotFoundError:
        return None


def is_met(requirement: Requirement) -> bool:
    its = installed(requirement.name)
    try:
        return its is not None and requirement.specifier.contains(its, prereleases=True)
    except InvalidVersion:
        return False


def _is_lowest(requirement: Requirement) -> bool:
    """Whether the lowest version that it allows is installed, of whatever build."""
    its = str(installed(requirement.name))
    return is_met(requirement) and Version(Version(its).public) == Version(version(requirement))


def _listed(words: Iterable[str]) -> str:
    return " and ".join(words)

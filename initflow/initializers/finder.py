"""Which plugins there are: found and sorted, by their metadata alone. Nothing is imported.

A plugin is a scheme, or a model, that an installed distribution offers by an entry point, that a
folder offers which is such a distribution and is used in place, or that the running notebook or
script defines. Some come with the package, and give way to any other of their name. One that cannot
be used is listed with the cause, and does not affect the others.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import Distribution, distributions
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from types import FunctionType

import initflow
from initflow.core import paths
from initflow.core.configurations import MODEL_NAMES, SCHEME_NAMES
from initflow.errors import SettingError, cause, first_line

FOLDER = "plugins"
NOTEBOOK = "__main__"
MARK = "__initflow__"  # the attribute of a function that was made an initializer
NAME = re.compile(r"\w[\w.-]*")
LARGEST = 2**16  # bytes of a pyproject.toml, and dots in a line of it: a key of 32,000 parts
DEEPEST = 500  # takes 20 s to parse


@dataclass(frozen=True)
class Group:
    """A group of entry points, each of which offers a ``kind``; ``taken`` are built-in names."""

    name: str
    kind: str
    taken: tuple[str, ...]


INITIALIZERS = Group("initflow.initializers", "scheme", SCHEME_NAMES)
MODELS = Group("initflow.models", "model", MODEL_NAMES)


@dataclass(frozen=True)
class Plugin:
    """A scheme, or a model, that a distribution offers under ``name``: found, not yet imported.

    ``function`` is ``module:name``. ``folder`` is that of a distribution that is used
    in place, None for an installed one; ``installed_too`` where it is both, ``shipped`` where it
    comes with initflow. ``problem`` says why it cannot be used, where finding it was enough to
    know.
    """

    name: str
    function: str
    distribution: str
    version: str
    folder: Path | None = None
    installed_too: bool = False
    shipped: bool = False
    problem: str | None = None

    @property
    def key(self) -> str:
        """The distribution's normalized name (PEP 503), by which two are the same."""
        return re.sub(r"[-_.]+", "-", self.distribution).lower()

    @property
    def source(self) -> Path | None:
        """Where the modules of a folder are: in its ``src``, if the function's is there."""
        if self.folder is None:
            return None
        inner, top = self.folder / "src", self.function.partition(":")[0].partition(".")[0]
        there = (inner / f"{top}.py").is_file() or (inner / top).is_dir()
        return inner if there else self.folder

    @property
    def provider(self) -> str:
        """``distribution version``, as the tags of a run have it."""
        return f"{self.distribution} {self.version}".strip()

    @property
    def place(self) -> str:
        """Where it comes from."""
        if self.distribution == NOTEBOOK:
            return "the running script or notebook"
        if self.shipped:
            return f"shipped with initflow {initflow.__version__}"
        return str(self.folder or "installed")

    @property
    def origin(self) -> str:
        """Who offers it, and from where."""
        return self.place if self.distribution == NOTEBOOK else f"{self.provider} ({self.place})"

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"folder": self.folder and str(self.folder)}


def folder(requested: Path | None) -> Path:
    """Where plugins lie that are used in place: as ``requested``, else as the environment says."""
    given = os.environ.get("INITFLOW_PLUGINS_DIR")
    return requested or (paths.own(given) if given else Path(FOLDER))


def found(plugins_dir: Path | None = None, group: Group = INITIALIZERS) -> dict[str, Plugin]:
    """Every plugin of ``group`` by name, sorted; nothing is imported.

    Raises :class:`SettingError` for a ``plugins_dir`` that is no folder.
    """
    place = folder(plugins_dir)
    try:
        if not place.is_dir() and (plugins_dir or os.environ.get("INITFLOW_PLUGINS_DIR")):
            raise SettingError(f"plugins_dir must be a folder, not '{place}'")
        users = paths.home() / FOLDER  # another one where the project is a clone
        places = dict.fromkeys([place, users] if place == Path(FOLDER) else [place])
        homes = [home for at in places if at.is_dir() for home in sorted(at.iterdir())]
        in_place = list(_in_folders(homes, group))
    except OSError as error:
        raise SettingError(f"plugins_dir '{place}' cannot be read: {error.strerror}") from error
    installed = list(_installed(group))
    twice = {p.key for p in in_place if not p.problem} & {p.key for p in installed}
    own = _sorted(
        [
            *(_in_notebook() if group is INITIALIZERS else ()),
            *(replace(plugin, installed_too=plugin.key in twice) for plugin in in_place),
            *(plugin for plugin in installed if plugin.key not in twice),
        ],
        group,
    )
    keys = {plugin.key for plugin in own.values() if not plugin.problem}
    shipped = {
        plugin.name: replace(plugin, shipped=True)
        for plugin in _in_folders(paths.shipped_plugins(), group)
        if plugin.key not in keys
    }
    return dict(sorted((shipped | own).items()))


def found_in_notebook() -> dict[str, Plugin]:
    """Those of the running notebook or script alone."""
    return _sorted(_in_notebook(), INITIALIZERS)


def _in_notebook() -> Iterator[Plugin]:
    """Functions marked as initializers in the notebook or script that is running."""
    for name, value in list(vars(sys.modules[NOTEBOOK]).items()):
        # By its very type: other objects may answer to any name, or fail.
        if type(value) is FunctionType and hasattr(value, MARK) and value.__module__ == NOTEBOOK:
            yield Plugin(name, f"{NOTEBOOK}:{name}", NOTEBOOK, "")


def _installed(group: Group) -> Iterator[Plugin]:
    """Of every distribution on the path, by its entry points.

    Of two distributions with one name the first counts, as it is the one that Python imports.
    """
    seen = set()
    for distribution in distributions():
        with contextlib.suppress(UnicodeError, OSError):  # it cannot be read, nor named
            if group.name not in (distribution.read_text("entry_points.txt") or ""):
                continue
            offered = list(_offered(distribution, group))
            if offered and offered[0].key not in seen:
                seen.add(offered[0].key)
                yield from offered


def _offered(distribution: Distribution, group: Group) -> Iterator[Plugin]:
    try:
        metadata = distribution.metadata  # parsed at every access
        name, version = (metadata[key].strip() for key in ("Name", "Version"))
        points = list(distribution.entry_points.select(group=group.name))
    except Exception as error:  # noqa: BLE001 - damaged metadata is no one else's trouble
        name = Path(str(getattr(distribution, "_path", "unknown"))).stem
        yield Plugin(name, "", name, "", problem=f"its metadata are damaged: {cause(error)}")
        return
    for point in points:
        yield Plugin(point.name, point.value, name, version)


def _in_folders(homes: Iterable[Path], group: Group) -> Iterator[Plugin]:
    """Of every one of the folders that has a ``pyproject.toml``, by its entry points.

    One that offers nothing of any group is a scheme's with a problem.
    """
    for home in homes:
        project = home / "pyproject.toml"
        try:
            if not project.is_file():
                continue
            table = tomllib.loads(_text(project))["project"]
            name, version = str(table["name"]), str(table.get("version", ""))
            groups = table.get("entry-points", {})
            if group.name not in groups and (MODELS.name in groups or group is MODELS):
                continue
            points = {k: str(v) for k, v in dict(groups[group.name]).items()}
        except Exception as error:  # noqa: BLE001 - a damaged file is no one else's trouble
            lacking = f'it lacks [project] with a name, or [project.entry-points."{group.name}"]'
            why = lacking if isinstance(error, (KeyError, TypeError)) else first_line(error)
            yield Plugin(home.name, "", home.name, "", home, problem=f"{project}: {why}")
        else:
            for point, function in points.items():
                yield Plugin(point, function, name, version, home)


def _text(file: Path) -> str:
    """What is in ``file``, or a :class:`ValueError` for what would take for ever to parse."""
    if file.stat().st_size > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes")
    text = file.read_text(encoding="utf-8")
    if any(line.count(".") > DEEPEST for line in text.splitlines()):
        raise ValueError(f"a line of it has more than {DEEPEST:,} dots")
    return text


def _sorted(plugins: Iterable[Plugin], group: Group) -> dict[str, Plugin]:
    """By name; what makes a name unusable is the plugin's problem."""
    result: dict[str, Plugin] = {}
    by_name = attrgetter("name")
    for name, same in groupby(sorted(plugins, key=by_name), by_name):
        first, *others = same
        problem = first.problem
        if others:
            origins = " and ".join(plugin.origin for plugin in (first, *others))
            problem = f"two distributions offer '{name}': {origins}"
        elif name in group.taken:
            problem = f"'{name}' is the name of a built-in {group.kind}, which no plugin may take"
        elif not NAME.fullmatch(name):
            letters = "letters, digits, '_', '-' and '.' are"
            problem = f"'{name}' is no name for a {group.kind}: {letters}"
        result[name] = replace(first, problem=problem)
    return result

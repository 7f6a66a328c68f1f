"""Other people's modules: imported within a time limit, from a folder or a file as it is now."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from importlib.metadata import distribution, packages_distributions
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from initflow.core import paths
from initflow.core.isolation import left_alone, seed_all
from initflow.errors import InitflowError, PluginError, SettingError, cause

LIMIT_S = 30.0
# Folders and files of a project that are no part of its distribution (as setuptools has it).
BESIDE = {"build", "conftest", "docs", "examples", "scripts", "setup", "tests", "test"}

T = TypeVar("T")


class NoSuchFileError(Exception):
    """There is no file of the name that was given."""


_importing = threading.RLock()  # of the path, of sys.modules, and of what follows
_used_in_place: set[Path] = set()  # where modules were imported from


def within_limit(function: Callable[[], T], limit_s: float | None = None) -> T:
    """What ``function`` returns or raises; after ``limit_s`` a :class:`TimeoutError`.

    It then goes on in a thread of its own, which ends with the process. Where it exits, that is
    a :class:`PluginError`: the process goes on.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            future.set_exception(error)

    limit_s = LIMIT_S if limit_s is None else limit_s
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit_s)
    if not future.done():
        raise TimeoutError(f"not done within {limit_s:g} s")
    error = future.exception()
    if error and not isinstance(error, Exception):
        raise PluginError(cause(error))
    return future.result()


def module(name: str) -> ModuleType:
    """The module that Python finds by ``name``."""
    with left_alone():
        return within_limit(lambda: importlib.import_module(name))


def module_in_place(name: str, source: Path, *, installed_too: bool) -> ModuleType:
    """The module ``name`` of the folder ``source``, anew, as its files are now.

    Raises an :class:`ImportError` where a module in ``source`` has the name of one elsewhere,
    unless that is only an installed copy of it. ``source`` is ``plugins/project`` or
    ``plugins/project/src``.
    """
    source = source.resolve()
    own = {file.stem for file in source.glob("*.py")}
    own |= {file.parent.name for file in source.glob("*/__init__.py")}
    own -= BESIDE
    plugins = source.parent.parent if source.name == "src" else source.parent
    with _importing:
        # Another folder of plugins was looked into before: its modules have had their time, unless
        # this is one that comes with the package, and stands beside any other.
        if plugins != paths.shipped("plugins").resolve():
            for former in [place for place in _used_in_place if not place.is_relative_to(plugins)]:
                _forget(former)
        for each in own:
            elsewhere = _elsewhere(each, source)
            if elsewhere and not installed_too:
                raise ImportError(f"its module '{each}' has the name of another one, {elsewhere}")
        for each in [each for each in sys.modules if each.partition(".")[0] in own]:
            del sys.modules[each]
        _used_in_place.add(source)
        with _first_on_path(source):
            return module(name)


def module_of_file(file: Path, content: bytes, name: str) -> ModuleType:
    """The module ``name`` that ``content``, of ``file``, makes: run anew, with those beside it."""
    made = ModuleType(name)
    made.__file__ = str(file)
    with _importing, _first_on_path(file.parent):
        before = set(sys.modules)
        sys.modules[name] = made  # dataclasses look for it there
        try:
            code = compile(content, str(file), "exec", dont_inherit=True)
            with left_alone():
                within_limit(lambda: exec(code, vars(made)))  # noqa: S102 - the user's own
        finally:
            # Those beside it are another file's too, by the same names, or edited by then.
            for new in set(sys.modules) - before:
                if Path(getattr(sys.modules[new], "__file__", None) or "").parent == file.parent:
                    del sys.modules[new]
    return made


def by_place(place: str) -> tuple[object, str]:
    """What ``file.py:name`` or ``package.module:name`` names, and whose it is, in which version.

    Raises :class:`NoSuchFileError` where there is no such file, and whatever the code does.
    """
    where, _, name = place.rpartition(":")
    if not where.endswith(".py"):
        found = module(where)
        return attrgetter(name)(found), _provider(found)
    file = paths.own_or_of_project(where)
    if not os.path.isfile(file):  # noqa: PTH113 - never raises
        raise NoSuchFileError(f"there is no file '{where}'")
    content = file.read_bytes()
    found = module_of_file(file.resolve(), content, f"initflow_file_{digest(content)}")
    return attrgetter(name)(found), f"{where} sha256:{digest(content)}"


def called(place: str, who: str, seed: int) -> tuple[object, str]:
    """What the function at ``place`` gives, and whose it is, in which version.

    What it draws from torch's, NumPy's or Python's global generator follows from ``seed``, and they
    are left as they were. Whatever is wrong is a :class:`SettingError` that begins with ``who``.
    """
    function, provider = function_at(place, who)
    made, _ = call(function, (), who, seed)
    return made, provider


def function_at(place: str, who: str) -> tuple[Callable[..., object], str]:
    """The function at ``place``, and whose it is; or a :class:`SettingError` about ``who``."""
    try:
        function, provider = by_place(place)
    except NoSuchFileError as error:
        raise SettingError(f"{who}: {error}") from error
    except Exception as error:  # the code may raise anything
        raise SettingError(f"{who}: {cause(error)}") from error
    if not callable(function):
        raise SettingError(f"{who} must name a function, not {type(function).__name__}")
    return function, provider


def call(
    function: Callable[..., object], arguments: Sequence[object], who: str, seed: int
) -> tuple[object, list[str]]:
    """What ``function`` gives, seeded as :func:`called` has it.

    And from which of the global random states it drew.
    """
    try:
        with left_alone():
            seed_all(seed)
            with left_alone() as changed:
                made = function(*arguments)
    except InitflowError:
        raise
    except Exception as error:  # the code may raise anything
        raise SettingError(f"{who} failed: {cause(error)}") from error
    return made, sorted(what for what in changed if "random" in what)


def _provider(module: ModuleType) -> str:
    """Distribution and version of an importable module or, where it is of none, its digest."""
    if not getattr(module, "__file__", None):  # a notebook has none
        return module.__name__
    file = Path(str(module.__file__))
    for name in packages_distributions().get(module.__name__.partition(".")[0], ()):
        installed = distribution(name)
        if any(Path(str(installed.locate_file(f))) == file for f in installed.files or ()):
            return f"{name} {installed.version}"
    return f"{module.__name__} sha256:{digest(file.read_bytes())}"


def digest(content: bytes) -> str:
    """Enough of the SHA-256 to tell versions apart."""
    return hashlib.sha256(content).hexdigest()[:12]


def _forget(source: Path) -> None:
    """Undo that modules were imported from ``source``."""
    _used_in_place.discard(source)
    sys.path[:] = [place for place in sys.path if place != str(source)]
    for name, loaded in list(sys.modules.items()):
        if Path(getattr(loaded, "__file__", None) or "/").is_relative_to(source):
            del sys.modules[name]


def _elsewhere(name: str, source: Path) -> str | None:
    """Where Python finds the module ``name`` without ``source``, if anywhere."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # loaded, by other means than an import
        return "which is loaded already"
    places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
    outside = [p for p in places if p and not Path(p).resolve().is_relative_to(source)]
    return outside[0] if outside else None


@contextlib.contextmanager
def _first_on_path(source: Path) -> Iterator[None]:
    """Look for modules in ``source`` first; afterwards last, where it hides nothing."""
    place = str(source)
    importlib.invalidate_caches()  # it may be newer than the last look
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
        if place not in sys.path:
            sys.path.append(place)

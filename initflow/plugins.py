"""Schemes from outside, ready to use: a plugin is imported when it is asked for, and not before.

Besides the plugins that :mod:`initflow.finder` finds, any function can be named by its place,
``path/to/file.py:function`` or ``package.module:function``.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, distribution, packages_distributions
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from initflow.errors import PluginError, SettingError, cause, unknown
from initflow.finder import GROUP, Plugin, found, found_in_notebook
from initflow.initializers import BUILT_IN
from initflow.scheme import Scheme, parse

LIMIT_S = 30.0  # for what a plugin may do at once: its import, or filling one network
# Folders and files of a project that are no part of its distribution (as setuptools has it).
BESIDE = {"build", "conftest", "docs", "examples", "scripts", "setup", "tests", "test"}

T = TypeVar("T")
_importing = threading.RLock()  # of the path, of sys.modules, and of what follows
_used_in_place: set[Path] = set()  # where modules were imported from


def load(plugin: Plugin) -> Scheme:
    """Import ``plugin``, or raise a :class:`PluginError` that names it and the cause.

    One that is used in place is imported anew each time, as its files are now.
    """
    who = f"scheme '{plugin.name}' of {plugin.origin}"
    if plugin.problem:
        raise PluginError(f"{who}: {plugin.problem}")
    try:
        point = _entry_point(plugin)
        module = _module(plugin, point.module)
        provider = plugin.provider
        if plugin.folder and not plugin.version and module.__file__:
            provider = f"{provider} sha256:{_digest(Path(module.__file__).read_bytes())}"
        return Scheme.of(_attribute(module, point.attr), plugin.name, provider)
    except Exception as error:  # a plugin's code may raise anything
        raise PluginError(f"{who}: {cause(error)}") from error


def _entry_point(plugin: Plugin) -> EntryPoint:
    point = EntryPoint(plugin.name, plugin.function, GROUP)
    if not point.pattern.match(point.value) or not point.attr:
        raise SettingError(f"its entry point '{point.value}' is not module:function")
    return point


def _module(plugin: Plugin, name: str) -> ModuleType:
    if plugin.folder is None:
        return within(LIMIT_S, lambda: importlib.import_module(name))
    source = plugin.folder / "src"
    source = (source if source.is_dir() else plugin.folder).resolve()
    own = {file.stem for file in source.glob("*.py")}
    own |= {file.parent.name for file in source.glob("*/__init__.py")}
    own -= BESIDE
    with _importing:
        # Another folder of plugins was looked into before: its modules have had their time.
        for former in [p for p in _used_in_place if not p.is_relative_to(_home(plugin))]:
            _forget(former)
        for module in own:
            elsewhere = _found_elsewhere(module, source)
            if elsewhere and not plugin.installed_too:
                raise ImportError(f"its module '{module}' has the name of another one, {elsewhere}")
        for module in [module for module in sys.modules if module.partition(".")[0] in own]:
            del sys.modules[module]
        _used_in_place.add(source)
        with _first_on_path(source):
            return within(LIMIT_S, lambda: importlib.import_module(name))


def _home(plugin: Plugin) -> Path:
    """The folder of plugins that a folder lies in."""
    assert plugin.folder
    return plugin.folder.absolute().parent.resolve()


def _forget(source: Path) -> None:
    """Undo that modules were imported from ``source``."""
    _used_in_place.discard(source)
    sys.path[:] = [place for place in sys.path if place != str(source)]
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(source):
            del sys.modules[name]


def _found_elsewhere(module: str, source: Path) -> str | None:
    """Where Python would find ``module`` without ``source``, if anywhere."""
    try:
        spec = importlib.util.find_spec(module)
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


def _attribute(module: ModuleType, name: str) -> object:
    found: object = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def within(seconds: float, function: Callable[[], T]) -> T:
    """What ``function`` gives or raises, or a :class:`TimeoutError`, with the work left hanging."""
    outcome: list[tuple[T | None, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"not done within {seconds:g} s")
    ((result, error),) = outcome
    if isinstance(error, Exception):
        raise error
    if error:  # an exit: it ends no more than the plugin
        raise PluginError(cause(error))
    return result  # type: ignore[return-value]


def _by_place(place: str) -> Scheme:
    """The function that ``file.py:function`` or ``package.module:function`` names."""
    where, _, name = place.rpartition(":")
    try:
        if where.endswith(".py"):
            file = Path(where).expanduser().resolve(strict=True)
            content = file.read_bytes()
            module = _file_module(file, content)
            provider = f"{where} sha256:{_digest(content)}"
        else:
            module = within(LIMIT_S, lambda: importlib.import_module(where))
            provider = _provider(module)
        return Scheme.of(_attribute(module, name), place, provider)
    except FileNotFoundError as error:
        raise SettingError(f"init '{place}': there is no file '{where}'") from error
    except Exception as error:  # the code may raise anything
        raise PluginError(f"init '{place}': {cause(error)}") from error


def _file_module(file: Path, content: bytes) -> ModuleType:
    """The module that ``content``, of ``file``, makes: run anew, with those beside it."""
    name = f"initflow_file_{_digest(content)}_{file.stem}"
    module = ModuleType(name)
    module.__file__ = str(file)
    with _importing, _first_on_path(file.parent):
        before = set(sys.modules)
        sys.modules[name] = module  # dataclasses look for it there
        try:
            code = compile(content, str(file), "exec", dont_inherit=True)
            within(LIMIT_S, lambda: exec(code, vars(module)))  # noqa: S102 - the user's own
        finally:
            # Those beside it are another file's too, by the same names, or edited by then.
            for new in set(sys.modules) - before:
                if Path(getattr(sys.modules[new], "__file__", None) or "").parent == file.parent:
                    del sys.modules[new]
    return module


def _provider(module: ModuleType) -> str:
    """Distribution and version of an importable module or, where it is of none, its digest."""
    if not module.__file__:
        return module.__name__
    file = Path(module.__file__)
    for name in packages_distributions().get(module.__name__.partition(".")[0], ()):
        installed = distribution(name)
        if any(Path(str(installed.locate_file(f))) == file for f in installed.files or ()):
            return f"{name} {installed.version}"
    return f"{module.__name__} sha256:{_digest(file.read_bytes())}"


def _digest(content: bytes) -> str:
    """Enough of the SHA-256 to tell versions apart."""
    return hashlib.sha256(content).hexdigest()[:12]


def find(spec: str, plugins_dir: Path | None = None) -> Scheme:
    """The scheme that ``spec`` names, with its arguments.

    Raises :class:`SettingError` for a name or an argument that is wrong, and
    :class:`PluginError` for a plugin that cannot be used.
    """
    wanted = spec.partition(":")[0].strip()
    # A built-in scheme need not wait for a search of the whole path.
    plugins = found_in_notebook() if wanted in BUILT_IN else found(plugins_dir)
    name, arguments = parse(spec, [*BUILT_IN, *plugins])
    if name in plugins:
        scheme = load(plugins[name])
    elif name in BUILT_IN:
        scheme = BUILT_IN[name]
    elif ":" in name:
        scheme = _by_place(name)
    else:
        usable = [plugin.name for plugin in plugins.values() if not plugin.problem]
        raise unknown("init", name, [*BUILT_IN, *usable])
    return scheme.bind(arguments)


def load_all(plugins_dir: Path | None = None) -> Iterator[tuple[Plugin, Scheme | PluginError]]:
    """Every plugin, with its scheme or with why it has none."""
    for plugin in found(plugins_dir).values():
        try:
            yield plugin, load(plugin)
        except PluginError as error:
            yield plugin, error

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
from importlib.metadata import EntryPoint, packages_distributions, version
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch

from initflow.activations import ACTIVATIONS, Activation
from initflow.data import Split
from initflow.errors import PluginError, SettingError, cause, unknown
from initflow.finder import GROUP, Plugin, found, found_in_notebook
from initflow.initializers import BUILT_IN
from initflow.model import initialize
from initflow.scheme import Place, Scheme, parse

LIMIT_S = 30.0  # for what a plugin may do at once: its import, or filling one network

T = TypeVar("T")


def load(plugin: Plugin) -> Scheme:
    """Import ``plugin``, or raise a :class:`PluginError` that names it and the cause."""
    who = f"scheme '{plugin.name}' of {plugin.origin}"
    if plugin.problem:
        raise PluginError(f"{who}: {plugin.problem}")
    try:
        function = within(LIMIT_S, lambda: _function(plugin))
        return Scheme.of(function, plugin.name, plugin.provider)
    except Exception as error:  # a plugin's code may raise anything
        raise PluginError(f"{who}: {cause(error)}") from error


def _function(plugin: Plugin) -> object:
    point = EntryPoint(plugin.name, plugin.function, GROUP)
    if not point.pattern.match(point.value) or not point.attr:
        raise SettingError(f"its entry point '{point.value}' is not module:function")
    return _attribute(_module(plugin, point), point.attr)


def _module(plugin: Plugin, point: EntryPoint) -> ModuleType:
    if plugin.folder is None:
        return importlib.import_module(point.module)
    source = plugin.folder / "src"
    source = (source if source.is_dir() else plugin.folder).resolve()
    top = point.module.partition(".")[0]
    loaded = sys.modules.get(top)
    if loaded and not _lies_in(loaded, source):
        if not plugin.installed_too:
            where = getattr(loaded, "__file__", None) or "Python itself"
            raise ImportError(
                f"its module '{top}' has the name of one that is loaded already, from {where}"
            )
        for name in [name for name in sys.modules if name.partition(".")[0] == top]:
            del sys.modules[name]  # the installed copy: the folder is the one to use
    with _first_on_path(source):
        return importlib.import_module(point.module)


def _lies_in(module: ModuleType, source: Path) -> bool:
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(place and Path(place).resolve().is_relative_to(source) for place in places)


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
            module = within(LIMIT_S, lambda: _file_module(file))
            provider = f"{where} sha256:{_digest(file)}"
        else:
            module = within(LIMIT_S, lambda: importlib.import_module(where))
            provider = _provider(module)
        return Scheme.of(_attribute(module, name), place, provider)
    except FileNotFoundError as error:
        raise SettingError(f"init '{place}': there is no file '{where}'") from error
    except Exception as error:  # the code may raise anything
        raise PluginError(f"init '{place}': {cause(error)}") from error


def _file_module(file: Path) -> ModuleType:
    """The module in ``file``, run anew, so that an edit counts."""
    name = f"initflow_file_{_digest(file)}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _first_on_path(file.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _provider(module: ModuleType) -> str:
    """Distribution and version of an importable module or, where it is in none, its digest."""
    for distribution in packages_distributions().get(module.__name__.partition(".")[0], ()):
        return f"{distribution} {version(distribution)}"
    file = getattr(module, "__file__", None)
    return f"{module.__name__} sha256:{_digest(Path(file))}" if file else module.__name__


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def find(spec: str, plugins_dir: Path | None = None, *activations: str) -> Scheme:
    """The scheme that ``spec`` names, with its arguments, tried on a small network.

    It is tried with each of ``activations``, so that what it refuses is known before any work.
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
    scheme = scheme.bind(arguments)
    for activation in activations:
        _try(scheme, ACTIVATIONS[activation])
    return scheme


def _try(scheme: Scheme, activation: Activation) -> None:
    """Fill a small network, on random images, or raise what is wrong with the scheme."""
    images = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    data = Split(images, torch.arange(20) % 2)
    initialize((4, 6, 2), scheme, activation, bias_init="pytorch", seed=0, data=data)
    for variance in (scheme.variance, scheme.bias_variance):
        variance(Place(4, 6, activation, 0, 2))


def load_all(plugins_dir: Path | None = None) -> Iterator[tuple[Plugin, Scheme | PluginError]]:
    """Every plugin, with its scheme or with why it has none."""
    for plugin in found(plugins_dir).values():
        try:
            yield plugin, load(plugin)
        except PluginError as error:
            yield plugin, error

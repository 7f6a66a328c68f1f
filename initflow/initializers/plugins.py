"""Schemes from outside, ready to use: a plugin is imported when it is used, and not before.

Besides the plugins that :mod:`initflow.initializers.finder` finds, any function can be named by its
place, ``path/to/file.py:function`` or ``package.module:function``.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from operator import attrgetter
from pathlib import Path

from initflow.core import importing
from initflow.errors import PluginError, SettingError, cause, unknown
from initflow.initializers.built_in import BUILT_IN
from initflow.initializers.finder import INITIALIZERS, Group, Plugin, found, found_in_notebook
from initflow.initializers.scheme import Scheme, parse


def load(plugin: Plugin) -> Scheme:
    """The scheme of ``plugin``, or a :class:`PluginError` that names it and the cause."""
    try:
        function, provider = imported(plugin, INITIALIZERS)
        return Scheme.of(function, plugin.name, provider)
    except Exception as error:  # a plugin's code may raise anything
        raise PluginError(f"scheme '{plugin.name}' of {plugin.origin}: {cause(error)}") from error


def imported(plugin: Plugin, group: Group) -> tuple[object, str]:
    """What ``plugin`` offers, and its provider. Whatever its code raises comes through.

    One that is used in place is imported anew each time, as its files are now.
    """
    point, problem = EntryPoint(plugin.name, plugin.function, group.name), plugin.problem
    if not problem and not (point.pattern.match(point.value) and point.attr):
        problem = f"its entry point '{point.value}' is not module:function"
    if problem:
        raise SettingError(problem)
    provider, source = plugin.provider, plugin.source
    if source is None:
        module = importing.module(point.module)
    else:
        module = importing.module_in_place(point.module, source, installed_too=plugin.installed_too)
        if not plugin.version and module.__file__:
            digest = importing.digest(Path(module.__file__).read_bytes())
            provider = f"{provider} sha256:{digest}"
    return attrgetter(point.attr)(module), provider


def _by_place(place: str) -> Scheme:
    """The function that ``file.py:function`` or ``package.module:function`` names."""
    try:
        function, provider = importing.by_place(place)
        return Scheme.of(function, place, provider)
    except importing.NoSuchFileError as error:
        raise SettingError(f"init '{place}': {error}") from None
    except Exception as error:  # the code may raise anything
        raise PluginError(f"init '{place}': {cause(error)}") from error


def find(spec: str, plugins_dir: Path | None = None) -> Scheme:
    """The scheme that a text names, with its arguments: what ``init`` is everywhere.

    - ``spec``: ``he`` or ``normal:std=0.05`` for a built-in one; a plugin's name; or the place of a
      function, ``file.py:function:gain=2`` or ``package.module:function``. Arguments are
      ``key=value`` behind a colon, with commas between them.
    - ``plugins_dir``: a folder whose plugins are used in place (default None:
      ``INITFLOW_PLUGINS_DIR``, else ``plugins``).

    Returns a :class:`Scheme`. Raises :class:`SettingError` for a name or an argument that is wrong,
    and :class:`PluginError` for a plugin or function that cannot be used.
    """
    if not isinstance(spec, str):
        raise SettingError(f"init must be text, such as 'he' or 'normal:std=0.05', not {spec!r}")
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

"""Which schemes and models plugins offer here, and which of them cannot be used.

Each is imported, as it is when it is used.
"""

from __future__ import annotations

from initflow.checkup.finding import Finding
from initflow.errors import PluginError, SettingError, cause
from initflow.initializers import finder, plugins
from initflow.initializers.finder import MODELS, Plugin

THEN = "mend or remove it; 'initflow plugins list' has where it is"


def look() -> Finding:
    """Names with who offers them; the broken ones are problems."""
    offered: dict[str, list[dict[str, str]]] = {"schemes": [], "models": []}
    problems = []
    try:
        for plugin, scheme in plugins.load_all():
            if isinstance(scheme, PluginError):
                problems.append(f"{scheme}: {THEN}")
            else:
                offered["schemes"].append(_told(plugin))
        for plugin in finder.found(group=MODELS).values():
            try:
                plugins.imported(plugin, MODELS)
            except Exception as error:  # noqa: BLE001 - a plugin's code may raise anything
                problems.append(f"model '{plugin.name}' of {plugin.origin}: {cause(error)}: {THEN}")
            else:
                offered["models"].append(_told(plugin))
    except SettingError as error:  # INITFLOW_PLUGINS_DIR is no folder
        problems.append(f"{error}; INITFLOW_PLUGINS_DIR names it")
    return Finding(offered, problems)


def _told(plugin: Plugin) -> dict[str, str]:
    return {"name": plugin.name, "from": plugin.provider, "where": plugin.place}

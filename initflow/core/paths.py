"""Paths as the user means them, also where the project runs from a clone that MLflow made.

``mlflow run https://…`` clones the project into a temporary folder and runs it there, so that the
working folder is nobody's. What is the user's own is then beside MLflow's store or, where a server
holds the runs, in the user's data folder. And the paths of what comes with the package.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote

STORE = "sqlite:///"
# By kind, the variable that names a user's folder, and the folder on Linux and on macOS where it is
# not set: as platformdirs has them, which is not used, as watching needs torch and mlflow alone.
KINDS = {
    "data": ("XDG_DATA_HOME", "~/.local/share", "~/Library/Application Support"),
    "state": ("XDG_STATE_HOME", "~/.local/state", "~/Library/Application Support"),
    "cache": ("XDG_CACHE_HOME", "~/.cache", "~/Library/Caches"),
}
PACKAGE = Path(__file__).parents[1]
# Of the folder plugins/: those that setup.py puts into a wheel.
SHIPPED_PLUGINS = ("initflow-critical", "initflow-looks-linear", "initflow-lsuv")
MADE = re.compile(r"tmp[a-z0-9_]{8}")  # as MLflow's tempfile.mkdtemp names a folder


def working_folder() -> Path | None:
    """Where the process runs; None where that folder was removed meanwhile."""
    try:
        return Path.cwd()
    except OSError:
        return None


def of_user(kind: str) -> Path:
    """The user's folder for our files of a ``kind`` in :data:`KINDS`, on any system."""
    if os.name == "nt":
        local = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/AppData/Local")  # noqa: PTH111 - as below
        return Path(local, "initflow", "initflow", "Cache" if kind == "cache" else "")
    variable, linux, mac = KINDS[kind]
    named = os.environ.get(variable, "")
    usual = os.path.expanduser(mac if sys.platform == "darwin" else linux)  # noqa: PTH111 - leaves ~ where there is no home
    return Path(named if os.path.isabs(named) else usual, "initflow")  # noqa: PTH117 - of text


def in_clone() -> bool:
    """Whether the working folder is in a temporary one that ``mlflow run`` made."""
    here, above = working_folder(), Path(tempfile.gettempdir()).resolve()
    if not here or "MLFLOW_TRACKING_URI" not in os.environ or above not in here.parents:
        return False
    top = here.relative_to(above).parts[0]
    return bool(MADE.fullmatch(top)) and (above / top / ".git").is_dir()


def home() -> Path:
    """Where the user's own files are: the working folder, but for a clone."""
    if not in_clone():
        return Path()
    store = store_file(os.environ["MLFLOW_TRACKING_URI"])
    return store.parent if store else of_user("data")


def store_file(uri: str) -> Path | None:
    """The file of MLflow's store at ``uri``, which quotes spaces and the like; None of others."""
    if not uri.startswith(STORE):
        return None
    return Path(unquote(uri.removeprefix(STORE).partition("?")[0]))


def own(path: str | os.PathLike[str]) -> Path:
    """``path`` with ~ for the user's home; a relative one is of :func:`home`."""
    return home() / os.path.expanduser(path)  # noqa: PTH111 - leaves an unknown ~user as it is


def own_or_of_project(path: str) -> Path:
    """A file that is the user's or, where there is none of that name, the project's."""
    mine = own(path)
    return mine if os.path.isfile(mine) else Path(os.path.expanduser(path))  # noqa: PTH111, PTH113 - never raise


def shipped(name: str) -> Path:
    """What comes with the package: in an installed one its own copy, else that of the checkout."""
    copies = PACKAGE / "shipped"
    return (copies if copies.is_dir() else PACKAGE.parent) / name


def shipped_plugins() -> list[Path]:
    """The folders of the plugins that come with the package."""
    homes = (shipped("plugins") / name for name in SHIPPED_PLUGINS)
    return [home for home in homes if home.is_dir()]

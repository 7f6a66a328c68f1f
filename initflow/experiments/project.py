"""An MLflow Project of the user's own: what it takes that ``mlflow run`` works in any folder.

The entry points are those of the package, whose own file it is a copy of; the environment is the
pinned packages, and initflow from where it was installed here.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from importlib.metadata import distributions
from pathlib import Path

import initflow
from initflow.core import paths
from initflow.errors import SettingError
from initflow.initializers import scaffold

ENTRY_POINTS, ENVIRONMENT, PINS = "MLproject", "conda.yaml", "requirements.lock"
PLUGIN = "template"  # as in the plugins/ of initflow's own project
ABOUT_PLUGINS = f"""# Plugins

Each folder here that is a plugin is used in place, with nothing to install:
`mlflow run DIR -P init={PLUGIN}`, where DIR is the folder above this one.
`initflow-{PLUGIN}` is a small one, to change into your own. In DIR,

```console
initflow plugins new NAME
initflow plugins check NAME
```

write another one into this folder, and try it by the rules that an initializer keeps to.
"""


def new(folder: Path) -> str:
    """Make ``folder`` such a project, and return from where its environment takes initflow.

    Raises a :class:`SettingError` where something is there already, or where it cannot be written;
    then nothing is left of it.
    """
    itself = requirement(_installed_from())
    try:
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise SettingError(f"the project's folder must be empty or not there, not '{folder}'")
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as beside:
                _write(Path(beside), itself)
                for part in sorted(Path(beside).iterdir()):
                    part.rename(folder / part.name)
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir() if made else None
            raise
    except OSError as error:
        raise SettingError(f"'{folder}' cannot be written: {error.strerror}") from error
    return itself


def _write(folder: Path, itself: str) -> None:
    for name in (ENTRY_POINTS, PINS):
        (folder / name).write_bytes(paths.shipped(name).read_bytes())
    _, start, environment = paths.shipped(ENVIRONMENT).read_text("utf-8").partition("name:")
    about = (
        "# The environment of `mlflow run`: what initflow is tested with, and initflow itself.\n"
    )
    (folder / ENVIRONMENT).write_text(
        f"{about}{start}{environment.rstrip()}\n      - {itself}\n", encoding="utf-8"
    )
    scaffold.write(PLUGIN, folder / "plugins" / f"initflow-{PLUGIN}")
    (folder / "plugins" / "README.md").write_text(ABOUT_PLUGINS, encoding="utf-8")


def requirement(installed_from: str | None) -> str:
    """What pip is to be told to install this initflow: from where it was ``installed_from``.

    That is a record of PEP 610 (``direct_url.json``), which there is none of where it came from a
    package index: then it is this version from there.
    """
    if not installed_from:
        return f"initflow=={initflow.__version__}"
    record = json.loads(installed_from)
    url, subdirectory = record["url"], record.get("subdirectory")
    if "vcs_info" in record:
        url = f"{record['vcs_info']['vcs']}+{url}@{record['vcs_info']['commit_id']}"
    return f"initflow @ {url}" + (f"#subdirectory={subdirectory}" if subdirectory else "")


def _installed_from() -> str | None:
    """The record of where this initflow is from; a checkout is from itself, installed or not."""
    checkout = paths.shipped(ENTRY_POINTS).parent
    if checkout == paths.PACKAGE.parent:
        return json.dumps({"url": checkout.as_uri()})
    found = next(iter(distributions(name="initflow", path=[str(paths.PACKAGE.parent)])), None)
    return found.read_text("direct_url.json") if found else None

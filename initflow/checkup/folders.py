"""Where files go, whether they can be written there, and how much room is left; and git's word."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from initflow.checkup.finding import Finding
from initflow.core import repository
from initflow.tracking import connection, outbox
from initflow.tracking.logged_models import model_files
from initflow.training import datasets

LITTLE = 100 * 10**6  # bytes, which a run with its model and figures may take
# What must be written, and by what another folder is given; without the others it goes on.
NEEDED = {"runs": "MLFLOW_TRACKING_URI", "outbox": "INITFLOW_OUTBOX", "temporary": "TMPDIR"}


def look() -> Finding:
    """Each folder with its free bytes and whether it can be written, and the repository's state."""
    found = {
        **({} if connection.is_served() else {"runs": connection.folder()}),
        "data": datasets.data_dir(None),
        "models": model_files.cache(),
        "outbox": outbox.folder(),
        "temporary": Path(tempfile.gettempdir()),
    }
    folders, problems = {}, []
    for what, folder in found.items():
        free, is_writable = _room(folder)
        folders[what] = {"path": str(folder), "free": free, "is_writable": is_writable}
        if what in NEEDED and not is_writable:
            problems.append(
                f"folder '{folder}' for {what} cannot be written: give {NEEDED[what]} another one"
            )
        elif what in NEEDED and free < LITTLE:
            problems.append(
                f"folder '{folder}' for {what} has {free / 10**6:.0f} MB left: make room, or give "
                f"{NEEDED[what]} another one"
            )
    here = repository.current()
    git = {"is_there": bool(shutil.which("git")), "commit": here.commit, "tree": here.tree}
    return Finding({"folders": folders, "git": git}, problems)


def _room(folder: Path) -> tuple[int, bool]:
    """Of a folder that may still have to be made."""
    whole = folder.absolute()
    there = next(place for place in (whole, *whole.parents) if os.path.isdir(place))  # noqa: PTH112 - never raises
    return shutil.disk_usage(there).free, os.access(there, os.W_OK)

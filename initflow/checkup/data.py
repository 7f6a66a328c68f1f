"""Which data sets are on disk, and which would be downloaded."""

from __future__ import annotations

from initflow.checkup.finding import Finding
from initflow.errors import DataError
from initflow.training import datasets


def look() -> Finding:
    """Each data set, and whether it is ``there``, in the folder."""
    folder = datasets.data_dir(None)
    there, problems = {}, []
    for name in datasets.SIZES:
        try:
            there[name] = datasets.is_there(name, folder)
        except DataError as error:
            there[name] = False
            problems.append(f"{error}: give INITFLOW_DATA_DIR a folder that can be read")
    return Finding({"folder": str(folder), "there": there}, list(dict.fromkeys(problems)))

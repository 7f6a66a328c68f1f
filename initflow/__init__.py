"""initflow: how a network's weights start, measured, compared and reproduced.

Importing the package is light: neither torch nor mlflow, optuna or matplotlib is
loaded until something that needs it is called.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from initflow.core.configurations import TrainConfig
    from initflow.diagnostics.inspection import inspect
    from initflow.errors import InitflowError
    from initflow.initializers.scheme import initializer
    from initflow.tracking.watching import watch

__version__ = "0.1.0"

__all__ = ["InitflowError", "TrainConfig", "__version__", "initializer", "inspect", "watch"]

_HOMES = {
    "InitflowError": "initflow.errors",
    "TrainConfig": "initflow.core.configurations",
    "initializer": "initflow.initializers.scheme",
    "inspect": "initflow.diagnostics.inspection",
    "watch": "initflow.tracking.watching",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'initflow' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""initflow: how a network's weights start, measured, compared and reproduced.

Importing the package is light: neither torch nor mlflow, optuna or matplotlib is
loaded until something that needs it is called.
"""

from initflow.config import TrainConfig
from initflow.errors import InitflowError

__version__ = "0.1.0"

__all__ = ["InitflowError", "TrainConfig", "__version__"]

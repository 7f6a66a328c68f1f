"""initflow: how a network's weights start, measured, compared and reproduced.

What a user needs is here: ``train, compare, tune, diagnose, reproduce, verify, export`` with their
configurations, ``inspect`` and ``watch`` for any model, with ``lightning_callback`` and
``transformers_callback``, ``initializer`` for a scheme of one's own, the errors, and the namespaces
``initializers``, ``theory`` and ``testing``. Importing the package is light: neither torch nor
mlflow, optuna or matplotlib is loaded until something needs it.
"""

from initflow.core.lazy import attach

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = attach(__name__)

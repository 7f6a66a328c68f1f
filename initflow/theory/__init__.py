"""What theory predicts of an untrained network: mean field, and this network with its band.

Variances and activation functions in, numbers out. Nothing is measured here: the room
:mod:`initflow.diagnostics` sets measured beside predicted.
"""

from initflow.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__)

"""What theory predicts of an untrained network: mean field, and this network with its band.

Variances and activation functions in, numbers out. Nothing is measured here: the room
:mod:`initflow.diagnostics` sets measured beside predicted.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

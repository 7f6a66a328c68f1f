from .activations import ACTIVATIONS, Activation
from .built_in import BUILT_IN
from .plugins import find
from .scheme import Place, Scheme, initializer

__all__ = ["ACTIVATIONS", "BUILT_IN", "Activation", "Place", "Scheme", "find", "initializer"]

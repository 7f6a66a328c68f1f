"""Initialization schemes: the built-in ones, plugins, and the contract that all of them keep.

A spec such as ``normal:std=0.05`` comes in, and a function that fills weights goes out, to the
networks of :mod:`initflow.training`. Nothing is trained or measured here.
"""

from initflow.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__)

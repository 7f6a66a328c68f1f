"""Data, networks and the training loop: settings and a scheme in, trained parameters out.

Many networks train as one stack, bit-identical to each alone. What is measured of them is for
:mod:`initflow.diagnostics`, what is logged for :mod:`initflow.tracking`.
"""

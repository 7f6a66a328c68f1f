"""The ``initflow`` command: a thin layer over the functions of :mod:`initflow.experiments`.

Only here is anything printed, and only here does a process exit.
"""

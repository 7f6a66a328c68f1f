"""Settings and the process they apply to: what every other room may use, and no network yet.

Paths, settings, seeds, the machine, the environment that is recorded, other people's code, and the
pools of workers. Nothing here knows a scheme, a network or a run.
"""

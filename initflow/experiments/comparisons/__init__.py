"""Many networks side by side: schemes, a published table, depths beside theory, learning rates.

Each command trains a population, in a run of its own; what that run carries is the overview.
"""

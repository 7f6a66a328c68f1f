"""What a user runs: train, compare, reproduce, tune, diagnose, verify.

Settings in, a result and its runs in MLflow out: here data, schemes, training, measuring, figures
and tracking come together, and nowhere else.
"""

"""Runs that are in MLflow already, whoever logged them: grouped by a parameter, and compared.

Nothing is trained here, and nothing written.
"""

"""Trainings of any model watched: every so many steps its layers' quantities go to MLflow.

By a ``with`` around a loop of one's own, or by a callback where another package has the loop.
"""

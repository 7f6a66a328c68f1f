"""Tuning: a study of Optuna for each scheme under equal budgets, and the test of its best setting.

No other room imports optuna.
"""

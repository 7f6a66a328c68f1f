"""MLflow: runs that are written, read and found again, also while its server does not answer.

What is measured comes in and reaches MLflow, now or later. No other room imports mlflow. MLflow
itself imports ``context`` from here in each process, so that this file must import nothing.
"""

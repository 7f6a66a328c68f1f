"""What is done without training: models initialized, looked into, diagnosed.

Values go up to the user, and to MLflow for a diagnosis alone.
"""

"""A network as a model in MLflow: its files, where they belong, and what loads it again.

And what makes many requests to a database a single one.
"""

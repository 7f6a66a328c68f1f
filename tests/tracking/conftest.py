"""What tests of watching share."""

import mlflow
import pytest

from initflow.tracking import runs


@pytest.fixture
def logged(monkeypatch, tmp_path):
    """A run that is active; each batch of metrics or tags that it gets, in order."""
    batches = []
    monkeypatch.chdir(tmp_path)  # where older versions of MLflow make a store at once
    monkeypatch.setenv("INITFLOW_CONTEXT_TAGS", "false")  # which are tested elsewhere

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        batches.append((metrics, tags))

    monkeypatch.setattr(runs, "active", lambda: runs.Run("id", "0", ()))
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", log_batch)
    return batches

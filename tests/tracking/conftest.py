"""What tests of watching share."""

import mlflow
import pytest

from initflow.tracking import runs
from tests.conftest import new_store


@pytest.fixture(scope="session")
def aside(tmp_path_factory):
    """A working folder with a store, in which nothing is written."""
    folder = tmp_path_factory.mktemp("aside")
    new_store(folder)
    return folder


@pytest.fixture
def logged(monkeypatch, aside):
    """A run that is active; each batch of metrics or tags that it gets, in order."""
    batches = []
    monkeypatch.chdir(aside)  # or MLflow would make a store in the checkout
    monkeypatch.setenv("INITFLOW_CONTEXT_TAGS", "false")  # which are tested elsewhere

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        batches.append((metrics, tags))

    monkeypatch.setattr(runs, "active", lambda: runs.Run("id", "0", ()))
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", log_batch)
    return batches

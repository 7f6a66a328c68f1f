"""What is told of entries that were not sent: here, and by workers elsewhere."""

import platform
from concurrent.futures import Future
from dataclasses import replace

import mlflow
import pytest

from initflow.core import workers
from initflow.errors import TrackingError
from initflow.tracking import connection, delivery, unsent
from initflow.tracking.outbox import Entry
from tests.test_end_to_end import free_port


@pytest.fixture
def away(tmp_path, monkeypatch):
    """The address of a server that does not answer, to which something waits."""
    monkeypatch.setenv("INITFLOW_OUTBOX", str(tmp_path / "outbox"))
    monkeypatch.setattr(unsent, "CLOSING_PATIENCE_S", 0.01)
    monkeypatch.setattr(unsent, "_of_workers", {})
    address = f"http://127.0.0.1:{free_port()}"
    mlflow.set_tracking_uri(address)
    yield address
    sender = delivery.sender(address)
    sender._box.discard()
    sender._queue.clear()
    mlflow.set_tracking_uri(None)


def pool(*, is_here=False):
    """Workers that are this process, and may think that they are not."""

    def submit(function, *args):
        future = Future()
        future.set_result(function(*args))
        return future

    return workers.WorkerPool(1, 1, submit, is_here=is_here)


def write(task):
    """Some work, of which there is something to be written."""
    delivery.sender(connection.uri()).send(Entry("tags", f"run {task}", {"tags": {"a": "b"}}))
    return 2 * task


def carried_out(pool, tasks=(1, 2)):
    left = list(tasks)
    return list(unsent.results(pool, write, lambda: left.pop(0) if left else None))


def test_results_are_those_of_the_work(away):
    """Whoever carries it out."""
    assert carried_out(pool()) == carried_out(pool(is_here=True)) == [(1, 2), (2, 4)]


def test_what_waits_on_another_machine_is_told(away, monkeypatch):
    """By what it told last; of this machine, by the outboxes that are there."""
    carried_out(pool())
    (line,) = unsent.waiting_lines()
    assert line.startswith("2 entries wait in '")
    here = platform.node()
    told = unsent._of_here()
    monkeypatch.setattr(
        unsent,
        "_of_here",
        lambda: replace(told, host="node-2", place="/there", waiting=7, reason="away"),
    )
    carried_out(pool(), [1])
    of_here, of_there = unsent.waiting_lines()
    assert of_here.startswith("3 entries wait in '")
    assert of_there == (
        f"7 entries wait on node-2 in '/there' for MLflow at '{away}' (away): "
        "'initflow sync' there sends them."
    )
    assert {host for host, _ in unsent._of_workers} == {here, "node-2"}


def test_what_a_worker_loses_is_an_error_here(away, monkeypatch):
    """With that of all others, and of this process."""
    unsent.check_kept()
    here = unsent._of_here()
    for process, lost in ((1, 2), (1, 5), (2, 0)):
        rest = replace(here, process=process, lost=lost, reason="full")
        with monkeypatch.context() as there:
            there.setattr(unsent, "_of_here", lambda rest=rest: rest)
            carried_out(pool(), [1])
    with pytest.raises(TrackingError, match=r"^5 entries for MLflow at '.*' are lost, .*: full;"):
        unsent.check_kept()

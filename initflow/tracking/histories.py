"""The values of one metric in many runs, by few questions to MLflow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.rest_store import RestStore
from mlflow.utils.rest_utils import http_request, verify_rest_response

from initflow.tracking.logged_models.transactions import store_of

AT_ONCE = 50  # runs in a question, whose ids make an address of 2,200 characters
MOST = 25_000  # values that a server gives in an answer
# What MLflow's page asks; a server that does not have it is asked run by run.
ADDRESS = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
UNKNOWN = (404, 405)  # HTTP's words for that
History = list[tuple[int, float]]  # (step, value) pairs; of one step as they were logged
Logged = tuple[int, int, float]  # step, time and value


def of_runs(client: mlflow.MlflowClient, run_ids: Sequence[str], key: str) -> dict[str, History]:
    """That of the metric ``key`` in each of the runs that has it: at most :data:`AT_ONCE` runs."""
    values = _together(client, run_ids, key)
    if values is None:
        return {run: found for run in run_ids if (found := of_run(client, run, key))}
    histories: dict[str, list[Logged]] = {}
    for run, logged in values:
        histories.setdefault(run, []).append(logged)
    return {run: _in_order(history) for run, history in histories.items()}


def of_run(client: mlflow.MlflowClient, run_id: str, key: str) -> History:
    """That of one run; empty where it has none."""
    values = client.get_metric_history(run_id, key)
    return _in_order((m.step, m.timestamp, m.value) for m in values)


def _in_order(values: Iterable[Logged]) -> History:
    return [(step, value) for step, _, value in sorted(values)]


def parts(run_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Them, as many at a time as one question is for."""
    return (run_ids[at : at + AT_ONCE] for at in range(0, len(run_ids), AT_ONCE))


def _together(
    client: mlflow.MlflowClient, run_ids: Sequence[str], key: str
) -> list[tuple[str, Logged]] | None:
    """Each run with what was logged, of all of them; None where that cannot be asked for."""
    store, values = store_of(client), list[tuple[str, Logged]]()
    if isinstance(store, RestStore):
        asked = [*(("run_id", run) for run in run_ids), ("metric_key", key), ("max_results", MOST)]
        answer = http_request(store.get_host_creds(), ADDRESS, "GET", params=asked)  # type: ignore[no-untyped-call]
        if answer.status_code in UNKNOWN:
            return None
        try:
            told = verify_rest_response(answer, ADDRESS).json()["metrics"]
            values = [
                (one["run_id"], (int(one["step"]), int(one["timestamp"]), float(one["value"])))
                for one in told
            ]
        except ValueError:  # no JSON: a page of something before the server
            return None
        except (KeyError, TypeError) as error:
            raise MlflowException(f"no histories of metrics: {error!r}") from error
    elif hasattr(store, "get_metric_history_bulk"):
        found: Sequence[Any] = store.get_metric_history_bulk(run_ids, key, MOST)
        values = [(one.run_id, (one.step, one.timestamp, one.value)) for one in found]
    else:
        return None
    return values if len(values) < MOST else None  # else some may be missing

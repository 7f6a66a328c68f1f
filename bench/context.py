"""What the environment's tags cost a run, timed in one fresh process: ``python -m bench.context``.

Prints seconds as JSON: of ``mlflow.start_run`` without our provider, closed again, and what is
added with it, in turn, in a SQLite store; and of what the provider does at its first use.
"""

from __future__ import annotations

import json
import tempfile
import time

import mlflow
from mlflow.tracking.context import registry

import initflow.initializers.scheme  # noqa: F401 - now this process uses initflow
from initflow.tracking.context import EnvironmentTags

RUNS = 100  # on each side


def first_use() -> float:
    """Its seconds, the import of what the provider needs included."""
    ours = EnvironmentTags()
    started = time.perf_counter()
    found = ours.in_context() and ours.tags()
    seconds = time.perf_counter() - started
    assert found
    return seconds


def run(*, tagged: bool) -> float:
    """The seconds of one that is opened and closed."""
    providers = registry._run_context_provider_registry._registry  # noqa: SLF001 - no public way
    others = [one for one in providers if not isinstance(one, EnvironmentTags)]
    providers[:] = [*others, EnvironmentTags()] if tagged else others
    started = time.perf_counter()
    with mlflow.start_run() as active:
        pass
    seconds = time.perf_counter() - started
    assert ("initflow.version" in active.data.tags) == tagged
    return seconds


def main() -> None:
    first = first_use()
    with tempfile.TemporaryDirectory() as folder:
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        run(tagged=False)  # makes the store
        without, added = [], []
        for n in range(RUNS):
            seconds = {tagged: run(tagged=tagged) for tagged in (n % 2 == 0, n % 2 == 1)}
            without.append(seconds[False])
            added.append(seconds[True] - seconds[False])
    print(json.dumps({"first": first, "without": without, "added": added}))


if __name__ == "__main__":
    main()

"""How what was measured gets into MLflow: one request, or a few, for each entry of an outbox.

An entry may be sent twice, because the answer to it was lost: each kind makes that harmless, by
itself (a metric has its time, an end its status) or by looking at what is there already (a run has
its key as a tag, a model its run).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import mlflow.data.meta_dataset
import numpy as np
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.entities import (
    DatasetInput,
    InputTag,
    LifecycleStage,
    Metric,
    Param,
    RunInfo,
    RunStatus,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.types import Schema, TensorSpec
from mlflow.utils import get_results_from_paginated_fn
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from initflow.core.secrets import without_credentials
from initflow.errors import cause
from initflow.tracking import connection, mlflow_page, outages, outbox
from initflow.tracking.connection import impatient
from initflow.tracking.logged_models import artifacts, models, transactions
from initflow.tracking.outbox import (
    KEY,
    KEYS,
    KEYS_IN_BYTES,
    MODEL_KEY,
    RUN,
    Entry,
    Known,
    NeverMadeError,
    NoModelError,
    RefusedError,
    UnknownKeyError,
    experiment_key,
)
from initflow.tracking.sender import SLOW_S, Sender, Way
from initflow.training.splits import PIXELS

KEY_TAG = "initflow.key"  # the tag by which a run is found whose id was never heard
ORPHANED = "initflow.orphaned"  # the tag of a run that is not counted, as its process died
OPENER = "initflow.opener"  # the tag of the process that has a run open: see open_runs
PAGE = 1_000  # runs or experiments that are requested at once


def way(uri: str) -> Way:
    """To the server or store at ``uri``."""
    return Way(
        tracking=without_credentials(uri),
        carry_out=functools.partial(carry_out, uri),
        is_outage=functools.partial(outages.is_outage, uri),
        is_refusal=functools.partial(outages.is_refusal, uri),
        answers=functools.partial(connection.answers, uri),
        reason_of=outages.reason,
        slow_s=SLOW_S if connection.is_served(uri) else math.inf,
    )


_made_again: set[str] = set()  # runs that may have a twin
# By process, as a forked one has none of the threads, and what waits is its parent's to send.
# Those of parents are kept: letting go of them would let go of their files' locks.
_senders: dict[tuple[int, str], Sender] = {}


def sender(where: str = "") -> Sender:
    """Of this process, to the server or store ``where``, by default where the runs are kept."""
    uri = where or connection.uri()
    of_here = os.getpid(), uri
    if of_here not in _senders:
        _senders[of_here] = Sender(way(uri))
    return _senders[of_here]


def carry_out(uri: str, entry: Entry, known: Known) -> Known:
    """Write ``entry`` into MLflow; the ids that were learned, by key."""
    kind = entry.kind
    if kind not in (RUN, *_KINDS):
        raise RefusedError(f"no entry of the kind '{kind}' is known")
    with impatient():
        client = connection.client(uri)
        try:
            if kind == RUN:
                return _run(client, entry, known)
            entry, found = _with_ids(client, entry, known)
            return found | (_KINDS[kind](client, entry) or {})
        except (KeyError, TypeError, AttributeError) as error:
            raise RefusedError(f"an entry of the kind '{kind}' is damaged: {error}") from error


def _with_ids(client: mlflow.MlflowClient, entry: Entry, known: Known) -> tuple[Entry, Known]:
    """``entry`` with ids where it has keys, in all its texts, and those that were looked up."""
    text, found = json.dumps(entry.values), Known()
    if KEY not in text + entry.run and KEY.encode() not in entry.content:
        return entry, found
    own = {entry.run, experiment_key(entry.run)} if entry.kind == "create" else set()

    def known_id(key: str) -> str:
        if key in own or key.startswith(MODEL_KEY):
            return known.get(key, key)
        if known.get(key) == "":
            raise NeverMadeError(f"its run {key} could not be made")
        if key not in known and key not in found:
            found[key] = id_of(client, key)
        return known.get(key) or found[key]

    def with_ids(text: str) -> str:
        return KEYS.sub(lambda key: known_id(key[0]), text)

    values = json.loads(with_ids(text))
    if entry.kind == "experiment_tag":
        values["value"] = mlflow_page.rewritten(values["value"], with_ids)
    content = KEYS_IN_BYTES.sub(lambda key: known_id(key[0].decode()).encode(), entry.content)
    return replace(entry, run=with_ids(entry.run), values=values, content=content), found


def id_of(client: mlflow.MlflowClient, key: str) -> str:
    """The id of the run with this key, or of its experiment, from the server; an id as it is."""
    if not key.startswith(KEY):
        return key
    run_key = key.removesuffix(experiment_key(""))
    found = _runs_with(client, run_key)
    if not found:
        raise UnknownKeyError(f"the run {run_key}, which it needs, is not there yet")
    if found[0].info.lifecycle_stage != "active":
        raise RefusedError(f"its run {found[0].info.run_id} was deleted")
    return str(found[0].info.run_id if key == run_key else found[0].info.experiment_id)


def run_of(client: mlflow.MlflowClient, key: str) -> mlflow.entities.Run | None:
    """The run with this id or key, also a deleted one; None where there is none with the id."""
    try:
        return client.get_run(id_of(client, key))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _runs_with(client: mlflow.MlflowClient, key: str) -> list[Any]:
    """Those with this key, deleted ones last; more than one where an answer was lost."""
    experiments = get_results_from_paginated_fn(  # type: ignore[no-untyped-call]
        lambda n, page: client.search_experiments(ViewType.ALL, n, page_token=page), PAGE
    )
    condition = f"tags.`{KEY_TAG}` = '{key}'"
    found = client.search_runs([e.experiment_id for e in experiments], condition, ViewType.ALL)
    return sorted(found, key=lambda run: (run.info.lifecycle_stage, run.info.run_id))


def _create(client: mlflow.MlflowClient, entry: Entry) -> Known:
    info = _made(client, entry)
    _roots[client.tracking_uri, info.run_id] = str(info.artifact_uri)
    return _ids(entry, info)


def _ids(entry: Entry, info: RunInfo) -> Known:
    return {entry.run: info.run_id, experiment_key(entry.run): info.experiment_id}


def _made(client: mlflow.MlflowClient, entry: Entry) -> RunInfo:
    """The run of a key, which is made but where it was before."""
    values, there = entry.values, _runs_with(client, entry.run) if entry.is_again else []
    if there:
        info = there[0].info
        if info.lifecycle_stage != "active":
            raise RefusedError(f"the run {info.run_id} was deleted")
    else:
        where = values.get("experiment_id") or experiment_id(client, values["experiment"])
        tags = {**values["tags"], KEY_TAG: entry.run}
        try:
            with impatient(retries=0):  # or MLflow makes a second one where an answer was lost
                info = client.create_run(where, values["started"], tags, values["name"]).info
        except MlflowException as error:
            if outages.is_outage(client.tracking_uri, error):
                raise
            its = client.get_experiment(where)
            if its.lifecycle_stage != LifecycleStage.DELETED:
                raise
            raise RefusedError(
                f"experiment '{its.name}' was deleted: bring it back with 'mlflow experiments "
                f"restore -x {where}', or name another, by --experiment or MLFLOW_EXPERIMENT_NAME"
            ) from error
    if entry.is_again:
        _made_again.add(info.run_id)
    made: RunInfo = info
    return made


def experiment_id(client: mlflow.MlflowClient, name: str) -> str:
    """The experiment called ``name``, made if it is not there.

    MLflow makes experiments, and an SQLite store, without a lock: several processes that
    start at once on an empty store would fail.
    """
    with connection.store_lock(client.tracking_uri):
        found = client.get_experiment_by_name(name)
        if not found:
            try:
                return str(client.create_experiment(name))
            except MlflowException:
                found = client.get_experiment_by_name(name)  # made by another, on a server
                if not found:
                    raise
        return str(found.experiment_id)


def _params(client: mlflow.MlflowClient, entry: Entry) -> None:
    """Of a run that ``mlflow run`` has made, those it has logged itself are left as they are."""
    params = _params_of(entry)
    if entry.values["launched"]:
        there = client.get_run(entry.run).data.params
        params = [param for param in params if param.key not in there]
    client.log_batch(entry.run, params=params)


def _params_of(entry: Entry) -> list[Param]:
    return [Param(*item) for item in entry.values["params"].items()]


def _metrics(client: mlflow.MlflowClient, entry: Entry) -> None:
    client.log_batch(entry.run, metrics=_metrics_of(entry))


def _metrics_of(entry: Entry) -> list[Metric]:
    """(key, value, time, step, model) each; a model that never came about is left out."""
    return [
        Metric(key, value, at, step, model_id=None if str(model).startswith(MODEL_KEY) else model)
        for key, value, at, step, model in entry.values["metrics"]
    ]


def _tags(client: mlflow.MlflowClient, entry: Entry) -> None:
    client.log_batch(entry.run, tags=_tags_of(entry))


def _tags_of_many(client: mlflow.MlflowClient, entry: Entry) -> None:
    """The same tags of many runs; in a database all of them, or none."""
    is_possible = transactions.is_possible(client)
    with transactions.together(client) if is_possible else contextlib.nullcontext(client) as asked:
        for run in entry.values["runs"]:
            asked.log_batch(run, tags=_tags_of(entry))


def _tags_of(entry: Entry) -> list[RunTag]:
    return [RunTag(*tag) for tag in entry.values["tags"].items()]


def _status(client: mlflow.MlflowClient, entry: Entry) -> None:
    """Open again, or closed; a twin, of whose making the answer was lost, is taken away."""
    status = entry.values["status"]
    if status == "RUNNING":
        client.update_run(entry.run, status)
        return
    client.set_terminated(entry.run, status, entry.values["ended"])
    _delete_twins(client, entry)


def _delete_twins(client: mlflow.MlflowClient, entry: Entry) -> None:
    if entry.is_again or entry.run in _made_again:
        _made_again.discard(entry.run)
        key = client.get_run(entry.run).data.tags.get(KEY_TAG)
        for twin in _runs_with(client, key) if key else []:
            if twin.info.run_id != entry.run and twin.info.lifecycle_stage == "active":
                client.delete_run(twin.info.run_id)


def close_orphan(uri: str, run: str, opener: str) -> None:
    """Close a run, by id or key, whose process died: as KILLED, with the tag that says so.

    One that is closed, deleted or gone by now, or that another than ``opener`` has opened since, is
    left as it is, and so is a key that stands for none.
    """
    client = connection.client(uri)
    try:
        found = run_of(client, run)
    except (UnknownKeyError, RefusedError) as error:
        if isinstance(error, UnknownKeyError) and outbox.paths():  # it may wait there to be made
            raise
        return
    if not found or found.info.status not in ("RUNNING", "SCHEDULED"):
        return
    is_its = found.data.tags.get(OPENER) == opener
    if is_its and found.info.lifecycle_stage == LifecycleStage.ACTIVE:
        client.set_tag(found.info.run_id, ORPHANED, "true")
        client.set_terminated(found.info.run_id, "KILLED")


def _file(client: mlflow.MlflowClient, entry: Entry) -> None:
    """An artifact."""
    place = _artifact_root(client.tracking_uri, entry.run)
    _put(client, place, entry.run, {Path(entry.values["name"]).name: entry.content})


def _put(client: mlflow.MlflowClient, place: str, run: str, files: Mapping[str, bytes]) -> None:
    artifacts.put(
        client.tracking_uri, place, files, lambda folder: client.log_artifacts(run, folder)
    )


_roots: dict[tuple[str, str], str] = {}  # where the files of runs are


def _artifact_root(uri: str, run: str) -> str:
    if (uri, run) not in _roots:
        _roots[uri, run] = str(connection.client(uri).get_run(run).info.artifact_uri)
    return _roots[uri, run]


def _data(client: mlflow.MlflowClient, entry: Entry) -> None:
    """The data set as an MLflow dataset input."""
    values = entry.values
    of_pixels = values.get("takes", PIXELS) == PIXELS
    columns = {
        "images" if of_pixels else "features": (
            np.uint8 if of_pixels else np.float32,
            (values["pixels"],),
        ),
        "labels": (np.uint8 if of_pixels else np.int64, ()),
    }
    schema = Schema(
        [
            TensorSpec(np.dtype(number), (n, *shape), f"{part}_{name}")
            for part, n in values["parts"].items()
            for name, (number, shape) in columns.items()
        ]
    )
    dataset = mlflow.data.meta_dataset.MetaDataset(  # type: ignore[abstract]
        CodeDatasetSource(tags={"source": values["source"]}),
        name=values["name"],
        digest=values["digest"],
        schema=schema,
    )
    context = [InputTag(MLFLOW_DATASET_CONTEXT, "training")]
    logged = DatasetInput(dataset._to_mlflow_entity(), context)  # noqa: SLF001 - as log_input
    client.log_inputs(entry.run, [logged])


def _run(client: mlflow.MlflowClient, entry: Entry, known: Known) -> Known:
    """A run that has ended, from its making to its end.

    In a database it is one transaction, if nothing of it is refused. Else it takes a request for
    each kind of what it carries, or a few.
    """
    create, *parts = outbox.parts_of(entry)
    create, found = _with_ids(client, create, known)
    writing = _Writing(create, parts, known | found)
    learned, no_model = None, None
    if not entry.is_again and transactions.is_possible(client) and _is_of_here(client, create):
        try:
            with transactions.together(client) as together:
                learned, no_model = writing.by(together)
        except Exception as error:
            if outages.is_outage(client.tracking_uri, error):
                raise
    if learned is None:
        try:
            learned, no_model = writing.by(client, goes_on=True)
        except (KeyboardInterrupt, SystemExit):  # by a second signal: it is not to stay open
            for run in _runs_with(client, entry.run):
                client.set_terminated(run.info.run_id, "KILLED")
            raise
    if no_model:
        raise NoModelError(cause(no_model), found | learned) from no_model
    return found | learned


def _is_of_here(client: mlflow.MlflowClient, create: Entry) -> bool:
    """Whether the files of runs of its experiment lie in a folder: no network is waited for."""
    where = create.values.get("experiment_id")
    return where is not None and _has_folder(client.tracking_uri, where)


@functools.lru_cache(maxsize=1_000)
def _has_folder(uri: str, experiment: str) -> bool:
    location = connection.client(uri).get_experiment(experiment).artifact_location
    return artifacts.folder_of(str(location)) is not None


@dataclass(frozen=True)
class _Writing:
    """A run to be written: the entry that makes it, those of what it carries, and known ids."""

    create: Entry
    parts: Sequence[Entry]
    known: Known

    def by(
        self, client: mlflow.MlflowClient, *, goes_on: bool = False
    ) -> tuple[Known, Exception | None]:
        """The ids that were learned by it, and why its model could not be written.

        Where it ``goes_on`` after something is refused, the rest is written all the same, it is
        FAILED, and the first refusal is raised at the end.
        """
        uri, refusals = client.tracking_uri, list[Exception]()

        @contextlib.contextmanager
        def attempt(noted: list[Exception]) -> Iterator[None]:
            try:
                yield
            except Exception as error:
                if outages.is_outage(uri, error):
                    raise
                noted.append(error)

        trying = functools.partial(attempt, refusals) if goes_on else contextlib.nullcontext
        info = _made(client, self.create)
        run, learned, without = info.run_id, _ids(self.create, info), list[Exception]()

        def of(kind: str) -> list[Entry]:
            found = [part for part in self.parts if part.kind == kind]
            return [_with_ids(client, part, self.known | learned)[0] for part in found]

        with trying():
            files = {Path(part.values["name"]).name: part.content for part in of("file")}
            _put(client, str(info.artifact_uri), run, files)
        for part in of("data"):
            with trying():
                _data(client, part)
        params = [one for part in of("params") for one in _params_of(part)]
        for part in of("model"):
            with attempt(without):
                log = (
                    models.log
                    if part.is_again
                    else functools.partial(models.log_new, experiment_id=info.experiment_id)
                )
                learned |= log(client, part, params={one.key: one.value for one in params})
        batch: dict[str, Any] = {
            "params": params,
            "tags": [one for part in of("tags") for one in _tags_of(part)],
            "metrics": [one for part in of("metrics") for one in _metrics_of(part)],
        }
        if goes_on:
            refusals += _logged(client, run, batch)
        else:
            client.log_batch(run, **batch)
        (end,) = of("status")
        status = RunStatus.from_string("FAILED" if refusals else end.values["status"])
        # By the client's own way the run would be read, and its address printed.
        transactions.store_of(client).update_run_info(run, status, end.values["ended"], None)
        _delete_twins(client, end)
        if refusals:
            raise refusals[0]
        return learned, next(iter(without), None)


def _logged(client: mlflow.MlflowClient, run: str, batch: Mapping[str, Any]) -> list[Exception]:
    """What was refused of a ``batch``: where it is not taken as one, it is sent by its kinds."""
    refusals = []
    for some in (batch, *({kind: listed} for kind, listed in batch.items())):
        try:
            client.log_batch(run, **some)
        except Exception as error:
            if outages.is_outage(client.tracking_uri, error):
                raise
            refusals.append(error)
        else:
            if some is batch:
                return []
    return refusals[1:] or refusals


_KINDS: Mapping[str, Callable[[mlflow.MlflowClient, Entry], Known | None]] = {
    "create": _create,
    "params": _params,
    "metrics": _metrics,
    "tags": _tags,
    "tags_of_many": _tags_of_many,
    "status": _status,
    "experiment_tag": lambda client, entry: client.set_experiment_tag(**entry.values),
    "file": _file,
    "data": _data,
    "model": models.log,
}

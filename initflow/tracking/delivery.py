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
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow
import mlflow.data.meta_dataset
import mlflow.pyfunc
import mlflow.pytorch
import numpy as np
import torch
from filelock import FileLock
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.entities import (
    DatasetInput,
    InputTag,
    LifecycleStage,
    LoggedModel,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
    ViewType,
)
from mlflow.environment_variables import (
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_HTTP_REQUEST_TIMEOUT,
)
from mlflow.exceptions import InvalidUrlException, MlflowException, RestException
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.tracking.context.registry import resolve_tags
from mlflow.types import Schema, TensorSpec
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT
from safetensors.torch import load as tensors_of

from initflow.core.paths import STORE, store_file
from initflow.errors import cause, without_credentials
from initflow.initializers.activations import ACTIVATIONS
from initflow.tracking import mlflow_page, served_model
from initflow.tracking.outbox import (
    KEY,
    KEYS,
    MODEL_KEY,
    Entry,
    Known,
    NeverMadeError,
    RefusedError,
    UnknownKeyError,
    experiment_key,
    paths,
)
from initflow.tracking.sender import SLOW_S, Sender, Way
from initflow.training import model

KEY_TAG = "initflow.key"  # the tag by which a run is found whose id was never heard
ORPHANED = "initflow.orphaned"  # the tag of a run that is not counted, as its process died
OPENER = "initflow.opener"  # the tag of the process that has a run open: see open_runs
STORE_TIMEOUT_S = 120
TIMEOUT_S = 10
LATER = (429, 500, 502, 503, 504)  # HTTP's words for: not now
RIGHTS = (401, 403)
NEVER = ("INVALID_STATE", "DATA_LOSS")  # two errors that MLflow calls 500 all the same
# Of a full disk, in SQLite's words and in others'; of a request sent twice, and of two at once.
FOR_NOW = re.compile(
    "database or disk is full|No space left on device|database is locked|IntegrityError"
)
FILES = "file://"
READY = LoggedModelStatus.READY
LOADER = "initflow_model"  # the module of a logged model by which MLflow loads it


def uri() -> str:
    """Where the runs are kept: a tracking server or a store, whose path is whole."""
    where = str(mlflow.get_tracking_uri())
    file = where.removeprefix(STORE)
    is_relative = file != where and not os.path.isabs(file)  # noqa: PTH117 - text as it is
    return f"{STORE}{Path(file).absolute()}" if is_relative else where


def is_served(uri: str) -> bool:
    """Whether ``uri`` is a tracking server's."""
    return uri.startswith(("http://", "https://"))


def way(uri: str) -> Way:
    """To the server or store at ``uri``."""
    return Way(
        tracking=without_credentials(uri),
        carry_out=functools.partial(carry_out, uri),
        is_outage=functools.partial(is_outage, uri),
        is_refusal=functools.partial(is_refusal, uri),
        answers=functools.partial(answers, uri),
        reason_of=reason,
        slow_s=SLOW_S if is_served(uri) else math.inf,
    )


_senders: dict[str, Sender] = {}
_parents: list[Sender] = []  # kept, as letting go of them would let go of their files' locks


def sender(uri: str) -> Sender:
    """Of this process, to the server or store at ``uri``."""
    if uri not in _senders:
        _senders[uri] = Sender(way(uri))
    return _senders[uri]


def _forked() -> None:
    """A forked process has none of the threads, and what waits is its parent's to send."""
    _parents.extend(_senders.values())
    _senders.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def answers(uri: str) -> bool:
    """Whether a server does, to a small question; a store of this machine is none."""
    if not is_served(uri):
        return False
    try:
        with impatient():
            client_of(uri).search_experiments(max_results=1)
    except Exception:  # noqa: BLE001 - whatever keeps it
        return False
    return True


def is_refusal(uri: str, error: BaseException) -> bool:
    """Whether an entry that waits is not to be tried again by itself: MLflow has understood it.

    What is between us and a server (a proxy, a lack of rights) may be gone the next time.
    """
    if isinstance(error, UnknownKeyError) or is_outage(uri, error):
        return False
    between = is_served(uri) and isinstance(error, MlflowException)
    if between and not isinstance(error, RestException):
        return False
    return not (isinstance(error, MlflowException) and _http_status(error) in RIGHTS)


def is_outage(uri: str, error: BaseException) -> bool:
    """Whether what failed may work later: a server that is away, a disk that is full."""
    if isinstance(error, UnknownKeyError) or FOR_NOW.search(str(error)):
        return True
    if not is_served(uri) or not _is_address(uri) or isinstance(error, InvalidUrlException):
        return False
    if isinstance(error, MlflowException):
        return _http_status(error) in LATER and error.error_code not in NEVER
    # Those of requests, which files go by.
    answer = getattr(error, "response", None)
    of_network = isinstance(error, (ConnectionError, TimeoutError)) or (
        type(error).__module__.partition(".")[0] in ("requests", "urllib3")
    )
    return of_network and (answer is None or answer.status_code in LATER)


def reason(error: BaseException) -> str:
    """What is at the bottom of it: requests' errors come in many wrappings."""
    said = str(error) if isinstance(error, (RefusedError, UnknownKeyError)) else cause(error)
    _, wrapped, within = said.rpartition("Caused by ")
    timeout = re.search(r"[Rr]ead timed out|[Cc]onnect(ion)? .{0,40}timed out", said)
    if timeout:
        return timeout[0]
    if not wrapped:
        return without_credentials(said)
    quoted = re.findall(r"'([^']+)'", within)
    bottom = within.rpartition(": ")[2] if ": " in within else (quoted or [within])[-1]
    return bottom.strip("\"')(. ")


def _http_status(error: MlflowException) -> int:
    return int(error.get_http_status_code())  # type: ignore[no-untyped-call]


def _is_address(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


_own = threading.local()  # the values that MLflow's variables have in a thread of ours


def _heed(variable: Any) -> None:
    """Let MLflow's ``variable`` have a thread's own value, unless the user has set one.

    The environment is everybody's: a user's own requests, made meanwhile, keep their patience.
    """
    usual = variable.get

    def get() -> Any:
        own = getattr(_own, "values", {}).get(variable.name)
        return usual() if own is None or variable.is_set() else own

    variable.get = get


for _variable in (MLFLOW_HTTP_REQUEST_TIMEOUT, MLFLOW_HTTP_REQUEST_MAX_RETRIES):
    _heed(_variable)


@contextlib.contextmanager
def impatient(retries: int = 1) -> Iterator[None]:
    """Let MLflow give up soon, in this thread, where the user has not said how long it is to try.

    What it waits for by default are minutes, without a word; our own outbox tries again.
    """
    before = getattr(_own, "values", {})
    _own.values = {
        MLFLOW_HTTP_REQUEST_TIMEOUT.name: TIMEOUT_S,
        MLFLOW_HTTP_REQUEST_MAX_RETRIES.name: retries,
    }
    try:
        yield
    finally:
        _own.values = before


@functools.cache
def client_of(uri: str) -> mlflow.MlflowClient:
    """The client makes a store that is not there, which several at once would fail at."""
    with store_lock(uri):
        return mlflow.MlflowClient(uri)


def carry_out(uri: str, entry: Entry, known: Known) -> Known:
    """Write ``entry`` into MLflow; the ids that were learned, by key."""
    with impatient():
        client = client_of(uri)
        try:
            kind = _KINDS[entry.kind]
        except KeyError:
            raise RefusedError(f"no entry of the kind '{entry.kind}' is known") from None
        found: Known = {}
        entry = _with_ids(client, entry, known, found)
        try:
            return found | (kind(client, entry) or {})
        except (KeyError, TypeError, AttributeError) as error:
            raise RefusedError(
                f"an entry of the kind '{entry.kind}' is damaged: {error}"
            ) from error


def _with_ids(client: mlflow.MlflowClient, entry: Entry, known: Known, found: Known) -> Entry:
    """``entry`` with ids where it has keys, in all its texts; ``found`` gets those looked up."""
    text = json.dumps(entry.values)
    content = entry.content if KEY.encode() in entry.content else b""
    if KEY not in text and KEY not in entry.run and not content:
        return entry
    own = {entry.run, experiment_key(entry.run)} if entry.kind == "create" else set()

    def id_of(key: str) -> str:
        if key in own or is_model_key(key):
            return known.get(key, key)
        if key not in known and key not in found:
            found[key] = looked_up(client, key)
        if known.get(key) == "":
            raise NeverMadeError(f"its run {key} could not be made")
        return known.get(key) or found[key]

    def with_ids(text: str) -> str:
        return KEYS.sub(lambda match: id_of(match[0]), text)

    values = json.loads(with_ids(text))
    if entry.kind == "experiment_tag":
        values["value"] = mlflow_page.rewritten(values["value"], with_ids)
    if content:
        content = with_ids(content.decode("utf-8", "surrogateescape")).encode(
            "utf-8", "surrogateescape"
        )
    return replace(entry, run=with_ids(entry.run), values=values, content=content or entry.content)


def looked_up(client: mlflow.MlflowClient, key: str) -> str:
    """The id of the run with this key, or of its experiment, from the server."""
    run_key = key.removesuffix(experiment_key(""))
    found = _runs_with(client, run_key)
    if not found:
        raise UnknownKeyError(f"the run {run_key}, which it needs, is not there yet")
    if found[0].info.lifecycle_stage != "active":
        raise RefusedError(f"its run {found[0].info.run_id} was deleted")
    return str(found[0].info.run_id if key == run_key else found[0].info.experiment_id)


def _runs_with(client: mlflow.MlflowClient, key: str) -> list[Any]:
    """Those with this key, deleted ones last; more than one where an answer was lost."""
    experiments, page = [], None
    while True:
        some = client.search_experiments(ViewType.ALL, page_token=page)
        experiments += [experiment.experiment_id for experiment in some]
        page = some.token
        if not page:
            break
    condition = f"tags.`{KEY_TAG}` = '{key}'"
    found = client.search_runs(experiments, condition, ViewType.ALL)
    return sorted(found, key=lambda run: (run.info.lifecycle_stage, run.info.run_id))


def _create(client: mlflow.MlflowClient, entry: Entry) -> Known:
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
            if not is_outage(client.tracking_uri, error):
                _check_not_deleted(client, where)
            raise
    if entry.is_again:
        _made_again.add(info.run_id)
    return {entry.run: info.run_id, experiment_key(entry.run): info.experiment_id}


def _check_not_deleted(client: mlflow.MlflowClient, experiment_id: str) -> None:
    """Say how to go on where no run can be made because its experiment was deleted."""
    found = client.get_experiment(experiment_id)
    if found.lifecycle_stage == LifecycleStage.DELETED:
        raise RefusedError(
            f"experiment '{found.name}' was deleted: bring it back with "
            f"'mlflow experiments restore -x {experiment_id}', or name another, by --experiment or "
            "MLFLOW_EXPERIMENT_NAME"
        )


_made_again: set[str] = set()  # runs that may have a twin


def experiment_id(client: mlflow.MlflowClient, name: str) -> str:
    """The experiment called ``name``, made if it is not there.

    MLflow makes experiments, and an SQLite store, without a lock: several processes that
    start at once on an empty store would fail.
    """
    with store_lock(client.tracking_uri):
        found = client.get_experiment_by_name(name)
        if found:
            return str(found.experiment_id)
        try:
            return str(client.create_experiment(name))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # made by another, on a server
            if not found:
                raise
            return str(found.experiment_id)


def store_lock(uri: str) -> contextlib.AbstractContextManager[object]:
    """Held while a store that is a file is made."""
    store = store_file(uri)
    if not store:
        return contextlib.nullcontext()
    store.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{store}.lock", timeout=STORE_TIMEOUT_S)


def _params(client: mlflow.MlflowClient, entry: Entry) -> None:
    """Of a run that ``mlflow run`` has made, those it has logged itself are left as they are."""
    params = entry.values["params"]
    if entry.values["launched"]:
        there = client.get_run(entry.run).data.params
        params = {key: value for key, value in params.items() if key not in there}
    client.log_batch(entry.run, params=[Param(*item) for item in params.items()])


def _metrics(client: mlflow.MlflowClient, entry: Entry) -> None:
    """(key, value, time, step, model) each; a model that never came about is left out."""
    metrics = [
        Metric(key, value, at, step, model_id=None if is_model_key(of_model) else of_model)
        for key, value, at, step, of_model in entry.values["metrics"]
    ]
    client.log_batch(entry.run, metrics=metrics)


def is_model_key(id_or_key: str | None) -> bool:
    return id_or_key is not None and id_or_key.startswith(MODEL_KEY)


def _tags(client: mlflow.MlflowClient, entry: Entry) -> None:
    tags = [RunTag(key, value) for key, value in entry.values["tags"].items()]
    client.log_batch(entry.run, tags=tags)


def _status(client: mlflow.MlflowClient, entry: Entry) -> None:
    """Open again, or closed; a twin, of whose making the answer was lost, is taken away."""
    status = entry.values["status"]
    if status == "RUNNING":
        client.update_run(entry.run, status)
        return
    client.set_terminated(entry.run, status, entry.values["ended"])
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
    client = client_of(uri)
    try:
        id_ = looked_up(client, run) if run.startswith(KEY) else run
        found = client.get_run(id_)
    except UnknownKeyError:
        if paths():  # it may wait there to be made
            raise
        return
    except RefusedError:
        return
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return
    is_open = found.info.status in ("RUNNING", "SCHEDULED")
    is_its = found.data.tags.get(OPENER) == opener
    if is_open and is_its and found.info.lifecycle_stage == LifecycleStage.ACTIVE:
        client.set_tag(id_, ORPHANED, "true")
        client.set_terminated(id_, "KILLED")


def _experiment_tag(client: mlflow.MlflowClient, entry: Entry) -> None:
    values = entry.values
    client.set_experiment_tag(values["experiment_id"], values["key"], values["value"])


def _file(client: mlflow.MlflowClient, entry: Entry) -> None:
    """An artifact; where the store is a folder it is whole or absent, whenever we are killed."""
    name = Path(entry.values["name"]).name
    place = _artifact_root(client.tracking_uri, entry.run)
    if place.startswith("/") or (place.startswith(FILES) and not urlsplit(place).netloc):
        folder = Path(unquote(place.removeprefix(FILES)))
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as scratch:
            written = Path(scratch, name)
            written.write_bytes(entry.content)
            written.replace(folder / name)
        return
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, name).write_bytes(entry.content)
        client.log_artifact(entry.run, str(Path(scratch, name)))


@functools.lru_cache(maxsize=1_000)
def _artifact_root(uri: str, run: str) -> str:
    return str(mlflow.MlflowClient(uri).get_run(run).info.artifact_uri)


def _data(client: mlflow.MlflowClient, entry: Entry) -> None:
    """The data set as an MLflow dataset input."""
    values = entry.values
    schema = Schema(
        [
            TensorSpec(np.dtype(np.uint8), shape, name)
            for part, images in values["parts"].items()
            for name, shape in (
                (f"{part}_images", (images, values["pixels"])),
                (f"{part}_labels", (images,)),
            )
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


def _model(client: mlflow.MlflowClient, entry: Entry) -> Known:
    """As ``mlflow.pytorch.log_model`` does it, but going on where it was cut off."""
    values, run = entry.values, client.get_run(entry.run)
    found = _logged_models(client, run) if entry.is_again else []
    for twin in found[1:]:  # of whose making the answer was lost
        client.delete_logged_model(twin.model_id)
    if found:
        made = found[0]
    else:
        where, tags, params = run.info.experiment_id, resolve_tags(), run.data.params
        with impatient(retries=0):  # or MLflow makes a second one where an answer was lost
            made = client.create_logged_model(where, "model", entry.run, tags, params)
    if made.status != READY:
        with tempfile.TemporaryDirectory() as folder:
            _save_model(entry, made, Path(folder, "model"))
            client.log_model_artifacts(made.model_id, str(Path(folder, "model")))
        client.finalize_logged_model(made.model_id, READY)
    outputs = run.outputs.model_outputs if run.outputs else []
    if made.model_id not in {output.model_id for output in outputs}:
        client.log_outputs(entry.run, [LoggedModelOutput(made.model_id, values["step"])])
    if not made.metrics:
        client.log_batch(entry.run, metrics=_metrics_of(client, run, values["step"], made.model_id))
    return {values["key"]: str(made.model_id)}


def _logged_models(client: mlflow.MlflowClient, run: Run) -> list[LoggedModel]:
    condition = f"source_run_id = '{run.info.run_id}'"
    return list(client.search_logged_models([run.info.experiment_id], condition))


def model_of(client: mlflow.MlflowClient, run_id: str) -> str:
    """The id of the run's model."""
    found = _logged_models(client, client.get_run(run_id))
    if not found:
        raise UnknownKeyError(f"the model of the run {run_id} is not there yet")
    return str(found[0].model_id)


def _metrics_of(client: mlflow.MlflowClient, run: Run, step: int, model_id: str) -> list[Metric]:
    """The run's metrics at ``step`` as those of its model, too."""
    return [
        Metric(m.key, m.value, m.timestamp, m.step, model_id=model_id)
        for key in run.data.metrics
        for m in client.get_metric_history(run.info.run_id, key)
        if m.step == step
    ]


def _save_model(entry: Entry, made: LoggedModel, folder: Path) -> None:
    """(n, pixels) numbers in, (n, classes) float32 logits out.

    The signature states no input, because MLflow would refuse all but one type of number, and each
    list; :mod:`initflow.tracking.served_model` says what is taken. The requirements are stated,
    because guessing them takes MLflow 12 to 17 s.
    """
    values = entry.values
    module = model.to_module(
        tensors_of(entry.content),
        ACTIVATIONS[values["activation"]],
        mean=values["mean"],
        std=values["std"],
    )
    pixels = values["pixels"]
    example = np.zeros((2, pixels), dtype=np.float32)  # a batch of 1 would fix the size at 1
    with torch.no_grad():
        classes = module(torch.from_numpy(example)).shape[1]
    saved = Model(
        made.artifact_location,
        run_id=entry.run,
        model_uuid=made.model_id,
        model_id=made.model_id,
        metadata={"input": f"pixels in [0, 1], as numbers of shape (n, {pixels})"},
    )
    number = np.dtype(np.float32)
    inputs, outputs = (Schema([TensorSpec(number, (-1, n))]) for n in (pixels, classes))
    loader = folder.parent / f"{LOADER}.py"
    shutil.copyfile(served_model.__file__, loader)
    mlflow.pytorch.save_model(
        module,
        folder,
        mlflow_model=saved,
        code_paths=[str(loader)],
        input_example=example,
        signature=ModelSignature(inputs, outputs),  # as the format pt2 asks
        # Without a local part (+cpu), which no package index holds.
        pip_requirements=[
            f"{lib.__name__}=={lib.__version__.partition('+')[0]}" for lib in (mlflow, torch)
        ],
    )
    saved.signature = ModelSignature(outputs=outputs)
    saved.flavors[mlflow.pyfunc.FLAVOR_NAME][mlflow.pyfunc.MAIN] = LOADER
    saved.save(str(folder / MLMODEL_FILE_NAME))


_KINDS: Mapping[str, Callable[[mlflow.MlflowClient, Entry], Known | None]] = {
    "create": _create,
    "params": _params,
    "metrics": _metrics,
    "tags": _tags,
    "status": _status,
    "experiment_tag": _experiment_tag,
    "file": _file,
    "data": _data,
    "model": _model,
}

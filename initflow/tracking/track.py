"""Runs in MLflow: opened, written to, always closed, and found again.

What is written goes by the outbox: where a tracking server does not answer, training goes on, and
it is sent later. What is read needs the answer now.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_SOURCE_NAME
from safetensors.torch import save as as_safetensors
from sqlalchemy.exc import SQLAlchemyError
from torch import Tensor

from initflow.core import environment, paths
from initflow.errors import (
    OutageError,
    SettingError,
    TrackingError,
    without_credentials,
)
from initflow.tracking import delivery, mlflow_page, open_runs, outbox, unsent
from initflow.tracking.delivery import KEY_TAG, OPENER, ORPHANED, uri
from initflow.tracking.outbox import Entry
from initflow.training.data import Splits

EXPERIMENT = "initflow"
HOST, PORT = "127.0.0.1", 5000  # where `initflow ui` serves a local store's page, by default
LONGEST_KEY = 150  # characters of a name in a metric key, which has 250
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
PATIENCE_S = 3.0  # after which a second signal ends a request that the first one waits for
DIGEST_LENGTH = 32  # MLflow takes up to 36 characters
SERVER_PATIENCE_S = 10.0
DESCRIPTION = "mlflow.note.content"
PARENT = "mlflow.parentRunId"
# A driver may be missing, an address malformed.
FAILURES = (
    MlflowException,
    SQLAlchemyError,
    OSError,
    ImportError,
    ValueError,
    outbox.RefusedError,
    outbox.UnknownKeyError,
)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold a signal back until what is being written is written; a late second one cuts it off.

    A request that is cut off may have made a run whose id nobody knows, and locks SQLite.
    """
    held: list[tuple[int, float]] = []
    before: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def hold(number: int, frame: FrameType | None) -> None:
        held.append((number, time.monotonic()))
        if held[-1][1] - held[0][1] > PATIENCE_S:
            before[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        for number in STOPS:
            handler = signal.getsignal(number)
            if callable(handler):
                before[number] = handler
                signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            number, _ = held[0]
            before[number](number, None)


@contextlib.contextmanager
def _translated(where: str = "") -> Iterator[None]:
    """Raise what MLflow or its store, by default ours, refuses as :class:`TrackingError`.

    That it does not answer is an :class:`OutageError`.
    """
    where = where or uri()
    try:
        with _uninterrupted(), delivery.impatient():
            yield
    except FAILURES as error:
        lines = [line for line in str(error).splitlines() if not line.startswith("(raised as")]
        reason = lines[0] if lines else type(error).__name__
        is_outage = delivery.is_outage(where, error)
        if is_outage:
            reason = delivery.reason(error)
        elif "Response body: '<" in reason:
            reason = "what answers there is no MLflow server, but a page of HTML"
        message = without_credentials(f"MLflow at '{where}' failed: {reason}")
        raise (OutageError if is_outage else TrackingError)(message) from error


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Around a question to MLflow, whose answer must know of all that was written before."""
    sender = delivery.sender(uri())
    if sender.waiting() and not sender.settle(unsent.CLOSING_PATIENCE_S, as_it_goes=True):
        raise OutageError(f"MLflow at '{sender.tracking}' failed: {sender.reason}")
    with _translated():
        yield


def _send(entry: Entry) -> None:
    """Write it now or, where MLflow does not answer, later."""
    with _translated():
        delivery.sender(uri()).send(entry, is_asking=entry.kind in ("create", "model"))


def _client() -> mlflow.MlflowClient:
    return delivery.client_of(uri())


def with_ids(text: str) -> str:
    """``text`` with the ids that the server has given by now to what has keys in it."""
    known = delivery.sender(uri()).known
    return outbox.KEYS.sub(lambda key: known.get(key[0]) or key[0], text)


@dataclass(frozen=True)
class Run:
    """An open MLflow run; every call is one request, or one batch of them, now or later.

    ``id`` and ``experiment_id`` are keys where the server has not given ids yet: in all that is
    written they become ids. ``launcher`` holds the project and the options of the ``mlflow run``
    that started it, if one did: with them its source, its experiment and its kind of environment
    are met again.
    """

    id: str
    experiment_id: str
    launcher: tuple[str, ...]

    def _write(self, kind: str, content: bytes = b"", **values: object) -> None:
        _send(Entry(kind, self.id, values, content))

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.log_history({key: [(step, value)] for key, value in values.items()})

    def log_history(
        self, history: Mapping[str, Sequence[tuple[int, float]]], model_id: str | None = None
    ) -> None:
        """All (step, value) pairs of each metric; the last are those of the model, if it is told.

        MLflow's own way to tell a model of a run's metrics is to read each of them again. Its
        page compares runs by what was logged first: that is the accuracy.
        """
        now = _now()
        metrics = [
            (_key(key), float(value), now, step, None if left else model_id)
            for key, points in sorted(
                history.items(), key=lambda item: item[0] not in mlflow_page.COMPARED
            )
            for left, (step, value) in zip(reversed(range(len(points))), points, strict=True)
        ]
        self._write("metrics", metrics=metrics)

    def log_params(self, params: Mapping[str, str], *, launched: bool = False) -> None:
        """``launched`` where the run is of ``mlflow run``, which has logged some itself."""
        self._write("params", params=dict(params), launched=launched)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        self._write("tags", tags=_texts(tags))

    def describe(self, text: str, links: str = "") -> None:
        """Set the description that MLflow's page shows above all else.

        It begins with ``links``, a line of Markdown; ``text`` is shown as it is.
        """
        self.set_tags({DESCRIPTION: f"{links}\n\n{mlflow_page.plain(text)}".lstrip()})

    def log_json(self, name: str, values: Mapping[str, object]) -> None:
        self.log_text(f"{name}.json", json.dumps(values, indent=2))

    def log_text(self, name: str, text: str) -> None:
        self.log_bytes(name, text.encode())

    def log_bytes(self, name: str, content: bytes) -> None:
        self._write("file", content, name=name)

    def log_data(self, splits: Splits) -> None:
        """The data set as an MLflow dataset input, by a digest of all its pixels and labels."""
        train = len(splits.train) + len(splits.validation or ())
        parts = {"train": train} | ({"test": len(splits.test)} if splits.test else {})
        self._write(
            "data",
            name=splits.name,
            digest=splits.digest[:DIGEST_LENGTH],
            source=splits.source,
            pixels=splits.pixels,
            parts=parts,
        )

    def log_model(
        self,
        state: Mapping[str, Tensor],
        activation: str,
        *,
        mean: float,
        std: float,
        pixels: int,
        step: int,
    ) -> str:
        """The id of a network as an MLflow model: see :func:`initflow.training.model.to_module`."""
        key = outbox.new_model_key()
        tensors = {name: tensor.detach().clone() for name, tensor in state.items()}
        values = {"activation": activation, "mean": mean, "std": std, "pixels": pixels}
        self._write("model", as_safetensors(tensors), key=key, step=step, **values)
        return with_ids(key)

    def set_experiment_tag(self, key: str, value: str) -> None:
        self._write("experiment_tag", experiment_id=self.experiment_id, key=key, value=value)

    def end(self, status: str) -> None:
        self._write("status", status=status, ended=_now())
        open_runs.closed(shown(), self.id)

    @contextlib.contextmanager
    def nested(
        self,
        *,
        name: str,
        description: str,
        params: Mapping[str, str],
        tags: Mapping[str, object],
        ends_as: str = "FINISHED",
        resumed: str | None = None,
    ) -> Iterator[Run]:
        """Open a run below this one, in few requests, and close it as :func:`start` does.

        ``resumed`` is the id of a closed run of this experiment that is to be it, opened again.
        """
        described = {DESCRIPTION: mlflow_page.plain(description)}
        tags = {PARENT: self.id, **described, **_context_tags(), **tags}
        run = None
        try:
            if resumed:
                run = Run(resumed, self.experiment_id, ())
                # Whose it is comes first: the process that had it may be taken for dead just now.
                own = {OPENER: open_runs.opened(shown(), resumed), ORPHANED: "false"}
                run.set_tags({**tags, **own})
                run._write("status", status="RUNNING")
            else:
                run = _created(name, tags, {"experiment_id": self.experiment_id})
                run.log_params(params)
            yield run
            run.end(ends_as)
        except BaseException as error:
            _close(run, error)
            raise

    @_reading()
    def found(self, tags: Mapping[str, object], experiments: Iterable[str] = ()) -> list[Found]:
        """The runs of this experiment and ``experiments``, but for this one, with these ``tags``.

        In a tag's value ``%`` stands for any letters.
        """
        client, found, page = _client(), [], None
        where = list(map(with_ids, {self.experiment_id, *experiments}))
        comparisons = ((key, "LIKE" if "%" in str(v) else "=", v) for key, v in tags.items())
        condition = " AND ".join(f"tags.`{key}` {how} '{v}'" for key, how, v in comparisons)
        condition, own = with_ids(condition), with_ids(self.id)
        while True:
            some = client.search_runs(where, condition, page_token=page)
            found += [Found(r.info.run_id, r.info.status, r.data.tags) for r in some]
            page = some.token
            if not page:
                return [one for one in found if one.id != own]

    def disown(self, one: Found) -> None:
        """Close a run whose process died and that nobody will go on with, and say so by a tag."""
        lost = Run(one.id, self.experiment_id, ())
        lost.set_tags({ORPHANED: "true"})
        if one.status != "KILLED":
            lost.end("KILLED")


class Found(NamedTuple):
    """A run as it was found: its tags by key."""

    id: str
    status: str
    tags: Mapping[str, str]

    @property
    def names(self) -> set[str]:
        """Its id, and the key that it had before it was given one."""
        return {self.id, self.tags.get(KEY_TAG, self.id)}


def is_orphan(one: Found) -> bool:
    return one.tags.get(ORPHANED) == "true"


def _key(name: str) -> str:
    """A metric key of the letters that MLflow takes."""
    return re.sub(r"[^\w.:/ -]", "_", name, flags=re.ASCII)


@contextlib.contextmanager
def start(
    *,
    name: str,
    description: str,
    params: Mapping[str, str],
    tags: Mapping[str, object],
    experiment: str | None = None,
) -> Iterator[Run]:
    """Open a run, and close it as FINISHED, FAILED or, when interrupted, KILLED.

    Inside ``mlflow run`` it is the run that MLflow made, whose parameters are left as they
    are. Elsewhere it is a new one, in ``experiment`` or else in the one that MLflow's own
    environment variables name or else in ``initflow``; where a run is open already, it is
    nested in that. What MLflow or its store refuses is raised as :class:`TrackingError`.
    """
    run = None
    unsent.send_earlier()
    close_left_open()
    try:
        described = {DESCRIPTION: mlflow_page.plain(description)}
        run = _open(name, experiment, params, {**tags, **described})
        yield run
        run.end("FINISHED")
    except BaseException as error:
        if _close(run, error) and run:
            error.add_note(f"what was measured so far is in run {run.id}")
        raise
    finally:
        if run:
            unsent.settle()


def close_left_open(*, everywhere: bool = False) -> None:
    """Close the runs that processes of this machine left open here when they died.

    Or ``everywhere``: where else they were written to. What does not answer is left for the next.
    """
    own, away = shown(), set[str]()
    for left in open_runs.left_open():
        if left.tracking != own and not (everywhere and _is_there(left.tracking)):
            continue
        if left.tracking in away:
            continue
        where = uri() if left.tracking == own else left.tracking
        for run in left.runs:
            try:
                with _translated(where):
                    delivery.close_orphan(where, run, left.opener)
            except OutageError:
                away.add(left.tracking)
                break
            except TrackingError:  # such as of a lack of rights
                continue
            left.forget(run)


def _close(run: Run | None, error: BaseException) -> bool:
    """End ``run`` as ``error`` has it; whether that is KILLED."""
    status = _status(error)
    if status == "KILLED":  # a statement that was cut off locks SQLite as long as its frame lives
        traceback.clear_frames(error.__traceback__)
    if run:
        with contextlib.suppress(TrackingError):  # the error at hand is the one to tell
            run.end(status)
    return status == "KILLED"


def _created(name: str, tags: Mapping[str, object], where: Mapping[str, str]) -> Run:
    """A new run in the experiment that ``where`` tells by ``experiment_id`` or ``experiment``."""
    key, tracking = outbox.new_key(), shown()
    opener = open_runs.opened(tracking, key)  # before it is made: we may do nothing after it
    tags = {**_texts(tags), OPENER: opener}
    values = {"name": name, "tags": tags, "started": _now(), **where}
    try:
        _send(Entry("create", key, values))
    except TrackingError:
        open_runs.closed(tracking, key)
        raise
    run = Run(with_ids(key), with_ids(outbox.experiment_key(key)), ())
    if run.id != key:
        open_runs.opened(tracking, run.id)
        open_runs.closed(tracking, key)
    return run


def _texts(tags: Mapping[str, object]) -> dict[str, str]:
    return {key: str(value) for key, value in tags.items()}


def _now() -> int:
    """Milliseconds, as MLflow counts."""
    return int(time.time() * 1000)


def follow(uri: str) -> None:
    """Keep this process's runs where those of another are kept."""
    if mlflow.get_tracking_uri() != uri:
        mlflow.set_tracking_uri(uri)


def folder() -> Path:
    """Where files belong that go with the runs: beside a store that is one, else the user's."""
    where = mlflow.get_tracking_uri()
    store = paths.store_file(where)
    if store:
        return store.parent
    return paths.home() if "://" in where else Path(where).parent


def check_backend(backend: str) -> None:
    """Raise :class:`SettingError` for a store that the workers of ``backend`` could not reach."""
    if backend == "ray" and not is_served():
        raise SettingError(
            "backend=ray needs MLflow's tracking server, for the runs that other machines "
            f"write: set MLFLOW_TRACKING_URI to its address, not '{without_credentials(uri())}'"
        )


def check_reachable() -> None:
    """Raise :class:`TrackingError` where a tracking server does not answer for a while.

    It is for what has to ask it, too; what only writes goes on without it.
    """
    if not is_served():
        return
    started = time.monotonic()
    while True:
        try:
            with _translated():
                _client().search_experiments(max_results=1)
        except OutageError as error:
            tried = time.monotonic() - started
            if tried >= SERVER_PATIENCE_S:
                raise TrackingError(f"{error} (tried for {tried:.0f} s)") from error
            time.sleep(1)
        else:
            return


@_reading()
def there(run: str, model: str) -> tuple[str, str]:
    """The ids of a run and of its model, where only keys of them are known."""
    client = _client()
    run = delivery.looked_up(client, run) if run.startswith(outbox.KEY) else run
    if model.startswith(outbox.KEY):
        model = delivery.model_of(client, run)
    return run, model


@_reading()
def register(
    name: str, model_id: str, run_id: str, tags: Mapping[str, object], description: str
) -> str:
    """A new version of the model ``name`` in MLflow's registry, which is made if need be."""
    client = _client()
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    made = client.create_model_version(
        name,
        f"models:/{model_id}",
        run_id,
        tags={key: str(value) for key, value in tags.items()},
        description=mlflow_page.plain(description),
        model_id=model_id,
    )
    return str(made.version)


def has_version(name: str, version: str) -> bool:
    """Whether the registered model has it still."""
    try:
        with _reading():
            _client().get_model_version(name, version)
    except OutageError:
        raise
    except TrackingError:
        return False
    return True


@_translated()
def set_alias(name: str, alias: str, version: str) -> None:
    """Let ``models:/name@alias`` be that version of the registered model."""
    _client().set_registered_model_alias(name, alias, version)


def is_served() -> bool:
    """Whether a tracking server holds the runs, which serves the page too."""
    return delivery.is_served(uri())


def shown() -> str:
    """Where the runs are kept, without a password."""
    return delivery.sender(uri()).tracking


def server(port: int = PORT) -> str:
    """The address of MLflow's page: the tracking server's or, of a local store, our own."""
    return uri() if is_served() else f"http://{HOST}:{port}"


def page(port: int) -> str:
    """The address of the saved view of the last comparison or, without one, of all experiments."""
    if _is_there(uri()):
        close_left_open()
    return _page(port)


@_translated()
def _page(port: int) -> str:
    experiments = _client().search_experiments()
    views = [
        (made_at, experiment.experiment_id, key.removeprefix(mlflow_page.VIEW))
        for experiment in experiments
        for key, value in experiment.tags.items()
        if key.startswith(mlflow_page.VIEW) and (made_at := mlflow_page.made_at(value))
    ]
    if views:
        _, experiment_id, view = max(views)
        return mlflow_page.absolute(server(port), mlflow_page.runs_address(experiment_id, view))
    return mlflow_page.absolute(server(port), mlflow_page.EXPERIMENTS)


def serve(port: int) -> int:
    """Serve MLflow's page of a local store on this machine alone, to the end; its exit code.

    By one process, without those that judge language models: it is up in a third of the time.
    """
    uri = mlflow.get_tracking_uri()
    store = paths.store_file(uri)
    folder = store.parent if store else Path()
    options = {
        "--host": HOST,
        "--port": str(port),
        "--workers": "1",
        "--uvicorn-opts": "--log-level warning",
        "--backend-store-uri": uri,
        "--default-artifact-root": str(folder.resolve() / "mlruns"),
    }
    command = [sys.executable, "-m", "mlflow", "server", *itertools.chain(*options.items())]
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ}
    with subprocess.Popen(command, env=environment) as process:  # noqa: S603 - our own arguments
        try:
            return process.wait()
        finally:  # on Ctrl-C Popen itself would not wait, and leave the page there for a moment
            process.terminate()
            process.wait()


def key_names(names: Iterable[str], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """For each of ``names`` one to end a metric key with, all different.

    What stands before a key's last slash is a section of MLflow's page, and keys have a limit.
    Names that can stay as they are do; those that are ``known`` already keep what they have.
    """
    names = list(dict.fromkeys(names))
    found = dict(known or {})
    taken = set(found.values())
    for name in sorted(names, key=lambda name: _short(name) != name):
        if name not in found:
            short = _short(name)
            numbered = (f"{short} {n}" for n in itertools.count(len(found)))
            wanted = itertools.chain([short], numbered)
            found[name] = next(one for one in wanted if one not in taken)
            taken.add(found[name])
    return {name: found[name] for name in names}


def _short(name: str) -> str:
    """``name`` as the end of a metric key, which two of them may share."""
    short = _key(name).replace("/", "_")[-LONGEST_KEY:]
    return short if short.strip(" .") else "_" * max(len(short), 1)  # "." and ".." are no names


def _status(error: BaseException) -> str:
    """What becomes of a run that ``error`` ended."""
    return "KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED"


@functools.cache
def _resolved_tags() -> dict[str, str]:
    """The user and the source, which MLflow gives to runs that it opens itself."""
    tags: dict[str, str] = resolve_tags()
    return tags


def _context_tags() -> dict[str, str]:
    """What every run has, whoever opens it."""
    return {**_resolved_tags(), **environment.tags()}


def active() -> Run | None:
    """The run that is open in this thread, if one is."""
    run = mlflow.active_run()
    return Run(run.info.run_id, run.info.experiment_id, ()) if run else None


def _open(
    name: str,
    experiment: str | None,
    params: Mapping[str, str],
    tags: Mapping[str, object],
) -> Run:
    launched = os.environ.get("MLFLOW_RUN_ID")
    if experiment is not None and not experiment.strip():
        raise SettingError(f"experiment must be a name, not '{experiment}'")
    if launched and experiment:
        raise SettingError(
            f"experiment '{experiment}' cannot be chosen inside mlflow run, which has made the run "
            "already; give mlflow run --experiment-name instead"
        )
    if launched:
        run = _launched(launched)
        opener = open_runs.opened(shown(), run.id)
        run.set_tags({**environment.tags(), **tags, OPENER: opener})
        del os.environ["MLFLOW_RUN_ID"]  # as MLflow does: what is opened next is another run
    else:
        outer = mlflow.active_run()
        parent = {PARENT: outer.info.run_id} if outer else {}
        # At once, so that a run is known by them wherever its process is killed.
        run = _created(name, {**_context_tags(), **parent, **tags}, _where(experiment))
    run.log_params(params, launched=bool(launched))
    return run


def _launched(id: str) -> Run:  # noqa: A002 - as a run's own
    """The run that ``mlflow run`` has made; while the server is away it is taken to be open."""
    experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID", "")
    launcher: tuple[str, ...] = ()
    with contextlib.suppress(OutageError), _translated():
        client = _client()
        found = client.get_run(id)
        if found.info.status not in ("RUNNING", "SCHEDULED"):
            raise SettingError(
                f"MLFLOW_RUN_ID must name a run that is still open, not '{id}', "
                f"which is {found.info.status}"
            )
        experiment_id = found.info.experiment_id
        manager = found.data.tags.get("mlflow.project.env", "local")
        experiment = client.get_experiment(experiment_id).name
        project: tuple[str, ...] = (".",)
        if paths.in_clone():
            tags = found.data.tags
            address = without_credentials(tags[MLFLOW_SOURCE_NAME])
            project = (address, "-v", tags.get(MLFLOW_GIT_COMMIT, "HEAD"))
        launcher = (*project, "--env-manager", manager, "--experiment-name", experiment)
    return Run(id, experiment_id, launcher)


def _where(experiment: str | None) -> dict[str, str]:
    """The experiment to open a run in: the one named, else MLflow's own variables', else ours."""
    if not experiment and os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return {"experiment_id": os.environ["MLFLOW_EXPERIMENT_ID"]}
    return {"experiment": experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT}


class Kept(NamedTuple):
    """A run as MLflow keeps it: ``lifecycle`` is active or deleted."""

    id: str
    experiment_id: str
    status: str
    lifecycle: str
    tags: Mapping[str, str]
    params: Mapping[str, str]


def read_run(run_id: str) -> Kept | None:
    """The run with this id, also a deleted one; None where there is none.

    Of a run whose ``run_id`` is a key, as its id was not known then, it has the id. A store that
    is not there is not made.
    """
    if not _is_there(uri()):
        return None
    with _reading():
        client = _client()
        try:
            known = delivery.looked_up(client, run_id) if run_id.startswith(outbox.KEY) else run_id
            found = client.get_run(known)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
    info, its = found.info, found.data
    return Kept(
        info.run_id, info.experiment_id, info.status, info.lifecycle_stage, its.tags, its.params
    )


def _is_there(where: str) -> bool:
    """False for a store whose file is missing, which asking would make."""
    store = paths.store_file(where)
    return not store or os.path.exists(store)  # noqa: PTH110 - never raises


def read_history(run_id: str, keys: Iterable[str]) -> dict[str, list[tuple[int, float]]]:
    """The (step, value) pairs of those metrics that the run has."""
    client = _client()
    with _reading():
        found = {key: client.get_metric_history(run_id, key) for key in keys}
    return {
        key: sorted((m.step, m.value) for m in points) for key, points in found.items() if points
    }


def read_artifact(run_id: str, name: str, limit: int) -> bytes | None:
    """The content of the run's file ``name``; None where there is none.

    One of more than ``limit`` bytes is a :class:`TrackingError`.
    """
    client = _client()
    with _reading(), tempfile.TemporaryDirectory() as folder:
        sizes = {file.path: file.file_size for file in client.list_artifacts(run_id)}
        if name not in sizes:
            return None
        if (sizes[name] or 0) > limit:
            raise TrackingError(
                f"{name} of run {run_id} has {sizes[name]:,} bytes, and may have {limit:,}"
            )
        return Path(client.download_artifacts(run_id, name, folder)).read_bytes()

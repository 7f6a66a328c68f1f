"""MLflow: the only module that imports it. A run is opened, written to, and always closed."""

from __future__ import annotations

import contextlib
import functools
import itertools
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
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import mlflow
import mlflow.data.meta_dataset
import mlflow.pytorch
import numpy as np
import torch
from filelock import FileLock
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking.context.registry import resolve_tags
from mlflow.types import Schema, TensorSpec
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT
from sqlalchemy.exc import SQLAlchemyError

from initflow import mlflow_page
from initflow.data import Splits
from initflow.drawing import Figure
from initflow.errors import SettingError, TrackingError, without_credentials

EXPERIMENT = "initflow"
HOST, PORT = "127.0.0.1", 5000  # where `initflow ui` serves a local store's page, by default
LONGEST_KEY = 150  # characters of a name in a metric key, which has 250
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
PATIENCE_S = 3.0  # after which a second signal ends a request that the first one waits for
DIGEST_LENGTH = 32  # MLflow takes up to 36 characters
STORE_TIMEOUT_S = 120
SERVER_PATIENCE_S = 10.0
DESCRIPTION = "mlflow.note.content"
ORPHANED = "initflow.orphaned"  # the tag of a run that is not counted, as its process died
# A driver may be missing, an address malformed.
FAILURES = (MlflowException, SQLAlchemyError, OSError, ImportError, ValueError)


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
def _translated() -> Iterator[None]:
    """Raise what MLflow or its store refuses as :class:`TrackingError`."""
    try:
        with _uninterrupted():
            yield
    except FAILURES as error:
        lines = [line for line in str(error).splitlines() if not line.startswith("(raised as")]
        reason = lines[0] if lines else type(error).__name__
        message = f"MLflow at '{mlflow.get_tracking_uri()}' failed: {reason}"
        raise TrackingError(without_credentials(message)) from error


@dataclass(frozen=True)
class Run:
    """The open MLflow run; every call is one request, or one batch of them.

    ``launcher`` holds the options of the ``mlflow run`` that started it, if one did: with
    them its experiment and its kind of environment are met again.
    """

    id: str
    experiment_id: str
    launcher: tuple[str, ...]

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.log_history({key: [(step, value)] for key, value in values.items()})

    @_translated()
    def log_history(
        self, history: Mapping[str, Sequence[tuple[int, float]]], model_id: str | None = None
    ) -> None:
        """All (step, value) pairs of each metric; the last are those of the model, if it is told.

        MLflow's own way to tell a model of a run's metrics is to read each of them again. Its
        page compares runs by what was logged first: that is the accuracy.
        """
        now = int(time.time() * 1000)
        metrics = [
            Metric(_key(key), value, now, step, model_id=None if left else model_id)
            for key, points in sorted(
                history.items(), key=lambda item: item[0] not in mlflow_page.COMPARED
            )
            for left, (step, value) in zip(reversed(range(len(points))), points, strict=True)
        ]
        mlflow.MlflowClient().log_batch(self.id, metrics=metrics)

    @_translated()
    def set_tags(self, tags: Mapping[str, object]) -> None:
        entities = [RunTag(key, str(value)) for key, value in tags.items()]
        mlflow.MlflowClient().log_batch(self.id, tags=entities)

    def describe(self, text: str) -> None:
        """Set the description, Markdown, that MLflow's page shows above all else."""
        self.set_tags({DESCRIPTION: text})

    @_translated()
    def log_figure(self, name: str, figure: Figure) -> None:
        file, options = f"{name}.png", {"dpi": figure.dpi}
        mlflow.MlflowClient().log_figure(self.id, figure, file, save_kwargs=options)

    @_translated()
    def log_json(self, name: str, values: Mapping[str, object]) -> None:
        mlflow.MlflowClient().log_dict(self.id, dict(values), f"{name}.json")

    @_translated()
    def log_data(self, splits: Splits) -> None:
        """The data set as an MLflow dataset input, by a digest of all its pixels and labels."""
        train = len(splits.train) + len(splits.validation or ())
        parts = {"train": train} | ({"test": len(splits.test)} if splits.test else {})
        schema = Schema(
            [
                TensorSpec(np.dtype(np.uint8), shape, name)
                for part, images in parts.items()
                for name, shape in (
                    (f"{part}_images", (images, splits.pixels)),
                    (f"{part}_labels", (images,)),
                )
            ]
        )
        dataset = mlflow.data.meta_dataset.MetaDataset(  # type: ignore[abstract]
            CodeDatasetSource(tags={"source": splits.source}),
            name=splits.name,
            digest=splits.digest[:DIGEST_LENGTH],
            schema=schema,
        )
        context = [InputTag(MLFLOW_DATASET_CONTEXT, "training")]
        logged = DatasetInput(dataset._to_mlflow_entity(), context)  # noqa: SLF001 - as log_input
        mlflow.MlflowClient().log_inputs(self.id, [logged])

    @_translated()
    def log_model(self, module: torch.nn.Module, pixels: int, step: int) -> str:
        """The id of ``module`` as an MLflow model: (n, pixels) float32 in, (n, classes) logits out.

        The requirements are stated, because guessing them takes MLflow 12 to 17 s.
        """
        example = np.zeros((2, pixels), dtype=np.float32)  # a batch of 1 would fix the size at 1
        with torch.no_grad():
            classes = module(torch.from_numpy(example)).shape[1]
        tensor = np.dtype(np.float32)
        logged = mlflow.pytorch.log_model(
            module,
            name="model",
            input_example=example,
            signature=ModelSignature(
                inputs=Schema([TensorSpec(tensor, (-1, pixels))]),
                outputs=Schema([TensorSpec(tensor, (-1, classes))]),
            ),
            pip_requirements=[f"{name}=={_public_version(name)}" for name in ("mlflow", "torch")],
            run_id=self.id,
            step=step,  # whose metrics MLflow takes for the model's
            validate_serving_input=False,  # by loading it again: the tests do
        )
        return str(logged.model_id)

    @_translated()
    def log_text(self, name: str, text: str) -> None:
        mlflow.MlflowClient().log_text(self.id, text, name)

    @_translated()
    def log_bytes(self, name: str, content: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, name)
            file.write_bytes(content)
            mlflow.MlflowClient().log_artifact(self.id, str(file))

    @_translated()
    def set_experiment_tag(self, key: str, value: str) -> None:
        mlflow.MlflowClient().set_experiment_tag(self.experiment_id, key, value)

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
        context = {"mlflow.parentRunId": self.id, DESCRIPTION: description, **_context_tags()}
        client = mlflow.MlflowClient()
        run = None
        try:
            with _translated():
                texts = {key: str(value) for key, value in tags.items()}
                if resumed:
                    run = Run(resumed, self.experiment_id, ())
                    client.update_run(run.id, "RUNNING")
                    client.set_tag(run.id, ORPHANED, "false")
                    run.set_tags(context | texts)
                else:
                    made = client.create_run(
                        self.experiment_id, tags=context | texts, run_name=name
                    )
                    run = Run(made.info.run_id, self.experiment_id, ())
                    client.log_batch(run.id, params=[Param(*item) for item in params.items()])
            yield run
            with _translated():
                client.set_terminated(run.id, ends_as)
        except BaseException as error:
            if _status(error) == "KILLED":  # as in start
                traceback.clear_frames(error.__traceback__)
            if run:
                with contextlib.suppress(*FAILURES):  # the error at hand is the one to tell
                    client.set_terminated(run.id, _status(error))
            raise

    @_translated()
    def found(self, tags: Mapping[str, object], experiments: Iterable[str] = ()) -> list[Found]:
        """The runs of this experiment and ``experiments``, but for this one, with these ``tags``.

        In a tag's value ``%`` stands for any letters.
        """
        client, found, page = mlflow.MlflowClient(), [], None
        where = list({self.experiment_id, *experiments})
        comparisons = ((key, "LIKE" if "%" in str(v) else "=", v) for key, v in tags.items())
        condition = " AND ".join(f"tags.`{key}` {how} '{v}'" for key, how, v in comparisons)
        while True:
            some = client.search_runs(where, condition, page_token=page)
            found += [Found(r.info.run_id, r.info.status, r.data.tags) for r in some]
            page = some.token
            if not page:
                return [one for one in found if one.id != self.id]

    @_translated()
    def disown(self, one: Found) -> None:
        """Close a run whose process died and that nobody will go on with, and say so by a tag."""
        client = mlflow.MlflowClient()
        client.set_tag(one.id, ORPHANED, "true")
        if one.status != "KILLED":
            client.set_terminated(one.id, "KILLED")


class Found(NamedTuple):
    """A run as it was found: its tags by key."""

    id: str
    status: str
    tags: Mapping[str, str]


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
    outer = mlflow.active_run()
    run = None
    try:
        with _translated():
            run = _open(name, experiment, params, {**tags, DESCRIPTION: description})
        yield run
        with _translated():
            mlflow.end_run("FINISHED")
    except BaseException as error:
        active = mlflow.active_run()
        own = active if active and not (outer and outer.info.run_id == active.info.run_id) else None
        # MLflow has forgotten a run whose closing was cut off, but the run is still open.
        opened = own.info.run_id if own else run.id if run else None
        if opened:
            status = _status(error)
            if (
                status == "KILLED"
            ):  # a statement that was cut off locks SQLite as long as its frame lives
                traceback.clear_frames(error.__traceback__)
            with contextlib.suppress(*FAILURES):  # the error at hand is the one to tell
                if own:
                    mlflow.end_run(status)
                else:
                    mlflow.MlflowClient().set_terminated(opened, status)
            if status == "KILLED":
                error.add_note(f"what was measured so far is in run {opened}")
        raise


def uri() -> str:
    """Where the runs are kept: a tracking server or a store."""
    return str(mlflow.get_tracking_uri())


def follow(uri: str) -> None:
    """Keep this process's runs where those of another are kept."""
    if mlflow.get_tracking_uri() != uri:
        mlflow.set_tracking_uri(uri)


def folder() -> Path:
    """Where files belong that go with the runs: beside a store that is one, else here."""
    where = mlflow.get_tracking_uri()
    if where.startswith("sqlite:///"):
        return Path(where.removeprefix("sqlite:///")).parent
    return Path() if "://" in where else Path(where).parent


def check_reachable(backend: str) -> None:
    """Raise :class:`TrackingError` where a tracking server does not answer for a while.

    MLflow itself would try for minutes without a word. A store that the workers of ``backend``
    could not reach is a :class:`SettingError`.
    """
    if not is_served():
        if backend == "ray":
            raise SettingError(
                "backend=ray needs MLflow's tracking server, for the runs that other machines "
                f"write: set MLFLOW_TRACKING_URI to its address, not '{without_credentials(uri())}'"
            )
        return
    started = time.monotonic()
    once = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    before = {key: os.environ.get(key) for key in once}
    os.environ.update(once)
    try:
        while True:
            try:
                with _translated():
                    mlflow.MlflowClient().search_experiments(max_results=1)
            except TrackingError as error:
                tried = time.monotonic() - started
                if tried >= SERVER_PATIENCE_S:
                    raise TrackingError(f"{error} (tried for {tried:.0f} s)") from error
                time.sleep(1)
            else:
                return
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


@_translated()
def register(
    name: str, model_id: str, run_id: str, tags: Mapping[str, object], description: str
) -> str:
    """A new version of the model ``name`` in MLflow's registry, which is made if need be."""
    client = mlflow.MlflowClient()
    with contextlib.suppress(MlflowException):  # it is there
        client.create_registered_model(name)
    made = client.create_model_version(
        name,
        f"models:/{model_id}",
        run_id,
        tags={key: str(value) for key, value in tags.items()},
        description=description,
        model_id=model_id,
    )
    return str(made.version)


def has_version(name: str, version: str) -> bool:
    """Whether the registered model has it still."""
    try:
        mlflow.MlflowClient().get_model_version(name, version)
    except MlflowException:
        return False
    return True


@_translated()
def set_alias(name: str, alias: str, version: str) -> None:
    """Let ``models:/name@alias`` be that version of the registered model."""
    mlflow.MlflowClient().set_registered_model_alias(name, alias, version)


def is_served() -> bool:
    """Whether a tracking server holds the runs, which serves the page too."""
    return mlflow.get_tracking_uri().startswith(("http://", "https://"))


def server(port: int = PORT) -> str:
    """The address of MLflow's page: the tracking server's or, of a local store, our own."""
    return mlflow.get_tracking_uri() if is_served() else f"http://{HOST}:{port}"


@_translated()
def page(port: int) -> str:
    """The address of the saved view of the last comparison or, without one, of all experiments."""
    with _store_lock(mlflow.get_tracking_uri()):
        experiments = mlflow.MlflowClient().search_experiments()
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
    local = uri.startswith("sqlite:///")
    folder = Path(uri.removeprefix("sqlite:///")).parent if local else Path()
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


def key_names(names: Iterable[str]) -> dict[str, str]:
    """For each of ``names`` one to end a metric key with, all different.

    What stands before a key's last slash is a section of MLflow's page, and keys have a limit.
    """
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        short = _key(name).replace("/", "_")[-LONGEST_KEY:]
        found[name] = f"{short} {len(found)}" if short in found.values() else short
    return found


def _status(error: BaseException) -> str:
    """What becomes of a run that ``error`` ended."""
    return "KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED"


@functools.cache
def _context_tags() -> dict[str, str]:
    """The user and the source, which MLflow gives to runs that it opens itself."""
    tags: dict[str, str] = resolve_tags()
    return tags


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
        status = mlflow.MlflowClient().get_run(launched).info.status
        if status not in ("RUNNING", "SCHEDULED"):
            raise SettingError(
                f"MLFLOW_RUN_ID must name a run that is still open, not '{launched}', "
                f"which is {status}"
            )
        active = mlflow.start_run()
        mlflow.set_tags(dict(tags))
    else:
        active = mlflow.start_run(
            run_name=name,
            experiment_id=_experiment_id(experiment),
            nested=mlflow.active_run() is not None,
            # At once, so that a run is known by them wherever its process is killed.
            tags={key: str(value) for key, value in tags.items()},
        )
    there = active.data.params
    mlflow.log_params({key: value for key, value in params.items() if key not in there})
    launcher: tuple[str, ...] = ()
    if launched:
        manager = active.data.tags.get("mlflow.project.env", "local")
        experiment = mlflow.get_experiment(active.info.experiment_id).name
        launcher = ("--env-manager", manager, "--experiment-name", experiment)
    return Run(active.info.run_id, active.info.experiment_id, launcher)


def _experiment_id(name: str | None) -> str:
    """The experiment to open a run in, made if it is not there.

    MLflow makes experiments, and an SQLite store, without a lock: several processes that
    start at once on an empty store would fail.
    """
    uri = mlflow.get_tracking_uri()
    with _store_lock(uri):
        client = mlflow.MlflowClient(uri)  # makes the store
        if not name and os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return os.environ["MLFLOW_EXPERIMENT_ID"]
        name = name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
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


def _store_lock(uri: str) -> contextlib.AbstractContextManager[object]:
    if not uri.startswith("sqlite:///"):
        return contextlib.nullcontext()
    store = Path(uri.removeprefix("sqlite:///"))
    store.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{store}.lock", timeout=STORE_TIMEOUT_S)


def _public_version(distribution: str) -> str:
    """The version without a local part (``+cpu``), which no package index holds."""
    return version(distribution).partition("+")[0]

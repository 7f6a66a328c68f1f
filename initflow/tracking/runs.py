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
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import mlflow
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_SOURCE_NAME
from torch import Tensor

from initflow.core import environment, paths
from initflow.core.secrets import without_credentials
from initflow.errors import OutageError, SettingError, TrackingError
from initflow.tracking import (
    connection,
    delivery,
    histories,
    mlflow_page,
    open_runs,
    outbox,
    unsent,
)
from initflow.tracking.delivery import KEY_TAG, OPENER, ORPHANED, PAGE
from initflow.tracking.logged_models import artifacts, model_files
from initflow.tracking.outages import translated
from initflow.tracking.outbox import Entry
from initflow.training.splits import PIXELS, Scale, Splits

EXPERIMENT = "initflow"
LONGEST_KEY = 150  # characters of a name in a metric key, which has 250
DIGEST_LENGTH = 32  # MLflow takes up to 36 characters
DESCRIPTION = "mlflow.note.content"
PARENT = "mlflow.parentRunId"
ID = re.compile(r"[a-z\d][\w-]{,255}", re.ASCII | re.IGNORECASE)  # what MLflow takes for a run's
STARTED = ("attributes.start_time ASC",)  # an order of runs
INTERRUPTIONS = (KeyboardInterrupt, SystemExit)


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Around a question to MLflow, whose answer must know of all that was written before."""
    sender = delivery.sender()
    if sender.waiting() and not sender.flush(unsent.CLOSING_PATIENCE_S, as_it_goes=True):
        raise OutageError(f"MLflow at '{sender.tracking}' failed: {sender.reason}")
    with translated():
        yield


def send(entry: Entry) -> None:
    """Write it now or, where MLflow does not answer, later."""
    with translated():
        delivery.sender().send(entry, needs_id=entry.kind in ("create", "model", outbox.RUN))


def with_ids(text: str) -> str:
    """``text`` with the ids that the server has given by now to what has keys in it."""
    known = delivery.sender().known
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
    launcher: tuple[str, ...] = ()

    def _write(self, kind: str, content: bytes = b"", **values: object) -> None:
        send(Entry(kind, self.id, values, content))

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.log_history({key: [(step, value)] for key, value in values.items()})

    def log_history(
        self, history: Mapping[str, Sequence[tuple[int, float]]], model_id: str | None = None
    ) -> None:
        """All (step, value) pairs of each metric; the last are also the model's, if it is given.

        MLflow itself would give them to the model by reading each of them again. Its
        page compares runs by what was logged first: that is the accuracy.
        """
        now = now_ms()
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
            takes=splits.takes,
            parts=parts,
        )

    def log_model(
        self,
        state: Mapping[str, Tensor],
        activation: str,
        *,
        mean: Scale,
        std: Scale,
        pixels: int,
        step: int,
        takes: str = PIXELS,
    ) -> str:
        """The id of a network as an MLflow model: see :func:`initflow.training.model.to_module`."""
        from safetensors.torch import save  # noqa: PLC0415 - watching has no need of it

        key = outbox.new_key(outbox.MODEL_KEY)
        tensors = {name: tensor.detach().clone() for name, tensor in state.items()}
        values = {"activation": activation, "mean": mean, "std": std, "pixels": pixels}
        model_files.prepare(tensors, values)  # what cannot be exported fails before it is sent
        self._write("model", save(tensors), key=key, step=step, takes=takes, **values)
        return with_ids(key)

    def log_program(self, content: bytes, *, pixels: int, step: int, takes: str = PIXELS) -> str:
        """The id of a network as an MLflow model: see :func:`initflow.training.modules.program`."""
        key = outbox.new_key(outbox.MODEL_KEY)
        self._write("model", content, key=key, step=step, pixels=pixels, takes=takes)
        return with_ids(key)

    def set_experiment_tag(self, key: str, value: str) -> None:
        self._write("experiment_tag", experiment_id=self.experiment_id, key=key, value=value)

    def end(self, status: str) -> None:
        self._write("status", status=status, ended=now_ms())
        open_runs.closed(connection.shown(), self.id)

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
        tags = self._tags_below(description, tags)
        where = {"experiment_id": self.experiment_id}
        again = Run(resumed, self.experiment_id) if resumed else None
        with _closing(lambda: again or _created(name, tags, where), ends_as) as run:
            if again:
                # Whose it is comes first: the process that had it may be taken for dead just now.
                opener = open_runs.opened(connection.shown(), again.id)
                again.set_tags({**tags, OPENER: opener, ORPHANED: "false"})
                again._write("status", status="RUNNING")  # noqa: SLF001 - its own
            else:
                run.log_params(params)
            yield run

    @contextlib.contextmanager
    def nested_at_once(
        self,
        *,
        name: str,
        description: str,
        params: Mapping[str, str],
        tags: Mapping[str, object],
        ends_as: str = "FINISHED",
    ) -> Iterator[Run]:
        """A run below this one that is written as one entry, with all it is given, when it ends.

        It is closed as :func:`start` does it. Raises
        :class:`initflow.tracking.outbox.NoModelError` where only its model
        could not be written.
        """
        draft = Draft(outbox.new_key(), self.experiment_id)
        tags, where = self._tags_below(description, tags), {"experiment_id": self.experiment_id}
        draft.entries.append(_creation(draft.id, name, tags, where))
        with _closing(lambda: draft, ends_as) as run:
            run.log_params(params)
            yield run

    def _tags_below(self, description: str, tags: Mapping[str, object]) -> dict[str, object]:
        """Those of a run below this one, beside its own ``tags``."""
        described = {PARENT: self.id, DESCRIPTION: mlflow_page.plain(description)}
        return {**described, **_context_tags(), **tags}

    def found(self, tags: Mapping[str, object], experiments: Iterable[str] = ()) -> list[Found]:
        """The runs of this experiment and ``experiments``, but for this one, with these ``tags``.

        In a tag's value ``%`` stands for any letters.
        """
        return list(self.each_found(tags, experiments))

    def each_found(
        self, tags: Mapping[str, object], experiments: Iterable[str] = (), at_once: int = PAGE
    ) -> Iterator[Found]:
        """The same one by one, of which so many are asked for ``at_once``.

        What they have of these ``tags`` is not to be changed meanwhile.
        """
        with reading():  # after which all ids are known
            own = with_ids(self.id)
            where = list(map(with_ids, {self.experiment_id, *experiments}))
            condition = with_ids(_condition(tags))
        found = searched(where, condition, at_once=at_once)
        yield from (one for one in found if one.id != own)

    def below(self) -> list[Found]:
        """The runs directly below it."""
        return self.found({PARENT: self.id})

    def take_over(self, run_ids: Sequence[str]) -> None:
        """Let closed runs of this experiment be below this run."""
        self._write("tags_of_many", runs=list(run_ids), tags={PARENT: self.id})

    def same_experiment(self, run_id: str) -> Run:
        """The run with this id, to be written to."""
        return Run(run_id, self.experiment_id)

    def mark_orphaned(self, one: Found) -> None:
        """Close a run whose process died and that nobody will go on with, and say so by a tag."""
        lost = Run(one.id, self.experiment_id)
        lost.set_tags({ORPHANED: "true"})
        if one.status != "KILLED":
            lost.end("KILLED")


def _condition(tags: Mapping[str, object]) -> str:
    """In MLflow's words, that a run has these ``tags``, of which ``%`` stands for any letters."""
    comparisons = ((key, "LIKE" if "%" in str(v) else "=", v) for key, v in tags.items())
    return " AND ".join(f"tags.`{key}` {how} '{v}'" for key, how, v in comparisons)


@dataclass(frozen=True)
class Draft(Run):
    """A run that is not there yet: what is written to it is kept until it ends, then sent at once.

    Its ``id`` is a key, as that of all there is in it.
    """

    entries: list[Entry] = field(default_factory=list)

    def _write(self, kind: str, content: bytes = b"", **values: object) -> None:
        self.entries.append(Entry(kind, self.id, values, content))

    def end(self, status: str) -> None:
        """Send it, once; what an interruption has cut off is sent again."""
        if not self.entries:
            return
        is_again = self.entries[-1].kind == "status"
        if is_again:
            self.entries.pop()
        self._write("status", status=status, ended=now_ms())
        tracking = connection.shown()
        opener = open_runs.opened(tracking, self.id)  # before it is made, as of any run
        create, *others = self.entries
        create = replace(
            create, values={**create.values, "tags": {**create.values["tags"], OPENER: opener}}
        )
        try:
            send(replace(outbox.as_one(self.id, [create, *others]), is_again=is_again))
        except INTERRUPTIONS:
            raise
        except BaseException:
            self.entries.clear()
            raise
        else:
            self.entries.clear()
        finally:
            open_runs.closed(tracking, self.id)


class Found(NamedTuple):
    """A run as MLflow keeps it: its tags by key; ``lifecycle`` is active or deleted.

    ``params`` are as they were logged, and ``metrics`` have the last value of each; ``files`` is
    the address of its artifacts.
    """

    id: str
    status: str
    tags: Mapping[str, str]
    experiment_id: str = ""
    lifecycle: str = "active"
    params: Mapping[str, str] = {}
    metrics: Mapping[str, float] = {}
    files: str = ""

    @classmethod
    def of(cls, run: mlflow.entities.Run) -> Found:
        its, data = run.info, run.data
        return cls(
            its.run_id,
            its.status,
            data.tags,
            its.experiment_id,
            its.lifecycle_stage,
            data.params,
            data.metrics,
            str(its.artifact_uri),
        )

    @property
    def names(self) -> set[str]:
        """Its id, and the key that it had before it was given one."""
        return {self.id, self.tags.get(KEY_TAG, self.id)}


def read_run(run_id: str) -> Found | None:
    """The run with this id, also a deleted one; None where there is none.

    Of a run whose ``run_id`` is a key, as its id was not known then, it has the id. A store that
    is not there is not made.
    """
    if not connection.is_there():
        return None
    with reading():
        found = delivery.run_of(connection.client(), run_id)
    return Found.of(found) if found else None


def searched(
    experiments: Sequence[str],
    condition: str,
    *,
    at_once: int = PAGE,
    order: Sequence[str] = (),
) -> Iterator[Found]:
    """The runs of these ``experiments``, by id, that meet a ``condition`` in MLflow's words."""
    page = None
    while True:
        with reading():
            some = connection.client().search_runs(
                list(experiments),
                condition,
                max_results=at_once,
                order_by=list(order),
                page_token=page,
            )
        yield from map(Found.of, some)
        page = some.token
        if not page:
            return


def children(one: Found) -> list[Found]:
    """The runs directly below it, in the order in which they were started."""
    return list(searched([one.experiment_id], _condition({PARENT: one.id}), order=STARTED))


def experiment_id(name: str) -> str | None:
    """That of the experiment called ``name``; None where there is none."""
    if not connection.is_there():
        return None
    with reading():
        found = connection.client().get_experiment_by_name(name)
    return str(found.experiment_id) if found else None


def read_history(run_id: str, keys: Iterable[str]) -> dict[str, list[tuple[int, float]]]:
    """The (step, value) pairs of those metrics that the run has."""
    client = connection.client()
    with reading():
        found = {key: histories.of_run(client, run_id, key) for key in keys}
    return {key: points for key, points in found.items() if points}


def read_histories(run_ids: Sequence[str], key: str) -> dict[str, list[tuple[int, float]]]:
    """The (step, value) pairs of the metric ``key`` in those runs that have it.

    A run of which they cannot be read is left out.
    """
    client, found = connection.client(), dict[str, list[tuple[int, float]]]()
    for part in histories.parts(run_ids):
        try:
            with reading():
                found |= histories.of_runs(client, part, key)
        except OutageError:
            raise
        except TrackingError:  # which of them it is shows one by one
            for run_id in part:
                with _left_out(), reading():
                    found[run_id] = histories.of_run(client, run_id, key)
    return found


@contextlib.contextmanager
def _left_out() -> Iterator[None]:
    """Around what may be refused; no outage is hidden."""
    try:
        yield
    except OutageError:
        raise
    except TrackingError:
        return


def read_file(one: Found, name: str, limit: int) -> bytes | None:
    """As :func:`read_artifact`, by one request at most where that is possible."""
    if not artifacts.can_get(one.files):
        return read_artifact(one.id, name, limit)
    with reading():
        content = artifacts.get(connection.uri(), one.files, name, limit)
    if content is not None and len(content) > limit:
        raise TrackingError(f"{name} of run {one.id} has more than {limit:,} bytes")
    return content


def read_artifact(run_id: str, name: str, limit: int) -> bytes | None:
    """The content of the run's file ``name``; None where there is none.

    One of more than ``limit`` bytes is a :class:`TrackingError`.
    """
    client = connection.client()
    with reading(), tempfile.TemporaryDirectory() as folder:
        sizes = {file.path: file.file_size for file in client.list_artifacts(run_id)}
        if name not in sizes:
            return None
        if (sizes[name] or 0) > limit:
            raise TrackingError(
                f"{name} of run {run_id} has {sizes[name]:,} bytes, and may have {limit:,}"
            )
        return Path(client.download_artifacts(run_id, name, folder)).read_bytes()


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
    unsent.sync(only=connection.shown(), patience_s=unsent.CLOSING_PATIENCE_S)
    close_left_open()
    run = None
    described = {DESCRIPTION: mlflow_page.plain(description)}
    try:
        with _closing(lambda: _open(name, experiment, params, {**tags, **described})) as run:
            yield run
    except INTERRUPTIONS as error:
        if run:
            error.add_note(f"what was measured so far is in run {run.id}")
        raise
    finally:
        if run:
            unsent.flush()


@contextlib.contextmanager
def _closing(opening: Callable[[], Run], ends_as: str = "FINISHED") -> Iterator[Run]:
    """The run that ``opening`` opens, closed as ``ends_as`` or as the error has it."""
    run = None
    try:
        run = opening()
        yield run
        run.end(ends_as)
    except BaseException as error:
        is_killed = isinstance(error, INTERRUPTIONS)
        if is_killed:  # a statement that was cut off locks SQLite as long as its frame lives
            traceback.clear_frames(error.__traceback__)
        if run:
            with contextlib.suppress(TrackingError):  # the first error is the one to raise
                run.end("KILLED" if is_killed else "FAILED")
        raise


def close_left_open(*, everywhere: bool = False) -> None:
    """Close the runs that processes of this machine left open here when they died.

    Or ``everywhere``: where else they were written to. What does not answer is left for the next.
    """
    away = set[str]()
    for left in open_runs.left_open():
        is_elsewhere = left.tracking != connection.shown()
        is_passed_over = is_elsewhere and not (everywhere and connection.is_there(left.tracking))
        if is_passed_over or left.tracking in away:
            continue
        where = connection.with_credentials(left.tracking)
        for run in left.runs:
            try:
                with translated(where):
                    delivery.close_orphan(where, run, left.opener)
                left.forget(run)
            except OutageError:
                away.add(left.tracking)
                break
            except TrackingError:  # such as of a lack of rights
                continue


def _created(name: str, tags: Mapping[str, object], where: Mapping[str, str]) -> Run:
    """A new run in the experiment that ``where`` gives, as ``experiment_id`` or ``experiment``."""
    key, tracking = outbox.new_key(), connection.shown()
    opener = open_runs.opened(tracking, key)  # before it is made: we may do nothing after it
    try:
        send(_creation(key, name, {**tags, OPENER: opener}, where))
    except TrackingError:
        open_runs.closed(tracking, key)
        raise
    run = Run(with_ids(key), with_ids(outbox.experiment_key(key)))
    if run.id != key:
        open_runs.opened(tracking, run.id)
        open_runs.closed(tracking, key)
    return run


def _creation(key: str, name: str, tags: Mapping[str, object], where: Mapping[str, str]) -> Entry:
    """What makes the run of this key, started now."""
    values = {"name": name, "tags": _texts(tags), "started": now_ms(), **where}
    return Entry("create", key, values)


def _texts(tags: Mapping[str, object]) -> dict[str, str]:
    return {key: str(value) for key, value in tags.items()}


def now_ms() -> int:
    """Milliseconds, as MLflow counts."""
    return int(time.time() * 1000)


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


# The user and the source, which MLflow gives to runs that it opens itself.
_resolved_tags = functools.cache(resolve_tags)


def _context_tags() -> dict[str, str]:
    """What every run has, whoever opens it."""
    return {**_resolved_tags(), **environment.tags()}


def active() -> Run | None:
    """The run that is open in this thread, if one is."""
    run = mlflow.active_run()
    return Run(run.info.run_id, run.info.experiment_id) if run else None


def of_id(run_id: object) -> Run:
    """The run that has this id, to be written to; none that is not there, or was deleted.

    While the server is away it is taken to be there.
    """
    if not isinstance(run_id, str) or not ID.fullmatch(run_id):
        raise SettingError(f"run_id must be the id of an MLflow run, not {run_id!r}")
    try:
        found = read_run(run_id)
    except OutageError:
        return Run(run_id, "")
    if found is None:
        raise SettingError(
            f"run_id must be the id of a run in MLflow at {connection.shown()}, which has no "
            f"'{run_id}'"
        )
    if found.lifecycle == "deleted":
        raise SettingError(f"run_id must be the id of a run that is there: '{run_id}' was deleted")
    return Run(found.id, found.experiment_id)


def _open(
    name: str,
    experiment: str | None,
    params: Mapping[str, str],
    tags: Mapping[str, object],
) -> Run:
    launched = os.environ.get("MLFLOW_RUN_ID")
    if experiment is not None and not (isinstance(experiment, str) and experiment.strip()):
        raise SettingError(f"experiment must be a name, not '{experiment}'")
    if launched and experiment:
        raise SettingError(
            f"experiment '{experiment}' cannot be chosen inside mlflow run, which has made the run "
            "already; give mlflow run --experiment-name instead"
        )
    if launched:
        run = _launched(launched)
        opener = open_runs.opened(connection.shown(), run.id)
        run.set_tags({**environment.tags(), **tags, OPENER: opener})
        del os.environ["MLFLOW_RUN_ID"]  # as MLflow does: what is opened next is another run
    else:
        outer = active()
        parent = {PARENT: outer.id} if outer else {}
        of_mlflow = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if of_mlflow and not experiment:
            where = {"experiment_id": of_mlflow}
        else:
            called = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
            where = {"experiment": called}
        # At once, so that a run is known by them wherever its process is killed.
        run = _created(name, {**_context_tags(), **parent, **tags}, where)
    run.log_params(params, launched=bool(launched))
    return run


def _launched(id: str) -> Run:  # noqa: A002 - as a run's own
    """The run that ``mlflow run`` has made; while the server is away it is taken to be open."""
    with contextlib.suppress(OutageError), translated():
        client = connection.client()
        found = client.get_run(id)
        info, tags = found.info, found.data.tags
        if info.status not in ("RUNNING", "SCHEDULED"):
            raise SettingError(
                f"MLFLOW_RUN_ID must name a run that is still open, not '{id}', "
                f"which is {info.status}"
            )
        here = paths.working_folder()
        project = ["." if here == paths.PACKAGE.parent else str(here)]
        if paths.in_clone():
            address = without_credentials(tags[MLFLOW_SOURCE_NAME])
            project = [address, "-v", tags.get(MLFLOW_GIT_COMMIT, "HEAD")]
        experiment = client.get_experiment(info.experiment_id).name
        manager = tags.get("mlflow.project.env", "local")
        options = ("--env-manager", manager, "--experiment-name", experiment)
        return Run(id, info.experiment_id, (*project, *options))
    return Run(id, os.environ.get("MLFLOW_EXPERIMENT_ID", ""))

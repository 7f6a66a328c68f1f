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
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlflow
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_SOURCE_NAME
from safetensors.torch import save as as_safetensors
from torch import Tensor

from initflow.core import environment, paths
from initflow.core.secrets import without_credentials
from initflow.errors import OutageError, SettingError, TrackingError
from initflow.tracking import connection, delivery, mlflow_page, open_runs, outbox, unsent
from initflow.tracking.delivery import KEY_TAG, OPENER, ORPHANED
from initflow.tracking.outages import translated
from initflow.tracking.outbox import Entry
from initflow.training.splits import Splits

EXPERIMENT = "initflow"
LONGEST_KEY = 150  # characters of a name in a metric key, which has 250
DIGEST_LENGTH = 32  # MLflow takes up to 36 characters
DESCRIPTION = "mlflow.note.content"
PARENT = "mlflow.parentRunId"


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Around a question to MLflow, whose answer must know of all that was written before."""
    sender = delivery.sender(connection.uri())
    if sender.waiting() and not sender.flush(unsent.CLOSING_PATIENCE_S, as_it_goes=True):
        raise OutageError(f"MLflow at '{sender.tracking}' failed: {sender.reason}")
    with translated():
        yield


def send(entry: Entry) -> None:
    """Write it now or, where MLflow does not answer, later."""
    with translated():
        delivery.sender(connection.uri()).send(entry, is_asking=entry.kind in ("create", "model"))


def with_ids(text: str) -> str:
    """``text`` with the ids that the server has given by now to what has keys in it."""
    known = delivery.sender(connection.uri()).known
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
        send(Entry(kind, self.id, values, content))

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
        described = {DESCRIPTION: mlflow_page.plain(description)}
        tags = {PARENT: self.id, **described, **_context_tags(), **tags}
        run = None
        try:
            if resumed:
                run = Run(resumed, self.experiment_id, ())
                # Whose it is comes first: the process that had it may be taken for dead just now.
                own = {OPENER: open_runs.opened(connection.shown(), resumed), ORPHANED: "false"}
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

    @reading()
    def found(self, tags: Mapping[str, object], experiments: Iterable[str] = ()) -> list[Found]:
        """The runs of this experiment and ``experiments``, but for this one, with these ``tags``.

        In a tag's value ``%`` stands for any letters.
        """
        client, found, page = connection.client(), [], None
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

    def mark_orphaned(self, one: Found) -> None:
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
            unsent.flush()


def close_left_open(*, everywhere: bool = False) -> None:
    """Close the runs that processes of this machine left open here when they died.

    Or ``everywhere``: where else they were written to. What does not answer is left for the next.
    """
    own, away = connection.shown(), set[str]()
    for left in open_runs.left_open():
        if left.tracking != own and not (everywhere and connection.is_there(left.tracking)):
            continue
        if left.tracking in away:
            continue
        where = connection.uri() if left.tracking == own else left.tracking
        for run in left.runs:
            try:
                with translated(where):
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
    key, tracking = outbox.new_key(), connection.shown()
    opener = open_runs.opened(tracking, key)  # before it is made: we may do nothing after it
    tags = {**_texts(tags), OPENER: opener}
    values = {"name": name, "tags": tags, "started": _now(), **where}
    try:
        send(Entry("create", key, values))
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
        opener = open_runs.opened(connection.shown(), run.id)
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
    with contextlib.suppress(OutageError), translated():
        client = connection.client()
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

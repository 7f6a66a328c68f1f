"""Runs and bundles verified: trained again from what they recorded, and compared bit for bit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import initflow
from initflow.core import machine, paths
from initflow.core.configurations import DATASET_NAMES, VerifyConfig
from initflow.core.kinds import ARRAYS, is_place
from initflow.core.progress import Progress
from initflow.errors import ReplayError, SettingError
from initflow.experiments.public import public
from initflow.experiments.replay import bundle, provenance, recorded
from initflow.experiments.replay.promise import PROMISED
from initflow.experiments.replay.provenance import REPLAY, UNCOMMITTED, Evidence, Provenance
from initflow.experiments.replay.retraining import Replay, replay, sentence
from initflow.experiments.results import TrackedResult
from initflow.initializers import finder, plugins
from initflow.initializers.built_in import BUILT_IN
from initflow.initializers.scheme import Scheme, parse
from initflow.models import places
from initflow.reporting.results import Result
from initflow.tracking import connection, runs
from initflow.training import cache, datasets

RUN_ID = re.compile(r"(?:waiting-)?[0-9a-f]{32}")
CURVES = ("accuracy/test", "accuracy/validation", "loss/test", "loss/validation")
NAMED = 3  # networks of a run of many, as many are named
LARGEST_DIFF = 2**22  # bytes
DEPTH = 3  # runs above one another, of a tuning


@dataclass(frozen=True, repr=False)
class Verification(Result):
    """What came of :func:`initflow.verify`.

    ``what`` is the run or the folder, in words, ``verdict`` is ``identical``, ``tolerable`` or
    ``different``, and ``replay`` has what was compared and how far it differs.
    """

    what: str
    replay: Replay

    @property
    def verdict(self) -> str:
        """``identical``, bit for bit; ``tolerable``, as far as rounding explains; ``different``."""
        return self.replay.verdict

    @property
    def title(self) -> str:
        return f"{self.what} is {self.verdict}"

    @property
    def conclusions(self) -> Sequence[str]:
        """What came of it and, where the same bits are not promised, where they are."""
        promise = self.replay.promise
        told = [] if promise.bits == PROMISED else [promise.sentence]
        return [sentence(self.replay, self.what), *told]

    def as_json(self) -> dict[str, object]:
        """What every result has, with the verdict and what of the environment differs."""
        return {**super().as_json(), **self.replay.as_json()}

    def numbers(self) -> Iterable[Mapping[str, object]]:
        """A row for each part that was compared, with where and how far it differs."""
        return ({"part": what, **its} for what, its in self.replay.as_json()["parts"].items())


@public(VerifyConfig)
@cache.cleared_after()
def verify(
    run: str | os.PathLike[str] | TrackedResult, config: VerifyConfig, *, progress: Progress
) -> Verification:
    """Train a network again from what its ``run`` recorded, and compare the two bit for bit.

    ``run`` is the id of one network's run, a result that has one, or the folder that
    :func:`initflow.export` wrote. Settings are for what is no longer where it was: the scheme, the
    plugins, the data, the device.

    Returns a :class:`Verification`. Inside ``mlflow run`` it is written to that run; else nothing
    is written anywhere.

    Raises :class:`SettingError` for what is no run or a wrong setting, :class:`ReplayError` for a
    record that is missing or damaged, or cannot be trained again here, :class:`DataError` for data
    that is missing or another, and :class:`TrackingError` where MLflow fails. Other numbers are no
    error.
    """
    what = _named(run)
    is_folder = _is_folder(what)
    named = f"folder '{what}'" if is_folder else f"run {what}"
    progress(f"reading {named}", 0, 1)
    evidence = bundle.opened(paths.own(what)) if is_folder else _of_run(what)
    past = evidence.provenance
    if is_folder:  # what somebody else wrote chooses neither a path nor the code that is run
        own = replace(past.config, data_dir=None, plugins_dir=None)
    else:
        own = replace(past.config, plugins_dir=_if_there(past.config.plugins_dir))
        needed = past.config.data_dir if past.config.dataset in datasets.TORCHVISION else None
        if needed and not config.data_dir and not _if_there(needed):
            raise ReplayError(
                f"its data folder, '{needed}', is not here: say by data_dir where the data is"
            )
    dataset = config.dataset or _dataset(past, trusted=not is_folder)
    own = replace(
        own,
        dataset=dataset,
        data_dir=config.data_dir or own.data_dir,
        plugins_dir=config.plugins_dir or own.plugins_dir,
        init=config.init or own.init,
        model=config.model or own.model,
    )
    if is_folder and ":" in own.model and not config.model:
        raise ReplayError(
            f"its model is built by a function by its place, '{own.model}', which is not run "
            "because a folder says so: look at the code, and give its place yourself by model"
        )
    if config.init:  # the user's own word
        scheme = cache.scheme(config.init, own.plugins_dir)
    else:
        scheme = _scheme(past, own.init, own.plugins_dir, trusted=not is_folder)
    device = _device(past, config.device)
    progress("loading the data, downloaded at its first use", 0, 1)
    result = Verification(named, replay(evidence, scheme, datasets.load(own), device, progress))
    if os.environ.get("MLFLOW_RUN_ID"):
        _log(result, what, config, device)
    return result


def export(run: str | TrackedResult, to: str | os.PathLike[str]) -> str:
    """Write what it takes to verify a ``run``, without access to MLflow, into the folder ``to``.

    ``run`` is the id of one network's run or a result that has one; ``to`` is the path of a folder
    that is not there yet, or empty.

    Returns the command that verifies it, as text. Raises :class:`SettingError` for what is no run
    or no such folder, :class:`ReplayError` for a run that cannot be verified, and
    :class:`TrackingError` where MLflow fails.
    """
    if not isinstance(to, (str, os.PathLike)):
        raise SettingError(f"to must be the path of a folder, not {to!r}")
    run_id, folder = _named(run), Path(to)
    bundle.check_free(folder)
    if not RUN_ID.fullmatch(run_id):
        raise SettingError(f"run must be the id of a run, 32 digits and letters, not '{run_id}'")
    evidence = _of_run(run_id)
    run_id = runs.with_ids(run_id)
    files = provenance.files(evidence)
    files |= bundle.pages(evidence, runs.read_history(run_id, CURVES), run_id)
    diff = _uncommitted(run_id)
    if diff is not None:
        files[UNCOMMITTED] = diff
    bundle.write(folder, files)
    return bundle.verifying(evidence.provenance, str(folder))


def _named(run: str | os.PathLike[str] | TrackedResult) -> str:
    """The id of a run, or the path of a folder."""
    named = getattr(run, "run_id", run)
    if not isinstance(named, (str, os.PathLike)):
        raise SettingError(
            f"run must be the id of a run, a result that has one, or a folder, not {run!r}"
        )
    return os.fspath(named)


def _is_folder(what: str) -> bool:
    try:
        is_folder = bool(what) and paths.own(what).is_dir()
    except (OSError, ValueError):  # a name that no system has
        is_folder = False
    if not is_folder and not RUN_ID.fullmatch(what):
        raise SettingError(
            f"run must be the id of a run, 32 digits and letters, or a folder that initflow export "
            f"wrote, not '{what}'"
        )
    return is_folder


def _if_there(folder: Path | None) -> Path | None:
    return folder if folder and os.path.isdir(folder) else None  # noqa: PTH112 - never raises


def _dataset(past: Provenance, *, trusted: bool) -> str:
    """The data set to train on; only a ``trusted`` one may be a file or a function to run."""
    dataset = past.config.dataset
    if dataset in DATASET_NAMES:
        return dataset
    if not trusted:
        raise ReplayError(
            f"its data is a file or a function by its place, '{dataset}', which is not read or run "
            "because a folder says so: have the data, and give its place yourself by dataset"
        )
    place = dataset.rpartition(":")[0] if is_place(dataset) else dataset
    if place.endswith((".py", ARRAYS)) and not paths.own_or_of_project(place).is_file():
        raise ReplayError(f"its data, '{dataset}', is not here: say by dataset where it is now")
    return dataset


def _scheme(past: Provenance, init: str, plugins_dir: Path | None, *, trusted: bool) -> Scheme:
    """The scheme to train by; only a ``trusted`` init may name a file or a module to run."""
    if init.partition(":")[0].strip() in (*BUILT_IN, *places.OF_A_MODEL):
        return cache.scheme(init, plugins_dir)
    found = finder.found(plugins_dir)
    name, _ = parse(init, [*BUILT_IN, *found])
    if ":" in name and not trusted:
        raise ReplayError(
            f"its scheme is a function by its place, '{init}', which is not run because a folder "
            f"says so: look at the code, and give its place yourself by init"
        )
    if ":" not in name and name not in found:
        raise ReplayError(
            f"its scheme '{past.spec}' of {past.provider} is not here: install it, or say by "
            "plugins_dir or init where it is"
        )
    try:
        return plugins.find(init, plugins_dir)
    except SettingError as error:
        raise ReplayError(f"{error}; say by init where it is now") from error


def _device(past: Provenance, requested: str | None) -> str:
    try:
        return machine.device(requested or past.device)
    except SettingError:
        if requested:
            raise
        raise ReplayError(
            f"it was trained on {past.device}, which is not here: device=cpu trains it here, where "
            "it rounds differently"
        ) from None


def _of_run(run_id: str) -> Evidence:
    """What the run recorded, if it is one that can be trained again."""
    run = runs.read_run(run_id)
    if run is None:
        raise ReplayError(f"there is no run {run_id} in MLflow at '{connection.shown()}'")
    run_id = run.id
    if run.lifecycle != "active":
        raise ReplayError(
            f"run {run_id} is deleted; mlflow runs restore --run-id {run_id} brings it back"
        )
    if run.status in ("RUNNING", "SCHEDULED"):
        raise ReplayError(
            f"run {run_id} is {run.status}: wait for its end; where its process died, there is none"
        )

    def read(name: str, limit: int) -> bytes | None:
        return runs.read_artifact(run_id, name, limit)

    outcome = run.tags.get("initflow.outcome")
    is_network = "initflow.initial_weights_sha256" in run.tags or outcome is not None
    if not is_network:
        raise ReplayError(_of_many(run))
    if outcome == "failed":
        raise ReplayError(f"run {run_id} is of a network that could not be initialized")
    if outcome is None and run.status == "FINISHED":
        raise ReplayError(f"run {run_id} is a diagnosis's, of a network that was not trained")
    if outcome is None:
        raise ReplayError(
            f"run {run_id} ended {run.status} before its training did: there are no final weights "
            "to compare with"
        )
    if read(REPLAY, recorded.LARGEST) is None:
        version = run.tags.get("initflow.version", "another version")
        older = f"it is of initflow {version}, which did not record what a replay needs"
        why = "it was deleted" if version == initflow.__version__ else older
        raise ReplayError(f"run {run_id} has no {REPLAY}: {why}")
    return recorded.gathered(read, f"run {run_id}")


def _of_many(run: runs.Found) -> str:
    """Why a run that is no network's cannot be verified."""
    below = _below(run)
    networks = [one.id for one in below if one.tags.get("initflow.outcome")]
    if networks:
        more = ", …" if len(networks) > NAMED else ""
        return (
            f"run {run.id} is of {len(networks)} networks, each of which is verified by itself: "
            f"initflow verify {networks[0]} (the others: {', '.join(networks[1:NAMED])}{more})"
        )
    if any("initflow.initial_weights_sha256" in one.tags for one in below):
        return f"run {run.id} is a diagnosis, in which nothing was trained"
    return f"run {run.id} is of no network that initflow trained"


def _below(run: runs.Found) -> list[runs.Found]:
    """The runs below it and, where those are of many too, below them."""
    found: list[runs.Found] = []
    above = [run.id]
    for _ in range(DEPTH):
        level = [one for parent in above for one in runs.Run(parent, run.experiment_id).below()]
        found += level
        above = [one.id for one in level if "initflow.initial_weights_sha256" not in one.tags]
    return found


def _uncommitted(run_id: str) -> bytes | None:
    """What was not committed, which the run above all others of its command has."""
    top: str | None = run_id
    for _ in range(DEPTH + 1):
        run = runs.read_run(top) if top else None
        if not run:
            return None
        diff = runs.read_artifact(run.id, UNCOMMITTED, LARGEST_DIFF)
        if diff is not None:
            return diff
        top = run.tags.get(runs.PARENT)
    return None


def _log(result: Verification, what: str, config: VerifyConfig, device: str) -> None:
    """Into the run that ``mlflow run`` has made."""
    found = result.replay
    resolved = machine.Resolved(device, found.provenance.threads)
    with runs.start(
        name=f"verify {what}",
        description=" ".join(result.conclusions),
        params={"run_id": what} | config.as_text() | resolved.as_text(),
        tags={"initflow.version": initflow.__version__},
    ) as run:
        run.set_tags({"initflow.verified": what, "initflow.replay": found.verdict})
        run.log_json("verification", {"verified": what, **found.as_json()})

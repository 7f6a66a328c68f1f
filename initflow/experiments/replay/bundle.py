"""A network's evidence as a folder that needs nothing else: whole or absent, and checked when read.

Its files have fixed names, so that nothing in them is ever taken for a path.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from initflow.core.configurations import DATASET_NAMES
from initflow.core.machine import Resolved
from initflow.errors import ReplayError, SettingError, first_line
from initflow.experiments.replay import recorded
from initflow.experiments.replay.provenance import (
    REPLAY,
    TRACE,
    UNCOMMITTED,
    WEIGHTS,
    Evidence,
    Provenance,
)
from initflow.initializers.scheme import FUNCTION
from initflow.reporting import drawing, figures, webpage
from initflow.training import datasets, modules

MANIFEST = "manifest.json"
REPORT, README = "report.html", "README.md"
FILES = (REPLAY, TRACE, WEIGHTS, UNCOMMITTED, REPORT, README)
FORMAT = 1
LARGEST = 2**26  # bytes of a file that is only read to be hashed
LARGEST_MANIFEST = 2**16

History = Mapping[str, Sequence[tuple[int, float]]]


def check_free(folder: Path) -> None:
    """Raise :class:`SettingError` where a bundle cannot be written: something is there already."""
    try:
        taken = folder.is_symlink() or (
            folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
        )
    except OSError as error:
        raise _unwritable(folder, error) from error
    if taken:
        raise SettingError(f"to must be a folder that is empty or not there, not '{folder}'")


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make ``folder`` hold ``files`` and their manifest, all of them or none.

    Their names are of :data:`FILES`. Raises :class:`SettingError` where something is there
    already, or where it cannot be written.
    """
    check_free(folder)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    manifest = json.dumps({"format": FORMAT, "files": digests}, indent=2).encode()
    arriving = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        arriving.mkdir()
        try:
            for name, content in {**files, MANIFEST: manifest}.items():
                with (arriving / name).open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            _flush(arriving)
            if os.name == "nt" and folder.is_dir():  # where no folder may replace another
                folder.rmdir()
            arriving.replace(folder)
        except BaseException:
            shutil.rmtree(arriving, ignore_errors=True)
            raise
        _flush(folder.parent)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _flush(folder: Path) -> None:
    """What a folder holds is on the disk; some systems open no folder."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _unwritable(folder: Path, error: OSError) -> SettingError:
    return SettingError(f"folder '{folder}' cannot be written: {error.strerror or error}")


def opened(folder: Path) -> Evidence:
    """The evidence in ``folder``, whose every file must be what the manifest says.

    Raises :class:`ReplayError` where one is missing, was changed, is none of a bundle's, or
    does not go with the others.
    """
    where = f"'{folder}'"
    digests = _manifest(folder)

    def read(name: str, limit: int) -> bytes | None:
        content = _content(folder, name, limit)
        stated = digests.get(name)
        if content is None:
            if stated:
                raise ReplayError(f"{where}: {name} is missing, though {MANIFEST} lists it")
            return None
        if not stated:
            raise ReplayError(f"{where}: {name} is not in {MANIFEST}")
        found = hashlib.sha256(content).hexdigest()
        if found != stated:
            raise ReplayError(
                f"{where}: {name} was changed: it has the SHA-256 {found[:12]}…, and {MANIFEST} "
                f"states {stated[:12]}…"
            )
        return content

    evidence = recorded.gathered(read, where)
    for name in (UNCOMMITTED, REPORT, README):
        read(name, LARGEST)
    return evidence


def _manifest(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file, by name."""
    if not folder.is_dir():
        raise ReplayError(f"there is no folder '{folder}'")
    content = _content(folder, MANIFEST, LARGEST_MANIFEST)
    if content is None:
        raise ReplayError(f"'{folder}' was not written by initflow export: it has no {MANIFEST}")
    try:
        values = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ReplayError(f"'{folder}': {MANIFEST} is no JSON: {first_line(error)}") from error
    digests = values.get("files") if isinstance(values, dict) else None
    if not isinstance(digests, dict) or values.get("format") != FORMAT:
        raise ReplayError(f"'{folder}': {MANIFEST} must have format {FORMAT} and list its files")
    for name, digest in digests.items():
        if name not in FILES or not isinstance(digest, str):
            raise ReplayError(f"'{folder}': {MANIFEST} lists '{name[:100]}', no file of its")
        if not recorded.SHA256.fullmatch(digest):
            raise ReplayError(f"'{folder}': {MANIFEST} has no SHA-256 of {name}")
    return digests


def _content(folder: Path, name: str, limit: int) -> bytes | None:
    """Of a plain file of at most ``limit`` bytes; None where there is none of this name."""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    path = folder / name
    try:
        if path.is_symlink():
            raise ReplayError(f"'{folder}': {name} is a link, and nothing is read through one")
        if path.is_dir():
            raise ReplayError(f"'{folder}': {name} is no plain file")
        file = os.open(path, os.O_RDONLY | flags)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ReplayError(f"'{folder}': {name} cannot be read: {error.strerror}") from error
    with os.fdopen(file, "rb") as stream:
        its = os.fstat(stream.fileno())
        if not stat.S_ISREG(its.st_mode):
            raise ReplayError(f"'{folder}': {name} is no plain file")
        content = stream.read(limit + 1) if its.st_size <= limit else b""
        if its.st_size > limit or len(content) > limit:
            raise ReplayError(f"'{folder}': {name} is larger than the {limit:,} bytes it may have")
    return content


def verifying(past: Provenance, folder: str) -> str:
    """The command that verifies ``folder``; who runs a function or reads a file must name it."""
    config = past.config
    places = ["--init", config.init] if FUNCTION.fullmatch(config.init) else []
    if config.dataset not in DATASET_NAMES:
        places += ["--dataset", config.dataset]
    if ":" in config.model:
        places += ["--model", config.model]
    return shlex.join(["initflow", "verify", folder, *places])


def commands(past: Provenance) -> dict[str, str]:
    """What to type, by what it does: verify the folder it is typed in, and train the network."""
    config = replace(
        past.config,
        plugins_dir=None,
        data_dir=None,
        device=past.device,
        threads=past.threads,
    )
    return {
        "Train it again and compare, bit for bit": verifying(past, "."),
        "Train it": config.command("train", ("init",)),
        "Train it as an MLflow Project, in a checkout of initflow": config.command(
            "train", ("init",), (".", "--env-manager", "local")
        ),
    }


def pages(evidence: Evidence, history: History, run_id: str) -> dict[str, bytes]:
    """The report and the README of a bundle; ``history`` has the metrics of its run."""
    past = evidence.provenance
    activation = [past.config.activation] if past.config.has("activation") else []
    on = datasets.title(past.config.dataset)
    title = ", ".join([past.spec, *activation, past.title, on])
    lead = _lead(past, history)
    curve = drawing.png(figures.learning_curves(history, evidence.losses.tolist(), title))
    told = commands(past)
    report = webpage.page(
        title=title,
        lead=lead,
        sections=[
            webpage.Section(
                "Make it again",
                [
                    block
                    for what, command in told.items()
                    for block in (webpage.Text(f"{what}:"), webpage.Command(command))
                ],
            ),
            webpage.Section(
                "Course",
                [webpage.Picture(curve, "Accuracy and loss over the iterations of the training.")],
            ),
            webpage.Section("Hashes", [webpage.settings_table("SHA-256", _hashes(past))]),
            webpage.Section(
                "Configuration", [webpage.settings_table("What was set", _settings(past, run_id))]
            ),
            *_environment(past.environment),
        ],
    )
    return {REPORT: report.encode(), README: _readme(title, lead, told).encode()}


def _lead(past: Provenance, history: History) -> list[str]:
    are = "images" if past.config.dataset in DATASET_NAMES else "examples"
    what = (
        f"{modules.in_words(past.config, past.title)}, initialized by {past.spec}, trained on "
        f"{past.images:,} {are} of {datasets.title(past.config.dataset)}: {past.outcome} after "
        f"{past.updates:,} "
        "iterations."
    )
    accuracies = [
        f"{name.capitalize()} accuracy in the end: {points[-1][1]:.2%}."
        for name in ("test", "validation")
        if (points := history.get(f"accuracy/{name}"))
    ]
    why = (
        "All that its numbers follow from is beside this page: whoever has initflow can train it "
        "again and see whether they come out the same, to the bit."
    )
    return [what, *accuracies, why]


def _settings(past: Provenance, run_id: str) -> dict[str, str]:
    resolved = Resolved(past.device, past.threads)
    return past.config.as_text() | resolved.as_text() | {"provider": past.provider, "run": run_id}


def _hashes(past: Provenance) -> dict[str, str]:
    return {
        "initial weights": past.initial,
        "losses": past.losses,
        "final weights": past.final,
        "images and labels": past.digest,
        "source of the scheme": past.source,
        **({"source of the model": past.model.source} if past.model else {}),
    }


def _environment(told: Mapping[str, object]) -> Iterator[webpage.Section]:
    parts = {
        "facts": ("Environment", "What the numbers depend on"),
        "variables": ("Variables", "Environment variables that choose kernels"),
        "packages": ("Packages", "What was installed"),
    }
    for name, (heading, caption) in parts.items():
        values = told.get(name)
        if isinstance(values, dict) and values:
            texts = {str(key): str(value) for key, value in values.items()}
            table = webpage.settings_table(caption, texts)
            yield webpage.Section(heading, [table], folded=True)


def _readme(title: str, lead: Sequence[str], told: Mapping[str, str]) -> str:
    """Markdown, in which whatever a name brings along stands in a block of code."""
    lines = {what: " ".join(command.split()) for what, command in told.items()}
    typed = "\n\n".join(f"{what}:\n\n    {command}" for what, command in lines.items())
    return (
        f"# A network that can be had again\n\n    {' '.join(title.split())}\n\n"
        + "".join(f"    {' '.join(line.split())}\n" for line in lead)
        + f"\nTyped in this folder, with initflow installed:\n\n{typed}\n\n"
        f"- `{REPLAY}`: all that its numbers follow from, and their hashes\n"
        f"- `{TRACE}`: the loss of every iteration\n"
        f"- `{WEIGHTS}`: the weights before and after training, if they were kept\n"
        f"- `{UNCOMMITTED}`: what was not committed of the code around it, if anything\n"
        f"- `{REPORT}`: the same for reading\n"
        f"- `{MANIFEST}`: the SHA-256 of each file\n"
    )

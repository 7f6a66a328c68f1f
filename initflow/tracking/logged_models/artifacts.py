"""Files into the place where MLflow keeps those of a run or of a model, and out of it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.request_utils import augmented_raise_for_status
from mlflow.utils.rest_utils import http_request

FILES = "file://"
PROXIED = "mlflow-artifacts:"  # a place that the tracking server itself gives and takes files of
NOT_FOUND = 404
Upload = Callable[[str], None]


def folder_of(place: str) -> Path | None:
    """The folder that the address ``place`` of artifacts is of; None where it is elsewhere."""
    is_here = place.startswith("/") or (place.startswith(FILES) and not urlsplit(place).netloc)
    return Path(unquote(place.removeprefix(FILES))) if is_here else None


def put(uri: str, place: str, files: Mapping[str, bytes], upload: Upload) -> None:
    """Write ``files``, by their paths within, to the address ``place`` of the store at ``uri``.

    In a folder each is whole or absent, whenever we are killed, and all of them are there at once
    where it is a new one. Elsewhere the server takes them, or ``upload`` does, which is called with
    a folder that has them.
    """
    if not files:
        return
    folder = folder_of(place)
    if folder:
        _put_here(folder, files)
        return
    with tempfile.TemporaryDirectory() as scratch:
        _write(Path(scratch), files)
        if place.startswith(PROXIED):  # without asking for the address, which is known
            _server(place, uri).log_artifacts(scratch)
        else:
            upload(scratch)


def can_get(place: str) -> bool:
    """Whether :func:`get` knows the way to files at the address ``place``."""
    return folder_of(place) is not None or place.startswith(PROXIED)


def get(uri: str, place: str, name: str, limit: int) -> bytes | None:
    """The file ``name`` at the address ``place`` of the store at ``uri``; None if it is not there.

    No more than one byte beyond the ``limit`` is read. It takes one request to the server, or none.
    """
    folder = folder_of(place)
    if folder:
        try:
            with (folder / name).open("rb") as file:
                return file.read(limit + 1)
        except FileNotFoundError:
            return None
    server = _server(place, uri)._host_creds  # noqa: SLF001 - which has no method without a listing
    with http_request(server, f"/{name}", "GET", stream=True) as answer:  # type: ignore[no-untyped-call]
        if answer.status_code == NOT_FOUND:
            return None
        augmented_raise_for_status(answer)  # type: ignore[no-untyped-call]
        content = bytearray()
        for part in answer.iter_content(1 << 20):
            content += part
            if len(content) > limit:
                break
        return bytes(content[: limit + 1])


def _server(place: str, uri: str) -> Any:
    """What gives and takes the files at ``place``."""
    try:
        return get_artifact_repository(place, tracking_uri=uri)
    except TypeError:  # older versions of MLflow go by the process's tracking server, which it is
        return get_artifact_repository(place)


def _put_here(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(folder.parent) as scratch:
        _write(scratch, files)
        if not folder.exists():
            with contextlib.suppress(OSError):  # of one that was made meanwhile
                scratch.replace(folder)
                return
        for name in files:
            there = folder / name
            there.parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).replace(there)


@contextlib.contextmanager
def _scratch(beside: Path) -> Iterator[Path]:
    """A folder that may be moved away: as any that is made, not for its owner's eyes alone."""
    scratch = beside / f".writing-{uuid.uuid4().hex}"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        written = folder / name
        if written.parent != folder:
            written.parent.mkdir(parents=True, exist_ok=True)
        written.write_bytes(content)

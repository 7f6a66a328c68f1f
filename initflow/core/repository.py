"""The git repository around the working folder: its commit, and what is not committed."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import threading
from typing import NamedTuple

from initflow.core.paths import working_folder
from initflow.core.secrets import without_secrets

UNKNOWN = "unknown"
DIFF_LIMIT = 1_000_000  # bytes of an uncommitted diff that are kept
GIT_PATIENCE_S = 10.0
# As no configuration changes it, and no program of others makes it.
PLAIN = (
    *("--no-ext-diff", "--no-textconv", "--no-color", "--full-index", "--submodule=short"),
    *("--src-prefix=a/", "--dst-prefix=b/"),
)


class Repository(NamedTuple):
    """``tree`` is clean, or dirty with the SHA-256 of ``diff``, which ``git diff HEAD`` gives."""

    commit: str
    tree: str
    diff: str


def current() -> Repository:
    """As it was at the first call; ``none``, and no diff, where the working folder is in none.

    Of the diff, credentials in addresses are left out, and what is beyond :data:`DIFF_LIMIT`, which
    a last line says. Files that git does not track are not in it.
    """
    return _of(str(working_folder() or os.devnull))


@functools.cache
def _of(folder: str) -> Repository:
    """Read once, as the code that is running was loaded then."""
    head = _git(folder, "rev-parse", "--verify", "HEAD")
    if head is None:
        return Repository("none", "none", "")
    commit = head.first.decode().strip()
    diff = _git(folder, "diff", *PLAIN, "HEAD")
    if diff is None:
        return Repository(commit, UNKNOWN, "")
    if not diff.size:
        return Repository(commit, "clean", "")
    kept, note = diff.first, ""
    if diff.size > len(kept):
        kept = kept[: kept.rfind(b"\n") + 1]  # a whole line, or half an address would be kept
        note = f"… cut: {diff.size:,} bytes in all\n"
    text = kept.decode(errors="replace")
    return Repository(commit, f"dirty {diff.sha256}", without_secrets(text) + note)


class _Answer(NamedTuple):
    first: bytes  # at most DIFF_LIMIT
    size: int
    sha256: str


def _git(folder: str, *arguments: str) -> _Answer | None:
    """What git prints there; None where it fails or takes too long. It asks for no password."""
    command = ["git", "--no-pager", "-c", "core.fsmonitor=false", "-c", "diff.relative=false"]
    quiet = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1"}
    try:
        process = subprocess.Popen(  # noqa: S603 - our own arguments
            [*command, *arguments],
            cwd=folder,
            env=os.environ | quiet,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None
    first, size, digest = b"", 0, hashlib.sha256()
    with process:
        assert process.stdout
        patience = threading.Timer(GIT_PATIENCE_S, process.kill)
        patience.start()
        try:
            while block := process.stdout.read(1 << 16):
                digest.update(block)
                size += len(block)
                first += block[: DIFF_LIMIT - len(first)]
        finally:
            patience.cancel()
    return None if process.returncode else _Answer(first, size, digest.hexdigest())

"""What waits for MLflow on this machine; it is looked at, not sent."""

from __future__ import annotations

from initflow.checkup.finding import Finding
from initflow.errors import OutboxError
from initflow.tracking import outbox


def look() -> Finding:
    """What each outbox still holds, as ``initflow sync --json`` has it."""
    there, problems = [], []
    for path in outbox.paths():
        try:
            left = outbox.left(path)
        except OutboxError as error:
            problems.append(f"{error}: remove the file to forget it")
        else:
            if left:
                there.append(left.as_json())
    return Finding({"folder": str(outbox.folder()), "left": there}, problems)

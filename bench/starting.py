"""How soon a command trains: ``python -m bench.starting train`` (``compare``, ``tune``) and a time.

Prints as JSON the seconds from that time, when the process was started, to the first update, and
those of its CPU: one network of one scheme with one thread. It runs in a folder of its own.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import initflow

SETTINGS: dict[str, dict[str, Any]] = {
    "train": {"init": "he"},
    "compare": {"inits": "he", "activations": "relu", "seeds": 1, "workers": 1},
    "tune": {"inits": "he", "trials": 1, "seeds": 1, "workers": 1},
}


class _TrainsError(Exception):
    """It trains: this was all that is to be timed."""


def main() -> None:
    command, started = sys.argv[1], float(sys.argv[2])

    def progress(what: str, _done: int, _of: int) -> None:
        if what.startswith("training"):
            used = resource.getrusage(resource.RUSAGE_SELF)
            seconds = {"seconds": time.time() - started, "cpu": used.ru_utime + used.ru_stime}
            print(json.dumps(seconds), flush=True)
            raise _TrainsError

    try:
        getattr(initflow, command)(**SETTINGS[command], threads=1, progress=progress)
    except _TrainsError:
        return
    sys.exit(f"{command} did not train")


if __name__ == "__main__":
    main()

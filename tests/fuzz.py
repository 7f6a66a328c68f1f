"""Fuzzing by what is covered in our code: ``python -m tests.fuzz TARGET [-max_total_time=60 …]``.

The targets are those of ``tests/targets.py``; ``make fuzz`` runs all. Options are libFuzzer's.
"""

import functools
import sys
import tempfile
from pathlib import Path

import atheris


def main(name, *options):
    with atheris.instrument_imports(include=["initflow"]):
        from tests import targets
    target, seeds = targets.TARGETS[name]
    with tempfile.TemporaryDirectory(prefix="seeds-") as corpus:
        for n, seed in enumerate(seeds()):
            Path(corpus, str(n)).write_bytes(seed)
        own = [sys.argv[0], corpus, "-max_len=4096", "-rss_limit_mb=4096", "-timeout=20"]
        atheris.Setup([*own, *options], functools.partial(targets.once, target))
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])

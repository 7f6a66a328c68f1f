"""Data and schemes, which many networks have in common: loaded once while their work lasts."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from initflow.core.configurations import TrainConfig
from initflow.core.workers import WorkerPool
from initflow.errors import SettingError
from initflow.initializers import plugins
from initflow.initializers.finder import NOTEBOOK
from initflow.initializers.scheme import Scheme
from initflow.models import places
from initflow.training import datasets, modules
from initflow.training.splits import Splits

OF_DATA = ("dataset", "data_dir", "normalize", "validation", "seed")  # what images depend on


@contextlib.contextmanager
def cleared_after() -> Iterator[None]:
    """Let go of everything at the end: files may have changed when it is needed again."""
    try:
        yield
    finally:
        _splits.cache_clear()
        scheme.cache_clear()


def splits(config: TrainConfig) -> Splits:
    """The data set of ``config``, as ``datasets.load`` gives it. The last one is kept."""
    settings = {name: getattr(config, name) for name in OF_DATA}
    if not config.validation:
        del settings["seed"]
    return _splits(TrainConfig(**settings))


@functools.lru_cache(maxsize=1)
def _splits(config: TrainConfig) -> Splits:
    return datasets.load(config)


def title(config: TrainConfig) -> str:
    """Of its network: on a published set as that is published, on data of one's own as it is."""
    return modules.title(config, *datasets.size(config, splits))


def distinct(inits: Iterable[str], plugins_dir: Path | None) -> dict[str, Scheme]:
    """The scheme of each of ``inits``; that two are the same is a :class:`SettingError`."""
    schemes = {init: scheme(init, plugins_dir) for init in inits}
    same = {(scheme.name, *sorted(scheme.values.items())) for scheme in schemes.values()}
    if len(same) < len(schemes):
        raise SettingError(f"inits must be schemes that differ, not '{','.join(schemes)}'")
    return schemes


def check_elsewhere(schemes: Iterable[Scheme], pool: WorkerPool, model: str) -> None:
    """Raise :class:`SettingError` where workers elsewhere cannot find what is defined here.

    A process of this machine reads the script that it is started from again; a notebook has none.
    """
    is_script = hasattr(sys.modules[NOTEBOOK], "__file__")
    if pool.is_here or (is_script and pool.is_local):
        return
    found = [f"init '{one.spec}'" for one in schemes if one.provider == NOTEBOOK]
    found += [f"model '{model}'"] if model.startswith(f"{NOTEBOOK}:") else []
    if found:
        raise SettingError(
            f"{found[0]} is defined where its workers cannot find it: put it into a file and name "
            "it file.py:function, or use workers=1"
        )


def check_data_elsewhere(dataset: str, pool: WorkerPool) -> None:
    """The same for the function that gives a data set."""
    is_script = hasattr(sys.modules[NOTEBOOK], "__file__")
    is_found = pool.is_here or (is_script and pool.is_local)
    if dataset.startswith(f"{NOTEBOOK}:") and not is_found:
        raise SettingError(
            f"dataset '{dataset}' is defined where its workers cannot find it: put it into a file "
            "and name it file.py:function, or use workers=1"
        )


@functools.cache
def scheme(init: str, plugins_dir: Path | None) -> Scheme:
    """The scheme of ``init``: see :func:`initflow.initializers.plugins.find`.

    Or ``auto`` and ``default``, as :func:`initflow.initialize` and a model's own function have it.
    """
    return places.OF_A_MODEL.get(init.strip()) or plugins.find(init, plugins_dir)

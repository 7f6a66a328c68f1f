"""What tests share: a clean environment, small data on disk, real MNIST, a store of their own."""

import contextlib
import functools
import gc
import gzip
import io
import logging.config
import os
import struct
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from matplotlib.figure import Figure
from packaging.requirements import Requirement

from tests import warm

ROOT = Path(__file__).parent.parent
SAVE = Figure.savefig

# How long an example takes says more of the machine than of it; fixtures are the same for all.
settings.register_profile(
    "ours",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("ours")


def pytest_configure(config):
    """Where there is a GPU, too, device=auto is the CPU, whose bits are known, but for -m gpu."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before PyTorch looks


@pytest.fixture(autouse=True, scope="session")
def _clean_environment(tmp_path_factory):
    """No setting of the machine reaches a test, nothing it leaves; MLflow tells nobody of it."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "INITFLOW_CONTEXT", "INITFLOW_DATA", "INITFLOW_PLUGINS")):
            del os.environ[name]
    os.environ["INITFLOW_OUTBOX"] = str(tmp_path_factory.mktemp("outbox"))
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"


@pytest.fixture(autouse=True, scope="session")
def _initflow_is_not_installed():
    """In the environment that MLflow builds, it is no distribution: whoever asks fails."""
    ask = metadata.Distribution.from_name.__func__

    def from_name(kind, name):
        if name == "initflow":
            raise metadata.PackageNotFoundError(name)
        return ask(kind, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata.Distribution, "from_name", classmethod(from_name))
        yield


def _of_pytest():
    """What hears the log for pytest, as caplog and in its report."""
    return [one for one in logging.root.handlers if type(one).__module__.startswith("_pytest.")]


@pytest.fixture(autouse=True, scope="session")
def _pytest_hears_the_log():
    """Older versions of MLflow take all that hears the log away when they open a database."""
    configure = logging.config.fileConfig

    def configure_beside(*args, **kwargs):
        before = _of_pytest()
        configure(*args, **kwargs)
        logging.root.handlers += before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("logging.config.fileConfig", configure_beside)
        yield


@pytest.fixture(autouse=True, scope="session")
def _workers_start_warm():
    """Those of tests/core/test_workers.py start as a user's do."""
    with warm.start_workers():
        yield


@pytest.fixture(autouse=True, scope="session")
def _figures_are_drawn_lightly():
    """Small and not laid out, which takes most of the time, where a test looks at what is around.

    Commands draw them as they are, and so do the tests that ask for :func:`whole_figures`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", _save_lightly)
        yield


def _save_lightly(figure, *args, **options):
    figure.set_layout_engine("none")
    return SAVE(figure, *args, **options | {"dpi": 30})


@pytest.fixture(scope="module")
def whole_figures():
    """They are drawn as users see them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", SAVE)
        yield


@pytest.fixture
def nothing_shipped(monkeypatch):
    """The package comes without plugins."""
    monkeypatch.setattr("initflow.core.paths.SHIPPED_PLUGINS", ())


@pytest.fixture
def installed(monkeypatch):
    """The versions that are installed, to change: those that are pinned, and no other package."""
    from initflow.experiments.replay import promise

    fake = {one.name: promise.version(one) for one in promise.pins()}

    def distribution(name):
        if not fake.get(name):
            raise metadata.PackageNotFoundError(name)
        return SimpleNamespace(version=fake[name])

    monkeypatch.setattr(promise.metadata, "distribution", distribution)
    return fake


# A published table of a single network, which is trained in no time.
SMALL_TABLE = """
title = "A small table"
source = "Made up."
notes = []
[settings]
dataset = "digits"
hidden = "8"
epochs = 1
[[rows]]
name = "He"
init = "he"
activation = "relu"
published = { 10 = 85.0 }
"""


@pytest.fixture(autouse=True)
def _log_as_before():
    """The command line quietens our log for its process, which here has more to do.

    MLflow, in older versions, leaves what writes the log to a stream that the test alone has.
    """
    logger = logging.getLogger("initflow")
    level = logger.level
    yield
    logger.setLevel(level)
    logging.root.handlers[:] = _of_pytest()


@pytest.fixture(autouse=True)
def _forget_plugins(tmp_path_factory):
    """What a test imported from a folder of plugins, and where from, is gone in the next."""
    path, before = list(sys.path), set(sys.modules)
    yield
    importing = sys.modules.get("initflow.core.importing")
    for source in list(importing._used_in_place) if importing else ():
        importing._forget(source)
    sys.path[:] = path
    folder = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(f"{folder}{os.sep}"):
            del sys.modules[name]


def _find_mnist():
    for folder in (os.environ.get("INITFLOW_DATA_DIR"), ROOT.parent / "shared" / "mnist"):
        if folder and (Path(folder) / "MNIST" / "raw").is_dir():
            return Path(folder).resolve()
    return None


MNIST = _find_mnist()


def pytest_collection_modifyitems(items):
    """Without MNIST, a GPU or the package that a test needs, it is skipped, and says so."""
    for item in items:
        if MNIST is None and item.get_closest_marker("mnist"):
            item.add_marker(pytest.mark.skip(reason="MNIST is not in INITFLOW_DATA_DIR"))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="-m gpu finds no CUDA device"))
        for mark in item.iter_markers("needs"):
            if lacking := [one for one in mark.args if not _is_installed(Requirement(one))]:
                item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(lacking)}"))


@functools.cache
def _is_installed(requirement):
    try:
        return metadata.version(requirement.name) in requirement.specifier
    except metadata.PackageNotFoundError:
        return False


def pytest_collection_finish():
    """What is imported by now stays: no collection of garbage looks through all of it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _what_a_module_leaves_stays():
    """As what is imported does: full collections take a tenth of the suite's time otherwise."""
    yield
    gc.collect()
    gc.freeze()


def _has_gpu():
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def mnist():
    """The folder that holds the real MNIST."""
    return MNIST


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A user's cache folder that is empty."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@functools.cache
def _tables():
    """An MLflow store that has nothing but its tables, which take a second to make."""
    import sqlalchemy
    from mlflow.store.db.utils import _initialize_tables

    # MLflow tells of it, which is not what a test asks about.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        engine = sqlalchemy.create_engine(f"sqlite:///{folder}/mlflow.db")
        _initialize_tables(engine)
        engine.dispose()
        return Path(folder, "mlflow.db").read_bytes()


def new_store(folder):
    """Make an MLflow store in ``folder`` that has nothing but its tables."""
    (folder / "mlflow.db").write_bytes(_tables())


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty working folder whose MLflow store is a new SQLite file."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    new_store(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    yield uri
    mlflow.set_tracking_uri(before)


@pytest.fixture
def checked_once(monkeypatch):
    """An initializer's contract, which takes seconds to check, is checked once in a test."""
    from initflow import testing

    check = testing.check
    monkeypatch.setattr(testing, "check", functools.cache(lambda *asked: list(check(*asked))))


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A working folder whose store a module's tests share, each with experiments of its own."""
    import mlflow

    from initflow.core import machine

    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch, machine.threads(1):
        patch.chdir(folder)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        yield folder
        mlflow.set_tracking_uri(None)


def models_of(run):
    """The ids of the models that were logged for it: older versions find runs without them."""
    import mlflow

    outputs = mlflow.get_run(run.info.run_id).outputs
    return [one.model_id for one in outputs.model_outputs] if outputs else []


def python(program, cwd=ROOT, **environment):
    """What ``program`` prints in a new Python."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def idx(array):
    """``array`` of uint8 as the bytes of an IDX file."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def small_mnist(train=200, test=50, side=28):
    """The four files of an MNIST of random images, by name."""
    random = np.random.default_rng(0)

    def part(n):
        return random.integers(0, 256, (n, side, side)), np.arange(n) % 10

    (train_images, train_labels), (test_images, test_labels) = part(train), part(test)
    return {
        "train-images-idx3-ubyte": idx(train_images),
        "train-labels-idx1-ubyte": idx(train_labels),
        "t10k-images-idx3-ubyte": idx(test_images),
        "t10k-labels-idx1-ubyte": idx(test_labels),
    }


def write_raw(folder, files, *, packed=False):
    """Write ``files`` as torchvision keeps them, and return their folder."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        if packed:
            (raw / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        else:
            (raw / name).write_bytes(content)
    return raw

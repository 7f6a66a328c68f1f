"""What must end in a value or in one of our errors, whatever bytes it is given.

``tests/test_hostile.py`` has hypothesis make the bytes, ``tests/fuzz.py`` atheris. A target raises
what is a bug.
"""

import atexit
import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import sys
import tempfile
from pathlib import Path

import cmaes
import numpy as np

from initflow.core.configurations import TrainConfig, TuneConfig
from initflow.core.secrets import without_credentials
from initflow.errors import InitflowError
from initflow.experiments.replay import bundle, provenance
from initflow.experiments.tuning import sampler_state, searches, storages, studies
from initflow.initializers import finder, plugins, scheme
from initflow.training import datasets
from tests import replaying
from tests.conftest import small_mnist


@functools.cache
def folder():
    """An empty one, which nothing leaves."""
    made = tempfile.TemporaryDirectory(prefix="fuzz-")
    atexit.register(made.cleanup)
    os.environ["XDG_CACHE_HOME"] = str(Path(made.name, "cache"))
    return Path(made.name)


def text_of(content):
    return content.decode("utf-8", "replace")


def spec(content):
    """A scheme: taken apart, looked up and bound; nothing is imported but where one is told."""
    text = text_of(content)
    name, arguments = scheme.parse(text, finder.SCHEME_NAMES)
    assert all(key and value for key, value in arguments.items())
    if ":" not in name:  # a place is a module of the user's own
        found = plugins.find(text)
        assert plugins.find(found.spec) == found


SETTINGS = tuple(TuneConfig.__dataclass_fields__)


def setting(content):
    """Any setting, as text; one that is taken is given back by its own text."""
    name = SETTINGS[content[0] % len(SETTINGS)] if content else "lr"
    config = TuneConfig(**{name: text_of(content[1:])})
    if name != "storage":  # its password is left out
        again = TuneConfig(**{name: config.as_text()[name]})
        assert getattr(again, name) == getattr(config, name)


def toml(content):
    """The metadata of a folder in ``plugins``."""
    home = folder() / "plugins" / "one"
    home.mkdir(parents=True, exist_ok=True)
    (home / "pyproject.toml").write_bytes(content)
    _all_found(home.parent)


def metadata(content):
    """Those of an installed distribution: METADATA and, after a zero byte, its entry points."""
    info = folder() / "site" / "some-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    described, _, points = content.partition(b"\0")
    (info / "METADATA").write_bytes(described)
    (info / "entry_points.txt").write_bytes(points)
    sys.path.insert(0, str(info.parent))
    try:
        _all_found(folder())
    finally:
        sys.path.remove(str(info.parent))


def _all_found(place):
    before = set(sys.modules)
    for name, plugin in finder.found(place).items():
        assert plugin.name == name
        assert "\n" not in (plugin.problem or "")
        json.dumps(plugin.as_json())
        assert isinstance(plugin.provider + plugin.key + plugin.origin, str)
    assert not {name for name in set(sys.modules) - before if name.startswith("some")}


MNIST = small_mnist(train=12, test=11, side=3)
FILES = sorted(MNIST)


def mnist():
    """The folder of a small MNIST, whole, so that nothing is downloaded."""
    home = folder() / "data" / "MNIST"
    (home / "raw").mkdir(parents=True, exist_ok=True)
    for name, content in MNIST.items():
        (home / "raw" / name).write_bytes(content)
    for packed in (home / "raw").glob("*.gz"):
        packed.unlink()
    return home


def idx(content):
    """One of the files of a data set, which the first byte chooses."""
    file = FILES[(content[0] if content else 0) % len(FILES)]
    (mnist() / "raw" / file).write_bytes(content[1:])
    _load()


def packed(content):
    """The same, which is to be an archive, in place of the file."""
    file = FILES[(content[0] if content else 0) % len(FILES)]
    raw = mnist() / "raw"
    (raw / file).unlink()
    (raw / f"{file}.gz").write_bytes(content[1:])
    _load()


def npz(content):
    """A file of arrays of the user's own."""
    file = folder() / "own.npz"
    file.write_bytes(content)
    splits = datasets.load(TrainConfig(dataset=str(file)))
    assert splits.train.labels.max() < splits.classes


def _arrays(**others):
    buffer = io.BytesIO()
    labels = np.arange(4) % 2
    found = {"x_train": np.eye(4), "y_train": labels, "x_test": np.eye(4), "y_test": labels}
    np.savez(buffer, **found | others)
    return buffer.getvalue()


def _load():
    return datasets.load(TrainConfig(data_dir=folder() / "data", dataset="mnist"))


def new_optimizer():
    """One of the package cmaes, as Optuna makes it of two parameters."""
    return cmaes.CMA(
        mean=np.full(2, 0.5),
        sigma=1 / 6,
        bounds=np.array([[0.0, 1.0]] * 2),
        seed=0,
        n_max_resampling=20,
    )


def sampler(content):
    """What CMA-ES learned; what is no state of it is a ValueError, which studies translate."""
    new = new_optimizer().__getstate__()
    with contextlib.suppress(ValueError):
        state = sampler_state.learned(content, new)
        assert state.keys() == new.keys()


def journal(content):
    """The file of studies: the trials of one that can be read."""
    file = folder() / "some.journal"
    file.write_bytes(content)
    storages.forget()
    search = searches.Search(str(file), "one", (0.1, 1.0), (0.5, 1.0), "random", "median", 0, 10, 5)
    study = studies.Study(search, {"dataset": "digits"}, (0.5, 0.9))
    study.recover()
    assert len(study.ask(1)) == 1
    study.trials()


@functools.cache
def exported():
    """The files of a small network's bundle that are taken apart, by name."""
    kept = replaying.evidence(replaying.config())
    return provenance.files(kept)


def exported_folder(content):
    """A bundle, one of whose files is this after a byte that says which; all hashes are right."""
    files = dict(exported())
    name = sorted(files)[content[0] % len(files)] if content else provenance.REPLAY
    files[name] = content[1:]
    digests = {name: hashlib.sha256(its).hexdigest() for name, its in files.items()}
    files[bundle.MANIFEST] = json.dumps({"format": bundle.FORMAT, "files": digests}).encode()
    place = folder() / "bundle"
    place.mkdir(exist_ok=True)
    for its_name, its in files.items():
        (place / its_name).write_bytes(its)
    bundle.opened(place)


def secret(content):
    """Text without what stands before an @; done twice, it is the same."""
    shown = without_credentials(text_of(content))
    assert without_credentials(shown) == shown
    storages.shown(text_of(content))


def _learned():
    optimizer = new_optimizer()
    told = [(optimizer.ask(), float(n)) for n in range(optimizer.population_size)]
    optimizer.tell(told)
    return pickle.dumps(optimizer)


def _written():
    file = folder() / "some.journal"
    file.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        journal(b"")
    return file.read_bytes()


GROUP = finder.INITIALIZERS.name.encode()
# Each with bytes that it takes, from which others are made.
TARGETS = {
    "spec": (spec, lambda: [b"he:mode=fan_out", b"a/b.py:f:gain=2,x=true", b"normal:std=0.05"]),
    "setting": (
        setting,
        lambda: [b"\x00he,normal:std=1", b"\x0b100x20", b"\x09postgresql://u:p@h"],
    ),
    "toml": (
        toml,
        lambda: [
            b'[project]\nname = "x"\nversion = "1"\n[project.entry-points."%b"]\na = "b:c"' % GROUP,
            b"[project]\nname = 0x" + b"f" * 5_000,
            b'[project]\nname = "x"\nversion = 0x%b\n[project.entry-points."%b"]\na = "b:c"'
            % (b"f" * 5_000, GROUP),
        ],
    ),
    "metadata": (
        metadata,
        lambda: [b"Name: some\nVersion: 1.0\n\0[%b]\na = some:c\n[x]\ny = z:w" % GROUP],
    ),
    "idx": (
        idx,
        lambda: [bytes([n]) + MNIST[name] for n, name in enumerate(FILES)],
    ),
    "packed": (
        packed,
        lambda: [bytes([n]) + gzip.compress(MNIST[name]) for n, name in enumerate(FILES)],
    ),
    "npz": (npz, lambda: [_arrays(), _arrays(x_test=np.array([None]))]),
    "sampler": (sampler, lambda: [_learned()]),
    "journal": (journal, lambda: [_written()]),
    "bundle": (
        exported_folder,
        lambda: [bytes([n]) + exported()[name] for n, name in enumerate(sorted(exported()))],
    ),
    "secret": (secret, lambda: [b"at 'http://u:p@h/x?token=1' failed", b"sqlite:////a@b/c"]),
}


def once(target, content):
    """Give ``target`` some bytes; our errors are its good right."""
    with contextlib.suppress(InitflowError), contextlib.redirect_stderr(io.StringIO()):
        target(bytes(content))

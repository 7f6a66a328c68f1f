"""The files of a logged model: exported once for an architecture, then given other weights.

They are those that ``mlflow.pytorch.save_model`` writes; importing that takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pyfunc
import numpy as np
import torch
import yaml
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.models.utils import _save_example
from mlflow.types import Schema, TensorSpec
from mlflow.utils.environment import (
    _CONDA_ENV_FILE_NAME,
    _PYTHON_ENV_FILE_NAME,
    _REQUIREMENTS_FILE_NAME,
    _process_pip_requirements,
    _PythonEnv,
)
from mlflow.utils.file_utils import get_total_file_size
from packaging.version import Version
from torch import Tensor, nn

from initflow.core import paths
from initflow.initializers import activations
from initflow.models import architectures
from initflow.tracking.logged_models import served_model
from initflow.tracking.outbox import Entry
from initflow.training import model, modules
from initflow.training.splits import PIXELS, Scale

LOADER = "initflow_model"  # the module of a logged model by which MLflow loads it
CODE, DATA = "code", "data"  # its folders
ARCHIVE = f"{DATA}/model.pt2"
# What MLmodel says of one model alone.
OWN = ("artifact_path", "model_id", "model_uuid", "run_id", "utc_time_created")
# Records that torch writes by itself at the end of an archive.
CLOSING = (".data/version", "version", "byteorder", ".data/serialization_id")
CONFIG = "data/weights/model_weights_config.json"
LARGEST = 1 << 24  # bytes of an archive without weights
# What mlflow.pytorch.load_model takes for the name of a module where it knows pickled models alone,
# and says in its error, as there is none.
EXPORTED_FROM = Version("3.9")
NOT_PICKLED = (
    "none, because this model is exported, which mlflow.pytorch reads from MLflow 3.9 on. In older "
    "versions, mlflow.pyfunc.load_model(model_uri).get_raw_model() is the module"
)


@dataclass(frozen=True)
class Architecture:
    """What the files of a feed-forward network follow from, but for its weights.

    ``shapes`` are the names and shapes of its tensors, by name; it takes so many ``pixels``, and
    the rest is as of :func:`initflow.training.model.to_module`.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    activation: str
    mean: Scale
    std: Scale
    pixels: int

    @classmethod
    def of(cls, state: Mapping[str, Tensor], values: Mapping[str, Any]) -> Architecture:
        """That of a network with these tensors, as the ``values`` of its entry say."""
        mean, std = (
            tuple(scale) if isinstance(scale, list) else scale
            for scale in (values["mean"], values["std"])
        )
        shapes = sorted((name, tuple(tensor.shape)) for name, tensor in state.items())
        return cls(tuple(shapes), values["activation"], mean, std, values["pixels"])

    def module(self, state: Mapping[str, Tensor]) -> nn.Module:
        """One of it, with the numbers of ``state``."""
        activation = activations.ACTIVATIONS[self.activation]
        return model.to_module(state, activation, mean=self.mean, std=self.std)

    def zeros(self) -> dict[str, Tensor]:
        """Its tensors."""
        return {name: torch.zeros(shape) for name, shape in self.shapes}


@dataclass(frozen=True)
class Files:
    """Those of one model, by their paths, but for ``MLmodel``, of which there are the ``lines``."""

    lines: Mapping[str, str]
    others: Mapping[str, bytes]

    def of(self, place: str, model_id: str, run_id: str) -> dict[str, bytes]:
        """All of them, of the model with this id, whose files belong at ``place``."""
        its = Model(place, run_id=run_id, model_uuid=model_id, model_id=model_id).to_dict()
        lines = {**self.lines, **{key: _line(key, its[key]) for key in OWN}}
        text = "".join(lines[key] for key in sorted(lines))
        return {MLMODEL_FILE_NAME: text.encode(), **self.others}


def of(entry: Entry) -> Files:
    """The files of an entry's model: of the tensors of a feed-forward network, or of a program."""
    values = entry.values
    takes, pixels = values.get("takes", PIXELS), values["pixels"]
    if "activation" not in values:
        module = torch.export.load(io.BytesIO(entry.content)).module()
        return _with(module, takes, pixels, exported(module, pixels))
    from safetensors.torch import load  # noqa: PLC0415 - watching has no need of it

    state = load(entry.content)
    architecture = Architecture.of(state, values)
    hollow = _hollow(architecture)
    archive = filled(hollow, state) if hollow else exported(architecture.module(state), pixels)
    common = _common(architecture, takes)
    return Files(common.lines, {**common.others, ARCHIVE: archive})


def prepare(state: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Have the archive of such networks exported, so that it need not be waited for later."""
    _hollow(Architecture.of(state, values))


def exported(module: nn.Module, pixels: int) -> bytes:
    """``module`` as a pt2 archive, for batches of any size."""
    example = (torch.zeros(modules.TRIED, pixels),)  # a batch of 1 would fix the size at 1
    batch = {0: torch.export.Dim.AUTO}
    with modules.exporting(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(ARCHIVE).name)  # within it, all is below the file's name
        # Not strictly, as is PyTorch's default by now: the compiler gives up after some modules.
        program = torch.export.export(module, example, dynamic_shapes=(batch,), strict=False)
        torch.export.save(program, path)
        return path.read_bytes()


def filled(hollow: bytes, state: Mapping[str, Tensor]) -> bytes:
    """An archive with the tensors of ``state`` where the ``hollow`` one of its kind has none."""
    records = _records(hollow)
    for name, its in json.loads(records[CONFIG])["config"].items():
        tensor = state[name].detach().cpu().contiguous()
        records[f"data/weights/{its['path_name']}"] = tensor.numpy().tobytes()
    return _archive(records)


def hollowed(archive: bytes) -> bytes:
    """An archive of a network without the numbers of its weights."""
    records = _records(archive)
    for its in json.loads(records[CONFIG])["config"].values():
        records[f"data/weights/{its['path_name']}"] = b""
    return _archive(records)


def _records(archive: bytes) -> dict[str, bytes]:
    reader = torch._C.PyTorchFileReader(io.BytesIO(archive))  # noqa: SLF001 - as torch.export does
    return {
        name: reader.get_record(name) for name in reader.get_all_records() if name not in CLOSING
    }


def _archive(records: Mapping[str, bytes]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(ARCHIVE).name)
        writer = torch._C.PyTorchFileWriter(str(path))  # noqa: SLF001 - as torch.export does
        writer.set_min_version(6)
        for name, content in records.items():
            writer.write_record(name, content, len(content))
        writer.write_end_of_file()
        return path.read_bytes()


@functools.lru_cache(maxsize=64)
def _hollow(architecture: Architecture) -> bytes | None:
    """Its archive without weights, from the user's cache or made now.

    None where this version of PyTorch writes archives that no weights can be put into: what it has
    exported must be what comes of putting the same weights back.
    """
    place = _cached(architecture)
    found = _read(place)
    if found is None:
        state = {
            name: torch.arange(tensor.numel(), dtype=torch.float32).view(tensor.shape)
            for name, tensor in architecture.zeros().items()
        }
        archive = exported(architecture.module(state), architecture.pixels)
        try:
            found = hollowed(archive)
            if filled(found, state) != archive:
                return None
        except (KeyError, ValueError, RuntimeError):
            return None
        _write(place, found)
    return found


def cache() -> Path:
    """Where archives are kept between commands, in the user's cache folder."""
    return paths.of_user("cache") / "models"


def _cached(architecture: Architecture) -> Path:
    """Where its archive is kept between commands, by all that it follows from."""
    sources = [Path(str(one.__file__)) for one in (model, architectures, activations, torch)]
    code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]
    told = repr((architecture, torch.__version__, list(map(str, sources)), code))
    name = hashlib.sha256(told.encode()).hexdigest()
    return cache() / f"{name}.pt2"


def _read(path: Path) -> bytes | None:
    """What was written there, after its SHA-256; None where that is not so, whatever the reason."""
    try:
        if path.stat().st_size > LARGEST:
            return None
        content = path.read_bytes()
    except OSError:
        return None
    digest, archive = content[:32], content[32:]
    return archive if hashlib.sha256(archive).digest() == digest else None


def _write(path: Path, archive: bytes) -> None:
    """Keep it, if that is possible; whole or not at all."""
    arriving = path.with_name(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        arriving.write_bytes(hashlib.sha256(archive).digest() + archive)
        arriving.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            arriving.unlink()


@functools.lru_cache(maxsize=64)
def _common(architecture: Architecture, takes: str) -> Files:
    """What all models of it have, but for the archive."""
    state = architecture.zeros()
    hollow = _hollow(architecture)
    module = architecture.module(state)
    archive = filled(hollow, state) if hollow else exported(module, architecture.pixels)
    files = _with(module, takes, architecture.pixels, archive)
    return Files(files.lines, {n: c for n, c in files.others.items() if n != ARCHIVE})


def _with(module: nn.Module, takes: str, pixels: int, archive: bytes) -> Files:
    """The files of a ``module`` that was exported: (n, pixels) numbers in, (n, classes) logits out.

    The signature states no input, because MLflow would refuse all but one type of number, and each
    list; :mod:`initflow.tracking.logged_models.served_model` says what is taken. The requirements
    are stated, because guessing them takes MLflow 12 to 17 s.
    """
    example = np.zeros((modules.TRIED, pixels), dtype=np.float32)
    with torch.no_grad():
        classes = module(torch.from_numpy(example)).shape[1]
    saved = Model(
        metadata={
            "input": f"{takes}, as numbers of shape (n, {pixels})",
            served_model.PIXELS: pixels,
        },
        signature=ModelSignature(outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, classes))])),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _save_example(saved, example, name)
        (folder / CODE).mkdir()
        shutil.copyfile(served_model.__file__, folder / CODE / f"{LOADER}.py")
        (folder / DATA).mkdir()
        (folder / ARCHIVE).write_bytes(archive)
        if Version(mlflow.__version__) < EXPORTED_FROM:
            (folder / DATA / "pickle_module_info.txt").write_text(NOT_PICKLED)
        _add_flavors(saved)
        saved.model_size_bytes = get_total_file_size(name)
        _write_environment(folder)
        others = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    lines = {key: _line(key, value) for key, value in saved.to_dict().items()}
    return Files(lines, others)


def _add_flavors(saved: Model) -> None:
    saved.add_flavor("pytorch", model_data=DATA, pytorch_version=str(torch.__version__), code=CODE)
    mlflow.pyfunc.add_to_model(
        saved,
        loader_module=LOADER,
        data=DATA,
        pickle_module_name="mlflow.pytorch.pickle_module",
        code=CODE,
        conda_env=_CONDA_ENV_FILE_NAME,
        python_env=_PYTHON_ENV_FILE_NAME,
        model_config={"device": None},
    )


def _write_environment(folder: Path) -> None:
    # Without a local part (+cpu), which no package index holds.
    needed = [f"{lib.__name__}=={lib.__version__.partition('+')[0]}" for lib in (mlflow, torch)]
    with _unheard("mlflow.utils.environment"):  # that an environment which uv made has no pip
        conda, requirements, _ = _process_pip_requirements(None, needed)  # type: ignore[no-untyped-call]
    with (folder / _CONDA_ENV_FILE_NAME).open("w") as file:
        yaml.safe_dump(conda, stream=file, default_flow_style=False)
    (folder / _REQUIREMENTS_FILE_NAME).write_text("\n".join(requirements))
    _PythonEnv.current().to_yaml(os.fspath(folder / _PYTHON_ENV_FILE_NAME))  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _unheard(name: str) -> Iterator[None]:
    """Without what is logged under this name."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _line(key: str, value: Any) -> str:
    """What MLmodel says of ``key``, which comes in the order of the keys."""
    return str(yaml.safe_dump({key: value}, default_flow_style=False))

"""What a network's numbers follow from, and what they were: kept so that it can be trained again.

Three files hold it, which :mod:`initflow.experiments.replay.recorded` reads back.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from initflow.core import environment, machine
from initflow.core.configurations import TrainConfig
from initflow.core.machine import Resolved
from initflow.diagnostics.networks import Untrained
from initflow.diagnostics.record import Record
from initflow.initializers.finder import NOTEBOOK
from initflow.training import datasets, model, modules, trainer
from initflow.training.modules import ModuleNetwork
from initflow.training.splits import Splits

FORMAT = 1
REPLAY = "replay.json"
TRACE = "trace.safetensors"
WEIGHTS = "weights.safetensors"
UNCOMMITTED = "uncommitted.diff"  # beside them, of the run above all others of a command
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class ModelProvenance:
    """Of a network that is no feed-forward one: whose it is, and the ``shapes`` of its tensors.

    ``source`` is the SHA-256 of the code that builds it.
    """

    provider: str
    source: str
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Provenance:
    """``replay.json``: all that the numbers of one network follow from, and their hashes.

    ``config`` is as it was asked for, and ``device`` and ``threads`` what became of it; ``images``
    of ``pixels``, in this ``shape``, and of so many ``classes`` were trained on, of the data set
    with this ``digest``, and ``tested`` says whether it was evaluated on the test images.
    ``spec``, ``provider`` and ``source``, the SHA-256 of its code, are the scheme's. Of ``outcome``
    finished, diverged or pruned it trained for ``updates``. ``is_exact`` as in
    :class:`initflow.diagnostics.record.Record`. The hashes are
    those of the initial weights, the final ones and the losses; ``environment`` is as
    :func:`initflow.core.environment.current` gave it.
    """

    config: TrainConfig
    device: str
    threads: int
    digest: str
    pixels: int
    shape: tuple[int, ...]
    classes: int
    images: int
    tested: bool
    spec: str
    provider: str
    source: str
    outcome: str
    updates: int
    is_exact: bool
    initial: str
    final: str
    losses: str
    environment: Mapping[str, Any]
    model: ModelProvenance | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Of a feed-forward network."""
        return datasets.widths(self.pixels, self.config.hidden, self.classes)

    @property
    def title(self) -> str:
        """The network for people, such as ``784-100-10``."""
        return modules.title(self.config, self.pixels, self.classes)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor of the network, in the order in which they are hashed."""
        if self.model:
            return dict(self.model.shapes)
        shapes: dict[str, tuple[int, ...]] = {}
        names = model.layer_names(len(self.widths) - 1)
        for name, (fan_in, fan_out) in zip(names, pairwise(self.widths), strict=True):
            shapes[f"{name}.weight"] = (fan_out, fan_in)
            shapes[f"{name}.bias"] = (fan_out,)
        return shapes

    @property
    def whole(self) -> int:
        """Updates of the whole training, were it not cut short."""
        return trainer.iterations(self.config, self.images)

    def as_json(self) -> dict[str, Any]:
        """As :func:`read` reads it."""
        return {
            "format": FORMAT,
            "config": self.config.as_text(),
            "device": self.device,
            "threads": self.threads,
            "data": {
                "digest": self.digest,
                "pixels": self.pixels,
                "shape": list(self.shape),
                "classes": self.classes,
                "images": self.images,
                "tested": self.tested,
            },
            "scheme": {"spec": self.spec, "provider": self.provider, "source_sha256": self.source},
            "outcome": self.outcome,
            "updates": self.updates,
            "bit_identical_to_alone": self.is_exact,
            "sha256": {
                "initial_weights": self.initial,
                "final_weights": self.final,
                "losses": self.losses,
            },
            "environment": dict(self.environment),
            **({"model": self._model()} if self.model else {}),
        }

    def _model(self) -> dict[str, Any]:
        assert self.model is not None
        return {
            "provider": self.model.provider,
            "source_sha256": self.model.source,
            "shapes": {name: list(shape) for name, shape in self.model.shapes.items()},
        }


@dataclass(frozen=True)
class Evidence:
    """A network's provenance with its numbers: ``losses`` (updates,) float32, in nats.

    ``initial`` and ``final`` are its weights by name, None where they were not kept.
    """

    provenance: Provenance
    losses: Tensor
    initial: State | None = None
    final: State | None = None


def of(record: Record, splits: Splits, resolved: Resolved) -> Evidence:
    """That of a trained network."""
    with machine.tf32(resolved.device, allowed=record.config.tf32):  # as it trained
        computed_with = environment.current(resolved.device)
    initial, final = record.initial.state(), record.trained
    losses = torch.tensor(record.losses, dtype=torch.float32)
    provenance = Provenance(
        config=record.config,
        device=resolved.device,
        threads=resolved.threads,
        digest=splits.digest,
        pixels=splits.pixels,
        shape=splits.shape,
        classes=splits.classes,
        images=len(splits.train),
        tested=len(splits.test) > 0,
        spec=record.scheme.spec,
        provider=record.scheme.provider,
        source=source_sha256(record.scheme.signature),
        outcome=record.outcome,
        updates=record.step,
        is_exact=record.is_exact,
        initial=model.weights_sha256(initial),
        final=model.weights_sha256(final),
        losses=losses_sha256(record.losses),
        environment=computed_with.as_json(),
        model=of_model(record.initial),
    )
    kept = record.config.log_model
    return Evidence(provenance, losses, initial if kept else None, final if kept else None)


def of_model(initial: Untrained) -> ModelProvenance | None:
    if not isinstance(initial, ModuleNetwork):
        return None
    builder = initial.builder
    shapes = {name: tuple(tensor.shape) for name, tensor in initial.state().items()}
    return ModelProvenance(builder.provider, source_sha256(builder.function), shapes)


def files(evidence: Evidence) -> dict[str, bytes]:
    """What :func:`initflow.experiments.replay.recorded.gathered` reads, by name."""
    text = json.dumps(evidence.provenance.as_json(), indent=2, allow_nan=False)
    written = {REPLAY: text.encode(), TRACE: save({"losses": evidence.losses})}
    if evidence.initial is not None and evidence.final is not None:
        both = {"initial": evidence.initial, "final": evidence.final}
        tensors = {
            f"{when}.{name}": tensor.detach().cpu().clone()
            for when, state in both.items()
            for name, tensor in state.items()
        }
        written[WEIGHTS] = save(tensors)
    return written


def losses_sha256(losses: Sequence[float] | Tensor) -> str:
    """SHA-256 over the little-endian float32 bytes of a loss for every update."""
    numbers = torch.as_tensor(losses, dtype=torch.float32)
    return hashlib.sha256(numbers.numpy().astype("<f4", copy=False).tobytes()).hexdigest()


def source_sha256(function: Callable[..., object]) -> str:
    """SHA-256 of the file that a scheme's or a model's function stands in.

    Of a notebook's, of its text; ``unknown`` where Python does not know it.
    """
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    try:
        if function.__module__ == NOTEBOOK:
            content = inspect.getsource(function).encode()
        else:
            home = sys.modules.get(function.__module__)
            named = inspect.getsourcefile(function) or getattr(home, "__file__", None)
            content = Path(str(named)).read_bytes()
    except (OSError, TypeError, ValueError, AttributeError):
        return "unknown"
    return hashlib.sha256(content).hexdigest()

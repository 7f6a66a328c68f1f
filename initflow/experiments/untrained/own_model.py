"""Schemes side by side in any model but the feed-forward one, untrained."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import initflow
from initflow.core.configurations import ACTIVATION, MODEL_NAMES, DiagnoseConfig
from initflow.diagnostics import inspection, measure, model_reading
from initflow.diagnostics.model_reading import Draw
from initflow.errors import SettingError
from initflow.experiments.untrained.diagnosis import Network, Subject
from initflow.initializers.scheme import Scheme
from initflow.models import batches, building, initialization
from initflow.models.building import Built
from initflow.models.initialization import Options
from initflow.models.places import DEFAULT
from initflow.reporting.seed_statistics import Cell
from initflow.training import cache, datasets, model, modules
from initflow.training.splits import Split, Splits

IMAGES = 64  # of a data set, at most: each draw goes over all of them


@dataclass(frozen=True)
class _Data:
    """What a model is measured on, and in words; ``splits`` where it is a data set's."""

    batch: object
    words: str
    splits: Splits | None = None


def subject(config: DiagnoseConfig, device: str) -> Subject:
    """The model of ``config``, as it is and under each scheme, with each activation it may have."""
    loaded = functools.cache(lambda: datasets.load(config.network(config.inits[0], ACTIVATION)))
    of_activations = {a: _Model(config, a, loaded) for a in config.own_activations}
    first = next(iter(of_activations.values()))
    built = first.build(config.seed)
    kind, shape = type(built.model).__name__, first.title
    is_built_in = config.model in MODEL_NAMES
    models = {
        config.kind_with(activation) if is_built_in else kind: one
        for activation, one in of_activations.items()
    }
    data = _data(built, config, loaded)
    batch = batches.moved(data.batch, torch.device(device))
    names = [DEFAULT, *(init for init in config.inits if init != DEFAULT)]
    found = cache.distinct(names, config.plugins_dir)
    schemes = {scheme.spec: scheme for scheme in found.values()}
    remarks: list[str] = []

    def read(cell: Cell) -> Network:
        drawn = models[cell.activation].drawing(schemes[cell.init], batch, device)
        read_of = model_reading.read(
            drawn, batch, built.loss, seed=config.seed, draws=config.draws, scheme=cell.init
        )
        if read_of.gaps and read_of.gaps not in remarks:
            remarks.append(read_of.gaps)
        scheme, provider = schemes[cell.init], first.builder.provider
        tags = {
            "initflow.version": initflow.__version__,
            "initflow.scheme": cell.init,
            "initflow.provider": provider if scheme.name == DEFAULT else scheme.provider,
            "initflow.model": config.model,
            "initflow.model_provider": provider,
            "initflow.initial_weights_sha256": model.weights_sha256(
                modules.state_of(read_of.model)
            ),
        }
        return Network(read_of.reading, config.as_text() | {"inits": cell.init}, tags)

    # What fails, does so before a run is made.
    inspection.inspect(built.model.to(device), batch, built.loss)
    for one in models.values():
        for scheme in schemes.values():
            one.drawing(scheme, batch, device)(config.seed)
    cells = [Cell(name, of_model) for of_model in models for name in schemes]
    of_what = f"{shape} network" if is_built_in else f"{kind} of {config.model}"
    summary = (
        f"An untrained {of_what}, {', '.join(schemes)}, on {data.words}; seed "
        f"{config.seed} and {config.draws} further draws."
    )
    title = f"untrained {of_what} on {data.words}"
    return Subject(title, shape, data.words, summary, cells, read, data.splits, remarks)


class _Model:
    """The model of a diagnosis with one ``activation``, built anew as often as it is needed."""

    def __init__(
        self, config: DiagnoseConfig, activation: str, loaded: Callable[[], Splits]
    ) -> None:
        self.builder = building.builder(config, activation, config.widths)
        self.title = modules.title(config.network(config.inits[0], activation), 0, 0)
        self._config, self._loaded = config, loaded

    def build(self, seed: int) -> Built:
        if not self.builder.takes_example:
            return self.builder.build(seed)
        splits = self._loaded()
        return self.builder.build(seed, splits.shape, splits.classes)

    def drawing(self, scheme: Scheme, batch: object, device: str) -> Callable[[int], Draw]:
        """What gives a draw from a seed: what a scheme does not fill stays the same."""

        def built(seed: int) -> Draw:
            return Draw(self.build(seed).model.to(device), {})

        if scheme.name == DEFAULT:
            return built
        bias = "zeros" if self._config.bias_init == "zeros" else "keep"
        own = built(self._config.seed).model
        plan = initialization.Plan.of(own, scheme, Options(batch, bias=bias))

        def filled(seed: int) -> Draw:
            return Draw(own, {one.name: one.stated for one in plan.fill(seed).filled})

        return filled


def _data(built: Built, config: DiagnoseConfig, loaded: Callable[[], Splits]) -> _Data:
    """The batch that the function gives or, without one, images of the data set."""
    if built.batch is not None:
        shape = next((tuple(x.shape) for x in batches.tensors(built.batch)), ())
        return _Data(built.batch, f"its own batch of {' × '.join(map(str, shape))}")
    splits = loaded()
    probe = measure.probe(splits.train, min(config.probe, IMAGES))
    refused = ""
    for name, images in _shapes(probe, splits.shape).items():
        try:
            with (
                torch.no_grad(),
                batches.undisturbed(built.model),
                batches.refused(f"{splits.are} of {name}"),
            ):
                built.model(images)
        except SettingError as error:
            refused = refused or str(error)
            continue
        return _Data(
            (images, probe.labels), f"{len(probe):,} {splits.are} of {splits.name}", splits
        )
    raise SettingError(
        f"model '{config.model}' takes no {splits.are} of {config.dataset}: have it give "
        f"(module, batch). {refused}"
    )


def _shapes(probe: Split, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Images as models take them: of their ``shape``, flat and, of one channel, with three."""
    whole = probe.images.view(-1, *shape)
    forms = [whole]
    if len(shape) == 2:
        forms.append(whole.unsqueeze(1))
    forms.append(probe.images)
    if len(forms[-2].shape) == 4 and forms[-2].shape[1] == 1:
        forms.append(forms[-2].expand(-1, 3, -1, -1).contiguous())
    return {f"shape {tuple(form.shape)}": form for form in forms}

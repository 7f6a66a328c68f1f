"""Schemes side by side in a model of the user's, untrained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import initflow
from initflow.core.configurations import DiagnoseConfig
from initflow.diagnostics import inspection, measure, model_reading
from initflow.diagnostics.model_reading import Draw
from initflow.errors import SettingError
from initflow.experiments.untrained.diagnosis import Network, Subject
from initflow.initializers.scheme import Scheme
from initflow.models import batches, building, initialization, places
from initflow.models.building import Built
from initflow.models.initialization import Options
from initflow.reporting.seed_statistics import Cell
from initflow.training import cache, datasets, model
from initflow.training.splits import Split, Splits

DEFAULT = "default"  # the weights as the user's function makes them
WORDS = (DEFAULT, places.AUTO)  # for what is no single scheme
IMAGES = 64  # of a data set, at most: each draw goes over all of them


@dataclass(frozen=True)
class _Data:
    """What a model is measured on, and in words; ``splits`` where it is a data set's."""

    batch: object
    words: str
    splits: Splits | None = None


def subject(config: DiagnoseConfig, device: str) -> Subject:
    """The model that ``config.model`` builds, as it is and under each scheme."""
    first = building.build(config.model, config.seed)
    kind = type(first.model).__name__
    data = _data(first, config)
    batch = batches.moved(data.batch, torch.device(device))
    named = [init for init in config.inits if init not in WORDS]
    found_schemes = cache.distinct(named, config.plugins_dir)
    names = [DEFAULT, *(init for init in config.inits if init != DEFAULT)]
    schemes: dict[str, Scheme | str] = {name: found_schemes.get(name, name) for name in names}
    remarks: list[str] = []

    def read(cell: Cell) -> Network:
        drawn = _drawing(config, schemes[cell.init], batch, device)
        found = model_reading.read(
            drawn, batch, first.loss, seed=config.seed, draws=config.draws, scheme=cell.init
        )
        if found.gaps and found.gaps not in remarks:
            remarks.append(found.gaps)
        tags = {
            "initflow.version": initflow.__version__,
            "initflow.scheme": cell.init,
            "initflow.provider": _provider(schemes[cell.init], first),
            "initflow.model": config.model,
            "initflow.model_provider": first.provider,
            "initflow.initial_weights_sha256": model.weights_sha256(
                _floats(found.model.state_dict())
            ),
        }
        return Network(found.reading, config.as_text() | {"inits": cell.init}, tags)

    # What fails, does so before a run is made.
    inspection.inspect(first.model.to(device), batch, first.loss)
    for scheme in schemes.values():
        _drawing(config, scheme, batch, device)(config.seed)
    cells = [Cell(name, kind) for name in names]
    summary = (
        f"An untrained {kind} of {config.model}, {', '.join(names)}, on {data.words}; seed "
        f"{config.seed} and {config.draws} further draws."
    )
    title = f"untrained {kind} of {config.model} on {data.words}"
    return Subject(title, config.model, data.words, summary, cells, read, data.splits, remarks)


def _provider(scheme: Scheme | str, built: Built) -> str:
    if isinstance(scheme, Scheme):
        return scheme.provider
    return built.provider if scheme == DEFAULT else "built-in"


def _drawing(
    config: DiagnoseConfig, scheme: Scheme | str, batch: object, device: str
) -> Callable[[int], Draw]:
    """What gives a draw of the model from a seed: what a scheme does not fill stays the same."""

    def built(seed: int) -> Draw:
        return Draw(building.build(config.model, seed).model.to(device), {})

    if scheme == DEFAULT:
        return built
    bias = "zeros" if config.bias_init == "zeros" else "keep"
    own = built(config.seed).model
    plan = initialization.Plan.of(own, scheme, Options(batch, bias=bias))

    def filled(seed: int) -> Draw:
        return Draw(own, {one.name: one.stated for one in plan.fill(seed).filled})

    return filled


def _data(built: Built, config: DiagnoseConfig) -> _Data:
    """The batch that the function gives or, without one, images of the data set."""
    if built.batch is not None:
        shape = next((tuple(x.shape) for x in batches.tensors(built.batch)), ())
        return _Data(built.batch, f"its own batch of {' × '.join(map(str, shape))}")
    splits = datasets.load(config.network(config.inits[0], config.activations[0]))
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


def _floats(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.float() for name, x in state.items() if x.is_floating_point()}

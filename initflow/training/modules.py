"""Networks that are any ``nn.Module``: built, initialized, exported."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from initflow.core.configurations import (
    CNN,
    LSTM,
    MLP,
    MODEL_NAMES,
    RNN,
    TrainConfig,
    TuneConfig,
    short_name,
)
from initflow.core.kinds import format_shape, format_widths
from initflow.core.seeds import generator
from initflow.errors import SettingError
from initflow.initializers.scheme import Scheme
from initflow.models import batches, building, initialization, layers, places, weights
from initflow.models.building import Builder
from initflow.models.initialization import Options
from initflow.training import datasets
from initflow.training.model import BATCH, Normalize
from initflow.training.splits import Scale, Split, Splits

TRIED = 2  # images that a model is tried on: a batch of 1 is a special case to some
LARGEST_BATCH = 1 << 31


@dataclass(frozen=True)
class ModuleNetwork:
    """One network: a ``module`` from images of ``shape``, (n, *shape), to logits (n, classes).

    ``stated`` are the variances that the scheme states of its matrices, by name; ``builder`` is
    what built it, ``drawn`` the global random states that this drew from, and ``title`` is for
    people.
    """

    module: nn.Module
    shape: tuple[int, ...]
    builder: Builder
    title: str
    stated: Mapping[str, float | None] = field(default_factory=dict)
    drawn: Sequence[str] = ()

    @property
    def remark(self) -> str:
        """A sentence on what a function of the user's drew from; else nothing."""
        if not self.drawn:
            return ""
        states = " and ".join(self.drawn)
        return f"Model '{self.builder.model}' was built from {states}, seeded by seed."

    def state(self) -> dict[str, Tensor]:
        """Its parameters and buffers by name, those that are real numbers, as float32."""
        return state_of(self.module)

    def copy(self, state: Mapping[str, Tensor] | None = None) -> ModuleNetwork:
        """A network of its own, with the numbers of ``state`` or the same."""
        module = copy.deepcopy(self.module)
        with torch.no_grad():
            own = module.state_dict()
            for name, tensor in (state or {}).items():
                own[name].copy_(tensor)
        return replace(self, module=module)

    def images(self, split: Split) -> Tensor:
        """Those of ``split`` as the module takes them."""
        return split.images.view(len(split), *self.shape)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of ``module`` that are real numbers, by name, as float32."""
    state = module.state_dict()
    return {name: x.detach().float() for name, x in state.items() if x.is_floating_point()}


def initialize(config: TrainConfig, scheme: Scheme, splits: Splits) -> ModuleNetwork:
    """The network of ``config`` under ``scheme``, on the CPU.

    The scheme fills every matrix, as :func:`initflow.initialize` does; all else is as the model's
    function makes it, which is seeded, so that networks of one seed have the same biases whatever
    their schemes. Raises :class:`SettingError` for a model that cannot be built, or whose outputs
    do not fit the classes, and what filling it raises.
    """
    builder = building.builder(config, config.activation, config.hidden)
    built = builder.build(config.seed, splits.shape, splits.classes)
    if built.loss is not building.usual_loss:
        raise SettingError(
            f"model '{config.model}' must give a module alone to be trained, which is done on the "
            "cross-entropy, not one with a loss of its own"
        )
    words = title(config, splits.pixels, splits.classes)
    module = layers.uncompiled(built.model)
    network = ModuleNetwork(module, splits.shape, builder, words, {}, built.drawn)
    _check(network, config, splits)
    return replace(network, stated=_filled(network, config, scheme, splits.train))


def _check(network: ModuleNetwork, config: TrainConfig, splits: Splits) -> None:
    """Try it on images, as an evaluation does."""
    few = splits.train.take(torch.arange(min(TRIED, len(splits.train))))
    who = f"model '{config.model}'"
    if not any(parameter.requires_grad for parameter in network.module.parameters()):
        raise SettingError(f"{who} has no parameters to train")
    with (
        batches.undisturbed(network.module),
        torch.no_grad(),
        evaluating(network.module),
        batches.refused(f"{who} takes no images of shape {splits.shape}"),
    ):
        logits = network.module(network.images(few))
    expected = (len(few), splits.classes)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        raise SettingError(
            f"{who} must give logits of shape {expected} for {len(few)} images of "
            f"{splits.classes} classes, not {batches.form(logits)}"
        )


def _filled(
    network: ModuleNetwork, config: TrainConfig, scheme: Scheme, data: Split
) -> dict[str, float | None]:
    """Fill it; the variances that the scheme states, by the matrix's name."""
    if scheme is places.OF_A_MODEL[places.DEFAULT]:
        if config.bias_init == "zeros":
            for matrix in weights.of(network.module).every:
                if matrix.bias:
                    matrix.bias.write(torch.zeros_like(matrix.bias.read()))
        return {}
    order = torch.randperm(len(data), generator=generator(config.seed, "initialization"))
    seen = data.take(order[: BATCH if scheme.kind == "network" else TRIED])
    batch = (network.images(seen), seen.labels)
    bias = "zeros" if config.bias_init == "zeros" else "keep"
    plan = initialization.Plan.of(network.module, scheme, Options(batch, bias=bias))
    return {one.name: one.stated for one in plan.fill(config.seed).filled}


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Have ``module`` in evaluation mode, and each of its modules as it was afterwards."""
    trained = [one for one in module.modules() if one.training]
    module.eval()
    try:
        yield
    finally:
        for one in trained:
            one.training = True


def title(config: TrainConfig | TuneConfig, pixels: int, classes: int) -> str:
    """``784-100-10``, a built-in model's name with its widths, of any other its name."""
    if config.model == MLP:
        return format_shape(datasets.widths(pixels, config.hidden, classes))
    if config.model not in MODEL_NAMES:
        return short_name(config.model)
    channels = f"{format_widths(config.channels)} + " if config.model == CNN else ""
    return f"{config.model} {channels}{format_widths(config.hidden)}"


def in_words(config: TrainConfig, its_title: str) -> str:
    """A network as a sentence begins with it: ``A 784-100-10 network with relu``."""
    article = "An" if config.model in (RNN, LSTM) else "A"
    activation = f" with {config.activation}" if config.has("activation") else ""
    return f"{article} {its_title} network{activation}"


def to_module(
    network: ModuleNetwork, state: Mapping[str, Tensor], *, mean: Scale = 0.0, std: Scale = 1.0
) -> nn.Sequential:
    """One with the numbers of ``state``, to be used: from pixels in [0, 1], (n, pixels), to logits.

    It starts with the normalization that its data had.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    if (mean, std) != (0.0, 1.0):
        modules["normalize"] = Normalize(mean, std)
    modules["shape"] = nn.Unflatten(1, network.shape)
    modules["network"] = network.copy(state).module
    return nn.Sequential(modules).eval()


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Leave out what ``torch.export`` says of recurrent layers, whose weights it moves about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attributes .* were assigned during export")
        yield


def program(module: nn.Module, pixels: int) -> bytes:
    """``module`` as ``torch.export`` writes it, for batches of any size: a pt2 archive.

    It needs none of the code that built the module.
    """
    example = torch.zeros(TRIED, pixels)
    # With a bound, as PyTorch 2.6 exports a recurrent layer without one for no batch.
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    with torch.no_grad(), exporting():
        exported = torch.export.export(
            module, (example,), dynamic_shapes=({0: batch},), strict=False
        )
    content = io.BytesIO()
    torch.export.save(exported, content)
    return content.getvalue()

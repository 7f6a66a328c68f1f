"""The networks of one training, as they are evaluated, observed and read, whatever they are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from initflow.core import machine
from initflow.core.configurations import MLP, TrainConfig
from initflow.diagnostics import inspection, measure, model_reading
from initflow.diagnostics.measure import Evaluation, Observation
from initflow.diagnostics.model_reading import Draw
from initflow.diagnostics.reading import Given, Reading, read
from initflow.errors import SettingError
from initflow.initializers.activations import ACTIVATIONS, Activation
from initflow.initializers.scheme import Scheme
from initflow.training import datasets, model, modules, parametrization
from initflow.training.gpu_trainer import GpuTrainer
from initflow.training.model import Parameters
from initflow.training.module_trainer import ModuleTrainer
from initflow.training.modules import ModuleNetwork
from initflow.training.splits import Split, Splits
from initflow.training.trainer import Recipe, Trainer, batch_order

Untrained = Parameters | ModuleNetwork  # what a training starts from


class Network(ABC):
    """One network as it stands: looking at it changes nothing."""

    @abstractmethod
    def evaluate(self, split: Split) -> Evaluation:
        """Its loss and accuracy over ``split``."""

    @abstractmethod
    def observe(self, probe: Split) -> Observation:
        """What passes through it on ``probe``."""

    @abstractmethod
    def read(self, probe: Split) -> Reading:
        """What was measured of it, untrained, beside what theory predicts."""

    @abstractmethod
    def state(self) -> Mapping[str, Tensor]:
        """Its tensors by name, on the CPU."""


@dataclass(frozen=True)
class FeedForward(Network):
    """One of a stack, with ``parameters`` (a stack of one)."""

    parameters: Parameters
    config: TrainConfig
    scheme: Scheme

    def evaluate(self, split: Split) -> Evaluation:
        activations = [ACTIVATIONS[self.config.activation]]
        return measure.evaluate(self.parameters, activations, split)[0]

    def observe(self, probe: Split) -> Observation:
        activations = [ACTIVATIONS[self.config.activation]]
        return measure.observe(self.parameters, activations, probe, keeping=True)[0]

    def read(self, probe: Split) -> Reading:
        return self.read_as(self.observe(probe), Given.of(probe.images.cpu()))

    def read_as(self, seen: Observation, given: Given) -> Reading:
        """As :meth:`read`, once it has been ``seen`` on the images that ``given`` is of."""
        return read(
            self.parameters,
            self.scheme,
            ACTIVATIONS[self.config.activation],
            self.config.bias_init,
            seen=seen,
            given=given,
            output_scale=parametrization.output_scale(self.config, self.parameters.widths),
        )

    def state(self) -> Mapping[str, Tensor]:
        return self.parameters.copy_to("cpu").state()


@dataclass(frozen=True)
class Module(Network):
    """One that is any module."""

    network: ModuleNetwork
    config: TrainConfig
    scheme: Scheme

    def evaluate(self, split: Split) -> Evaluation:
        """In evaluation mode, as a test is."""
        loss, correct = 0.0, 0
        both = self.network.images(split), split.labels
        parts = zip(*(torch.split(of_all, measure.CHUNK) for of_all in both), strict=True)
        with torch.no_grad(), modules.evaluating(self.network.module):
            for images, labels in parts:
                logits = self.network.module(images)
                loss += len(labels) * functional.cross_entropy(logits, labels).item()
                correct += int((logits.argmax(1) == labels).sum())
        return Evaluation(loss / len(split), correct / len(split))

    def observe(self, probe: Split) -> Observation:
        signals = inspection.inspect(
            self.network.module, self._batch(probe), functional.cross_entropy
        )
        return Observation(signals, math.nan, math.nan)

    def read(self, probe: Split) -> Reading:
        """Without a band, which further draws would take: a diagnosis has it."""
        draw = Draw(self.network.module, self.network.stated)
        return model_reading.read(
            lambda _: draw,
            self._batch(probe),
            functional.cross_entropy,
            seed=self.config.seed,
            draws=0,
            scheme=self.scheme.name,
        ).reading

    def _batch(self, probe: Split) -> tuple[Tensor, Tensor]:
        return self.network.images(probe), probe.labels

    def state(self) -> Mapping[str, Tensor]:
        return {name: x.cpu().clone() for name, x in self.network.state().items()}


class Networks(ABC):
    """Those of one training by their places in it, and what trains them."""

    trainer: Trainer | GpuTrainer | ModuleTrainer

    def __init__(self, configs: Sequence[TrainConfig], data: Split) -> None:
        self._configs = configs
        self._data = data

    @abstractmethod
    def network(self, member: int) -> Network:
        """The one at this place, as it is now."""

    def evaluate(
        self, members: Sequence[int], over: Mapping[str, Split]
    ) -> dict[int, dict[str, Evaluation]]:
        """Loss and accuracy of those at these places, by the names of what they are ``over``."""
        networks = ((member, self.network(member)) for member in members)
        return {
            member: {name: network.evaluate(split) for name, split in over.items()}
            for member, network in networks
        }

    def observe(self, members: Sequence[int], probe: Split) -> Iterator[Observation]:
        """What passes through each of those at these places on ``probe``."""
        for member in members:
            yield self.network(member).observe(probe)

    def read(self, probe: Split) -> Iterator[tuple[int, Reading]]:
        """What was measured of each, untrained, beside what theory predicts, with its place."""
        yield 0, self.network(0).read(probe)

    def first_losses(self) -> list[float]:
        """The loss of each over its first batch, as it is now."""
        found = []
        for member, config in enumerate(self._configs):
            order = batch_order(len(self._data), config.seed, 0)
            first = self._data.take(order[: config.batch_size])
            found.append(self.network(member).evaluate(first).loss)
        return found

    def states(self) -> Iterator[Mapping[str, Tensor]]:
        """The tensors of each by name, on the CPU."""
        yield self.network(0).state()


class Stack(Networks):
    """Feed-forward networks that train as one."""

    def __init__(
        self,
        starts: Sequence[Parameters],
        configs: Sequence[TrainConfig],
        schemes: Sequence[Scheme],
        data: Split,
    ) -> None:
        super().__init__(configs, data)
        self._starts = starts
        self._stack = Parameters.stack(starts, str(data.images.device))
        self._of = list(zip(configs, schemes, strict=True))
        recipes = [Recipe.of(config, self._stack.widths) for config in configs]
        self._is_on_gpu = machine.is_launch_bound(data.images.device)
        self.trainer = (GpuTrainer if self._is_on_gpu else Trainer)(self._stack, recipes, data)

    def network(self, member: int) -> Network:
        return FeedForward(self._stack.member(member), *self._of[member])

    def evaluate(
        self, members: Sequence[int], over: Mapping[str, Split]
    ) -> dict[int, dict[str, Evaluation]]:
        if not self._is_on_gpu:  # one by one, to the bit as alone
            return super().evaluate(members, over)
        some, activations = self._stack.select(members), self._activations(members)
        found = {name: measure.evaluate(some, activations, split) for name, split in over.items()}
        return {
            member: {name: of[at] for name, of in found.items()}
            for at, member in enumerate(members)
        }

    def observe(self, members: Sequence[int], probe: Split) -> Iterator[Observation]:
        if not self._is_on_gpu or self._stack.members == 1:
            yield from super().observe(members, probe)
            return
        for some in measure.members_at_once(self._stack, len(probe), members):
            stack, activations = self._stack.select(some), self._activations(some)
            yield from measure.observe(stack, activations, probe)

    def read(self, probe: Split) -> Iterator[tuple[int, Reading]]:
        """Those of one scheme and activation one after the other, as they share their theory."""
        given = Given.of(probe.images.cpu())
        members = sorted(range(self._stack.members), key=self._cell)
        for member, seen in zip(members, self.observe(members, probe), strict=True):
            start = FeedForward(self._starts[member], *self._of[member])
            yield member, start.read_as(seen, given)

    def _cell(self, member: int) -> tuple[str, str]:
        config, scheme = self._of[member]
        return config.activation, scheme.spec

    def _activations(self, members: Sequence[int]) -> list[Activation]:
        return [ACTIVATIONS[self._of[member][0].activation] for member in members]

    def first_losses(self) -> list[float]:
        if isinstance(self.trainer, GpuTrainer):
            return self.trainer.first_losses(self._configs[0].batch_size)
        return super().first_losses()

    def states(self) -> Iterator[Mapping[str, Tensor]]:
        whole = self._stack.copy_to("cpu") if self._is_on_gpu else self._stack
        for member in range(whole.members):
            yield whole.member(member).state()


class OneModule(Networks):
    """A module that trains by itself."""

    def __init__(
        self, start: ModuleNetwork, config: TrainConfig, scheme: Scheme, data: Split
    ) -> None:
        super().__init__([config], data)
        self.trainer = ModuleTrainer(start, Recipe.of(config), data)
        self._network = Module(self.trainer.network, config, scheme)

    def network(self, _member: int) -> Network:
        return self._network


def initialize(config: TrainConfig, scheme: Scheme, splits: Splits) -> Untrained:
    """The untrained network of ``config`` under ``scheme``, on the CPU.

    A module that is to be measured and cannot be is a :class:`SettingError`.
    """
    if config.model != MLP:
        network = modules.initialize(config, scheme, splits)
        if config.probe:
            _check_measurable(network, config, splits.train)
        return network
    widths = datasets.widths(splits.pixels, config.hidden, splits.classes)
    parameters = model.initialize(
        widths,
        scheme,
        ACTIVATIONS[config.activation],
        bias_init=config.bias_init,
        seed=config.seed,
        data=splits.train,
    )
    parameters.weights[-1].mul_(parametrization.output_scale(config, widths))
    return parameters


def _check_measurable(network: ModuleNetwork, config: TrainConfig, data: Split) -> None:
    few = measure.probe(data, modules.TRIED)
    batch = network.images(few), few.labels
    try:
        inspection.inspect(network.module, batch, functional.cross_entropy)
    except SettingError as error:
        raise SettingError(
            f"model '{config.model}' cannot be measured, and probe=0 trains it all the same: "
            f"{error}"
        ) from error

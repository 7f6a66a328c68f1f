"""The learning-rate range of schemes, each rate a network of its own: what is stable, what is best.

One run, a run below it for each network; over depths or widths too, and over widths with the
coordinate check of what the first updates change.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from initflow.core import machine
from initflow.core.configurations import RatesConfig, TrainConfig
from initflow.core.progress import Progress
from initflow.diagnostics import coordinates, curvature, measure, networks
from initflow.experiments.comparisons.overview import PopulationResult
from initflow.experiments.failures import noted
from initflow.experiments.populations.members import Member
from initflow.experiments.populations.stacking import trained_population
from initflow.experiments.public import public
from initflow.initializers.activations import ACTIVATIONS
from initflow.reporting import webpage
from initflow.reporting.formats import counted
from initflow.reporting.pictures import rates_figures, rates_sections, rates_statistics
from initflow.reporting.pictures.rates_sentences import sentences
from initflow.reporting.pictures.rates_statistics import (
    Coordinate,
    CoordinateSlope,
    Group,
    Kind,
    Row,
    Slope,
    Start,
    Tried,
)
from initflow.reporting.results import Drawings
from initflow.theory.stability import largest_stable_rate
from initflow.tracking import runs
from initflow.training import cache, datasets
from initflow.training.model import Parameters
from initflow.training.optimizers import Optimizer
from initflow.training.parametrization import rate_factors

SHARE = 6  # of the training images, one in so many is held out where it is not said how many
PROBE = 250  # training images on which the first updates' changes are looked at


@dataclass(kw_only=True, repr=False)
class Rates(PopulationResult):
    """What came of :func:`initflow.rates`.

    - ``tried``: each network, with its ``lr``, its ``accuracy`` (a fraction) and ``loss`` (nats) on
      validation images, and whether it was ``stable``.
    - ``rows``: of each scheme and size the largest stable rate and the best one, in the geometric
      mean over the seeds with 95 % intervals, beside the ``predicted`` one.
    - ``starts``: the untrained networks, with their curvature and what theory predicts from it.
    - ``slopes``: over depths or widths, the power of these with which the largest stable rate goes.
    - ``coordinates``: over widths, the root mean square of what the first updates change of each
      layer's pre-activations.
    """

    command: ClassVar = "rates"
    always: ClassVar = ("inits",)
    config: RatesConfig
    shape: str
    tried: Sequence[Tried]
    starts: Sequence[Start]
    rows: Sequence[Row]
    slopes: Sequence[Slope]
    coordinates: Sequence[Coordinate]
    coordinate_slopes: Sequence[CoordinateSlope]

    @property
    def title(self) -> str:
        config, seeds = self.config, counted(self.config.seeds, "seed")
        over = "" if config.over == "none" else f"over {config.over}s, "
        return (
            f"Learning rates of {self.shape} networks with {config.activation} on "
            f"{datasets.title(config.dataset)}, {over}{counted(config.updates, 'update')}, {seeds}"
        )

    def numbers(self) -> Iterable[Mapping[str, object]]:
        """A row for each network."""
        return map(rates_statistics.values, self.tried)

    def table(self) -> dict[str, object]:
        """What ``rates.json`` has: all that is said of the networks, as plain values."""
        table = rates_statistics.as_json(
            self.rows, self.slopes, self.coordinate_slopes, self.starts, self.sentences
        )
        return {**table, "failed": dict(self.failed)}

    def as_json(self) -> dict[str, object]:
        """What every result has, with the rates, slopes and verdicts of each scheme."""
        return {**super().as_json(), **self.table()}

    def drawings(self) -> Drawings:
        draw, over = functools.partial, self.config.over
        drawn = {"rates": draw(rates_figures.rates, self.tried, self.rows, over, self.title)}
        if self.slopes:
            drawn["stable_rates"] = draw(
                rates_figures.stable_rates, self.rows, self.slopes, over, self.title
            )
        if self.coordinates:
            drawn["coordinates"] = draw(
                rates_figures.coordinates, self.coordinates, self.coordinate_slopes, self.title
            )
        return drawn

    def sections(self, pictures: Mapping[str, bytes]) -> list[webpage.Section]:
        return rates_sections.sections(self.rows, self.slopes, self.coordinate_slopes, pictures)

    def _log_means(self) -> None:
        """The mean validation accuracy by rate, whose number, from 1 on, stands for the step."""
        groups: dict[Group, list[Tried]] = {}
        for one in self.tried:
            groups.setdefault(one.group, []).append(one)
        titles = {group: _title(group) for group in groups}
        names = runs.key_names(titles.values())
        at = {lr: number for number, lr in enumerate(self.config.range, start=1)}
        self.run.log_history(
            {
                f"accuracy_by_rate/{names[titles[group]]}": [
                    (at[lr], statistics.fmean(values))
                    for lr, values in rates_statistics.curve(of, _accuracy).items()
                ]
                for group, of in groups.items()
            }
        )


def _ended_early(found: Sequence[Coordinate]) -> list[Group]:
    """Those of whose networks some diverged in the first updates."""
    steps: dict[tuple[Kind, int, int], int] = {}
    for one in found:
        steps[one.kind, one.width, one.seed] = one.step
    whole = max(steps.values(), default=0)
    early = (Group(kind, width) for (kind, width, _), step in steps.items() if step < whole)
    return list(dict.fromkeys(early))


def _title(group: Group) -> str:
    return str(group.kind) if group.size is None else f"{group.kind} {group.size}"


def _accuracy(one: Tried) -> float | None:
    return one.accuracy


@public(RatesConfig)
@cache.cleared_after()
def rates(config: RatesConfig, *, experiment: str | None = None, progress: Progress) -> Rates:
    """Train every scheme at every rate of a range, and say which it bears and if theory holds.

    A range test, exact: each rate is a network of its own, all of them trained as stacks, not one
    network with a rising rate. Test images are not used. Each network has an MLflow run of its
    own below that of the range; what an interrupted one has trained is not trained again.

    Theory: gradient descent bears rates of up to 2/λ, λ being the largest eigenvalue of the loss's
    Hessian at the start, and with a momentum β up to 2(1 + β)/λ (Polyak 1964), in Nesterov's form
    2(1 + β)/((1 + 2β)λ).

    Returns a :class:`Rates`. Raises what :func:`initflow.compare` does.
    """
    schemes = cache.distinct(config.inits, config.plugins_dir)
    progress("loading the data, downloaded at its first use", 0, 1)
    plan = _Plan.of(config)
    configs = [config for one in plan.groups() for config in plan.at_every_rate(one)]
    shape, on = _shape(configs), datasets.title(config.dataset)
    names = ", ".join(scheme.spec for scheme in schemes.values())
    seeds = counted(config.seeds, "seed")
    low, high = config.range[0], config.range[-1]
    summary = (
        f"{len(configs)} {shape} networks with {config.activation} on {on}: {names} at "
        f"{len(config.range)} learning rates from {low:g} to {high:g}, "
        f"{counted(config.updates, 'update')} each, {seeds}."
    )
    over = "" if config.over == "none" else f" over {config.over}s"
    name = f"rates{over} {config.activation} {on} {counted(len(schemes), 'scheme')} {seeds}"
    with trained_population(
        config,
        configs,
        name=name,
        summary=summary,
        experiment=experiment,
        progress=progress,
        tested=False,
        resumable="rates",
    ) as population:
        there = {(plan.group(one.config), one.config.seed) for one in population.members}
        with machine.tf32(population.device, allowed=config.tf32):
            starts = list(plan.starts(there, population.device, progress))
        tried = [plan.tried(member, starts) for member in population.members]
        rows = rates_statistics.rows(tried, starts)
        slopes = [] if config.over == "none" else rates_statistics.slopes(tried, starts)
        with machine.tf32(population.device, allowed=config.tf32):
            found = list(plan.coordinates(tried, population.device, progress))
        of_layers = rates_statistics.coordinate_slopes(found)
        result = Rates(
            **vars(population),
            config=config,
            shape=shape,
            tried=tried,
            starts=starts,
            rows=rows,
            slopes=slopes,
            coordinates=found,
            coordinate_slopes=of_layers,
            sentences=sentences(rows, slopes, of_layers, config.over, _ended_early(found)),
        )
        _log_table(result)
        result.log_overview(name, [summary])
        result.log_report()
    return result


def _shape(configs: Sequence[TrainConfig]) -> str:
    """The networks' for people; of several, those of the first and the last size."""
    shapes = list(dict.fromkeys(cache.title(one) for one in configs))
    return shapes[0] if len(shapes) == 1 else f"{shapes[0]} to {shapes[-1]}"


@dataclass(frozen=True)
class _Plan:
    """Which networks a ``config`` asks for, with so many ``validation`` images held out."""

    config: RatesConfig
    validation: int

    @classmethod
    def of(cls, config: RatesConfig) -> _Plan:
        """That of ``config``, for which its data is loaded."""
        validation = config.validation
        if validation is None:
            validation = 0
            one = cls(config, 0)
            every = cache.splits(one.network(next(one.groups()), config.lr_low)).train
            validation = max(1, len(every) // SHARE)
        return cls(config, validation)

    def groups(self) -> Iterator[tuple[str, Group, int]]:
        """The scheme as it was named, what its networks have in common, and a seed.

        In the order in which they train: those of one size and seed are neighbours.
        """
        config = self.config
        for size in config.sizes:
            for seed in range(config.seed, config.seed + config.seeds):
                for init in config.inits:
                    for parametrization in config.parametrizations:
                        spec = cache.scheme(init, config.plugins_dir).spec
                        yield init, Group(Kind(spec, parametrization), size), seed

    def network(self, one: tuple[str, Group, int], lr: float) -> TrainConfig:
        """The settings of one of the networks."""
        init, ((_, parametrization), size), seed = one
        return self.config.network(
            init, parametrization, size, lr=lr, seed=seed, validation=self.validation
        )

    def at_every_rate(self, one: tuple[str, Group, int]) -> list[TrainConfig]:
        return [self.network(one, lr) for lr in self.config.range]

    def group(self, config: TrainConfig) -> Group:
        """Where a network belongs."""
        spec = cache.scheme(config.init, config.plugins_dir).spec
        sizes = {self.config.hidden_of(size): size for size in self.config.sizes}
        return Group(Kind(spec, config.parametrization), sizes[config.hidden])

    def starts(
        self, there: Collection[tuple[Group, int]], device: str, progress: Progress
    ) -> Iterator[Start]:
        """The untrained networks of the groups and seeds that are ``there``: losses, curvature."""
        every = [one for one in self.groups() if one[1:] in there]
        for at, one in enumerate(every):
            progress("measuring the curvature at the start", at, len(every))
            _, group, seed = one
            config = self.network(one, self.config.lr_low)
            splits = cache.splits(config).untested().to(torch.device(device))
            scheme = cache.scheme(config.init, config.plugins_dir)
            initial = networks.initialize(config, scheme, splits)
            assert isinstance(initial, Parameters), "they are feed-forward networks"
            initial = initial.copy_to(device)
            assert splits.validation is not None, "images were held out"
            activation = ACTIVATIONS[config.activation]
            (evaluation,) = measure.evaluate(initial, [activation], splits.validation)
            sharpest = curvature.largest_eigenvalue(
                initial,
                activation,
                measure.probe(splits.train, curvature.IMAGES),
                rate_factors(config, initial.widths),
            )
            predicted = _predicted(config, sharpest)
            yield Start(group, seed, evaluation.loss, sharpest, predicted)

    def tried(self, member: Member, starts: Sequence[Start]) -> Tried:
        """What came of one network."""
        group, seed = self.group(member.config), member.config.seed
        start = next(one for one in starts if (one.group, one.seed) == (group, seed))
        diverged = member.outcome.diverged_at is not None
        of = {} if diverged else member.last  # which before that says nothing
        return Tried(
            group,
            member.config.lr,
            seed,
            of.get("accuracy/validation"),
            of.get("loss/validation"),
            of.get("loss/peak"),
            start.loss,
            "diverged" if diverged else "finished",
            member.run_id,
        )

    def coordinates(
        self, tried: Sequence[Tried], device: str, progress: Progress
    ) -> Iterator[Coordinate]:
        """What the first updates change, over widths, at one rate for all widths of a kind."""
        there = {(one.group, one.seed) for one in tried}
        every = [one for one in self.groups() if one[1:] in there]
        if self.config.over != "width":
            return
        for at, one in enumerate(every):
            progress("checking what the first updates change", at, len(every))
            _, (kind, width), seed = one
            assert width is not None, "they go over widths"
            config = self.network(one, self._rate(kind, tried))
            splits = cache.splits(config).untested().to(torch.device(device))
            scheme = cache.scheme(config.init, config.plugins_dir)
            probe = measure.probe(splits.train, PROBE)
            for found in coordinates.changes(config, scheme, splits, probe):
                if math.isfinite(found.change):
                    yield Coordinate(kind, width, seed, **vars(found))

    def _rate(self, kind: Kind, tried: Sequence[Tried]) -> float:
        """The best one of the narrowest networks of ``kind``, by the mean over the seeds."""
        group = Group(kind, min(size for size in self.config.sizes if size))
        of = rates_statistics.curve([one for one in tried if one.group == group], _accuracy)
        means = {lr: statistics.fmean(values) for lr, values in of.items()}
        return max(means, key=lambda lr: means[lr], default=self.config.lr_low)


def _predicted(config: TrainConfig, eigenvalue: float) -> float | None:
    """The largest rate that a quadratic with this ``eigenvalue`` bears, of SGD without clipping."""
    optimizer = Optimizer.of(config)
    sharpest = eigenvalue + optimizer.weight_decay
    if optimizer.name != "sgd" or config.clip is not None or not 0 < sharpest < math.inf:
        return None
    return largest_stable_rate(sharpest, optimizer.momentum, nesterov=optimizer.nesterov)


def _log_table(result: Rates) -> None:
    run, failed = result.run, result.failures
    with noted(failed, "rates.csv"):
        run.log_text("rates.csv", rates_statistics.as_csv(result.tried))
    if result.coordinates:
        with noted(failed, "coordinates.csv"):
            text = rates_statistics.coordinates_as_csv(result.coordinates)
            run.log_text("coordinates.csv", text)
    with noted(failed, "rates.json"):
        run.log_json("rates", result.table())

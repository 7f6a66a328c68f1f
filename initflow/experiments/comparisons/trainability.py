"""Up to which depth networks train, for each σ_w² of their weights, beside what theory expects."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from initflow.core.configurations import TrainabilityConfig, TrainConfig
from initflow.core.progress import Progress
from initflow.experiments.comparisons.overview import PopulationResult
from initflow.experiments.failures import noted
from initflow.experiments.populations.members import Member
from initflow.experiments.populations.stacking import trained_population
from initflow.experiments.public import public
from initflow.initializers.activations import ACTIVATIONS
from initflow.reporting import webpage
from initflow.reporting.formats import counted
from initflow.reporting.pictures import trainability_figures as figures
from initflow.reporting.pictures import trainability_sections as sections
from initflow.reporting.pictures import trainability_sentences as sentences
from initflow.reporting.pictures import trainability_statistics as statistics
from initflow.reporting.pictures.trainability_statistics import Plane, TrainedNetwork
from initflow.reporting.results import Drawings
from initflow.theory import trainable_depth
from initflow.tracking import mlflow_page
from initflow.training import cache, datasets

CURVE = 301  # places of theory's line


@dataclass(kw_only=True, repr=False)
class Trainability(PopulationResult):
    """What came of :func:`initflow.trainability`.

    - ``networks``: each with its ``sigma_w2``, ``depth`` and ``lr``, its ``accuracy`` on training
      images at the end (a fraction) and its ``loss`` (nats).
    - ``planes``: of each learning rate the mean accuracies by depth and σ_w², and the edge up to
      which networks train, beside theory's.
    - ``curve``: theory's depth scale, (σ_w², ξ) pairs, ξ in layers.
    """

    command: ClassVar = "trainability"
    always: ClassVar = ("activation",)
    config: TrainabilityConfig
    networks: Sequence[TrainedNetwork]
    planes: Sequence[Plane]
    curve: Sequence[tuple[float, float]]

    @property
    def title(self) -> str:
        config = self.config
        return (
            f"{config.activation}, width {config.width}, σ_b² = {config.sigma_b2:g}: "
            f"{counted(config.updates, 'update')} on {datasets.title(config.dataset)}, "
            f"{counted(config.seeds, 'seed')}"
        )

    def numbers(self) -> Iterable[Mapping[str, object]]:
        """A row for each network."""
        return map(statistics.values, self.networks)

    def drawings(self) -> Drawings:
        draw = figures.trainable_depth
        return {"trainability": partial(draw, self.planes, self.curve, self.title)}

    def sections(self, pictures: Mapping[str, bytes]) -> list[webpage.Section]:
        return sections.sections(self.planes, pictures)

    def addresses(self) -> dict[str, str]:
        where, run = self.run.experiment_id, self.run.id
        return {"Accuracy by depth": mlflow_page.run_address(where, run, charts=True)}

    def closing_lines(self) -> list[str]:
        """Each network's run is a row of trainability.csv."""
        links = (f"{what}: {address}" for what, address in self.links().items())
        every = "trainability.csv has the run of every network, for initflow verify RUN_ID."
        return [*self.warnings(), *self.took(), *links, every]


@public(TrainabilityConfig)
@cache.cleared_after()
def trainability(
    config: TrainabilityConfig, *, experiment: str | None = None, progress: Progress
) -> Trainability:
    """Train networks of every σ_w² and depth, and hold the edge of what trains beside theory's.

    Schoenholz et al. 2017, "Deep Information Propagation", find that networks train up to a depth
    of about six times ξ_c. Each network has an MLflow run of its own below that of the command;
    what an interrupted one of the same settings has trained is not trained again.

    Returns a :class:`Trainability`. Raises what :func:`initflow.compare` does.
    """
    progress("loading the data, downloaded at its first use", 0, 1)
    configs = _configs(config)
    on = datasets.title(config.dataset)
    summary = (
        f"{counted(len(configs), 'network')} with {config.activation} on {on}: "
        f"{config.points} values of σ_w² from {config.sigma_w2_low:g} to {config.sigma_w2_high:g} "
        f"with σ_b² = {config.sigma_b2:g}, {counted(len(config.depths), 'depth')} from "
        f"{min(config.depths)} to {max(config.depths)}, width {config.width}, "
        f"{counted(config.seeds, 'seed')}, lr {', '.join(f'{lr:g}' for lr in config.lrs)}, "
        f"{counted(config.updates, 'update')}."
    )
    name = f"trainability {config.activation} {on} {counted(config.seeds, 'seed')}"
    with trained_population(
        config,
        configs,
        name=name,
        summary=summary,
        experiment=experiment,
        progress=progress,
        tested=False,
        resumable="trainability",
    ) as population:
        progress("theory's depth scales", len(configs), len(configs))
        activation, b2 = ACTIVATIONS[config.activation], config.sigma_b2
        scales = trainable_depth.depth_scales(activation, config.sigma_w2s, b2)
        critical = trainable_depth.critical(
            activation, b2, config.sigma_w2_low, config.sigma_w2_high
        )
        classes = cache.splits(configs[0]).classes
        networks = [_network(member, config, classes) for member in population.members]
        planes = statistics.planes(networks, scales, classes)
        result = Trainability(
            **vars(population),
            config=config,
            networks=networks,
            planes=planes,
            curve=_curve(config, critical),
            sentences=sentences.sentences(planes, critical),
        )
        _log_numbers(result)
        _log_overview(result, summary)
        result.log_report()
    return result


def _configs(config: TrainabilityConfig) -> list[TrainConfig]:
    """One for each network: the deepest first, which take longest; of a depth seed by seed."""
    images = len(cache.splits(config.network(1.0, 1, 1.0, config.seed, epochs=1)).train)
    epochs = math.ceil(config.updates / math.ceil(images / config.batch_size))
    return [
        config.network(sigma_w2, depth, lr, seed, epochs=epochs)
        for depth in sorted(config.depths, reverse=True)
        for seed in range(config.seed, config.seed + config.seeds)
        for lr in config.lrs
        for sigma_w2 in config.sigma_w2s
    ]


def _network(member: Member, config: TrainabilityConfig, classes: int) -> TrainedNetwork:
    by_init = {config.init(sigma_w2): sigma_w2 for sigma_w2 in config.sigma_w2s}
    one, last = member.config, member.last
    diverged = member.outcome.diverged_at is not None
    loss = last.get("loss/train")
    return TrainedNetwork(
        sigma_w2=by_init[one.init],
        depth=len(one.hidden),
        lr=one.lr,
        seed=one.seed,
        accuracy=None if diverged else last.get("accuracy/train"),
        loss=None if diverged else loss,
        outcome=statistics.outcome(loss, classes, diverged=diverged),
        run_id=member.run_id,
    )


def _curve(config: TrainabilityConfig, critical: float | None) -> list[tuple[float, float]]:
    """Theory's line, also between the values of σ_w² that were trained."""
    low, high = config.sigma_w2_low, config.sigma_w2_high
    steps = np.linspace(low, high, CURVE).tolist()
    scales = trainable_depth.depth_scales(ACTIVATIONS[config.activation], steps, config.sigma_b2)
    peak = {} if critical is None else {critical: math.inf}
    return sorted((scales | peak).items())


def _log_numbers(result: Trainability) -> None:
    run, failed = result.run, result.failures
    with noted(failed, "trainability.csv"):
        run.log_text("trainability.csv", statistics.as_csv(result.networks))
    with noted(failed, "trainability.json"):
        planes = [statistics.as_json(plane) for plane in result.planes]
        told = {"sentences": list(result.sentences), "failed": dict(result.failed)}
        run.log_json("trainability", {"planes": planes, **told})


def _log_overview(result: Trainability, summary: str) -> None:
    """The parent's metrics, of which those by depth have it as step, and its description."""
    with noted(result.failures, "the metrics"):
        result.run.log_history(_history(result.planes))
    with noted(result.failures, "the description"):
        ((what, address),) = result.addresses().items()
        text = "\n\n".join([*result.sentences, summary, *result.warnings()])
        result.run.describe(text, f"[{what}]({address})")


def _history(planes: Sequence[Plane]) -> dict[str, list[tuple[int, float]]]:
    history: dict[str, list[tuple[int, float]]] = {}
    for plane in planes:
        rate = f"/lr {plane.lr:g}" if len(planes) > 1 else ""
        values: dict[str, float] = {
            "diverged": plane.count("diverged"),
            "unstable": plane.count("unstable"),
        }
        if plane.fit and plane.fit.c and plane.fit.factor:
            values |= {"c": plane.fit.c, "disagreement": plane.fit.factor}
        history |= {f"{key}{rate}": [(0, value)] for key, value in values.items()}
        for at, sigma_w2 in enumerate(plane.sigma_w2s):
            means = [
                (depth, row[at]) for depth, row in zip(plane.depths, plane.accuracies, strict=True)
            ]
            history[f"accuracy_by_depth{rate}/sigma_w2 {sigma_w2:g}"] = [
                (depth, mean) for depth, mean in means if mean is not None
            ]
    return history

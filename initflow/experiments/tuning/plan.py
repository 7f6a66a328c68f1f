"""What the studies of one tuning have in common: settings, data, storage and names."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from initflow.core import machine
from initflow.core.configurations import ADDED, TrainConfig, TuneConfig
from initflow.experiments.tuning import storages
from initflow.experiments.tuning.searches import PendingTrial, Search
from initflow.experiments.tuning.studies import Study
from initflow.reporting.formats import counted
from initflow.reporting.seed_statistics import Cell
from initflow.reporting.trials import in_words
from initflow.tracking import connection, runs
from initflow.training import cache, datasets, modules, trainer

LONGEST = 50  # characters of a data set in a study's name
SHARE = 6  # one of so many training images is held out, 10,000 of MNIST's
# The settings that trials depend on, beside the data and the scheme: with others it would be
# another study, whatever its name.
OBJECTIVE = (
    "lr_low",
    "lr_high",
    "gamma_low",
    "gamma_high",
    "activation",
    "model",
    "channels",
    "kernel",
    "pool",
    "dataset",
    "hidden",
    "epochs",
    "updates",
    "batch_size",
    "momentum",
    "nesterov",
    "optimizer",
    "betas",
    "eps",
    "weight_decay",
    "schedule",
    "clip",
    "parametrization",
    "base_width",
    "bias_init",
    "normalize",
    "eval_every",
    "seed",
    "tf32",
)
NOT_NAMES = re.compile(r"[^A-Za-z0-9_.-]+")  # letters that a study's name has not
STUDY_ID = "initflow.study_id"  # a tag: names may be the same elsewhere, these are not
CHOICE = ("sampler", "pruner", "batch")  # how a study goes about it, which may change on the way


@dataclass(frozen=True)
class Plan:
    """What all studies have in common: ``study`` is the name that the user knows them by.

    ``validation`` images, of ``pixels`` and ``classes`` like all, are held out to choose by;
    ``updates`` are those of a trial's training.
    ``described`` says what they are studies of, setting by setting; ``data_tags`` and ``remark``
    say of which images, as of :class:`initflow.training.splits.Splits`.
    """

    config: TuneConfig
    validation: int
    study: str
    storage: str
    device: str
    pixels: int
    classes: int
    updates: int
    described: Mapping[str, str]
    data_tags: Mapping[str, object]
    remark: str

    def trial(self, init: str, pending: PendingTrial | None = None) -> TrainConfig:
        """The network of a trial, or the untuned one."""
        lr, gamma = (pending.lr, pending.gamma) if pending else self.untuned_setting
        return self.config.trial(init, lr, gamma, self.validation)

    def search(self, cell: Cell) -> Search:
        config = self.config
        return Search(
            storage=self.storage,
            name=f"{self.study}: {cell}",
            lr=(config.lr_low, config.lr_high),
            gamma=(config.gamma_low, config.gamma_high) if config.schedule == "step" else None,
            sampler=config.sampler,
            pruner=config.pruner,
            seed=config.seed,
            updates=self.updates,
            eval_every=config.eval_every,
        )

    def tags(self, part: str, *of_studies: Study) -> dict[str, object]:
        """By which a run is found: of which studies it is, and which ``part`` of them it is."""
        ids = " ".join(study.id for study in of_studies)
        of_study = {"initflow.study": self.study, STUDY_ID: ids, "initflow.tuning": part}
        return {**self.data_tags, **of_study}

    @property
    def title(self) -> str:
        config = self.config
        shape = modules.title(config, self.pixels, self.classes)
        activation = f" with {config.activation}" if config.has("activation") else ""
        return f"{shape} networks{activation} on {datasets.title(config.dataset)}"

    @property
    def summary(self) -> str:
        """The settings as a sentence."""
        config = self.config
        settings, seeds = counted(config.trials, "setting"), counted(config.seeds, "seed")
        decay = (
            f"and gamma from {config.gamma_low:g} to {config.gamma_high:g}"
            if config.schedule == "step"
            else "falling along a cosine"
        )
        return (
            f"{settings} tried for each scheme, lr from {config.lr_low:g} to {config.lr_high:g} "
            f"{decay}, for {self.title}; "
            f"chosen by {self.validation:,} validation images, tested under "
            f"{seeds}."
        )

    @property
    def untuned_setting(self) -> tuple[float, float | None]:
        """The one that nobody chose for a scheme: lr, and gamma where it is searched."""
        return self.config.lr, self.config.gamma if self.config.schedule == "step" else None

    @property
    def untuned(self) -> str:
        """It in words."""
        return in_words(*self.untuned_setting)


def of(config: TuneConfig) -> Plan:
    """The plan of ``config``, for which its data is loaded."""
    device = machine.device(config.device)
    machine.check_tf32(device, tf32=config.tf32)
    anyone = config.inits[0]
    every = config.final(anyone, config.lr, config.gamma, 0)
    validation = config.validation or datasets.examples(every) // SHARE
    trial = config.trial(anyone, config.lr, config.gamma, validation)
    splits = cache.splits(trial)
    text = config.as_text()
    described = {name: text[name] for name in OBJECTIVE}
    described |= {"validation": str(validation), "data": splits.digest[: runs.DIGEST_LENGTH]}
    named = described | {name: text[name] for name in CHOICE}
    for name in ADDED:  # a study of an earlier version goes on under the name that it has
        if named.get(name) == ADDED[name]:
            del named[name]
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:8]
    study = config.study or f"{_named(config.dataset)}-{_named(config.kind)}-{digest}"
    return Plan(
        config,
        validation,
        study,
        config.storage or storages.journal(connection.folder() / "studies", study),
        device,
        splits.pixels,
        splits.classes,
        trainer.iterations(trial, len(splits.train)),
        described,
        splits.tags,
        splits.remark,
    )


def _named(dataset: str) -> str:
    """A part of a study's name, which is one of files, too."""
    found = re.sub(r"[^A-Za-z0-9_.-]", "-", datasets.title(dataset))[:LONGEST].lstrip("-_.")
    return found or "data"

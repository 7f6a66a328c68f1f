"""The commands with their settings, and command lines as the commands read them."""

import shlex
from dataclasses import fields

from initflow.cli.commands import cli
from initflow.core.configurations import (
    CompareConfig,
    DiagnoseConfig,
    NetworkConfig,
    PhaseConfig,
    PluginsConfig,
    RatesConfig,
    ReproduceConfig,
    TrainabilityConfig,
    TrainConfig,
    TuneConfig,
    VerifyConfig,
)

# The commands that make a run, each an entry point of the project and a function of the package.
WITH_A_RUN = (
    "train",
    "diagnose",
    "phase",
    "compare",
    "trainability",
    "rates",
    "tune",
    "reproduce",
    "verify",
)
SETTINGS = {
    "train": TrainConfig,
    "diagnose": DiagnoseConfig,
    "phase": PhaseConfig,
    "compare": CompareConfig,
    "reproduce": ReproduceConfig,
    "trainability": TrainabilityConfig,
    "tune": TuneConfig,
    "rates": RatesConfig,
    "verify": VerifyConfig,
    "schemes": NetworkConfig,
    "plugins": PluginsConfig,
}


def read(name, words):
    """The configuration that the ``words`` behind a command give it, and what else it is given."""
    given = cli.commands[name].make_context(name, shlex.split(words)).params
    config = SETTINGS[name](**{one.name: given.pop(one.name) for one in fields(SETTINGS[name])})
    return config, given

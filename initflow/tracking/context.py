"""The plugin that gives every MLflow run of a process that uses initflow the environment's tags.

MLflow imports it at its own start, in any process: so it imports nothing heavy, and waits. What
fails here is caught by MLflow, which warns of it in a line and starts the run all the same.
"""

from __future__ import annotations

import os
import sys

from initflow.errors import SettingError

SWITCH = "INITFLOW_CONTEXT_TAGS"
# Whatever computes something imports one of these; and all of them import torch.
AT_WORK = (
    "diagnostics.observing.hooks",
    "diagnostics.signals",
    "experiments.tuning.studies",
    "initializers.activations",
    "models.batches",
    "models.layers",
    "models.moments.offsets",
    "models.published_models",
    "models.slots",
    "theory.normal_samples",
    "theory.roots",
    "training.arrays",
    "training.optimizers",
    "training.splits",
)


class EnvironmentTags:
    """An MLflow run context provider."""

    def in_context(self) -> bool:
        """Whether the run is to have the tags."""
        # More of initflow is loaded than MLflow's own request for tags loads.
        is_in_use = any(f"initflow.{module}" in sys.modules for module in AT_WORK)
        return is_in_use and is_on()

    def tags(self) -> dict[str, str]:
        from initflow.core import environment  # noqa: PLC0415 - imports torch, which is loaded by now

        return environment.tags()


def is_on() -> bool:
    """Whether the user wants tags on runs that initflow did not open; or a `SettingError`."""
    value = os.environ.get(SWITCH) or "true"
    if value.lower() not in ("true", "false"):
        raise SettingError(f"{SWITCH} must be true or false, not '{value}'")
    return value.lower() == "true"

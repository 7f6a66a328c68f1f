"""The tables of every command's parameters: ``python docs/parameters.py``.

They come from the settings that the commands read, so that nothing about them is written twice.
The page is ``docs/parameters.md``; a test holds it equal to what is made here.
"""

from __future__ import annotations

import textwrap
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

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
from initflow.core.settings import Settings

PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
# Parameters

All parameters of all commands: the default of each, what it means, and the values that it takes.
`python docs/parameters.py` writes this page from the code that reads the parameters.

A parameter has the same name everywhere:

- `mlflow run . -P batch_size=50`;
- `initflow train --batch-size 50`, with `-` for `_`;
- `inf.train(batch_size=50)` in Python, where a value is the text that stands here, or a number,
  `True` or `False`, or a list.

Which MLflow experiment the runs go to is said by `--experiment-name` for `mlflow run`,
`--experiment` for `initflow`, and `experiment=` in Python. `initflow export`, `initflow project`,
`initflow ui`, `initflow sync`, `initflow doctor` and `initflow completion` have no parameters but
those that `--help` shows.
"""
COMMANDS: dict[str, tuple[type[Settings], str]] = {
    "train": (TrainConfig, "Trains one network: see [training](training.md)."),
    "diagnose": (
        DiagnoseConfig,
        "Measures untrained networks: see [signals](signals.md).",
    ),
    "phase": (
        PhaseConfig,
        "Shows where deep networks are stable: see [pictures](pictures.md).",
    ),
    "compare": (
        CompareConfig,
        "Trains schemes under several seeds: see [comparing](comparing.md).",
    ),
    "reproduce": (
        ReproduceConfig,
        "Runs a published table again: see [published tables](comparing.md#published-tables).",
    ),
    "trainability": (
        TrainabilityConfig,
        "Trains networks of every depth: see [trainable depth](pictures.md#trainable-depth).",
    ),
    "tune": (
        TuneConfig,
        "Searches each scheme's learning rate and gamma: see [tuning](tuning.md).",
    ),
    "rates": (
        RatesConfig,
        (
            "Trains schemes at every learning rate of a range: see [pictures]"
            "(pictures.md#learning-rates-that-a-scheme-bears)."
        ),
    ),
    "verify": (
        VerifyConfig,
        (
            "Trains a run again and compares it: see [verifying](verifying.md). It needs the run's "
            "id, or a folder that `export` wrote: `initflow verify RUN_ID`, `-P run_id=RUN_ID`."
        ),
    ),
    "schemes": (
        NetworkConfig,
        "Lists all schemes, or shows one of them on a network: see [schemes](training.md#schemes).",
    ),
    "plugins": (
        PluginsConfig,
        (
            "Lists, checks and starts plugins, by `initflow plugins list`, `initflow plugins "
            "check` and `initflow plugins new`: see [plugins](plugins.md)."
        ),
    ),
}
# What a command is about comes first in its table; the others are in the order of the settings.
FIRST = ("inits", "activations", "table", "trials")


def page() -> str:
    """The whole page, as Markdown."""
    return "\n".join([HEAD, *(_section(name, *command) for name, command in COMMANDS.items())])


def _section(name: str, settings: type[Settings], lead: str) -> str:
    """A command's own parameters in a table, and the names of those that are training's."""
    shared = [one for one in fields(settings) if settings is not TrainConfig and _is_trains(one)]
    own = [one for one in fields(settings) if one not in shared]
    own.sort(key=lambda one: one.name not in FIRST)
    parts = [f"## {name}", _filled(lead)]
    if own:
        head = ["| parameter | default | meaning | values |", "|---|---|---|---|"]
        parts.append("\n".join([*head, *map(_row, own)]))
    if shared:
        *names, last = [f"`{one.name}`" for one in shared]
        listed = f"{', '.join(names)} and {last} are those" if names else f"{last} is that"
        parts.append(_filled(f"{listed} of [train](#train)."))
    return "\n\n".join(parts) + "\n"


def _is_trains(setting: Field[Any]) -> bool:
    """Whether training has it too, with the same default, meaning and values."""
    return any(_row(setting) == _row(other) for other in fields(TrainConfig))


def _row(setting: Field[Any]) -> str:
    kind, meaning = setting.metadata["kind"], setting.metadata["meaning"]
    default = kind.format(setting.default)
    cells = (f"`{setting.name}`", f"`{default}`", meaning, kind.expected)
    return f"| {' | '.join(cells)} |"


def _filled(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"Written: {PAGE}")

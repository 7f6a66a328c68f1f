"""What was found of one thing, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Finding(NamedTuple):
    """``facts`` are values that JSON has; each of the ``problems`` is a line with what to do."""

    facts: Mapping[str, Any]
    problems: Sequence[str] = ()

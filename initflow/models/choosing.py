"""Which of a model's matrices a user means: by names, patterns, or types of modules."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence

from torch import nn

from initflow.errors import SettingError
from initflow.models import batches, weights
from initflow.models.weights import Matrix, Weights

Wanted = str | type[nn.Module]


def chosen(
    model: nn.Module,
    found: Weights,
    only: Wanted | Sequence[Wanted] | None,
    skip: Wanted | Sequence[Wanted] | None,
) -> Weights:
    """Those that ``only`` names and ``skip`` does not: names, patterns or types of modules.

    What names a module is true of all that is in it. Raises :class:`SettingError` for one that
    is true of nothing in the model.
    """
    model = weights.unwrapped(model)
    modules = dict(model.named_modules())
    matched = dict.fromkeys(found.matrices, True)
    for what, given in (("only", only), ("skip", skip)):
        if given is None:
            continue
        wanted = list(given) if isinstance(given, (list, tuple, set)) else [given]
        true_of: set[Matrix] = set()
        for each in wanted:
            true_of |= _true_of(what, each, model, modules, found)
        for matrix in matched:
            matched[matrix] &= (matrix in true_of) == (what == "only")
    if not any(matched.values()):
        raise SettingError(
            f"model must hold a weight to fill; {type(model).__name__} has none"
            + (" that only and skip leave" if found.matrices else "")
        )
    left = {m.name: "not chosen" for m, taken in matched.items() if not taken}
    matrices = [m for m, taken in matched.items() if taken]
    return Weights(matrices, {**found.left, **left}, found.every)


def _true_of(
    what: str,
    wanted: object,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    found: Weights,
) -> set[Matrix]:
    """The matrices that a name, a pattern or a type is true of."""
    if isinstance(wanted, type) and issubclass(wanted, nn.Module):
        holders = {name for name, module in modules.items() if isinstance(module, wanted)}
        names: set[str] = set()
    elif isinstance(wanted, str):
        holders = set(fnmatch.filter(modules.keys() - {""}, wanted))
        parameters = [name for name, _ in model.named_parameters()]
        slots = [matrix.slot.name for matrix in found.every]
        own = [name for matrix in found.every for name in (matrix.name, *matrix.tied)]
        names = set(fnmatch.filter([*parameters, *slots, *own], wanted))
    else:
        raise SettingError(
            f"{what} must be names, patterns or types of modules, not {batches.form(wanted)}"
        )
    if not holders | names:
        its = wanted if isinstance(wanted, str) else wanted.__name__
        known = [*modules, *(matrix.name for matrix in found.every)]
        close = difflib.get_close_matches(str(its), known, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise SettingError(
            f"{what} must name what {type(model).__name__} has; '{its}' is nothing in it{hint}"
        )
    return {m for m in found.matrices if _is_in(m, holders) or {*_names(m)} & names}


def _names(matrix: Matrix) -> list[str]:
    return [matrix.name, matrix.slot.name, *matrix.tied]


def _is_in(matrix: Matrix, holders: set[str]) -> bool:
    parts = matrix.module.split(".")
    return any(".".join(parts[:n]) in holders for n in range(len(parts) + 1))

"""What every initializer must keep to, checked each time that one has run.

It fills the very tensors it is given, all of them and nothing else, with finite numbers, draws
from the generator it is given alone, and from the same seed gives the same weights. It runs
twice, on copies, so that a breach or an error leaves the weights as they were.
"""

from __future__ import annotations

import dis
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from initflow.core.isolation import left_alone
from initflow.errors import InitflowError, PluginError, SettingError, cause, first_line
from initflow.initializers.scheme import BUILT_IN, Scheme

# The rules by name, as `initflow plugins check` lists them.
RULES = {
    "runs": "fills its tensors without an error",
    "in place": "writes into the tensors it is given; replaces none, and returns no other",
    "shape": "leaves their shape as it is",
    "dtype": "leaves their dtype as it is",
    "device": "leaves them on their device",
    "finite": "writes every entry, and finite numbers only",
    "global state": "draws from the generator it is given, and leaves all global state alone",
    "same seed": "gives the same weights for the same seed",
}

Tensors = Mapping[str, Tensor]
Fill = Callable[[Tensors, torch.Generator], object]


class Breach(Exception):  # noqa: N818 - becomes one of initflow.errors, with names, in apply
    """A rule of :data:`RULES` was broken, at a tensor such as ``fc1.weight``."""

    def __init__(self, rule: str, tensor: str, detail: str) -> None:
        super().__init__(f"{tensor}: {detail}" if tensor else detail)
        self.rule, self.tensor, self.detail = rule, tensor, detail


def apply(
    scheme: Scheme, tensors: Tensors, fill: Fill, generator: torch.Generator, place: str
) -> None:
    """Let ``fill``, of ``scheme``, write into ``tensors``, as :func:`attempt` does.

    An error names the scheme, its provider, ``place`` (the layer or network) and the rule: a
    :class:`SettingError` for what the scheme refuses as a ``ValueError``, and for any failure of
    a built-in scheme, whose arguments are to blame; else a :class:`PluginError`.
    """
    try:
        if scheme.provider == BUILT_IN:  # the tests hold it to all that a second run would show
            _copy(_filled(tensors, fill, generator, math.nan), tensors)
        else:
            attempt(tensors, fill, generator)
    except Breach as breach:
        at = breach.tensor.removesuffix(".weight").removesuffix(".bias") or place
        raise _error(scheme, at, f"breaks the rule '{breach.rule}': {breach.detail}") from breach
    except (InitflowError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a plugin may fail in any way
        if is_refusal(error, scheme.fill):
            raise SettingError(f"scheme '{scheme.spec}': {first_line(error)}") from error
        raise _error(scheme, place, f"failed: {cause(error)}") from error


def attempt(tensors: Tensors, fill: Fill, generator: torch.Generator) -> None:
    """Let ``fill`` write into ``tensors``, by name, such as ``fc1.weight`` and ``fc1.bias``.

    It runs on copies whose weights are all NaN, then on copies whose weights are all 0, with
    ``generator`` in the same state; where all :data:`RULES` hold, the first are copied into
    ``tensors``. Raises :class:`Breach`, or what ``fill`` raises, with ``tensors`` and the global
    random states as they were.
    """
    twin = torch.Generator(generator.device).set_state(generator.get_state())
    with left_alone() as once:
        first = _filled(tensors, fill, generator, math.nan)
    with left_alone() as twice:
        again = _filled(tensors, fill, twin, 0.0)
    for name in sorted(once & twice):  # one alone may be another thread's doing
        raise Breach("global state", "", f"{name} was changed")
    for name, tensor in first.items():
        if not torch.equal(tensor, again[name]):
            differ = int((tensor != again[name]).sum())
            raise Breach(
                "same seed", name, f"{differ} of {tensor.numel()} entries differ in a second run"
            )
    _copy(first, tensors)


def is_refusal(error: BaseException, function: Callable[..., object]) -> bool:
    """Whether ``error`` is how ``function`` refuses an argument, an activation or a shape.

    That is a ValueError by a ``raise`` of its own code; one from a library is a failure.
    """
    at = error.__traceback__
    if not isinstance(error, ValueError) or at is None:
        return False
    while at.tb_next:
        at = at.tb_next
    raising = at.tb_frame.f_code
    own = getattr(inspect.unwrap(function), "__code__", raising)
    return (
        raising.co_code[at.tb_lasti] == dis.opmap["RAISE_VARARGS"]
        and Path(raising.co_filename).parent == Path(own.co_filename).parent
    )


def kept(given: Tensors, found: Tensors) -> None:
    """Raise :class:`Breach` where ``found`` are not the very tensors ``given``, by name."""
    for name in sorted(given.keys() | found.keys()):
        if name not in given or name not in found:
            raise Breach("in place", name, "the network has other parameters than it had")
        if given[name].data_ptr() != found[name].data_ptr():
            raise Breach("in place", name, "it was replaced by another tensor")


@torch.no_grad()
def _copy(source: Tensors, target: Tensors) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _filled(
    tensors: Tensors, fill: Fill, generator: torch.Generator, blank: float
) -> dict[str, Tensor]:
    """Copies that ``fill`` has written into, whose weights were all ``blank`` before."""
    copies = {
        name: torch.full_like(tensor, blank) if name.endswith("weight") else tensor.clone()
        for name, tensor in tensors.items()
    }
    addresses = {name: tensor.data_ptr() for name, tensor in copies.items()}
    returned = fill(copies, generator)
    for name, copy in copies.items():
        original = tensors[name]
        for rule in ("shape", "dtype", "device"):
            before, after = getattr(original, rule), getattr(copy, rule)
            if before != after:
                if rule == "shape":
                    before, after = tuple(before), tuple(after)
                raise Breach(rule, name, f"was {before}, became {after}")
        if copy.data_ptr() != addresses[name]:
            raise Breach("in place", name, "it was replaced by another tensor")
        if isinstance(returned, Tensor) and returned.data_ptr() not in addresses.values():
            raise Breach("in place", name, "another tensor was returned instead")
        if copy.isfinite().all():
            continue
        if name.endswith("weight") and copy.isnan().all():
            raise Breach("finite", name, "nothing was written into it, or NaN only")
        wrong = int((~copy.isfinite()).sum())
        raise Breach("finite", name, f"{wrong} of {copy.numel()} entries are NaN or infinite")
    return copies


def _error(scheme: Scheme, place: str, what: str) -> InitflowError:
    if scheme.provider == BUILT_IN:
        return SettingError(f"scheme '{scheme.spec}' at {place} {what}")
    return PluginError(f"scheme '{scheme.spec}' of {scheme.provider} at {place} {what}")

"""What becomes of tensors in a forward, function by function: a mode that sees each of torch's.

A layer's activation is the first of :data:`ACTIVATIONS` that is applied to what the layer gave, as
a module, function or method, in place or not, at once or after what :data:`BETWEEN` names.

A residual branch is found by what tensors are made of. It is added to a trunk that it was computed
from; or to a trunk which a layer of its own made of the same, as where the widths change.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from initflow.diagnostics.observing import attention, recurrent
from initflow.diagnostics.observing.attention import Projections
from initflow.diagnostics.observing.calls import Call, added_up, is_plain
from initflow.diagnostics.observing.hooks import harmless
from initflow.diagnostics.signals import Branch, sum_of_squares
from initflow.models import batches

PRODUCT = re.compile(r"linear|conv(_transpose)?[123]d|bilinear|embedding(_bag)?")
# Names in torch, torch.nn.functional and Tensor; elementwise functions without chance.
ACTIVATIONS = {
    "celu",
    "elu",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "mish",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "softplus",
    "softsign",
    "tanh",
}
# What keeps the units and their axis.
BETWEEN = re.compile(
    r"(batch|layer|group|instance|rms|local_response)_norm"
    r"|(feature_)?(alpha_)?dropout([123]d)?"
    r"|(adaptive_)?(max|avg)_pool[123]d"
    r"|contiguous|to|float"
)
# What takes a tensor for its shape alone.
SHAPED = re.compile(r".*_like|new_.*")


@dataclass(eq=False)
class Inside:
    """A module of ``name`` that is being called, whose layers are no modules; ``seen`` are they."""

    name: str
    module: nn.Module
    seen: bool = False
    projections: Projections | None = None


class _Before(NamedTuple):
    """Of a function, the call whose output it is applied to, and the random state it may need."""

    call: Call | None = None
    stream: Tensor | None = None


class Observer(Protocol):
    """Who is told of what is inside of modules, and of what fails in looking."""

    def failed(self, error: Exception) -> None: ...

    def projected(self, inside: Inside, weight: Tensor, output: Tensor) -> object:
        """An attention applied ``weight``."""

    def recurred(
        self,
        inside: Inside,
        name: str,
        args: tuple[Any, ...],
        outputs: tuple[Tensor, ...],
        stream: Tensor | None,
    ) -> object:
        """The kernel of ``name`` was called; ``stream`` was the random state if it has dropout."""


class Functions(TorchFunctionMode):
    """Sees every torch function: which weights gave a tensor, and whose activation it becomes."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self._observer = observer
        self.calls: MutableMapping[Tensor, Call] = WeakIdKeyDictionary()
        self.weights: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()
        self.inside: list[Inside] = []  # the innermost is the last
        # What a tensor was computed from: a bit for each call of a layer, and for each tensor that
        # no function gave.
        self._sources: MutableMapping[Tensor, int] = WeakIdKeyDictionary()
        self._bits = (1 << n for n in itertools.count())
        self._by_bit: dict[int, Call] = {}
        self._of_calls = 0
        self._times: Counter[str] = Counter()

    def failed(self, error: Exception) -> None:
        with contextlib.suppress(ReferenceError):  # nobody observes any more
            self._observer.failed(error)

    def enter(self) -> None:
        super().__enter__()  # type: ignore[no-untyped-call]

    def leave(self) -> bool:
        """Take it out of this thread's modes, where others may have come since and stayed.

        Whether it was one of them.
        """
        modes: Any = torch.overrides  # which says nothing of its functions' types
        stack = _modes()
        if self not in stack:
            return False
        above = stack[stack.index(self) + 1 :]
        for _mode in (self, *above):
            modes._pop_mode()  # noqa: SLF001
        for mode in above:
            modes._push_mode(mode)  # noqa: SLF001
        return True

    def gave(self, call: Call, *outputs: Tensor) -> None:
        """Note ``outputs`` as those of a layer's ``call``."""
        bit = next(self._bits)
        self._by_bit[bit.bit_length()] = call
        self._of_calls |= bit
        self._times[call.layer] += 1
        for output in outputs:
            self._sources[output] = self._of(output) | bit

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a part of the forward, into one kernel without us
            return func(*args, **kwargs)
        if self._opens(func, args, kwargs):
            assert attention.OPENED is not None
            with self:
                return attention.OPENED(*args, **kwargs)
        before = self._before(func, args, kwargs) or _Before()
        result = func(*args, **kwargs)
        self._after(func, args, kwargs, before, result)
        return result

    @harmless
    def _opens(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> bool:
        """Whether ``func`` is an attention's, into which is looked."""
        inside = self.inside[-1] if self.inside else None
        if inside is None or not isinstance(inside.module, nn.MultiheadAttention):
            return False
        if not attention.can_be_opened(func, (*args, *kwargs.values()), _modes()):
            return False
        inside.projections = Projections.of(args, kwargs)
        return True

    def _recurs(self, func: Callable[..., Any]) -> bool:
        return bool(self.inside) and recurrent.is_kernel(name_of(func))

    @harmless
    def _before(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> _Before:
        """An activation is taken before it is applied."""
        first, *others = args or (None,)
        call = self.calls.get(first) if isinstance(first, Tensor) else None
        name = name_of(func)
        if name == "add" and len(args) == 2 and all(map(is_plain, args)):
            self._joined(*args, alpha=kwargs.get("alpha", 1))
        if call and not call.activation and name in ACTIVATIONS:
            plain = not any(isinstance(value, Tensor) for value in (*others, *kwargs.values()))
            if plain:
                call.activated(func, *args, **kwargs)
        has_dropout = self._recurs(func) and any(isinstance(x, float) and x > 0 for x in args)
        return _Before(call, torch.get_rng_state() if has_dropout else None)

    @harmless
    def _after(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        before: _Before,
        result: object,
    ) -> None:
        name, call = name_of(func), before.call
        given = [*batches.tensors(result)] or ([args[0]] if name == "__setitem__" else [])
        if given and not SHAPED.fullmatch(name):
            sources = 0
            for x in batches.tensors([*args, *kwargs.values()]):
                sources |= self._of(x)
            for x in given:
                self._sources[x] = sources
        if self._recurs(func):
            self._observer.recurred(self.inside[-1], name, args, tuple(given), before.stream)
        if not isinstance(result, Tensor):
            return
        if PRODUCT.fullmatch(name) and len(args) > 1:
            weight = args[2 if name == "bilinear" else 1]
            self.weights[result] = weight
            if self.inside and self.inside[-1].projections:
                self._observer.projected(self.inside[-1], weight, result)
        elif call and BETWEEN.fullmatch(name):
            self.calls[result] = call
        elif call and result is args[0]:  # changed in place into something else
            del self.calls[result]

    def _of(self, x: Tensor) -> int:
        """What ``x`` was computed from; of one that no function gave, a bit of its own."""
        if x not in self._sources:
            self._sources[x] = 0 if isinstance(x, nn.Parameter) else next(self._bits)
        return self._sources[x]

    def _joined(self, one: Tensor, other: Tensor, *, alpha: float) -> None:
        """Measure the branch, where ``one`` and ``other``, ``alpha`` times, are one and a trunk."""
        if one.shape != other.shape or one.dim() == 0:
            return
        factors = (1.0, alpha)
        for trunk, branch, (of_trunk, of_branch) in (
            (one, other, factors),
            (other, one, factors[::-1]),
        ):
            call = self._last_of(branch, trunk)
            if call:
                its = Branch(_squares(branch, of_branch), _squares(trunk, of_trunk))
                call.branch = added_up([call.branch, its])

    def _last_of(self, branch: Tensor, trunk: Tensor) -> Call | None:
        """The last layer of ``branch``, if it is one that goes on from ``trunk``."""
        its, others = self._sources.get(branch, 0), self._sources.get(trunk, 0)
        own, beside = its & ~others & self._of_calls, others & ~its & self._of_calls
        if not (its & others and own):
            return None
        if beside:
            # A single layer, used once, without a function of its own; and more in the branch.
            shortcut = self._by_bit[beside.bit_length()]
            is_direct = trunk in self.calls and branch in self.calls
            is_single = beside.bit_count() == 1 < own.bit_count()
            if not (is_direct and is_single and self._times[shortcut.layer] == 1):
                return None
        return self._by_bit[own.bit_length()]


def name_of(func: Callable[..., Any]) -> str:
    """As torch spells it, without underscores; nothing for a function of anybody else's."""
    if inspect.isfunction(func) and not func.__module__.startswith("torch."):
        return ""
    name = str(getattr(func, "__name__", "")).partition(".")[0]
    return name if name.startswith("__") else name.rstrip("_")


def _squares(x: Tensor, factor: float) -> Tensor:
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return sum_of_squares(x) * factor**2


def _modes() -> list[Any]:
    """Those of the thread that asks, the uppermost last."""
    stack: Callable[[], list[Any]] = torch.overrides._get_current_function_mode_stack  # noqa: SLF001
    return stack()

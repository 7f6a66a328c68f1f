"""Training watched from outside: every so many steps, its layers' quantities go to MLflow."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from initflow.core import environment
from initflow.core.progress import warn
from initflow.core.secrets import without_credentials
from initflow.diagnostics.observing import hooks
from initflow.diagnostics.observing.hooks import harmless, is_traced
from initflow.diagnostics.recorder import Recorder
from initflow.diagnostics.signals import BY_TIME, QUANTITIES, Signals
from initflow.errors import SettingError, cause, shortened, unknown
from initflow.models import layers
from initflow.tracking import context, runs, unsent

TAG = "initflow.nonfinite"  # what was not finite, and how often
STEP_TAG = "initflow.nonfinite_at_step"  # at the first step where something was not
NOT_MEASURED_TAG = "initflow.not_measured"  # modules with weights that are none of the layers
FAILED_TAG = "initflow.watch_failed"  # the first step that could not be logged, and why
ALL = [*QUANTITIES, *BY_TIME]
NAMED = 10  # as many tensors or modules are named in a tag
PATIENCE = 3  # steps in a row that fail, after which no other is tried
UNSEEN = (
    "the model is updated, and no forward of it with gradients is seen: parts or copies of it are "
    "called, or something compiled that holds it"
)


@contextlib.contextmanager
def watch(
    model: nn.Module,
    *,
    every: int = 100,
    quantities: Iterable[str] | None = None,
    name: str | None = None,
    run_id: str | None = None,
) -> Iterator[None]:
    """Log the quantities of each layer into an MLflow run, while ``model`` trains in a ``with``.

    - ``model``: a ``torch.nn.Module``. It may be wrapped in a ``DataParallel`` or
      ``DistributedDataParallel``, or be compiled: the layers have the names of the model itself.
    - ``every``: a step is logged whose number is a multiple of it (default 100).
    - ``quantities``: which, by their names in :data:`initflow.diagnostics.signals.QUANTITIES` and
      ``BY_TIME``, which say what each is (default None: all).
    - ``name``: put before the layers' names, where one run has several models, or one model twice
      (default None: nothing is).
    - ``run_id``: that of the run to log into, which is left open or closed as it is (default None:
      the active one).

    **Steps.** A step goes from one state of the parameters to the next: all forwards of ``model``
    itself between two updates, with the gradients that come back through them, are one step, and
    the first is step 0. Forwards without gradients (``torch.no_grad``), and those that no gradient
    comes back through, are left out. A step is logged when the next one begins or the ``with``
    ends. Updates are the steps of the parameters' optimizers and other changes in place; one
    through ``parameter.data`` goes unseen.

    **Metrics** have the keys ``quantity/layer`` or, with a name, ``quantity/name.layer``. Gradients
    are those of the loss, whatever a ``torch.amp.GradScaler`` scales it by. What is measured by
    time step is logged of eight at most, evenly chosen, under keys that end in how much of the
    sequence is over: ``hidden_second_moment/lstm.l0.time_000`` to ``…time_100``. Names that MLflow
    does not take are changed to some that it does, never to the same for two.

    **Tags.** The run gets the environment's, unless ``INITFLOW_CONTEXT_TAGS`` is false, and
    ``initflow.not_measured``: the modules that hold weights but are no layers that are measured,
    and those that turn out not to be, with why. Values that are not finite are not logged: the
    first step that has some gets the run ``initflow.nonfinite_at_step`` and ``initflow.nonfinite``,
    which counts the entries that are NaN or infinite.

    **Errors.** Only a wrong call is refused, before the training begins: a
    :class:`initflow.SettingError` for a wrong setting, no model, or no run. The training's bits and
    random numbers are left alone, and nothing that fails later ends it: a step that cannot be
    measured or logged is left out, and the first one reported in the log and the tag
    ``initflow.watch_failed``. So is a model that is updated though no forward of it is seen.

    A compiled model, or a compiled part, runs as it was written at the steps that are recorded. Of
    the processes of a distributed training the one of rank 0 logs what it sees, and the others need
    no run.
    """
    wanted = Wanted.of(every, quantities, name)
    _check(model)
    if is_main_process():
        bare, observing = forwards(model)
        run = runs.active() if run_id is None else runs.of_id(run_id)
        if run is None:
            raise SettingError(
                "watch needs an active MLflow run: open one around it, with mlflow.start_run(): …, "
                "or give run_id"
            )
        with watched(bare, run, wanted, observing):
            yield
    else:
        yield


@dataclass(frozen=True)
class Wanted:
    """What a watching logs, and how often."""

    every: int
    quantities: frozenset[str]
    name: str | None

    @classmethod
    def of(cls, every: int, quantities: Iterable[str] | None, name: str | None) -> Wanted:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise SettingError(f"every must be a whole number of at least 1, not {every!r}")
        if name is not None and not (isinstance(name, str) and name):
            raise SettingError(f"name must be text to stand before layers' names, not {name!r}")
        return cls(every, _known(quantities), name)


def is_main_process() -> bool:
    """Whether it is of rank 0, or the training is not distributed."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    if distributed.is_available() and distributed.is_torchelastic_launched():
        return os.environ.get("RANK", "0") == "0"  # torchrun's, before the group is there
    return True


Observing = Callable[[hooks.ForwardObserver], AbstractContextManager[object]]


def forwards(model: nn.Module) -> tuple[nn.Module, Observing]:
    """The model without what wraps it, and what has its calls and the wrappers' observed."""
    chain = layers.bare(model)
    return chain[-1], lambda observer: hooks.forwards([(one, observer) for one in chain])


@contextlib.contextmanager
def watched(
    model: nn.Module,
    run: runs.Run,
    wanted: Wanted,
    observing: Observing,
    number: Callable[[], int] | None = None,
) -> Iterator[None]:
    """Log into ``run`` what ``model`` does in the forwards that ``observing`` has observed.

    ``number`` gives that of the step that is under way, where another counts them.
    """
    _check(model)
    steps = _Steps(model, wanted.every, _Log(run, wanted.quantities, wanted.name), number)
    steps.start(is_tagged=context.is_on())  # the run may be older than this process's use of us
    with (
        observing(steps.forward),
        hooks.scaled(steps.scaled),
        register_optimizer_step_pre_hook(steps.updating),
        register_optimizer_step_post_hook(steps.updated),
    ):
        try:
            yield
        finally:
            steps.end()


def _check(model: nn.Module) -> None:
    try:
        layers.check(model)
    except SettingError:
        raise
    except Exception:  # noqa: BLE001, S110 - reported when watching begins
        pass


class _Steps:
    """Counts the steps of ``model``, or has them from ``number``, and records some."""

    def __init__(
        self, model: nn.Module, every: int, log: _Log, number: Callable[[], int] | None = None
    ) -> None:
        self._model, self._every, self._log, self._number = model, every, log, number
        self._recorder: Recorder | None = None
        self._parameters: dict[int, nn.Parameter] = {}
        self._updates = self._step = self._state = self._failures = 0
        self._updated_by: set[int] = set()  # optimizers, since the last forward that was seen
        self._unseen = 0  # updates in a row without one
        self._is_seen = False  # any forward at all

    @harmless
    def start(self, *, is_tagged: bool) -> None:
        """Record the first step, and log into the run what is watched."""
        # Tensors of inference mode count no versions.
        known = (p for p in self._model.parameters() if not p.is_inference())
        self._parameters = {id(parameter): parameter for parameter in known}
        self._state = self._version()
        self._step = self._number() if self._number else 0
        if self._step % self._every == 0:
            self._recorder = Recorder(self._model)
        missed = layers.not_measured(self._model)
        self._log.begin(layers.names(self._model), missed, is_tagged=is_tagged)

    @harmless
    def forward(self) -> Callable[[object], object] | None:
        """Before a forward; what is to be called after it, if it is recorded."""
        is_busy = self._recorder and self._recorder.is_busy_elsewhere()
        if is_busy or not torch.is_grad_enabled() or is_traced():
            return None
        self._is_seen, self._unseen = True, 0
        self._updated_by.clear()
        state = self._version()
        step = self._number() if self._number else self._step + (state != self._state)
        if step != self._step:
            self.finish()
            self._step, self._state = step, state
            if self._step % self._every == 0 and self._failures < PATIENCE:
                self._recorder = Recorder(self._model)
        after = self._recorder.begin() if self._recorder else None
        if self._recorder and self._recorder.failure:
            self.finish()  # which leaves the step out
        return _eagerly(after) if after else None

    @harmless
    def updating(self, optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        """Before its step: several may step after a forward that is seen, each of them once."""
        if id(optimizer) not in self._updated_by:
            return
        self.finish()
        self._unseen += 1
        if self._unseen == PATIENCE:
            raise RuntimeError(UNSEEN)

    @harmless
    def updated(self, optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        """Count its step, if it is one of the model's: fused ones leave versions as they are."""
        its = (parameter for group in optimizer.param_groups for parameter in group["params"])
        if any(id(parameter) in self._parameters for parameter in its):
            self._updates += 1
            self._updated_by.add(id(optimizer))

    def scaled(self, scaler: GradScaler, losses: object) -> None:
        if self._recorder:
            self._recorder.scaled(scaler, losses)

    @harmless
    def finish(self) -> None:
        """Log the step, if it was recorded."""
        recorder = self._abandon()
        if recorder and recorder.failure:
            raise recorder.failure
        if recorder and recorder.saw_nothing:
            raise RuntimeError("none of its layers was called: copies of a model have others")
        is_updated = self._version() != self._state
        found = recorder.signals(is_updated=is_updated) if recorder else None
        if found:
            self._log(self._step, found)
            self._failures = 0

    @harmless
    def end(self) -> None:
        """Log what is recorded, and leave nothing behind."""
        self.finish()
        if self._updates and not self._is_seen:
            self.failed(RuntimeError(UNSEEN))
        unsent.flush()

    def failed(self, error: Exception) -> None:
        """Leave the step out."""
        self._abandon()
        self._failures += 1
        self._log.failed(error, self._step)

    def _abandon(self) -> Recorder | None:
        """Record no more of the step; what was recorded."""
        recorder, self._recorder = self._recorder, None
        if recorder:
            recorder.close()
        return recorder

    def _version(self) -> int:
        versions = (parameter._version for parameter in self._parameters.values())  # noqa: SLF001
        return self._updates + sum(versions)


def _eagerly(after: Callable[[object], object]) -> Callable[[object], object]:
    """Have what was compiled run as it was written, until ``after`` is called."""
    eager = contextlib.ExitStack()
    eager.enter_context(hooks.eagerly())

    def end(output: object) -> None:
        eager.close()
        after(output)

    return end


class _Log:
    """Writes what was measured at a step into ``run``."""

    def __init__(self, run: runs.Run, quantities: frozenset[str], name: str | None) -> None:
        self._run, self._quantities, self._name = run, quantities, name
        self._names: dict[str, str] = {}  # as MLflow takes them, by those of the modules
        self._missed: dict[str, str] = {}
        self._is_tagged = self._has_failed = False

    @harmless
    def begin(self, measured: list[str], missed: dict[str, str], *, is_tagged: bool) -> None:
        """Choose the names, give the run its tags, and report which modules are not measured."""
        self._take([*measured, *missed])
        tags = environment.tags() if is_tagged else {}
        tags |= self._not_measured(missed)
        if tags:
            self._run.set_tags(tags)

    def _not_measured(self, missed: Mapping[str, str]) -> dict[str, str]:
        """The tag that names the modules, where some are new; these are reported."""
        new = {name: kind for name, kind in missed.items() if name not in self._missed}
        if not new:
            return {}
        self._take(new)
        self._missed |= new
        told, listed = (
            _listed(f"{self._names[name]} ({kind})" for name, kind in of.items())
            for of in (new, self._missed)
        )
        warn(f"not measured: {told}")
        # Each watching of a run has one of its own.
        key = NOT_MEASURED_TAG if self._name is None else f"{NOT_MEASURED_TAG}.{self._name}"
        return {runs.key_names([key])[key]: listed}

    def __call__(self, step: int, found: Signals) -> None:
        named = found.named()
        self._take(named)
        metrics = {
            f"{quantity}/{self._names[layer]}": value
            for layer, values in named.items()
            for quantity, value in values.items()
            if quantity in self._quantities
        }
        tags = self._not_measured(found.not_measured)
        if tags:
            self._run.set_tags(tags)
        if metrics:
            self._run.log_metrics(step, metrics)
        if found.nonfinite and not self._is_tagged:
            tensors = ((tensor.partition("/"), n) for tensor, n in found.nonfinite.items())
            counts = (f"{kind}/{self._names[layer]}: {n}" for (kind, _, layer), n in tensors)
            self._run.set_tags({TAG: _listed(counts), STEP_TAG: step})
            self._is_tagged = True

    def failed(self, error: Exception, step: int = 0) -> None:
        """Report the first one, as far as that is possible."""
        if self._has_failed:
            return
        self._has_failed = True
        with contextlib.suppress(Exception):
            reason = f"step {step}: {without_credentials(cause(error))}"
            warn(f"watching failed, and the training goes on: {reason}")
            self._run.set_tags({FAILED_TAG: reason})

    def _take(self, names: Iterable[str]) -> None:
        """Give those that are new a name of their own, which they keep."""
        new = [name for name in names if name not in self._names]
        prefix = "" if self._name is None else f"{self._name}."
        taken = {f"{prefix}{name}": short for name, short in self._names.items()}
        shorts = runs.key_names((f"{prefix}{name}" for name in new), taken)
        self._names |= dict(zip(new, shorts.values(), strict=True))


def _listed(parts: Iterable[str]) -> str:
    """One line of a length that a person reads."""
    first = [" ".join(part.split()) for part in itertools.islice(parts, NAMED + 1)]
    text = ", ".join([*first[:NAMED], *["…" for _ in first[NAMED:]]])
    return shortened(text.encode(errors="replace").decode())


def _known(quantities: Iterable[str] | None) -> frozenset[str]:
    if quantities is None:
        return frozenset(ALL)
    if isinstance(quantities, str) or not isinstance(quantities, Iterable):
        quantities = [quantities]
    chosen = list(quantities)
    if not chosen:
        raise SettingError("quantities must name at least one, or be None for all")
    for quantity in chosen:
        if quantity not in ALL:
            raise unknown("quantity", quantity, ALL)
    return frozenset(chosen)

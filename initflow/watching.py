"""Training watched from outside: every so many steps, its layers' quantities go to MLflow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from initflow import context, environment, track, unsent
from initflow.errors import SettingError, unknown
from initflow.inspection import Recorder
from initflow.signals import QUANTITIES, Signals

TAG = "initflow.nonfinite"  # what was not finite, and how often
STEP_TAG = "initflow.nonfinite_at_step"  # at the first step where something was not
NAMED = 10  # as many tensors are named in the tag


@contextlib.contextmanager
def watch(
    model: nn.Module,
    *,
    every: int = 100,
    quantities: Iterable[str] | None = None,
    name: str | None = None,
) -> Iterator[None]:
    """Log the layers' quantities into the active MLflow run, at every ``every``-th step.

    A step goes from one state of the parameters to the next: all forwards of ``model`` itself
    between two updates, with the gradients that come back through them, are one step, and the
    first is step 0. Forwards without gradients (``torch.no_grad``), and those that no gradient
    comes back through, are left out. A step is logged, under the keys ``quantity/layer``, when
    the next one begins or the ``with`` ends. ``quantities`` are names in
    :data:`initflow.signals.QUANTITIES`; None stands for all. ``name`` is put before the layers'
    names (``quantity/name.layer``), where one run has several models, or one model twice.

    The run gets the environment's tags, unless ``INITFLOW_CONTEXT_TAGS`` is false.

    Values that are not finite are not logged. The first step that has some gets the run two
    tags: ``initflow.nonfinite_at_step`` and ``initflow.nonfinite``, which counts the entries
    that are NaN or infinite.

    Updates are the steps of the parameters' optimizers and other changes in place; one through
    ``parameter.data`` goes unseen. The training's bits and random numbers are left alone.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise SettingError(f"every must be a whole number of at least 1, not {every!r}")
    prefix = "" if name is None else f"{name}."
    run = _active()
    steps = _Steps(model, every, _Log(run, _known(quantities), prefix))
    if context.is_on():  # it may have been opened before this process used initflow
        run.set_tags(environment.tags())
    hooks = contextlib.ExitStack()
    try:
        hooks.enter_context(model.register_forward_pre_hook(steps))
        hooks.enter_context(register_optimizer_step_post_hook(steps.updated))
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # the error at hand is the one to tell
            steps.finish()
        raise
    else:
        steps.finish()
    finally:
        steps.abandon()
        hooks.close()
        unsent.settle()


class _Steps:
    """The hook before every forward of ``model``: it counts steps, and records some of them."""

    def __init__(self, model: nn.Module, every: int, log: Callable[[int, Signals], None]) -> None:
        self._model, self._every, self._log = model, every, log
        self._recorder: Recorder | None = Recorder(model)  # step 0 is one of them
        self._parameters = {id(parameter): parameter for parameter in model.parameters()}
        self._updates = 0
        self._step, self._state = 0, self._version()

    def __call__(self, _module: nn.Module, _inputs: object) -> None:
        if not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack():  # noqa: SLF001
            return  # torch.func's transforms give no numbers on the way
        state = self._version()
        if state != self._state:
            self.finish()
            self._step, self._state = self._step + 1, state
            if self._step % self._every == 0:
                self._recorder = Recorder(self._model)
        if self._recorder:
            self._recorder.begin()

    def updated(self, optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        """Count its step, if it is one of the model's: fused ones leave versions as they are."""
        its = (parameter for group in optimizer.param_groups for parameter in group["params"])
        self._updates += any(id(parameter) in self._parameters for parameter in its)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, str]]:
        """A copied or saved model has a hook that does nothing, and needs no initflow."""
        return getattr, (contextlib.nullcontext(), "__exit__")

    def finish(self) -> None:
        """Log the step, if it was recorded."""
        recorder = self.abandon()
        found = recorder.signals() if recorder else None
        if found:
            self._log(self._step, found)

    def abandon(self) -> Recorder | None:
        """Record no more of the step; what was recorded."""
        recorder, self._recorder = self._recorder, None
        if recorder:
            recorder.close()
        return recorder

    def _version(self) -> int:
        versions = (parameter._version for parameter in self._parameters.values())  # noqa: SLF001
        return self._updates + sum(versions)


class _Log:
    """Writes what was measured at a step into ``run``."""

    def __init__(self, run: track.Run, quantities: frozenset[str], prefix: str) -> None:
        self._run, self._quantities, self._prefix = run, quantities, prefix
        self._tagged = False

    def __call__(self, step: int, found: Signals) -> None:
        metrics = {
            f"{quantity}/{self._prefix}{layer}": value
            for layer, values in found.layers.items()
            for quantity, value in values.items()
            if quantity in self._quantities
        }
        if metrics:
            self._run.log_metrics(step, metrics)
        if found.nonfinite and not self._tagged:
            counts = [f"{tensor}: {count}" for tensor, count in found.nonfinite.items()]
            more = ["…"] if len(counts) > NAMED else []
            self._run.set_tags({TAG: ", ".join(counts[:NAMED] + more), STEP_TAG: step})
            self._tagged = True


def _active() -> track.Run:
    run = track.active()
    if run is None:
        raise SettingError(
            "watch needs an active MLflow run: open one around it, with mlflow.start_run(): …"
        )
    return run


def _known(quantities: Iterable[str] | None) -> frozenset[str]:
    if quantities is None:
        return frozenset(QUANTITIES)
    chosen = (
        [quantities]
        if isinstance(quantities, str) or not isinstance(quantities, Iterable)
        else list(quantities)
    )
    if not chosen:
        raise SettingError("quantities must name at least one, or be None for all")
    for quantity in chosen:
        if quantity not in QUANTITIES:
            raise unknown("quantity", quantity, QUANTITIES)
    return frozenset(chosen)

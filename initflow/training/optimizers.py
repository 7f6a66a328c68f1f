"""SGD, Adam and AdamW, their schedules and the clipping of gradients.

On the CPU, bit for bit, what ``torch.optim`` and ``clip_grad_norm_`` do by default, in their order
of operations; the package of optimizers itself takes seconds to import.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from initflow.core.configurations import TrainConfig
from initflow.training.model import Parameters

NAMES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
STATES = {"sgd": 1, "adam": 2, "adamw": 2}  # tensors kept of each parameter, at most
DECAYS = {"adamw": 0.01}  # PyTorch's defaults of the weight decay; 0 of the others
TRIED = 2**14  # numbers on which it is tried whether they round alike wherever they stand
PIECE = 7  # of them at once: fewer than a vectorized loop takes
UNIT = 16  # numbers, of which vectorized loops leave none over


@dataclass(frozen=True)
class Optimizer:
    """How parameters follow from their gradients, by default by plain SGD.

    ``momentum`` and ``nesterov`` are SGD's; ``betas`` and ``eps`` Adam's and AdamW's. The
    ``weight_decay`` is added to the gradient but by AdamW, which shrinks the parameters.
    """

    name: str = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig) -> Optimizer:
        """That of ``config``."""
        decay = config.weight_decay
        decay = DECAYS.get(config.optimizer, 0.0) if decay is None else decay
        if config.optimizer == "sgd":
            momentum, nesterov = config.momentum, config.nesterov
            return cls("sgd", momentum, nesterov and momentum > 0, weight_decay=decay)
        return cls(config.optimizer, betas=config.betas, eps=config.eps, weight_decay=decay)

    @property
    def states(self) -> int:
        """How many tensors of a parameter's shape it keeps of each."""
        return STATES[self.name] if self.name != "sgd" or self.momentum else 0

    def state_like(self, parameter: Tensor) -> list[Tensor]:
        """What it keeps of ``parameter``, before the first step."""
        return [torch.zeros_like(parameter) for _ in range(self.states)]

    def step(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: Sequence[Tensor],
        rate: float,
        number: int,
    ) -> None:
        """The step of this ``number``, the first being 1, in place; spends ``gradient``.

        ``state`` is what :meth:`state_like` gave. Where all of them are 0, as in the gaps of a
        stack, all stays 0.
        """
        if self.name == "sgd":
            self._sgd(parameter, gradient, state, rate)
        else:
            self._adam(parameter, gradient, *state, rate=rate, number=number)

    def _sgd(
        self, parameter: Tensor, gradient: Tensor, state: Sequence[Tensor], rate: float
    ) -> None:
        if _is_of_vectors(parameter, gradient) and _is_fused_alike(torch.get_num_threads()):
            self._fused_sgd(parameter, gradient, state, rate)
        else:
            self._sgd_by_operations(parameter, gradient, state, rate)

    def _fused_sgd(
        self, parameter: Tensor, gradient: Tensor, state: Sequence[Tensor], rate: float
    ) -> None:
        """The same in one pass over the numbers."""
        torch._fused_sgd_(
            [parameter],
            [gradient],
            list(state),
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr=rate,
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=False,
            is_first_step=False,
        )

    def _sgd_by_operations(
        self, parameter: Tensor, gradient: Tensor, state: Sequence[Tensor], rate: float
    ) -> None:
        if self.weight_decay:
            gradient.add_(parameter, alpha=self.weight_decay)
        if self.momentum:
            (velocity,) = state
            velocity.mul_(self.momentum).add_(gradient)
            if self.nesterov:
                gradient.add_(velocity, alpha=self.momentum)
            else:
                gradient = velocity
        parameter.add_(gradient, alpha=-rate)

    def _adam(
        self,
        parameter: Tensor,
        gradient: Tensor,
        first: Tensor,
        second: Tensor,
        *,
        rate: float,
        number: int,
    ) -> None:
        """Of Kingma & Ba (2015), and of Loshchilov & Hutter (2019) with the decay decoupled."""
        beta1, beta2 = self.betas
        if self.weight_decay and self.name == "adamw":
            parameter.mul_(1 - rate * self.weight_decay)
        elif self.weight_decay:
            gradient.add_(parameter, alpha=self.weight_decay)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = rate / (1 - beta1**number)
        scale = (1 - beta2**number) ** 0.5
        denominator = second.sqrt().div_(scale).add_(self.eps)
        parameter.addcdiv_(first, denominator, value=-size)

    def rounds_alike(self) -> bool:
        """Whether a number's step has the same bits wherever it stands in a tensor.

        The vectorized loops of the CPU end with single numbers: where those round like the others,
        tensors that lie side by side can take their steps as one.
        """
        return _rounds_alike(self.name, torch.get_num_threads())


@functools.cache
def _rounds_alike(name: str, _: int) -> bool:
    optimizer = Optimizer(name, momentum=0.9, nesterov=True, weight_decay=0.01)
    parameter, gradient, *state = whole = _for_trial(optimizer.states)
    parts = [tensor.clone() for tensor in whole]
    optimizer.step(parameter, gradient, state, 0.1, 3)
    for pieces in zip(*(torch.split(tensor, PIECE) for tensor in parts), strict=True):
        part, of_gradient, *of_state = pieces
        optimizer.step(part, of_gradient, of_state, 0.1, 3)
    return _left_alike(whole, parts)


def _is_of_vectors(*tensors: Tensor) -> bool:
    """Whether all are on the CPU, in float32, and whole vectors one after the other."""
    return all(
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and tensor.numel() % UNIT == 0
        for tensor in tensors
    )


def _for_trial(states: int) -> list[Tensor]:
    """A parameter, its gradient and so many tensors of state."""
    generator = torch.Generator().manual_seed(0)
    both = [torch.randn(TRIED, generator=generator) for _ in range(2)]
    return both + [torch.rand(TRIED, generator=generator) for _ in range(states)]


@functools.cache
def _is_fused_alike(_: int) -> bool:
    """Whether the fused kernel of SGD rounds like one operation after the other.

    Tried with all that may be set: a product and a sum that are rounded once instead of twice
    differ in many of the numbers. So they are where its vectorized loop leaves some over.
    """
    settings = itertools.product((0.0, 0.9), (False, True), (0.0, 0.01), (TRIED, UNIT))
    for momentum, nesterov, decay, size in settings:
        optimizer = Optimizer("sgd", momentum, nesterov, weight_decay=decay)
        by_operations = _for_trial(optimizer.states)
        fused = _for_trial(optimizer.states)
        parameter, gradient, *state = by_operations
        optimizer._sgd_by_operations(parameter, gradient, state, 0.1)  # noqa: SLF001
        for pieces in zip(*(torch.split(tensor, size) for tensor in fused), strict=True):
            parameter, gradient, *state = pieces
            optimizer._fused_sgd(parameter, gradient, state, 0.1)  # noqa: SLF001
        if not _left_alike(by_operations, fused):
            return False
    return True


def _left_alike(these: Sequence[Tensor], those: Sequence[Tensor]) -> bool:
    """Whether steps have left the same in both, but for the gradient, which is spent."""
    return all(torch.equal(these[at], those[at]) for at in range(len(these)) if at != 1)


def clip_(gradients: Sequence[Tensor], norm: float) -> None:
    """Scale the ``gradients`` of one network so that their norm is at most ``norm``, in place.

    As ``torch.nn.utils.clip_grad_norm_``: the norm of all of them is the norm of the norm of each.
    """
    tensors = list(gradients)
    norms = torch._foreach_norm(tensors, 2.0)  # noqa: SLF001 - torch has no other name for it
    total = torch.linalg.vector_norm(torch.stack(list(norms)), 2.0)
    torch._foreach_mul_(tensors, torch.clamp(norm / (total + 1e-6), max=1.0))


class StackedOptimizer:
    """An optimizer's step, taken by all networks of a stack at once, each with its own settings.

    For devices on which launching an operation takes longer than carrying it out: what differs
    between networks stands in tensors of one number for each, so that what is launched depends
    neither on how many there are nor on the epoch. The numbers are those of :class:`Optimizer`, as
    near as rounding allows.

    ``optimizers`` have for each network that of each tensor, in the order of
    :meth:`Parameters.state`, or one for all of them; ``clips`` the largest norm of its gradient, or
    None. A network that is not in the mask of a step keeps its parameters.
    """

    def __init__(
        self,
        parameters: Parameters,
        gradient: Parameters,
        optimizers: Sequence[Sequence[Optimizer]],
        clips: Sequence[float | None],
    ) -> None:
        every = slice(0, parameters.members)
        self._device = parameters.flat.device
        self._gradients = gradient.parts(every)
        tensors = parameters.parts(every)
        of_all = [optimizer for own in optimizers for optimizer in own]
        self._clip = self._column([torch.inf if clip is None else clip for clip in clips])
        self._has_clip = any(clip is not None for clip in clips)
        states = max(optimizer.states for optimizer in of_all)
        kept = [parameters.zeros_like().parts(every) for _ in range(states)]
        make = _sgd if of_all[0].name == "sgd" else _adam
        self._rates = [torch.zeros(parameters.members, 1, device=self._device) for _ in tensors]
        self._steps = [
            make(
                _Tensors(tensor, own_gradient, [of_state[at] for of_state in kept], rate),
                [own[at if len(own) > 1 else 0] for own in optimizers],
                self._column,
            )
            for at, (tensor, own_gradient, rate) in enumerate(
                zip(tensors, self._gradients, self._rates, strict=True)
            )
        ]

    def _column(self, values: Sequence[float]) -> Tensor:
        """(members, 1) float32."""
        return torch.tensor(values, dtype=torch.float32).unsqueeze(1).to(self._device)

    def set_rates(self, rates: Sequence[Sequence[float]]) -> None:
        """The learning rates of the next steps: of each network one for each tensor, or for all."""
        for at, column in enumerate(self._rates):
            of_tensor = [own[at if len(own) > 1 else 0] for own in rates]
            column.copy_(self._column(of_tensor))

    def step(self, stopped: Tensor, number: Tensor) -> None:
        """The step of this ``number``, the first being 1; spends the gradient.

        ``stopped``: (members, 1) bool, the networks that keep their parameters; ``number``: one
        float64. Both are read as they are when the step is taken.
        """
        if self._has_clip:
            self._scale()
        for step in self._steps:
            step(stopped, number)

    def _scale(self) -> None:
        """As :func:`initflow.training.optimizers.clip_`, of each network."""
        norms = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in self._gradients])
        total = torch.linalg.vector_norm(norms, dim=0).unsqueeze(1)
        factor = torch.clamp(self._clip / (total + 1e-6), max=1.0)
        for part in self._gradients:
            part.mul_(factor)


@dataclass(frozen=True)
class _Tensors:
    """One tensor of all networks: (members, n) each, but for the rate, (members, 1)."""

    parameter: Tensor
    gradient: Tensor
    state: Sequence[Tensor]
    rate: Tensor


Step = Callable[[Tensor, Tensor], None]
Column = Callable[[Sequence[float]], Tensor]


def _sgd(of: _Tensors, optimizers: Sequence[Optimizer], column: Column) -> Step:
    decay = column([one.weight_decay for one in optimizers])
    momentum = column([one.momentum for one in optimizers])
    # What a step takes of the gradient and of the velocity.
    of_gradient = column([float(one.nesterov or not one.momentum) for one in optimizers])
    of_velocity = column(
        [(one.momentum if one.nesterov else 1.0) if one.momentum else 0.0 for one in optimizers]
    )
    has_decay = any(one.weight_decay for one in optimizers)
    is_nesterov = all(one.nesterov for one in optimizers)
    is_velocity = all(one.momentum and not one.nesterov for one in optimizers)

    def step(stopped: Tensor, _number: Tensor) -> None:
        taken = of.gradient
        if has_decay:
            taken.addcmul_(of.parameter, decay)
        if of.state:
            (velocity,) = of.state
            torch.addcmul(taken, velocity, momentum, out=velocity)
            if is_velocity:
                taken = velocity
            else:
                if not is_nesterov:
                    taken.mul_(of_gradient)
                taken.addcmul_(velocity, of_velocity)
        taken.masked_fill_(stopped, 0.0)
        of.parameter.addcmul_(taken, of.rate, value=-1)

    return step


def _adam(of: _Tensors, optimizers: Sequence[Optimizer], column: Column) -> Step:
    decay = column([one.weight_decay for one in optimizers])
    beta1, beta2 = (column([one.betas[at] for one in optimizers]) for at in range(2))
    rest1, rest2 = (column([1 - one.betas[at] for one in optimizers]) for at in range(2))
    eps = column([one.eps for one in optimizers])
    has_decay = any(one.weight_decay for one in optimizers)
    is_decoupled = optimizers[0].name == "adamw"

    def step(stopped: Tensor, number: Tensor) -> None:
        gradient, (first, second) = of.gradient, of.state
        if has_decay and is_decoupled:
            of.parameter.mul_((1 - of.rate * decay).masked_fill(stopped, 1.0))
        elif has_decay:
            gradient.addcmul_(of.parameter, decay)
        first.lerp_(gradient, rest1)
        second.mul_(beta2).addcmul_(gradient, gradient * rest2)
        size = of.rate / (1 - beta1.double() ** number).float()
        scale = (1 - beta2.double() ** number).sqrt().float()
        taken = first / second.sqrt().div_(scale).add_(eps)
        of.parameter.addcmul_(taken.masked_fill_(stopped, 0.0), size, value=-1)

    return step


def learning_rates(config: TrainConfig, factor: float = 1.0) -> list[float]:
    """The rate of each epoch of ``config``, its first one times ``factor``."""
    lr = config.lr * factor
    if config.schedule == "cosine":
        return cosine_rates(lr, config.epochs)
    return step_rates(lr, config.gamma, config.epochs)


def step_rates(lr: float, gamma: float, epochs: int) -> list[float]:
    """Each epoch's rate, multiplied up one by one as ``StepLR`` does."""
    factors = itertools.repeat(gamma, epochs - 1)
    return list(itertools.accumulate(factors, operator.mul, initial=lr))


def cosine_rates(lr: float, epochs: int) -> list[float]:
    """From ``lr`` along half a cosine towards 0, which an epoch after the last would have.

    Each from the one before, as ``CosineAnnealingLR`` does with ``T_max=epochs``.
    """
    heights = [1 + math.cos(math.pi * epoch / epochs) for epoch in range(epochs)]
    factors = (height / before for before, height in itertools.pairwise(heights))
    return list(itertools.accumulate(factors, operator.mul, initial=lr))


def described(config: TrainConfig) -> str:
    """How ``config`` optimizes, in words: ``SGD with lr 0.1, gamma 0.96, momentum 0.9``."""
    optimizer = Optimizer.of(config)
    decays = f"gamma {config.gamma:g}" if config.schedule == "step" else "along a cosine to 0"
    parts = [f"{NAMES[optimizer.name]} with lr {config.lr:g}", decays]
    if optimizer.name != "sgd":
        beta1, beta2 = optimizer.betas
        parts.append(f"betas {beta1:g} and {beta2:g}, eps {optimizer.eps:g}")
    elif optimizer.momentum:
        parts.append(f"{'Nesterov ' if optimizer.nesterov else ''}momentum {optimizer.momentum:g}")
    if optimizer.weight_decay:
        parts.append(f"weight decay {optimizer.weight_decay:g}")
    if config.clip is not None:
        parts.append(f"gradients clipped to norm {config.clip:g}")
    if config.has("base_width"):
        parts.append(f"maximal updates relative to width {config.base_width}")
    return ", ".join(parts)

"""What the first updates change in a network, layer by layer: the coordinate check, of one width.

Yang, Hu et al. (2022, "Tensor Programs V", appendix D.1) have networks of several widths make a few
updates, and look at how the size of what each layer computes goes with the width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from initflow.core.configurations import TrainConfig
from initflow.diagnostics import networks
from initflow.initializers.scheme import Scheme
from initflow.training.model import Parameters, layer_names
from initflow.training.splits import Split, Splits

UPDATES = 4  # that are looked at


@dataclass(frozen=True)
class LayerChange:
    """Of one ``layer`` after ``step`` updates, over images and units.

    ``size`` is the root mean square of its pre-activations, ``change`` that of how far they are
    from those of the untrained network.
    """

    step: int
    layer: str
    size: float
    change: float


def changes(config: TrainConfig, scheme: Scheme, splits: Splits, probe: Split) -> list[LayerChange]:
    """Those of the feed-forward network of ``config`` on ``probe`` in its first updates.

    They are the first of the training that it has anyway, and end with it where it diverges.
    """
    config = replace(config, updates=UPDATES, eval_every=1)
    start = networks.initialize(config, scheme, splits)
    assert isinstance(start, Parameters), "feed-forward networks alone have widths"
    training = networks.Stack([start], [config], [scheme], splits.train)
    found: list[LayerChange] = []
    before: Sequence[Tensor] = ()
    for checkpoint in training.trainer.train(
        batch_size=config.batch_size, eval_every=1, updates=UPDATES
    ):
        if checkpoint.diverged:
            break
        now = training.network(0).observe(probe).preactivations
        before = before or now
        names = layer_names(len(now))
        for name, x, was in zip(names, now, before, strict=True):
            size, change = _root_mean_square(x), _root_mean_square(x - was)
            found.append(LayerChange(checkpoint.step, name, size, change))
    return found


def _root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())

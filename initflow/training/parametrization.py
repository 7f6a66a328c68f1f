"""How rates and the output's weights go with the width: standard, or by maximal updates (μP).

In the standard parametrization the first updates change a wide network's activations the more the
wider it is. In the maximal-update one of Yang, Hu et al. (2022, "Tensor Programs V: Tuning Large
Neural Networks via Zero-Shot Hyperparameter Transfer", Table 3) they change them alike at any
width, so that a rate that suits one suits all. As in the authors' package ``mup``, all is relative
to a base width, at which it is the standard one, to the bit.

Weights are drawn as the scheme says and those of the last layer then scaled, so that their variance
goes with 1/fan_in². Biases start as they do in the standard one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from initflow.core.configurations import TrainConfig

MUP = "mup"


def output_scale(config: TrainConfig, widths: Sequence[int]) -> float:
    """What the last layer's weights are multiplied by in a network of ``widths``, 1 by default."""
    if config.parametrization != MUP or len(widths) < 3:
        return 1.0
    return math.sqrt(config.base_width / widths[-2])


def rate_factors(config: TrainConfig, widths: Sequence[int]) -> list[float]:
    """What the learning rate of each tensor is multiplied by, weight and bias by layer.

    ``widths`` run from the inputs over the hidden layers to the classes. With n(in) and n(out) the
    fans of a weight in units of the base width, 1 where they are those of inputs or classes: by SGD
    n(out)/n(in), by Adam and AdamW 1/n(in); of a bias by SGD n(out), else 1.
    """
    layers = len(widths) - 1
    if config.parametrization != MUP or layers < 2:
        return [1.0] * (2 * layers)
    _, *hidden, _ = widths
    multiples = [1.0, *(width / config.base_width for width in hidden), 1.0]
    factors = []
    for fan_in, fan_out in pairwise(multiples):
        grown = fan_out if config.optimizer == "sgd" else 1.0
        factors += [grown / fan_in, grown]
    return factors

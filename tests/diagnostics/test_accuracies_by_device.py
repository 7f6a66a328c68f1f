"""How accurate networks become, over many seeds, is the same on a GPU as on the CPU.

Rounding drives two trainings of one seed apart, so that single accuracies differ; what must not is
how they are distributed. That is held by the two-sample Kolmogorov-Smirnov test.
"""

from dataclasses import replace

import pytest
import torch
from scipy import stats

from initflow.core import machine
from initflow.core.configurations import TrainConfig
from initflow.diagnostics import record
from initflow.initializers.plugins import find
from initflow.training import datasets, model
from tests import elsewhere

# Of the test. Samples of independent seeds would be told apart so often by chance; those of the
# same seeds, which start from the same weights, are more seldom.
LEVEL = 0.01
CONFIG = TrainConfig(
    dataset="digits", hidden="16", epochs=2, batch_size=50, lr=0.05, eval_every=1_000, probe=0
)


def accuracies(device, seeds, **own):
    """On the test images after training, of the networks of so many seeds, which begin alike."""
    configs = [replace(CONFIG, seed=seed, **own) for seed in range(seeds)]
    splits, scheme = datasets.load(CONFIG), find("he")
    with machine.threads(1):
        records = [record.start(config, scheme, splits) for config in configs]
        record.train_together(records, splits.to(torch.device(device)))
    starts = [model.weights_sha256(one.initial.state()) for one in records]
    return [one.last("accuracy/test") for one in records], starts


def p_value(one, other):
    """How likely samples as far apart as these are, if both are of one distribution."""
    return stats.ks_2samp(one, other).pvalue


def test_the_statistic_is_that_of_kolmogorov_and_smirnov():
    """The largest distance of the two shares below a number, and what it means for 20 numbers."""
    one, other = [at / 20 for at in range(20)], [at / 20 + 0.5 for at in range(20)]
    distance = max(
        abs(sum(x <= number for x in one) - sum(x <= number for x in other)) / 20
        for number in one + other
    )
    assert stats.ks_2samp(one, other).statistic == pytest.approx(distance) == pytest.approx(0.5)
    # Of all ways to mix them, counted as paths from corner to corner that leave a band: those with
    # ten more of one than of the other somewhere.
    ways = {(0, 0): 1}
    for x in range(21):
        for y in range(21):
            if (x or y) and abs(x - y) < 10:
                ways[x, y] = ways.get((x - 1, y), 0) + ways.get((x, y - 1), 0)
    inside, every = ways[20, 20], 137_846_528_820  # 40 over 20
    assert p_value(one, other) == pytest.approx(1 - inside / every, rel=1e-6)


@elsewhere.possible
def test_accuracies_there_are_those_of_the_cpu(monkeypatch):
    """On the device of the tests; another learning rate is told from this one."""
    elsewhere.be_found(monkeypatch)
    here, starts = accuracies("cpu", 30)
    there, same = accuracies(elsewhere.DEVICE, 30)
    assert same == starts
    assert p_value(here, there) > LEVEL
    other, _ = accuracies(elsewhere.DEVICE, 30, lr=0.02)
    assert p_value(here, other) < LEVEL


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
def test_accuracies_on_a_gpu_are_those_of_the_cpu(tf32):
    """Over 100 seeds, with TF32 too."""
    here, starts = accuracies("cpu", 100)
    there, same = accuracies("cuda:0", 100, tf32=tf32)
    assert same == starts
    assert p_value(here, there) > LEVEL

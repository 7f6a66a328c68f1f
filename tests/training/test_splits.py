"""Holding examples out, each class in its share."""

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from initflow.training.splits import parted


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize(
    ("counts", "held_out"),
    [
        ((20, 20, 20, 20), 10),  # all classes are tied
        ((20, 20, 20, 20), 40),
        ((7, 6, 5, 4, 3, 2), 6),
        ((2, 2, 2, 2, 2), 5),
        ((100, 3, 3, 50, 0, 7), 60),
        ((2, 3, 4, 5), 10),  # one of each class is kept
    ],
)
def test_the_split_is_that_of_scikit_learn(counts, held_out, seed):
    """The same examples in the same order, whatever the shares and ties of the classes."""
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.default_rng(seed).permutation(labels)
    expected = train_test_split(
        np.arange(len(labels)), test_size=held_out, stratify=labels, random_state=seed
    )
    kept, others = parted(labels, held_out, seed)
    assert kept.tolist() == expected[0].tolist()
    assert others.tolist() == expected[1].tolist()


def test_a_class_of_one_example_cannot_be_parted():
    """Of it one part would have none."""
    with pytest.raises(ValueError, match=r"only one example of \[3\]"):
        parted(np.array([1, 1, 3, 2, 2]), 3, seed=0)

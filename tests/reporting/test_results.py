"""What every result can show: as values that JSON has."""

import json
import math

import numpy as np
import pytest

from initflow.reporting.results import Result, plain


class Depths(Result):
    """Of two schemes."""

    title = "depths"
    conclusions = ("One is infinite.",)

    def numbers(self):
        yield {"init": "he", "xi_c": math.inf, "n": np.int64(3), "known": True}
        yield {"init": "lecun", "xi_c": np.float32(0.5), "n": None, "known": np.bool_(0)}


def test_a_result_is_plain_values():
    """Its title, sentences, problems and rows; infinity, which JSON does not have, is text."""
    values = Depths().as_json()
    assert json.loads(json.dumps(values, allow_nan=False)) == {
        "title": "depths",
        "conclusions": ["One is infinite."],
        "problems": [],
        "numbers": [
            {"init": "he", "xi_c": "inf", "n": 3, "known": True},
            {"init": "lecun", "xi_c": 0.5, "n": None, "known": False},
        ],
    }


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (-math.inf, "-inf"),
        (math.nan, "nan"),
        (np.float64(0.1), 0.1),
        ({1: (np.nan, [2])}, {"1": ["nan", [2]]}),
        (frozenset({"a"}), "frozenset({'a'})"),
    ],
)
def test_values_that_json_does_not_have(value, written):
    """NumPy's numbers, what is not finite, keys that are no text, and what is no value at all."""
    assert plain(value) == written

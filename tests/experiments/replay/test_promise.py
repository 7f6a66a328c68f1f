"""With which versions the same bits are promised: those that decide them, and no others."""

import pytest

from initflow.experiments.replay import promise
from initflow.experiments.replay.promise import NOT_PROMISED, PROMISED, TESTED


@pytest.mark.parametrize(
    ("changes", "bits", "said"),
    [
        ({}, PROMISED, "."),
        ({"torch": "{torch}+cu132", "scipy": "1.13.0", "torchvision": None}, PROMISED, "."),
        ({"torch": "2.9.0+cpu"}, NOT_PROMISED, ", not with torch 2.9.0+cpu."),
        ({"torch": None, "numpy": "odd"}, NOT_PROMISED, ", not with torch missing and numpy odd."),
        (
            {"torch": "2.6.0+cpu", "numpy": "1.26.0"},
            TESTED,
            "; with torch 2.6.0+cpu and numpy 1.26.0 they are only tested.",
        ),
        ({"torch": "2.6.0"}, NOT_PROMISED, ", not with torch 2.6.0."),
        ({"torch": "2.6.1", "numpy": "1.26.0"}, NOT_PROMISED, "torch 2.6.1 and numpy 1.26.0."),
    ],
    ids=str,
)
def test_what_is_promised_goes_by_torch_and_numpy(installed, changes, bits, said):
    """And names those that are not the pinned ones; tested are the lowest, both of them."""
    pinned = "torch {torch} and numpy {numpy}".format(**installed)
    for name, version in changes.items():
        installed[name] = version and version.format(**installed)
    found = promise.here()
    assert found.bits == bits
    assert found.sentence.startswith(f"The same bits are promised with {pinned}")
    assert found.sentence.endswith(said)

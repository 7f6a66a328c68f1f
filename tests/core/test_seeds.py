"""Random streams."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from initflow.core.seeds import generator, stream_seed


def test_streams_of_a_seed_differ_and_repeat():
    """The same name gives the same numbers, another name others."""
    weights, again = generator(0, "weights"), generator(0, "weights")
    batches = generator(0, "batches")
    drawn = [torch.rand(5, generator=g) for g in (weights, again, batches)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_global_stream_is_left_alone():
    """Making and using generators draws nothing from torch's own."""
    before = torch.get_rng_state()
    torch.rand(3, generator=generator(0, "weights"))
    assert torch.equal(before, torch.get_rng_state())


@given(st.integers(0, 2**63 - 1), st.text(max_size=10))
def test_any_seed_fits_a_generator(seed, stream):
    """63 bits, so that torch and JSON take it as it is."""
    assert 0 <= stream_seed(seed, stream) < 2**63
    generator(seed, stream)


def test_stream_seeds_are_what_earlier_runs_used():
    """Changing the rule would change every seeded result: these values must stay."""
    assert stream_seed(0, "weights") == 3534620555749023109
    assert stream_seed(1, "biases") == 7418288158450755257

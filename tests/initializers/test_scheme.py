"""Specs, arguments and fans."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from initflow.errors import InitflowError, SettingError
from initflow.initializers.activations import ACTIVATIONS
from initflow.initializers.built_in import BUILT_IN
from initflow.initializers.plugins import find
from initflow.initializers.scheme import fans
from initflow.training.model import initialize


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("he", "he"),
        ("he:mode=fan_out", "he:mode=fan_out"),
        (" normal : std = 5e-2 ", "normal:std=0.05"),
        ("he:negative_slope=0.01,mode=fan_avg", "he:negative_slope=0.01,mode=fan_avg"),
        ("sparse:nonzero=3", "sparse:nonzero=3"),
    ],
)
def test_specs_are_read_and_written_back(spec, canonical):
    """A spec finds its scheme, whose own spec finds it again."""
    scheme = find(spec)
    assert scheme.spec == canonical
    assert find(scheme.spec).arguments == scheme.arguments


WRONG = [
    ("hee", "init must be one of zero, constant, normal,", "(did you mean 'he'?)"),
    ("", "init must be one of zero,", "not ''"),
    ("he:", "init must look like name or name:key=value", "'he:'"),
    ("he:fan_out", "init must look like name or name:key=value", "'he:fan_out'"),
    ("he:mode=", "init must look like name or name:key=value", "'he:mode='"),
    ("he:modus=fan_in", "must be one of mode, negative_slope, not 'modus'", "mean 'mode'?"),
    ("he:mode=fan", "he:mode must be one of fan_in, fan_out, fan_avg, not 'fan'", "mean 'fan_"),
    ("zero:std=1", "argument of scheme 'zero' must be one of (none), not 'std'", ""),
    ("he:weight=1", "argument of scheme 'he' must be one of mode,", "not 'weight'"),
    ("he:generator=1", "argument of scheme 'he' must be one of mode,", "not 'generator'"),
    ("normal:std=1,std=2", "gives the argument 'std' twice", ""),
    ("normal:std=abc", "normal:std must be a finite number, not 'abc'", ""),
    ("normal:std=nan", "normal:std must be a finite number, not 'nan'", ""),
    ("normal:std=__import__('os')", "must be a finite number, not '__import__('os')'", ""),
    ("normal:std=-1", "scheme 'normal:std=-1.0': std must be at least 0, not -1.0", ""),
    ("normal:std=1e300", "scheme 'normal:std=1e+300' at fc1 failed: OverflowError", "out of range"),
    (
        "normal:std=1e40",
        "scheme 'normal:std=1e+40' at fc1 breaks the rule 'finite': 12",
        "infinite",
    ),
    ("constant:value=1e39", "scheme 'constant:value=1e+39' at fc1 failed: RuntimeError", ""),
    ("sparse:nonzero=0", "nonzero must be at least 1, not 0", ""),
    ("sparse:nonzero=1.5", "sparse:nonzero must be a whole number, not '1.5'", ""),
]


@pytest.mark.parametrize(("spec", "message", "hint"), WRONG)
def test_wrong_specs_are_named_with_what_would_be_right(spec, message, hint):
    """One line with the bad value, the valid ones and the nearest."""
    with pytest.raises(SettingError) as error:
        initialize((4, 3), find(spec), ACTIVATIONS["relu"], bias_init="zeros", seed=0)
    assert message in str(error.value)
    assert hint in str(error.value)
    assert "\n" not in str(error.value)


@given(st.text(max_size=30) | st.from_regex(r"[a-z_]{2,9}:[a-z]{2,5}=[-0-9a-z.]{1,9}"))
def test_any_text_is_read_or_refused_with_our_error(spec):
    """Nothing is evaluated, and nothing fails in another way."""
    try:
        find(spec)
    except InitflowError:
        return
    assert spec.partition(":")[0].strip() in BUILT_IN


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((256, 784), (784, 256)), ((8, 3, 5), (15, 40)), ((64, 3, 7, 5), (105, 2240))],
)
def test_fans_are_pytorchs(shape, expected):
    """Linear and convolution shapes, against torch's own rule."""
    theirs = torch.nn.init._calculate_fan_in_and_fan_out(torch.empty(shape))
    assert fans(shape) == expected == theirs

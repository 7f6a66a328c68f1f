"""Where a further draw of the weights is expected, by some that were drawn: honest for any model.

What is measured of networks is a product of many chances, and so about log-normal. Of n draws with
logarithms of mean m and standard deviation s, a further one lies with 95 % probability within
m ± t·s·√(1 + 1/n), t being that of Student's distribution with n − 1 degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from initflow.errors import naming_extras
from initflow.theory.prediction import BAND, Interval

FEWEST = 2


def band(draws: Sequence[float]) -> Interval:
    """The mean of ``draws``, which are not negative, and where a further one is expected.

    The median is that of the log-normal law: their geometric mean. Where one of them is 0, infinite
    or NaN, there is no logarithm to go by: the interval then reaches from the least to the
    greatest, or says nothing where one is NaN.
    """
    values = np.asarray(draws, dtype=float)
    if len(values) < FEWEST:
        raise ValueError(f"a band needs at least {FEWEST} draws, not {len(values)}")
    if np.isnan(values).any():
        return Interval(math.nan, 0.0, math.inf, math.nan)
    expected = float(values.mean())
    if not np.isfinite(values).all() or (values <= 0).any():
        least, most, median = values.min(), values.max(), np.median(values)
        return Interval(expected, float(least), float(most), float(median))
    with naming_extras("the band of some draws"):
        from scipy.special import stdtrit  # noqa: PLC0415 - a training needs no scipy.special

    logs = np.log(values)
    n = len(values)
    half = stdtrit(n - 1, BAND[1]) * logs.std(ddof=1) * math.sqrt(1 + 1 / n)
    with np.errstate(over="ignore"):
        low, median, high = np.exp(logs.mean() + half * np.array((-1, 0, 1)))
    return Interval(expected, float(low), float(high), float(median))

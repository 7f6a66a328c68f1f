from .gains import gain
from .infinite_width import MeanField, correlation_map, fixed_point, mean_field, variance_map
from .integrals import (
    expectation,
    pair_expectation,
    product_moment,
    second_moment,
    slope_moment,
    slope_product_moment,
)

__all__ = [
    "MeanField",
    "correlation_map",
    "expectation",
    "fixed_point",
    "gain",
    "mean_field",
    "pair_expectation",
    "product_moment",
    "second_moment",
    "slope_moment",
    "slope_product_moment",
    "variance_map",
]

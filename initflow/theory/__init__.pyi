from .criticality import critical_line
from .gains import gain
from .infinite_width import (
    MeanField,
    MeanFields,
    correlation_map,
    fixed_point,
    fixed_points,
    mean_field,
    mean_fields,
    variance_map,
)
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
    "MeanFields",
    "correlation_map",
    "critical_line",
    "expectation",
    "fixed_point",
    "fixed_points",
    "gain",
    "mean_field",
    "mean_fields",
    "pair_expectation",
    "product_moment",
    "second_moment",
    "slope_moment",
    "slope_product_moment",
    "variance_map",
]

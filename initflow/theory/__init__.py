"""What theory predicts of an untrained network: mean field, and this network with its band.

Variances and activation functions in, numbers out. Nothing is measured here: the room
:mod:`initflow.diagnostics` sets measured beside predicted.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "mean_field": [
            "MeanField",
            "correlation_map",
            "expectation",
            "fixed_point",
            "mean_field",
            "pair_expectation",
            "product_moment",
            "second_moment",
            "slope_moment",
            "slope_product_moment",
            "variance_map",
        ],
    },
)

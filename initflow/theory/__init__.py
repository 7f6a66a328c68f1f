"""What theory predicts of an untrained network: mean field, and this network with its band.

Variances and activation functions in, numbers out. Nothing is measured here: the room
:mod:`initflow.diagnostics` sets measured beside predicted.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "infinite_width": [
            "MeanField",
            "correlation_map",
            "fixed_point",
            "mean_field",
            "variance_map",
        ],
        "integrals": [
            "expectation",
            "pair_expectation",
            "product_moment",
            "second_moment",
            "slope_moment",
            "slope_product_moment",
        ],
    },
)

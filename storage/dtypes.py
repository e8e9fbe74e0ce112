"""The dtypes a store can have, and the scale that suits them.

numpy and zarr have no bfloat16, so it is stored as its bits in uint16. Scales are powers of two, so
scaling loses nothing: what a store rounds is what the dtype itself would round. int8 has a scale
for each row instead, from its largest value.
"""

import math

import numpy as np

_STORED = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
    "int8": np.dtype("i1"),
}
_LARGEST = {
    "float16": 65504.0,
    "bfloat16": 2.0**127 * (2 - 2.0**-7),
    "float32": float(np.finfo(np.float32).max),
}
DTYPES = tuple(_STORED)
"""Names of the dtypes a store can have."""


def stored_dtype(dtype: str) -> np.dtype:
    """The numpy dtype on disk of a store of `dtype`."""
    return _STORED[dtype]


def largest_value(dtype: str) -> float:
    """The largest finite number of a floating-point `dtype`."""
    return _LARGEST[dtype]


def power_of_two_scale(mean_norm: float, d_model: int) -> float:
    """The scale that brings activations of this mean norm to a root mean square near 1/16.

    float16 then keeps full precision down to 1/1000 of the root mean square and overflows beyond
    a million times of it, which massive activations (some thousands of times) never reach.

    Raises:
        ValueError: If the norm is not positive and finite.
    """
    if not (mean_norm > 0 and math.isfinite(mean_norm)):
        raise ValueError(
            f"the mean norm of the activations is {mean_norm}, and must be positive and finite; "
            "check the model's weights and dtype"
        )
    return 2.0 ** round(-4 - math.log2(mean_norm / math.sqrt(d_model)))

"""How activations become the numbers in a chunk: scales, and four dtypes.

numpy and zarr have no bfloat16, so it is stored as its bits in uint16. Scales are powers of two, so
scaling loses nothing: what a store rounds is what the dtype itself would round. int8 has a scale
for each row instead, from its largest value.
"""

import math

import numpy as np
from jaxtyping import Float32, Shaped

_STORED = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
    "int8": np.dtype("i1"),
}
_LARGEST = {
    "float16": np.float32(65504.0),
    "bfloat16": np.float32(2.0**127 * (2 - 2.0**-7)),
    "float32": np.finfo(np.float32).max,
    "int8": np.float32(127.0),
}
DTYPES = tuple(_STORED)
"""Names of the dtypes a store can have."""


def stored_dtype(dtype: str) -> np.dtype:
    """The numpy dtype on disk of a store of `dtype`."""
    return _STORED[dtype]


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


def row_scales(x: Float32[np.ndarray, "rows d_model"]) -> Float32[np.ndarray, " rows"]:
    """Per row, the scale that brings its largest value to 127, so that int8 clips nothing.

    1 for a row of zeros. At most 2^96: below 2^-89 everything is rounded to 0.
    """
    largest = np.abs(x).max(axis=1)
    smallest = np.float32(127 * 2.0**-96)
    scales = np.float32(127) / np.maximum(largest, smallest)
    return np.where(largest > 0, scales, np.float32(1))


def encode(
    x: Float32[np.ndarray, "rows d_model"],
    scale: Float32[np.ndarray, "rows 1"] | Float32[np.ndarray, "1 1"],
    dtype: str,
) -> tuple[Shaped[np.ndarray, "rows d_model"], Shaped[np.ndarray, " rows"]]:
    """Finite activations as stored, and how many values of each row were too large and clipped.

    Rounds to nearest, ties to even. A clipped value becomes the largest finite one of its sign.
    """
    largest = _LARGEST[dtype]
    with np.errstate(over="ignore"):  # what overflows here is counted and clipped below
        scaled = x * scale
    if dtype == "int8":
        np.rint(scaled, out=scaled)
    too_large = np.abs(scaled) > largest
    clipped = too_large.sum(axis=1)
    if clipped.any():
        np.clip(scaled, -largest, largest, out=scaled)
    if dtype == "bfloat16":
        bits = scaled.view(np.uint32)
        # Adding just under half of the last kept bit, and the rest if that bit is odd.
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (rounded >> np.uint32(16)).astype(_STORED[dtype]), clipped
    return scaled.astype(_STORED[dtype]), clipped


def decode(
    stored: Shaped[np.ndarray, "rows d_model"],
    scale: Float32[np.ndarray, "rows 1"] | Float32[np.ndarray, "1 1"],
    dtype: str,
) -> Float32[np.ndarray, "rows d_model"]:
    """Activations in the model's units from what `encode` stored."""
    if dtype == "bfloat16":
        x = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        x = stored.astype(np.float32)
    return np.divide(x, scale, out=x)

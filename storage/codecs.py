"""How the bytes of a chunk are compressed, if they are; the crc32c that follows is not optional.

What is written by hand here is byte for byte what zarr writes with the codecs declared here (a test
compares them). All are deterministic: one thread each, fixed levels.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numcodecs
import numcodecs.blosc
import numcodecs.pcodec
import numpy as np
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.codecs.numcodecs import PCodec

CODECS = ("none", "zstd", "blosc", "pcodec")
"""Names of the codecs a store can have."""

# docs/store_format.md says so: other programs may not know it.
warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr")

_ZSTD_LEVEL, _BLOSC_LEVEL, _PCODEC_LEVEL = 1, 1, 8


def declaration(codec: str, dtype: np.dtype) -> dict[str, Any]:
    """The codecs of an array of `dtype`, as arguments of `zarr.create_array`."""
    if codec == "pcodec":
        return {"serializer": PCodec(level=_PCODEC_LEVEL), "compressors": [Crc32cCodec()]}
    before: dict[str, list[Any]] = {
        "none": [],
        "zstd": [ZstdCodec(level=_ZSTD_LEVEL)],
        "blosc": [
            BloscCodec(
                cname="zstd", clevel=_BLOSC_LEVEL, shuffle="shuffle", typesize=dtype.itemsize
            )
        ],
    }
    return {"compressors": [*before[codec], Crc32cCodec()]}


def compressor(codec: str) -> Callable[[np.ndarray], bytes]:
    """What makes the bytes of a chunk from its rows, of any of `CODECS` but `none`."""
    if codec == "zstd":
        made = numcodecs.Zstd(level=_ZSTD_LEVEL)
    elif codec == "blosc":
        numcodecs.blosc.use_threads = False
        made = numcodecs.Blosc("zstd", _BLOSC_LEVEL, numcodecs.blosc.SHUFFLE)
    else:
        made = numcodecs.pcodec.PCodec(level=_PCODEC_LEVEL)
    return lambda rows: bytes(made.encode(rows))

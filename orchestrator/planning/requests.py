"""How many requests to a bucket writing and reading a store takes."""

import math

from storage.dtypes import stored_dtype
from storage.layout import ROOT_COLUMNS, StoreSpec
from storage.object_store import PART_BYTES


def puts(n_bytes: int) -> int:
    """That write an object: a large one goes up in parts, which are begun and put together."""
    return 1 if n_bytes <= PART_BYTES else math.ceil(n_bytes / PART_BYTES) + 2


def store_puts(spec: StoreSpec) -> int:
    """That write a store: the arrays in parts, a file for each column, and the commit, of each shard."""
    rows = min(spec.shard_rows, spec.n_rows)
    array = rows * spec.d_model * stored_dtype(spec.dtype).itemsize
    each = sum(puts(array) for _ in spec.arrays) + len(spec.columns) + 1
    return spec.n_shards * each


def array_gets(spec: StoreSpec, n_rows: int, n_arrays: int = 1) -> int:
    """That one reader sends for so many rows of some arrays, chunk by chunk.

    Of each shard it also reads the commit, which tokens they are and where; and of an array there the index and its
    own columns, and asks for the length of the file.
    """
    n_chunks = math.ceil(n_rows / spec.chunk_rows)
    n_shards = math.ceil(n_chunks / spec.chunks_per_shard)
    own = (len(spec.columns) - len(ROOT_COLUMNS)) // len(spec.arrays)
    return n_arrays * (n_chunks + n_shards * (2 + own)) + n_shards * 3

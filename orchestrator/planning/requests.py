"""How many requests to a bucket writing and reading a store takes."""

import math

from storage.dtypes import stored_dtype
from storage.layout import ROOT_COLUMNS, StoreSpec
from storage.object_store import PART_BYTES
from storage.tokens import CHUNK_TOKENS, CHUNKS_PER_SHARD


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


def norm_gets(spec: StoreSpec) -> int:
    """That read all norms of a store twice: which tokens they are of once, and commits each time."""
    return spec.n_shards * (2 * len(spec.arrays) + 2 + 2)


def counted_columns(spec: StoreSpec) -> dict[str, int]:
    """The columns that rows are counted by, with the bytes of a row."""
    unused = {"sequence", *(f"{array}/scale" for array in spec.arrays)}
    return {name: dtype.itemsize for name, dtype in spec.columns.items() if name not in unused}


def count_gets(spec: StoreSpec) -> int:
    """That count the rows of a store: of each shard the commit and those columns."""
    return spec.n_shards * (1 + len(counted_columns(spec)))


def token_files(n_sequences: int, context: int) -> int:
    """Files of packed tokens, of one array of a split."""
    return math.ceil(n_sequences / (_token_chunk(context) * CHUNKS_PER_SHARD))


def token_gets(spec: StoreSpec, context: int) -> int:
    """That read the tokens of a store's shards, whose sequences stand anywhere in their split.

    Of each a chunk, and of each file that has one its index; those that several sequences share are read once.
    """
    n_sequences = min(spec.sequences_per_chunk * spec.chunks_per_shard, spec.n_sequences)
    there = (
        math.ceil(spec.n_population / _token_chunk(context)),
        token_files(spec.n_population, context),
    )
    return math.ceil(spec.n_shards * sum(_distinct(n, n_sequences) for n in there))


def _token_chunk(context: int) -> int:
    """Sequences of a chunk."""
    return max(1, CHUNK_TOKENS // context)


def _distinct(n: int, drawn: int) -> float:
    """Of `n`, those that are met in so many draws on average."""
    return n * (1 - (1 - 1 / n) ** drawn)

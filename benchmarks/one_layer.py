"""Stores of one layer for the benchmarks of the store: their specification, filling one, reading all of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from storage.activations import ActivationStore
from storage.encoding import EncodedRows
from storage.hygiene import Hygiene, RowFilter
from storage.layout import StoreSpec

ARRAY = "layers/0"
ALL_ROWS = RowFilter(Hygiene(drop_special_tokens=False), (), {0: 1e9})
"""Drops nothing."""


def one_layer_spec(
    d_model: int,
    n_sequences: int,
    rows_per_sequence: int,
    sequences_per_chunk: int,
    chunks_per_shard: int,
    *,
    dtype: str = "float16",
    codec: str = "none",
    scale: float = 1.0,
) -> StoreSpec:
    """A store of all of its sequences, from position 0 on."""
    return StoreSpec(
        d_model=d_model,
        layers=(0,),
        split="train",
        n_population=n_sequences,
        n_sequences=n_sequences,
        rows_per_sequence=rows_per_sequence,
        first_position=0,
        sequences_per_chunk=sequences_per_chunk,
        chunks_per_shard=chunks_per_shard,
        seed=0,
        dtype=dtype,
        codec=codec,
        scales=(scale,),
    )


def columns_of(spec: StoreSpec, shard: int) -> dict[str, np.ndarray]:
    """The columns of a shard; its tokens are all 0."""
    sequence, position = spec.rows_of(shard)
    return {"sequence": sequence, "position": position, "token_id": np.zeros_like(sequence)}


def filled(folder: Path, spec: StoreSpec, rows_of: Callable[[int], Tensor]) -> ActivationStore:
    """A store with all of its shards, `rows_of(shard)` in the order of `spec.rows_of(shard)`."""
    store = ActivationStore.create(folder, spec)
    for shard in range(spec.n_shards):
        encoded = EncodedRows.of(spec, ARRAY, shard, rows_of(shard))
        store.write_shard(shard, {ARRAY: encoded}, columns_of(spec, shard))
    return store

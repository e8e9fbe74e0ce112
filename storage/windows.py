"""What is mixed with what: segments of shards, windows of chunks, and the batches cut from a window."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64, Shaped, UInt8
from torch import Tensor

from storage.draw import Stream, draw, permutation
from storage.dtypes import stored_dtype
from storage.encoding import decode
from storage.layout import StoreSpec
from storage.row_memory import RowMemory

READING_ORDER = 2
"""Of docs/store_format.md: a cursor is a place in one order of rows. 1 cut segments and windows from the front."""

FEWEST_CHUNKS = 64
"""Of a window."""

LARGEST_WINDOW = 6 * 2**30
"""Bytes beyond which a window is of no more chunks than the fewest."""

_SEQUENCES_PER_ROW = 3.0
"""Of a window, for each row of a batch: W of them give (1 - exp(-1 / W)) * W of what as many draws from very
many give, 0.85, and runs of neighbours take a twentieth of that."""

_RUN_ROWS, _CHUNK_RUNS, _RUN_SHARE = 16, 128, 8
"""Neighbouring kept rows that stay together, at most, as memory gives neighbours faster; pieces that a
chunk is cut into, at least; and sequences of a shard for each row of a run, so that few are of one.
A shard's rows are stored in a random order, so neighbours have no more to do with one another than any
two rows of a shard."""


def in_a_shard(spec: StoreSpec) -> int:
    """Sequences of a whole shard; each of its chunks has rows of all of them."""
    return spec.sequences_per_chunk * spec.chunks_per_shard


def chunks_to_mix(spec: StoreSpec, batch_rows: int) -> int:
    """Chunks of a window of which batches hold 0.8 of the sequences that a uniform draw would, or more.

    A chunk holds rows of all sequences of its shard, and of long sequences a shard holds few: so it takes
    chunks of that many more shards. Not more than the store has shards, nor more than `LARGEST_WINDOW`, which
    contexts of 8,192 tokens and a width of 4,096 would need.
    """
    chunk_bytes = spec.chunk_rows * spec.d_model * stored_dtype(spec.dtype).itemsize
    enough = math.ceil(_SEQUENCES_PER_ROW * batch_rows / in_a_shard(spec))
    return max(FEWEST_CHUNKS, min(enough, spec.n_shards, LARGEST_WINDOW // chunk_bytes))


def segments(n_shards: int, window_chunks: int) -> list[range]:
    """The shards that are mixed with one another, one segment after the other in every epoch.

    As few as can be of at most as many shards as a window has chunks, and alike in size: a last one of what is
    left over would mix few sequences. So an epoch can be read from a store that holds only a few segments at a
    time (`storage.ring`).
    """
    return [range(first, last) for first, last in _alike(n_shards, window_chunks)]


def _alike(n: int, most: int) -> list[tuple[int, int]]:
    """The bounds of as few parts of n as can be, of at most `most` each and alike in size."""
    n_parts = -(-n // most)
    return [(n * i // n_parts, n * (i + 1) // n_parts) for i in range(n_parts)]


def chunk_windows(
    n_chunks: int, chunks_per_shard: int, window_chunks: int, seed: int, epoch: int, segment: int
) -> list[Int64[np.ndarray, " chunks"]]:
    """The chunks of a segment in the seeded order of an epoch, window by window, counted from 0.

    Windows are as few as can be, and alike in size, too. Each takes chunks from as many different shards as it
    can: always from the shards that have the most chunks left, ties broken by the seed, each shard once before
    any comes again.
    """
    order = permutation(n_chunks, seed, Stream.EPOCH_CHUNKS, epoch, segment)
    n_shards = -(-n_chunks // chunks_per_shard)
    shard_of = order // chunks_per_shard
    left = np.bincount(shard_of, minlength=n_shards)
    queues = np.split(order[np.argsort(shard_of, kind="stable")], np.cumsum(left)[:-1])
    windows: list[np.ndarray] = []
    for index, (first, last) in enumerate(_alike(n_chunks, window_chunks)):
        window: list[np.ndarray] = []
        room = last - first
        while room:
            ties = draw(seed, Stream.EPOCH_CHUNKS, epoch, segment, index + 1, np.arange(n_shards))
            chosen = np.lexsort((ties, -left))[: min(room, int((left > 0).sum()))]
            left[chosen] -= 1
            window.append(np.array([queues[shard][left[shard]] for shard in chosen], np.int64))
            room -= len(chosen)
        windows.append(np.concatenate(window))
    return windows


def run_rows(spec: StoreSpec) -> int:
    """Neighbouring kept rows of a window that stay together."""
    return max(1, min(_RUN_ROWS, spec.chunk_rows // _CHUNK_RUNS, in_a_shard(spec) // _RUN_SHARE))


def mixed(
    n_rows: int, spec: StoreSpec, seed: int, epoch: int, segment: int, window: int
) -> Int32[np.ndarray, " rows"]:
    """The kept rows of a window, counted from 0, in short runs that are put in a seeded order."""
    run = run_rows(spec)
    runs = permutation(-(-n_rows // run), seed, Stream.WINDOW_ROWS, epoch, segment, window)
    order = (runs.astype(np.int32)[:, None] * run + np.arange(run, dtype=np.int32)).ravel()
    return order[order < n_rows]  # the last run may be short


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows to train on, as they are stored: half the bytes to bring to a GPU."""

    stored: Shaped[Tensor, "rows d_model"]
    """Numbers of the store's dtype."""

    scale: Float32[Tensor, " rows"]
    """What each row was multiplied by."""

    layer: Int64[Tensor, " rows"]
    """The layer of each."""

    dtype: str
    """Of the store."""

    def __len__(self) -> int:
        return len(self.layer)

    def to(self, device: str) -> "Batch":
        """The same batch on a device; to a GPU while the host goes on."""
        if torch.device(device).type == "cpu":
            return self
        return replace(
            self,
            **{
                name: getattr(self, name).pin_memory().to(device, non_blocking=True)
                for name in ("stored", "scale", "layer")
            },
        )

    @property
    def x(self) -> Float32[Tensor, "rows d_model"]:
        """Activations, in the model's units."""
        return decode(self.stored, self.scale, self.dtype)


class Window(NamedTuple):
    """Chunks that are mixed."""

    chunks: list[Shaped[np.ndarray, "rows d_model"]]
    """Rows as stored, perhaps views of files."""

    begins: Int64[np.ndarray, " chunks"]
    """Where each begins, counted over the window."""

    layers: UInt8[np.ndarray, " rows"]
    scales: Float32[np.ndarray, " rows"]

    order: Int32[np.ndarray, " kept"]
    """The kept rows, mixed."""

    def take(self, start: int, n: int, memory: RowMemory, dtype: str) -> Batch:
        """`n` rows from `start` on in the order of the window, or what is left of it."""
        # Each chunk is gone through once, forwards. Runs are in order already, of which only "stable" makes use.
        rows = np.sort(self.order[start : start + n], kind="stable")
        cuts = [*np.searchsorted(rows, self.begins).tolist(), len(rows)]
        within = rows - np.repeat(self.begins, np.diff(cuts))
        stored = memory.borrow(len(rows))
        for chunk, first, last in zip(self.chunks, cuts[:-1], cuts[1:], strict=True):
            if first < last:
                # All are inside; only "raise" would copy twice.
                chunk.take(within[first:last], 0, stored[first:last], "clip")
        return Batch(
            stored=torch.from_numpy(stored),
            scale=torch.from_numpy(self.scales.take(rows)),
            layer=torch.from_numpy(self.layers.take(rows).astype(np.int64)),
            dtype=dtype,
        )


def joined(parts: list[Batch]) -> Batch:
    """Consecutive parts as one batch."""
    if len(parts) == 1:
        return parts[0]
    return Batch(
        stored=torch.cat([part.stored for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        layer=torch.cat([part.layer for part in parts]),
        dtype=parts[0].dtype,
    )

"""What is mixed with what: segments of shards, windows of chunks, and the batches cut from a window."""

import weakref
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64, Shaped, UInt8
from torch import Tensor

from storage.draw import Stream, draw, permutation
from storage.encoding import decode

_RUN_ROWS, _CHUNK_RUNS = 16, 128
"""Neighbouring kept rows that stay together, at most, as memory gives neighbours faster, and pieces that a
chunk is cut into, at least. A shard's rows are stored in a random order, so neighbours have no more to do
with one another than any two rows of a shard."""


def segments(n_shards: int, window_chunks: int) -> list[range]:
    """The shards that are mixed with one another, one segment after the other in every epoch.

    As many shards as a window has chunks, so that each chunk of a window can be of another shard. So
    an epoch can be read from a store that holds only a few segments at a time (`storage.ring`).
    """
    return [
        range(first, min(first + window_chunks, n_shards))
        for first in range(0, n_shards, window_chunks)
    ]


def chunk_windows(
    n_chunks: int, chunks_per_shard: int, window_chunks: int, seed: int, epoch: int, segment: int
) -> list[Int64[np.ndarray, " chunks"]]:
    """The chunks of a segment in the seeded order of an epoch, window by window, counted from 0.

    Each window takes chunks from as many different shards as it can: always from the shards that
    have the most chunks left, ties broken by the seed, each shard once before any comes again.
    """
    order = permutation(n_chunks, seed, Stream.EPOCH_CHUNKS, epoch, segment)
    n_shards = -(-n_chunks // chunks_per_shard)
    shard_of = order // chunks_per_shard
    left = np.bincount(shard_of, minlength=n_shards)
    queues = np.split(order[np.argsort(shard_of, kind="stable")], np.cumsum(left)[:-1])
    windows = []
    while left.any():
        window: list[np.ndarray] = []
        room = min(window_chunks, int(left.sum()))
        while room:
            ties = draw(
                seed, Stream.EPOCH_CHUNKS, epoch, segment, len(windows) + 1, np.arange(n_shards)
            )
            chosen = np.lexsort((ties, -left))[: min(room, int((left > 0).sum()))]
            left[chosen] -= 1
            window.append(np.array([queues[shard][left[shard]] for shard in chosen], np.int64))
            room -= len(chosen)
        windows.append(np.concatenate(window))
    return windows


def mixed(
    n_rows: int, chunk_rows: int, seed: int, epoch: int, segment: int, window: int
) -> Int32[np.ndarray, " rows"]:
    """The kept rows of a window, counted from 0, in short runs that are put in a seeded order."""
    run = min(_RUN_ROWS, max(1, chunk_rows // _CHUNK_RUNS))
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

    def take(self, start: int, n: int, memory: "BatchMemory", dtype: str) -> Batch:
        """`n` rows from `start` on in the order of the window, or what is left of it."""
        rows = np.sort(self.order[start : start + n])  # each chunk is gone through once, forwards
        cuts = [*np.searchsorted(rows, self.begins).tolist(), len(rows)]
        within = rows - np.repeat(self.begins, np.diff(cuts))
        stored = memory.borrow(len(rows))
        for chunk, first, last in zip(self.chunks, cuts[:-1], cuts[1:], strict=True):
            if first < last:
                # All are inside; only "raise" would copy twice.
                chunk.take(within[first:last], 0, stored[first:last], "clip")
        return Batch(
            stored=torch.from_numpy(stored),
            scale=torch.from_numpy(self.scales[rows]),
            layer=torch.from_numpy(self.layers[rows].astype(np.int64)),
            dtype=dtype,
        )


class BatchMemory:
    """Memory of batches that nobody holds any more, for the next ones.

    Fresh memory is given by the system page by page, which takes as long as the copy into it.
    """

    def __init__(self, n_rows: int, d_model: int, dtype: np.dtype) -> None:
        """For batches of at most so many rows."""
        self._shape, self._dtype = (n_rows, d_model), dtype
        self._free: list[np.ndarray] = []

    def borrow(self, n_rows: int) -> Shaped[np.ndarray, "rows d_model"]:
        """Room for some rows. It is free again when this very array is gone, so no view may outlive it."""
        memory = self._free.pop() if self._free else np.empty(self._shape, self._dtype)
        lent = memory[:n_rows]
        weakref.finalize(lent, self._free.append, memory)
        return lent


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

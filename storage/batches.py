"""Shuffled batches of one array, as a function of (seed, epoch, step) alone.

Each epoch puts the array's chunks in a seeded order and cuts it into windows, so that the chunks of
a window come from different shards wherever that is possible. The kept rows of a window are
permuted; windows follow one another; batches are slices of that sequence. Whole chunks are read,
each once per epoch, and any batch is found without reading what stands before its window.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64

from storage.activations import ActivationStore
from storage.draw import Stream, draw, permutation
from storage.dtypes import stored_dtype
from storage.errors import StoreError
from storage.hygiene import RowFilter


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a batch stands; all that a reader needs to go on from there."""

    epoch: int = 0
    """Passes over the array before this one."""

    step: int = 0
    """Batches of this epoch before this one."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows to train on."""

    x: Float32[np.ndarray, "rows d_model"]
    """Activations, in the model's units."""

    layer: Int64[np.ndarray, " rows"]
    """The layer of each."""


class ShuffledBatches:
    """Endless batches of the kept rows of an array: each exactly once per epoch, well mixed."""

    def __init__(
        self,
        store: ActivationStore,
        array: str,
        row_filter: RowFilter,
        batch_rows: int,
        window_chunks: int,
        seed: int,
    ) -> None:
        """Read the columns of the array once, to know which rows are kept.

        Args:
            store: A complete store.
            array: One of `store.spec.arrays`.
            row_filter: Which rows are kept.
            batch_rows: Rows per batch; the last batch of an epoch may be short.
            window_chunks: Chunks mixed in memory at a time; they are held as stored.
            seed: Decides the order.

        Raises:
            StoreError: If shards are missing, or no row is kept.
        """
        if min(batch_rows, window_chunks) < 1:
            raise StoreError(f"{batch_rows=} and {window_chunks=} must be at least 1")
        missing = store.missing()
        if missing:
            raise StoreError(
                f"{store.place} lacks {len(missing)} of its {store.spec.n_shards} shards; "
                "finish its harvest (the same command again) before reading batches"
            )
        self._store = store
        self._array = array
        self._batch_rows = batch_rows
        self._window_chunks = window_chunks
        self._seed = seed
        self._kept_bits, self._kept_counts = self._scan(row_filter)
        self.n_rows = int(self._kept_counts.sum())
        """Rows that are kept, and so seen in each epoch."""
        if self.n_rows == 0:
            raise StoreError(
                f"the row filter drops all {store.spec.n_rows} rows of {array} in {store.place}; "
                "loosen `hygiene` in the configuration"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an epoch; the last may be short."""
        return -(-self.n_rows // self._batch_rows)

    def batches(self, start: Cursor) -> Iterator[tuple[Cursor, Batch]]:
        """The batches from `start` on, without end, each with its own cursor.

        A step beyond the epoch's last counts on into the next epoch. The stream from any cursor is
        what an unbroken one gives from there.
        """
        epochs, step = divmod(start.step, self.batches_per_epoch)
        epoch = start.epoch + epochs
        while True:
            for batch in self._epoch(epoch, step * self._batch_rows):
                yield Cursor(epoch=epoch, step=step), batch
                step += 1
            epoch, step = epoch + 1, 0

    def _scan(self, row_filter: RowFilter) -> tuple[list[bytes], Int64[np.ndarray, " chunks"]]:
        """Per chunk: which rows are kept, one bit each, and how many."""
        store, array, spec = self._store, self._array, self._store.spec
        bits, counts = [], []
        for shard in range(spec.n_shards):
            span = spec.shard_range(shard)
            keep = row_filter.keep(
                store.column("token_id", *span),
                store.column("position", *span),
                store.row_layers(array, *span),
                store.column(f"{array}/norm", *span),
            )
            for begin in range(0, len(keep), spec.chunk_rows):
                chunk = keep[begin : begin + spec.chunk_rows]
                bits.append(np.packbits(chunk).tobytes())
                counts.append(int(chunk.sum()))
        return bits, np.array(counts, np.int64)

    def _kept(self, chunk: int) -> Bool[np.ndarray, " rows"]:
        start, stop = self._store.spec.chunk_range(chunk)
        packed = np.frombuffer(self._kept_bits[chunk], np.uint8)
        return np.unpackbits(packed, count=stop - start).astype(bool)

    def _epoch(self, epoch: int, skip: int) -> Iterator[Batch]:
        """The batches of an epoch after its first `skip` rows, a multiple of the batch."""
        windows = chunk_windows(
            self._store.spec.n_chunks,
            self._store.spec.chunks_per_shard,
            self._window_chunks,
            self._seed,
            epoch,
        )
        ends = np.cumsum([self._kept_counts[window].sum() for window in windows])
        first = int(np.searchsorted(ends, skip, side="right"))
        offset = skip - (int(ends[first - 1]) if first else 0)
        pending: list[Batch] = []
        for index in range(first, len(windows)):
            for part in self._window(
                windows[index], epoch, index, offset, sum(map(_rows, pending))
            ):
                pending.append(part)
                if sum(map(_rows, pending)) == self._batch_rows:
                    yield _joined(pending)
                    pending = []
            offset = 0
        if pending:
            yield _joined(pending)

    def _window(
        self,
        chunks: Int64[np.ndarray, " chunks"],
        epoch: int,
        index: int,
        offset: int,
        n_pending: int,
    ) -> Iterator[Batch]:
        """A window's rows from `offset` on, cut where batches end that began with `n_pending` rows."""
        store, spec = self._store, self._store.spec
        spans = [spec.chunk_range(int(chunk)) for chunk in chunks]
        begins = np.cumsum([0, *(stop - start for start, stop in spans)])
        rows = np.empty((begins[-1], spec.d_model), stored_dtype(spec.dtype))
        layers = np.empty(begins[-1], np.uint8)
        scales = np.empty(begins[-1], np.float32)
        kept = np.empty(begins[-1], bool)
        for begin, chunk, (start, stop) in zip(begins, chunks, spans, strict=False):
            here = slice(begin, begin + stop - start)
            rows[here] = store.read_stored(self._array, start, stop)
            layers[here] = store.row_layers(self._array, start, stop)
            scales[here] = store.row_scales(self._array, start, stop)
            kept[here] = self._kept(int(chunk))
        candidates = np.flatnonzero(kept)
        order = permutation(len(candidates), self._seed, Stream.WINDOW_ROWS, epoch, index)
        order = candidates[order]
        while offset < len(order):
            take = order[offset : offset + self._batch_rows - n_pending]
            x = store.decode(rows[take], scales[take])
            yield Batch(x=x, layer=layers[take].astype(np.int64))
            offset += len(take)
            n_pending = 0


def chunk_windows(
    n_chunks: int, chunks_per_shard: int, window_chunks: int, seed: int, epoch: int
) -> list[Int64[np.ndarray, " chunks"]]:
    """The chunks of an epoch in seeded order, window by window.

    Each window takes chunks from as many different shards as it can: always from the shards that
    have the most chunks left, ties broken by the seed, each shard once before any comes again.
    """
    order = permutation(n_chunks, seed, Stream.EPOCH_CHUNKS, epoch)
    n_shards = -(-n_chunks // chunks_per_shard)
    shard_of = order // chunks_per_shard
    left = np.bincount(shard_of, minlength=n_shards)
    queues = np.split(order[np.argsort(shard_of, kind="stable")], np.cumsum(left)[:-1])
    windows = []
    while left.any():
        window: list[np.ndarray] = []
        room = min(window_chunks, int(left.sum()))
        while room:
            ties = draw(seed, Stream.EPOCH_CHUNKS, epoch, len(windows) + 1, np.arange(n_shards))
            chosen = np.lexsort((ties, -left))[: min(room, int((left > 0).sum()))]
            left[chosen] -= 1
            window.append(np.array([queues[shard][left[shard]] for shard in chosen], np.int64))
            room -= len(chosen)
        windows.append(np.concatenate(window))
    return windows


def _rows(batch: Batch) -> int:
    return len(batch.layer)


def _joined(parts: list[Batch]) -> Batch:
    """Consecutive parts as one batch."""
    if len(parts) == 1:
        return parts[0]
    return Batch(
        x=np.concatenate([part.x for part in parts]),
        layer=np.concatenate([part.layer for part in parts]),
    )

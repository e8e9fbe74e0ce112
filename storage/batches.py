"""Shuffled batches of one array, as a function of (seed, epoch, step) alone.

An epoch goes through the shards segment by segment. In each, the chunks are put in a seeded order and
cut into windows, so that the chunks of a window come from different shards wherever that is possible.
The kept rows of a window are permuted in short runs; windows follow one another; batches are slices of
that sequence, and inside a batch the rows stand as they do in their chunks. Whole chunks are read, each
once per epoch, and any batch is found without reading what stands before its window. The next window is
read while one is served.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from storage.activations import ActivationStore
from storage.dtypes import stored_dtype
from storage.errors import StoreError
from storage.hygiene import RowFilter
from storage.ring import RingReader
from storage.row_memory import RowMemory
from storage.windows import Batch, Window, chunk_windows, joined, mixed, segments

_PATIENCE_SECONDS = 0.1

_SCANNED_AT_ONCE = 16
"""Shards of an object store whose columns are read together."""


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a batch stands; all that a reader needs to go on from there."""

    epoch: int = 0
    """Passes over the array before this one."""

    step: int = 0
    """Batches of this epoch before this one."""


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
        ring: RingReader | None = None,
    ) -> None:
        """Read nothing yet: columns, which say what rows are kept, are read as their segment comes.

        Args:
            store: A complete store, or a ring.
            array: One of `store.spec.arrays`.
            row_filter: Which rows are kept.
            batch_rows: Rows per batch; the last batch of an epoch may be short.
            window_chunks: Chunks mixed at a time. Uncompressed ones on a disk stay there; of others,
                two windows are held in memory, as stored.
            seed: Decides the order.
            ring: Where the store is one: what asks for the shards.

        Raises:
            StoreError: If shards are missing.
        """
        if min(batch_rows, window_chunks) < 1:
            raise StoreError(f"{batch_rows=} and {window_chunks=} must be at least 1")
        missing = [] if ring else store.missing()
        if missing:
            raise StoreError(
                f"{store.place} lacks {len(missing)} of its {store.spec.n_shards} shards; "
                "finish its harvest (the same command again) before reading batches"
            )
        self._store, self._array = store, array
        self._row_filter, self._ring = row_filter, ring
        self._batch_rows, self._window_chunks, self._seed = batch_rows, window_chunks, seed
        self._memory = RowMemory(batch_rows, store.spec.d_model, stored_dtype(store.spec.dtype))
        self._segments = segments(store.spec.n_shards, window_chunks)
        self._kept: dict[int, bytes] = {}
        """Per chunk whose columns were read, which rows are kept, one bit each."""
        self._counts: dict[int, int] = {}
        """Per such chunk, how many."""

    @property
    def n_rows(self) -> int:
        """Rows that are kept, and so seen in each epoch; all columns are read for it, of a ring in a whole epoch."""
        for segment in self._segments:
            self._scan(segment)
        return sum(self._counts.values())

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an epoch; the last may be short."""
        return -(-self.n_rows // self._batch_rows)

    def batches(self, start: Cursor) -> Iterator[tuple[Cursor, Batch]]:
        """The batches from `start` on, without end, each with its own cursor.

        A step beyond the epoch's last counts on into the next epoch. The stream from any cursor is
        what an unbroken one gives from there.
        """
        epoch, step = start.epoch, start.step
        while True:
            for batch in self._epoch(epoch, step * self._batch_rows):
                yield Cursor(epoch=epoch, step=step), batch
                step += 1
            if self._ring and self._ring.has_left:
                return
            self._refuse_nothing()
            epoch, step = epoch + 1, max(0, step - self.batches_per_epoch)

    def _refuse_nothing(self) -> None:
        if self.n_rows == 0:
            raise StoreError(
                f"the row filter drops all {self._store.spec.n_rows} rows of {self._array} in "
                f"{self._store.place}; loosen `hygiene` in the configuration"
            )

    def _epoch(self, epoch: int, skip: int) -> Iterator[Batch]:
        """The batches of an epoch after its first `skip` rows, a multiple of the batch."""
        pending: list[Batch] = []
        dtype = self._store.spec.dtype
        for window in self._ahead(self._windows(epoch, skip)):
            offset = 0
            while offset < len(window.order):
                wanted = self._batch_rows - sum(map(len, pending))
                part = window.take(offset, wanted, self._memory, dtype)
                offset += len(part)
                pending.append(part)
                if len(part) == wanted:
                    yield joined(pending)
                    pending = []
            del window  # and with it what it holds of the files
        if pending:
            yield joined(pending)

    def _ahead(self, windows: Iterator[Window]) -> Iterator[Window]:
        """The windows, each read while the one before it is used."""
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(next, windows, None)
            try:
                while (window := self._arrived(coming)) is not None:
                    coming = thread.submit(next, windows, None)
                    yield window
                    del window  # what is used up holds nothing while the next one is waited for
            finally:
                with suppress(Exception):  # told already, or of a window that nobody wants
                    self._arrived(coming)
                self._let_go()  # nor does who goes away hold anything

    def _arrived(self, coming: Future[Window | None]) -> Window | None:
        """The next window. Who waits for it has used up all others, and holds nothing back."""
        while True:
            try:
                return coming.result(timeout=_PATIENCE_SECONDS if self._ring else None)
            except TimeoutError:
                if coming.done():
                    raise  # not the time that is waited here, but the work itself
                self._let_go()

    def _let_go(self) -> None:
        if self._ring:
            self._store.forget()
            self._ring.let_go()

    def _windows(self, epoch: int, skip: int) -> Iterator[Window]:
        """The windows of an epoch, the first without the rows that are skipped."""
        held: list[range] = []
        for number, shards in enumerate(self._segments):
            if self._ring:
                # What was passed before has columns still; that is enough to skip it.
                if skip and self._store.has_columns(shards):
                    n_kept = self._n_kept(shards)
                    if skip >= n_kept:
                        skip -= n_kept
                        continue
                then = self._segments[number + 1 :][:1]
                if not self._ring.wait_for(self._store, epoch, shards, then, held):
                    return
                held = [shards]
            self._scan(shards)
            first_chunk = self._chunks(shards).start
            windows = [first_chunk + window for window in self._order(epoch, number)]
            for index, chunks in enumerate(windows):
                n_kept = sum(self._counts[int(chunk)] for chunk in chunks)
                if skip < n_kept:
                    window = self._window(chunks, epoch, number, index)
                    yield window._replace(order=window.order[skip:])
                    if index == 0:  # what came before this segment is used up
                        self._let_go()
                skip = max(0, skip - n_kept)

    def _order(self, epoch: int, segment: int) -> list[Int64[np.ndarray, " chunks"]]:
        return chunk_windows(
            len(self._chunks(self._segments[segment])),
            self._store.spec.chunks_per_shard,
            *(self._window_chunks, self._seed, epoch, segment),
        )

    def _chunks(self, shards: range) -> range:
        """Those of some shards; the store's last shard may have fewer."""
        spec = self._store.spec
        first, last = (shard * spec.chunks_per_shard for shard in (shards.start, shards.stop))
        return range(first, min(last, spec.n_chunks))

    def _scan(self, shards: range) -> None:
        """Read which rows of some shards are kept, if that is not known yet."""
        store, array, spec = self._store, self._array, self._store.spec
        step = 1 if store.place.folder else _SCANNED_AT_ONCE
        for start in range(shards.start, shards.stop, step):
            last = min(start + step, shards.stop) - 1
            first = start * spec.chunks_per_shard
            if first in self._counts:
                continue
            span = spec.shard_range(start)[0], spec.shard_range(last)[1]
            keep = self._row_filter.keep(
                store.column("token_id", *span),
                store.column("position", *span),
                store.row_layers(array, *span),
                store.column(f"{array}/norm", *span),
            )
            for chunk, begin in enumerate(range(0, len(keep), spec.chunk_rows), first):
                rows = keep[begin : begin + spec.chunk_rows]
                self._kept[chunk] = np.packbits(rows).tobytes()
                self._counts[chunk] = int(rows.sum())

    def _n_kept(self, shards: range) -> int:
        """Rows of some shards that are kept."""
        self._scan(shards)
        return sum(self._counts[chunk] for chunk in self._chunks(shards))

    def _is_kept(self, chunk: int) -> Bool[np.ndarray, " rows"]:
        start, stop = self._store.spec.chunk_range(chunk)
        packed = np.frombuffer(self._kept[chunk], np.uint8)
        return np.unpackbits(packed, count=stop - start).astype(bool)

    def _window(
        self, chunks: Int64[np.ndarray, " chunks"], epoch: int, segment: int, index: int
    ) -> Window:
        """Some chunks of an epoch, read, and the order of their kept rows."""
        store, spec = self._store, self._store.spec
        spans = [spec.chunk_range(int(chunk)) for chunk in chunks]
        begins = np.cumsum([0, *(stop - start for start, stop in spans[:-1])])
        kept = np.concatenate([self._is_kept(int(chunk)) for chunk in chunks])
        kept = np.flatnonzero(kept).astype(np.int32)
        order = mixed(len(kept), spec, self._seed, epoch, segment, index)
        return Window(
            chunks=store.chunks(self._array, chunks.tolist()),
            begins=begins,
            layers=np.concatenate([store.row_layers(self._array, *span) for span in spans]),
            scales=np.concatenate([store.row_scales(self._array, *span) for span in spans]),
            order=kept.take(order),
        )

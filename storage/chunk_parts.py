"""The bytes of an array's chunks, made where they are written from.

A chunk's rows lie in the writer's memory in reading order. They are brought into the shard's order a piece
at a time, straight into the memory that goes to the disk; the checksums then find them in the cache of a core.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from storage.bulk_file import PIECE_BYTES, Bytes, Room
from storage.codecs import compressor
from storage.encoding import EncodedRows
from storage.shards import pieces


def chunk_parts(
    rows: EncodedRows, chunk_rows: int, codec: str, room: Room
) -> Iterator[Iterable[Bytes]]:
    """Chunk after chunk, each in parts; the last one is filled up with zeros, as zarr stores it."""
    starts = range(0, len(rows.stored), chunk_rows)
    if codec == "none":
        for start in starts:
            yield _plain(rows, range(start, start + chunk_rows), room)
        return
    compressed = compressor(codec)
    memory = np.empty((chunk_rows, rows.stored.shape[1]), rows.stored.dtype)
    for start in starts:
        rows.copy_into(memory, start)
        yield pieces(compressed(memory))


def _plain(rows: EncodedRows, chunk: range, room: Room) -> Iterator[Bytes]:
    dtype, d_model = rows.stored.dtype, rows.stored.shape[1]
    row_bytes = d_model * dtype.itemsize
    step = max(1, PIECE_BYTES // row_bytes)
    for start in chunk[::step]:
        memory = room(min(step, chunk.stop - start) * row_bytes)
        rows.copy_into(memory.view(dtype).reshape(-1, d_model), start)
        yield memory

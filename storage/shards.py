"""The bytes of a shard, written by hand: a third of the cost of writing through zarr.

The same bytes zarr writes (a test compares them), for two kinds of arrays:
an array of activations has the sharding codec, with the index at the end;
a column has one plain chunk per shard. Every chunk is followed by its crc32c.
"""

import struct
from collections.abc import Iterable, Iterator

import google_crc32c
import numpy as np
from jaxtyping import Int64

from storage.bulk_file import PIECE_BYTES, Bytes

CHECKSUM_BYTES = 4
INDEX_ENTRY_BYTES = 16
_ABSENT = 2**64 - 1


def pieces(data: Bytes) -> Iterator[Bytes]:
    """`data` a little at a time."""
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]


def with_checksum(data: Iterable[Bytes]) -> Iterator[Bytes]:
    """`data` piece by piece, then its crc32c as a little-endian uint32: zarr's crc32c codec."""
    checksum = 0
    for piece in data:
        checksum = google_crc32c.extend(checksum, piece)
        yield piece
    yield struct.pack("<I", checksum)


def without_checksum(data: Bytes) -> Bytes | None:
    """What `with_checksum` was given, or None if the checksum does not match."""
    content = data[:-CHECKSUM_BYTES]
    sound = bytes(data[-CHECKSUM_BYTES:]) == struct.pack("<I", google_crc32c.value(content))
    return content if sound else None


def chunk_places(data: Bytes, chunks_per_shard: int) -> Int64[np.ndarray, "chunks 2"] | None:
    """Where each chunk of a shard begins and ends, its checksum included; None if the index is damaged.

    Absent chunks have no rows.
    """
    size = chunks_per_shard * INDEX_ENTRY_BYTES + CHECKSUM_BYTES
    index = without_checksum(bytes(data[-size:]))
    if index is None:
        return None
    places = np.frombuffer(index, "<u8").reshape(-1, 2)
    places = places[places[:, 0] != _ABSENT].astype(np.int64)
    return np.cumsum(places, axis=1)


def shard_parts(chunks: Iterable[Iterable[Bytes]], chunks_per_shard: int) -> Iterator[Bytes]:
    """The file of a shard, piece by piece as its chunks are given, in order; then the index.

    Chunks that a short last shard lacks are marked absent in the index.
    """
    index = np.full((chunks_per_shard, 2), _ABSENT, "<u8")
    offset = 0
    for i, chunk in enumerate(chunks):
        begin = offset
        for part in with_checksum(chunk):
            offset += len(part)
            yield part
        index[i] = begin, offset - begin
    yield from with_checksum([index.tobytes()])


def shard_file_bytes(n_chunks: int, chunk_bytes: int, chunks_per_shard: int) -> int:
    """Length of the file of a shard that holds `n_chunks` chunks."""
    index = chunks_per_shard * INDEX_ENTRY_BYTES + CHECKSUM_BYTES
    return n_chunks * (chunk_bytes + CHECKSUM_BYTES) + index

"""A file that is written straight to the disk, past the system's memory for files, if it is large.

To copy a shard there is more than half of what writing costs, and drives out what is in use. Small files,
and those of systems that can't write otherwise, go through that memory as usual.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

STAGE_BYTES = 8 * 2**20
"""Written at a time: whole blocks of any disk."""

PIECE_BYTES = 256 * 2**10
"""Made and handed on at a time: who sums it up then finds it in the cache of a core."""

Bytes = bytes | UInt8[np.ndarray, " _"]
"""What is written: bytes, or memory as it is."""

Room = Callable[[int], UInt8[np.ndarray, " n_bytes"]]
"""Gives memory for the next bytes of a file: handed on as they were made there, they need not be copied.

It lasts until room is asked for again, or other bytes are handed on."""

Parts = Callable[[Room], Iterable[Bytes]]
"""The parts of a file one after the other, each to be used before the next is asked for."""

_FREE: list[mmap.mmap] = []
"""Stages that no file needs any more: the system gives fresh memory page by page, which takes its time."""


def _stage_memory() -> mmap.mmap:
    """Begins where a block does, as the disk asks; a last piece may be made behind what is full."""
    try:
        return _FREE.pop()
    except IndexError:
        alone = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # a forked process has its own from then on
        return mmap.mmap(-1, STAGE_BYTES + PIECE_BYTES, flags=alone)


class BulkFile:
    """A new file, written from its begin to its end; to be closed."""

    def __init__(self, path: Path) -> None:
        """Make the file, or empty it.

        Raises:
            OSError: If it can't be written, as do all methods.
        """
        self._file = path.open("wb", buffering=0)
        self._memory = _stage_memory()
        self._stage = np.frombuffer(self._memory, np.uint8)
        self._filled = 0
        self._lent: Bytes | None = None

    def written(self, parts: Iterable[Bytes]) -> Iterator[Bytes]:
        """Write parts one after the other; yields each when it is written."""
        for part in parts:
            self.write(part)
            yield part

    def room(self, n_bytes: int) -> UInt8[np.ndarray, " n_bytes"]:
        """Memory for what is written next; of up to `PIECE_BYTES` it is where that is written from."""
        self._make_room()
        lent = self._stage[self._filled : self._filled + n_bytes]
        if len(lent) < n_bytes:
            return np.empty(n_bytes, np.uint8)
        self._lent = lent
        return lent

    def write(self, part: Bytes) -> None:
        """Add bytes at the end."""
        lent, self._lent = self._lent, None
        if part is lent:
            self._filled += len(part)
            return
        data = np.frombuffer(part, np.uint8)
        while len(data):
            self._make_room()
            taken = data[: STAGE_BYTES - self._filled]
            self._stage[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            data = data[len(taken) :]

    def sync(self) -> None:
        """Bring all of it to the disk."""
        self._make_room()
        self._flush(self._filled)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file; what was not synced may be lost."""
        if not self._file.closed:
            self._file.close()
            _FREE.append(self._memory)

    def _make_room(self) -> None:
        """Write the stage as often as it is full."""
        if self._filled >= STAGE_BYTES:
            self._past_memory(lambda: self._flush(self._filled - self._filled % STAGE_BYTES))

    def _past_memory(self, write: Callable[[], None]) -> None:
        """Do it directly, and where the system refuses that, as usual."""
        descriptor = self._file.fileno()
        usual = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, usual | getattr(os, "O_DIRECT", 0))
            write()
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fcntl.fcntl(descriptor, fcntl.F_SETFL, usual)
            write()
        finally:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, usual)

    def _flush(self, n_bytes: int) -> None:
        """Write the first bytes of the stage; what is behind them moves to its begin.

        Of a disk that is almost full a part is taken, and the next write says so.
        """
        while n_bytes:
            written = self._file.write(memoryview(self._memory)[:n_bytes])
            n_bytes -= written
            self._filled -= written
            self._stage[: self._filled] = self._stage[written : written + self._filled].copy()

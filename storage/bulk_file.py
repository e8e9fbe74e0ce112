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

Bytes = bytes | UInt8[np.ndarray, " _"]
"""What is written: bytes, or the memory of rows as it is."""


class BulkFile:
    """A new file, written from its begin to its end; to be closed."""

    def __init__(self, path: Path) -> None:
        """Make the file, or empty it.

        Raises:
            OSError: If it can't be written, as do all methods.
        """
        self._file = path.open("wb", buffering=0)
        self._memory = mmap.mmap(-1, STAGE_BYTES)  # begins where a block does, as the disk asks
        self._stage = np.frombuffer(self._memory, np.uint8)
        self._filled = 0

    def written(self, parts: Iterable[Bytes]) -> Iterator[Bytes]:
        """Write parts one after the other; yields each when it is written."""
        for part in parts:
            self.write(part)
            yield part

    def write(self, part: Bytes) -> None:
        """Add bytes at the end."""
        data = np.frombuffer(part, np.uint8)
        while len(data):
            taken = data[: STAGE_BYTES - self._filled]
            self._stage[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            data = data[len(taken) :]
            if self._filled == STAGE_BYTES:
                self._past_memory(self._flush)

    def sync(self) -> None:
        """Bring all of it to the disk."""
        self._flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file; what was not synced may be lost."""
        self._file.close()

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

    def _flush(self) -> None:
        while self._filled:
            written = self._file.write(memoryview(self._memory)[: self._filled])
            self._filled -= written
            if self._filled:  # the disk is almost full: the next write says so
                self._stage[: self._filled] = self._stage[written : written + self._filled].copy()

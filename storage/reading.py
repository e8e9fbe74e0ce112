"""Rows of committed shards, whichever way is fastest; each way checks every byte it gives.

A column is one plain chunk per shard. Uncompressed activations on a local disk are read in place,
through a memory map; whatever else through zarr, which checks each chunk itself, unless a `ChunkSource` has it
decoded.
"""

import mmap
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

import numpy as np
import zarr
from jaxtyping import Shaped

from storage.chunk_source import ChunkSource
from storage.commits import CommitLog
from storage.dtypes import stored_dtype
from storage.errors import StoreError
from storage.files import FileRecord, is_cached
from storage.layout import StoreSpec, activation_file
from storage.places import Place
from storage.root import NAME, Root, check_file
from storage.shards import chunk_places, without_checksum

_COLUMN_BYTES = 64 * 2**20
"""Of columns that are kept when they are read: chunks of the same shard ask for them again."""

REQUESTS_AT_ONCE = 16
"""Of a reader, to an object store: each takes longer than its bytes do."""

T = TypeVar("T")

MEND = "`strata verify` names all damage of a run, and `strata harvest` then writes it again"


class ShardReader:
    """Reads stored rows of one store."""

    def __init__(
        self,
        place: Place,
        spec: StoreSpec,
        root: Root,
        commits: CommitLog,
        memory_map: bool,
        shared: ChunkSource | None,
    ) -> None:
        """Read nothing yet.

        Args:
            place: Of the store.
            spec: Its specification.
            root: Its root, which vouches for the metadata that zarr needs.
            commits: Its commit records; they vouch for the files of shards.
            memory_map: Whether uncompressed shards on a disk are read in place; else through zarr too.
            shared: Who is asked first for what is not read in place.
        """
        self._place, self._spec, self._root, self._commits = place, spec, root, commits
        self._folder = place.folder if memory_map and spec.codec == "none" else None
        self._shared = None if self.in_place else shared
        self._seen: set[str] = set()
        self._maps: dict[tuple[str, int], tuple[mmap.mmap, np.ndarray]] = {}
        self._sound: set[tuple[str, int]] = set()
        self._zarr: dict[str, zarr.Array] = {}
        self._columns: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._lock = Lock()
        """Of what is kept, as several threads read."""

    @property
    def in_place(self) -> bool:
        """Whether activations are read through a memory map, which processes of a machine share."""
        return self._folder is not None

    def activations(self, array: str, start: int, stop: int) -> Shaped[np.ndarray, "rows d_model"]:
        """Rows of an array as stored. What lies in one chunk may be a view of the file.

        Raises:
            StoreError: If a shard of theirs is not committed, gone or damaged.
        """
        self._check_range(array, start, stop)
        if self._folder is not None:
            return self._joined(start, stop, self._spec.chunk_rows, self._chunk_of(array))
        if self._shared is not None:
            return self._joined(start, stop, self._spec.chunk_rows, self._shared_chunk_of(array))
        return self._decoded(array, start, stop)

    def chunks(self, array: str, chunks: Sequence[int]) -> list[Shaped[np.ndarray, "rows d_model"]]:
        """Some chunks of an array, as `activations`."""
        return self._each(
            lambda chunk: self.activations(array, *self._spec.chunk_range(chunk)), chunks
        )

    def _decoded(self, array: str, start: int, stop: int) -> np.ndarray:
        """Rows through zarr."""
        key = f"{array}/x"
        for shard in self._shards(start, stop):
            self._check_file(activation_file(array, shard), shard)
        with self._lock:
            if key not in self._zarr:
                check_file(self._place, self._root, f"{key}/{NAME}")
                with self._place.answering(key):
                    self._zarr[key] = zarr.open_array(self._place.zarr_store(), path=key, mode="r")
        try:
            with self._place.answering(key):
                return np.asarray(self._zarr[key][start:stop])
        except ValueError as error:  # what zarr raises where a checksum does not match
            raise StoreError(
                f"rows {start} to {stop} of {self._place}/{key} are damaged ({error}); {MEND}"
            ) from error

    def forget(self) -> None:
        """Let go of all maps; what is still used of them stays until it is not."""
        self._maps.clear()
        self._seen.clear()

    def column(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, " rows"]:
        """Rows of a column.

        Raises:
            StoreError: As `activations`.
        """
        self._check_range(name, start, stop)
        dtype = self._spec.columns[name]
        parts = self._spec.shard_rows
        return self._joined(start, stop, parts, lambda shard: self._column(name, shard), dtype)

    def _column(self, name: str, shard: int) -> np.ndarray:
        """A column of a whole shard; those that were read last are kept."""
        with self._lock:
            if (name, shard) in self._columns:
                self._columns.move_to_end((name, shard))
                return self._columns[name, shard]
        found = self._shared.column(name, shard) if self._shared else None
        found = self._stored_column(name, shard) if found is None else found
        with self._lock:
            self._columns[name, shard] = found
            while sum(column.nbytes for column in self._columns.values()) > _COLUMN_BYTES:
                self._columns.popitem(last=False)
        return found

    def _stored_column(self, name: str, shard: int) -> np.ndarray:
        file = f"{name}/c/{shard}"
        written = self._written(file, shard)
        try:
            data = self._place.read(file)
        except FileNotFoundError:
            data = b""
        if written is None or len(data) != written.n_bytes:
            raise self._gone(file)
        values = without_checksum(data)
        if values is None:
            raise StoreError(f"{self._place}/{file} is damaged; {MEND}")
        return np.frombuffer(values, self._spec.columns[name])

    def _joined(
        self,
        start: int,
        stop: int,
        step: int,
        part_of: Callable[[int], np.ndarray],
        dtype: np.dtype | None = None,
    ) -> np.ndarray:
        """Rows out of parts of `step` rows each."""
        parts = self._each(
            lambda part: part_of(part)[max(start - part * step, 0) : stop - part * step],
            range(start // step, -(-stop // step)),
        )
        if not parts or start == stop:
            width = () if dtype else (self._spec.d_model,)
            return np.empty((0, *width), dtype or stored_dtype(self._spec.dtype))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _each(self, read: Callable[[int], T], numbers: Sequence[int]) -> list[T]:
        """What is read of each, of an object store several at a time."""
        if self._place.folder is not None or len(numbers) < 2:
            return [read(number) for number in numbers]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
            return list(threads.map(read, numbers))

    def _chunk_of(self, array: str) -> Callable[[int], np.ndarray]:
        def chunk_of(chunk: int) -> np.ndarray:
            assert self._folder is not None
            shard, within = divmod(chunk, self._spec.chunks_per_shard)
            data, places = self._map(array, shard)
            begin, end = map(int, places[within])
            if not is_cached(self._folder / activation_file(array, shard), end - 1):
                page = begin - begin % mmap.PAGESIZE
                data.madvise(mmap.MADV_WILLNEED, page, end - page)  # whole, and not page by page
            content = np.frombuffer(data, np.uint8, end - begin, begin)
            if (array, chunk) not in self._sound:  # the first time that this process sees it
                if without_checksum(content) is None:
                    raise StoreError(
                        f"{array}/x, shard {shard}, chunk {within} of {self._place} is damaged; {MEND}"
                    )
                self._sound.add((array, chunk))
            dtype = stored_dtype(self._spec.dtype)
            n_bytes = self._spec.chunk_rows * self._spec.d_model * dtype.itemsize
            return content[:n_bytes].view(dtype).reshape(-1, self._spec.d_model)

        return chunk_of

    def _shared_chunk_of(self, array: str) -> Callable[[int], np.ndarray]:
        def chunk_of(chunk: int) -> np.ndarray:
            assert self._shared is not None
            found = self._shared.chunk(array, chunk)
            return self._decoded(array, *self._spec.chunk_range(chunk)) if found is None else found

        return chunk_of

    def _map(self, array: str, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        """A shard's bytes, never written back, and where each of its chunks begins and ends."""
        found = self._maps.get((array, shard))
        if found is None:
            assert self._folder is not None
            file = self._folder / self._check_file(activation_file(array, shard), shard)
            with file.open("rb") as opened:
                data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            places = chunk_places(np.frombuffer(data, np.uint8), self._spec.chunks_per_shard)
            if places is None:
                raise StoreError(f"the index of {file} is damaged; {MEND}")
            found = self._maps[array, shard] = data, places
        return found

    def _check_range(self, name: str, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self._spec.n_rows:
            raise StoreError(
                f"rows {start} to {stop} of {name}: the store has rows 0 to {self._spec.n_rows}"
            )

    def _shards(self, start: int, stop: int) -> range:
        return range(start // self._spec.shard_rows, -(-stop // self._spec.shard_rows))

    def _check_file(self, name: str, shard: int) -> str:
        """The name of a file of a shard, which must be there: of one that is gone zarr gives zeros.

        In an object store that is asked once, as it costs a request, and zarr's reader is told so.
        """
        if name in self._seen:
            return name
        written = self._written(name, shard)
        if written is None or self._place.size(name) != written.n_bytes:
            raise self._gone(name)
        if self._place.folder is None:
            self._seen.add(name)
        return name

    def _written(self, name: str, shard: int) -> FileRecord | None:
        """What a file of a committed shard was when it was written."""
        try:
            return self._commits.record(shard).files.get(name)
        except FileNotFoundError:
            raise StoreError(
                f"shard {shard} of {self._place} is not committed: its harvest is still running "
                "or was cut short; run the same command again to finish it"
            ) from None

    def _gone(self, name: str) -> StoreError:
        return StoreError(
            f"{self._place}/{name} is gone or has another length than was written; {MEND}"
        )

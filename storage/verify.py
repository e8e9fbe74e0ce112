"""Reads a whole store again and names all damage: array, shard and chunk.

What vouches for what: the root for itself and for the metadata (of a token store, for every file);
a commit record for itself and for the files of its shard.
"""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from storage.commits import CommitLog
from storage.errors import RecordError, StoreError, VersionError
from storage.files import FileRecord
from storage.layout import StoreSpec
from storage.places import Location, place
from storage.root import NAME, Root, read_root
from storage.shards import chunk_places, without_checksum
from storage.tokens import CHUNKS_PER_SHARD, TokenSpec

_DAMAGED, _ANOTHER = "its checksum does not match", "it is not the file that was written"


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A file that is not what was written."""

    file: str
    """Its path inside the store."""

    shard: int | None
    """The shard it belongs to; None for what belongs to the store as a whole."""

    chunks: tuple[int, ...]
    """Which chunks of the shard are damaged, counted from its first; empty where no chunk is."""

    what: str
    """What is wrong."""

    def __str__(self) -> str:
        array = self.file.split("/c/")[0]
        if self.shard is None or array == self.file:
            return f"{self.file}: {self.what}"
        chunks = f", chunk {', '.join(map(str, self.chunks))}" if self.chunks else ""
        return f"{array}, shard {self.shard}{chunks}: {self.what} ({self.file})"


@dataclass(frozen=True)
class _Check:
    file: str
    record: FileRecord
    shard: int | None
    chunks_per_shard: int
    """0 where the file has no index of chunks."""


class Verification:
    """The verification of one store: made, it has read metadata and commit records; `run` does the rest."""

    def __init__(self, location: Location, kind: str, *, complete: bool = False) -> None:
        """Read what vouches for the files.

        Args:
            location: Of the store.
            kind: `activation` or `token`.
            complete: Whether every shard was written, so that one without a record is damage.

        Raises:
            VersionError: If the store is of another version, which is no damage.
        """
        self.place = place(location)
        self.damages: list[Damage] = []
        """What is found so far."""
        self._checks: list[_Check] = []
        self._commits: CommitLog | None = None
        try:
            root = read_root(self.place, kind)
            spec = (StoreSpec if kind == "activation" else TokenSpec).from_json(root.spec)
        except VersionError:
            raise
        except StoreError as error:
            self._found(
                NAME,
                None,
                f"{error}. Its shards were not looked at: verify again when this is mended",
            )
            return
        if json.loads(self.place.read(NAME)) != json.loads(root.to_bytes()):
            self._found(NAME, None, "it is not what was written")
        for file, record in root.files.items():
            self._checks.append(_root_check(file, record))
        if isinstance(spec, StoreSpec):
            self._add_shards(root, spec, complete)

    @property
    def n_bytes(self) -> int:
        """Bytes that `run` reads."""
        return sum(check.record.n_bytes for check in self._checks)

    def run(self, n_threads: int) -> Iterator[int]:
        """Read every file, several at a time; yields the bytes of each as it is done."""
        with ThreadPoolExecutor(n_threads) as pool:
            for check, damage in zip(
                self._checks, pool.map(self._damage, self._checks), strict=True
            ):
                if damage:
                    self.damages.append(damage)
                yield check.record.n_bytes

    def _add_shards(self, root: Root, spec: StoreSpec, complete: bool) -> None:
        self._commits = commits = CommitLog(self.place, spec.digest)
        released, there = set(commits.released()), set(commits.shards())
        for shard in sorted(there | set(range(spec.n_shards if complete else 0))):
            file = f"commits/{shard:06d}.json"
            if shard not in there:
                self._found(file, shard, "it is not there any more, and the shard does not count")
                continue
            try:
                files = commits.record(shard).files
            except RecordError as error:
                self._found(file, shard, str(error))
                continue
            except OSError as error:
                self._found(file, shard, f"it can't be read ({error.strerror or error})")
                continue
            wanted = spec.shard_files(shard) if shard < spec.n_shards else ()
            if set(files) != set(wanted):
                self._found(file, shard, "it names other files than the shard has")
                continue
            for name, record in files.items():
                is_column = name.split("/c/")[0] in spec.columns
                if shard in released and not is_column:
                    continue
                n_chunks = 0 if is_column else spec.chunks_per_shard
                self._checks.append(_Check(name, record, shard, n_chunks))

    def _found(self, file: str, shard: int | None, what: str) -> None:
        self.damages.append(Damage(file=file, shard=shard, chunks=(), what=what))

    def _damage(self, check: _Check) -> Damage | None:
        damage = self._seen(check)
        if damage and self._commits and check.shard is not None and check.chunks_per_shard:
            # Beside a run within a disk budget it may have gone since, or gone and come again.
            damage = None if self._commits.is_released(check.shard) else self._seen(check)
        return damage

    def _seen(self, check: _Check) -> Damage | None:
        try:
            found = self.place.record(check.file)
            if found == check.record:
                return None
            chunks: tuple[int, ...] = ()
            if found.n_bytes != check.record.n_bytes:
                what = f"it has {found.n_bytes} bytes, not the {check.record.n_bytes} written"
            else:
                chunks, what = _located(self.place.read(check.file), check)
        except OSError as error:
            return Damage(
                file=check.file,
                shard=check.shard,
                chunks=(),
                what=f"it can't be read ({error.strerror or error})",
            )
        return Damage(file=check.file, shard=check.shard, chunks=chunks, what=what)


def _located(data: bytes, check: _Check) -> tuple[tuple[int, ...], str]:
    """Which chunks of a file are damaged, told by its index, if it has one, and the checksum of each."""
    if check.shard is None:
        return (), "its bytes are not those that were written"
    if not check.chunks_per_shard:
        damaged = without_checksum(data) is None
        return (0,) if damaged else (), _DAMAGED if damaged else _ANOTHER
    places = chunk_places(data, check.chunks_per_shard)
    if places is None:
        return (), "the index of its chunks is damaged"
    chunks = tuple(i for i, (a, b) in enumerate(places) if without_checksum(data[a:b]) is None)
    return chunks, _DAMAGED if chunks else _ANOTHER


def _root_check(file: str, record: FileRecord) -> _Check:
    """The check of a file that the root vouches for; of a token store these are shards too."""
    if "/c/" not in file:
        return _Check(file, record, None, 0)
    return _Check(file, record, int(file.split("/c/")[1].split("/")[0]), CHUNKS_PER_SHARD)


def damaged_shards(damages: Iterable[Damage]) -> list[int]:
    """The shards that must be written again, ascending."""
    return sorted({damage.shard for damage in damages if damage.shard is not None})

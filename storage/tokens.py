"""Packed token ids (`tokens.zarr`): what the language model reads, in contexts of one length.

Splits are groups of a Zarr v3 store, each with two arrays (sequences, context): `ids` and `document`.
The root's `zarr.json` is written last, so a store exists whole or not at all, and nothing ever changes
in one that exists.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import UnionType
from typing import Any

import numpy as np
import zarr
from jaxtyping import Int64, Integer, UInt32
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from storage.errors import StoreError
from storage.files import FileRecord, is_partial
from storage.json_kinds import check_kinds
from storage.metadata import has_metadata
from storage.places import Location, Place, place
from storage.root import NAME, Root, check_file, read_root, write_root

CHUNK_TOKENS = 2**14
"""Tokens per chunk (64 KiB unpacked): a harvest reads sequences in random order."""

CHUNKS_PER_SHARD = 256
"""Chunks per file: a billion tokens are 240 files per array."""


_KINDS: dict[str, type | UnionType] = {
    "context": int,
    "first_position": int,
    "separator_id": int | None,
    "special_ids": list,
    "tokenizer": str,
}
"""Of the values of a specification."""


@dataclass(frozen=True, kw_only=True)
class TokenSpec:
    """How the contexts of a store were made; written into it."""

    context: int
    """Tokens per sequence."""

    first_position: int
    """First position whose activation is stored: 1 where a BOS opens every context, else 0."""

    separator_id: int | None
    """Token between documents; None where the tokenizer has none, and they follow one another."""

    special_ids: tuple[int, ...]
    """Ids that stand for no text, sorted: dropped when activations are read."""

    tokenizer: str
    """Fingerprint of the tokenizer; another one makes other ids of the same text."""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "TokenSpec":
        """The specification, of its JSON values.

        Raises:
            StoreError: If a key is missing or unknown, or a value of another kind.
        """
        check_kinds(data, _KINDS)
        ids = {f"special_ids[{i}]": value for i, value in enumerate(data["special_ids"])}
        check_kinds(ids, dict.fromkeys(ids, int))
        return cls(**{**data, "special_ids": tuple(ids.values())})


class TokenStore:
    """Sequences of packed token ids, in splits that share no document."""

    def __init__(self, where: Place, spec: TokenSpec, root: Root) -> None:
        self.place = where
        self.spec = spec
        self._root = root
        self._zarr: dict[str, zarr.Array] = {}

    @classmethod
    def open(cls, location: Location) -> "TokenStore":
        """The store at a place, for reading.

        Raises:
            StoreError: If there is none, or this version of Strata can't read it.
        """
        where = place(location)
        root = read_root(where, "token")
        try:
            spec = TokenSpec.from_json(root.spec)
        except StoreError as error:
            raise StoreError(f"{where}: {error}") from None
        for name, record in root.files.items():  # zarr reads a file that is gone as zeros
            if where.size(name) != record.n_bytes:
                raise StoreError(
                    f"{where}/{name} is gone or has another length than the {record.n_bytes} bytes that "
                    "were written; `strata verify` names all damage of a run, and `strata harvest` "
                    "then packs the text again"
                )
        return cls(where, spec, root)

    @property
    def fingerprint(self) -> str:
        """The same for stores that hold the same tokens."""
        return self._root.crc32c

    @property
    def context(self) -> int:
        """Tokens per sequence."""
        return self.spec.context

    @property
    def first_position(self) -> int:
        """First position whose activation is stored."""
        return self.spec.first_position

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of tokens that stand for no text."""
        return self.spec.special_ids

    def n_sequences(self, split: str) -> int:
        """Sequences of a split."""
        return self._array(split, "ids").shape[0]

    def ids(
        self, split: str, sequences: Integer[np.ndarray, " n"]
    ) -> Int64[np.ndarray, "n context"]:
        """Token ids of the sequences asked for, in that order."""
        return self._rows(split, "ids", sequences).astype(np.int64)

    def documents(
        self, split: str, sequences: Integer[np.ndarray, " n"]
    ) -> UInt32[np.ndarray, "n context"]:
        """Index in the corpus of the document that every token belongs to."""
        return self._rows(split, "document", sequences)

    def _rows(
        self, split: str, array: str, sequences: Integer[np.ndarray, " n"]
    ) -> UInt32[np.ndarray, "n context"]:
        try:
            with self.place.answering(f"{split}/{array}"):
                return np.asarray(self._array(split, array).oindex[sequences, :])
        except ValueError as error:  # how zarr reports a checksum that does not match
            raise StoreError(
                f"{self.place}: {split}/{array} is damaged ({error}); `strata verify` names all "
                "damage of a run, and `strata harvest` then packs the text again"
            ) from error

    def _array(self, split: str, array: str) -> zarr.Array:
        splits = sorted({name.split("/")[0] for name in self._root.files})
        if split not in splits:
            raise StoreError(
                f"{self.place} has no split '{split}', it has {', '.join(splits)}; "
                "name one of these, or harvest again into another run directory"
            )
        key = f"{split}/{array}"
        if key not in self._zarr:
            check_file(self.place, self._root, f"{key}/{NAME}")
            with self.place.answering(key):
                self._zarr[key] = zarr.open_array(self.place.zarr_store(), path=key, mode="r")
        return self._zarr[key]


class TokenWriter:
    """Writes a token store, its splits in any interleaving, to be ended by `seal`.

    What a writer that was never sealed left behind is removed by the next one of that path.
    """

    def __init__(self, location: Location, spec: TokenSpec, sequences: Mapping[str, int]) -> None:
        where = place(location)
        if has_metadata(where):
            raise StoreError(
                f"{where} exists already, and a token store never changes; use it, or delete it to "
                "pack the text again"
            )
        _clear(where)
        self._place, self._spec = where, spec
        self._made: dict[str, Buffer] = {}  # what zarr has written and the place has not got yet
        self._files: dict[str, FileRecord] = {}
        memory = zarr.open_group(MemoryStore(self._made), mode="w-")
        self._splits = {
            split: _SplitWriter(memory.create_group(split), n, spec.context)
            for split, n in sequences.items()
        }

    def seal(self) -> None:
        """Make the store exist; every split must have got the sequences it was declared with."""
        for split in self._splits.values():
            split.flush()
        self._hand_over("")
        write_root(self._place, Root(spec=asdict(self._spec), files=self._files))

    def append(
        self,
        split: str,
        ids: UInt32[np.ndarray, "n context"],
        documents: UInt32[np.ndarray, "n context"],
    ) -> None:
        """Add sequences at the end of a split.

        Raises:
            StoreError: If the place can't be written.
        """
        self._splits[split].append(ids, documents)
        self._hand_over("/c/")

    def _hand_over(self, part: str) -> None:
        """Write what zarr has made under a name with `part` in it; the root's file is our own."""
        for name in [name for name in self._made if part in name and name != NAME]:
            self._files[name] = self._place.write(name, [self._made[name].to_bytes()])
            if "/c/" in name:
                del self._made[name]


def _clear(where: Place) -> None:
    """Remove what a writer that was killed has left, and nothing else."""
    names = where.names()
    others = [
        name for name in names if not (name.endswith(NAME) or "/c/" in name or is_partial(name))
    ]
    if others:
        raise StoreError(
            f"{where} holds {others[0]}, which is no part of a token store; give a place that is "
            "empty, or remove what is there"
        )
    for name in names:
        where.delete(name)


class _SplitWriter:
    """Gathers sequences of a split and writes whole shards, since a part would rewrite its shard."""

    def __init__(self, group: zarr.Group, n_sequences: int, context: int) -> None:
        chunk = max(1, CHUNK_TOKENS // context)
        self._shard = chunk * CHUNKS_PER_SHARD
        self._arrays = [
            group.create_array(
                name,
                shape=(n_sequences, context),
                chunks=(chunk, context),
                shards=(self._shard, context),
                dtype=np.uint32,
                compressors=[ZstdCodec(level=1), Crc32cCodec()],
                fill_value=0,
                dimension_names=("sequence", "position"),
            )
            for name in ("ids", "document")
        ]
        self._n_sequences = n_sequences
        self._n_written = 0
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._n_pending = 0

    def append(self, *columns: UInt32[np.ndarray, "n context"]) -> None:
        ids, documents = columns
        while len(ids):
            room = self._shard - self._n_pending
            self._pending.append((ids[:room], documents[:room]))
            self._n_pending += len(ids[:room])
            ids, documents = ids[room:], documents[room:]
            if self._n_pending == self._shard:
                self._write()

    def flush(self) -> None:
        """Write what is left; a split must have got the sequences it was declared with."""
        if self._pending:
            self._write()
        assert self._n_written == self._n_sequences, (self._n_written, self._n_sequences)

    def _write(self) -> None:
        stop = self._n_written + self._n_pending
        for array, parts in zip(self._arrays, zip(*self._pending, strict=True), strict=True):
            array[self._n_written : stop] = np.concatenate(parts)
        self._n_written, self._n_pending = stop, 0
        self._pending.clear()

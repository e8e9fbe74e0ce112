"""Packed token ids (`tokens.zarr`): what the language model reads, in contexts of one length.

Splits are groups of a Zarr v3 store, each with two arrays (sequences, context): `ids` and `document`.
A writer fills a folder beside the store and renames it at the end, so a store exists whole or not
at all, and nothing ever changes in one that exists.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from jaxtyping import Int64, Integer, UInt32
from zarr.codecs import Crc32cCodec, ZstdCodec

from storage.errors import StoreError
from storage.files import sync

FORMAT_VERSION = 1
"""Raised when a program that knows only the former would misread a store."""

CHUNK_TOKENS = 2**14
"""Tokens per chunk (64 KiB unpacked): a harvest reads sequences in random order."""

CHUNKS_PER_SHARD = 256
"""Chunks per file: a billion tokens are 240 files per array."""


@dataclass(frozen=True, kw_only=True)
class TokenSpec:
    """How the contexts of a store were made; written into it."""

    context: int
    """Tokens per sequence."""

    first_position: int
    """First position whose activation is stored: 1 where a BOS opens every context, else 0."""

    separator_id: int
    """Token between documents."""

    special_ids: tuple[int, ...]
    """BOS, EOS, padding and separator ids, sorted: dropped when activations are read."""

    tokenizer: str
    """Fingerprint of the tokenizer; another one makes other ids of the same text."""


class TokenStore:
    """Sequences of packed token ids, in splits that share no document."""

    def __init__(self, path: Path, spec: TokenSpec, root: zarr.Group) -> None:
        self.path = path
        self.spec = spec
        self._root = root

    @classmethod
    def open(cls, path: Path) -> "TokenStore":
        """The store at `path`, for reading.

        Raises:
            StoreError: If there is none, or this version of Strata can't read it.
        """
        if not path.is_dir():
            raise StoreError(f"there is no token store at {path}; `strata harvest` makes it")
        try:
            root = zarr.open_group(path, mode="r")
            attributes = root.attrs.asdict()
            version = attributes["strata_format"]
            spec = cast("dict[str, Any]", attributes["spec"])
        except (KeyError, OSError, ValueError) as error:
            raise StoreError(
                f"{path} is not a token store ({error!r}); give the folder of one, or delete it "
                "and harvest again"
            ) from error
        if version != FORMAT_VERSION:
            raise StoreError(
                f"{path} has format version {version}, and this Strata reads {FORMAT_VERSION}; "
                "use the Strata that wrote it, or harvest again into another run directory"
            )
        spec["special_ids"] = tuple(spec["special_ids"])
        return cls(path, TokenSpec(**spec), root)

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
            return np.asarray(self._array(split, array).oindex[sequences, :])
        except ValueError as error:  # how zarr reports a checksum that does not match
            raise StoreError(
                f"{self.path}: {split}/{array} is damaged ({error}); delete the store and what was "
                "made from it, and run again"
            ) from error

    def _array(self, split: str, array: str) -> zarr.Array:
        if split not in self._root:
            raise StoreError(
                f"{self.path} has no split '{split}', it has {', '.join(sorted(self._root))}; "
                "name one of these, or harvest again into another run directory"
            )
        return cast("zarr.Array", self._root[f"{split}/{array}"])


class TokenWriter:
    """Writes a token store, its splits in any interleaving, to be ended by `seal`.

    What a writer that was never sealed left behind is removed by the next one of that path.
    """

    def __init__(self, path: Path, spec: TokenSpec, sequences: Mapping[str, int]) -> None:
        if path.exists():
            raise StoreError(
                f"{path} exists already, and a token store never changes; use it, or delete it to "
                "pack the text again"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")
        shutil.rmtree(self._partial, ignore_errors=True)  # of a process that was killed
        root = zarr.open_group(self._partial, mode="w-")
        self._splits = {
            split: _SplitWriter(root.create_group(split), n, spec.context)
            for split, n in sequences.items()
        }
        root.attrs.update({"strata_format": FORMAT_VERSION, "spec": asdict(spec)})

    def seal(self) -> None:
        """Make the store exist; every split must have got the sequences it was declared with."""
        for split in self._splits.values():
            split.flush()
        for name in self._partial.rglob("*"):
            sync(name)
        self._partial.rename(self._path)
        sync(self._path.parent)

    def append(
        self,
        split: str,
        ids: UInt32[np.ndarray, "n context"],
        documents: UInt32[np.ndarray, "n context"],
    ) -> None:
        """Add sequences at the end of a split."""
        self._splits[split].append(ids, documents)


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

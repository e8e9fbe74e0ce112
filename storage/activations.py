"""The activation store: rows of activations with their columns, written shard by shard.

A shard has one writer, so there is no lock; what it holds is a pure function of the specification,
the model and the tokens, so writing it again is harmless; it counts when its commit record exists,
which is written last. docs/store_format.md says it byte for byte.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float32, Shaped, UInt8

from storage.bulk_file import Bytes, Room
from storage.chunk_parts import chunk_parts
from storage.chunk_source import ChunkSource
from storage.commits import CommitLog, LayerTotals, ShardRecord
from storage.encoding import EncodedRows, decode
from storage.errors import RowsError, StoreError
from storage.files import FileRecord
from storage.layout import ROOT_COLUMNS, StoreSpec, activation_file
from storage.metadata import has_metadata, write_metadata
from storage.places import Location, Place, place
from storage.reading import ShardReader
from storage.root import Root, read_root
from storage.shards import pieces, shard_parts, with_checksum


class ActivationStore:
    """Activations of several layers or groups at the same token positions, at one place."""

    def __init__(
        self,
        where: Place,
        spec: StoreSpec,
        root: Root,
        memory_map: bool,
        shared: ChunkSource | None = None,
    ) -> None:
        """Use `create` or `open`."""
        self.place = where
        self.spec = spec
        self._commits = CommitLog(where, spec.digest)
        self._reader = ShardReader(where, spec, root, self._commits, memory_map, shared)
        self._scales = np.ones(spec.layers[-1] + 1, np.float32)
        self._scales[list(spec.layers)] = spec.scales

    @classmethod
    def create(cls, location: Location, spec: StoreSpec) -> "ActivationStore":
        """The store at a place, made now or already there with the same specification.

        One that was made without a `source` (format version 2) may be of any; if its root is gone, it is made
        again without one, and so its shards count.

        Killed in the middle and called again, it starts over: the root's metadata come last. To be
        called by one process, before the writers start.

        Raises:
            StoreError: If another store is there.
        """
        where = place(location)
        without = replace(spec, source="")
        if not has_metadata(where):
            lacked_source = CommitLog(where, without.digest).has_sound()
            write_metadata(where, without if lacked_source else spec)
        store = cls.open(where)
        if store.spec != (spec if store.spec.source else without):
            raise StoreError(
                f"{where} is there with another specification ({store.spec.difference(spec)}); "
                "restore what was changed, delete the store, or choose another run directory"
            )
        return store

    @classmethod
    def open(
        cls, location: Location, *, memory_map: bool = True, shared: ChunkSource | None = None
    ) -> "ActivationStore":
        """The store at a place, for reading or for writing more of its shards.

        Args:
            location: A place, a path or a URL.
            memory_map: Read uncompressed shards on a disk in place, several times faster than through zarr;
                the numbers are the same.
            shared: Who is asked first for activations that are not read in place, and for columns.

        Raises:
            StoreError: If there is none, or this version of Strata can't read it.
        """
        where = place(location)
        root = read_root(where, "activation")
        try:
            spec = StoreSpec.from_json(root.spec)
        except StoreError as error:
            raise StoreError(f"{where}: {error}") from None
        return cls(where, spec, root, memory_map, shared)

    @property
    def in_place(self) -> bool:
        """Whether activations are read through a memory map, which processes of a machine share."""
        return self._reader.in_place

    # Writing

    def missing(self) -> list[int]:
        """The shards that are still to be written, or again after a release, ascending."""
        there = set(self._commits.shards()) - set(self._commits.released())
        return sorted(set(range(self.spec.n_shards)) - there)

    def has_columns(self, shards: range) -> bool:
        """Whether all of some shards are written, or were before their activations were released."""
        return set(shards) <= set(self._commits.shards())

    def committed(self) -> dict[int, ShardRecord]:
        """The commit records of the shards that are written, ascending.

        Raises:
            StoreError: If a record is damaged or belongs to another store.
        """
        return self._commits.committed()

    def record(self, shard: int) -> ShardRecord | None:
        """The commit record of a shard, None while there is none or its activations are gone.

        Raises:
            StoreError: If it is damaged or belongs to another store.
        """
        if shard not in self._commits or self._commits.is_released(shard):
            return None
        return self._commits.record(shard)

    def release(self, shard: int, unless: Callable[[], bool] = lambda: False) -> bool:
        """Delete a committed shard's activations; its columns and record stay.

        Killed in the middle and called again, it goes on. `write_shard` brings them back.

        Args:
            shard: Which.
            unless: Asked when the shard already counts as missing: whether it is to stay after all.

        Returns:
            Whether its activations are gone.
        """
        if not self._commits.is_released(shard):
            self._commits.mark_released(shard)
            if unless():
                self._commits.mark_whole(shard)
                return False
        for array in self.spec.arrays:
            self.place.delete(activation_file(array, shard))
        return True

    def forget(self) -> None:
        """Let go of all files that are mapped: a file that is released takes up disk until then."""
        self._reader.forget()

    def write_shard(
        self,
        index: int,
        arrays: Mapping[str, EncodedRows],
        columns: Mapping[str, Shaped[np.ndarray, " rows"]],
        n_threads: int = 1,
    ) -> ShardRecord:
        """Write a shard whole and commit it; a committed one is left as it is, unless released.

        Args:
            index: Of the shard.
            arrays: For each of `spec.arrays`, the rows, or what puts them into the order of `spec.rows_of`.
            columns: `sequence`, `position` and `token_id` of each row. Layers are derived.
            n_threads: Arrays written at a time, each with a chunk of memory; the bytes are the same.

        Raises:
            StoreError: If something is missing or of another length, if sequence and position are
                not those of the shard, or if an activation is not finite.
        """
        committed = self.record(index)
        if committed is not None:
            return committed
        start, stop = self.spec.shard_range(index)
        self._check_complete(index, stop - start, arrays, columns)
        sequence, position = self.spec.rows_of(index)
        if not (
            np.array_equal(columns["sequence"], sequence)
            and np.array_equal(columns["position"], position)
        ):
            raise StoreError(
                f"the rows given for shard {index} are not in its order; take sequence and position "
                "from spec.rows_of(shard)"
            )
        files: dict[str, FileRecord] = {}
        layers: dict[int, LayerTotals] = {}
        for name, dtype in ROOT_COLUMNS.items():
            self._write_column(name, index, columns[name].astype(dtype), files)

        def write(array: str) -> tuple[dict[str, FileRecord], dict[int, LayerTotals]]:
            row_layers = self.spec.row_layers(array, sequence, position)
            return self._write_array(array, index, arrays[array], row_layers)

        with ThreadPoolExecutor(n_threads) as threads:
            for array_files, array_layers in threads.map(write, arrays):
                files |= array_files
                layers |= array_layers
        record = ShardRecord(shard=index, rows=stop - start, files=files, layers=layers)
        self._commits.write(record)
        if self._commits.is_released(index):
            self._commits.mark_whole(index)
        return record

    def _write_array(
        self,
        array: str,
        index: int,
        rows: EncodedRows,
        row_layers: UInt8[np.ndarray, " rows"],
    ) -> tuple[dict[str, FileRecord], dict[int, LayerTotals]]:
        """One array of a shard, with its columns: their files, and what it holds of each layer."""
        files: dict[str, FileRecord] = {}
        norm = rows.noted("norm")
        self._check_finite(array, index, norm, row_layers)
        key = activation_file(array, index)

        def parts(room: Room) -> Iterable[Bytes]:
            chunks = chunk_parts(rows, self.spec.chunk_rows, self.spec.codec, room)
            return shard_parts(chunks, self.spec.chunks_per_shard)

        files[key] = self.place.compose(key, parts)
        self._write_column(f"{array}/norm", index, norm, files)
        if self.spec.groups:
            self._write_column(f"{array}/layer", index, row_layers, files)
        if self.spec.dtype == "int8":
            self._write_column(f"{array}/scale", index, rows.noted("scale"), files)
        layers = self.spec.layers_of(array)
        return files, {layer: _totals(rows, row_layers == layer) for layer in layers}

    def _check_complete(
        self,
        index: int,
        n_rows: int,
        arrays: Mapping[str, EncodedRows],
        columns: Mapping[str, np.ndarray],
    ) -> None:
        stored = {name: rows.stored for name, rows in arrays.items()}
        for kind, given, wanted in (
            ("arrays", stored, set(self.spec.arrays)),
            ("columns", columns, set(ROOT_COLUMNS)),
        ):
            if set(given) != wanted:
                raise StoreError(
                    f"shard {index} of {self.place} takes the {kind} {sorted(wanted)}, "
                    f"got {sorted(given)}; give each of them"
                )
            for name, rows in given.items():
                shape = (n_rows, self.spec.d_model) if kind == "arrays" else (n_rows,)
                if rows.shape != shape:
                    raise StoreError(
                        f"{name} of shard {index} of {self.place} has the shape {rows.shape}, "
                        f"and must have {shape}; give all rows of the shard at once"
                    )

    def _check_finite(
        self,
        array: str,
        index: int,
        norm: Float32[np.ndarray, " rows"],
        row_layers: UInt8[np.ndarray, " rows"],
    ) -> None:
        finite = np.isfinite(norm)
        if not finite.all():
            layers = sorted({int(layer) for layer in row_layers[~finite]})
            sequence, position = self.spec.rows_of(index)
            first = int(np.argmin(finite))
            raise RowsError(
                f"{(~finite).sum()} of {len(finite)} activations for {array}, shard {index}, or their norms "
                f"are not finite (layer {', '.join(map(str, layers))}; the first at position {position[first]} of "
                f"sequence {sequence[first]} of {self.spec.split}), and other arrays were not looked at; only "
                "finite ones can be stored: run the model in another dtype (model.dtype: float32 or bfloat16), "
                "or check its weights"
            )

    def _write_column(
        self, name: str, index: int, values: np.ndarray, files: dict[str, FileRecord]
    ) -> None:
        key = f"{name}/c/{index}"
        filled = np.zeros(self.spec.shard_rows, values.dtype)  # as zarr stores the last chunk
        filled[: len(values)] = values
        files[key] = self.place.write(key, with_checksum(pieces(filled.view(np.uint8))))

    # Reading

    def read(self, array: str, start: int, stop: int) -> Float32[np.ndarray, "rows d_model"]:
        """Rows `start` to `stop` of an array, in the model's units.

        Raises:
            StoreError: If a shard of theirs is not committed, gone or damaged.
        """
        stored = torch.from_numpy(self.read_stored(array, start, stop))
        scales = torch.from_numpy(self.row_scales(array, start, stop))
        return decode(stored, scales, self.spec.dtype).numpy()

    def read_stored(self, array: str, start: int, stop: int) -> Shaped[np.ndarray, "rows d_model"]:
        """Rows of an array as they are on disk; `storage.encoding.decode` makes activations of them.

        Whole chunks are read, whatever part of them is asked. What lies in one chunk may be a view
        of the file, to be left as it is.

        Raises:
            StoreError: As `read`.
        """
        self.spec.layers_of(array)
        return self._reader.activations(array, start, stop)

    def chunks(self, array: str, chunks: Sequence[int]) -> list[Shaped[np.ndarray, "rows d_model"]]:
        """Chunks of an array as stored, by their numbers; of an object store several at a time.

        Raises:
            StoreError: As `read_stored`.
        """
        return self._reader.chunks(array, chunks)

    def row_scales(self, array: str, start: int, stop: int) -> Float32[np.ndarray, " rows"]:
        """What each row of an array was multiplied by before it was rounded.

        Raises:
            StoreError: As `read`.
        """
        if self.spec.dtype == "int8":
            return self.column(f"{array}/scale", start, stop)
        return self._scales[self.row_layers(array, start, stop)]

    def rounding_fvu(self) -> dict[int, float]:
        """Per layer, the FVU of the stored rows against the float32 rows they were made from.

        The fraction of variance that rounding alone leaves unexplained; lower is better. Measured
        while int8 is written, over all committed shards, the variance about the mean of each shard.

        Raises:
            StoreError: If the store is not int8, where nothing was measured, or has no shard.
        """
        records = self.committed().values()
        if self.spec.dtype != "int8" or not records:
            raise StoreError(
                f"{self.place} has the dtype {self.spec.dtype} and {len(records)} shards; the cost of "
                "rounding is measured for int8, in shards that are written: harvest some"
            )
        sums = {
            layer: [
                sum(getattr(record.layers[layer], name) for record in records)
                for name in ("squared_error", "squared_deviation")
            ]
            for layer in self.spec.layers
        }
        return {layer: error / total if total else 0.0 for layer, (error, total) in sums.items()}

    def row_layers(self, array: str, start: int, stop: int) -> UInt8[np.ndarray, " rows"]:
        """The layer of each row of an array.

        Raises:
            StoreError: As `read`.
        """
        if self.spec.groups:
            return self.column(f"{array}/layer", start, stop)
        return np.full(stop - start, self.spec.layers_of(array)[0], np.uint8)

    def column(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, " rows"]:
        """Rows `start` to `stop` of a column: `token_id`, `layers/3/norm`, `groups/0/layer`, ...

        Raises:
            StoreError: If there is no such column, and as `read`.
        """
        if name not in self.spec.columns:
            raise StoreError(
                f"there is no column {name!r}; the store has {', '.join(self.spec.columns)}"
            )
        return self._reader.column(name, start, stop)


def _totals(rows: EncodedRows, mine: Bool[np.ndarray, " rows"]) -> LayerTotals:
    """What the shard holds of one layer, whose rows are `mine`."""
    rounding = {}
    if len(rows.scale):
        x = rows.of_shard(mine).astype(np.float32) / rows.noted("scale")[mine, None]
        total = x.sum(axis=0, dtype=np.float64)
        squares = np.einsum("ij,ij->", x, x, dtype=np.float64)
        rounding = {
            "squared_error": float(rows.noted("squared_error")[mine].sum(dtype=np.float64)),
            "squared_deviation": float(squares - total @ total / max(len(x), 1)),
        }
    return LayerTotals(
        rows=int(mine.sum()),
        norm_sum=float(rows.noted("norm")[mine].sum(dtype=np.float64)),
        n_clipped=int(rows.noted("clipped")[mine].sum()),
        **rounding,
    )

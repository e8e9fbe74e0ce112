"""The activation store: rows of activations with their columns, written shard by shard.

A shard has one writer, so there is no lock; what it holds is a pure function of the specification,
the model and the tokens, so writing it again is harmless; it counts when its commit record exists,
which is written last. docs/store_format.md says it byte for byte.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import zarr
from jaxtyping import Float32, Shaped, UInt8

from storage.commits import CommitLog, LayerTotals, ShardRecord
from storage.dtypes import decode, encode
from storage.errors import StoreError
from storage.files import FileRecord, write_file
from storage.layout import ROOT_COLUMNS, StoreSpec
from storage.metadata import has_metadata, read_spec, write_metadata
from storage.shards import padded, shard_parts, with_checksum


class ActivationStore:
    """Activations of several layers or groups at the same token positions, in one folder."""

    def __init__(self, path: Path, spec: StoreSpec) -> None:
        """Use `create` or `open`."""
        self.path = path
        self.spec = spec
        self._commits = CommitLog(path / "commits", spec.digest)
        self._zarr: dict[str, zarr.Array] = {}
        self._scales = np.ones(spec.layers[-1] + 1, np.float32)
        self._scales[list(spec.layers)] = spec.scales

    @classmethod
    def create(cls, path: Path, spec: StoreSpec) -> "ActivationStore":
        """The store at `path`, made now or already there with the same specification.

        Killed in the middle and called again, it starts over: the root's metadata come last. To be
        called by one process, before the writers start.

        Raises:
            StoreError: If another store is there.
        """
        if not has_metadata(path):
            write_metadata(path, spec)
        store = cls.open(path)
        if store.spec != spec:
            raise StoreError(
                f"{path} is there with another specification ({_difference(store.spec, spec)}); "
                "delete it or choose another run directory"
            )
        return store

    @classmethod
    def open(cls, path: Path) -> "ActivationStore":
        """The store at `path`, for reading or for writing more of its shards.

        Raises:
            StoreError: If there is none, or this version of Strata can't read it.
        """
        return cls(path, read_spec(path))

    # Writing

    def missing(self) -> list[int]:
        """The shards that are still to be written, ascending."""
        return sorted(set(range(self.spec.n_shards)) - set(self.committed()))

    def committed(self) -> dict[int, ShardRecord]:
        """The commit records of the shards that are written, ascending.

        Raises:
            StoreError: If a record is damaged or belongs to another store.
        """
        return self._commits.committed()

    def record(self, shard: int) -> ShardRecord | None:
        """The commit record of a shard, None while there is none.

        Raises:
            StoreError: If it is damaged or belongs to another store.
        """
        return self._commits.record(shard) if shard in self._commits else None

    def write_shard(
        self,
        index: int,
        arrays: Mapping[str, Float32[np.ndarray, "rows d_model"]],
        columns: Mapping[str, Shaped[np.ndarray, " rows"]],
    ) -> ShardRecord:
        """Write a shard whole and commit it; a committed one is left as it is.

        Args:
            index: Of the shard.
            arrays: For each of `spec.arrays`, the rows as stored (in the order of `spec.rows_of`),
                in the model's units.
            columns: `sequence`, `position` and `token_id` of each row. Layers and norms are derived.

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
        for array in self.spec.arrays:
            row_layers = self.spec.row_layers(array, sequence, position)
            norms = self._norms(array, arrays[array], row_layers)
            clipped = np.zeros(len(norms), np.int64)
            chunks = self._encoded_chunks(arrays[array], row_layers, clipped)
            key = f"{array}/x/c/{index}/0"
            parts = shard_parts(chunks, self.spec.chunks_per_shard)
            files[key] = write_file(self.path / key, parts)
            self._write_column(f"{array}/norm", index, norms, files)
            if self.spec.groups:
                self._write_column(f"{array}/layer", index, row_layers, files)
            for layer in self.spec.layers_of(array):
                mine = row_layers == layer
                layers[layer] = LayerTotals(
                    rows=int(mine.sum()),
                    norm_sum=float(norms[mine].sum(dtype=np.float64)),
                    n_clipped=int(clipped[mine].sum()),
                )
        record = ShardRecord(shard=index, rows=stop - start, files=files, layers=layers)
        self._commits.write(record)
        return record

    def _check_complete(
        self,
        index: int,
        n_rows: int,
        arrays: Mapping[str, np.ndarray],
        columns: Mapping[str, np.ndarray],
    ) -> None:
        for kind, given, wanted in (
            ("arrays", arrays, set(self.spec.arrays)),
            ("columns", columns, set(ROOT_COLUMNS)),
        ):
            if set(given) != wanted:
                raise StoreError(
                    f"shard {index} of {self.path} takes the {kind} {sorted(wanted)}, "
                    f"got {sorted(given)}; give each of them"
                )
            for name, rows in given.items():
                shape = (n_rows, self.spec.d_model) if kind == "arrays" else (n_rows,)
                if rows.shape != shape:
                    raise StoreError(
                        f"{name} of shard {index} of {self.path} has the shape {rows.shape}, "
                        f"and must have {shape}; give all rows of the shard at once"
                    )

    def _norms(
        self,
        array: str,
        x: Float32[np.ndarray, "rows d_model"],
        row_layers: UInt8[np.ndarray, " rows"],
    ) -> Float32[np.ndarray, " rows"]:
        with np.errstate(over="ignore", invalid="ignore"):  # found and named just below
            norms = np.sqrt(np.einsum("ij,ij->i", x, x))
        finite = np.isfinite(norms)
        if not finite.all():
            layers = sorted({int(layer) for layer in row_layers[~finite]})
            raise StoreError(
                f"{(~finite).sum()} of {len(x)} activations for {array} are not finite "
                f"(layer {', '.join(map(str, layers))}); only finite ones can be stored: run the "
                "model in another dtype (model.dtype: float32 or bfloat16), or check its weights"
            )
        return norms

    def _encoded_chunks(
        self,
        x: Float32[np.ndarray, "rows d_model"],
        row_layers: UInt8[np.ndarray, " rows"],
        clipped: Shaped[np.ndarray, " rows"],
    ) -> Iterator[bytes]:
        """The bytes of each chunk; fills in `clipped` on the way."""
        step = self.spec.chunk_rows
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            scale = self._scales[row_layers[rows], None]
            stored, clipped[rows] = encode(x[rows], scale, self.spec.dtype)
            yield padded(stored, step).tobytes()

    def _write_column(
        self, name: str, index: int, values: np.ndarray, files: dict[str, FileRecord]
    ) -> None:
        key = f"{name}/c/{index}"
        data = padded(values, self.spec.shard_rows).tobytes()
        files[key] = write_file(self.path / key, [with_checksum(data)])

    # Reading

    def read(self, array: str, start: int, stop: int) -> Float32[np.ndarray, "rows d_model"]:
        """Rows `start` to `stop` of an array, in the model's units.

        Raises:
            StoreError: If a shard of theirs is not committed, gone or damaged.
        """
        stored = self.read_stored(array, start, stop)
        return self.decode(stored, self.row_layers(array, start, stop))

    def read_stored(self, array: str, start: int, stop: int) -> Shaped[np.ndarray, "rows d_model"]:
        """Rows of an array as they are on disk, half the memory; `decode` makes activations of them.

        Whole chunks are read, whatever part of them is asked.

        Raises:
            StoreError: As `read`.
        """
        self.spec.layers_of(array)
        return self._rows(f"{array}/x", "{shard}/0", start, stop)

    def decode(
        self,
        stored: Shaped[np.ndarray, "rows d_model"],
        layers: UInt8[np.ndarray, " rows"],
    ) -> Float32[np.ndarray, "rows d_model"]:
        """Activations in the model's units from stored rows and the layer of each."""
        return decode(stored, self._scales[layers, None], self.spec.dtype)

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
        return self._rows(name, "{shard}", start, stop)

    def _rows(self, key: str, file: str, start: int, stop: int) -> np.ndarray:
        """Rows of a zarr array, whose files of the shards concerned must be there.

        zarr gives zeros for a file that is missing, so that is checked here; what is in the files
        zarr itself checks, by the checksum of each chunk.
        """
        spec = self.spec
        if not 0 <= start <= stop <= spec.n_rows:
            raise StoreError(
                f"rows {start} to {stop} of {key}: the store has rows 0 to {spec.n_rows}"
            )
        for shard in range(start // spec.shard_rows, -(-stop // spec.shard_rows)):
            if shard not in self._commits:
                raise StoreError(
                    f"shard {shard} of {self.path} is not committed: its harvest is still running "
                    "or was cut short; run the same command again to finish it"
                )
            name = f"{key}/c/{file.format(shard=shard)}"
            written = self._commits.record(shard).files[name]
            path = self.path / name
            if not path.is_file() or path.stat().st_size != written.n_bytes:
                raise StoreError(
                    f"{path} is gone or has another length than the {written.n_bytes} bytes that "
                    f"were written; delete commits/{shard:06d}.json and harvest again"
                )
        if key not in self._zarr:
            self._zarr[key] = zarr.open_array(self.path / key, mode="r")
        try:
            return np.asarray(self._zarr[key][start:stop])
        except ValueError as error:  # what zarr raises where a checksum does not match
            raise StoreError(
                f"rows {start} to {stop} of {self.path / key} are damaged ({error}); delete the "
                "commit record of their shard and harvest again"
            ) from error


def _difference(there: StoreSpec, asked: StoreSpec) -> str:
    old, new = there.to_json(), asked.to_json()
    return ", ".join(f"{k}: {old[k]} there, {new[k]} asked" for k in old if old[k] != new[k])

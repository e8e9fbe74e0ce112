"""The arithmetic of an activation store: which rows stand where. No input or output.

A *shard* is the unit of writing: one file per array, one writer. A *chunk* is the unit of reading.
The sequences of a shard are a random draw over the whole split, and its rows are permuted, alike in
every array, so that rows stay aligned across layers and a chunk is already well mixed.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
from jaxtyping import Int64, Shaped, UInt8, UInt16, UInt32

from storage.codecs import CODECS
from storage.draw import Stream, layer_draw, permutation
from storage.dtypes import DTYPES, stored_dtype
from storage.errors import StoreError
from storage.json_kinds import check_kinds
from storage.shards import CHECKSUM_BYTES, shard_file_bytes

ROOT_COLUMNS = {
    "sequence": np.dtype("<u4"),
    "position": np.dtype("<u2"),
    "token_id": np.dtype("<u4"),
}
"""Columns that are the same for all arrays of a store, and their dtypes."""

_LAYER_DTYPE, _NORM_DTYPE, _SCALE_DTYPE = np.dtype("u1"), np.dtype("<f4"), np.dtype("<f4")


_KINDS: dict[str, type] = {
    "d_model": int,
    "layers": list,
    "groups": list,
    "split": str,
    "n_population": int,
    "n_sequences": int,
    "rows_per_sequence": int,
    "first_position": int,
    "sequences_per_chunk": int,
    "chunks_per_shard": int,
    "seed": int,
    "dtype": str,
    "codec": str,
    "scales": list,
    "source": str,
}
"""Of the values of a specification."""


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """Everything that decides what a store holds; the model and the tokens by a fingerprint."""

    d_model: int
    """Width of the activations."""

    layers: tuple[int, ...]
    """All layers that the store covers, ascending."""

    groups: tuple[tuple[int, ...], ...] = ()
    """One array per group, with one layer per row; empty: one array per layer, all at every row."""

    split: str
    """The split of the token store."""

    n_population: int
    """Sequences in that split."""

    n_sequences: int
    """How many of them are harvested: the first of a seeded permutation of all."""

    rows_per_sequence: int
    """Token positions stored of each sequence."""

    first_position: int
    """The first of these positions: 1 where a BOS token stands at 0, which is not stored."""

    sequences_per_chunk: int
    """Size of a chunk; the last may be short."""

    chunks_per_shard: int
    """Size of a shard; the last may be short."""

    seed: int
    """Decides which sequences, in which order, and which layer of a group each token gives."""

    dtype: str
    """float16, bfloat16, float32 or int8 (with a scale per row)."""

    codec: str = "none"
    """How chunks are compressed: none, zstd, blosc or pcodec."""

    scales: tuple[float, ...]
    """Per layer of `layers`, a power of two: what is stored is the activation times it.

    Not used by int8, which has a scale per row."""

    source: str = ""
    """A fingerprint of the model, the place in it and the tokens; empty where nobody knows it."""

    def __post_init__(self) -> None:
        """Refuse what no store can be."""
        for name in ("d_model", "n_sequences", "rows_per_sequence", "sequences_per_chunk"):
            self._require(
                getattr(self, name) >= 1, f"{name} is {getattr(self, name)}", "at least 1"
            )
        self._require(self.chunks_per_shard >= 1, f"{self.chunks_per_shard=}", "at least 1")
        self._require(
            self.n_sequences <= self.n_population < 2**32,
            f"n_sequences is {self.n_sequences} of a population of {self.n_population}",
            "at most the population, and that below 2^32",
        )
        self._require(
            self.first_position >= 0 and self.first_position + self.rows_per_sequence <= 2**16,
            f"positions run from {self.first_position}, {self.rows_per_sequence} of them",
            "within 0 to 65535",
        )
        layers = self.layers
        self._require(
            len(layers) > 0
            and list(layers) == sorted(set(layers))
            and 0 <= layers[0] <= layers[-1] <= 255,
            f"layers are {layers}",
            "ascending numbers from 0 to 255, at least one",
        )
        grouped = [layer for group in self.groups for layer in group]
        self._require(
            not self.groups
            or (
                sorted(grouped) == list(layers)
                and all(group and list(group) == sorted(group) for group in self.groups)
            ),
            f"groups are {self.groups} over the layers {layers}",
            "each layer in exactly one group, ascending, no group empty",
        )
        self._require(
            self.dtype in DTYPES, f"the dtype is {self.dtype!r}", f"one of {', '.join(DTYPES)}"
        )
        self._require(
            self.codec in CODECS, f"the codec is {self.codec!r}", f"one of {', '.join(CODECS)}"
        )
        self._require(
            not (self.codec == "pcodec" and self.dtype == "int8"),
            "the codec is 'pcodec' and the dtype int8",
            "pcodec for float16, bfloat16 and float32",
        )
        self._require(
            len(self.scales) == len(layers)
            and all(0 < s < np.inf and np.frexp(s)[0] == 0.5 for s in self.scales),
            f"scales are {self.scales} for {len(layers)} layers",
            "one power of two per layer",
        )

    @staticmethod
    def _require(holds: bool, what_is: str, what_may_be: str) -> None:
        if not holds:
            raise StoreError(f"{what_is}; a store takes {what_may_be}: correct the specification")

    # Sizes

    @property
    def n_rows(self) -> int:
        """Rows of every array."""
        return self.n_sequences * self.rows_per_sequence

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk."""
        return self.sequences_per_chunk * self.rows_per_sequence

    @property
    def shard_rows(self) -> int:
        """Rows of a shard."""
        return self.chunk_rows * self.chunks_per_shard

    @property
    def n_chunks(self) -> int:
        """Chunks of every array of activations."""
        return -(-self.n_sequences // self.sequences_per_chunk)

    @property
    def n_shards(self) -> int:
        """Shards of every array: the units of work of a harvest."""
        return -(-self.n_chunks // self.chunks_per_shard)

    def shard_bytes(self, shard: int) -> int:
        """Bytes of all files of a shard, but for its commit record.

        With a codec that compresses this is an upper bound, to within a few bytes per chunk.
        """
        chunk_bytes = self.chunk_rows * self.d_model * stored_dtype(self.dtype).itemsize
        n_chunks = min(self.chunks_per_shard, self.n_chunks - shard * self.chunks_per_shard)
        activations = shard_file_bytes(n_chunks, chunk_bytes, self.chunks_per_shard)
        columns = sum(
            self.shard_rows * dtype.itemsize + CHECKSUM_BYTES for dtype in self.columns.values()
        )
        return activations * len(self.arrays) + columns

    @property
    def n_bytes(self) -> int:
        """Bytes of all shards, but for metadata and commit records."""
        last = self.n_shards - 1
        return last * self.shard_bytes(0) + self.shard_bytes(last)

    # Names

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays of activations: `layers/3` or `groups/0`."""
        if self.groups:
            return tuple(f"groups/{g}" for g in range(len(self.groups)))
        return tuple(f"layers/{layer}" for layer in self.layers)

    def layers_of(self, array: str) -> tuple[int, ...]:
        """The layers whose activations an array holds.

        Raises:
            StoreError: If the store has no such array.
        """
        if array not in self.arrays:
            raise StoreError(f"there is no array {array!r}; the store has {', '.join(self.arrays)}")
        if self.groups:
            return self.groups[self.arrays.index(array)]
        return (self.layers[self.arrays.index(array)],)

    def scale_of(self, layer: int) -> float:
        """What a layer's activations are multiplied by before they are rounded; not of int8."""
        return self.scales[self.layers.index(layer)]

    @property
    def columns(self) -> dict[str, np.dtype]:
        """Names of all columns, with their dtypes."""
        columns = dict(ROOT_COLUMNS)
        for array in self.arrays:
            if self.groups:
                columns[f"{array}/layer"] = _LAYER_DTYPE
            if self.dtype == "int8":
                columns[f"{array}/scale"] = _SCALE_DTYPE
            columns[f"{array}/norm"] = _NORM_DTYPE
        return columns

    def shard_files(self, shard: int) -> tuple[str, ...]:
        """The files of a shard, by their paths in the store."""
        arrays = (activation_file(array, shard) for array in self.arrays)
        return (*arrays, *(f"{column}/c/{shard}" for column in self.columns))

    # Rows

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """First row of a chunk, and the first after it. Chunks are counted over the whole store."""
        return chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.n_rows)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the first after it.

        Raises:
            StoreError: If there is no such shard.
        """
        if not 0 <= shard < self.n_shards:
            raise StoreError(
                f"there is no shard {shard}; the store has shards 0 to {self.n_shards - 1}"
            )
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.n_rows)

    def sequences_of(self, shard: int) -> Int64[np.ndarray, " sequences"]:
        """Which sequences of the split a shard holds, ascending."""
        start, stop = (row // self.rows_per_sequence for row in self.shard_range(shard))
        return np.sort(_population_order(self.n_population, self.seed)[start:stop])

    def permutation_of(self, shard: int) -> Int64[np.ndarray, " rows"]:
        """Which row in reading order (sequence by sequence) stands at each row; not to be written to."""
        return _permutation_of(self, shard)

    def rows_of(
        self, shard: int
    ) -> tuple[UInt32[np.ndarray, " rows"], UInt16[np.ndarray, " rows"]]:
        """The columns sequence and position of a shard, as stored; not to be written to."""
        return _rows_of(self, shard)

    def row_layers(
        self,
        array: str,
        sequence: Shaped[np.ndarray, " rows"],
        position: Shaped[np.ndarray, " rows"],
    ) -> UInt8[np.ndarray, " rows"]:
        """The layer whose activation an array stores of each token."""
        layers = self.layers_of(array)
        if not self.groups:
            return np.full(len(sequence), layers[0], np.uint8)
        return layer_draw(self.seed, sequence, position, self.arrays.index(array), layers)

    # Text

    def to_json(self) -> dict[str, Any]:
        """The specification as JSON values, without a source that nobody knows."""
        data = json.loads(json.dumps(asdict(self)))
        return data if self.source else {key: data[key] for key in data if key != "source"}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "StoreSpec":
        """The specification that `to_json` gave.

        Raises:
            StoreError: If a key is missing or unknown, or the values make no store.
        """
        data = {"source": "", **data}
        check_kinds(data, _KINDS)
        try:
            tuples = {
                "layers": tuple(data["layers"]),
                "groups": tuple(tuple(group) for group in data["groups"]),
                "scales": tuple(float(scale) for scale in data["scales"]),
            }
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"the specification holds something else than lists of numbers ({error}); its file was edited "
                "or damaged, so harvest again into another folder"
            ) from error
        layers = (*tuples["layers"], *(layer for group in tuples["groups"] for layer in group))
        if not all(isinstance(layer, int) for layer in layers):  # names of arrays are made of them
            raise StoreError(
                f"the specification has the layers {list(layers)}, and layers are numbers; its file was "
                "edited or damaged, so harvest again into another folder"
            )
        return cls(**{**data, **tuples})

    def difference(self, asked: "StoreSpec") -> str:
        """In which values this one, which is there, is another than one that is asked for."""
        old, new = replace(self, source="").to_json(), replace(asked, source="").to_json()
        told = [f"{k}: {old[k]} there, {new[k]} asked" for k in old if old[k] != new[k]]
        if told:
            return ", ".join(told)
        return (
            "it is of other weights, another place in the model, or other text: "
            f"{self.source} there, {asked.source} asked"
        )

    @property
    def digest(self) -> str:
        """A checksum of the specification, by which commit records know their store."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return f"{google_crc32c.value(text.encode()):08x}"


def activation_file(array: str, shard: int) -> str:
    """Where a shard of an array lies, by its path in the store."""
    return f"{array}/x/c/{shard}/0"


@lru_cache(maxsize=4)
def _population_order(n_population: int, seed: int) -> Int64[np.ndarray, " sequences"]:
    """The order in which sequences enter a store: drawn once, needed for every shard."""
    order = permutation(n_population, seed, Stream.POPULATION)
    order.flags.writeable = False
    return order


@lru_cache(maxsize=4)
def _permutation_of(spec: StoreSpec, shard: int) -> Int64[np.ndarray, " rows"]:
    start, stop = spec.shard_range(shard)
    order = permutation(stop - start, spec.seed, Stream.SHARD_ROWS, shard)
    order.flags.writeable = False
    return order


@lru_cache(maxsize=4)
def _rows_of(
    spec: StoreSpec, shard: int
) -> tuple[UInt32[np.ndarray, " rows"], UInt16[np.ndarray, " rows"]]:
    """Sequence and position of a shard's rows: who fills it, who writes it and who checks it asks."""
    source = spec.permutation_of(shard)
    in_shard, within = np.divmod(source, spec.rows_per_sequence)
    columns = (
        spec.sequences_of(shard)[in_shard].astype(np.uint32),
        (spec.first_position + within).astype(np.uint16),
    )
    for column in columns:
        column.flags.writeable = False
    return columns

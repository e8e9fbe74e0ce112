"""Small activation stores with known content, for the tests of whatever reads stores."""

from pathlib import Path

import numpy as np
import torch

from storage.activations import ActivationStore
from storage.encoding import EncodedRows
from storage.layout import StoreSpec


def small_spec(**changes) -> StoreSpec:
    """Three layers, 22 sequences of 5 rows: four shards of three chunks, the last ones short."""
    layers = changes.get("layers", (0, 1, 2))
    settings = {
        "d_model": 6,
        "layers": layers,
        "split": "train",
        "n_population": 40,
        "n_sequences": 22,
        "rows_per_sequence": 5,
        "first_position": 1,
        "sequences_per_chunk": 2,
        "chunks_per_shard": 3,
        "seed": 7,
        "dtype": "float32",
        "scales": (1.0,) * len(layers),
    }
    return StoreSpec(**{**settings, **changes})


def activation(sequence, position, layer, d_model: int) -> np.ndarray:
    """What a pretended model gives at a token: (rows, d_model) float32, no two rows alike."""
    row = np.asarray(sequence, np.float64) * 101 + np.asarray(position) * 7 + np.asarray(layer) / 3
    return np.sin(row[:, None] + np.arange(d_model)).astype(np.float32)


def token(sequence, position) -> np.ndarray:
    """The token there; one in eleven is 0, which tests may call special."""
    return (np.asarray(sequence, np.int64) * 3 + np.asarray(position)) % 11


def shard_content(spec: StoreSpec, shard: int) -> tuple[dict, dict]:
    """Arrays and columns of a shard, as `write_shard` takes them."""
    sequence, position = spec.rows_of(shard)
    arrays = {
        array: activation(
            sequence, position, spec.row_layers(array, sequence, position), spec.d_model
        )
        for array in spec.arrays
    }
    columns = {
        "sequence": sequence,
        "position": position,
        "token_id": token(sequence, position).astype(np.uint32),
    }
    return encoded(spec, shard, arrays), columns


def encoded(spec: StoreSpec, shard: int, arrays: dict[str, np.ndarray]) -> dict[str, EncodedRows]:
    """Activations in the order of a shard as `write_shard` takes them."""
    return {
        array: EncodedRows.of(spec, array, shard, torch.from_numpy(x))
        for array, x in arrays.items()
    }


def filled_store(path: Path, spec: StoreSpec, shards=None) -> ActivationStore:
    """A store with all of its shards (or those named, in that order) written."""
    store = ActivationStore.create(path, spec)
    for shard in range(spec.n_shards) if shards is None else shards:
        store.write_shard(shard, *shard_content(spec, shard))
    return store


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, to compare stores byte by byte."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }

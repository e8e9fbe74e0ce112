"""Our side of the writing benchmark: a shard of one layer, with its columns, committed."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cpu import Turn, serve_turns
from storage.activations import ActivationStore
from storage.encoding import EncodedRows
from storage.layout import StoreSpec


def make(arguments: dict[str, Any]) -> Turn:
    """A store with a shard for every turn; the activations come in float16."""
    x = torch.from_numpy(np.load(arguments["data"]))
    n_sequences, context, d_model = x.shape
    spec = StoreSpec(
        d_model=d_model,
        layers=(0,),
        split="train",
        n_population=n_sequences * arguments["turns"],
        n_sequences=n_sequences * arguments["turns"],
        rows_per_sequence=context,
        first_position=0,
        sequences_per_chunk=arguments["sequences_per_chunk"],
        chunks_per_shard=n_sequences // arguments["sequences_per_chunk"],
        seed=0,
        dtype="float16",
        scales=(0.5,),  # none of 1, so that scaling is not left out
    )
    store = ActivationStore.create(Path(arguments["folder"]) / "ours.zarr", spec)
    rows = x.flatten(0, 1)

    def turn(number: int) -> None:
        sequence, position = spec.rows_of(number)
        token_id = np.zeros(len(sequence), np.uint32)
        columns = {"sequence": sequence, "position": position, "token_id": token_id}
        encoded = EncodedRows.of(spec, "layers/0", number, rows)
        store.write_shard(number, {"layers/0": encoded}, columns)

    return turn


if __name__ == "__main__":
    serve_turns(make, ["torch", "zarr", "numpy"])

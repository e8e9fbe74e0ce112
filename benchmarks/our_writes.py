"""Our side of the writing benchmark: a shard of one layer, with its columns, committed."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cpu import Findings, Turn, serve_turns
from benchmarks.one_layer import ARRAY, columns_of, one_layer_spec
from storage.activations import ActivationStore
from storage.encoding import EncodedRows, memory_for


def make(arguments: dict[str, Any]) -> Turn:
    """A store with a shard for every turn; the activations come in float16."""
    x = torch.from_numpy(np.load(arguments["data"]))
    n_sequences, context, d_model = x.shape
    spec = one_layer_spec(
        *(d_model, n_sequences * arguments["turns"], context),
        sequences_per_chunk=arguments["sequences_per_chunk"],
        chunks_per_shard=n_sequences // arguments["sequences_per_chunk"],
    )
    store = ActivationStore.create(Path(arguments["folder"]) / "ours.zarr", spec)
    rows, memory = x.flatten(0, 1), memory_for(spec)

    def turn(number: int) -> Findings:
        encoded = EncodedRows.of(spec, ARRAY, number, rows, memory)
        store.write_shard(number, {ARRAY: encoded}, columns_of(spec, number))

        def delete() -> dict[str, float]:
            """The system's memory for files then serves the next turn too, and is not asked for anew."""
            store.release(number)
            return {}

        return delete

    return turn


if __name__ == "__main__":
    serve_turns(make, ["torch", "zarr", "numpy"])

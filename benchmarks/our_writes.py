"""Our side of the writing benchmark: a shard of one layer, as a harvester writes it, without the model.

Rows come in reading order, batch by batch, and are scaled, permuted and committed with their columns.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.shard_rows import ShardRows
from benchmarks.cpu import Findings, Turn, serve_turns
from benchmarks.one_layer import columns_of, one_layer_spec
from storage.activations import ActivationStore
from storage.encoding import memory_for


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
    memory = memory_for(spec)

    def turn(number: int) -> Findings:
        rows = ShardRows(spec, number, memory)
        for batch in x.split(arguments["batch_sequences"]):
            rows.add({0: batch})
        store.write_shard(number, rows.finish(), columns_of(spec, number))

        def delete() -> dict[str, float]:
            """The system's memory for files then serves the next turn too, and is not asked for anew."""
            store.release(number)
            return {}

        return delete

    return turn


if __name__ == "__main__":
    serve_turns(make, ["torch", "zarr", "numpy"])

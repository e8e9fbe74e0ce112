"""The peer's side of the writing benchmark: SAELens's cached activations, without the model.

Runs in the peers' environment. A turn is what `CacheActivationsRunner.run` does with a buffer once the
model has filled it: a `datasets.Dataset` of it, saved to disk.
"""
# pyright: reportMissingImports=false

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.cpu import Findings, Turn, serve_turns

HOOK = "blocks.0.hook_resid_post"


def make(arguments: dict[str, Any]) -> Turn:
    """A dataset for every turn; the activations come in float16."""
    from datasets import Array2D, Features, Sequence, Value
    from sae_lens.cache_activations_runner import CacheActivationsRunner

    x = torch.from_numpy(np.load(arguments["data"]))
    n_sequences, context, d_model = x.shape
    features = {
        HOOK: Array2D(shape=(context, d_model), dtype="float16"),
        "token_ids": Sequence(Value("int32"), length=context),
    }
    runner = SimpleNamespace(
        cfg=SimpleNamespace(hook_name=HOOK, n_seq_in_buffer=n_sequences, d_in=d_model),
        context_size=context,
        features=Features(features),
    )
    rows, token_ids = x.flatten(0, 1), torch.zeros(n_sequences * context, dtype=torch.int32)

    def turn(number: int) -> Findings:
        shard = CacheActivationsRunner._create_shard(runner, (rows, token_ids))
        folder = Path(arguments["folder"]) / f"shard_{number:05d}"
        shard.save_to_disk(str(folder), num_shards=1)

        def delete() -> dict[str, float]:
            """The system's memory for files then serves the next turn too, and is not asked for anew."""
            shutil.rmtree(folder)
            return {}

        return delete

    return turn


if __name__ == "__main__":
    serve_turns(make, ["sae-lens", "datasets"])

"""The peer's side of the writing benchmark: SAELens's cached activations, without the model's arithmetic.

Runs in the peers' environment. A turn is the body of the loop in `CacheActivationsRunner.run`, all of it
SAELens's own: activations are taken from the model batch by batch, joined, made a `datasets.Dataset`, and
saved to disk. The model is one whose hook point gives activations that are ready, and tokens are at hand,
as they are for our side. With `joined` a turn is the last two steps alone, of rows that are float16 already.
"""
# pyright: reportMissingImports=false

import shutil
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cpu import Findings, Turn, serve_turns

HOOK = "blocks.0.hook_resid_post"


def make(arguments: dict[str, Any]) -> Turn:
    """A dataset for every turn; the model's activations are float16, and so is what is written."""
    import sae_lens.cache_activations_runner as module
    from datasets import Dataset
    from sae_lens.config import CacheActivationsRunnerConfig

    x = torch.from_numpy(np.load(arguments["data"]))
    n_sequences, context, d_model = x.shape
    n_batch = arguments["batch_sequences"]
    config = CacheActivationsRunnerConfig(
        dataset_path="",
        model_name="",
        model_batch_size=n_batch,
        hook_name=HOOK,
        d_in=d_model,
        training_tokens=n_sequences * context,
        context_size=context,
        dtype="float16",
        device="cpu",
        buffer_size_gb=x.nbytes / 1e9,
    )
    module.load_model = lambda **_: _ready(x.split(n_batch))
    tokens = torch.zeros(n_batch, context, dtype=torch.int64)
    runner = module.CacheActivationsRunner(config, Dataset.from_dict({"input_ids": tokens}))
    store = runner.activations_store
    store.get_batch_tokens = lambda raise_at_epoch_end: tokens

    @torch.no_grad()
    def turn(number: int) -> Findings:
        n_batches = n_sequences // n_batch
        if arguments["joined"]:
            rows, token_ids = x.flatten(0, 1), tokens.flatten().repeat(n_batches)
        else:
            batches = [store.get_raw_llm_batch() for _ in range(n_batches)]
            rows, token_ids = (torch.cat(parts) for parts in zip(*batches, strict=True))
        folder = Path(arguments["folder"]) / f"shard_{number:05d}"
        runner._create_shard((rows, token_ids)).save_to_disk(str(folder), num_shards=1)

        def delete() -> dict[str, float]:
            """The system's memory for files then serves the next turn too, and is not asked for anew."""
            shutil.rmtree(folder)
            return {}

        return delete

    return turn


def _ready(batches: Sequence[Tensor]) -> nn.Module:
    """A model whose hook point gives these batches, one a call, again and again."""
    from transformer_lens.hook_points import HookedRootModule, HookPoint

    class Ready(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({HOOK.rpartition(".")[2]: HookPoint()})])
            self.embedding = nn.Parameter(torch.zeros(1))
            self.batches = cycle(batches)
            self.setup()

        def forward(self, tokens: Tensor, **_: Any) -> Tensor:
            return self.get_submodule(HOOK)(next(self.batches))

    return Ready()


if __name__ == "__main__":
    serve_turns(make, ["sae-lens", "datasets"])

"""One rank of the parallel benchmark: `Fit.step` of an autoencoder that ranks share, over gloo."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from actors.allocator import keep_freed_memory
from benchmarks.our_steps import smallest
from benchmarks.worker import Held, Step, bytes_held, serve
from sae import Fit, FitConfig, KronShape, SaeConfig, SparseAutoencoder
from sae.parallel import ParallelRanks
from sae.ranks import ALONE


def config(arguments: dict[str, Any], d_model: int) -> SaeConfig:
    """The architecture that a rank's arguments stand for."""
    shape = arguments.get("kron")
    return SaeConfig(
        d_model=d_model,
        d_sae=arguments["d_sae"],
        k=arguments["k"],
        encoder=KronShape(h=shape[0], m=shape[1], n=shape[2]) if shape else "dense",
        selection=arguments["selection"],
    )


def make(arguments: dict[str, Any], first: Tensor) -> tuple[Step, Held]:
    """A fit shared by as many ranks as are asked for; one rank is one process as ever."""
    world = arguments["ranks"]
    if world > 1 and not dist.is_initialized():
        meeting = f"file://{arguments['meeting']}"
        dist.init_process_group(
            "gloo", init_method=meeting, rank=arguments["rank"], world_size=world
        )
    ranks = ParallelRanks() if world > 1 else ALONE
    cfg = config(arguments, first.shape[1])
    sae = SparseAutoencoder(cfg, {0: 1.0}, seed=None, ranks=ranks)
    fit = Fit(sae, FitConfig(), n_steps=10_000)
    layer = torch.zeros(len(first), dtype=torch.int64)
    fit.initialise(first, layer)
    if not arguments.get("trial"):
        keep_freed_memory(sae.w_dec.nbytes)

    def held() -> dict[str, int]:
        exchanged = ranks.payload if isinstance(ranks, ParallelRanks) else {}
        return {**bytes_held(sae, fit.adam), "payload": sum(exchanged.values())}

    return lambda x: fit.step(x, layer).loss, held


if __name__ == "__main__":
    serve(make, [], smallest)

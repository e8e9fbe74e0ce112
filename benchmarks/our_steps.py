"""Our side of the training benchmark: `Fit.step` in a process set up as the trainer's is."""

from typing import Any

import torch
from torch import Tensor

from actors.allocator import keep_freed_memory
from benchmarks.worker import Held, Step, bytes_held, serve
from sae import Fit, FitConfig, KronShape, SaeConfig, SparseAutoencoder
from sae.ranks import ALONE, Ranks


def config(arguments: dict[str, Any], d_model: int) -> SaeConfig:
    """The architecture that a contender's arguments stand for."""
    shape = arguments.get("kron")
    return SaeConfig(
        d_model=d_model,
        d_sae=arguments["d_sae"],
        k=arguments["k"],
        encoder=KronShape(h=shape[0], m=shape[1], n=shape[2]) if shape else "dense",
        selection=arguments["selection"],
        prefixes=tuple(arguments.get("prefixes", ())),
    )


def make(arguments: dict[str, Any], first: Tensor, ranks: Ranks = ALONE) -> tuple[Step, Held]:
    """A fit of the wanted shape, its b_dec set from the first batch."""
    sae = SparseAutoencoder(config(arguments, first.shape[1]), {0: 1.0}, seed=None, ranks=ranks)
    fit = Fit(sae, FitConfig(), n_steps=10_000)
    layer = torch.zeros(len(first), dtype=torch.int64)
    fit.initialise(first, layer)
    if not arguments.get("trial"):
        keep_freed_memory(fit.sae.w_dec.nbytes)
    return lambda x: fit.step(x, layer).loss, lambda: bytes_held(fit.sae, fit.adam)


def smallest(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same kind with 128 latents; what it does to the process must not last."""
    tiny = {**arguments, "d_sae": 128, "k": 2, "trial": True}
    if "kron" in arguments:
        _, m, n = arguments["kron"]
        tiny["kron"] = [128 // (m * n), m, n]
    if "prefixes" in arguments:
        tiny["prefixes"] = [64, 128]
    return tiny


if __name__ == "__main__":
    serve(make, [], smallest)

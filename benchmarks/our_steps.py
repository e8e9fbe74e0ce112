"""Our side of the training benchmark: `Fit.step`, as the trainer calls it."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.worker import Held, Step, bytes_held, serve
from sae import Fit, FitConfig, KronShape, SaeConfig, SparseAutoencoder


def make(arguments: dict[str, Any], first: Tensor) -> tuple[Step, Held]:
    """A fit of the wanted shape, its b_dec set from the first batch."""
    shape = arguments.get("kron")
    cfg = SaeConfig(
        d_model=first.shape[1],
        d_sae=arguments["d_sae"],
        k=arguments["k"],
        encoder=KronShape(h=shape[0], m=shape[1], n=shape[2]) if shape else "dense",
        selection=arguments["selection"],
        prefixes=tuple(arguments.get("prefixes", ())),
    )
    fit = Fit(SparseAutoencoder(cfg, {0: 1.0}, seed=None), FitConfig(), n_steps=10_000)
    layer = torch.zeros(len(first), dtype=torch.int64)
    fit.initialise(first, layer)
    return lambda x: fit.step(x, layer).loss, lambda: bytes_held(fit.sae, fit.adam)


def smallest(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same kind with 128 latents."""
    tiny = {**arguments, "d_sae": 128, "k": 2}
    if "kron" in arguments:
        _, m, n = arguments["kron"]
        tiny["kron"] = [128 // (m * n), m, n]
    if "prefixes" in arguments:
        tiny["prefixes"] = [64, 128]
    return tiny


if __name__ == "__main__":
    serve(make, [], smallest)

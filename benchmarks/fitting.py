"""Fit an autoencoder on a stream of batches and measure it: the loop of the quality benchmark."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sae import Fit, FitConfig, LatentCounts, ReconstructionMetrics, SaeConfig, SparseAutoencoder


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An autoencoder on held-out activations, in the model's units."""

    fvu: float
    l0: float
    dead_fraction: float


def fitted(
    cfg: SaeConfig, batches: Iterable[Tensor], n_steps: int, *, lr: float, dead_after_tokens: int
) -> SparseAutoencoder:
    """An autoencoder trained on `n_steps` batches, all of layer 0."""
    source = iter(batches)
    first = next(source)
    layer = torch.zeros(len(first), dtype=torch.int64)
    factor = cfg.d_model**0.5 / first.norm(dim=1).mean().item()
    sae = SparseAutoencoder(cfg, {0: factor}, seed=None)
    fit = Fit(sae, FitConfig(lr=lr, dead_after_tokens=dead_after_tokens), n_steps)
    fit.initialise(first, layer)
    for _, x in zip(range(n_steps), source, strict=False):
        fit.step(x, layer)
    return sae.eval()


@torch.no_grad()
def measured(sae: SparseAutoencoder, x: Tensor, *, by_batch: bool = False) -> Measured:
    """FVU, L0 and dead latents on held-out activations.

    Args:
        sae: The autoencoder.
        x: Activations, in the model's units.
        by_batch: BatchTopK selects over the batch, as in training, not by its threshold.
    """
    metrics, counts = ReconstructionMetrics(), LatentCounts(sae.cfg.d_sae)
    for part in x.split(4096):
        layer = torch.zeros(len(part), dtype=torch.int64)
        if by_batch:
            units = sae.scaling.units(part, layer)
            latents = sae.train().encode(units.scale(part))
            x_hat = units.restore(sae.decode(latents))
        else:
            x_hat, latents = sae.eval().reconstruct(part, layer)
        metrics.update(part, x_hat, latents)
        counts.update(latents)
    return Measured(fvu=metrics.fvu, l0=metrics.l0, dead_fraction=counts.dead_fraction)

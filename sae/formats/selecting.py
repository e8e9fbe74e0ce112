"""Other selections for the same encoder and decoder: a threshold for one layer, or TopK."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.selection import select_batch_top_k

_BELOW = 1 - 1e-6
"""A threshold must lie under the last value it lets through, and what is on is strictly above."""


@torch.no_grad()
def threshold_for(sae: SparseAutoencoder, x: Float[Tensor, "rows d_model"], l0: float) -> float:
    """The threshold that gives an autoencoder this mean L0 on some rows, in its own units.

    It is the smallest value that BatchTopK keeps when all rows are one batch.
    """
    n = round(l0 * len(x))
    blocks = sae.encoder.blocks(x.to(sae.b_dec.dtype) - sae.b_dec)
    chosen = select_batch_top_k(blocks, len(x), max(n, 1), sae.cfg.d_sae)
    values = sae.encoder.values(chosen, x.to(sae.b_dec.dtype), sae.b_dec)
    return float(values.min()) * _BELOW if len(values) else 0.0


def calibrated(
    sae: SparseAutoencoder, x: Float[Tensor, "rows d_model"], l0: float
) -> SparseAutoencoder:
    """A BatchTopK autoencoder of one layer whose threshold gives a mean L0 on the layer's own rows.

    A group's threshold is one for all its layers, and lets more latents through on some than on others.

    Args:
        sae: As `folded` gives it; left as it is.
        x: Rows of its layer, in the model's units.
        l0: The mean L0 to be hit.

    Raises:
        ValueError: If it selects otherwise than by BatchTopK, or x doesn't fit.
    """
    if sae.cfg.selection != "batch_topk":
        raise ValueError(
            f"its selection is {sae.cfg.selection}, which has no threshold to calibrate; only BatchTopK has "
            "one for all latents: leave calibration out"
        )
    sae.check(x)
    units = sae.scaling.units(x, torch.full((len(x),), _layer(sae)))
    other = _copy(sae)
    other.set_threshold(threshold_for(sae, units.scale(x), l0))
    return other.eval()


def as_topk(sae: SparseAutoencoder, k: int) -> SparseAutoencoder:
    """The same encoder and decoder with the k largest latents of each token on: another function.

    Args:
        sae: As `folded` gives it; left as it is.
        k: At least 1.
    """
    cfg = replace(sae.cfg, selection="topk", k=k)
    other = SparseAutoencoder(cfg, sae.layer_scale or {_layer(sae): 1.0}, seed=None)
    kept = {
        name: t
        for name, t in sae.state_dict().items()
        if name not in ("threshold", "log_thresholds")
    }
    other.load_state_dict(kept, strict=False)
    return other.eval()


def _copy(sae: SparseAutoencoder) -> SparseAutoencoder:
    other = SparseAutoencoder(sae.cfg, sae.layer_scale or {_layer(sae): 1.0}, seed=None)
    other.load_state_dict(sae.state_dict())
    return other


def _layer(sae: SparseAutoencoder) -> int:
    return next(iter(sae.layer_scale), 0)

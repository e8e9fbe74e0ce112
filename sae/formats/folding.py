"""One layer's autoencoder out of a group's: the layer's scale becomes part of the weights.

A group's autoencoder reads s*x, s the layer's factor, and divides what it writes by s. The same function
of x itself has w_enc * s, w_dec / s and b_dec / s; b_enc and the thresholds stay, as they are in units of
the latents, which do not change. The Kronecker encoder's factors are affine too, so it folds alike.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.scaling import LayerScale


@torch.no_grad()
def folded(sae: SparseAutoencoder, layer: int) -> SparseAutoencoder:
    """The autoencoder of one layer alone, in float32: the same latents, its only scale is 1.

    `token_standardize` has no factor to fold; it stays as it is.

    Raises:
        ValueError: If the autoencoder was not made for that layer.
    """
    if isinstance(sae.scaling, LayerScale) and layer not in sae.layer_scale:
        raise ValueError(
            f"layer {layer} has no scale in this autoencoder, which was made for layers "
            f"{sorted(sae.layer_scale)}; choose one of these"
        )
    factor = sae.layer_scale.get(layer, 1.0)
    alone = SparseAutoencoder(sae.cfg, {layer: 1.0}, seed=None)
    alone.encoder.w_enc.copy_(sae.encoder.w_enc.double() * factor)
    alone.encoder.b_enc.copy_(sae.encoder.b_enc)
    alone.w_dec.copy_(sae.w_dec.double() / factor)
    alone.b_dec.copy_(sae.b_dec.double() / factor)
    if sae.log_thresholds is not None and alone.log_thresholds is not None:
        alone.log_thresholds.copy_(sae.log_thresholds)
    alone.threshold = sae.threshold.detach().cpu().clone()
    return alone.eval()


@torch.no_grad()
def thresholds(sae: SparseAutoencoder) -> Float[Tensor, " d_sae"] | None:
    """What a latent has to exceed to be in use at inference; None if it is TopK.

    Raises:
        ValueError: If it is a BatchTopK that has no threshold yet.
    """
    if sae.log_thresholds is not None:
        return sae.log_thresholds.float().exp()
    if bool((sae.threshold >= 0).all()):
        return sae.threshold.float().expand(sae.cfg.d_sae).clone()
    if sae.cfg.selection == "topk":
        return None
    raise ValueError(
        "this BatchTopK autoencoder has no inference threshold, without which nothing but a batch can "
        "select; train it, or give it one by `set_threshold`"
    )

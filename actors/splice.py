"""Replaces activations inside a running language model: what cross-entropy recovered is made of."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from storage.hygiene import RowFilter

Replacement = Callable[[Float[Tensor, "rows d_model"]], Float[Tensor, "rows d_model"]]
"""What stands in for activations of one layer, in the model's units."""


def reconstruction(sae: SparseAutoencoder, layer: int) -> Replacement:
    """Puts the autoencoder's reconstruction in place of a layer's activations."""

    def replace(x: Tensor) -> Tensor:
        x = x.to(sae.b_dec.device)  # a model may be spread over several devices
        layers = torch.full((len(x),), layer, dtype=torch.int64, device=x.device)
        return sae.reconstruct(x, layers).x_hat

    return replace


def zero(x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
    """Puts nothing in place of a layer's activations: zero ablation."""
    return torch.zeros_like(x)


def constant(vector: Float[Tensor, " d_model"]) -> Replacement:
    """Puts one vector in place of a layer's activations: of their mean, mean ablation."""

    def replace(x: Tensor) -> Tensor:
        return vector.to(x).expand_as(x)

    return replace


def edit(
    replacement: Replacement,
    layer: int,
    ids: Int[np.ndarray, "sequences context"],
    row_filter: RowFilter,
    first_position: int,
) -> Callable[[Float[Tensor, "sequences context d_model"]], Tensor]:
    """An edit of one layer's output for `LanguageModel.logits`, on these very tokens.

    The rows replaced are those that training uses: the row filter keeps them, judged by their own
    norm, and they stand at `first_position` or later. All others pass through as they are.
    """
    position = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    stored = position >= first_position

    def apply(output: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(output.float(), dim=-1).cpu().numpy()
        keep = stored & row_filter.keep(ids, position, np.full(ids.shape, layer), norms)
        rows = torch.from_numpy(keep).to(output.device)
        if not keep.any():
            return output
        edited = output.clone()
        edited[rows] = replacement(output[rows].float()).to(output)
        return edited

    return apply

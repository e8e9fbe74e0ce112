"""What is counted of every latent while activations stream by: how often, how strongly, where."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.latents import SparseLatents

N_BINS = 32
"""Of each latent's histogram, from 0 to the power of two above its largest activation."""

_LOWEST_EXPONENT = -100  # of a latent that never fired; nothing that fires is as small


class LatentStatistics:
    """Counts, sums, maxima and activation histograms of all latents, the first two layer by layer.

    Activations are in the autoencoder's units, in which all layers of a group have the same mean
    norm, so layers can be compared. The order of batches changes nothing but the sums' last bits.
    """

    def __init__(self, d_sae: int, layers: Sequence[int]) -> None:
        """Nothing seen yet, of `d_sae` latents on each of `layers`."""
        self.layers = tuple(layers)
        self.n_tokens: Int[Tensor, " layers"] = torch.zeros(len(layers), dtype=torch.int64)
        """Tokens seen of each layer."""
        self.counts: Int[Tensor, "layers d_sae"] = torch.zeros(
            len(layers), d_sae, dtype=torch.int64
        )
        """Of these, tokens on which a latent was in use."""
        self.sums: Float[Tensor, "layers d_sae"] = torch.zeros(
            len(layers), d_sae, dtype=torch.float64
        )
        """Sum of each latent's activations."""
        self.maxima: Float[Tensor, " d_sae"] = torch.zeros(d_sae)
        """Largest activation of each latent over all layers; 0 if it never fired."""
        self.histogram: Int[Tensor, "d_sae bins"] = torch.zeros(d_sae, N_BINS, dtype=torch.int32)
        """Activations above 0 by size, over all layers: `N_BINS` equal bins from 0 to `upper_edges`."""
        self._exponents = torch.full((d_sae,), _LOWEST_EXPONENT, dtype=torch.int32)

    def update(self, latents: SparseLatents, layer: int) -> None:
        """Count a batch of one layer.

        Raises:
            ValueError: If the layer is none of those announced.
        """
        if layer not in self.layers:
            raise ValueError(
                f"layer {layer} is not counted here, but {list(self.layers)} are; pass the latents of "
                "one of these"
            )
        row = self.layers.index(layer)
        values, indices = latents.values.detach().float().cpu(), latents.indices.cpu()
        values, indices = values[values > 0], indices[values > 0]
        self.n_tokens[row] += latents.n_tokens
        self.counts[row].index_add_(0, indices, torch.ones_like(indices))
        self.sums[row].index_add_(0, indices, values.double())
        self.maxima.scatter_reduce_(0, indices, values, "amax")
        self._widen()
        # A power of two only shifts the exponent, so no value is rounded into another bin.
        bins = torch.ldexp(values, N_BINS.bit_length() - 1 - self._exponents[indices]).long()
        places = indices * N_BINS + bins
        self.histogram.view(-1).index_add_(0, places, torch.ones_like(places, dtype=torch.int32))

    def _widen(self) -> None:
        """Double the range of each histogram until its maximum is inside, joining bins in pairs."""
        wanted = torch.frexp(self.maxima).exponent
        grown = ((self.maxima > 0) & (wanted > self._exponents)).nonzero().flatten()
        if not len(grown):
            return
        shifts = (wanted - self._exponents)[grown].clamp(max=N_BINS.bit_length())
        joined = torch.arange(N_BINS) >> shifts[:, None]
        old = self.histogram[grown]
        self.histogram[grown] = torch.zeros_like(old).scatter_add_(1, joined, old)
        self._exponents[grown] = wanted[grown]

    @property
    def upper_edges(self) -> Float[Tensor, " d_sae"]:
        """Where each histogram ends: the least power of two above the maximum; 0 if it never fired."""
        return torch.where(
            self.maxima > 0, torch.ldexp(torch.ones_like(self.maxima), self._exponents), 0.0
        )

    @property
    def frequencies(self) -> Float[Tensor, " d_sae"]:
        """Share of all tokens, of all layers together, on which each latent is in use."""
        return self.counts.sum(0).double() / max(int(self.n_tokens.sum()), 1)

    @property
    def means(self) -> Float[Tensor, " d_sae"]:
        """Mean activation of each latent where it is in use; 0 if it never fired."""
        return self.sums.sum(0) / self.counts.sum(0).clamp(min=1)

    @property
    def firing_rates(self) -> Float[Tensor, "layers d_sae"]:
        """Share of each layer's tokens on which each latent is in use."""
        return self.counts.double() / self.n_tokens.clamp(min=1)[:, None]

    @property
    def layer_shares(self) -> Float[Tensor, "layers d_sae"]:
        """Share of each latent's activity that each layer has; sums to 1, all 0 if it never fired.

        Activity is the mean activation over all tokens of a layer, zeros included, so a layer
        of which fewer tokens were seen counts the same.
        """
        activity = self.sums / self.n_tokens.clamp(min=1)[:, None]
        total = activity.sum(0)
        return torch.where(total > 0, activity / total.clamp(min=1e-300), 0.0)

    @property
    def layer_spread(self) -> Float[Tensor, " d_sae"]:
        """Over how many layers a latent is spread: exp of the entropy of its `layer_shares`.

        1: one layer has all of its activity. The number of layers: all have the same. 0 if it never
        fired.
        """
        spread = torch.special.entr(self.layer_shares).sum(0).exp()
        return torch.where(self.maxima > 0, spread, 0.0)

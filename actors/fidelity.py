"""How well an autoencoder reconstructs the validation store, layer by layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from actors.errors import InputError
from sae.autoencoder import SparseAutoencoder
from sae.metrics import LatentCounts, ReconstructionMetrics
from storage.activations import ActivationStore
from storage.hygiene import RowFilter
from storage.places import Location

_BATCH_ROWS = 2048  # encoded at once: bounds memory, changes no result


@dataclass(frozen=True, kw_only=True)
class FrequencyHistogram:
    """How many latents are in use how often; those that never are, are in no bin."""

    log10_edges: tuple[float, ...]
    """Of the bins, rising: log10 of the share of rows."""

    n_latents: tuple[int, ...]
    """Of each bin: one less than there are edges."""

    @classmethod
    def of(cls, counts: LatentCounts) -> "FrequencyHistogram":
        """In half decades."""
        n_latents, edges = counts.histogram()
        return cls(log10_edges=tuple(edges.tolist()), n_latents=tuple(n_latents.tolist()))


@dataclass(frozen=True, kw_only=True)
class LayerFidelity:
    """Reconstruction of one layer; `sae.metrics` defines each measure."""

    fvu: float
    """Fraction of variance unexplained, a ratio of sums over all rows; lower is better."""

    explained_variance: float
    """1 - FVU."""

    l0: float
    """Mean latents in use per row."""

    dead_fraction: float
    """Share of latents that no row of this layer uses."""

    cosine: float
    """Mean cosine of activation and reconstruction; 1 is best."""

    norm_ratio: float
    """Mean norm of the reconstruction over that of the activation; below 1 is shrinkage."""

    relative_bias: float | None
    """Relative reconstruction bias: 1 is best, below is shrinkage; None if nothing is reconstructed."""

    dense_fraction: float
    """Share of latents that more than `sae.metrics.DENSE_FREQUENCY` of the rows use."""

    frequency_histogram: FrequencyHistogram
    """Latents by the share of rows that use them."""

    n_rows: int
    """Rows measured: those of the layer that the row filter keeps."""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Reconstruction of all layers of a group."""

    layers: dict[int, LayerFidelity]
    """Per layer."""

    l0: float
    """Mean latents in use per row, over the rows of all layers."""

    dead_fraction: float
    """Share of latents that no row of any layer uses."""

    means: dict[int, Float[Tensor, " d_model"]]
    """Per layer, the mean of the rows measured, in float64."""

    @property
    def mean_fvu(self) -> float:
        """Mean of the layers' FVU, each layer counting the same; lower is better."""
        return sum(part.fvu for part in self.layers.values()) / len(self.layers)


def reconstruction_quality(
    sae: SparseAutoencoder, store: Location, layers: Sequence[int], row_filter: RowFilter
) -> Fidelity:
    """Measures over every kept row of some layers, as the autoencoder is used at inference.

    Ranks that share an autoencoder all call this, and all have the same of it.

    Args:
        sae: On whichever device it shall run.
        store: A store with an array per layer: the validation store.
        layers: At least one, each with a scale in the autoencoder.
        row_filter: The one the autoencoder was trained with.

    Raises:
        InputError: If the row filter keeps no row of a layer.
        StoreError: If the store lacks a layer or a shard.
    """
    opened = ActivationStore.open(store)
    parts: dict[int, LayerFidelity] = {}
    means: dict[int, Tensor] = {}
    all_counts = LatentCounts(sae.cfg.d_sae)
    for layer in layers:
        rows, held = ReconstructionMetrics(), LatentCounts(len(sae.held))
        for x in kept_rows(opened, layer, row_filter):
            x = x.to(sae.b_dec.device)
            ids = torch.full((len(x),), layer, dtype=torch.int64, device=x.device)
            x_hat, latents = sae.reconstruct(x, ids)
            rows.update(x, x_hat)
            held.update(latents)
        if rows.n_tokens == 0:
            raise InputError(
                f"the row filter keeps none of the {opened.spec.n_rows} rows of layer {layer} of "
                f"{store}; at least one is needed: loosen the hygiene settings or harvest more"
            )
        counts = held.of_all_ranks(sae.held, sae.cfg.d_sae, sae.ranks, sae.b_dec.device)
        parts[layer] = LayerFidelity(
            fvu=rows.fvu,
            explained_variance=rows.explained_variance,
            l0=counts.l0,
            dead_fraction=counts.dead_fraction,
            cosine=rows.cosine,
            norm_ratio=rows.norm_ratio,
            relative_bias=rows.relative_bias,
            dense_fraction=counts.dense_fraction,
            frequency_histogram=FrequencyHistogram.of(counts),
            n_rows=rows.n_tokens,
        )
        means[layer] = rows.mean
        all_counts.merge(counts)
    return Fidelity(
        layers=parts, l0=all_counts.l0, dead_fraction=all_counts.dead_fraction, means=means
    )


def kept_rows(
    store: ActivationStore, layer: int, row_filter: RowFilter
) -> Iterator[Float[Tensor, "rows d_model"]]:
    """The kept rows of a layer, chunk by chunk, at most `_BATCH_ROWS` at a time."""
    array = f"layers/{layer}"
    for chunk in range(store.spec.n_chunks):
        start, stop = store.spec.chunk_range(chunk)
        keep = row_filter.keep(
            store.column("token_id", start, stop),
            store.column("position", start, stop),
            np.full(stop - start, layer),
            store.column(f"{array}/norm", start, stop),
        )
        if keep.any():
            yield from torch.from_numpy(store.read(array, start, stop)[keep]).split(_BATCH_ROWS)

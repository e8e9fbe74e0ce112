"""What each latent of an autoencoder does, read off the validation store; no judge, no second pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from actors.errors import InputError
from actors.language_model import describe
from actors.model_source import ModelSource
from actors.saved import load_autoencoder
from actors.unembedding import DecodedTokens, Unembedding
from sae.dictionary import nearest_rows
from sae.latent_statistics import LatentStatistics
from sae.top_activations import TopActivations
from storage.activations import ActivationStore
from storage.encoding import decode
from storage.hygiene import RowFilter
from storage.layout import StoreSpec
from storage.places import Location

N_CONTEXTS, N_DECODED, N_NEAREST = 10, 8, 8
"""Kept of every latent."""

BEFORE, AFTER = 16, 8
"""Tokens shown around the strongest one."""

_BATCH_ROWS = 2048  # encoded at once, or a whole sequence: bounds memory, changes no result


@dataclass(frozen=True, kw_only=True)
class LatentReport:
    """All latents of one autoencoder."""

    statistics: LatentStatistics
    """How often and how strongly each fires, over all kept rows of its layers."""

    top: TopActivations
    """The tokens on which each is strongest. Sequences count as in `stored_sequences`."""

    nearest: tuple[Float[Tensor, "d_sae n"], Int[Tensor, "d_sae n"]]
    """Of each the latents whose decoder rows have the largest cosine with its own, falling; which."""

    decoded: DecodedTokens | None
    """The tokens that its decoder row speaks for; None for encoders, which predict no next token."""


class LatentContexts:
    """Describes the latents of any number of autoencoders of one run.

    Every kept row of the validation store is encoded once, whole sequences at a time; memory holds
    one shard of one layer, and some 1.5 kB per latent (100 MB for 65,536).
    """

    def __init__(
        self,
        model: ModelSource,
        vocabulary: int,
        validation: Location,
        row_filter: RowFilter,
        device: str = "cpu",
        n_threads: int = 1,
    ) -> None:
        """Load the model's unembedding, if it is causal, and open the store.

        Args:
            model: The model that the activations are from.
            vocabulary: Token ids below this have a text.
            validation: A store with an array per layer.
            row_filter: The one the autoencoders were trained with.
            device: For unembedding and autoencoders.
            n_threads: Of torch on the CPU.

        Raises:
            InputError: If the model can't be loaded.
            StoreError: If there is no such store.
        """
        torch.set_num_threads(n_threads)
        self._store = ActivationStore.open(validation)
        self._vocabulary, self._row_filter, self._device = vocabulary, row_filter, device
        causal = describe(model).is_causal
        self._unembedding = Unembedding.of(model, device) if causal else None

    @torch.inference_mode()
    def report(self, sae_folder: Path, layers: Sequence[int]) -> LatentReport:
        """Describe all latents of the autoencoder in a folder.

        Raises:
            InputError: If it was made for another width, or the row filter keeps no row of a layer.
            ValueError: If the autoencoder has no scale for a layer.
            StoreError: If the store lacks a layer or a shard.
        """
        spec = self._store.spec
        sae = load_autoencoder(sae_folder, self._device, spec.d_model)
        statistics = LatentStatistics(sae.cfg.d_sae, layers)
        context = spec.first_position + spec.rows_per_sequence
        top = TopActivations(sae.cfg.d_sae, N_CONTEXTS, context, BEFORE, AFTER)
        for layer in layers:
            for x, places in self._kept_rows(layer):
                ids = torch.full((len(x),), layer, dtype=torch.int64, device=self._device)
                x = x.to(self._device, sae.b_dec.dtype)
                latents = sae.encode(sae.scaling.units(x, ids).scale(x))
                statistics.update(latents, layer)
                top.update(latents, places, layer)
        if not bool((statistics.n_tokens > 0).all()):
            raise InputError(
                f"the row filter keeps none of the {spec.n_rows} rows of a layer of {layers} of "
                f"{self._store.place}; at least one is needed: loosen the hygiene settings or harvest "
                "more"
            )
        cosines, indices = nearest_rows(sae.w_dec.float(), N_NEAREST)
        decoded = None
        if self._unembedding is not None:
            decoded = self._unembedding.top_tokens(sae.w_dec.float(), N_DECODED, self._vocabulary)
        return LatentReport(
            statistics=statistics,
            top=top,
            nearest=(cosines.cpu(), indices.cpu()),
            decoded=decoded,
        )

    def _kept_rows(
        self, layer: int
    ) -> Iterator[tuple[Float[Tensor, "rows d_model"], Int[Tensor, " rows"]]]:
        """The kept rows of a layer in reading order, whole sequences at a time, and their places."""
        spec, array = self._store.spec, f"layers/{layer}"
        step = max(1, _BATCH_ROWS // spec.rows_per_sequence) * spec.rows_per_sequence
        for shard in range(spec.n_shards):
            start, stop = spec.shard_range(shard)
            places = self._places(start, stop)
            token_id = self._store.column("token_id", start, stop)
            position = self._store.column("position", start, stop)
            norm = self._store.column(f"{array}/norm", start, stop)
            keep = self._row_filter.keep(token_id, position, np.full(stop - start, layer), norm)
            stored = self._store.read_stored(array, start, stop)
            scales = self._store.row_scales(array, start, stop)
            order = np.argsort(places)
            for first in range(0, len(order), step):
                rows = order[first : first + step]
                rows = rows[keep[rows]]
                if len(rows):
                    x = decode(
                        torch.from_numpy(stored[rows]), torch.from_numpy(scales[rows]), spec.dtype
                    )
                    yield x, torch.from_numpy(places[rows])

    def _places(self, start: int, stop: int) -> Int64[np.ndarray, " rows"]:
        """Of each row sequence * context + position, sequences counted as in `stored_sequences`."""
        spec = self._store.spec
        sequence = np.searchsorted(
            stored_sequences(spec), self._store.column("sequence", start, stop)
        )
        position = self._store.column("position", start, stop).astype(np.int64)
        return sequence * (spec.first_position + spec.rows_per_sequence) + position


def stored_sequences(spec: StoreSpec) -> Int64[np.ndarray, " sequences"]:
    """Which sequences of its split a store holds, ascending."""
    return np.sort(np.concatenate([spec.sequences_of(shard) for shard in range(spec.n_shards)]))

"""Judges one autoencoder on one layer: its reconstructions, and what they do to the model."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from actors.errors import InputError
from actors.fidelity import LayerFidelity, reconstruction_quality
from actors.language_model import LanguageModel, describe
from actors.model_source import ModelSource
from actors.splice import Replacement, edit, reconstruction, zero
from sae import checkpoint, metrics
from storage.hygiene import RowFilter
from storage.places import Location
from storage.tokens import TokenStore

_SPLIT = "validation"


@dataclass(frozen=True, kw_only=True)
class LayerReport(LayerFidelity):
    """One autoencoder on one layer; an encoder predicts no next token, so it has no cross-entropy."""

    ce_clean: float | None = None
    """Cross-entropy of the untouched model, in nats per token."""

    ce_sae: float | None = None
    """The same with the reconstructions in place of the layer's activations."""

    ce_zero: float | None = None
    """The same with zeros in their place."""

    ce_recovered: float | None = None
    """(ce_zero - ce_sae) / (ce_zero - ce_clean): 1 is lossless, 0 no better than zeros."""

    n_tokens: int = 0
    """Predictions that each cross-entropy averages over."""


class Evaluator:
    """One language model, with its head if it predicts; judges any number of autoencoders.

    A plain class: tests call it in process. Between calls it keeps the model and the
    cross-entropies that don't depend on an autoencoder, so ask for one layer after the other.
    """

    def __init__(
        self,
        model: ModelSource,
        tokens: Location,
        validation: Location,
        row_filter: RowFilter,
        n_sequences: int,
        batch_tokens: int,
        device: str = "cpu",
        n_threads: int = 1,
    ) -> None:
        """Load the model and open the stores.

        Args:
            model: The model that the activations are from.
            tokens: Token store, whose validation split cross-entropy is measured on.
            validation: Activation store, all layers of validation sequences.
            row_filter: The one the autoencoders were trained with.
            n_sequences: To measure cross-entropy on, spread evenly over the split, which may have
                less.
            batch_tokens: Tokens of a forward pass; a whole sequence at least.
            device: For the model and the autoencoders.
            n_threads: Of torch on the CPU.

        Raises:
            InputError: If the model can't be loaded.
            StoreError: If there is no token store.
        """
        torch.set_num_threads(n_threads)
        self._model = LanguageModel(model, device, head=describe(model).is_causal)
        self._tokens = TokenStore.open(tokens)
        self._validation, self._row_filter, self._device = validation, row_filter, device
        # Documents are packed in order, so the first sequences would be few documents.
        available = self._tokens.n_sequences(_SPLIT)
        n_sequences = min(n_sequences, available)
        self._sequences = np.arange(n_sequences) * available // n_sequences
        self._batch = max(1, batch_tokens // self._tokens.context)
        self._ce_clean: float | None = None
        self._ce_zero: dict[int, float] = {}

    def evaluate(self, sae_folder: Path, layer: int) -> LayerReport:
        """Measure the autoencoder in a folder on one of its layers.

        Raises:
            InputError: If it was made for another width, or zeros in place of the layer's
                activations don't harm the model.
            ValueError: If the folder holds no autoencoder, or it has no scale for the layer.
            StoreError: If the validation store lacks the layer or a shard.
        """
        sae, _ = checkpoint.load(sae_folder, self._device)
        d_model = self._model.shape.d_model
        if sae.d_model != d_model:
            raise InputError(
                f"the autoencoder in {sae_folder} reads activations of width {sae.d_model}, and "
                f"the model's have {d_model}; evaluate it with the model it was trained on"
            )
        quality = reconstruction_quality(sae, self._validation, [layer], self._row_filter)
        fidelity = asdict(quality.layers[layer])
        if not self._model.shape.is_causal:
            return LayerReport(**fidelity)
        if self._ce_clean is None:
            self._ce_clean = self._cross_entropy(layer, None)
        if layer not in self._ce_zero:
            self._ce_zero[layer] = self._cross_entropy(layer, zero)
        ce_clean, ce_zero = self._ce_clean, self._ce_zero[layer]
        ce_sae = self._cross_entropy(layer, reconstruction(sae, layer))
        try:
            ce_recovered = metrics.ce_recovered(ce_clean, ce_sae, ce_zero)
        except ValueError as error:
            raise InputError(f"layer {layer}: {error}") from error
        return LayerReport(
            **fidelity,
            ce_clean=ce_clean,
            ce_sae=ce_sae,
            ce_zero=ce_zero,
            ce_recovered=ce_recovered,
            n_tokens=len(self._sequences) * (self._tokens.context - 1),
        )

    def _cross_entropy(self, layer: int, replacement: Replacement | None) -> float:
        """Mean over all predictions, in nats, with the layer's kept rows replaced."""
        total = 0.0
        for start in range(0, len(self._sequences), self._batch):
            ids = self._tokens.ids(_SPLIT, self._sequences[start : start + self._batch])
            edits = {}
            if replacement is not None:
                first = self._tokens.first_position
                edits[layer] = edit(replacement, layer, ids, self._row_filter, first)
            losses = self._model.token_losses(torch.from_numpy(ids), edits)
            total += float(losses.double().sum())
        return total / (len(self._sequences) * (self._tokens.context - 1))

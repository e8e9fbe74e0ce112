"""Judges one autoencoder on one layer: its reconstructions, and what they do to the model."""

from dataclasses import dataclass, fields
from pathlib import Path

import torch

from actors.cross_entropy import CrossEntropy, Effect
from actors.errors import InputError
from actors.fidelity import LayerFidelity, reconstruction_quality
from actors.language_model import LanguageModel, describe
from actors.model_source import ModelSource
from actors.saved import load_autoencoder
from actors.splice import constant, reconstruction, zero
from sae import metrics
from storage.hygiene import RowFilter
from storage.places import Location
from storage.tokens import TokenStore


@dataclass(frozen=True, kw_only=True)
class LayerReport(LayerFidelity):
    """One autoencoder on one layer; an encoder predicts no next token, so what follows is None."""

    ce_clean: float | None = None
    """Cross-entropy of the untouched model, in nats per token."""

    ce_sae: float | None = None
    """The same with the reconstructions in place of the layer's activations."""

    ce_zero: float | None = None
    """The same with zeros in their place."""

    ce_mean: float | None = None
    """The same with the layer's mean validation row in their place."""

    ce_recovered: float | None = None
    """(ce_zero - ce_sae) / (ce_zero - ce_clean): 1 is lossless, 0 no better than zeros."""

    ce_recovered_mean: float | None = None
    """The same with ce_mean for ce_zero; None if mean ablation costs nothing."""

    kl: float | None = None
    """KL(untouched || with reconstructions), mean over all positions, in nats; 0 is best."""

    kl_zero: float | None = None
    """The same with zeros."""

    n_tokens: int = 0
    """Predictions that cross-entropies average over."""


class Evaluator:
    """One language model, with its head if it predicts; judges any number of autoencoders.

    A plain class: tests call it in process. Between calls it keeps the model and what its layers'
    ablation does, which doesn't depend on an autoencoder, so ask for one layer after the other.
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
        self._validation, self._row_filter, self._device = validation, row_filter, device
        store = TokenStore.open(tokens)
        self._cross_entropy = CrossEntropy(
            self._model, store, row_filter, n_sequences, batch_tokens
        )
        self._ablated: dict[int, dict[str, Effect]] = {}

    def evaluate(self, sae_folder: Path, layer: int) -> LayerReport:
        """Measure the autoencoder in a folder on one of its layers.

        Raises:
            InputError: If it was made for another width, or zeros in place of the layer's
                activations don't harm the model.
            ValueError: If the autoencoder has no scale for the layer.
            StoreError: If the validation store lacks the layer or a shard.
        """
        sae = load_autoencoder(sae_folder, self._device, self._model.shape.d_model)
        quality = reconstruction_quality(sae, self._validation, [layer], self._row_filter)
        of_layer = quality.layers[layer]
        fidelity = {field.name: getattr(of_layer, field.name) for field in fields(of_layer)}
        if not self._model.shape.is_causal:
            return LayerReport(**fidelity)
        replacements = {"sae": reconstruction(sae, layer)}
        if layer not in self._ablated:
            replacements |= {"zero": zero, "mean": constant(quality.means[layer])}
        ce_clean, effects = self._cross_entropy.effects(layer, replacements)
        spliced = effects.pop("sae")
        zeros, means = self._ablated.setdefault(layer, effects).values()
        try:
            ce_recovered = metrics.ce_recovered(ce_clean, spliced.ce, zeros.ce)
        except ValueError as error:
            raise InputError(f"layer {layer}: {error}") from error
        return LayerReport(
            **fidelity,
            ce_clean=ce_clean,
            ce_sae=spliced.ce,
            ce_zero=zeros.ce,
            ce_mean=means.ce,
            ce_recovered=ce_recovered,
            ce_recovered_mean=metrics.ce_recovered(ce_clean, spliced.ce, means.ce)
            if means.ce > ce_clean
            else None,
            kl=spliced.kl,
            kl_zero=zeros.kl,
            n_tokens=self._cross_entropy.n_tokens,
        )

"""Judges one autoencoder on one layer: its reconstructions, and what they do to the model."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from actors.errors import InputError
from actors.fidelity import LayerFidelity, reconstruction_quality
from actors.language_model import LanguageModel, describe
from actors.model_source import ModelSource
from actors.splice import Replacement, constant, edit, reconstruction, zero
from sae import checkpoint, metrics
from storage.hygiene import RowFilter
from storage.places import Location
from storage.tokens import TokenStore

_SPLIT = "validation"
KEPT_LOGITS_BYTES = 256 * 2**20
"""Of the untouched model, kept for the next evaluation; what is beyond is computed again."""


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


@dataclass(frozen=True)
class Effect:
    """What a replacement does to the model's predictions."""

    ce: float
    """Cross-entropy, in nats per token."""

    kl: float
    """Divergence from the untouched model, in nats per position."""


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
        self._tokens = TokenStore.open(tokens)
        self._validation, self._row_filter, self._device = validation, row_filter, device
        # Documents are packed in order, so the first sequences would be few documents.
        available = self._tokens.n_sequences(_SPLIT)
        n_sequences = min(n_sequences, available)
        self._sequences = np.arange(n_sequences) * available // n_sequences
        self._batch = max(1, batch_tokens // self._tokens.context)
        self._ablated: dict[int, dict[str, Effect]] = {}
        self._clean: dict[int, Tensor] = {}

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
        of_layer = quality.layers[layer]
        fidelity = {field.name: getattr(of_layer, field.name) for field in fields(of_layer)}
        if not self._model.shape.is_causal:
            return LayerReport(**fidelity)
        replacements = {"sae": reconstruction(sae, layer)}
        if layer not in self._ablated:
            replacements |= {"zero": zero, "mean": constant(quality.means[layer])}
        ce_clean, effects = self._effects(layer, replacements)
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
            n_tokens=len(self._sequences) * (self._tokens.context - 1),
        )

    def _effects(
        self, layer: int, replacements: Mapping[str, Replacement]
    ) -> tuple[float, dict[str, Effect]]:
        """Cross-entropy of the untouched model, and what replacing the layer's kept rows does.

        Means over all predictions or positions. The logits of two passes are held at a time, beside
        those that are kept.
        """
        ce_clean, totals = 0.0, dict.fromkeys(replacements, (0.0, 0.0))
        first = self._tokens.first_position
        for start in range(0, len(self._sequences), self._batch):
            packed = self._tokens.ids(_SPLIT, self._sequences[start : start + self._batch])
            ids = torch.from_numpy(packed)
            clean = self._clean_logits(start, ids)
            ce_clean += _cross_entropy(ids, clean)
            for name, replacement in replacements.items():
                edits = {layer: edit(replacement, layer, packed, self._row_filter, first)}
                changed = self._model.logits(ids, edits)
                ce, kl = totals[name]
                totals[name] = ce + _cross_entropy(ids, changed), kl + _divergence(clean, changed)
        n_tokens = len(self._sequences) * (self._tokens.context - 1)
        n_positions = len(self._sequences) * self._tokens.context
        return ce_clean / n_tokens, {
            name: Effect(ce / n_tokens, kl / n_positions) for name, (ce, kl) in totals.items()
        }

    def _clean_logits(self, start: int, ids: Tensor) -> Tensor:
        """Of the untouched model on the batch of sequences that begins at `start`."""
        if start in self._clean:
            return self._clean[start]
        logits = self._model.logits(ids)
        kept = sum(batch.nbytes for batch in self._clean.values())
        if kept + logits.nbytes <= KEPT_LOGITS_BYTES:
            self._clean[start] = logits
        return logits


def _cross_entropy(
    ids: Int64[Tensor, "sequences context"], logits: Float[Tensor, "sequences context vocabulary"]
) -> float:
    """Sum over all predictions, sequence by sequence: copies of all logits would be large."""
    pairs = zip(logits, ids.to(logits.device), strict=True)
    return sum(float(metrics.next_token_losses(row, mine).double().sum()) for row, mine in pairs)


def _divergence(
    clean: Float[Tensor, "sequences context vocabulary"],
    changed: Float[Tensor, "sequences context vocabulary"],
) -> float:
    """Sum over all positions, the last one too: what follows it is predicted, if not known."""
    pairs = zip(clean, changed, strict=True)
    return sum(float(metrics.kl_divergence(*pair).double().sum()) for pair in pairs)

"""What a change inside a language model does to its predictions, on fixed validation sequences."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from actors.errors import InputError
from actors.language_model import LanguageModel
from actors.splice import Replacement, edit, zero
from sae import metrics
from storage.hygiene import RowFilter
from storage.tokens import TokenStore

_SPLIT = "validation"
KEPT_LOGITS_BYTES = 256 * 2**20
"""Of the untouched model, kept for the next evaluation; what is beyond is computed again."""


@dataclass(frozen=True)
class Effect:
    """What a replacement does to the model's predictions."""

    ce: float
    """Cross-entropy, in nats per token."""

    kl: float
    """Divergence from the untouched model, in nats per position."""


class CrossEntropy:
    """Measures one model, a layer at a time; what depends on no autoencoder is measured once."""

    def __init__(
        self,
        model: LanguageModel,
        tokens: TokenStore,
        row_filter: RowFilter,
        n_sequences: int,
        batch_tokens: int,
    ) -> None:
        """Choose the sequences.

        Args:
            model: With its head.
            tokens: Whose validation split is measured on.
            row_filter: Rows that it drops are never replaced.
            n_sequences: Spread evenly over the split, which may have less.
            batch_tokens: Tokens of a forward pass; a whole sequence at least.
        """
        # Documents are packed in order, so the first sequences would be few documents.
        available = tokens.n_sequences(_SPLIT)
        self.n_sequences = min(n_sequences, available)
        self._sequences = np.arange(self.n_sequences) * available // self.n_sequences
        self._model, self._tokens, self._row_filter = model, tokens, row_filter
        self._batch = max(1, batch_tokens // tokens.context)
        self._clean: float | None = None
        self._zero: dict[int, float] = {}
        self._logits: dict[int, Tensor] = {}

    @property
    def n_tokens(self) -> int:
        """Predictions that it averages over."""
        return self.n_sequences * (self._tokens.context - 1)

    @property
    def clean(self) -> float:
        """Of the untouched model, in nats per token."""
        if self._clean is None:
            self._clean = self._mean(0, None)
        return self._clean

    def zeroed(self, layer: int) -> float:
        """With zeros in place of the layer's activations, in nats per token."""
        if layer not in self._zero:
            self._zero[layer] = self._mean(layer, zero)
        return self._zero[layer]

    def replaced(self, layer: int, replacement: Replacement) -> float:
        """With something else in place of the layer's activations, in nats per token."""
        return self._mean(layer, replacement)

    def recovered(self, layer: int, ce: float) -> float:
        """Share of what zeros cost that a cross-entropy of this layer saves; 1 is lossless.

        Raises:
            InputError: If zeros in place of the layer's activations don't harm the model.
        """
        try:
            return metrics.ce_recovered(self.clean, ce, self.zeroed(layer))
        except ValueError as error:
            raise InputError(f"layer {layer}: {error}") from error

    def _mean(self, layer: int, replacement: Replacement | None) -> float:
        total = 0.0
        for start in range(0, self.n_sequences, self._batch):
            ids = self._tokens.ids(_SPLIT, self._sequences[start : start + self._batch])
            edits = {}
            if replacement is not None:
                first = self._tokens.first_position
                edits[layer] = edit(replacement, layer, ids, self._row_filter, first)
            losses = self._model.token_losses(torch.from_numpy(ids), edits)
            total += float(losses.double().sum())
        return total / self.n_tokens

    def effects(
        self, layer: int, replacements: Mapping[str, Replacement]
    ) -> tuple[float, dict[str, Effect]]:
        """Cross-entropy of the untouched model, and what replacing the layer's kept rows does.

        Means over all predictions or positions. The logits of two passes are held at a time, beside
        those that are kept.
        """
        ce_clean, totals = 0.0, dict.fromkeys(replacements, (0.0, 0.0))
        first = self._tokens.first_position
        for start in range(0, self.n_sequences, self._batch):
            packed = self._tokens.ids(_SPLIT, self._sequences[start : start + self._batch])
            ids = torch.from_numpy(packed)
            clean = self._clean_logits(start, ids)
            ce_clean += _cross_entropy(ids, clean)
            for name, replacement in replacements.items():
                edits = {layer: edit(replacement, layer, packed, self._row_filter, first)}
                changed = self._model.logits(ids, edits)
                ce, kl = totals[name]
                totals[name] = ce + _cross_entropy(ids, changed), kl + _divergence(clean, changed)
        n_positions = self.n_sequences * self._tokens.context
        return ce_clean / self.n_tokens, {
            name: Effect(ce / self.n_tokens, kl / n_positions) for name, (ce, kl) in totals.items()
        }

    def _clean_logits(self, start: int, ids: Tensor) -> Tensor:
        """Of the untouched model on the batch of sequences that begins at `start`."""
        if start in self._logits:
            return self._logits[start]
        logits = self._model.logits(ids)
        kept = sum(batch.nbytes for batch in self._logits.values())
        if kept + logits.nbytes <= KEPT_LOGITS_BYTES:
            self._logits[start] = logits
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

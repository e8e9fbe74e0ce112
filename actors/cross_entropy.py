"""What a change inside a language model costs: cross-entropy on fixed validation sequences."""

import numpy as np
import torch

from actors.errors import InputError
from actors.language_model import LanguageModel
from actors.splice import Replacement, edit, zero
from sae import metrics
from storage.hygiene import RowFilter
from storage.tokens import TokenStore

_SPLIT = "validation"


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

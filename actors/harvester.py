"""Frozen language model in, activation shards out."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from actors.allocator import release_freed_memory
from actors.errors import InputError
from actors.language_model import LanguageModel
from actors.model_source import ModelSource
from actors.shard_rows import ShardRows
from storage.activations import ActivationStore
from storage.commits import ShardRecord
from storage.encoding import memory_for
from storage.layout import StoreSpec
from storage.places import Location
from storage.row_memory import RowMemory
from storage.tokens import TokenStore

SHARDS_AT_ONCE = 2
"""Calls of `Harvester.harvest` to have under way: one shard is computed, the one before written."""


@dataclass(frozen=True, kw_only=True)
class HarvestReceipt:
    """What became of one shard."""

    record: ShardRecord
    """Its commit record: files, and rows and norms by layer."""

    n_tokens: int
    """Tokens that went through the model for it now; 0 if it was committed before."""

    model_seconds: float
    """Time in the model and in gathering its rows."""

    write_seconds: float
    """Time in writing the shard."""

    @property
    def n_rows(self) -> int:
        """Activations it holds, over all arrays."""
        return sum(totals.rows for totals in self.record.layers.values())

    @property
    def n_bytes(self) -> int:
        """Its size on disk."""
        return self.record.n_bytes

    @property
    def n_clipped(self) -> int:
        """Values that were too large for the store's dtype and are stored as its largest."""
        return self.record.n_clipped


class Harvester:
    """One frozen language model on one device.

    A shard is a pure function of the model, the tokens and the store's specification, so retries
    and other orders are safe. It keeps nothing between calls but the model.

    `harvest` may be called from several threads: the model serves one of them at a time, while the
    others write. With `SHARDS_AT_ONCE` threads the model need not wait for the disk, and memory
    holds as many shards of every array, as they are stored.
    """

    def __init__(
        self,
        model: ModelSource,
        tokens: Location,
        batch_tokens: int,
        device: str = "cpu",
        n_threads: int = 1,
    ) -> None:
        """Load the model.

        Args:
            model: What to harvest from.
            tokens: The token store.
            batch_tokens: Tokens per forward pass, at least one sequence.
            device: Where the model computes.
            n_threads: Cores it computes on, and arrays it writes at a time. The numbers may differ in the
                last bits with another.

        Raises:
            InputError: If the model can't be loaded, or is too short for the token store's context.
        """
        torch.set_num_threads(n_threads)
        self._n_threads = n_threads
        self._model = LanguageModel(model, device)
        self._tokens = TokenStore.open(tokens)
        shape = self._model.shape
        if not shape.takes(self._tokens.context):
            raise InputError(
                f"{tokens} has sequences of {self._tokens.context} tokens, longer than the "
                f"{shape.longest} positions that {model.name} knows; lower harvest.context to "
                f"{shape.longest} at most and use another run directory"
            )
        self._batch_sequences = max(1, batch_tokens // self._tokens.context)
        self._computing = Lock()
        self._memory: dict[StoreSpec, RowMemory] = {}

    def mean_norms(
        self, layers: Sequence[int], split: str, sequences: Integer[np.ndarray, " sequences"]
    ) -> dict[int, float]:
        """Mean Euclidean norm of each layer's activations over some sequences, in the model's units.

        Over the positions that would be stored. For choosing a store's scales.

        Raises:
            InputError: If an activation is not finite.
        """
        sums = dict.fromkeys(layers, 0.0)
        n_rows = 0
        first = self._tokens.first_position
        for n_sequences, activations in self._batches(self._tokens.ids(split, sequences), layers):
            n_rows += n_sequences * (self._tokens.context - first)
            for layer, x in activations.items():
                sums[layer] += x[:, first:].double().norm(dim=-1).sum().item()
        for layer, total in sums.items():
            if not np.isfinite(total):
                raise InputError(
                    f"activations of layer {layer} are not finite; only finite ones can be stored: "
                    "run the model in another dtype (model.dtype: float32 or bfloat16), or check "
                    "its weights"
                )
        return {layer: total / n_rows for layer, total in sums.items()}

    def harvest(self, store: Location, shard: int) -> HarvestReceipt:
        """Write a shard of a store; one that is committed is returned at once.

        Raises:
            InputError: If the store was specified for another model or other tokens.
            StoreError: If there is no such store or shard, or an activation is not finite.
        """
        activations = ActivationStore.open(store)
        record = activations.record(shard)
        if record is not None:
            return HarvestReceipt(record=record, n_tokens=0, model_seconds=0.0, write_seconds=0.0)
        spec = activations.spec
        self._check(spec)
        sequences = spec.sequences_of(shard)
        ids = self._tokens.ids(spec.split, sequences)
        sequence, position = spec.rows_of(shard)
        columns = {
            "sequence": sequence,
            "position": position,
            "token_id": ids[np.searchsorted(sequences, sequence), position].astype(np.uint32),
        }
        with self._computing:
            started = time.perf_counter()
            release_freed_memory()
            rows = ShardRows(spec, shard, self._memory_for(spec))
            for _, batch in self._batches(ids, spec.layers):
                rows.add(batch)
            arrays = rows.finish()
            computed = time.perf_counter()
        record = activations.write_shard(shard, arrays, columns, self._n_threads)
        return HarvestReceipt(
            record=record,
            n_tokens=ids.size,
            model_seconds=computed - started,
            write_seconds=time.perf_counter() - computed,
        )

    def _memory_for(self, spec: StoreSpec) -> RowMemory:
        """Of the store that is harvested now; that of the one before is let go."""
        if spec not in self._memory:
            self._memory = {spec: memory_for(spec)}
        return self._memory[spec]

    def _check(self, spec: StoreSpec) -> None:
        shape, tokens = self._model.shape, self._tokens
        for what, given, wanted in (
            ("d_model", spec.d_model, shape.d_model),
            ("first_position", spec.first_position, tokens.first_position),
            ("rows_per_sequence", spec.rows_per_sequence, tokens.context - tokens.first_position),
            ("n_population", spec.n_population, tokens.n_sequences(spec.split)),
        ):
            if given != wanted:
                raise InputError(
                    f"the store was made for {what} {given}, and this model with these tokens has "
                    f"{wanted}; harvest into another run directory"
                )

    def _batches(
        self, ids: Int64[np.ndarray, "sequences context"], layers: Sequence[int]
    ) -> Iterator[tuple[int, dict[int, Float[Tensor, "batch context d_model"]]]]:
        """Batch by batch, its number of sequences and each layer's activations at them."""
        for batch in torch.from_numpy(ids).split(self._batch_sequences):
            yield len(batch), self._model.activations(batch, layers)

"""Collects the rows of a shard from activations as they leave the model, batch by batch."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from actors.host_copy import HostCopy
from storage.encoding import EncodedBlock, EncodedRows, encode
from storage.layout import StoreSpec
from storage.row_memory import RowMemory


class ShardRows:
    """The encoded rows of one shard in reading order, and with them the order in which it stores them."""

    def __init__(self, spec: StoreSpec, shard: int, memory: RowMemory) -> None:
        """Work out which rows each array takes of each layer.

        Args:
            spec: Of the store.
            shard: Which.
            memory: Of `storage.encoding.memory_for` the store; it may serve several shards.
        """
        self._spec = spec
        rows, per_sequence = np.arange(np.diff(spec.shard_range(shard))[0]), spec.rows_per_sequence
        position = spec.first_position + rows % per_sequence
        tokens = rows // per_sequence * (spec.first_position + per_sequence) + position
        sequence = spec.sequences_of(shard)[rows // per_sequence]
        order = spec.permutation_of(shard)
        self._arrays = {
            array: EncodedRows.empty(len(rows), spec.dtype, memory, order) for array in spec.arrays
        }
        self._parts: list[_Part] = []
        for array in spec.arrays:
            layers = spec.row_layers(array, sequence, position)
            for layer in spec.layers_of(array):
                mine = layers == layer
                self._parts.append(_Part(array, layer, tokens[mine], rows[mine]))
        self._n_tokens = 0
        self._coming: list[tuple[EncodedRows, Int64[np.ndarray, " rows"], HostCopy]] = []

    def add(self, activations: Mapping[int, Float[Tensor, "sequences context d_model"]]) -> None:
        """Take what is stored of the next sequences; from a GPU it is there at the next call."""
        start = self._n_tokens
        begun = []
        for part in self._parts:
            x = activations[part.layer].flatten(0, 1)
            self._n_tokens = start + len(x)
            rows, places = part.between(start, self._n_tokens, x.device)
            scale = self._spec.scale_of(part.layer)
            chosen = rows if len(rows) < len(x) else None
            for span, block in encode(x, chosen, scale, self._spec.dtype):
                target = self._arrays[part.array]
                if x.is_cuda:
                    begun.append((target, places[span], HostCopy(block)))
                else:
                    target.put(_run(places[span]), block)
        # The former copies have come in while the model was busy with these sequences.
        self._place()
        self._coming = begun

    def finish(self) -> dict[str, EncodedRows]:
        """Every array's rows, with the order in which they are stored."""
        self._place()
        self._coming = []
        return self._arrays

    def _place(self) -> None:
        for target, places, copy in self._coming:
            target.put(places, EncodedBlock(*copy.result()))


def _run(ascending: Int64[np.ndarray, " rows"]) -> slice | Int64[np.ndarray, " rows"]:
    """Numbers as a slice, if none is left out between the first and the last: half the time to index."""
    first, last = ascending[0], ascending[-1]
    return slice(first, last + 1) if last - first + 1 == len(ascending) else ascending


class _Part:
    """What one array takes of one layer: tokens of the shard in reading order, and which rows they are."""

    def __init__(
        self,
        array: str,
        layer: int,
        tokens: Int64[np.ndarray, " rows"],
        rows: Int64[np.ndarray, " rows"],
    ) -> None:
        self.array, self.layer = array, layer
        self._tokens, self._rows = tokens, rows
        self._on_device = torch.from_numpy(tokens)

    def between(
        self, start: int, stop: int, device: torch.device
    ) -> tuple[Int64[Tensor, " rows"], Int64[np.ndarray, " rows"]]:
        """Of the tokens `start` to `stop`, which ones counted from `start`, and which rows they are."""
        self._on_device = self._on_device.to(device)  # copied once: to wait for it is to wait
        first, last = np.searchsorted(self._tokens, [start, stop])
        return self._on_device[first:last] - start, self._rows[first:last]

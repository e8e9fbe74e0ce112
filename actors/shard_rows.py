"""Puts activations, as they leave the model batch by batch, where their shard stores them."""

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
    """The encoded rows of one shard, filled batch by batch in reading order."""

    def __init__(self, spec: StoreSpec, shard: int, memory: RowMemory) -> None:
        """Work out which rows each array takes of each layer, and where they stand.

        Args:
            spec: Of the store.
            shard: Which.
            memory: Of `storage.encoding.memory_for` the store; it may serve several shards.
        """
        self._spec = spec
        sequence, position = spec.rows_of(shard)
        places = np.empty(len(sequence), np.int64)  # of each row in reading order
        places[spec.permutation_of(shard)] = np.arange(len(sequence))
        context = spec.first_position + spec.rows_per_sequence
        tokens = np.arange(len(places)) // spec.rows_per_sequence * context + position[places]
        self._arrays = {
            array: EncodedRows.empty(len(places), spec.dtype, memory) for array in spec.arrays
        }
        self._parts: list[_Part] = []
        for array in spec.arrays:
            layers = spec.row_layers(array, sequence, position)[places]
            for layer in spec.layers_of(array):
                mine = layers == layer
                self._parts.append(_Part(array, layer, tokens[mine], places[mine]))
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
            for span, block in encode(x, rows, scale, self._spec.dtype):
                target = self._arrays[part.array]
                if x.is_cuda:
                    begun.append((target, places[span], HostCopy(block)))
                else:
                    target.put(places[span], block)
        # The former copies have come in while the model was busy with these sequences.
        self._place()
        self._coming = begun

    def finish(self) -> dict[str, EncodedRows]:
        """Every array's rows, in the order in which they are stored."""
        self._place()
        self._coming = []
        return self._arrays

    def _place(self) -> None:
        for target, places, copy in self._coming:
            target.put(places, EncodedBlock(*copy.result()))


class _Part:
    """What one array takes of one layer: tokens of the shard in reading order, and their places."""

    def __init__(
        self,
        array: str,
        layer: int,
        tokens: Int64[np.ndarray, " rows"],
        places: Int64[np.ndarray, " rows"],
    ) -> None:
        self.array, self.layer = array, layer
        self._tokens, self._places = tokens, places
        self._on_device = torch.from_numpy(tokens)

    def between(
        self, start: int, stop: int, device: torch.device
    ) -> tuple[Int64[Tensor, " rows"], Int64[np.ndarray, " rows"]]:
        """Of the tokens `start` to `stop`, which ones counted from `start`, and their places."""
        self._on_device = self._on_device.to(device)  # copied once: to wait for it is to wait
        first, last = np.searchsorted(self._tokens, [start, stop])
        return self._on_device[first:last] - start, self._places[first:last]

"""Puts activations, as they leave the model batch by batch, where their shard stores them."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from actors.host_copy import HostCopy
from storage.layout import StoreSpec


class ShardRows:
    """The rows of one shard, filled batch by batch in reading order."""

    def __init__(self, spec: StoreSpec, shard: int) -> None:
        """Work out which rows each array takes of each layer, and where they stand."""
        sequence, position = spec.rows_of(shard)
        places = np.argsort(spec.permutation_of(shard))  # of each row in reading order
        context = spec.first_position + spec.rows_per_sequence
        tokens = np.arange(len(places)) // spec.rows_per_sequence * context + position[places]
        self._arrays = {a: np.empty((len(places), spec.d_model), np.float32) for a in spec.arrays}
        self._parts: list[_Part] = []
        for array in spec.arrays:
            layers = spec.row_layers(array, sequence, position)[places]
            for layer in spec.layers_of(array):
                mine = layers == layer
                self._parts.append(_Part(array, layer, tokens[mine], places[mine]))
        self._n_tokens = 0
        self._coming: list[tuple[Float32[np.ndarray, "rows d_model"], np.ndarray, HostCopy]] = []

    def add(self, activations: Mapping[int, Float[Tensor, "sequences context d_model"]]) -> None:
        """Take what is stored of the next sequences; it is put in place at the next call."""
        start = self._n_tokens
        begun = []
        for part in self._parts:
            x = activations[part.layer].flatten(0, 1)
            self._n_tokens = start + len(x)
            rows, places = part.between(start, self._n_tokens, x.device)
            begun.append((self._arrays[part.array], places, HostCopy(x[rows])))
        # The former copies have come in while the model was busy with these sequences.
        self._place()
        self._coming = begun

    def finish(self) -> dict[str, Float32[np.ndarray, "rows d_model"]]:
        """Every array's rows, in the order in which they are stored."""
        self._place()
        self._coming = []
        return self._arrays

    def _place(self) -> None:
        for array, places, copy in self._coming:
            array[places] = copy.result()


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

"""Measures how far apart layers are, and how large their activations are, on the pilot store."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64
from scipy.spatial.distance import squareform

from actors.errors import InputError
from storage.activations import ActivationStore
from storage.hygiene import RowFilter
from storage.places import Location

BLOCK_VALUES = 2**19
"""float64 values worked on at once: 4 MiB, which stay in a cache."""


@dataclass(frozen=True, kw_only=True)
class DistanceReport:
    """What the pilot store says about its layers; plain numbers, so that JSON can hold it."""

    layers: tuple[int, ...]
    """Layer ids, in the order of the rows of `distances`."""

    distances: tuple[tuple[float, ...], ...]
    """Mean angular distance of every pair of layers, in [0, 1]; 0.5 is orthogonal."""

    centered: bool
    """Whether each layer's mean activation was subtracted first."""

    n_rows: int
    """Tokens that the distances average over: those that the row filter keeps in every layer."""

    n_stored: int
    """Tokens in the pilot store."""

    mean_norm: dict[int, float]
    """Mean L2 norm of the rows of each layer that the row filter keeps, in the model's units."""

    median_norm: dict[int, float]
    """Median L2 norm of all stored rows of each layer, in the model's units."""

    @property
    def matrix(self) -> Float64[np.ndarray, "layers layers"]:
        """The distances as an array."""
        return np.array(self.distances, dtype=np.float64)


class Grouper:
    """Reads one pilot store: every layer, at the same tokens.

    A plain class: tests call it in process. Memory is that of one chunk of every layer; the
    distances are float64 sums, so they don't depend on how large the store is.
    """

    def __init__(self, store: Location, row_filter: RowFilter | None = None) -> None:
        """Open the pilot store; without a filter every row counts.

        Raises:
            StoreError: If there is no store at that path.
        """
        self._store = ActivationStore.open(store)
        self._path = store
        self._row_filter = row_filter

    def median_norms(self) -> dict[int, float]:
        """Median L2 norm of all stored rows of each layer, exactly; what a row filter asks for."""
        return {layer: float(np.median(self._norms(layer))) for layer in self._store.spec.layers}

    def distances(self, center: bool) -> DistanceReport:
        """Mean over tokens of arccos(cosine) / pi for every pair of layers (papers.md 2.1).

        A pair is compared at one set of tokens, those that the row filter keeps in every layer; an
        activation of length 0 has no direction and counts as orthogonal to all others.

        Args:
            center: Subtract each layer's mean over those tokens first, which costs a second pass.

        Raises:
            InputError: If the row filter keeps no token.
            StoreError: If a shard isn't committed or is damaged.
        """
        spec = self._store.spec
        keep = np.ones(spec.n_rows, dtype=bool)
        mean_norm, median_norm = {}, {}
        for layer in spec.layers:
            norms = self._norms(layer)
            kept = self._kept(layer, norms)
            keep &= kept
            median_norm[layer] = float(np.median(norms))
            mean_norm[layer] = float(norms[kept].sum(dtype=np.float64) / max(1, kept.sum()))
        n_rows = int(keep.sum())
        if n_rows == 0:
            raise InputError(
                f"the row filter keeps none of the {spec.n_rows} tokens of {self._path} in every "
                "layer; at least one is needed: loosen the hygiene settings or harvest more"
            )
        return DistanceReport(
            layers=spec.layers,
            distances=tuple(map(tuple, self._mean_distances(keep, center).tolist())),
            centered=center,
            n_rows=n_rows,
            n_stored=spec.n_rows,
            mean_norm=mean_norm,
            median_norm=median_norm,
        )

    def _mean_distances(
        self, keep: Bool[np.ndarray, " stored"], center: bool
    ) -> Float64[np.ndarray, "layers layers"]:
        spec = self._store.spec
        n_layers, n_rows = len(spec.layers), int(keep.sum())
        means = np.zeros((n_layers, spec.d_model))
        if center:
            means = sum(x.sum(axis=0, dtype=np.float64) for x in self._chunks(keep)) / n_rows
        first, second = np.triu_indices(n_layers, k=1)  # the order of scipy's condensed matrices
        block_rows = max(1, BLOCK_VALUES // (n_layers * spec.d_model))
        angles = np.zeros(len(first))
        for x in self._chunks(keep):
            for start in range(0, len(x), block_rows):
                # Float32 would miss by 1e-4 where layers are nearly parallel: arccos is steep at 1.
                rows = x[start : start + block_rows] - means
                norms = np.linalg.norm(rows, axis=-1, keepdims=True)
                rows /= np.where(norms == 0, 1, norms)
                cosines = (rows @ rows.swapaxes(1, 2))[:, first, second]
                angles += np.arccos(cosines.clip(-1, 1)).sum(axis=0)
        return squareform(angles / n_rows / np.pi)

    def _chunks(
        self, keep: Bool[np.ndarray, " stored"]
    ) -> Iterator[Float32[np.ndarray, "rows layers d_model"]]:
        """The kept rows of each chunk, all layers side by side."""
        spec = self._store.spec
        for chunk in range(spec.n_chunks):
            start, stop = spec.chunk_range(chunk)
            kept = keep[start:stop]
            x = np.empty((int(kept.sum()), len(spec.layers), spec.d_model), np.float32)
            for place, layer in enumerate(spec.layers):
                x[:, place] = self._store.read(f"layers/{layer}", start, stop)[kept]
            yield x

    def _norms(self, layer: int) -> Float32[np.ndarray, " stored"]:
        return self._store.column(f"layers/{layer}/norm", 0, self._store.spec.n_rows)

    def _kept(
        self, layer: int, norms: Float32[np.ndarray, " stored"]
    ) -> Bool[np.ndarray, " stored"]:
        n_rows = self._store.spec.n_rows
        if self._row_filter is None:
            return np.ones(n_rows, dtype=bool)
        token_id = self._store.column("token_id", 0, n_rows)
        position = self._store.column("position", 0, n_rows)
        return self._row_filter.keep(token_id, position, np.full(n_rows, layer), norms)

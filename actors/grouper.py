"""Measures how far apart layers are, and how large their activations are, on the pilot store.

A grouper sums over one shard; `distances` has any number of them do so, and adds up in the order of shards, so
that the figures do not depend on how many they are.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class RowSums:
    """Sums over some rows, in float64."""

    n_rows: int
    total: Float64[np.ndarray, "*shape"]


Work = Callable[
    [tuple[Any, ...], str, Iterable[tuple[Any, ...]]], Iterable[tuple[tuple[Any, ...], Any]]
]
"""Every job with the result of `Grouper(*arguments).method(*job)`, in any order."""


class Grouper:
    """Reads one pilot store: every layer, at the same tokens.

    A plain class: tests call it in process. Memory is that of one chunk of every layer.
    """

    def __init__(
        self,
        store: Location,
        row_filter: RowFilter | None = None,
        means: Float64[np.ndarray, "layers d_model"] | None = None,
    ) -> None:
        """Open the pilot store.

        Args:
            store: Where it is.
            row_filter: Which rows count; without one every row does.
            means: Of the layers, which `angle_sums` subtracts.

        Raises:
            StoreError: If there is no store at that path.
        """
        self._store, self._row_filter, self._means = ActivationStore.open(store), row_filter, means

    def median_norms(self) -> dict[int, float]:
        """Median L2 norm of all stored rows of each layer, exactly; what a row filter asks for."""
        spec = self._store.spec
        return {
            layer: float(np.median(self._norms(layer, 0, spec.n_rows))) for layer in spec.layers
        }

    def mean_norms(self) -> dict[int, float]:
        """Mean L2 norm of the rows of each layer that the row filter keeps; 0 if it keeps none."""
        found, n_rows = {}, self._store.spec.n_rows
        tokens = self._tokens(0, n_rows)
        for layer in self._store.spec.layers:
            norms = self._norms(layer, 0, n_rows)
            norms = norms[self._kept(layer, tokens, norms)]
            found[layer] = float(norms.sum(dtype=np.float64) / max(1, len(norms)))
        return found

    def row_sums(self, shard: int) -> RowSums:
        """The rows of a shard that the filter keeps in every layer, added up: (layers, d_model).

        Raises:
            StoreError: If the shard isn't committed or is damaged.
        """
        spec = self._store.spec
        n_rows, total = 0, np.zeros((len(spec.layers), spec.d_model))
        for x in self._chunks(shard):
            n_rows += len(x)
            total += x.sum(axis=0, dtype=np.float64)
        return RowSums(n_rows=n_rows, total=total)

    def angle_sums(self, shard: int) -> RowSums:
        """arccos(cosine) / pi of every pair of layers, added up over the same rows.

        Pairs are in the order of scipy's condensed matrices.

        Raises:
            StoreError: As `row_sums`.
        """
        spec = self._store.spec
        means = 0.0 if self._means is None else self._means
        first, second = np.triu_indices(len(spec.layers), k=1)
        block_rows = max(1, BLOCK_VALUES // (len(spec.layers) * spec.d_model))
        n_rows, total = 0, np.zeros(len(first))
        for x in self._chunks(shard):
            n_rows += len(x)
            for start in range(0, len(x), block_rows):
                # Float32 would miss by 1e-4 where layers are nearly parallel: arccos is steep at 1.
                rows = x[start : start + block_rows].astype(np.float64) - means
                products = rows @ rows.swapaxes(1, 2)
                norms = np.sqrt(np.diagonal(products, axis1=1, axis2=2))
                norms = np.where(norms == 0, 1, norms)
                cosines = products[:, first, second] / (norms[:, first] * norms[:, second])
                total += np.arccos(cosines.clip(-1, 1)).sum(axis=0)
        return RowSums(n_rows=n_rows, total=total / np.pi)

    def _chunks(self, shard: int) -> Iterator[Float32[np.ndarray, "rows layers d_model"]]:
        """The kept rows of each chunk of a shard, all layers side by side."""
        spec = self._store.spec
        begin, end = spec.shard_range(shard)
        keep, tokens = np.ones(end - begin, dtype=bool), self._tokens(begin, end)
        for layer in spec.layers:
            keep &= self._kept(layer, tokens, self._norms(layer, begin, end))
        for start in range(begin, end, spec.chunk_rows):
            stop = min(start + spec.chunk_rows, end)
            kept = keep[start - begin : stop - begin]
            x = np.empty((int(kept.sum()), len(spec.layers), spec.d_model), np.float32)
            for place, layer in enumerate(spec.layers):
                x[:, place] = self._store.read(f"layers/{layer}", start, stop)[kept]
            yield x

    def _norms(self, layer: int, start: int, stop: int) -> Float32[np.ndarray, " rows"]:
        return self._store.column(f"layers/{layer}/norm", start, stop)

    def _tokens(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens rows are of, and where these stand."""
        return self._store.column("token_id", start, stop), self._store.column(
            "position", start, stop
        )

    def _kept(
        self,
        layer: int,
        tokens: tuple[np.ndarray, np.ndarray],
        norms: Float32[np.ndarray, " rows"],
    ) -> Bool[np.ndarray, " rows"]:
        if self._row_filter is None:
            return np.ones(len(norms), dtype=bool)
        return self._row_filter.keep(*tokens, np.full(len(norms), layer), norms)


def distances(
    store: Location,
    row_filter: RowFilter | None,
    median_norm: dict[int, float],
    center: bool,
    work: Work,
) -> DistanceReport:
    """Mean over tokens of arccos(cosine) / pi for every pair of layers (papers.md 2.1).

    A pair is compared at one set of tokens, those that the row filter keeps in every layer; an
    activation of length 0 has no direction and counts as orthogonal to all others.

    Args:
        store: The pilot store.
        row_filter: Which rows count.
        median_norm: What `Grouper.median_norms` gives, which a row filter asks for as well.
        center: Subtract each layer's mean over those tokens first, which costs a second pass.
        work: Who computes.

    Raises:
        InputError: If the row filter keeps no token.
        StoreError: If a shard isn't committed or is damaged.
    """
    spec, chosen = ActivationStore.open(store).spec, (store, row_filter)
    shards = [(shard,) for shard in range(spec.n_shards)]

    def mean(arguments: tuple[Any, ...], method: str) -> tuple[np.ndarray, int]:
        n_rows, total = 0, 0.0
        for sums in _in_order(work(arguments, method, shards)):
            n_rows, total = n_rows + sums.n_rows, total + sums.total
        if n_rows == 0:
            raise InputError(
                f"the row filter keeps none of the {spec.n_rows} tokens of {store} in every "
                "layer; at least one is needed: loosen the hygiene settings or harvest more"
            )
        return np.asarray(total) / n_rows, n_rows

    means = mean(chosen, "row_sums")[0] if center else None
    angles, n_rows = mean((*chosen, means), "angle_sums")
    [(_, mean_norm)] = work(chosen, "mean_norms", [()])
    return DistanceReport(
        layers=spec.layers,
        distances=tuple(map(tuple, squareform(angles).tolist())),
        centered=center,
        n_rows=n_rows,
        n_stored=spec.n_rows,
        mean_norm=mean_norm,
        median_norm=median_norm,
    )


def _in_order(results: Iterable[tuple[tuple[Any, ...], RowSums]]) -> Iterator[RowSums]:
    """Of shards that are done in any order; sums of floats depend on it."""
    waiting: dict[int, RowSums] = {}
    following = 0
    for (shard,), sums in results:
        waiting[shard] = sums
        while following in waiting:
            yield waiting.pop(following)
            following += 1

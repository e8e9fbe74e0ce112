"""Which stored rows are used: one definition for training, evaluation and splicing.

A store keeps every token but BOS; what is unfit is dropped when rows are read, by their columns, so
another choice needs no new harvest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer, Shaped

from storage.errors import StoreError


@dataclass(frozen=True, kw_only=True)
class Hygiene:
    """What is dropped from the rows of a store."""

    drop_special_tokens: bool = True
    """BOS, EOS, padding, turns of a chat: they carry no text, and often a massive norm."""

    drop_first_positions: int = 0
    """Tokens at the start of every context, where there is little to look back on."""

    max_norm_ratio: float = 10.0
    """Rows of a larger norm than this many times their layer's median norm: massive activations."""

    def __post_init__(self) -> None:
        """Refuse what would drop everything."""
        if self.drop_first_positions < 0:
            raise ValueError(
                f"drop_first_positions: {self.drop_first_positions} is negative; "
                "give the number of positions to drop, 0 or more"
            )
        if not self.max_norm_ratio > 1:
            raise ValueError(
                f"max_norm_ratio: {self.max_norm_ratio} drops every second row or more; "
                "give a multiple of the median norm above 1, such as 10"
            )


class RowFilter:
    """`Hygiene` applied to a model: knows its special tokens and the usual norm of each layer."""

    def __init__(
        self,
        hygiene: Hygiene,
        special_ids: Sequence[int],
        median_norms: Mapping[int, float],
    ) -> None:
        """Fix what is dropped.

        Args:
            hygiene: The rules.
            special_ids: Token ids that count as special.
            median_norms: Of each layer that will be asked for, in the model's units (from the pilot).
        """
        self.hygiene = hygiene
        self.special_ids = tuple(sorted(set(special_ids)))
        self.median_norms = dict(sorted(median_norms.items()))
        self._special = np.array(self.special_ids, np.int64)
        self._max_norm = np.full(max(self.median_norms, default=0) + 1, np.nan)
        for layer, norm in self.median_norms.items():
            self._max_norm[layer] = norm * hygiene.max_norm_ratio

    def keep(
        self,
        token_id: Integer[np.ndarray, "*rows"],
        position: Integer[np.ndarray, "*rows"],
        layer: Integer[np.ndarray, "*rows"],
        norm: Shaped[np.ndarray, "*rows"],
    ) -> Bool[np.ndarray, "*rows"]:
        """Which rows are used, from their columns.

        Raises:
            StoreError: If a row's layer has no median norm.
        """
        special, first, massive = self.dropped(token_id, position, layer, norm).values()
        return ~(special | first | massive)

    def dropped(
        self,
        token_id: Integer[np.ndarray, "*rows"],
        position: Integer[np.ndarray, "*rows"],
        layer: Integer[np.ndarray, "*rows"],
        norm: Shaped[np.ndarray, "*rows"],
    ) -> dict[str, Bool[np.ndarray, "*rows"]]:
        """Which rows are not used, by reason; a row may have several.

        Raises:
            StoreError: If a row's layer has no median norm.
        """
        special = np.isin(token_id, self._special) & self.hygiene.drop_special_tokens
        return {
            "special_tokens": special,
            "first_positions": position < self.hygiene.drop_first_positions,
            "massive_norms": ~(norm <= self._limit(layer)),
        }

    def _limit(self, layer: Integer[np.ndarray, "*rows"]) -> Shaped[np.ndarray, "*rows"]:
        known = layer < len(self._max_norm)
        limit = self._max_norm[np.where(known, layer, 0)]
        unknown = ~known | np.isnan(limit)
        if unknown.any():
            raise StoreError(
                f"the row filter knows the median norms of layers {list(self.median_norms)}, and "
                f"was asked for layer {np.unique(layer[unknown]).tolist()}; "
                "build it from a pilot that has every layer"
            )
        return limit

    def to_json(self) -> dict[str, Any]:
        """Everything the filter needs, as JSON values: to be kept beside what is trained with it."""
        return {
            "drop_special_tokens": self.hygiene.drop_special_tokens,
            "drop_first_positions": self.hygiene.drop_first_positions,
            "max_norm_ratio": self.hygiene.max_norm_ratio,
            "special_ids": list(self.special_ids),
            "median_norms": {str(layer): norm for layer, norm in self.median_norms.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RowFilter":
        """The filter that `to_json` gave."""
        return cls(
            Hygiene(
                drop_special_tokens=data["drop_special_tokens"],
                drop_first_positions=data["drop_first_positions"],
                max_norm_ratio=data["max_norm_ratio"],
            ),
            data["special_ids"],
            {int(layer): norm for layer, norm in data["median_norms"].items()},
        )

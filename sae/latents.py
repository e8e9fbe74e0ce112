"""Sparse codes: which latents of which token are in use, and how strongly."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Pattern:
    """Places of a sparse (rows, d_sae) matrix, row by row.

    Entry e of row r has `offsets[r] <= e < offsets[r + 1]`; rows may differ in length.
    """

    indices: Int[Tensor, " entries"]
    """Column (latent) of each entry."""

    offsets: Int[Tensor, " rows_plus_one"]
    """Where each row starts; the last element is the number of entries."""

    d_sae: int
    """Number of columns."""

    @property
    def n_rows(self) -> int:
        """Rows of the matrix; tokens, for a code."""
        return len(self.offsets) - 1

    @cached_property
    def rows(self) -> Int[Tensor, " entries"]:
        """Row of each entry."""
        counts = self.offsets.diff()
        ids = torch.arange(self.n_rows, device=counts.device)
        return ids.repeat_interleave(counts, output_size=len(self.indices))

    @cached_property
    def by_latent(self) -> "Transposed":
        """The same entries, latent by latent: one sort, shared by every weight's gradient."""
        return Transposed.of(self.indices, self.d_sae)


@dataclass(frozen=True, eq=False)
class Transposed:
    """Entries sorted by a key in [0, n_keys)."""

    order: Int[Tensor, " entries"]
    """Entry that stands at each place of the sorted order; equal keys keep their order."""

    offsets: Int[Tensor, " keys_plus_one"]
    """Where each key starts in the sorted order."""

    @staticmethod
    def of(keys: Int[Tensor, " entries"], n_keys: int) -> "Transposed":
        """Sort entries by key."""
        sorted_keys, order = torch.sort(keys.int(), stable=True)
        bounds = torch.arange(n_keys + 1, dtype=torch.int32, device=keys.device)
        return Transposed(order, torch.searchsorted(sorted_keys, bounds))


@dataclass(frozen=True, eq=False)
class SparseLatents:
    """Latents in use: `values[e]` is latent `indices[e]` of the token that owns entry e.

    Values are never negative. An entry of value 0 is a place TopK had to fill where fewer than k
    latents were on; it is not in use and counts for nothing.
    """

    values: Float[Tensor, " entries"]
    """Activation of each entry; carries the gradient."""

    pattern: Pattern
    """Token and latent of each entry."""

    gates: Float[Tensor, " entries"] | None = None
    """JumpReLU in training: 1 where on; carries the gradient of L0 to the thresholds."""

    @property
    def indices(self) -> Int[Tensor, " entries"]:
        """Latent of each entry."""
        return self.pattern.indices

    @property
    def offsets(self) -> Int[Tensor, " tokens_plus_one"]:
        """Where each token's entries start."""
        return self.pattern.offsets

    @property
    def tokens(self) -> Int[Tensor, " entries"]:
        """Token of each entry."""
        return self.pattern.rows

    @property
    def n_tokens(self) -> int:
        """Tokens encoded."""
        return self.pattern.n_rows

    @property
    def d_sae(self) -> int:
        """Width of the dictionary."""
        return self.pattern.d_sae

    def l0(self) -> Int[Tensor, " tokens"]:
        """Latents in use (value above 0) by each token."""
        counts = torch.zeros(self.n_tokens, dtype=torch.int64, device=self.values.device)
        return counts.index_add_(0, self.tokens, (self.values > 0).long())

    def dense(self) -> Float[Tensor, "tokens d_sae"]:
        """The full matrix. For tests and small inspections: it is what the rest avoids."""
        out = self.values.new_zeros(self.n_tokens, self.d_sae)
        return out.index_put((self.tokens, self.indices), self.values, accumulate=True)

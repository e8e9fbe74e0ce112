"""Which latents of a token stay on: TopK, BatchTopK and a threshold, all by exact pruning.

An encoder hands over its scores block by block (`ScoreBlock`: some tokens, some latents), so that
nothing of size (tokens, d_sae) has to exist. A score rises with the latent's value: it is the
pre-activation for the dense encoder, the product u*v for the Kronecker one (mAND is its root).
Only positive scores are latents that are on.

Pruning rests on one fact: an entry among the k largest lies in one of the k groups with the
largest maxima, whatever the groups, for any other group has k entries above it. For the
Kronecker encoder a group is a head, whose maximum is max p * max q without expanding it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.latents import Pattern


class Picks(NamedTuple):
    """Chosen entries; the three share one shape."""

    scores: Tensor
    """Scores; 0 or less where the latent is off."""

    leads: Tensor
    """Pre-activation of the first factor: u_i for the Kronecker encoder, else the score."""

    ids: Tensor
    """Latents."""


@runtime_checkable
class ScoreBlock(Protocol):
    """Scores of some consecutive tokens for some latents."""

    @property
    def first_token(self) -> int:
        """Where the block's tokens start in the batch."""
        ...

    def top_k(self, k: int) -> Picks:
        """The k largest of each token, or all if the block has fewer; (tokens, k) in no order."""
        ...

    def lower_bound(self, n: int) -> Tensor | None:
        """A score that at least n entries of this block reach, or None if none is at hand."""
        ...

    def above(self, bound: Tensor | float) -> tuple[Picks, Tensor]:
        """Entries whose score is positive and at least `bound`, and their tokens."""
        ...


@dataclass(frozen=True, eq=False)
class Selection:
    """Entries that stay on: their places, and what the encoder needs to give them values."""

    pattern: Pattern
    scores: Float[Tensor, " entries"]
    leads: Float[Tensor, " entries"]

    @staticmethod
    def empty(like: Float[Tensor, "tokens d_model"], d_sae: int) -> "Selection":
        """No entries, for as many tokens, on the same device and in the same dtype."""
        offsets = torch.zeros(len(like) + 1, dtype=torch.int64, device=like.device)
        none = like.new_zeros(0)
        return Selection(Pattern(indices=offsets[:0], offsets=offsets, d_sae=d_sae), none, none)

    def keep(self, mask: Bool[Tensor, " entries"]) -> "Selection":
        """The entries where `mask` is true."""
        before = F.pad(mask.cumsum(0), (1, 0))
        pattern = Pattern(
            indices=self.pattern.indices[mask],
            offsets=before[self.pattern.offsets],
            d_sae=self.pattern.d_sae,
        )
        return Selection(pattern, self.scores[mask], self.leads[mask])


def top_k_per_row(
    scores: Float[Tensor, "rows columns"], k: int
) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """`scores.topk(k, sorted=False)`, by pruning groups of columns; equal up to ties."""
    n_rows, n_columns = scores.shape
    # Cheapest at sqrt(n_columns / k) columns a group, where both stages look at as many.
    width = 1 << max(0, int((n_columns / k) ** 0.5).bit_length() - 1)
    n_groups = n_columns // width
    if width < 4:
        best = scores.topk(k, sorted=False)
        return best.values, best.indices
    # Group g is columns g, g + n_groups, ...: its maximum is then taken over whole rows of memory.
    grouped = scores[:, : width * n_groups].view(n_rows, width, n_groups)
    groups = grouped.amax(1).topk(k, sorted=False).indices
    steps = torch.arange(width, device=scores.device) * n_groups
    columns = (groups[:, :, None] + steps).flatten(1)
    if width * n_groups < n_columns:
        rest = torch.arange(width * n_groups, n_columns, device=scores.device)
        columns = torch.cat([columns, rest.expand(n_rows, -1)], 1)
    best = scores.gather(1, columns).topk(k, sorted=False)
    return best.values, columns.gather(1, best.indices)


def top_k_reference(acts: Float[Tensor, "tokens d_sae"], k: int) -> Float[Tensor, "tokens d_sae"]:
    """What `select_top_k` stands for: all but the k largest of each token set to 0."""
    best = acts.topk(k, dim=1)
    return torch.zeros_like(acts).scatter(1, best.indices, best.values)


def batch_top_k_reference(
    acts: Float[Tensor, "tokens d_sae"], budget: int
) -> Float[Tensor, "tokens d_sae"]:
    """What `select_batch_top_k` stands for: all but the `budget` largest of the batch set to 0."""
    best = acts.flatten().topk(budget)
    return torch.zeros_like(acts.flatten()).scatter(0, best.indices, best.values).view_as(acts)


def select_top_k(blocks: Iterable[ScoreBlock], n_tokens: int, k: int, d_sae: int) -> Selection:
    """The k largest scores of every token; k entries each, some 0 where fewer are on."""
    best: dict[int, Picks] = {}
    for block in blocks:
        new = block.top_k(k)
        old = best.get(block.first_token)
        best[block.first_token] = new if old is None else _merge(old, new, k)
    scores, leads, ids = (
        torch.cat([picks[field] for _, picks in sorted(best.items())]) for field in range(3)
    )
    offsets = torch.arange(n_tokens + 1, device=ids.device) * ids.shape[1]
    pattern = Pattern(indices=ids.flatten(), offsets=offsets, d_sae=d_sae)
    return Selection(pattern, scores.flatten(), leads.flatten())


def _merge(old: Picks, new: Picks, k: int) -> Picks:
    both = Picks(*(torch.cat(pair, 1) for pair in zip(old, new, strict=True)))
    if both.ids.shape[1] <= k:
        return both
    keep = both.scores.topk(k, sorted=False).indices
    return Picks(*(field.gather(1, keep) for field in both))


def select_batch_top_k(
    blocks: Iterable[ScoreBlock], n_tokens: int, budget: int, d_sae: int
) -> Selection:
    """The `budget` largest positive scores of the whole batch (BatchTopK, arXiv 2412.06410).

    Keeps the best so far and a bound that rises with every block, so that later blocks give up
    few candidates.
    """
    found: tuple[Picks, Tensor] | None = None
    bound: Tensor | float = 0.0
    for block in blocks:
        if found is None or len(found[1]) < budget:
            start = block.lower_bound(budget)
            bound = bound if start is None else start.clamp(min=bound)
        picks, tokens = block.above(bound)
        if found is not None:
            picks = Picks(*(torch.cat(pair) for pair in zip(found[0], picks, strict=True)))
            tokens = torch.cat([found[1], tokens])
        if len(tokens) > budget:
            keep = picks.scores.topk(budget, sorted=False).indices
            picks, tokens = Picks(*(field[keep] for field in picks)), tokens[keep]
            bound = picks.scores.min()
        found = picks, tokens
    assert found is not None
    return _by_token(*found, n_tokens, d_sae)


def select_above(
    blocks: Iterable[ScoreBlock], bound: Tensor | float, n_tokens: int, d_sae: int
) -> Selection:
    """All positive entries whose score is at least `bound`."""
    parts = [block.above(bound) for block in blocks]
    picks = Picks(*(torch.cat([part[field] for part, _ in parts]) for field in range(3)))
    return _by_token(picks, torch.cat([tokens for _, tokens in parts]), n_tokens, d_sae)


def _by_token(picks: Picks, tokens: Tensor, n_tokens: int, d_sae: int) -> Selection:
    sorted_keys, order = torch.sort(tokens * d_sae + picks.ids)
    starts = torch.arange(n_tokens + 1, device=tokens.device) * d_sae
    pattern = Pattern(
        indices=picks.ids[order],
        offsets=torch.searchsorted(sorted_keys, starts),
        d_sae=d_sae,
    )
    return Selection(pattern, picks.scores[order], picks.leads[order])


@dataclass(frozen=True, eq=False)
class MatrixBlock:
    """A block whose scores are at hand as a matrix."""

    scores: Float[Tensor, "tokens latents"]
    ids: Int[Tensor, " latents"]
    first_token: int = 0
    leads: Float[Tensor, "tokens latents"] | None = None
    """First factors, where they are not the scores themselves."""

    def top_k(self, k: int) -> Picks:
        """The k largest of each token."""
        best, columns = top_k_per_row(self.scores, min(k, self.scores.shape[1]))
        leads = best if self.leads is None else self.leads.gather(1, columns)
        return Picks(best, leads, self.ids[columns])

    def lower_bound(self, n: int) -> Tensor | None:
        """The n-th largest of the maxima of groups of latents."""
        n_tokens, n_latents = self.scores.shape
        width = min(n_latents, max(1, n_tokens * n_latents // (2 * n)))
        n_groups = n_latents // width
        if n_tokens * n_groups < n:
            return None
        maxima = self.scores[:, : n_groups * width].view(n_tokens, width, n_groups).amax(1)
        return maxima.flatten().topk(n, sorted=False).values.min()

    def above(self, bound: Tensor | float) -> tuple[Picks, Tensor]:
        """Entries whose score is positive and at least `bound`, and their tokens."""
        mask = (self.scores >= bound) & (self.scores > 0)
        tokens, columns = mask.nonzero(as_tuple=True)
        scores = self.scores[tokens, columns]
        leads = scores if self.leads is None else self.leads[tokens, columns]
        return Picks(scores, leads, self.ids[columns]), tokens + self.first_token

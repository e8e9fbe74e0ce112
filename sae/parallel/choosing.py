"""The k largest scores of all ranks, from those each rank has chosen of its own: exact, and cheap to agree on.

Neither latents nor, for BatchTopK, scores have to travel: a rank needs to know only which of its own
candidates stay. Among equal scores at the edge those of the lower rank stay, so that the number kept is
exact; one process breaks such ties its own way, which torch leaves open.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.parallel.collectives import Group
from sae.selection import Selection

DIGIT_BITS = 11
"""Bits of a score that one histogram looks at."""


def keep_top_k(chosen: Selection, k: int, group: Group) -> Selection:
    """Of each token's candidates, as many from each rank, those among the k largest of all ranks."""
    n_tokens = chosen.pattern.n_rows
    scores = _wide(chosen.scores).view(n_tokens, len(chosen.scores) // n_tokens)
    best = scores.sort(dim=1, descending=True, stable=True)
    padded = F.pad(best.values, (0, k - scores.shape[1]), value=-torch.inf)
    n_kept = _n_kept(padded, group)
    places = best.indices.argsort(1)
    return chosen.keep((places < n_kept[:, None]).flatten())


def _n_kept(scores: Float[Tensor, "tokens k"], group: Group) -> Int[Tensor, " tokens"]:
    """How many of its k falling scores of each token this rank keeps.

    Every rank is told the candidates of a share of the tokens, and answers with these counts.
    """
    n_tokens, k = scores.shape
    shares = [len(part) for part in torch.arange(n_tokens).tensor_split(group.size)]
    mine = shares[group.rank]
    every = group.exchange(scores, shares, [mine] * group.size).view(group.size, mine, k)
    by_token = every.transpose(0, 1).flatten(1)
    owners = by_token.sort(dim=1, descending=True, stable=True).indices[:, :k] // k
    counts = torch.zeros(mine, group.size, dtype=torch.int32, device=scores.device)
    counts.scatter_add_(1, owners, torch.ones_like(owners, dtype=torch.int32))
    return group.exchange(counts.T.flatten(), [mine] * group.size, shares)


def keep_largest(chosen: Selection, budget: int, group: Group) -> Selection:
    """Of this rank's positive candidates, those among the `budget` largest of all ranks.

    The smallest that stays is found by its bits, which order positive numbers: a histogram of the
    first eleven over all ranks, of the next among those that share these, and so on.
    """
    bits = _bits(chosen.scores)
    n_bits = 8 * _wide(chosen.scores).itemsize - 1
    found = torch.zeros((), dtype=torch.int64, device=bits.device)
    left = torch.full_like(found, budget)
    for shift in range((n_bits - 1) // DIGIT_BITS * DIGIT_BITS, -1, -DIGIT_BITS):
        prefix = bits >> shift
        like_found = (prefix >> DIGIT_BITS) == found
        histogram = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64, device=bits.device)
        histogram.scatter_add_(0, prefix & ((1 << DIGIT_BITS) - 1), like_found.long())
        reaching = group.reduce(histogram).flip(0).cumsum(0).flip(0)
        left = torch.minimum(left, reaching[0])  # where there are fewer than the budget, all stay
        digit = (reaching >= left).sum() - 1
        left = left - F.pad(reaching, (0, 1))[digit + 1]
        found = (found << DIGIT_BITS) | digit
    equal = bits == found
    n_before = group.gathered(equal.sum())[: group.rank].sum()
    return chosen.keep((bits > found) | (equal & (n_before + equal.cumsum(0) <= left)))


def _bits(scores: Tensor) -> Int[Tensor, " entries"]:
    """The bits of positive numbers, as whole numbers in the same order."""
    wide = _wide(scores)
    return wide.view(torch.int32 if wide.itemsize == 4 else torch.int64).long()


def _wide(scores: Tensor) -> Tensor:
    """At least float32, the same on all ranks whatever their encoder has computed in."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))

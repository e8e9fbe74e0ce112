"""Comparing dictionaries: do two runs find the same directions, and how many does one span?"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_TABLE_ENTRIES = 2**24
"""Cosines that are in memory at once."""


def cosines(
    ours: Float[Tensor, "a d_model"], theirs: Float[Tensor, "b d_model"]
) -> Float[Tensor, "a b"]:
    """|cosine| of every row of one dictionary with every row of the other."""
    return (F.normalize(ours, dim=1) @ F.normalize(theirs, dim=1).T).abs()


def dictionary_mcc(ours: Float[Tensor, "a d_model"], theirs: Float[Tensor, "b d_model"]) -> float:
    """Mean |cosine| over the best one-to-one matching of rows; in [0, 1], 1 the same dictionary.

    The smaller dictionary is matched whole (Hungarian algorithm; "PW-MCC", arXiv 2505.20254).
    """
    # The one place that needs more than torch; asked for only here.
    from scipy.optimize import linear_sum_assignment

    table = cosines(ours.detach().double(), theirs.detach().double()).cpu()
    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    return float(table[torch.as_tensor(rows), torch.as_tensor(columns)].mean())


def mmcs(ours: Float[Tensor, "a d_model"], theirs: Float[Tensor, "b d_model"]) -> float:
    """Mean over rows of `ours` of the largest |cosine| with a row of `theirs`; in [0, 1].

    Rows may share a partner, so it isn't symmetric: it asks whether `theirs` holds what `ours` has.
    """
    best = [cosines(rows, theirs.detach()).amax(1) for rows in ours.detach().split(1024)]
    return float(torch.cat(best).double().mean())


def effective_rank(rows: Float[Tensor, "rows d_model"]) -> float:
    """Exp of the entropy of the normalised singular values; from 1 to the smaller side.

    Roy and Vetterli 2007. Equal singular values give the rank itself.

    Raises:
        ValueError: If all rows are zero, where it isn't defined.
    """
    values = torch.linalg.svdvals(rows.detach().double())
    if not values.sum() > 0:
        raise ValueError(
            f"the {len(rows)} rows are all zero and span nothing; effective rank needs a row that "
            "isn't; check which weights were passed"
        )
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def nearest_rows(
    rows: Float[Tensor, "rows d_model"], n: int
) -> tuple[Float[Tensor, "rows n"], Int[Tensor, "rows n"]]:
    """Of each row the `n` others of largest cosine, falling: their cosines, and which they are.

    Signed: a row that points the other way is the farthest. Of fewer than n + 1 rows all others.
    """
    unit = F.normalize(rows.detach(), dim=1)
    n = min(n, len(unit) - 1)
    found = []
    for start in range(0, len(unit), step := max(1, _TABLE_ENTRIES // len(unit))):
        table = unit[start : start + step] @ unit.T
        own = torch.arange(len(table), device=table.device)
        table[own, start + own] = -torch.inf
        found.append(table.topk(n, dim=1))
    values, indices = zip(*found, strict=True)
    return torch.cat(values), torch.cat(indices)

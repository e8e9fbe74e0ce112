"""Comparing dictionaries: do two runs find the same directions, and how many does one span?"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


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

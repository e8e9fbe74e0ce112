"""Initial weights: the same numbers, whoever holds which of the rows."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_ROWS_AT_ONCE = 1 << 12


def unit_rows(
    generator: torch.Generator, n_rows: int, d_model: int, held: Sequence[range]
) -> Float[Tensor, "held d_model"]:
    """Rows of norm 1 in random directions: of `n_rows` that are drawn, those in `held`.

    One row after the other, and all of them, so that each is what one draw of the whole would make
    it; but never more than a few thousand are in memory that are not held.
    """
    # Torch draws numbers sixteen at a time, so pieces must start at a multiple of that, and the last
    # one must hold as many: it takes the remainder too.
    starts = list(range(0, max(1, n_rows - 15), _ROWS_AT_ONCE))
    out = torch.empty(sum(map(len, held)), d_model)
    for start, stop in zip(starts, [*starts[1:], n_rows], strict=True):
        drawn = torch.randn(stop - start, d_model, generator=generator, device=generator.device)
        place = 0
        for rows in held:
            first, last = max(rows.start, start), min(rows.stop, stop)
            if first < last:
                at = place + first - rows.start
                out[at : at + last - first] = drawn[first - start : last - start]
            place += len(rows)
    return F.normalize(out, dim=1)

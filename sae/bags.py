"""The two sparse operations everything is made of: weighted sums of rows, and dots of row pairs.

Both go over the entries of a sparse matrix and read one row of a table for each; neither makes an
(entries, d_model) copy. On a GPU they are the kernels of `sae.triton_kernels`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels import kernels_for


def weighted_sums(
    table: Float[Tensor, "rows d_model"],
    picks: Int[Tensor, " entries"],
    weights: Float[Tensor, " entries"],
    offsets: Int[Tensor, " bags_plus_one"],
) -> Float[Tensor, "bags d_model"]:
    """Row b is the sum of `weights[e] * table[picks[e]]` over the entries e of bag b.

    An empty bag gives zeros. Not differentiable: the callers write their own backward, because
    that of the weighted `embedding_bag` makes copies and has no bfloat16 on CUDA
    (pytorch#185808).
    """
    kernels = kernels_for(table)
    if kernels is not None:
        return kernels.weighted_sums(table.detach(), picks, weights.detach(), offsets)
    with torch.autocast(table.device.type, enabled=False):
        return F.embedding_bag(
            picks,
            table.detach(),
            offsets,
            mode="sum",
            per_sample_weights=weights.detach().to(table.dtype),
            include_last_offset=True,
        )


def weighted_sums_reference(
    table: Float[Tensor, "rows d_model"],
    picks: Int[Tensor, " entries"],
    weights: Float[Tensor, " entries"],
    offsets: Int[Tensor, " bags_plus_one"],
) -> Float[Tensor, "bags d_model"]:
    """`weighted_sums` as its formula, with the copy it avoids."""
    bags = torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff())
    out = table.new_zeros(len(offsets) - 1, table.shape[1])
    return out.index_add(0, bags, weights[:, None] * table[picks])


def entry_dots(
    left: Float[Tensor, "rows d_model"],
    right: Float[Tensor, "latents d_model"],
    rows: Int[Tensor, " entries"],
    picks: Int[Tensor, " entries"],
) -> Float[Tensor, " entries"]:
    """The dot product of `left[rows[e]]` with `right[picks[e]]` for each entry e."""
    left, right = left.detach().to(right.dtype), right.detach()
    kernels = kernels_for(right)
    if kernels is not None:
        return kernels.entry_dots(left, right, rows, picks)
    # The dots of embedding_bag's own backward; public only through autograd, which would compute
    # the table's gradient too. It needs the bags' offsets only where it is not given `rows`.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, right, picks, rows[:0], rows, 0
    )


def entry_dots_reference(
    left: Float[Tensor, "rows d_model"],
    right: Float[Tensor, "latents d_model"],
    rows: Int[Tensor, " entries"],
    picks: Int[Tensor, " entries"],
) -> Float[Tensor, " entries"]:
    """`entry_dots` as its formula."""
    return (left[rows] * right[picks]).sum(-1)

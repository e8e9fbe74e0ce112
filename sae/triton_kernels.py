"""The sparse operations as Triton kernels; `sae.bags` and `sae.kron` hold what each stands for.

Sums are taken in float32 (float64 for float64 tables) whatever the inputs are. There are no
atomics and no tuning at run time: every sum is one program's, in an order that shapes and dtypes
fix, so on one kind of GPU the same inputs give the same bits.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_ENTRIES, _COLUMNS, _HEADS = 16, 128, 128


def weighted_sums(
    table: Float[Tensor, "rows d_model"],
    picks: Int[Tensor, " entries"],
    weights: Float[Tensor, " entries"],
    offsets: Int[Tensor, " bags_plus_one"],
) -> Float[Tensor, "bags d_model"]:
    """See `sae.bags.weighted_sums`.

    A program sums a bag over some columns. Bags differ widely in length where they are latents;
    the longest start first, so that none is left running alone at the end.
    """
    table, n_bags, d_model = table.contiguous(), len(offsets) - 1, table.shape[1]
    out = torch.empty(n_bags, d_model, dtype=table.dtype, device=table.device)
    longest_first = offsets.diff().argsort(descending=True)
    with torch.cuda.device_of(table):
        _weighted_sums[n_bags, triton.cdiv(d_model, _COLUMNS)](
            table,
            picks.contiguous(),
            weights.contiguous(),
            offsets,
            longest_first,
            out,
            d_model,
            sum_dtype=_sum_dtype(table),
            n_entries_at_once=_ENTRIES,
            n_columns=_COLUMNS,
        )
    return out


def entry_dots(
    left: Float[Tensor, "rows d_model"],
    right: Float[Tensor, "latents d_model"],
    rows: Int[Tensor, " entries"],
    picks: Int[Tensor, " entries"],
) -> Float[Tensor, " entries"]:
    """See `sae.bags.entry_dots`.

    A program takes a fixed number of consecutive entries, whichever rows they belong to.
    """
    left, right, d_model = left.contiguous(), right.contiguous(), left.shape[1]
    out = torch.empty(len(picks), dtype=right.dtype, device=right.device)
    with torch.cuda.device_of(left):
        _entry_dots[(triton.cdiv(len(picks), _ENTRIES),)](
            left,
            right,
            rows.contiguous(),
            picks.contiguous(),
            out,
            len(picks),
            d_model,
            sum_dtype=_sum_dtype(right),
            n_entries_at_once=_ENTRIES,
            n_columns=_COLUMNS,
        )
    return out


def head_maxima(
    base: Float[Tensor, "tokens h m"], extension: Float[Tensor, "tokens h n"]
) -> Float[Tensor, "tokens h"]:
    """See `sae.kron.HeadBlock.maxima`: factors are rectified, and may be slices of one matrix."""
    n_tokens, n_heads, m = base.shape
    n = extension.shape[2]
    assert base.stride()[1:] == (m, 1)
    assert extension.stride()[1:] == (n, 1)
    wide = torch.promote_types(base.dtype, torch.float32)
    out = torch.empty(n_tokens, n_heads, dtype=wide, device=base.device)
    with torch.cuda.device_of(base):
        _head_maxima[n_tokens, triton.cdiv(n_heads, _HEADS)](
            base,
            extension,
            out,
            base.stride(0),
            extension.stride(0),
            n_heads,
            m=m,
            n=n,
            m_padded=triton.next_power_of_2(m),
            n_padded=triton.next_power_of_2(n),
            n_heads_at_once=_HEADS,
        )
    return out


def _sum_dtype(table: Tensor) -> Any:
    return tl.float64 if table.dtype == torch.float64 else tl.float32


# The annotations of kernels are Triton's, which a checker of tensor shapes must leave alone.
@triton.jit
@no_type_check
def _weighted_sums(
    table,
    picks,
    weights,
    offsets,
    bags,
    out,
    d_model,
    sum_dtype: tl.constexpr,
    n_entries_at_once: tl.constexpr,
    n_columns: tl.constexpr,
):
    bag = tl.load(bags + tl.program_id(0))
    columns = tl.program_id(1) * n_columns + tl.arange(0, n_columns)
    inside = columns < d_model
    start, stop = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    total = tl.zeros((n_columns,), sum_dtype)
    for first in range(start, stop, n_entries_at_once):
        entries = first + tl.arange(0, n_entries_at_once)
        mine = entries < stop
        rows = tl.load(picks + entries, mask=mine, other=0).to(tl.int64)
        weight = tl.load(weights + entries, mask=mine, other=0.0).to(sum_dtype)
        places = table + rows[:, None] * d_model + columns[None, :]
        read = tl.load(places, mask=mine[:, None] & inside[None, :], other=0.0).to(sum_dtype)
        total += tl.sum(read * weight[:, None], axis=0)
    tl.store(out + bag * d_model + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _entry_dots(
    left,
    right,
    rows,
    picks,
    out,
    n_entries,
    d_model,
    sum_dtype: tl.constexpr,
    n_entries_at_once: tl.constexpr,
    n_columns: tl.constexpr,
):
    entries = tl.program_id(0) * n_entries_at_once + tl.arange(0, n_entries_at_once)
    mine = entries < n_entries
    left_rows = left + tl.load(rows + entries, mask=mine, other=0).to(tl.int64) * d_model
    right_rows = right + tl.load(picks + entries, mask=mine, other=0).to(tl.int64) * d_model
    total = tl.zeros((n_entries_at_once,), sum_dtype)
    for first in range(0, d_model, n_columns):
        columns = first + tl.arange(0, n_columns)
        both = mine[:, None] & (columns < d_model)[None, :]
        ours = tl.load(left_rows[:, None] + columns[None, :], mask=both, other=0.0)
        theirs = tl.load(right_rows[:, None] + columns[None, :], mask=both, other=0.0)
        total += tl.sum(ours.to(sum_dtype) * theirs.to(sum_dtype), axis=1)
    tl.store(out + entries, total.to(out.dtype.element_ty), mask=mine)


@triton.jit
@no_type_check
def _head_maxima(
    base,
    extension,
    out,
    base_stride,
    extension_stride,
    n_heads,
    m: tl.constexpr,
    n: tl.constexpr,
    m_padded: tl.constexpr,
    n_padded: tl.constexpr,
    n_heads_at_once: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * n_heads_at_once + tl.arange(0, n_heads_at_once)
    there = heads < n_heads
    i, j = tl.arange(0, m_padded), tl.arange(0, n_padded)
    # Rectified factors are never below the 0 that stands for what is not there.
    u = tl.load(
        base + token * base_stride + heads[:, None] * m + i[None, :],
        mask=there[:, None] & (i < m)[None, :],
        other=0.0,
    )
    v = tl.load(
        extension + token * extension_stride + heads[:, None] * n + j[None, :],
        mask=there[:, None] & (j < n)[None, :],
        other=0.0,
    )
    wide = out.dtype.element_ty
    product = tl.max(u.to(wide), axis=1) * tl.max(v.to(wide), axis=1)
    tl.store(out + token * n_heads + heads, product, mask=there)

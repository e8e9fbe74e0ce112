"""From latents back to activations: sums of the decoder rows in use."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.bags import entry_dots, weighted_sums
from sae.latents import Pattern, SparseLatents


def decode_reference(
    latents: SparseLatents, w_dec: Float[Tensor, "d_sae d_model"]
) -> Float[Tensor, "tokens d_model"]:
    """What `decode` computes: the dense product."""
    return latents.dense() @ w_dec


def decode(
    latents: SparseLatents,
    w_dec: Float[Tensor, "d_sae d_model"],
    lengths: Float[Tensor, " d_sae"] | None = None,
) -> Float[Tensor, "tokens d_model"]:
    """Sum of the decoder rows in use, each times its latent; without the decoder's bias.

    Reads only the rows in use, and its backward writes the decoder's gradient latent by latent.

    Args:
        latents: The code.
        w_dec: Decoder weight.
        lengths: Factors of its rows, all 1, for their gradient: the dot of each row with its own.
            It comes with that of the latents, without a look at the rows.
    """
    return _Decode.apply(latents.values, w_dec, lengths, latents.pattern)


def decode_segments(
    latents: SparseLatents,
    w_dec: Float[Tensor, "d_sae d_model"],
    prefixes: tuple[int, ...],
    lengths: Float[Tensor, " d_sae"] | None = None,
) -> Float[Tensor, "prefixes tokens d_model"]:
    """What each ring of nested dictionaries writes of the one code, without the decoder's bias.

    Segment s sums the latents from `prefixes[s - 1]` up to `prefixes[s]`; running sums over
    segments are the nested reconstructions (Matryoshka, arXiv 2503.17547, 3.2: one shared code,
    gradients through all prefixes). Each entry is decoded once. `lengths` is that of `decode`.
    """
    if len(prefixes) < 2:
        return decode(latents, w_dec, lengths)[None]
    pattern = latents.pattern
    bounds = torch.tensor(prefixes, device=pattern.indices.device)
    segments = torch.searchsorted(bounds, pattern.indices, right=True)
    bags = segments * pattern.n_rows + pattern.rows
    n_bags = len(prefixes) * pattern.n_rows
    sorted_bags, order = torch.sort(bags, stable=True)
    starts = torch.searchsorted(sorted_bags, torch.arange(n_bags + 1, device=bags.device))
    by_segment = Pattern(indices=pattern.indices[order], offsets=starts, d_sae=pattern.d_sae)
    sums = _Decode.apply(latents.values[order], w_dec, lengths, by_segment)
    return sums.view(len(prefixes), pattern.n_rows, -1)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, w_dec: Tensor, lengths: Tensor | None, pattern: Pattern
    ) -> Tensor:
        ctx.save_for_backward(values, w_dec, lengths)
        ctx.pattern = pattern
        return weighted_sums(w_dec, pattern.indices, values, pattern.offsets)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        values, w_dec, lengths = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        needs_values, needs_w_dec, needs_lengths, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_values = grad_w_dec = grad_lengths = None
        # Latent by latent, so that a row of the decoder is read once, and rows one after the other.
        order = pattern.by_latent.order
        tokens, ids, sorted_values = pattern.rows[order], pattern.indices[order], values[order]
        dots = entry_dots(grad, w_dec, tokens, ids)
        if needs_values:
            grad_values = torch.empty_like(values).index_copy_(0, order, dots.to(values.dtype))
        if needs_lengths:
            shares = (dots * sorted_values).to(lengths.dtype)
            grad_lengths = torch.zeros_like(lengths)
            grad_lengths.index_add_(0, ids, shares)
        if needs_w_dec:
            grad_w_dec = weighted_sums(
                grad.to(w_dec.dtype), tokens, sorted_values, pattern.by_latent.offsets
            )
        return grad_values, grad_w_dec, grad_lengths, None

"""The dense encoder: a weight row and a bias for every latent."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.bags import weighted_sums
from sae.drawing import unit_rows
from sae.latents import Pattern
from sae.selection import MatrixBlock, Selection

BLOCK_ELEMENTS = 1 << 22
"""Scores held at once, whatever tokens x d_sae is: 16 MiB in float32.

Few enough that a block is still in cache when it is searched, and that the allocator hands the
same memory to the next one.
"""

BLOCK_LATENTS = 1 << 12
"""Widest piece of the dictionary scored at once."""


def token_blocks(
    centred: Float[Tensor, "tokens d_model"], width: int
) -> Iterator[tuple[int, Float[Tensor, "block d_model"]]]:
    """Consecutive tokens, BLOCK_ELEMENTS at most at `width` numbers each, and where they start."""
    height = max(1, BLOCK_ELEMENTS // width)
    for first_token in range(0, len(centred), height):
        yield first_token, centred[first_token : first_token + height]


class DenseEncoder(nn.Module):
    """Latent j of activation x is ReLU(w_enc[j] . (x - b_dec) + b_enc[j])."""

    def __init__(self, d_model: int, d_sae: int, held: range | None = None) -> None:
        """Weights of 0, for all of `d_sae` latents or for those held here."""
        super().__init__()
        self.latents = range(d_sae) if held is None else held
        """Latents whose weights these are."""
        self.rows = [self.latents]
        """Rows of the whole encoder's weights that these are."""
        self.n_rows = d_sae
        """Rows of the whole encoder's weights."""
        self.w_enc = nn.Parameter(torch.zeros(len(self.latents), d_model))
        """(d_sae, d_model): row j reads latent j."""
        self.b_enc = nn.Parameter(torch.zeros(len(self.latents)))
        """(d_sae,)"""

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> Float[Tensor, "d_sae d_model"]:
        """Draw unit rows; return them as the decoder's rows too (Gao et al. 2024, tied start)."""
        self.w_enc.copy_(unit_rows(generator, self.n_rows, self.w_enc.shape[1], self.rows))
        self.b_enc.zero_()
        return self.w_enc.clone()

    @torch.no_grad()
    def blocks(
        self, centred: Float[Tensor, "tokens d_model"], only: Int[Tensor, " latents"] | None = None
    ) -> Iterator[MatrixBlock]:
        """Pre-activations of all latents, or of those in `only`, block by block.

        Args:
            centred: x - b_dec.
            only: Latents to score; all of them if None.
        """
        n_latents = len(self.w_enc) if only is None else len(only)
        width = min(n_latents, BLOCK_LATENTS)
        for first_token, tokens in token_blocks(centred, width):
            for start in range(0, n_latents, width):
                stop = min(start + width, n_latents)
                if only is None:
                    ids = torch.arange(start, stop, device=centred.device)
                    w_enc, b_enc = self.w_enc[start:stop], self.b_enc[start:stop]
                else:
                    ids = only[start:stop]
                    w_enc, b_enc = self.w_enc[ids], self.b_enc[ids]
                yield MatrixBlock(F.linear(tokens, w_enc, b_enc), ids, first_token)

    def score_bound(self, value: Tensor) -> Tensor:
        """A score that every latent above `value` reaches: the value itself."""
        return value

    def values(
        self,
        selection: Selection,
        x: Float[Tensor, "tokens d_model"],
        b_dec: Float[Tensor, " d_model"],
    ) -> Float[Tensor, " entries"]:
        """Values of the selected latents; gradients flow through these entries alone."""
        return _DenseValues.apply(
            selection.scores, selection.pattern, x, self.w_enc, self.b_enc, b_dec
        )

    def reference(
        self, x: Float[Tensor, "tokens d_model"], b_dec: Float[Tensor, " d_model"]
    ) -> Float[Tensor, "tokens d_sae"]:
        """All latents before selection, as the formula has it; what the blocks stand for."""
        return F.linear(x - b_dec, self.w_enc, self.b_enc).relu()


class _DenseValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        pattern: Pattern,
        x: Tensor,
        w_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(scores > 0, x, w_enc, b_dec)
        ctx.pattern = pattern
        return scores.to(b_enc.dtype).clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        on, x, w_enc, b_dec = ctx.saved_tensors
        grad = torch.where(on, grad, 0.0)
        indices = ctx.pattern.indices
        return None, None, *linear_grads(ctx, grad, indices, ctx.pattern, x, w_enc, b_dec)


def linear_grads(
    ctx: Any,
    grad: Float[Tensor, " entries"],
    weight_rows: Int[Tensor, " entries"],
    pattern: Pattern,
    x: Float[Tensor, "tokens d_model"],
    w_enc: Float[Tensor, "rows d_model"],
    b_dec: Float[Tensor, " d_model"],
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients of x, w_enc, b_enc and b_dec, for entries w_enc[row] . (x - b_dec) + b_enc[row].

    Args:
        ctx: The autograd context, asked whether x (its input 2) needs a gradient.
        grad: Gradient of each entry.
        weight_rows: Row of w_enc that each entry read.
        pattern: Places of the entries; sorted once by (rows of) w_enc, for every weight.
        x: Activations.
        w_enc: Encoder weight.
        b_dec: Decoder bias.
    """
    by_row = pattern.by_latent
    order = by_row.order
    centred = (x - b_dec).to(w_enc.dtype)
    tokens = pattern.rows
    grad_w = weighted_sums(centred, tokens[order], grad[order], by_row.offsets)
    grad_b = torch.zeros(len(w_enc), dtype=grad.dtype, device=grad.device)
    grad_b.index_add_(0, weight_rows, grad)
    grad_x = None
    if ctx.needs_input_grad[2]:
        grad_x = weighted_sums(w_enc, weight_rows, grad, pattern.offsets).to(x.dtype)
    # Every token subtracts the same b_dec, so its gradient needs no gradient of x.
    return grad_x, grad_w, grad_b.to(w_enc.dtype), -(grad_b.to(w_enc.dtype) @ w_enc).to(b_dec.dtype)

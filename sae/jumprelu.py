"""JumpReLU: a learnt threshold per latent (arXiv 2407.14435), the baseline BatchTopK is held against.

Neither the jump nor the count of latents in use has a useful gradient in the threshold, so both
get the paper's straight-through estimate: a rectangle of width BANDWIDTH around it.
"""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sae.latents import SparseLatents
from sae.ranks import ALONE, Ranks

BANDWIDTH = 1e-3
"""Width of the estimate's rectangle; the papers' value, for inputs of mean square 1."""

INITIAL_LOG_THRESHOLD = math.log(1e-3)
"""Where thresholds start."""


def jump(
    acts: Float[Tensor, " entries"], thresholds: Float[Tensor, " entries"]
) -> tuple[Float[Tensor, " entries"], Float[Tensor, " entries"]]:
    """The activations above their threshold, 0 elsewhere; and gates, 1 where on.

    Gradients in the threshold t: of the value, -t/BANDWIDTH, and of the gate, -1/BANDWIDTH, where
    the activation is within BANDWIDTH/2 of t (eqs 11 and 12); 0 elsewhere.
    """
    return _Jump.apply(acts, thresholds), _Gate.apply(acts, thresholds)


def sparsity_penalty(
    latents: SparseLatents, kind: Literal["step", "tanh"], ranks: Ranks = ALONE
) -> Float[Tensor, ""]:
    """What JumpReLU pays for latents in use, per token of the batch: of `ranks`, this one's part.

    `step`: their number, L0. `tanh`: the sum of tanh(value), which charges small values less and
    pushes them down as well; decoder rows have norm 1, so values compare.
    """
    assert latents.gates is not None
    paid = latents.gates if kind == "step" else latents.values.tanh()
    return paid.sum() / (latents.n_tokens * ranks.n_batch)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts: Tensor, thresholds: Tensor) -> Tensor:
        ctx.save_for_backward(acts, thresholds)
        return torch.where(acts > thresholds, acts, 0.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        acts, thresholds = ctx.saved_tensors
        near = (acts - thresholds).abs() < BANDWIDTH / 2
        return (
            torch.where(acts > thresholds, grad_outputs[0], 0.0),
            torch.where(near, -grad_outputs[0] * thresholds / BANDWIDTH, 0.0),
        )


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts: Tensor, thresholds: Tensor) -> Tensor:
        ctx.save_for_backward(acts, thresholds)
        return (acts > thresholds).to(acts.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        acts, thresholds = ctx.saved_tensors
        near = (acts - thresholds).abs() < BANDWIDTH / 2
        return None, torch.where(near, -grad_outputs[0] / BANDWIDTH, 0.0)

"""Adam for rows that keep norm 1: what a decoder's update does, some rows at a time, so that all of it is in cache."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_ROWS_AT_ONCE = 512  # Rows that stay in cache between two passes.


@torch.no_grad()
def step_on_sphere(
    weight: Float[Tensor, "rows d_model"],
    state: dict[str, Any],
    group: dict[str, Any],
    gradient: Float[Tensor, "rows d_model"],
    along: Float[Tensor, "rows 1"],
    grad_scale: Float[Tensor, ""],
) -> None:
    """One step, in place. The kernel is the one that torch's fused AdamW runs for other weights.

    Args:
        weight: Rows of norm 1; they have it again afterwards.
        state: Adam's, of this weight; empty before the first step.
        group: Adam's settings, as `torch.optim.AdamW` holds them.
        gradient: Of the weight. It loses what lies along its row.
        along: How much that is: the dot of each row with its gradient.
        grad_scale: What the rest is divided by: clipping.
    """
    if not state:
        state["step"] = torch.zeros((), device=weight.device)
        state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(weight) for _ in range(2))
    state["step"] += 1
    at_once = len(weight) if weight.is_cuda else _ROWS_AT_ONCE
    tensors = (gradient, along, weight, state["exp_avg"], state["exp_avg_sq"])
    blocks = (tensor.split(at_once) for tensor in tensors)
    for grad, part, rows, mean, square in zip(*blocks, strict=True):
        tangent = torch.addcmul(grad, part, rows, value=-1)
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            *([rows], [tangent], [mean], [square], [], [state["step"]]),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=grad_scale,
        )
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        rows /= norms.clamp(min=torch.finfo(rows.dtype).tiny)

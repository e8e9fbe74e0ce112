"""The losses: fraction of variance unexplained, its nested sum, and AuxK."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.ranks import ALONE, Ranks

_ELEMENTS_AT_ONCE = 1 << 17  # Of x in a block: small enough for the cache, large enough for a call.


def total_variance(x: Float[Tensor, "tokens d_model"], ranks: Ranks = ALONE) -> Float[Tensor, ""]:
    """Sum of squared distances to the batch's mean, at least in float32.

    1 where that is 0, so that ratios stay finite: where it is no more than rounding leaves of equal rows.
    The batch is that of all `ranks`.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = ranks.batch_mean(x)
    total = ranks.over_batch((x - mean).square().sum())
    rounding = len(x) * ranks.n_batch * (8 * torch.finfo(x.dtype).eps * mean).square().sum()
    return torch.where(total > rounding, total, 1.0)


def fvu_loss(
    x: Float[Tensor, "tokens d_model"],
    x_hat: Float[Tensor, "tokens d_model"],
    ranks: Ranks = ALONE,
) -> Float[Tensor, ""]:
    """Squared error over the variance of the batch: sum |x - x_hat|^2 / sum |x - mean|^2.

    0 is perfect, 1 no better than the batch's mean. The loss of sparsify and Group-SAE. A batch
    without variance gives the squared error itself, never NaN. Where ranks divide the batch this is
    the part of its own tokens; the parts add up to that of the batch.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x - x_hat).square().sum() / total_variance(x, ranks)


def nested_loss(
    x: Float[Tensor, "tokens d_model"],
    segments: Float[Tensor, "prefixes tokens d_model"],
    b_dec: Float[Tensor, " d_model"],
    weights: Float[Tensor, " prefixes"],
    ranks: Ranks = ALONE,
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens d_model"]]:
    """Weighted sum over nested reconstructions of their FVU (Matryoshka, arXiv 2503.17547, 3.2).

    The paper sums with weights 1, and adds AuxK once: so does this, neither averages.

    Args:
        x: Activations; no gradient flows to them.
        segments: What each ring of the dictionary adds (`decode_segments`): the reconstruction
            of prefix s is b_dec + the sum of segments 0 to s.
        b_dec: Decoder bias.
        weights: Of each prefix's FVU.
        ranks: Where they divide the batch, the loss is the part of this one's tokens (`fvu_loss`).

    Returns:
        The loss, and the residual of the whole dictionary, x - x_hat, without gradient.
    """
    loss, residual = _NestedLoss.apply(segments, b_dec, x.detach(), weights, ranks)
    return loss, residual


class _NestedLoss(torch.autograd.Function):
    """Sums, errors and their gradients a few tokens at a time, while they are in cache."""

    @staticmethod
    def forward(
        ctx: Any, segments: Tensor, b_dec: Tensor, x: Tensor, weights: Tensor, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        variance = total_variance(x, ranks)
        slopes = 2 * weights / variance
        grads, residual = torch.empty_like(segments), torch.empty_like(x)
        energies = torch.zeros_like(weights)
        n_rows = len(x) if x.is_cuda else max(1, _ELEMENTS_AT_ONCE // x.shape[1])
        for start in range(0, len(x), n_rows):
            rows = slice(start, start + n_rows)
            error = b_dec - x[rows]
            for prefix, segment in enumerate(segments[:, rows]):
                error += segment
                energies[prefix] += torch.dot(error.flatten(), error.flatten())
                torch.mul(error, slopes[prefix], out=grads[prefix, rows])
            torch.neg(error, out=residual[rows])
            # A segment is part of its own prefix and of all larger ones.
            for prefix in range(len(segments) - 2, -1, -1):
                grads[prefix, rows] += grads[prefix + 1, rows]
        ctx.save_for_backward(grads)
        ctx.mark_non_differentiable(residual)
        return (energies * weights).sum() / variance, residual

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors[0] * grad_outputs[0]
        return grads, grads[0].sum(0), None, None, None


def auxk_size(d_model: int) -> int:
    """Dead latents asked to explain the residual: the power of two nearest d_model / 2.

    Gao et al. 2024, appendix B.1; nearest in ratio, a tie going up.
    """
    return 1 << max(0, math.floor(math.log2(d_model / 2) + 0.5)) if d_model > 1 else 1


def auxk_loss(
    residual: Float[Tensor, "tokens d_model"],
    explained: Float[Tensor, "tokens d_model"],
    ranks: Ranks = ALONE,
) -> Float[Tensor, ""]:
    """How far dead latents are from explaining what the living leave: FVU of the residual.

    Args:
        residual: x - x_hat, detached: the target. (Group-SAE's code has the sign turned round and
            so trained dead latents away from it.)
        explained: Its reconstruction from dead latents, without the decoder's bias.
        ranks: As in `fvu_loss`.
    """
    return fvu_loss(residual, explained, ranks)
